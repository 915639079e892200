"""Reading what language models really write: lists of facts in all their shapes, questions, and prompt
files."""

import json
import re
from pathlib import Path

import pytest

from rlaifv_nb.claims import (
    WHOLE_QUESTION,
    Templates,
    fill,
    parse_facts,
    parse_question,
    question_problem,
    read_template,
    read_templates,
    says_no_facts,
)
from rlaifv_nb.records import package_folder, sha256_of

MESSY = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/messy_outputs.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
PROMPTS = package_folder("data") / "prompts"


@pytest.mark.parametrize("row", MESSY, ids=[row["kind"] for row in MESSY])
def test_facts_are_read(row):
    assert parse_facts(row["text"]) == row["facts"]
    if not row["facts"]:
        assert says_no_facts(row["text"]) == row.get("no_facts", False)


def test_the_corpus_is_no_repetition():
    assert len(MESSY) >= 60 and len({row["text"] for row in MESSY}) == len(
        {row["kind"] for row in MESSY}
    ) == len(MESSY)


@pytest.mark.parametrize(
    "text, question",
    [
        ("Is the dog red?", "Is the dog red?"),
        ("Question: Is the dog red?", "Is the dog red?"),
        ("**Question:** Is the dog red?", "Is the dog red?"),
        ("Q: Is the dog red?", "Is the dog red?"),
        ("- Is the dog red?", "Is the dog red?"),
        ("1. Is the dog red?\n2. Is the dog big?", "Is the dog red?"),
        ('Sure, here it is:\n\n"Is the dog red?"', "Is the dog red?"),
        ("“Is the dog red?”", "Is the dog red?"),
        ("Is the dog red? (yes/no)", "Is the dog red?"),
        ("Is the dog red? Yes.", "Is the dog red?"),
        ("Is the dog red?  \r\n", "Is the dog red?"),
        ("```\nIs the dog red?\n```", "Is the dog red?"),
        ("<think>Is it red?</think>\nIs the dog red?", "Is the dog red?"),
        ('Does the sign say "STOP"?', 'Does the sign say "STOP"?'),
        ('Is "WHY?" written on the sign?', 'Is "WHY?" written on the sign?'),
        ("狗是红色的吗？", "狗是红色的吗？"),
        ("The dog is red.", None),
        ("", None),
        ("<think>\nIs the dog red?", None),
    ],
)
def test_a_question_is_read(text, question):
    assert parse_question(text) == question


def test_packaged_prompts_are_those_that_the_packaged_splitter_knows():
    templates = read_templates()
    assert sha256_of(templates.facts + templates.question + WHOLE_QUESTION)[:12] == "c5ac6d2f8a1e", (
        "the texts it was trained on, byte by byte"
    )
    assert templates.sha != Templates(templates.facts, templates.question + " ").sha


def test_examples_in_the_prompts_obey_their_own_rules():
    facts, question = (
        (PROMPTS / f"{name}_fewshot.txt").read_text(encoding="utf-8") for name in ("facts", "question")
    )
    examples = re.findall(r"^Answer: (.+)\nFacts:\n((?:.+\n)+)", facts, re.M)
    assert len(examples) == 5 and [len(parse_facts(listed)) for _, listed in examples] == [7, 6, 6, 0, 3]
    assert all(parse_facts(listed) or says_no_facts(listed) for _, listed in examples)
    pairs = re.findall(r"^Fact: (.+)\nQuestion: (.+)$", question, re.M)
    assert (
        len(pairs) == 10
        and [(f, q, question_problem(f, q)) for f, q in pairs if question_problem(f, q)] == []
    )


@pytest.mark.parametrize(
    "text, error",
    [
        (
            "Fact: {fakt}\nQuestion:",
            r"mine.txt has other placeholders than \{fact\}: missing \{fact\}, unknown \{fakt\}",
        ),
        ("Fact:\nQuestion:", r"mine.txt has other placeholders than \{fact\}: missing \{fact\}"),
        ("{fact} {response}", r"mine.txt has other placeholders than \{fact\}: unknown \{response\}"),
    ],
)
def test_wrong_placeholders_are_named_with_the_file(tmp_path, text, error):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_template(str(tmp_path / "mine.txt"), ("fact",))


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no prompt file .*mine.txt"):
        read_template(str(tmp_path / "mine.txt"), ("fact",))
    with pytest.raises(FileNotFoundError, match="packaged:prompts/mine.txt is not in this package"):
        read_template("packaged:prompts/mine.txt", ("fact",))


def test_braces_are_no_placeholders(tmp_path):
    (tmp_path / "mine.txt").write_text('Reply as {"question": "..."} or {} for {fact}.\n')
    assert (
        fill(read_template(str(tmp_path / "mine.txt"), ("fact",)), fact="{fact} {x}")
        == 'Reply as {"question": "..."} or {} for {fact} {x}.'
    )
