"""A question must ask for exactly its fact: negation, tense, numbers, written text and order are kept."""

import pytest

from rlaifv_nb.claims import (
    BY_SPLITTER,
    BY_STATEMENT,
    RULE,
    ask_questions,
    extract_claims,
    question_problem,
    read_templates,
    statement_question,
)
from rlaifv_nb.records import Response

GOOD = [
    ("There is a dog.", "Is there a dog in the image?"),
    ("There are dogs.", "Are there any dogs?"),
    ("The image shows a dog.", "Is there a dog in the image?"),
    ("The image shows a dog.", "Does the image show a dog?"),
    ("The dogs are brown.", "Are the dogs brown?"),
    ("There are three apples on the table.", "Are there 3 apples on the table?"),
    ("Three apples are visible.", "Are three apples visible?"),
    ("In the top left, there is a cat.", "Is there a cat in the top left?"),
    ("The dog's collar is red.", "Is the dog's collar red?"),
    ("The ball is not yellow.", "Is the ball not yellow?"),
    ("The ball isn't yellow.", "Is the ball not yellow?"),
    ("There are no people.", "Are there no people in the image?"),
    ("The car has no number plate.", "Does the car have no number plate?"),
    ("The man is without a hat.", "Is the man without a hat?"),
    ("The man cannot see the bus.", "Can the man not see the bus?"),
    ("The door was closed.", "Was the door closed?"),
    ("The boy jumped over the fence.", "Did the boy jump over the fence?"),
    ("The car stopped.", "Did the car stop?"),
    ("The girl carried a bag.", "Did the girl carry a bag?"),
    ("The man wore a hat.", "Did the man wear a hat?"),
    ("The man had a hat.", "Did the man have a hat?"),
    ("The boy put a cup on the table.", "Did the boy put a cup on the table?"),
    ("The dog is running.", "Is the dog running?"),
    ("The dog runs.", "Does the dog run?"),
    ("The dogs run.", "Do the dogs run?"),
    ("The woman watches a bird.", "Does the woman watch a bird?"),
    ("The boy carries a bag.", "Does the boy carry a bag?"),
    ("The man has been painting the wall.", "Has the man been painting the wall?"),
    ("The dog does not bark.", "Does the dog not bark?"),
    ("The boys did not jump.", "Did the boys not jump?"),
    ("Three people will cross the street.", "Will three people cross the street?"),
    ("One of the men can swim.", "Can one of the men swim?"),
    ('The sign says "STOP".', 'Does the sign say "STOP"?'),
    ("The sign says “NO DOGS”.", 'Does the sign say "NO DOGS"?'),
    ("The sign reads 'Why?'.", "Does the sign read 'Why?'?"),
    ("The clock shows 10:30.", "Does the clock show 10:30?"),
    ("The man who was waiting has a hat.", "Does the man who was waiting have a hat?"),
    ("The cat is behind the dog.", "Is the cat behind the dog?"),
]
BAD = [
    ("There is a dog.", "Is there a cat?", "left out: dog; added: cat"),
    ("The carrot is in the top left.", "Is the carrot in the top right?", "left out: left; added: right"),
    ("The dog is red.", "Is there a dog?", "left out: red"),
    ("There is a dog.", "Is the dog red?", "added: red"),
    ("There are three apples.", "Are there apples?", "left out: 3"),
    ("There are three apples.", "Are there four apples?", "left out: 3; added: 4"),
    ("There is one dog.", "Is there a dog?", "left out: 1"),
    ("There are dogs.", "Is there a dog?", "left out: dogs; added: dog"),
    ("The ball is not yellow.", "Is the ball yellow?", "left out: not"),
    ("The ball is yellow.", "Is the ball not yellow?", "added: not"),
    ("The ball isn't yellow.", "Isn't the ball yellow?", "begins with a negation"),
    ("The ball is not yellow.", "Is not the ball yellow?", "begins with a negation"),
    ("The ball is not yellow.", "In the image, isn't the ball yellow?", "begins with a negation"),
    ("There are no people.", "Are there people?", "left out: no"),
    ("The man is without a hat.", "Is the man with a hat?", "left out: without; added: with"),
    ("The dog is not red and not big.", "Is the dog not red and big?", "left out: not"),
    ("The door was closed.", "Is the door closed?", "another tense"),
    ("The door is closed.", "Was the door closed?", "another tense"),
    ("The boy jumped.", "Does the boy jump?", "left out: jumped; added: jump"),
    ("The boy jumps.", "Did the boy jump?", "another tense|left out"),
    ("The boys jump.", "Did the boys jump?", "another tense"),
    ("The man wore a hat.", "Does the man wear a hat?", "left out: wore; added: wear"),
    ("The man had a hat.", "Does the man have a hat?", "another tense"),
    ("The man has a hat.", "Did the man have a hat?", "another tense"),
    ("The dog is running.", "Does the dog run?", "left out: running; added: run"),
    ("The dog runs.", "Is the dog running?", "left out: runs; added: running"),
    ("Three people will cross the street.", "Do three people cross the street?", "left out: will"),
    ("One of the men can swim.", "Does one of the men swim?", "another tense"),
    ("The wall has been painted.", "Has the wall painted?", "left out: been"),
    ('The sign says "STOP".', "Does the sign say something?", "quotation marks"),
    ('The sign says "STOP".', 'Does the sign say "Stop"?', "quotation marks"),
    ('The sign says "NO PARKING 8-10 AM".', 'Does the sign say "NO PARKING"?', "quotation marks"),
    ("The sign says stop.", 'Does the sign say "stop"?', "quotation marks"),
    ("The clock shows 10:30.", "Does the clock show 10:20?", "left out: 10:30; added: 10:20"),
    ("The cat is behind the dog.", "Is the dog behind the cat?", "another order"),
    ("The man chases the dog.", "Does the dog chase the man?", "another order"),
    ("The cup is on the table.", "Is the cup under the table?", "left out: on; added: under"),
    ("The dog is red.", "What colour is the dog?", "left out: red; added: what, colour"),
    ("The dog is red and big.", "Is the dog red? Is the dog big?", "more than one question"),
    ("The dog is red.", "The red dog?", "cannot be answered with yes or no"),
]


