"""The benchmarks in miniature: figures of the metric code against counts from the scenes, and answer files
that are wrong on purpose.
"""

import json
import random

import pytest

from rlaifv_nb.benchmarks.refomb import read_refomb_items
from rlaifv_nb.benchmarks.tables import (
    PARTS,
    measure_answers,
    measure_reviews,
    measure_scores,
    open_questions,
    read_published,
)
from rlaifv_nb.iconworld.miniature import (
    N_LIKELY,
    absent_objects,
    likely_objects,
    named_objects,
    true_answer_figures,
    true_description_figures,
    write_miniature,
    yes_no_claims,
)
from rlaifv_nb.iconworld.world import IconClaim, biased_groups, caption_text, is_true
from rlaifv_nb.records import Score, read_table
from rlaifv_nb.runner.command import main

N = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The folder of a miniature and its scenes."
    folder = tmp_path_factory.mktemp("miniature")
    return folder, write_miniature(folder, N)


def figures(world, descriptions, answers, mode="clean"):
    "`{figure: value}` of an answer file with these texts, through the file and the measures."
    folder, _ = world
    questions, path = open_questions("amber", folder), folder / "texts.json"
    path.write_text(
        json.dumps(
            [
                {"id": q.question_id, "response": t}
                for q, t in zip(questions, [*descriptions, *answers], strict=True)
            ]
        )
    )
    scores = measure_scores("", measure_answers("amber", folder, path, questions, mode), mode, "")
    return {s.metric.partition(": ")[2]: s.value for s in scores}


def truths(world):
    "Whether each yes/no question is true."
    return [is_true(s, c) for s in world[1] for c in yes_no_claims(s)]


def captions(world, seed):
    "Captions of habit: what a biased model says."
    rng = random.Random(seed)
    return [caption_text(biased_groups(s, rng), rng) for s in world[1]]


@pytest.mark.parametrize("seed", range(20))
def test_metric_equals_the_count_from_the_scenes(world, seed):
    rng = random.Random(seed)
    said = [t if rng.random() < 0.8 else rng.choice([None, not t]) for t in truths(world)]
    texts = captions(world, seed)
    found = figures(world, texts, [{True: "Yes", False: "no.", None: "Hm"}[s] for s in said])
    assert {k: found[k] for k in ("CHAIR", "Cover", "Hal", "Cog")} == true_description_figures(
        world[1], texts
    )
    for part, row in true_answer_figures(world[1], said).items():
        assert {k: found[f"{part} {k}"] for k in ("accuracy", "precision", "recall")} == {
            k: row[k] for k in ("accuracy", "precision", "recall")
        }
        assert found[f"{part} F1"] == pytest.approx(row["F1"], abs=1e-9)


def test_official_figures_are_the_scripts_roundings_of_the_same_counts(world):
    texts, said = captions(world, 1), truths(world)
    found, (n, no) = (
        figures(world, texts, ["Yes" if s else "No" for s in said], "official"),
        (len(said), said.count(False)),
    )
    named = [named_objects(t) for t in texts]
    absent = [[o for o in row if s.group(o) is None] for row, s in zip(named, world[1])]
    assert found["CHAIR"] == round(sum(map(len, absent)) / (sum(map(len, named)) + 0.001) * 100, 1)
    assert found["Hal"] == round(100 - (N - sum(map(bool, absent))) / (N + 0.001) * 100, 1)
    accuracy, recall = round(n / (n + 0.001) * 100, 1), round(no / (no + 0.001) * 100, 1)
    assert (found["all accuracy"], found["all recall"]) == (accuracy, recall)
    assert found["all F1"] == round(2 * recall / 100 * recall / 100 / (recall / 100 * 2 + 0.0001) * 100, 1)


def test_all_wrong_scores_nothing(world):
    found = figures(
        world, [f"A {likely_objects(s)[0]}." for s in world[1]], ["No" if t else "Yes" for t in truths(world)]
    )
    assert (found["CHAIR"], found["Hal"], found["Cover"], found["Cog"]) == (100, 100, 0, 100 / N_LIKELY)
    assert (found["all accuracy"], found["all F1"], found["all recall"]) == (0, 0, 0)


def test_half_wrong_is_half(world):
    texts = [
        f"A {s.groups[0].object} and a {likely_objects(s)[0]}." if i % 2 else f"A {s.groups[0].object}."
        for i, s in enumerate(world[1])
    ]
    said = truths(world)
    wrong = set(range(0, len(said), 2))
    found = figures(world, texts, ["Yes" if t is not (i in wrong) else "No" for i, t in enumerate(said)])
    assert (found["Hal"], found["CHAIR"]) == (50, pytest.approx(100 / 3))  # 15 absent of 45 mentions
    assert found["all accuracy"] == 100 * (len(said) - len(wrong)) / len(said)


