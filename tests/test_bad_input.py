"""Bad input gets one clear message that names the row or the key; the rest of the work goes on, and
nothing done is lost."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stages import POLICY, run_stage

from rlaifv_nb.records import Claim, Pair, Prompt, Response, SetAside, read_manifest, read_table, write_table


@pytest.fixture
def run(undisturbed, tmp_path):
    "A copy of the small run, to break."
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def rerun(run, stage, tmp_path):
    "Runs a stage on the broken inputs into a fresh folder; returns the folder and its manifest."
    out = tmp_path / "out"
    run_stage(stage, run, out)
    return out, read_manifest(out)


def set_aside(out, table):
    return {s.row_id: s for s in read_table(out, f"set_aside-{table}", SetAside)}


def test_truncated_picture_is_set_aside_with_its_prompt_and_the_rest_goes_on(run, tmp_path):
    prompts = read_table(run / "prompts", "prompts", Prompt)
    picture = run / "prompts" / prompts[1].image_path
    picture.write_bytes(picture.read_bytes()[:500])
    out, manifest = rerun(run, "01_sampling", tmp_path)
    assert set_aside(out, "responses")[prompts[1].prompt_id].reason == "unreadable picture"
    assert picture.name in set_aside(out, "responses")[prompts[1].prompt_id].detail
    assert {r.prompt_id for r in read_table(out, "responses", Response)} == {p.prompt_id for p in prompts} - {
        prompts[1].prompt_id
    }
    assert manifest["set_aside"] == {"unreadable picture": 6}


def test_truncated_picture_in_feedback(run, tmp_path):
    prompts = read_table(run / "prompts", "prompts", Prompt)
    (run / "prompts" / prompts[0].image_path).write_bytes(b"")
    _, manifest = rerun(run, "03_feedback", tmp_path)
    about_it = [
        c
        for c in read_table(run / "02_claims", "claims", Claim)
        if c.response_id.startswith(prompts[0].prompt_id)
    ]
    assert manifest["set_aside"] == {"unreadable picture": len(about_it)} and about_it


def test_empty_response_is_set_aside_and_counted(run, tmp_path):
    rows = read_table(run / "01_sampling", "responses", Response)
    write_table(run / "01_sampling", "responses", [replace(rows[0], text="  "), *rows[1:]])
    out, manifest = rerun(run, "02_claims", tmp_path)
    assert set_aside(out, "claims")[rows[0].response_id].reason == "empty response" and manifest[
        "set_aside"
    ] == {"empty response": 1}


def test_response_without_claims_is_kept_and_counted_and_never_chosen(run, tmp_path):
    rows = read_table(run / "01_sampling", "responses", Response)
    for shard in (run / "01_sampling").glob("responses-*"):
        shard.unlink()
    write_table(
        run / "01_sampling", "responses", [replace(rows[0], text="It is a lovely picture."), *rows[1:]]
    )
    out, manifest = rerun(run, "02_claims", tmp_path)
    assert manifest["without_claims"] == 1 and not manifest["set_aside"]
    assert not [c for c in read_table(out, "claims", Claim) if c.response_id == rows[0].response_id]
    shutil.copytree(out, run / "02_claims", dirs_exist_ok=True)
    run_stage("03_feedback", run, tmp_path / "feedback")
    shutil.rmtree(run / "03_feedback")
    shutil.move(tmp_path / "feedback", run / "03_feedback")
    run_stage("04_pairs", run, tmp_path / "pairs")
    assert rows[0].response_id not in {p.chosen_id for p in read_table(tmp_path / "pairs", "pairs", Pair)}
    assert read_manifest(tmp_path / "pairs")["set_aside"]["no claims"] == 1


def test_equal_pair_and_special_token_are_set_aside_before_training(run, tmp_path):
    pairs = read_table(run / "04_pairs", "pairs", Pair)
    broken = [
        replace(pairs[0], pair_id="same", rejected=pairs[0].chosen),
        replace(pairs[0], pair_id="token", chosen="A <image> cat."),
    ]
    write_table(run / "04_pairs", "pairs", pairs + broken)
    out, manifest = rerun(run, "05_dpo", tmp_path)
    assert (
        manifest["set_aside"] == {"no training row": 2}
        and (out / "adapter" / "adapter_model.safetensors").exists()
    )


def test_adapter_of_another_base_is_refused_by_name(run):
    from rlaifv_nb.engine.models import open_vlm

    lineage = run / "05_dpo" / "adapter" / "lineage.json"
    lineage.write_text(lineage.read_text().replace('"base_sha": "', '"base_sha": "0'))
    with pytest.raises(ValueError, match="was trained on another base"):
        open_vlm(POLICY, str(run / "05_dpo" / "adapter"))


def test_full_disk_keeps_what_is_done(run, tmp_path, monkeypatch):
    import errno

    import rlaifv_nb.records as records

    real, calls = records.os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    monkeypatch.setattr(records.os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is full: free some space and start again"):
        run_stage("03_feedback", run, tmp_path / "out")
    done = {p.name for p in (tmp_path / "out").glob("verdicts-*")}
    assert done and not list((tmp_path / "out").glob(".*.tmp"))
    monkeypatch.undo()
    run_stage("03_feedback", run, tmp_path / "out")
    assert all(
        (tmp_path / "out" / p.name).read_bytes() == p.read_bytes()
        for p in Path(run / "03_feedback").glob("verdicts-*")
    )
