"""Layouts and caches change how fast 05_dpo is and nothing else; a cache never answers for another model,
adapter or text."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import rlaifv_nb.dpo as dpo
from rlaifv_nb.dpo import DpoOptions, RowMaker, reference_logps, run_dpo
from rlaifv_nb.engine.caches import ContentCache, layout_problem
from rlaifv_nb.engine.models import open_vlm
from rlaifv_nb.records import Pair, Prompt, RefLogp, read_manifest, read_table, resolve_path

POLICY, PROMPTS, PAIRS = (
    "packaged:iconworld-vlm",
    resolve_path("packaged:example/prompts"),
    resolve_path("packaged:example/04_pairs"),
)
SETTING = dict(learning_rate=5e-4, epochs=1.0, batch_size=6, evaluations=2, min_steps=1)


def curves(folder):
    "The training table."
    return [json.loads(line) for line in open(folder / "training-00000.jsonl")]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A small training with the defaults: packed rows, cached features."
    folder = tmp_path_factory.mktemp("packed")
    run_dpo(PROMPTS, PAIRS, folder, partial(open_vlm, POLICY), options=DpoOptions(**SETTING))
    return folder


def test_the_manifest_says_what_was_used(packed):
    assert read_manifest(packed)["engine"] == {
        "layout": "packed",
        "kernel": "sdpa",
        "image_features": "cached",
        "not_cached": 0,
    }
    assert not (packed / "cache").exists(), "the stage's own cache goes with its end"


def test_cached_or_not_is_byte_identical(packed, tmp_path):
    for name, options in (
        ("uncached", {"cache_gb": 0}),
        ("tight", {"cache_gb": 1e-4}),
        ("shared", {"cache": str(tmp_path / "cache")}),
        ("again", {"cache": str(tmp_path / "cache")}),
    ):
        run_dpo(
            PROMPTS,
            PAIRS,
            tmp_path / name,
            partial(open_vlm, POLICY),
            options=DpoOptions(**SETTING, **options),
        )
        for file in ("training-00000.jsonl", "reference-00000.jsonl", "adapter/adapter_model.safetensors"):
            assert (packed / file).read_bytes() == (tmp_path / name / file).read_bytes(), (name, file)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"features", "reference"}
    assert read_manifest(tmp_path / "tight")["engine"]["not_cached"] > 0


@pytest.mark.parametrize("options", [{"layout": "plain"}, {"layout": "shared"}, {"max_tokens": 500}])
def test_every_layout_learns_the_same(packed, tmp_path, options):
    run_dpo(PROMPTS, PAIRS, tmp_path, partial(open_vlm, POLICY), options=DpoOptions(**SETTING, **options))
    assert read_manifest(tmp_path)["engine"]["layout"] == options.get("layout", "packed")
    for a, b in zip(curves(packed), curves(tmp_path), strict=True):
        assert (
            a["step"] == b["step"]
            and a["loss"] == pytest.approx(b["loss"], abs=2e-3)
            and a["margin"] == pytest.approx(b["margin"], abs=0.05)
        )


def test_a_layout_that_does_not_fit_falls_back(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "layout_problem", lambda *args: "it looks both ways")
    run_dpo(PROMPTS, PAIRS, tmp_path, partial(open_vlm, POLICY), options=DpoOptions(**SETTING))
    assert read_manifest(tmp_path)["engine"] == {
        "layout": "plain",
        "layout_problem": "it looks both ways",
        "image_features": "cached",
        "not_cached": 0,
    }


def test_a_wrong_layout_is_noticed(monkeypatch):
    vlm, pairs = open_vlm(POLICY), read_table(PAIRS, "pairs", Pair)
    row = RowMaker(vlm, {p.prompt_id: p for p in read_table(PROMPTS, "prompts", Prompt)}, PROMPTS).row(
        pairs[0]
    )
    assert layout_problem(vlm.core, row, "shared") == ""
    monkeypatch.setattr(
        "rlaifv_nb.engine.packing.branch_mask",
        lambda segments: torch.ones(
            len(segments), 1, segments.shape[1], segments.shape[1], dtype=torch.bool
        ).tril(),
    )
    assert "other log-probabilities in the layout shared" in layout_problem(vlm.core, row, "shared")


@pytest.mark.parametrize("options", [{"layout": "diagonal"}, {"kernel": "magic"}])
def test_unknown_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match="is not supported: choose one of"):
        run_dpo(PROMPTS, PAIRS, tmp_path, partial(open_vlm, POLICY), options=DpoOptions(**SETTING, **options))


def test_a_reference_is_known_by_all_that_decides_it(tmp_path):
    vlm = open_vlm(POLICY)
    prompts = {p.prompt_id: p for p in read_table(PROMPTS, "prompts", Prompt)}
    pair = read_table(PAIRS, "pairs", Pair)[0]
    maker = RowMaker(vlm, prompts, PROMPTS)
    computed = []
    counting = replace(maker)
    counting.prepared = lambda p: computed.append(p.pair_id) or maker.prepared(p)

    def ask(pair, maker=counting):
        found = reference_logps(maker, [pair], ContentCache(tmp_path, 1))[0]
        n, _ = len(computed), computed.clear()
        return found, n

    first, n = ask(pair)
    assert isinstance(first, RefLogp) and n == 1 and ask(pair) == (first, 0)
    assert ask(replace(pair, pair_id="other"))[1] == 0, "an id decides nothing"
    assert ask(replace(pair, chosen=pair.rejected, rejected=pair.chosen))[1] == 1, "other texts"
    vlm.adapter_sha = "another adapter"
    assert ask(pair)[1] == 1, "another adapter"
    vlm.model.to(torch.bfloat16)
    assert ask(pair)[1] == 1, "another dtype"
    vlm.sha = "another model"
    assert ask(pair)[1] == 1