def test_the_corpus_is_large_enough():
    assert len(GOOD) + len(BAD) >= 40 and len({fact for fact, *_ in GOOD + BAD}) >= 40


@pytest.mark.parametrize("fact, question", GOOD)
def test_a_question_that_fits(fact, question):
    assert question_problem(fact, question) == ""


@pytest.mark.parametrize("fact, question, problem", BAD)
def test_a_question_that_does_not_fit(fact, question, problem):
    assert any(part in question_problem(fact, question) for part in problem.split("|"))


@pytest.mark.parametrize("k", range(0, len(GOOD), 3))
def test_questions_of_other_facts_never_fit(k):
    for other in range(len(GOOD)):
        same = {fact.replace("isn't", "is not") for fact, _ in (GOOD[k], GOOD[other])}
        if (
            GOOD[k][0] != GOOD[other][0]
            and len(same) == 2
            and not {"The image shows a dog.", "There is a dog."} >= same
        ):
            assert question_problem(GOOD[k][0], GOOD[other][1]), (GOOD[k], GOOD[other])


def replies(table, asked):
    "A splitter that looks its replies up; every prompt that it is given is kept in `asked`."

    def ask(prompts):
        asked.append(prompts)
        return [next((reply for key, reply in table.items() if key in p), ("", "stop")) for p in prompts]

    return ask


@pytest.mark.parametrize(
    "questions, by, prompts",
    [
        ("rule", [RULE, RULE, BY_SPLITTER, BY_STATEMENT, BY_STATEMENT], 3),
        ("splitter", [BY_SPLITTER, BY_STATEMENT, BY_SPLITTER, BY_STATEMENT, BY_STATEMENT], 5),
        ("statement", [BY_STATEMENT] * 5, 0),
    ],
)
def test_the_order_of_rule_splitter_and_statement(questions, by, prompts):
    facts = ["There is a dog.", "The dog is not red.", "The dog sits.", "The dog ran.", "The cat ran."]
    asked = []
    ask = replies(
        {
            facts[0]: ("Is there a dog?", "stop"),
            facts[1]: ("Is the dog red?", "stop"),
            facts[2]: ("Does the dog sit?", "stop"),
            facts[3]: ("Does the dog run?", "stop"),
            facts[4]: ("Did the cat", "length"),
        },
        asked,
    )
    known = ask_questions(facts + facts, ask, read_templates(), questions=questions)
    assert list(known) == facts and [known[f][1] for f in facts] == by
    assert [len(p) for p in asked] == [prompts] * bool(prompts), (
        "each distinct fact once, and only where the splitter is needed"
    )
    for fact, (question, made_by, _) in known.items():
        assert (
            question == statement_question(fact)
            if made_by == BY_STATEMENT
            else not question_problem(fact, question)
        )
    if questions != "statement":
        assert known[facts[3]][2] == "Does the dog run? (left out: ran; added: run)"
        assert known[facts[4]][2] == "there was no end within the token limit"


def test_the_check_can_be_switched_off():
    ask = replies(
        {
            "Split": ("- Der Hund ist rot.\n- \u72d7", "stop"),
            "Fact: Der Hund ist rot.": ("Ist der Hund rot?", "stop"),
            "Fact: \u72d7": ("\u72d7?", "stop"),
        },
        [],
    )
    response = Response("p-00", "p", 0, 0, "Ein roter Dackel.", "stop")
    claims, set_aside, remarks = extract_claims([response], {"p": "Was?"}, ask, check=False)
    assert [c.question for c in claims] == ["Ist der Hund rot?", "\u72d7?"] and not set_aside
    claims, set_aside, remarks = extract_claims([response], {"p": "Was?"}, ask)
    assert [c.question for c in claims] == [statement_question("Der Hund ist rot.")] and [
        r.fact for r in remarks
    ][0] == "\u72d7"
