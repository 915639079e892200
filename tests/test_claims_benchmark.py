"""Claims that a labeler rejects, before and after: figures by hand, a whole evaluation, the door."""

import dataclasses
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlaifv_nb.benchmarks import claims
from rlaifv_nb.benchmarks.claims import (
    AnswerCase,
    ClaimCheckOptions,
    Difference,
    cases_of_models,
    check_claims_options,
    claim_differences,
    claim_scores,
    claims_table,
    conclusion,
    held_out_prompts,
    labeler_caveats,
    prompt_caveats,
    read_answer_cases,
    run_claims_benchmark,
    says_less,
    shared_cases,
)
from rlaifv_nb.benchmarks.evaluate import compare_folders
from rlaifv_nb.evaluation import Evaluation, parse_adapters, prompts_folder, run_evaluation
from rlaifv_nb.guided_decoding import (
    checking_options,
    guidance_curve,
    read_candidates,
    rejected_claims,
    run_guided_decoding,
)
from rlaifv_nb.iconworld.miniature import write_miniature
from rlaifv_nb.iconworld.world import draw_picture, make_scene
from rlaifv_nb.records import (
    Candidate,
    Claim,
    Prompt,
    Response,
    Score,
    SetAside,
    Verdict,
    package_folder,
    read_manifest,
    read_table,
    resolve_path,
    shard_paths,
    write_rows,
    write_table,
)
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.leaderboard import figure_text, find_entries
from rlaifv_nb.runner.machine import wanted_models
from rlaifv_nb.runner.recipes import (
    RecipeError,
    check_amounts,
    check_recipe,
    claims_parameters,
    first_remade,
    load_recipe,
    parameter_defaults,
    plan_run,
    restart_option,
)
from rlaifv_nb.runner.report import claim_scores_table

POLICY, ADAPTERS = "packaged:iconworld-vlm", {"aligned": "packaged:iconworld-aligned"}
OPTIONS = ClaimCheckOptions(max_new_tokens=60, batch_size=2)


def case(model, prompt_id, verdicts, words=10):
    """An answer whose claims have these verdicts."""
    return AnswerCase(model, prompt_id, "word " * words, "stop", [["A fact.", v] for v in verdicts])


# figures by hand


def test_measures_are_ratios_of_sums_over_judged_claims():
    cases = [case("m", "a", ["yes", "no", "no", "abstain"]), case("m", "b", ["yes", "undecided"], words=20)]
    found = {s.metric: s for s in claim_scores("m", cases, {"a": "1.jpg", "b": "2.jpg"})}
    assert found["rejected"].value == 40 and found["accepted"].value == 40 and found["abstained"].value == 20
    assert found["with rejected"].value == 50 and found["rejected per answer"].value == 1
    assert found["claims"].value == 3 and found["words"].value == 15 and found["words"].n == 2
    assert all(s.ci_low <= s.value <= s.ci_high for s in found.values())


def test_two_questions_about_one_picture_are_one_picture():
    cases = [case("m", p, ["no"] if p < "c" else ["yes"]) for p in "abcd"]
    apart = claim_scores("m", cases, {p: p for p in "abcd"})[0]
    together = claim_scores("m", cases, {"a": "1", "b": "1", "c": "2", "d": "2"})[0]
    assert (apart.n, together.n) == (
        4,
        2,
    ) and together.ci_high - together.ci_low >= apart.ci_high - apart.ci_low


def test_differences_are_paired():
    """Pictures differ widely, and every one of them improves by one claim of ten: only pairs can show it."""
    picture_of = {f"p{k}": f"{k}.jpg" for k in range(30)}
    before = [case("base", p, ["no"] * (1 + k % 9) + ["yes"] * (9 - k % 9)) for k, p in enumerate(picture_of)]
    after = [case("round_1", p, ["no"] * (k % 9) + ["yes"] * (10 - k % 9)) for k, p in enumerate(picture_of)]
    row = claim_differences("round_1", before, after, picture_of)[0]
    assert row.difference == -10 and row.ci_high == -10 and row.n_changed == 30 and row.is_sure
    assert conclusion(row).startswith(
        "On these 30 pictures the labeler rejects fewer claims of round_1 than of base"
    )
    worse = claim_differences("round_1", after, before, picture_of)[0]
    assert "rejects more claims" in conclusion(worse)


@pytest.mark.parametrize("n, changed, sure", [(2, 2, False), (5, 5, False), (6, 6, True), (12, 5, False)])
def test_a_few_pictures_tell_nothing_however_clear_they_look(n, changed, sure):
    picture_of = {f"p{k}": f"{k}.jpg" for k in range(n)}
    before = [case("base", p, ["no", "yes"]) for p in picture_of]
    after = [case("r", p, ["yes" if k < changed else "no", "yes"]) for k, p in enumerate(picture_of)]
    row = claim_differences("r", before, after, picture_of)[0]
    assert row.n_changed == changed and row.ci_high < 0 and row.is_sure == sure
    assert ("too few to tell" in conclusion(row)) != sure


