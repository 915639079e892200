"""The same answer files give the same figures, to the last digit, as the official scripts gave
(tests/data/parity, made by make_fixtures.py).

The answer files come from seeds (parity_cases.py); NLTK and spaCy are replaced by the same simple rules on
both sides.
"""

import json
import math
import sys
from functools import cache
from pathlib import Path

import parity_cases as cases
import pytest

from rlaifv_nb.benchmarks.amber import (
    AmberWords,
    amber_figures,
    count_amber_answers,
    count_amber_descriptions,
    description_figures,
    open_amber_tools,
    read_amber_annotations,
    read_amber_answers,
    read_amber_words,
)
from rlaifv_nb.benchmarks.halbench import (
    coco_words,
    count_mentions,
    mention_figures,
    open_halbench_tools,
    parse_object_list,
    phrase_mentions,
    read_coco_truth,
    read_coco_words,
    read_halbench_answers,
    text_mentions,
)
from rlaifv_nb.benchmarks.intervals import sum_counts
from rlaifv_nb.benchmarks.llava_bench import count_points, point_figures
from rlaifv_nb.benchmarks.mmhal import count_ratings, rating_figures
from rlaifv_nb.benchmarks.mmstar import count_mmstar_answers, mmstar_figures
from rlaifv_nb.benchmarks.pope import count_pope_answers, pope_figures, read_pope
from rlaifv_nb.benchmarks.reading import always_no
from rlaifv_nb.benchmarks.refomb import (
    count_preferences,
    preference_figures,
    read_preference,
    read_review_file,
)

HERE = Path(__file__).resolve().parent


@cache
def fixture(name):
    "The official figures of each seed, `[{name: value}]`."
    data = json.loads((HERE / "data" / "parity" / f"{name}.json").read_text())
    return [{k: v for k, v in zip(data["columns"], row) if v is not None} for row in data["rows"]]


def official_data(*path):
    """A file of the official repositories' data, looked for in folders `shared/official` beside or above the
    checkout.
    """
    for folder in HERE.parents:
        if (found := folder.joinpath("shared", "official", *path)).exists():
            return found
    pytest.skip(f"needs shared/official/{'/'.join(path)} beside the checkout")


def seeds(name, at_least=200):
    "Pairs of seed and official figures, enough of them."
    figures = fixture(name)
    assert len(figures) >= at_least
    return list(enumerate(figures))


def sums_of(counter, *args, **options):
    return sum_counts(counter(*args, **options))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    "NLTK and spaCy are the same simple rules here as when the official scripts ran."
    for name, module in cases.stand_in_modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def amber(case):
    "All official figures of an AMBER case by our functions."
    annotations, answers = (
        {a["id"]: a for a in case["annotations"]},
        {a["id"]: a["response"] for a in case["answers"]},
    )
    words, cases.Word.near = AmberWords(case["association"], frozenset(case["safe"])), case["near"]
    yes_no = amber_figures(sums_of(count_amber_answers, answers, annotations, "official"), "official")
    described = sums_of(count_amber_descriptions, answers, annotations, words, *open_amber_tools())
    return yes_no | {f"generative {k}": v for k, v in description_figures(described, "official").items()}


def test_amber():
    for seed, figures in seeds("amber"):
        assert amber(cases.amber_case(seed)) == figures, seed


def test_amber_on_the_real_annotations():
    annotations = list(read_amber_annotations(official_data("amber", "annotations.json")).values())
    words = read_amber_words(official_data("amber", "relation.json").parent)
    assert len(annotations) == 15220 and len(words.safe) == 9
    for seed, figures in seeds("amber_real", 20):
        assert amber(cases.amber_case(seed, words.association, annotations)) == figures, seed


def test_amber_always_no_is_above_the_paper_s_llava():
    annotations = read_amber_annotations(official_data("amber", "annotations.json"))
    answers = always_no({id for id, a in annotations.items() if a["type"] != "generative"})
    figures = amber_figures(sums_of(count_amber_answers, answers, annotations, "official"), "official")
    assert figures == {k: v for k, v in fixture("amber_always_no")[0].items() if "generative" not in k}
    assert figures["all F1"] == 79.7 and len(answers) == 14216


