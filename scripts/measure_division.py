"""How well answers are divided, and claims judged: the numbers in nbs/02_claims.ipynb.

    python scripts/measure_division.py icons
    python scripts/measure_division.py splitter FOLDER ANSWERS.jsonl --name NAME [--prompts plain]

`icons` judges true and false claims about scenes of the icon world with questions of every form. `splitter`
divides real answers, a JSONL file with `question` and `answer`, with any language model, and counts what
becomes of them. Replies of a slow model are kept in the JSONL file `--replies`, and not asked for again.
Results are kept in data/results/division.json.
"""

import argparse
import json
import random
from pathlib import Path

from rlaifv_nb.claims import (
    QUESTIONS,
    STATEMENT_QUESTION,
    division_counts,
    extract_claims,
    fill,
    lower_first,
    question_by_rule,
    read_templates,
    statement_question,
)
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.engine.prefix import generate_texts, yes_no_asker
from rlaifv_nb.records import Response, sha256_of, write_json

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "division.json"
PROMPTS = {"plain": ("facts", "question"), "few-shot": ("facts_fewshot", "question_fewshot")}
FORMS = {  # forms of a question about a statement that were compared
    STATEMENT_QUESTION: lambda fact: statement_question(fact),
    "Is it true that ...?": lambda fact: f"Is it true that {lower_first(fact).rstrip('.')}?",
    'Is this statement about the image true: "..."?': lambda fact: (
        f'Is this statement about the image true: "{fact}"?'
    ),
    "Is this statement about the image true? ...": lambda fact: (
        f"Is this statement about the image true? {fact}"
    ),
    "Is this description of the image correct? ...": lambda fact: (
        f"Is this description of the image correct? {fact}"
    ),
}


def measure_icons(n_scenes: int = 120) -> dict:
    """The share of right verdicts of the packaged labeler with each form of question, on balanced claims
    about unseen scenes."""
    from rlaifv_nb.iconworld.world import balanced_claims, draw_picture, fact_text, make_scene

    scenes = [make_scene("test", 5_000_000 + i) for i in range(n_scenes)]
    claims = [balanced_claims(scene, random.Random(scene.scene_id), per_type=2) for scene in scenes]
    facts = [[fact_text(claim) for claim, _ in group] for group in claims]
    llm = open_llm("packaged:iconworld-splitter")
    prompts = list({f: fill(read_templates().question, fact=f) for group in facts for f in group}.items())
    by_splitter = dict(
        zip((f for f, _ in prompts), (text for text, _ in generate_texts(llm, [p for _, p in prompts], 64)))
    )
    forms = {"by rule": question_by_rule, "by the splitter": by_splitter.get, **FORMS}
    ask = yes_no_asker(open_vlm("packaged:iconworld-vlm"))
    found = {}
    for name, form in forms.items():
        right = []
        for k in range(0, n_scenes, 24):
            answers = ask(
                [draw_picture(s) for s in scenes[k : k + 24]],
                [[form(f) for f in group] for group in facts[k : k + 24]],
            )
            for group, pairs in zip(claims[k : k + 24], answers):
                right += [(p_yes > p_no) == truth for (_, truth), (p_yes, p_no) in zip(group, pairs)]
        found[name] = {"right": sum(right), "of": len(right)}
        print(f"{sum(right) / len(right):.1%} {name}")
    return {"n_scenes": n_scenes, "forms": found}


def remembering(llm, path, max_new_tokens: int, n_calls: list):
    """A function from prompts to (text, finish_reason) pairs that asks `llm` only for what is not in the
    file `path`, and counts prompts in `n_calls`."""
    known = {}
    if path and Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["prompt_sha"]] = (row["reply"], row["reason"])

    def ask(prompts):
        n_calls[0] += len(prompts)
        new = [p for p in prompts if sha256_of(p) not in known]
        for p, answer in zip(new, generate_texts(llm(), new, max_new_tokens) if new else []):
            known[sha256_of(p)] = answer
            if path:
                with open(path, "a", encoding="utf-8") as f:
                    f.write(
                        json.dumps(
                            {"prompt_sha": sha256_of(p), "reply": answer[0], "reason": answer[1]},
                            ensure_ascii=False,
                        )
                        + "\n"
                    )
        return [known[sha256_of(p)] for p in prompts]

    return ask


def measure_splitter(folder: str, answers: str, prompts: str, replies: str, ways=QUESTIONS) -> dict:
    "Counts of what becomes of the answers in a file, with each way to make questions."
    rows = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    responses = [Response(f"p{k}-00", f"p{k}", 0, 0, row["answer"], "stop") for k, row in enumerate(rows)]
    question_of = {f"p{k}": row["question"] for k, row in enumerate(rows)}
    templates = read_templates(*(f"packaged:prompts/{name}.txt" for name in PROMPTS[prompts]))
    opened = []

    def llm():
        if not opened:
            opened.append(open_llm(folder, dtype="bfloat16"))
        return opened[0]

    found = {}
    for way in ways:
        n_calls = [0]
        ask = remembering(llm, replies, 512, n_calls)
        claims, set_aside, remarks = extract_claims(responses, question_of, ask, templates, questions=way)
        found[way] = {
            "answers": len(rows),
            "set_aside": len(set_aside),
            **division_counts(claims, remarks),
            "calls": n_calls[0],
        }
        print(way, found[way])
    words = [len(row["answer"].split()) for row in rows]
    return {"prompts": prompts, "words": [min(words), max(words)], "questions": found}


def main():
    """Measure, and put the result beside those of before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("icons")
    splitter = parts.add_parser("splitter")
    splitter.add_argument("folder")
    splitter.add_argument("answers")
    splitter.add_argument("--name", required=True, help="what the splitter is called in the results")
    splitter.add_argument("--prompts", choices=PROMPTS, default="few-shot")
    splitter.add_argument("--replies", default="")
    splitter.add_argument("--ways", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    args = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.part == "icons":
        stored["icon world"] = measure_icons()
    else:
        stored[f"{args.name}, {args.prompts} prompts"] = measure_splitter(
            args.folder, args.answers, args.prompts, args.replies, args.ways
        )
    write_json(RESULTS, stored)


if __name__ == "__main__":
    main()