def test_the_words_that_twelve_pictures_deserve():
    row = Difference("round_1", "rejected", 85.0, 80.0, -5.0, -12.0, 3.0, 12, 5)
    assert conclusion(row).startswith(
        "Twelve pictures are too few to tell whether round_1 is better or worse than base"
    )
    assert "five pictures changed" in conclusion(row)
    unsure = conclusion(replace(row, n=400, n_changed=200))
    assert unsure.startswith("On these 400 pictures, round_1 cannot be told apart from base")
    assert "-12.0 to +3.0" in unsure and "too few" not in unsure
    assert conclusion(replace(row, n=1, n_changed=1)).startswith("One picture is too few to tell")
    silent = Difference("round_1", "claims", 9.0, 2.0, -7.0, -8.0, -6.0, 12, 12)
    assert "Part of the change may be silence" in says_less(silent)
    assert (
        says_less(replace(silent, ci_high=1.0))
        == says_less(replace(silent, difference=7.0, ci_low=6.0, ci_high=8.0))
        == ""
    )


def test_no_judged_claim_is_not_known_rather_than_zero():
    picture_of = {"a": "1", "b": "2"}
    silent = [case("r", p, []) for p in picture_of]
    row = claim_differences("r", [case("base", p, ["no"]) for p in picture_of], silent, picture_of)[0]
    assert row.difference != row.difference and "Nothing can be said" in conclusion(row)
    scores = {s.metric: s for s in claim_scores("r", silent, picture_of)}
    assert scores["rejected"].value != scores["rejected"].value and scores["claims"].value == 0


def test_a_figure_that_appears_is_not_a_change():
    """Six of eight pictures have a judged claim only afterwards: two can be compared, too few to be sure."""
    picture_of = {f"p{k}": f"{k}.jpg" for k in range(8)}
    before = [case("base", p, ["no"] if k < 2 else []) for k, p in enumerate(picture_of)]
    after = [case("r", p, ["yes"]) for p in picture_of]
    row = claim_differences("r", before, after, picture_of)[0]
    assert row.n_changed == 2 and not row.is_sure


def test_a_count_of_zero_has_no_interval_and_a_share_of_zero_has():
    scores = claim_scores("m", [case("m", p, ["yes"]) for p in "ab"], {"a": "1", "b": "2"})
    found = {s.metric: s for s in scores}
    count, share = found["rejected per answer"], found["rejected"]
    assert count.value == 0 and math.isnan(count.ci_low) and math.isnan(count.ci_high)
    assert (share.value, share.ci_low) == (0, 0) and share.ci_high > 0
    assert "| rejected claims per answer | 0.0 |" in claims_table(scores, [])
    table = claim_scores_table({"m": found}, {})
    assert "nan" not in table and "nan" not in figure_text(count)


def test_prompts_that_chose_the_checkpoint_are_named():
    test = Prompt("p", "a.jpg", "", "What?", split="test")
    assert prompt_caveats([test]) == []
    assert "chose the checkpoint" in prompt_caveats([test, replace(test, split="dev")])[0]


def test_an_answer_that_was_not_divided_leaves_its_prompt_out_for_all():
    responses = [
        Response(f"{p}-0{k}", p, k, 0, text, "stop") for p in "pqr" for k, text in ((0, "A."), (1, "B."))
    ]
    responses[3] = replace(responses[3], text=" ")
    lost = [SetAside("p-01", "no list of facts"), SetAside("q-01", "empty response")]
    divided = [Claim(f"{r}-00", r, "A fact.", "") for r in ("p-00", "q-00", "r-00", "r-01")]
    verdicts = [Verdict(c.claim_id, 0.9, 0.1, "yes") for c in divided[:-1]]
    found = cases_of_models(["base", "after"], responses, divided, verdicts, lost)
    assert [(c.model, c.prompt_id) for c in found] == [
        ("base", "p"),
        ("base", "q"),
        ("after", "q"),
        ("base", "r"),
        ("after", "r"),
    ]
    shared = shared_cases(["base", "after"], found)
    assert [c.prompt_id for c in shared["base"]] == [c.prompt_id for c in shared["after"]] == ["q", "r"]
    assert shared["after"][0].claims == [] and shared["after"][1].claims == [["A fact.", "undecided"]]


# what is said about the labeler