def halbench(case, coco, folder):
    "Both official sets of metrics of a case, through our loaders."
    for kind in ("instances", "captions"):
        for part in ("train", "val"):
            rows = {
                "images": case["images"],
                "categories": case["categories"],
                "annotations": case[kind][part == "val" :: 2],
            }
            (folder / f"{kind}_{part}2014.json").write_text(json.dumps(rows))
    (folder / "caps.jsonl").write_text("".join(json.dumps(c) + "\n" for c in case["caps"]))
    answers, phrases = (
        read_halbench_answers(folder / "caps.jsonl"),
        {c["image_id"]: c["phrases"] for c in case["caps"]},
    )
    tag, lemmas = open_halbench_tools()
    truth = read_coco_truth(folder, answers, coco, lemmas)
    mentions = {
        "judge": {id: phrase_mentions(p, coco, tag) for id, p in phrases.items()},
        "classic": {id: text_mentions(text, coco, lemmas) for id, text in answers.items()},
    }
    return {
        name: mention_figures(sums_of(count_mentions, answers, m, truth, "official"), "official")
        for name, m in mentions.items()
    }


PRINTED = {
    "Response Hall": "CHAIRs_refine",
    "Object Hall": "CHAIRi",
    "Response Correct": "correct_rate",
    "Object Correct": "object_correct_rate",
    "Object Recall": "obj_rec",
}


def compare_halbench(ours, figures, seed):
    "A case without objects (or without truth) is an error of the official script, and NaN here."
    for name, metrics in ours.items():
        if name in figures:
            assert figures[name] == "ZeroDivisionError" and any(math.isnan(v) for v in metrics.values()), seed
        else:
            assert metrics == {k: figures[f"{name}/{k}"] for k in metrics}, (seed, name)
    for name, key in PRINTED.items():
        if f"summary/{name}" in figures:
            assert f"{ours['judge'][key] * 100:.2f}" == figures[f"summary/{name}"], seed
    if "summary/Average Length" in figures:
        assert f"{ours['judge']['avg_word_len']:.2f}" == figures["summary/Average Length"], seed


def test_object_halbench(tmp_path):
    printed = 0
    for seed, figures in seeds("halbench"):
        case = cases.halbench_case(seed)
        compare_halbench(halbench(case, coco_words(case["synonyms"]), tmp_path), figures, seed)
        printed += "summary/Object Hall" in figures
    assert printed > 100


def test_object_halbench_on_the_real_synonyms(tmp_path):
    path = official_data("rlaifv", "synonyms_refine.txt")
    coco, lines = read_coco_words(path), path.read_text().rstrip("\n").split("\n")
    assert len(set(coco.class_of.values())) == 80
    for seed, figures in seeds("halbench_real", 20):
        compare_halbench(halbench(cases.halbench_case(seed, lines), coco, tmp_path), figures, seed)


def test_object_lists_of_replies():
    for seed, figures in seeds("halbench_replies"):
        reply = cases.reply_case(seed)
        if figures["error"] == "ValueError":
            with pytest.raises(ValueError, match="no JSON list"):
                parse_object_list(reply)
        else:
            assert parse_object_list(reply) == figures["error"], seed


def test_mmhal_bench():
    for seed, figures in seeds("mmhal"):
        sums = sums_of(count_ratings, cases.mmhal_case(seed), mode="official")
        ours = rating_figures(sums, "official")
        types = ",".join(str(v) for k, v in ours.items() if k.startswith("score: "))
        for part in ("evaluation", "summary"):
            assert (f"{ours['score']:.2f}", types) == (figures[f"{part}/score"], figures[f"{part}/types"]), (
                seed
            )
        assert f"{ours['hallucination']:.3f}" == figures["evaluation/hallucination"], seed
        assert (
            f"{sum(v for (_, name), v in sums.items() if name == 'hallucinating') / 96:.2f}"
            == figures["summary/hallucination"]
        ), seed
        assert f"{ours['informativeness']:.2f}" == figures["summary/informativeness"], seed


