"""Questions made by code, facts that cannot be judged, and counts: nothing is lost or goes unsaid."""

import json
from pathlib import Path

import pytest

from rlaifv_nb import claims as c
from rlaifv_nb.claims import (
    ClaimsOptions,
    Remark,
    extract_claims,
    is_fragment,
    is_hedged,
    is_leaked,
    question_by_rule,
    question_problem,
    run_claims,
    stands_alone,
)
from rlaifv_nb.iconworld.world import fact_text, question_text, read_claims
from rlaifv_nb.records import (
    Claim,
    Prompt,
    Response,
    SetAside,
    package_folder,
    read_manifest,
    read_table,
    write_table,
)

DATA = Path(__file__).parent / "data"
PAIRS = [
    json.loads(line) for line in (DATA / "question_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]
EXAMPLE = package_folder("data") / "example"


# the check, on pairs written by hand
def test_no_wrong_question_passes_and_few_right_ones_are_refused():
    wrong = [
        (p["fact"], p["question"])
        for p in PAIRS
        if not p["fits"] and not question_problem(p["fact"], p["question"])
    ]
    refused = [
        (p["fact"], p["question"]) for p in PAIRS if p["fits"] and question_problem(p["fact"], p["question"])
    ]
    assert len(PAIRS) == 290 and wrong == []
    assert len(refused) <= 5, (
        "of 180: other words for the same (wears -> is wearing), which the check cannot know"
    )


# the rule
MOVED = [
    ("There is a cat.", "Is there a cat in the image?"),
    ("There is a cat on the sofa.", "Is there a cat on the sofa?"),
    ("There's a dog.", "Is there a dog in the image?"),
    ("In the background, there are trees.", "In the background, are there trees?"),
    ("The cat isn't red.", "Is the cat not red?"),
    ("The man can't see.", "Can the man not see?"),
    ("The dog doesn't run.", "Does the dog not run?"),
    ("The man in the red coat holds a cup.", "Does the man in the red coat hold a cup?"),
    ('The sign on the left reads "STOP".', 'Does the sign on the left read "STOP"?'),
    ('The sign reads "WHAT IS IT?".', 'Does the sign read "WHAT IS IT?"?'),
    ('"OPEN" is written on the door.', 'Is "OPEN" written on the door?'),
    ("The image shows two dogs.", "Does the image show two dogs?"),
    ("They appear to be a family.", "Do they appear to be a family?"),
    ("The houses have red roofs.", "Do the houses have red roofs?"),
    ("The room has striped walls.", "Does the room have striped walls?"),
    ("The man has parked the car.", "Has the man parked the car?"),
    ("The trees have lost their leaves.", "Have the trees lost their leaves?"),
    ("The tables have been set.", "Have the tables been set?"),
    ("The man is tall while the woman is short.", "Is the man tall while the woman is short?"),
    ("The men are as tall as the women are.", "Are the men as tall as the women are?"),
    ("The red and white car is parked.", "Is the red and white car parked?"),
    ("The man and the woman are smiling.", "Are the man and the woman smiling?"),
    ("The fly lies on the cake.", "Does the fly lie on the cake?"),
    ("London is in the background.", "Is London in the background?"),
]
NOT_SURE = [
    "The man wears a hat and is tall.",
    "The man who is tall smiles.",
    "The man who is tall is smiling.",
    "The woman is seated and holds a child.",
    "The man is tall, and the woman is short.",
    "The lights are on and the door is open.",
    "The boy laughs and his dog is behind him.",
    "The light shines and the light is red.",
    "Dogs run and cats are sleeping.",
    "There is a man and there is a woman.",
    "A man is standing, his arms are crossed.",
    'The sign has lost a letter and now reads "GAS LINE".',
    "Behind him is an archway.",
    "On the stove sits a kettle.",
    "Standing next to him is a dog.",
    "Seated at the table are three women.",
    "Also present is a dog.",
    "What the man holds is a cup.",
    "The fact that he is smiling suggests joy.",
    "The surface the cup stands on is white.",
    "The metal stands in the hall are new.",
    "The man has rolled up sleeves.",
    "The man has never been there.",
    "The man does a trick.",
    "Is the dog red?",
    "There is a sign: it is red.",
    "There is a dog. It is red.",
    "Snow covers the peaks.",
    "Red",
    "3",
    "",
]


@pytest.mark.parametrize("fact, question", MOVED)
def test_the_rule_moves_the_verb(fact, question):
    assert question_by_rule(fact) == question and question_problem(fact, question) == ""


@pytest.mark.parametrize("fact", NOT_SURE)
def test_the_rule_makes_no_question_where_it_is_not_sure(fact):
    assert question_by_rule(fact) == ""


def test_the_rule_never_refuses_what_it_makes_on_right_pairs():
    made = [question_by_rule(p["fact"]) for p in PAIRS]
    assert sum(map(bool, made)) > 0.7 * len(PAIRS)
    assert all(not question_problem(p["fact"], q) for p, q in zip(PAIRS, made) if q)


def test_in_the_icon_world_the_rule_asks_what_the_grammar_asks():
    found = [
        claim
        for r in read_table(EXAMPLE / "01_sampling", "responses", Response)
        for claim in read_claims(r.text)
    ]
    assert len(found) > 2000 and {question_by_rule(fact_text(claim)) for claim in found} == {
        question_text(claim) for claim in found
    }


@pytest.mark.parametrize(
    "fact, question",
    [
        ("Snow covers the high peaks.", "Is it true of the image that Snow covers the high peaks?"),
        ("The man wears a hat and is tall.", "Is it true of the image that the man wears a hat and is tall?"),
        ("A red bus", "Is it true of the image that it shows a red bus?"),
        ('The sign says {fact} and "?".', 'Is it true of the image that the sign says {fact} and "?"?'),
    ],
)
def test_the_question_about_the_statement(fact, question):
    assert c.statement_question(fact) == question


# what cannot be judged, and what to be careful with
@pytest.mark.parametrize("fact", ["Red", "3", "3 x 3 =", '"A"', "-", "7-2"])
def test_a_fragment_is_no_claim(fact):
    assert is_fragment(fact) and not is_fragment(fact + " dogs run")


@pytest.mark.parametrize(
    "fact, hedged",
    [
        ("The man may be a tourist.", True),
        ("It is likely a park.", True),
        ("The dogs seem happy.", True),
        ("The topping is possibly matcha.", True),
        ("They appear to be friends.", True),
        ("The light suggests evening.", True),
        ("It could be a wedding.", True),
        ("The house looks like a castle.", True),
        ("The man is a tourist.", False),
        ("Two dogs appear.", False),
        ('The sign reads "MAY 5".', False),
        ("The man could not see it.", False),
    ],
)
def test_hedges_are_seen(fact, hedged):
    assert is_hedged(fact) == hedged


@pytest.mark.parametrize(
    "fact, alone",
    [
        ("They are red.", False),
        ("Its head is up.", False),
        ("He sits.", False),
        ("It is on the table.", False),
        ("It is snowing.", True),
        ("It is a sunny day.", True),
        ("The dog is red.", True),
        ("Items are red.", True),
    ],
)
def test_facts_that_do_not_stand_alone_are_seen(fact, alone):
    assert stands_alone(fact) == alone


ANSWER = (
    'How many dogs?\nTwo brown dogs were running past a shop with the sign "Joe\'s  Bakery". '
    "A boy in blue trousers watches them."
)


@pytest.mark.parametrize(
    "fact, leaked",
    [
        ('The sign reads "NO PARKING 8-10 AM".', True),
        ("The umbrella is open.", True),
        ("The woman was holding an umbrella.", True),
        ("The dogs are on a beach.", True),
        ("The dogs are running on a track.", False),
        ('The sign reads "JOE\'S BAKERY."', False),
        ("There are 2 dogs.", False),
        ("There is a boy.", False),
        ("The boy's trousers are blue.", False),
        ("They are running.", False),
        ("They run.", False),
        ("They are watched.", False),
        ("It is there.", False),
    ],
)
def test_leaks_of_the_examples_are_seen(fact, leaked):
    assert is_leaked(fact, ANSWER, {"the dogs are on a beach."}) == leaked


def splitter(**replies):
    """Answers facts prompts by the response they hold, (text, finish_reason) or a text, and every question
    prompt with nonsense."""

    def ask(prompts):
        found = [next((reply for key, reply in replies.items() if key in p), "What?") for p in prompts]
        return [reply if isinstance(reply, tuple) else (reply, "stop") for reply in found]

    return ask


def divided(texts, question="What is seen?", **options):
    responses = [Response(f"p-{k:02d}", "p", k, 0, text, "stop") for k, text in enumerate(texts)]
    return extract_claims(responses, {"p": question}, splitter(**options.pop("replies")), **options)


def test_a_cut_list_keeps_its_whole_items():
    replies = {
        "LONG": ("- The dog is long.\n- The dog is red.\n- The do", "length"),
        "SHORT": ("- The do", "length"),
    }
    claims, set_aside, remarks = divided(["LONG red dog", "SHORT"], replies=replies)
    assert [x.text for x in claims] == ["The dog is long.", "The dog is red."]
    assert [(s.row_id, s.reason) for s in set_aside] == [("p-01", "facts cut")]
    assert [(r.response_id, "The do" in r.detail) for r in remarks if r.remark == c.CUT] == [
        ("p-00", True),
        ("p-01", True),
    ]


def test_fragments_and_leaks_are_noted_and_cost_nothing_else():
    sign = 'The sign reads "NO PARKING 8-10 AM".'
    listed = f"- The dog is red.\n- Red\n- They run fast.\n- {sign}\n- The cat may be old."
    claims, set_aside, remarks = divided(["A red dog and an old cat run."], replies={"A red dog": listed})
    assert [x.text for x in claims] == [
        "The dog is red.",
        "They run fast.",
        "The cat may be old.",
    ] and not set_aside
    assert [x.claim_id for x in claims] == ["p-00-00", "p-00-01", "p-00-02"]
    found = {(r.fact, r.remark, r.claim_id) for r in remarks}
    assert found >= {
        ("Red", c.FRAGMENT, ""),
        ("They run fast.", c.DEPENDENT, "p-00-01"),
        ("The cat may be old.", c.HEDGED, "p-00-02"),
        (sign, c.LEAKED, ""),
        ("They run fast.", c.BY_STATEMENT, "p-00-01"),
    }


def test_an_answer_of_words_alone_is_judged_as_an_answer():
    claims, set_aside, remarks = divided(
        ["Red and blue, 3 times."], "Which colours?", replies={"Red and": "- Red\n- Blue\n- 3"}
    )
    assert not set_aside and [x.text for x in claims] == ["Red", "Blue", "3"]
    assert (
        claims[0].question
        == 'The question about the image was: Which colours? Is "Red" a correct answer, or a part of one?'
    )
    assert {(r.fact, r.remark) for r in remarks} == {(x.text, c.BY_STATEMENT) for x in claims}


def test_an_answer_that_keeps_no_fact_is_set_aside_and_not_taken_for_one_without_a_fault():
    claims, set_aside, remarks = divided(
        ["A red dog."], replies={"A red dog": "- The umbrella is open.\n- The woman was holding an umbrella."}
    )
    assert not claims and [(s.row_id, s.reason) for s in set_aside] == [("p-00", "no fact of its own")]
    assert [r.remark for r in remarks] == [c.LEAKED] * 2


# the stage
class FakeAsker:
    """Stands where the language model stands: `generate_texts` as a function, which may find that fewer texts
    at a time fit into memory, or be interrupted."""

    def __init__(self, monkeypatch, most=1000, stop_at=None):
        self.calls, self.most, self.stop_at = [], most, stop_at
        monkeypatch.setattr("rlaifv_nb.engine.prefix.generate_texts", self)

    def __call__(self, llm, prompts, max_new_tokens, limits):
        if self.stop_at is not None and len(self.calls) >= self.stop_at:
            raise KeyboardInterrupt
        limits["rows"] = min(limits["rows"], self.most)
        self.calls.append(len(prompts))
        return [self.reply(p) for p in prompts]

    def reply(self, prompt):
        number = prompt.rpartition("word")[0].count("word")
        if "Fact:" in prompt:
            return "Does something sit?", "stop"
        return (
            f"- Number {number} is one word.\n- A word sits.\n- The dog is red.\n- Red\n- A word may be "
            f"long.",
            "stop",
        )


class Llm:
    settings, sha, name = {}, "f" * 64, "fake"


def write_inputs(folder, n=23):
    write_table(folder / "prompts", "prompts", [Prompt("p", "p.png", "0", "What?")])
    write_table(
        folder / "responses",
        "responses",
        [Response(f"p-{k:02d}", "p", k, 0, "word " * (23 - k) + "dog red", "stop") for k in range(n)],
    )
    return str(folder / "prompts"), str(folder / "responses")


def test_shards_batches_memory_and_interruption_change_nothing(tmp_path, monkeypatch):
    inputs = write_inputs(tmp_path)
    FakeAsker(monkeypatch)
    whole = run_claims(*inputs, str(tmp_path / "whole"), Llm, shard_size=5).read("claims", Claim)
    manifest = read_manifest(tmp_path / "whole")
    assert {
        k: manifest[k]
        for k in (
            "rows_in",
            "rows_out",
            "n_claims",
            "by_rule",
            "by_splitter",
            "by_statement",
            "fragments",
            "hedged",
            "leaked",
            "not_alone",
            "cut_lists",
            "without_claims",
            "warnings",
        )
    } == {
        "rows_in": 23,
        "rows_out": 23,
        "n_claims": 92,
        "by_rule": 46,
        "by_splitter": 0,
        "by_statement": 46,
        "fragments": 23,
        "hedged": 23,
        "leaked": 0,
        "not_alone": 0,
        "cut_lists": 0,
        "without_claims": 0,
        "warnings": [
            "46 of 92 questions are about the statement, which labelers judge less well",
            "23 of 92 claims hedge (might, seems, likely), and are hardly ever wrong",
        ],
    }
    assert [p.name for p in sorted((tmp_path / "whole").glob("remarks*"))] == [
        f"remarks-{k:05d}.jsonl" for k in range(5)
    ]
    assert len(read_table(tmp_path / "whole", "remarks", Remark)) == 23 * 4

    FakeAsker(monkeypatch, most=2)
    assert (
        run_claims(
            *inputs, str(tmp_path / "halved"), Llm, options=ClaimsOptions(batch_size=8), shard_size=5
        ).read("claims", Claim)
        == whole
    )
    halved = read_manifest(tmp_path / "halved")
    assert halved["batch_size"] == {"asked": 8, "used": 2} and halved["tables"] == manifest["tables"]

    FakeAsker(monkeypatch, stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        run_claims(*inputs, str(tmp_path / "stopped"), Llm, shard_size=5)
    done = len(list((tmp_path / "stopped").glob("claims-*")))
    assert 0 < done < 5
    asker = FakeAsker(monkeypatch)
    assert (
        run_claims(
            *inputs, str(tmp_path / "stopped"), Llm, options=ClaimsOptions(batch_size=7), shard_size=5
        ).read("claims", Claim)
        == whole
    )
    assert len(asker.calls) > 0 and read_manifest(tmp_path / "stopped")["tables"] == manifest["tables"]
    assert read_manifest(tmp_path / "stopped")["warnings"] == manifest["warnings"], (
        "figured from the tables, not from this session"
    )

    FakeAsker(monkeypatch)
    assert (
        run_claims(*inputs, str(tmp_path / "one"), Llm).read("claims", Claim) == whole
        and len(list((tmp_path / "one").glob("claims-*"))) == 1
    )


def test_whole_answers_are_divided_as_ever(tmp_path, monkeypatch):
    asker = FakeAsker(monkeypatch)
    claims = run_claims(
        *write_inputs(tmp_path, 3), str(tmp_path / "out"), Llm, options=ClaimsOptions(divide="whole")
    ).read("claims", Claim)
    assert [x.question for x in claims] == [
        f"Is everything in this description of the image correct? {x.text}" for x in claims
    ]
    assert (
        not asker.calls
        and read_manifest(tmp_path / "out")["n_claims"] == 3
        and "by_rule" not in read_manifest(tmp_path / "out")
    )


@pytest.mark.parametrize("option", ["divide", "questions"])
def test_an_unknown_option_names_the_known_ones(tmp_path, option):
    known = {"divide": "facts, whole", "questions": "rule, splitter, statement"}[option]
    with pytest.raises(ValueError, match=f"{option}='half' is not supported: choose one of {known}"):
        run_claims(
            *write_inputs(tmp_path), str(tmp_path / "out"), Llm, options=ClaimsOptions(**{option: "half"})
        )


def test_what_is_lost_too_often_is_said():
    rows = [Response(f"p-{k:02d}", "p", k, 0, "word " * (30 + k + 60 * (k >= 10)), "stop") for k in range(20)]
    counts = {
        "n_claims": 100,
        "by_statement": 0,
        "fragments": 0,
        "leaked": 0,
        "cut_lists": 0,
        "hedged": 0,
        "without_claims": 0,
    }
    long = [SetAside(r.response_id, "no list of facts") for r in rows[10:]]
    said = c.division_warnings(rows, long, counts, "rule", 512)
    assert len(said) == 2 and "10 of 20 answers were set aside, 10 of them as 'no list of facts'" in said[0]
    assert "kept have 34 words, those set aside 104" in said[1]
    assert c.division_warnings(rows, long[:4], counts, "rule", 512) == [], "a fifth is not too many"
    for name, words in (
        ("by_statement", "about the statement"),
        ("fragments", "fragments"),
        ("leaked", "prompt's examples"),
        ("cut_lists", "raise max_new_tokens"),
        ("hedged", "hedge"),
        ("without_claims", "no claim at all"),
    ):
        assert [words in s for s in c.division_warnings(rows, [], counts | {name: 30}, "rule", 512)] == [True]
    assert c.division_warnings(rows, [], counts | {"by_statement": 100}, "statement", 512) == [], (
        "this was asked for"
    )