def test_the_labeler_is_named_with_what_follows_from_who_it_is():
    assert labeler_caveats("org/a", "org/b", "org/c") == []
    own = " ".join(labeler_caveats("org/a", "org/a", "org/c"))
    assert "own base model" in own and "feedback" not in own and "judge: MODEL" in own
    teacher = " ".join(labeler_caveats("org/a", "org/b", "org/a"))
    assert "gave the feedback" in teacher and "own base" not in teacher
    assert "/models/of-someone/model" not in " ".join(
        labeler_caveats("/models/of-someone/model", "/models/of-someone/model", "")
    )


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"judge": "http://localhost:8000|x"}, "an endpoint does not give"),
        ({"questions": "roule"}, "choose one of rule, splitter, statement"),
        ({"limit": -1}, "limit=-1"),
        (
            {"max_new_tokens": 0, "judge_batch_size": 0},
            "max_new_tokens, judge_batch_size: must be at least 1",
        ),
        ({"facts_prompt": "no-such.txt"}, "there is no prompt file"),
        ({"abstain_mass": 7}, "abstain_mass"),
        ({"judge_quantisation": "int3"}, "judge_quantisation='int3'.*none, nf4"),
        ({"splitter_quantisation": "int3"}, "splitter_quantisation='int3'.*none, nf4"),
        ({"judge": "local:org/model"}, "name the model without local:"),
    ],
)
def test_options_without_meaning_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        check_claims_options(replace(OPTIONS, **wrong))


def test_prompts_to_train_on_are_not_evaluated_on(tmp_path):
    rows = [Prompt(f"p{k}", "a.jpg", "", "What?", split="train") for k in range(12)]
    with pytest.raises(ValueError, match=r"none of 12 prompts is kept from training.* prompts.n_dev"):
        held_out_prompts(rows)
    write_table(tmp_path, "prompts", rows)
    with pytest.raises(ValueError, match="prompts.n_dev"):
        run_claims_benchmark(tmp_path / "out", POLICY, ADAPTERS, tmp_path, OPTIONS)
    assert not (tmp_path / "out").exists()


# the whole, with the packaged models


@pytest.fixture(scope="module")
def prompts():
    return resolve_path("packaged:example/prompts")


@pytest.fixture(scope="module")
def finished(prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("claims") / "whole"
    run_claims_benchmark(out, POLICY, ADAPTERS, prompts, OPTIONS, shard_size=2)
    return out


def bytes_of(out):
    """All tables of the benchmark and its stages."""
    paths = sorted(p for p in out.rglob("*.jsonl")) + [out / "table.md"]
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}


def test_the_whole_agrees_with_its_own_tables(finished):
    manifest = read_manifest(finished)
    assert manifest["rows_in"] == 4 == manifest["rows_out"] + sum(manifest["set_aside"].values())
    verdicts = read_table(finished / "feedback", "verdicts", Verdict)
    for k, name in enumerate(("base", "aligned")):
        own = [v.label for v in verdicts if v.claim_id.split("-")[1] == f"{k:02d}"]
        counts = manifest["counts"][name]
        assert (counts["accepted"], counts["rejected"]) == (own.count("yes"), own.count("no")) and counts[
            "answers"
        ] == 4
        assert len(read_answer_cases(finished, k)) == 4
    scores = {(s.model, s.metric): s for s in read_table(finished, "scores", Score)}
    counts = manifest["counts"]["base"]
    assert scores["base", "rejected"].value == pytest.approx(
        100 * counts["rejected"] / counts["judged"], abs=1e-3
    )
    text = (finished / "table.md").read_text()
    assert (
        "Labeler: packaged:iconworld-vlm" in text
        and "own base model" in text
        and "Four pictures are too few" in text
    )
    assert manifest["judged_by"] == "packaged:iconworld-vlm"