def test_refomb(tmp_path):
    table = {"win": 1, "loss": -1, "tie": 0}
    for seed, figures in seeds("refomb"):
        items = cases.refomb_case(seed)
        verdicts = [
            next(t for t in i["attempts"] if read_preference(t, "official") is not None) for i in items
        ]
        (tmp_path / "saved.json").write_text(
            json.dumps(
                [{"image": i["id"], "type_name": i["type"], "review": t} for i, t in zip(items, verdicts)]
            )
        )
        texts, types = read_review_file(tmp_path / "saved.json")
        ours = preference_figures(sums_of(count_preferences, texts, types, mode="official"), "official")
        scores = {id: read_preference(t, "official") for id, t in texts.items()}
        for part in ("win", "trust"):
            assert f"{ours['win']:.3f}" == figures[part], seed
            if f"{part} table" in figures:  # the Excel script fails where nothing but losses came
                assert figures[f"{part} table"] == "IndexError" and set(scores.values()) == {-1}, seed
                continue
            assert ours["win"] == figures[f"{part} table/score"], seed
            assert {k: list(scores.values()).count(v) for k, v in table.items()} == {
                k: figures[f"{part} table/{k}"] for k in table
            }, seed
            for type in set(types.values()):
                win, loss, tie = map(int, figures[f"{part} table/{type}"].split("/"))
                assert ours[f"win: {type}"] == (win + tie / 2) / (win + loss + tie), seed


def test_pope(tmp_path):
    for seed, figures in seeds("pope"):
        labels, answers = cases.pope_case(seed)
        for name, rows in (("labels.json", labels), ("answers.json", answers)):
            (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        said, true = read_pope(tmp_path / "answers.json", tmp_path / "labels.json")
        ours = pope_figures(sums_of(count_pope_answers, said, true, "official"), "official")
        if "error" in figures:
            assert figures["error"] == "ZeroDivisionError" and any(math.isnan(v) for v in ours.values()), seed
        else:
            assert ours == figures, seed


def test_mmstar():
    for seed, figures in seeds("mmstar"):
        assert (
            mmstar_figures(sums_of(count_mmstar_answers, cases.mmstar_case(seed), "official"), "official")
            == figures
        ), seed


def test_llava_bench():
    for seed, figures in seeds("llava"):
        assert point_figures(sums_of(count_points, cases.llava_case(seed)), "official") == figures, seed


def test_missing_libraries_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(RuntimeError, match="en_core_web_lg"):
        open_amber_tools()
    with pytest.raises(RuntimeError, match="en_core_web_trf"):
        open_halbench_tools()


def test_answer_files_that_official_scripts_would_misread(tmp_path):
    "Rows that the official readers skip, count twice or cut off are errors that name the row."
    (tmp_path / "double.json").write_text('[{"id": 7, "response": "Yes"}, {"id": 7, "response": "No"}]')
    with pytest.raises(ValueError, match="row 2: id 7 appears twice"):
        read_amber_answers(tmp_path / "double.json")
    (tmp_path / "short.json").write_text('{"question": "a", "answer": "yes"}\n')
    (tmp_path / "labels.json").write_text(
        '{"question_id": 1, "text": "a", "label": "yes"}\n{"question_id": 2, "text": "b", "label": "no"}\n'
    )
    with pytest.raises(ValueError, match="1 rows for 2 questions"):
        read_pope(tmp_path / "short.json", tmp_path / "labels.json")
    (tmp_path / "broken.jsonl").write_text('{"image_id": 1, "answer": "a"}\n{"image_id": 2, "answ')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_halbench_answers(tmp_path / "broken.jsonl")
    with pytest.raises(ValueError, match="id 9 is not in the annotations"):
        count_amber_answers({9: "No"}, {1: {"id": 1, "type": "relation", "truth": "no"}})
