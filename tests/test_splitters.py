"""Splitters of several families: their chat templates, reading the instruction once, and the stage from
responses to claims.

Weights of such models cannot be had here, and random ones follow no instruction. So each small model learns a
few dozen texts by heart, in seconds: what it writes is then its own greedy output, good and bad, and not a
stand-in's.
"""

import functools
import re
from dataclasses import replace

import pytest
import torch
from conftest import check_table
from tiny_models import END_OF_TURN, SPLITTERS

from rlaifv_nb.claims import ClaimsOptions, Remark, fill, read_templates, run_claims, statement_question
from rlaifv_nb.engine.models import OpenModel, open_llm, prompt_text
from rlaifv_nb.engine.prefix import common_prefix_length, generate_texts, grow_texts
from rlaifv_nb.records import Claim, Prompt, Response, SetAside, read_manifest, read_table, write_table

TITLES = {name: build.__doc__.partition(":")[0] for name, build in SPLITTERS.items()}
on_every_family = pytest.mark.parametrize("name", SPLITTERS)
FACTS = {  # response -> what the splitter answers
    "A red dog sits.": "Here are the facts:\n1. There is a dog.\n2. The dog is red.\n3. The dog sits.",
    "The cat was not big.": "- There is a cat.\n- The cat was not big.",
    "Two birds!": "* There are two birds.",
    "How lovely.": "No facts.",
    "A cup stands.": "A cup, it seems.",
}
QUESTIONS = {  # fact -> the splitter's question, right or wrong
    "There is a dog.": "Is there a dog?",
    "The dog is red.": "Is the dog red?",
    "The dog sits.": "Does the dog sit?",
    "There is a cat.": "Is there a cat?",
    "The cat was not big.": "Was the cat big?",
    "There are two birds.": "Are there birds?",
}


def build(name):
    "An untrained model and its tokenizer."
    torch.manual_seed(0)
    return SPLITTERS[name]()


def taught(templates):
    "The (prompt, answer) pairs that are learnt."
    pairs = [(fill(templates.facts, question="Describe.", response=r), text) for r, text in FACTS.items()]
    pairs += [(fill(templates.question, fact=fact), question) for fact, question in QUESTIONS.items()]
    return pairs


def learn(model, tokenizer, pairs, steps=100):
    "Teaches the pairs by heart and returns the last loss."
    opened, rows = OpenModel(model, tokenizer, "", ""), []
    for prompt, answer in pairs:
        asked = tokenizer(prompt_text(opened, prompt, image=None), add_special_tokens=False).input_ids
        rows.append((asked, tokenizer(answer, add_special_tokens=False).input_ids + [opened.end_id]))
    longest = max(len(a) + len(b) for a, b in rows)

    def fill_up(values, value):
        return values + [value] * (longest - len(values))

    ids = torch.tensor([fill_up(a + b, 0) for a, b in rows])
    labels = torch.tensor([fill_up([-100] * len(a) + b, -100) for a, b in rows])
    mask = torch.tensor([fill_up([1] * len(a + b), 0) for a, b in rows])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=8e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    return loss.item()


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    "A user's own short prompts, as paths."
    folder, files = tmp_path_factory.mktemp("prompts"), {}
    for kind, text in (
        ("facts", "Facts of: {response}\nAsked: {question}"),
        ("question", "Question of: {fact}"),
    ):
        files[f"{kind}_prompt"] = str(folder / f"{kind}.txt")
        (folder / f"{kind}.txt").write_text(text + "\n")
    return files


@pytest.fixture(scope="module")
def saved(tmp_path_factory, prompt_files):
    "A function from a name to the folder of that model, taught."

    @functools.lru_cache
    def save(name):
        folder, (model, tokenizer) = tmp_path_factory.mktemp(name), build(name)
        assert learn(model, tokenizer, taught(read_templates(**prompt_files))) < 0.1
        for part in (model.eval(), tokenizer):
            part.save_pretrained(folder)
        return str(folder)

    return save


def write_inputs(folder, texts):
    "Tables of prompts and responses."
    write_table(folder / "prompts", "prompts", [Prompt("p", "p.png", "0", "Describe.")])
    write_table(
        folder / "responses",
        "responses",
        [Response(f"p-{k:02d}", "p", k, 0, text, "stop") for k, text in enumerate(texts)],
    )
    return str(folder / "prompts"), str(folder / "responses"), str(folder / "claims")


@on_every_family
def test_the_template_loses_and_doubles_nothing(name, saved, show):
    llm = open_llm(saved(name))
    assert llm.tokenizer.decode([llm.end_id]) == END_OF_TURN[name]
    text = prompt_text(llm, "Is there\n\na dog?", image=None)
    ids = llm.tokenizer(text, add_special_tokens=False).input_ids
    assert llm.tokenizer.decode(ids, skip_special_tokens=False) == text and "Is there\n\na dog?" in text
    marks = re.findall(r"<[^<>\s]+>|\[/?INST\]", text)
    assert [i for i in ids if i in llm.special_ids] == llm.tokenizer.convert_tokens_to_ids(marks), (
        "each mark is one special token"
    )
    bos = llm.tokenizer.bos_token_id
    assert ids.count(bos) == (name != "qwen2"), "one beginning, or none"
    if name != "qwen2":
        assert llm.tokenizer(text).input_ids.count(bos) == 2, "what adding special tokens again would do"
    show(TITLES[name], "chat template")