def test_the_same_bytes_again_and_stopped_anywhere(finished, prompts, tmp_path, monkeypatch):
    """Stopped within the second model's answers, and after the claims, it ends with the same bytes."""
    out = tmp_path / "stopped"
    answer = claims.answer_prompts
    seen = []

    def power_cut(vlm, k, *rest):
        if len(seen) == 3:
            raise RuntimeError("power cut")
        seen.append(k)
        return answer(vlm, k, *rest)

    monkeypatch.setattr(claims, "answer_prompts", power_cut)
    with pytest.raises(RuntimeError):
        run_claims_benchmark(out, POLICY, ADAPTERS, prompts, OPTIONS, shard_size=2)
    assert seen == [0, 0, 1] and len(shard_paths(out / "answers", "answers-1")) == 1
    monkeypatch.setattr(claims, "answer_prompts", answer)
    monkeypatch.setattr(claims, "check_answers", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_claims_benchmark(out, POLICY, ADAPTERS, prompts, OPTIONS, shard_size=2)
    monkeypatch.undo()
    run_claims_benchmark(out, POLICY, ADAPTERS, prompts, replace(OPTIONS, batch_size=1), shard_size=2)
    assert bytes_of(out) == bytes_of(finished)
    with pytest.raises(ValueError, match="started with other settings"):
        run_claims_benchmark(
            out, POLICY, ADAPTERS, prompts, replace(OPTIONS, max_new_tokens=61), shard_size=2
        )


def test_memory_that_runs_out_halves_the_batch(finished, prompts, tmp_path, monkeypatch, capsys):
    greedy = claims.greedy_answers

    def hungry(vlm, pictures, *rest):
        if len(pictures) > 1:
            raise MemoryError("no room")
        return greedy(vlm, pictures, *rest)

    monkeypatch.setattr(claims, "greedy_answers", hungry)
    run_claims_benchmark(tmp_path, POLICY, ADAPTERS, prompts, OPTIONS, shard_size=2)
    assert "out of memory with 2 at a time" in capsys.readouterr().out
    assert read_manifest(tmp_path / "answers")["batch_size"] == {"asked": 2, "used": 1}
    assert bytes_of(tmp_path)["scores-00000.jsonl"] == bytes_of(finished)["scores-00000.jsonl"]


def test_one_large_model_is_open_at_a_time_and_answers_come_first(prompts, tmp_path, monkeypatch):
    import gc
    import weakref

    from rlaifv_nb.engine import models

    opened, alive, real = [], [], models.open_weights

    def counting(auto_class, folder, *args, **kwargs):
        gc.collect()
        alive.append(sum(reference() is not None for reference in opened))
        found = real(auto_class, folder, *args, **kwargs)
        opened.append(weakref.ref(found))
        names.append(Path(folder).name)
        return found

    names = []
    monkeypatch.setattr(models, "open_weights", counting)
    run_claims_benchmark(tmp_path, POLICY, ADAPTERS, prompts, replace(OPTIONS, limit=1))
    assert names == ["iconworld-vlm", "iconworld-vlm", "iconworld-splitter", "iconworld-vlm"]
    assert alive == [0, 0, 0, 0]
    assert read_manifest(tmp_path)["rows_in"] == 1


def test_a_picture_that_cannot_be_read_is_counted_and_the_others_compared(prompts, tmp_path):
    folder = tmp_path / "prompts"
    shutil.copytree(prompts, folder)
    rows = held_out_prompts(read_table(folder, "prompts", Prompt))
    (folder / rows[0].image_path).write_bytes(b"")
    run_claims_benchmark(tmp_path / "out", POLICY, {}, folder, OPTIONS)
    manifest = read_manifest(tmp_path / "out")
    assert (
        manifest["rows_out"] == 3
        and sum(manifest["set_aside"].values()) == 1
        and manifest["conclusions"] == []
    )
    aside = json.loads(next((tmp_path / "out/answers").glob("set_aside-answers-0-*")).read_text())
    assert aside["reason"] == "unreadable picture" and read_table(tmp_path / "out", "scores", Score)


def test_when_nothing_can_be_compared_that_is_said(finished, tmp_path):
    """The adapter's answers were set aside one and all: no error at the end of a long run, and no figure."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "manifest.json").unlink()
    for path in shard_paths(out / "claims", "set_aside-claims"):
        lost = [
            SetAside(r.response_id, "facts cut") for r in read_table(out / "answers", "answers-1", Response)
        ]
        write_rows(path, lost)
    run_claims_benchmark(
        out, POLICY, ADAPTERS, resolve_path("packaged:example/prompts"), OPTIONS, shard_size=2
    )
    manifest = read_manifest(out)
    assert manifest["rows_out"] == 0 and manifest["conclusions"][0].startswith("Nothing can be said")
    assert "facts cut" in manifest["conclusions"][0] and not read_table(out, "scores", Score)


def changed_copy(finished, tmp_path, kind, name, value):
    """A copy of an evaluation that was made with something else."""
    out = tmp_path / f"other_{name}"
    shutil.copytree(finished, out)
    for file in ("started.json", "manifest.json"):
        content = json.loads((out / file).read_text())
        content[kind][name] = value
        (out / file).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("inputs", "splitter", "0"),
        ("inputs", "judge", "0"),
        ("parameters", "prompt_sha", "0"),
        ("parameters", "judge_quantisation", "nf4"),
        ("parameters", "judge_system_prompt", "Be strict."),
        ("parameters", "check_questions", False),
        ("parameters", "max_new_tokens", 61),
    ],
)
def test_whatever_decides_the_figures_is_part_of_the_setting(finished, prompts, tmp_path, kind, name, value):
    """A change is refused in the same folder, in a comparison, and stands in another table of the board."""
    other = changed_copy(finished, tmp_path, kind, name, value)
    with pytest.raises(ValueError, match=f"started with other settings.*{name}"):
        run_claims_benchmark(other, POLICY, ADAPTERS, prompts, OPTIONS)
    with pytest.raises(ValueError, match=f"do not measure the same.*{name}"):
        compare_folders(finished, other)
    shutil.copytree(finished, tmp_path / "first")
    entries, _ = find_entries(tmp_path)
    assert len(entries) == 4 and len({e.measured for e in entries}) == 2


def test_the_labeler_by_its_name_is_the_one_by_default(finished, prompts):
    run_claims_benchmark(finished, POLICY, ADAPTERS, prompts, replace(OPTIONS, judge=POLICY))
    assert read_manifest(finished)["parameters"]["judge"] == POLICY


def test_without_a_readable_picture_that_is_the_error(prompts, tmp_path):
    folder = tmp_path / "prompts"
    shutil.copytree(prompts, folder)
    for row in held_out_prompts(read_table(folder, "prompts", Prompt)):
        (folder / row.image_path).write_bytes(b"")
    with pytest.raises(ValueError, match="no picture of the 4 held-out prompts could be read"):
        run_claims_benchmark(tmp_path / "out", POLICY, {}, folder, OPTIONS)


# through the door


@pytest.mark.parametrize("adapters", ["base=x", "policy=y", "prompts=z", "a=b,a=c"])
def test_names_of_adapters_are_their_own(adapters):
    with pytest.raises(ValueError, match="choose another name"):
        parse_adapters(adapters)


def test_prompts_made_of_one_source_are_not_those_of_another(tmp_path):
    one = photographs(tmp_path / "one")
    two = photographs(tmp_path / "two")
    two.write_text(two.read_text().replace("Describe the image", "Describe this picture"))
    made = prompts_folder(str(one), tmp_path / "out")
    assert prompts_folder(str(one), tmp_path / "out") == made
    assert {p.split for p in read_table(made, "prompts", Prompt)} == {"test"}
    with pytest.raises(ValueError, match="source"):
        prompts_folder(str(two), tmp_path / "out")


def test_options_of_checking_without_a_splitter_are_refused():
    assert checking_options({"splitter": "", "limit": 2, "seed": 3}) is None
    assert checking_options({"splitter": "s", "judge": "j"}).judge == "j"
    with pytest.raises(ValueError, match="abstain_mass, judge: without a splitter"):
        checking_options({"splitter": "", "judge": "j", "abstain_mass": 0.2})


def photographs(folder):
    """Three pictures and a file of questions about them, of which nobody has trained on any."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for k in range(3):
        draw_picture(make_scene("test", k)).save(folder / f"pictures/{k}.png")
        rows.append({"image": f"pictures/{k}.png", "question": "Describe the image in detail."})
    write_rows(folder / "questions.jsonl", rows)
    return folder / "questions.jsonl"


def test_the_command_line_evaluates_on_pictures_of_ones_own_and_compares(tmp_path, capsys):
    questions = photographs(tmp_path / "mine")
    common = [
        "packaged:iconworld-vlm",
        "--bench",
        "claims",
        "--data",
        str(questions),
        "--max-new-tokens",
        "60",
    ]
    base, aligned = tmp_path / "boards/base", tmp_path / "boards/aligned"
    assert main(["evaluate", *common, "--out", str(base)]) == 0
    adapter = ["--adapter", "packaged:iconworld-aligned", "--compare", str(base)]
    assert main(["evaluate", *common, *adapter, "--out", str(aligned)]) == 0
    told = capsys.readouterr().out
    assert "Three pictures are too few to tell whether adapted is better or worse than base" in told
    assert "own base model" in told and "claims-1" in told
    rows = [json.loads(line) for line in next(aligned.glob("comparison-*")).read_text().splitlines()]
    differences = {r["metric"]: r for r in map(json.loads, open(aligned / "differences-00000.jsonl"))}
    for row in rows:
        assert row["difference"] == pytest.approx(differences[row["figure"]]["difference"], abs=1e-3), row
    assert main(["evaluate", *common, "--judge", "http://x|m", "--out", str(tmp_path / "never")]) == 2
    assert "an endpoint does not give" in capsys.readouterr().err
    entries, problems = find_entries(tmp_path / "boards")
    assert (
        sorted(e.name for e in entries) == ["aligned: adapted", "aligned: base", "base: base"]
        and not problems
    )


def test_a_published_benchmark_compares_all_models_of_a_run(tmp_path):
    write_miniature(tmp_path / "data", 6)
    out = tmp_path / "run/06_evaluation_amber"
    given = {"data": str(tmp_path / "data"), "limit": 4, "max_new_tokens": 40}
    run_evaluation(out, POLICY, "round_1=packaged:iconworld-aligned", bench="amber", **given)
    scores = read_table(out, "scores", Score)
    assert {s.model for s in scores} == {"base", "round_1"}
    alone = {s.metric: s.value for s in read_table(out / "round_1", "scores", Score)}
    assert {s.metric: s.value for s in scores if s.model == "round_1"} == alone
    assert "## round_1" in (out / "table.md").read_text() and list((out / "round_1").glob("comparison-base*"))
    entries, problems = find_entries(tmp_path)
    assert sorted(e.name for e in entries) == ["base", "round_1"] and not problems
    with pytest.raises(ValueError, match="holds several models.*/base"):
        compare_folders(out, out)
    changes = ({"max_new_tokens": 41}, {"seed": 1}, {"dtype": "float32"}, {"limit": 3})
    for change in changes:
        with pytest.raises(ValueError, match=f"started with other settings.*{next(iter(change))}"):
            run_evaluation(out, POLICY, "round_1=packaged:iconworld-aligned", bench="amber", **given | change)
    write_miniature(tmp_path / "other", 7)
    elsewhere = given | {"data": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="started with other settings.*data"):
        run_evaluation(out, POLICY, "round_1=packaged:iconworld-aligned", bench="amber", **elsewhere)


def test_all_models_of_a_published_benchmark_are_asked_as_the_adapter_was_trained(tmp_path):
    write_miniature(tmp_path / "data", 6)
    adapter = tmp_path / "adapter"
    shutil.copytree(resolve_path("packaged:iconworld-aligned"), adapter)
    lineage = adapter / "lineage.json"
    content = json.loads(lineage.read_text()) if lineage.exists() else {}
    lineage.write_text(json.dumps(content | {"asked": {"max_pixels": 12544}}))
    given = {"data": str(tmp_path / "data"), "limit": 2, "max_new_tokens": 20}
    out = tmp_path / "out"
    run_evaluation(out, POLICY, f"round_1={adapter}", bench="amber", **given)
    asked = [read_manifest(out / name)["parameters"]["max_pixels"] for name in ("base", "round_1")]
    assert asked == [12544, 12544]


def test_the_parameters_of_the_notebook_are_the_fields_of_an_evaluation():
    path = package_folder("nbs") / "06_evaluation.ipynb"
    defaults = parameter_defaults(path)
    fields = {f.name: f.default for f in dataclasses.fields(Evaluation)}
    assert set(defaults) == set(fields) | {"out"}
    for name in set(fields) - {"policy"}:
        assert fields[name] == defaults[name], name


# in a recipe


def recipe(**changes):
    return replace(load_recipe("smolvlm"), where="my.yaml", **changes)


def plan_of(**changes):
    return {s.out: s for s in plan_run(check_recipe(recipe(**changes), package_folder("nbs")))}


def test_each_benchmark_of_a_recipe_has_a_folder_of_its_own(tmp_path):
    amber = {"bench": "amber", "data": str(tmp_path), "limit": 100}
    official = amber | {"mode": "official"}
    steps = plan_of(evaluate=["iconworld", "claims", amber, official, "07_guided_decoding"])
    assert list(steps)[-5:] == [
        "06_evaluation",
        "06_evaluation_claims",
        "06_evaluation_amber",
        "06_evaluation_amber_official",
        "07_guided_decoding",
    ]
    assert "06_evaluation" in plan_of(evaluate=["06_evaluation"]), "the word of older recipes"
    parameters = steps["06_evaluation_amber"].parameters
    assert (parameters["bench"], parameters["limit"]) == ("amber", 100)


def test_claims_takes_models_and_ways_of_working_from_the_recipe():
    p = plan_of(evaluate=["claims"])["06_evaluation_claims"].parameters
    assert p["splitter"] == "Qwen/Qwen2.5-1.5B-Instruct" and p["judge"] == p["labeler"] == p["policy"]
    assert str(p["data"]) == "prompts" and p["splitter_quantisation"] == "nf4" and p["judge_batch_size"] == 4
    assert p["facts_prompt"] == "packaged:prompts/facts_fewshot.txt" and list(p["adapters"]) == [
        "round_1",
        "round_2",
    ]
    other = plan_of(evaluate=[{"bench": "claims", "judge": "org/judge"}])["06_evaluation_claims"].parameters
    assert (
        other["judge"] == "org/judge" and "judge_batch_size" not in other and other["labeler"] == p["policy"]
    )
    steps = plan_of(evaluate=[{"bench": "claims", "judge": "org/judge"}])
    wanted = {(m.name, m.is_vlm) for m in wanted_models([steps["06_evaluation_claims"]])}
    assert wanted == {("org/judge", True), (p["splitter"], False), (p["policy"], True)}


@pytest.mark.parametrize(
    "evaluate, says",
    [
        (["clams"], "did you mean claims"),
        (["claims", {"bench": "claims", "limit": 3}], "claims appears twice"),
        ([{"limit": 3}], "names no benchmark"),
        ([{"bench": "claims", "limits": 3}], "did you mean limit"),
        ([{"bench": "claims", "limit": "all"}], "limit must be a whole number"),
        ([{"bench": "claims", "n_scenes": 3}], "n_scenes: the benchmark claims does not use this"),
        ([{"bench": "claims", "policy": "x"}], "'policy' is set by the chain itself"),
        ([{"bench": "amber"}], "amber needs data"),
        ([{"bench": "mmhal", "data": "d"}], "needs a judge"),
    ],
)
def test_what_a_benchmark_cannot_obey_is_an_error_before_anything_runs(evaluate, says):
    with pytest.raises(RecipeError, match=says) as e:
        check_recipe(recipe(evaluate=evaluate), package_folder("nbs"))
    assert str(e.value).startswith("my.yaml, evaluate")


def test_what_claims_needs_is_missed_before_anything_runs(tmp_path):
    questions = photographs(tmp_path)
    given = {"source": str(questions), "n_per_round": 0}
    mine = recipe(prompts=given, rounds=1, parameters={"05_dpo": {"min_steps": 1}}, evaluate=["claims"])
    with pytest.raises(RecipeError, match="keeps none: set prompts.n_dev"):
        check_amounts(mine, package_folder("nbs"))
    check_amounts(replace(mine, prompts=given | {"n_dev": 1}), package_folder("nbs"))
    amber = replace(mine, evaluate=[{"bench": "amber", "data": str(tmp_path)}])
    with pytest.raises(RecipeError, match="evaluate: amber needs .*annotations.json"):
        check_amounts(amber, package_folder("nbs"))


def test_paths_in_evaluate_start_at_the_recipe(tmp_path):
    (tmp_path / "AMBER").mkdir()
    entry = {"bench": "amber", "data": "AMBER", "judge": "local:x"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"extends": "tiny", "evaluate": ["claims", entry]}))
    assert load_recipe(str(tmp_path / "my.yaml")).evaluate == [
        "claims",
        entry | {"data": str(tmp_path / "AMBER")},
    ]
    (tmp_path / "my.yaml").write_text(
        yaml.safe_dump({"extends": "tiny", "evaluate": [entry | {"data": "./no"}]})
    )
    with pytest.raises(RecipeError, match="evaluate: amber: data: there is no"):
        load_recipe(str(tmp_path / "my.yaml"))