@pytest.mark.parametrize("k", range(N_LIKELY + 1))
def test_k_known_hallucinations(world, k):
    texts = [
        f"A {s.groups[0].object}" + "".join(f", a {o}" for o in likely_objects(s)[:k]) + "." for s in world[1]
    ]
    found = figures(world, texts, ["No"] * len(truths(world)))
    assert (
        found["CHAIR"] == pytest.approx(100 * k / (k + 1))
        and found["Hal"] == 100 * (k > 0)
        and found["Cog"] == 100 * k / N_LIKELY
    )


def test_always_no_and_lower_case(world):
    said = truths(world)
    no = said.count(False)
    found = figures(world, [""] * N, ["No"] * len(said))
    assert (found["all recall"], found["all precision"]) == (100, 100 * no / len(said)) and found[
        "existence F1"
    ] == 100
    assert (found["Hal"], found["Cover"]) == (0, 0) and found["CHAIR"] != found["CHAIR"]
    lower = ["yes" if t else "no" for t in said]
    assert (
        figures(world, [""] * N, lower)["all accuracy"] == 100
        and figures(world, [""] * N, lower, "official")["all accuracy"] == 0
    )
    empty = figures(world, [""] * N, [""] * len(said))
    assert (empty["all accuracy"], empty["all unread"]) == (0, 100)


def test_every_existence_question_is_false_and_no_claim_is_asked_twice(world):
    for scene in world[1]:
        claims = yes_no_claims(scene)
        assert len(set(claims)) == len(claims) and not any(
            is_true(scene, c) for c in claims if c.type == "existence"
        )
        assert len({*likely_objects(scene)}) == N_LIKELY


@pytest.mark.parametrize("part", ("random", "popular", "adversarial"))
def test_pope(world, part, tmp_path):
    folder, scenes = world
    questions = open_questions(f"pope-{part}", folder)
    assert len(questions) == 6 * N
    for scene in scenes:
        assert not any(is_true(scene, IconClaim("existence", o)) for o in absent_objects(scene, part))
    texts = [q.row["label"] if i % 3 else "yes" for i, q in enumerate(questions)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"question": q.text, "answer": t}) + "\n" for q, t in zip(questions, texts))
    )
    scores = {
        s.metric: s.value
        for s in measure_scores(
            "", measure_answers(f"pope-{part}", folder, tmp_path / "a.jsonl", questions), "clean", ""
        )
    }
    false_yes = sum(q.row["label"] == "no" and t == "yes" for q, t in zip(questions, texts))
    assert (
        scores["POPE: accuracy"] == pytest.approx(100 * (len(questions) - false_yes) / len(questions))
        and scores["POPE: recall"] == 100
    )
    assert scores["POPE: precision"] == pytest.approx(100 * 3 * N / (3 * N + false_yes))


def test_refomb_files_are_what_the_reviews_read(world):
    folder, scenes = world
    items = read_refomb_items(folder / "gpt4v_RefoMB_dev_0521.jsonl")
    assert len(items) == 2 * N == len(open_questions("refomb", folder))
    for scene, item in zip([s for s in scenes for _ in "ab"], items.values()):
        assert all(scene.group(o) for o in named_objects(item["description"])), "the description is true"