@on_every_family
def test_responses_become_claims(name, saved, prompt_files, tmp_path, show):
    prompts, responses, out = write_inputs(tmp_path, FACTS)
    options = ClaimsOptions(**prompt_files, questions="splitter", max_new_tokens=40, batch_size=3)
    claims = run_claims(prompts, responses, out, open_llm(saved(name)), options=options).read("claims", Claim)
    asked = {c.text: c.question for c in claims}
    assert [c.text for c in claims if c.response_id == "p-00"] == [
        "There is a dog.",
        "The dog is red.",
        "The dog sits.",
    ]
    wrong = ("The cat was not big.", "There are two birds.")
    assert asked == {f: statement_question(f) if f in wrong else q for f, q in QUESTIONS.items()}, (
        "a refused question costs nothing else"
    )
    set_aside = read_table(out, "set_aside-claims", SetAside)
    assert [(s.row_id, s.reason) for s in set_aside] == [
        ("p-04", "no list of facts")
    ] and "'A cup, it seems.'" in set_aside[0].detail
    manifest = read_manifest(out)
    assert [manifest[k] for k in ("rows_in", "rows_out", "n_claims", "without_claims")] == [5, 4, 6, 1]
    assert [manifest[k] for k in ("by_rule", "by_splitter", "by_statement")] == [0, 4, 2]
    assert manifest["batch_size"] == {"asked": 3, "used": 3} and "batch_size" not in manifest["parameters"]
    refused = {r.fact: r.detail for r in read_table(out, "remarks", Remark) if r.detail}
    assert refused == {
        wrong[0]: "Was the cat big? (left out: not)",
        wrong[1]: "Are there birds? (left out: 2)",
    }
    again = run_claims(
        prompts,
        responses,
        str(tmp_path / "again"),
        open_llm(saved(name), share_prefix=False),
        options=options,
    ).read("claims", Claim)
    assert again == claims, "sharing on = off"
    assert (
        read_table(tmp_path / "again", "claims", Claim) == claims
        and read_manifest(tmp_path / "again")["tables"] == manifest["tables"]
    )
    by_rule = run_claims(
        prompts,
        responses,
        str(tmp_path / "rule"),
        open_llm(saved(name)),
        options=replace(options, questions="rule"),
    ).read("claims", Claim)
    assert {c.question for c in by_rule} >= {
        "Was the cat not big?",
        "Are there two birds in the image?",
        "Does the dog sit?",
    }
    assert [read_manifest(tmp_path / "rule")[k] for k in ("by_rule", "by_splitter", "by_statement")] == [
        5,
        1,
        0,
    ]
    show(TITLES[name], "02 claims", "wrong question, statement asked")


@on_every_family
def test_the_instruction_is_read_once_and_nothing_changes(name, saved, show):
    shared, plain = open_llm(saved(name)), open_llm(saved(name), share_prefix=False)
    assert ("sliding_attention" in shared.sharing_problem) == (
        name == "gemma3_text"
    ) and plain.sharing_problem
    long = read_templates(
        "packaged:prompts/facts_fewshot.txt", "packaged:prompts/question_fewshot.txt"
    ).question
    prompts = [fill(long, fact=fact) for fact in (*QUESTIONS, "A " + "very " * 40 + "big dog sits.")]
    rows = [
        shared.tokenizer(prompt_text(shared, p, image=None), add_special_tokens=False).input_ids
        for p in prompts
    ]
    n, tokens = common_prefix_length(rows), []
    hook = shared.core.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: tokens.append(tuple(args[0].shape))
    )
    if shared.shares_prefix:
        branches = grow_texts(shared, rows[0][:n], [row[n:] for row in rows], 12)
        assert n > 300 and tokens == [(1, n), (1, sum(len(row) - n for row in rows))]
        assert branches.own.lengths.tolist() == [len(row) - n for row in rows]
        for row, hidden in zip(rows, branches.hidden):
            with torch.no_grad():
                assert torch.allclose(
                    hidden,
                    plain.core.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1],
                    atol=1e-4,
                )
    hook.remove()
    on, off = (generate_texts(llm, prompts, 12) for llm in (shared, plain))
    assert on == off == generate_texts(shared, prompts, 12, max_tokens=2 * len(rows[0])), (
        "groups change nothing either"
    )
    own = plain.model.generate(
        torch.tensor([rows[0]]), do_sample=False, max_new_tokens=12, eos_token_id=plain.end_id
    )[0, len(rows[0]) :]
    assert plain.tokenizer.decode(own, skip_special_tokens=True).strip() == on[0][0]
    show(TITLES[name], "instruction read once, on = off", but=shared.sharing_problem)


@on_every_family
def test_a_model_that_follows_no_instruction_is_named(name, tmp_path):
    for part in build(name):
        part.save_pretrained(tmp_path / "model")
    inputs = write_inputs(tmp_path, FACTS)
    with pytest.raises(
        ValueError,
        match=r"no claims in any of 5 responses; .* set aside as '(facts cut|no list of facts)'.*model that "
        r"follows",
    ):
        run_claims(*inputs, open_llm(str(tmp_path / "model")), options=ClaimsOptions(max_new_tokens=12))
    reasons = {s.reason for s in read_table(inputs[2], "set_aside-claims", SetAside)}
    assert reasons <= {"facts cut", "no list of facts"} and reasons


def test_the_table_says_what_was_shown(request):
    check_table(request, "splitters", globals(), [TITLES[name] for name in SPLITTERS])