def test_claims_checks_questions_as_the_recipe_does():
    mine = recipe(parameters={"02_claims": {"check_questions": False}})
    assert claims_parameters(mine, {})["check_questions"] is False
    assert "check_questions" not in claims_parameters(recipe(parameters={}), {})


def test_options_of_guided_decoding_in_evaluate_reach_its_step(tmp_path):
    steps = plan_of(evaluate=[{"bench": "07_guided_decoding", "n_candidates": 4}])
    assert steps["07_guided_decoding"].parameters["n_candidates"] == 4
    checked = check_recipe(
        recipe(evaluate=[{"bench": "07_guided_decoding", "limit": 3}]), package_folder("nbs")
    )
    assert checked.evaluate == [{"bench": "07_guided_decoding", "limit": 3}]
    with pytest.raises(RecipeError, match="n_candidates must be a whole number"):
        plan_of(evaluate=[{"bench": "07_guided_decoding", "n_candidates": "four"}])


@pytest.mark.parametrize("notebook, bench", [("06_evaluation", "claims"), ("07_guided_decoding", "")])
def test_another_judge_among_the_parameters_is_not_asked_as_the_labeler(notebook, bench):
    mine = recipe(
        prompts={"source": "dataset:org/pictures", "n_per_round": 40, "n_dev": 4},
        labeler_options={"system_prompt": "Look closely."},
        evaluate=[bench or notebook],
    )
    out = "06_evaluation_claims" if bench else notebook

    def step_of(judge):
        parameters = mine.parameters | {notebook: {"judge": judge} if judge is not None else {}}
        changed = check_recipe(replace(mine, parameters=parameters), package_folder("nbs"))
        return next(s for s in plan_run(changed) if s.out == out).parameters

    assert step_of(None)["judge_system_prompt"] == "Look closely."
    other = step_of("org/judge")
    assert other["judge"] == "org/judge"
    assert not {"judge_system_prompt", "judge_quantisation", "judge_batch_size"} & set(other)
    assert step_of("")["judge_system_prompt"] == "Look closely.", "an empty judge is the policy, the labeler"


