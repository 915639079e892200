"""What real language models write, and what becomes of it: stored replies, and a model of one's own.

`data/real_splitter.jsonl` holds replies of Qwen2.5-Coder-1.5B-Instruct and SmolLM2-135M-Instruct (both
Apache-2.0) to the packaged prompts about descriptions that were written for this project. To check a model
itself, name its folder: RLAIFV_SPLITTER=FOLDER pytest tests/test_real_splitter.py"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from rlaifv_nb import claims as c
from rlaifv_nb.claims import (
    ClaimsOptions,
    extract_claims,
    fill,
    parse_facts,
    parse_question,
    question_by_rule,
    question_problem,
    read_templates,
    run_claims,
    says_no_facts,
)
from rlaifv_nb.records import Claim, Prompt, Response, read_manifest, write_table

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data/real_splitter.jsonl").read_text(encoding="utf-8").splitlines()
]
LISTS = [row for row in ROWS if "answer" in row]
QUESTIONS = [row for row in ROWS if "fact" in row]
FOLDER = os.environ.get("RLAIFV_SPLITTER", "")
PROMPTS = {
    "few-shot": ("packaged:prompts/facts_fewshot.txt", "packaged:prompts/question_fewshot.txt"),
    "plain": ("packaged:prompts/facts.txt", "packaged:prompts/question.txt"),
}


def of(model, prompts):
    "The stored lists of one model with one pair of prompts."
    return [row for row in LISTS if row["model"] == model and row["prompts"] == prompts]


def stored_replies(rows, templates):
    "A splitter that looks its replies up, and what it was asked."
    table = {
        fill(templates.facts, question=row["question"], response=row["answer"]): (row["reply"], row["reason"])
        for row in rows
    }
    table |= {
        fill(templates.question, fact=row["fact"]): (row["reply"], row["reason"])
        for row in QUESTIONS
        if row["prompts"] == rows[0]["prompts"]
    }
    asked = []

    def ask(prompts):
        asked.extend(prompts)
        return [table[p] for p in prompts]

    return ask, asked


def test_the_corpus_is_of_some_size():
    assert (
        Counter((row["model"], row["prompts"]) for row in LISTS)["Qwen2.5-Coder-1.5B-Instruct", "few-shot"]
        == 12
    )
    assert len(QUESTIONS) >= 20 and {row["model"] for row in LISTS} == {
        "Qwen2.5-Coder-1.5B-Instruct",
        "SmolLM2-135M-Instruct",
    }


@pytest.mark.parametrize(
    "row", LISTS, ids=lambda row: f"{row['model'][:4]}-{row['prompts']}-{row['answer'][:20]}"
)
def test_a_reply_is_read_whole(row):
    "Each line with a bullet is a fact, unless it repeats one; what has no bullet is none."
    lines = [
        re.sub(r"^\s*(?:-|\d+\.)\s+", "", line).strip()
        for line in row["reply"].splitlines()
        if re.match(r"\s*(?:-|\d+\.)\s+\w", line)
    ]
    wanted = {line.rstrip(".").casefold() for line in lines if not line.endswith(":")}
    assert {fact.rstrip(".").casefold() for fact in parse_facts(row["reply"])} == wanted or says_no_facts(
        row["reply"]
    )


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row["fact"][:40])
def test_a_question_is_read_as_it_stands(row):
    assert row["reply"].count("\n") == 0 and parse_question(row["reply"]) == (
        row["reply"] if row["reply"].endswith("?") else None
    )


@pytest.mark.parametrize("prompts", PROMPTS)
def test_no_answer_and_no_fact_is_lost_for_its_question(prompts):
    rows = of("Qwen2.5-Coder-1.5B-Instruct", prompts)
    ask, asked = stored_replies(rows, read_templates(*PROMPTS[prompts]))
    responses = [Response(f"p{k}-00", f"p{k}", 0, 0, row["answer"], "stop") for k, row in enumerate(rows)]
    questions = {f"p{k}": row["question"] for k, row in enumerate(rows)}
    claims, set_aside, remarks = extract_claims(responses, questions, ask, read_templates(*PROMPTS[prompts]))
    listed = sum(len(parse_facts(row["reply"])) for row in rows)
    counts = c.division_counts(claims, remarks)
    assert set_aside == [] and len(claims) + counts["fragments"] + counts["leaked"] == listed
    assert len(claims) > 0.95 * listed and counts["by_rule"] > 0.6 * len(claims)
    assert len(asked) == len(rows) + len(
        {claim.text for claim in claims if not question_by_rule(claim.text)}
    ), "no fact is asked about in vain"
    by_statement = {r.claim_id for r in remarks if r.remark == c.BY_STATEMENT}
    for claim in claims:
        assert (
            claim.question.startswith("Is it true of the image that")
            if claim.claim_id in by_statement
            else not question_problem(claim.text, claim.question)
        )


def test_a_model_too_small_to_split_is_warned_of():
    rows = of("SmolLM2-135M-Instruct", "few-shot")
    templates = read_templates(*PROMPTS["few-shot"])
    ask, _ = stored_replies(rows, templates)
    responses = [Response(f"p{k}-00", f"p{k}", 0, 0, row["answer"], "stop") for k, row in enumerate(rows)]
    claims, set_aside, remarks = extract_claims(
        responses, {f"p{k}": row["question"] for k, row in enumerate(rows)}, ask, templates
    )
    without = len(rows) - len(set_aside) - len({claim.response_id for claim in claims})
    said = c.division_warnings(
        responses, set_aside, c.division_counts(claims, remarks) | {"without_claims": without}, "rule", 512
    )
    assert (
        "answers were set aside" in said[0]
        and "no list of facts" in said[0]
        and any("no claim at all" in sentence for sentence in said)
    )


@pytest.mark.skipif(
    not FOLDER,
    reason="RLAIFV_SPLITTER names no folder of an instruct model: weights are not part of the tests",
)
def test_a_real_model_divides(tmp_path):
    from rlaifv_nb.engine.models import open_llm

    rows = of("Qwen2.5-Coder-1.5B-Instruct", "few-shot")[:3]
    write_table(
        tmp_path / "prompts",
        "prompts",
        [Prompt(f"p{k}", "p.png", "0", row["question"]) for k, row in enumerate(rows)],
    )
    write_table(
        tmp_path / "responses",
        "responses",
        [Response(f"p{k}-00", f"p{k}", 0, 0, row["answer"], "stop") for k, row in enumerate(rows)],
    )
    inputs = str(tmp_path / "prompts"), str(tmp_path / "responses"), str(tmp_path / "claims")
    claims = run_claims(
        *inputs,
        open_llm(FOLDER, dtype="bfloat16"),
        options=ClaimsOptions(*PROMPTS["few-shot"]),
    ).read("claims", Claim)
    manifest = read_manifest(tmp_path / "claims")
    assert manifest["rows_out"] == 3 and manifest["n_claims"] == len(claims) >= 9, (
        "every answer is divided, and finely"
    )
    assert (
        manifest["by_rule"] > 0.5 * len(claims)
        and manifest["fragments"] + manifest["leaked"] <= 0.05 * len(claims) + 1
    )
    asked = [claim for claim in claims if not claim.question.startswith("Is it true of the image that")]
    assert all(not question_problem(claim.text, claim.question) for claim in asked)