def test_evaluate_command_from_end_to_end(world, tmp_path, capsys):
    folder, scenes = world
    common = ["--bench", "amber", "--data", str(folder), "--limit", "6", "--max-new-tokens", "128"]
    assert main(["evaluate", "packaged:iconworld-vlm", *common, "--out", str(tmp_path / "base")]) == 0
    assert (
        main(
            [
                "evaluate",
                "packaged:iconworld-vlm",
                "--adapter",
                "packaged:iconworld-aligned",
                *common,
                "--out",
                str(tmp_path / "aligned"),
                "--compare",
                str(tmp_path / "base"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        "always No" in shown
        and "two models must differ by" in shown
        and "not set beside published figures" in shown
        and "| difference |" in shown
    )
    for name in ("base", "aligned"):
        scores = {s.metric: s.value for s in read_table(tmp_path / name, "scores", Score)}
        texts = [row["response"] for row in json.loads((tmp_path / name / "amber.json").read_text())]
        assert {
            f"AMBER generative: {k}": scores[f"AMBER generative: {k}"]
            for k in ("CHAIR", "Cover", "Hal", "Cog")
        } == {f"AMBER generative: {k}": v for k, v in true_description_figures(scenes[:6], texts[:6]).items()}
        said = [{"Yes": True, "No": False}.get(t) for t in texts[6:]]
        assert (
            scores["AMBER discriminative: all accuracy"]
            == true_answer_figures(scenes[:6], said)["all"]["accuracy"]
        )
    assert (
        main(
            [
                "evaluate",
                "--answers",
                str(tmp_path / "base" / "amber.json"),
                *common[:-2],
                "--out",
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    values = [
        [(s.metric, s.value, s.ci_low) for s in read_table(tmp_path / name, "scores", Score)]
        for name in ("base", "again")
    ]
    assert repr(values[0]) == repr(values[1])
    assert (
        main(["leaderboard", str(tmp_path)]) == 0
        and "packaged:iconworld-vlm" in (tmp_path / "leaderboard.html").read_text()
    )


def test_a_second_call_changes_no_byte_and_other_settings_are_refused(world, tmp_path, capsys):
    folder, _ = world
    argv = [
        "evaluate",
        "packaged:iconworld-vlm",
        "--bench",
        "pope-random",
        "--data",
        str(folder),
        "--limit",
        "4",
        "--out",
        str(tmp_path / "e"),
    ]
    assert main(argv) == 0
    files = {p: p.read_bytes() for p in (tmp_path / "e").rglob("*") if p.is_file()}
    assert main(argv) == 0 and files == {
        p: p.read_bytes() for p in (tmp_path / "e").rglob("*") if p.is_file()
    }
    (tmp_path / "e" / "manifest.json").unlink()
    (tmp_path / "e" / "answers" / "answers-00000.jsonl").unlink()
    (tmp_path / "e" / "answers" / "manifest.json").unlink()
    assert main(argv) == 0
    again = {p: p.read_bytes() for p in files if p.name not in ("manifest.json", "table.md")}
    assert again == {p: files[p] for p in again}
    assert (
        main([*argv[:-2], "--mode", "official", "--out", str(tmp_path / "e")]) == 2
        and "other settings" in capsys.readouterr().err
    )


def test_a_picture_that_cannot_be_read_is_set_aside_and_said(world, tmp_path, capsys):
    folder = tmp_path / "data"
    scenes = write_miniature(folder, 4)
    (folder / "images" / f"{scenes[1].scene_id}.png").write_bytes(b"no picture")
    argv = [
        "evaluate",
        "packaged:iconworld-vlm",
        "--bench",
        "amber",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "e"),
        "--max-new-tokens",
        "64",
    ]
    assert main(argv) == 0
    n = 1 + len(yes_no_claims(scenes[1]))
    assert f"{n} questions set aside: unreadable picture" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert (
        manifest["questions_set_aside"] == {"unreadable picture": n}
        and manifest["rows_in"] - manifest["rows_out"] == n
    )


def test_a_rate_of_0_or_100_percent_gets_the_exact_bound(world):
    folder, scenes = world
    path, questions = folder / "clean.json", open_questions("amber", folder)
    path.write_text(
        json.dumps(
            [{"id": q.question_id, "response": "No" if q.kind == "yes/no" else "Nothing."} for q in questions]
        )
    )
    measured = measure_answers("amber", folder, path, questions)
    found = {s.metric: (s.value, s.ci_low, s.ci_high) for s in measure_scores("", measured, "clean", "")}
    assert found["AMBER generative: Hal"] == (0, 0, pytest.approx(100 * (1 - 0.025 ** (1 / N))))
    assert found["AMBER discriminative: all accuracy"][1] < found["AMBER discriminative: all accuracy"][0]


def test_published_names_of_parts_are_in_the_published_file(tmp_path):
    names = {}
    for row in read_published():
        names.setdefault(row["benchmark"], set()).update(row["figures"])
    for part in PARTS.values():
        for mode in part.published.values():
            assert {name for name, _ in mode.values()} <= names.get(part.benchmark, set()), part.benchmark


def test_saved_reviews(tmp_path):
    (tmp_path / "mmhal.json").write_text(json.dumps([{"gpt4_review": f"Rating: {i % 7}"} for i in range(96)]))
    found = {
        s.metric: s.value
        for s in measure_scores("", measure_reviews("mmhal", tmp_path / "mmhal.json"), "clean", "")
    }
    ratings = [i % 7 for i in range(96)]
    assert (
        found["MMHal-Bench: score"] == sum(ratings) / 96
        and found["MMHal-Bench: hallucination"] == 100 * sum(r < 3 for r in ratings) / 96
    )
    rows = [{"image": i, "review": f"[[{'ABC'[i % 3]}]]", "type_name": "OCR"} for i in range(9)]
    (tmp_path / "A-B.json").write_text(json.dumps(rows))
    (tmp_path / "A-B.hall.json").write_text(
        json.dumps([{"review_res": "[[B]]", "type_name": "OCR"} for _ in rows])
    )
    found = {
        s.metric: s.value
        for s in measure_scores(
            "", measure_reviews("refomb", tmp_path / "A-B.json", "official"), "official", ""
        )
    }
    assert found["RefoMB win: win"] == 0.5 and found["RefoMB trust: win"] == 1
    assert (
        main(
            [
                "evaluate",
                "--bench",
                "refomb",
                "--reviews",
                str(tmp_path / "A-B.json"),
                "--out",
                str(tmp_path / "e"),
                "--mode",
                "official",
            ]
        )
        == 0
    )