def test_data_among_the_parameters_of_the_evaluation_counts_as_given(tmp_path):
    questions = photographs(tmp_path)
    given = {"source": str(questions), "n_per_round": 0}
    parameters = {"05_dpo": {"min_steps": 1}, "06_evaluation": {"data": str(tmp_path)}}
    amber = recipe(prompts=given, rounds=1, parameters=parameters, evaluate=["amber"])
    with pytest.raises(RecipeError, match="evaluate: amber needs .*annotations.json"):
        check_amounts(check_recipe(amber, package_folder("nbs")), package_folder("nbs"))
    check_amounts(
        check_recipe(replace(amber, evaluate=["claims"]), package_folder("nbs")), package_folder("nbs")
    )


def test_paths_among_the_parameters_of_evaluations_start_at_the_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "facts.txt").write_text("{question} {response}")
    own = {"judge": "./model", "facts_prompt": "./facts.txt"}
    parameters = {"06_evaluation": own | {"data": "model"}, "07_guided_decoding": own}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"extends": "smolvlm", "parameters": parameters}))
    absolute = {"judge": str(tmp_path / "model"), "facts_prompt": str(tmp_path / "facts.txt")}
    found = load_recipe(str(path)).parameters
    assert absolute | {"data": str(tmp_path / "model")} == found["06_evaluation"]
    assert absolute == found["07_guided_decoding"]
    parameters["06_evaluation"]["judge"] = "./no"
    path.write_text(yaml.safe_dump({"extends": "smolvlm", "parameters": parameters}))
    with pytest.raises(RecipeError, match="parameters.06_evaluation.judge: there is no .*no"):
        load_recipe(str(path))


def test_data_of_the_package_is_not_a_path(tmp_path):
    entry = {"bench": "claims", "data": "packaged:example/prompts"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"extends": "tiny", "evaluate": [entry]}))
    assert load_recipe(str(tmp_path / "my.yaml")).evaluate == [entry]


def test_a_parameter_that_no_listed_benchmark_uses_is_an_error():
    given = {"06_evaluation": {"num_beams": 3}}
    says = "my.yaml, parameters.06_evaluation: num_beams: no benchmark of `evaluate` uses this .claims."
    with pytest.raises(RecipeError, match=says):
        plan_of(parameters=given, evaluate=["claims"])
    plan_of(parameters=given, evaluate=["claims", {"bench": "amber", "data": "dataset:org/amber"}])
    plan_of(parameters={"06_evaluation": {"n_scenes": 3}}, evaluate=["claims"])


def test_from_names_a_benchmark_by_its_folder():
    steps = list(plan_of(evaluate=["iconworld", "claims"]).values())
    assert [s.out for s in steps[first_remade(steps, "06_evaluation_claims", 0) :]] == [
        "06_evaluation_claims"
    ]
    assert steps[first_remade(steps, "06_evaluation", 0)].out == "06_evaluation"
    assert restart_option(steps[-1]) == "--from 06_evaluation_claims"


# best of N, judged by a labeler


def test_each_distinct_candidate_is_checked_once_and_the_curve_counts_it(prompts, tmp_path):
    run_guided_decoding(
        prompts,
        tmp_path,
        POLICY,
        ADAPTERS["aligned"],
        n_candidates=4,
        max_new_tokens=60,
        held_out=True,
        limit=2,
        claims=replace(OPTIONS, judge_batch_size=1),
    )
    candidates, manifest = read_candidates(tmp_path), read_manifest(tmp_path)
    assert len({c.prompt_id for c in candidates}) == 2 and len(candidates) == 2 * 2 * 4
    texts = {(c.prompt_id, c.text) for c in candidates}
    answers = read_table(tmp_path / "checked/answers", "responses", Response)
    assert manifest["n_checked"] == len(texts) == len(answers)
    rejected = rejected_claims(tmp_path / "checked")
    assert set(rejected) <= texts and manifest["n_not_divided"] == len(texts) - len(rejected)
    rows = guidance_curve(candidates, lambda c: rejected.get((c.prompt_id, c.text)), factor=1)
    first = next(r for r in rows if (r["policy"], r["ranking"], r["n_candidates"]) == ("base", "random", 1))
    keys = [(c.prompt_id, c.text) for c in candidates if c.policy == "base"]
    own = [rejected[key] for key in keys if key in rejected]
    assert first["value"] == pytest.approx(sum(own) / len(own), abs=1e-3)


def test_a_candidate_that_was_not_divided_is_left_out_of_the_curve():
    some = [Candidate("base", f"p-{k:02d}", "p", text, "stop", 1, 0.0, 0.0) for k, text in enumerate("abcd")]
    known = {"a": 3, "b": 1, "c": None, "d": 0}
    rows = {
        (r["ranking"], r["n_candidates"]): r for r in guidance_curve(some, lambda c: known[c.text], factor=1)
    }
    assert rows["random", 1]["value"] == pytest.approx(4 / 3, abs=1e-3)


def test_best_of_n_of_photographs_asks_what_is_kept_from_training(tmp_path):
    questions = photographs(tmp_path)
    given = {"source": str(questions), "n_per_round": 0}
    mine = recipe(prompts=given, rounds=1, evaluate=["07_guided_decoding"])
    with pytest.raises(RecipeError, match="07_guided_decoding asks prompts that are kept from training"):
        check_amounts(replace(mine, parameters={"05_dpo": {"min_steps": 1}}), package_folder("nbs"))
    p = plan_run(check_recipe(replace(mine, prompts=given | {"n_dev": 1}), package_folder("nbs")))[
        -1
    ].parameters
    assert (str(p["prompts"]), p["held_out"], p["splitter"]) == (
        "prompts",
        True,
        "Qwen/Qwen2.5-1.5B-Instruct",
    )
    icons = plan_run(load_recipe("tiny"))[-1].parameters
    assert "splitter" not in icons and "prompts" not in icons, "drawn scenes have a truth"
