"""The whole tiny chain as it runs on a card, in bfloat16 on NF4 weights: by functions, and by notebooks."""

import json
from functools import partial

import numpy as np
import pytest
from safetensors.torch import load_file

from rlaifv_nb.benchmarks.iconworld import read_cases
from rlaifv_nb.claims import run_claims
from rlaifv_nb.dpo import DpoOptions, run_dpo
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.evaluation import run_evaluation
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.guided_decoding import read_candidates, reward_of, run_guided_decoding
from rlaifv_nb.iconworld.world import write_prompts
from rlaifv_nb.pairs import run_pairs
from rlaifv_nb.records import Pair, RefLogp, Score, Verdict, package_folder, read_manifest, read_table
from rlaifv_nb.runner.chain import run_chain
from rlaifv_nb.runner.recipes import check_recipe, load_recipe
from rlaifv_nb.sampling import SamplingOptions, run_sampling

POLICY = "packaged:iconworld-vlm"
SPLITTER = "packaged:iconworld-splitter"
ADAPTER = "packaged:iconworld-aligned"
HALF = {"dtype": "bfloat16", "quantisation": "nf4"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Stages 01 to 05 on fourteen pictures, in bfloat16 and NF4."
    at = tmp_path_factory.mktemp("half")
    write_prompts(at / "prompts", {"train": 10, "dev": 4})
    vlm = open_vlm(POLICY, **HALF)
    run_sampling(at / "prompts", at / "01", vlm, options=SamplingOptions(n_samples=6, max_new_tokens=80))
    run_claims(at / "prompts", at / "01", at / "02", open_llm(SPLITTER, **HALF))
    run_feedback(at / "prompts", at / "01", at / "02", at / "03", vlm)
    run_pairs(at / "prompts", at / "01", at / "02", at / "03", at / "04")
    run_dpo(
        at / "prompts",
        at / "04",
        at / "05",
        partial(open_vlm, POLICY, **HALF),
        options=DpoOptions(learning_rate=5e-4, epochs=2.0, batch_size=4, evaluations=2, min_steps=1),
    )
    return at


def test_every_stage_runs_as_it_was_asked(run):
    for stage in ("01", "02", "03", "05"):
        manifest = read_manifest(run / stage)
        assert {key: manifest["parameters"][key] for key in HALF} == HALF, stage
        assert manifest["parameters"]["sharing"] == "", "branches share their prompt in 16 bits, too"
        assert manifest["rows_out"] > 0
    assert read_manifest(run / "03")["warnings"] == [] and read_manifest(run / "03")["set_aside"] == {}


def test_verdicts_in_16_bits_are_those_of_32(run, tmp_path):
    """The same claims judged in float32 without quantisation: hardly a verdict differs."""
    half = run_feedback(
        run / "prompts", run / "01", run / "02", tmp_path / "again", open_vlm(POLICY, **HALF)
    ).read("verdicts", Verdict)
    whole = run_feedback(run / "prompts", run / "01", run / "02", tmp_path / "whole", open_vlm(POLICY)).read(
        "verdicts", Verdict
    )
    flips = np.array([a.label != b.label for a, b in zip(half, whole)])
    difference = np.array([abs(a.p_yes - b.p_yes) for a, b in zip(half, whole)])
    assert len(half) > 300 and [v.claim_id for v in half] == [v.claim_id for v in whole]
    assert flips.mean() < 0.02 and difference.mean() < 0.01, (flips.mean(), difference.mean())
    assert difference.max() > 0, "16 bits on 4-bit weights cannot give the same numbers"


def test_training_starts_where_the_reference_is_and_moves(run):
    manifest = read_manifest(run / "05")
    drift = manifest["preflight"]["drift_nats_per_token"]
    assert drift < 0.02, "the reference in 16 bits is the policy but for rounding"
    assert manifest["preflight"]["image_effect_nats"] > 0.1
    weights = load_file(run / "05" / "adapter" / "adapter_model.safetensors")
    moved = [w.abs().max().item() for name, w in weights.items() if "lora_B" in name]
    assert len(moved) == 4 * 7 and min(moved) > 0 and all(w.isfinite().all() for w in weights.values())
    n_pairs = len(read_table(run / "04", "pairs", Pair))
    assert len(read_table(run / "05", "reference", RefLogp)) == manifest["rows_out"] <= n_pairs
    curve = [json.loads(line) for line in (run / "05" / "training-00000.jsonl").read_text().splitlines()]
    assert all(np.isfinite([row["loss"], row["margin"]]).all() for row in curve)
    train = [row["margin"] for row in curve if row["split"] == "train"]
    assert train[-1] > train[0] and abs(train[0]) < 0.5, "the margin begins near zero and grows"


def test_evaluation_in_16_bits(run, tmp_path):
    adapters = f"aligned={run / '05' / 'adapter'}"
    run_evaluation(tmp_path, POLICY, adapters, n_scenes=10, max_new_tokens=80, **HALF)
    scores = {(s.model, s.metric): s.value for s in read_table(tmp_path, "scores", Score)}
    assert {model for model, _ in scores} == {"base", "aligned"} and all(np.isfinite(list(scores.values())))
    accuracy = min(scores[model, "accuracy"] for model in ("base", "aligned"))
    assert accuracy > 80, "short answers survive 16 bits and 4-bit weights"
    assert all(len(read_cases(tmp_path, k)) == 10 for k in (0, 1))
    assert read_manifest(tmp_path)["parameters"]["quantisation"] == "nf4"


def score(run, out, **options):
    "Rewards of the responses of 01 under the packaged adapter."
    run_guided_decoding(run / "prompts", out, POLICY, ADAPTER, responses=run / "01", **options)


def test_rewards_in_16_bits(run, tmp_path):
    """Scored answers: the sum of a reward is noisy in 16 bits, its signed mean over all tokens is not."""
    for name, options in (("half", HALF), ("whole", {})):
        score(run, tmp_path / name, **options)
    half, whole = ({c.response_id: c for c in read_candidates(tmp_path / name)} for name in ("half", "whole"))
    assert half.keys() == whole.keys() and len(half) == read_manifest(run / "01")["rows_out"]
    n_tokens = sum(c.n_tokens for c in half.values())
    for side in ("policy_sum_logp", "reference_sum_logp"):
        drift = sum(getattr(half[i], side) - getattr(whole[i], side) for i in half) / n_tokens
        assert abs(drift) < 0.02, (side, drift)
    rewards = np.array([[reward_of(found[i], "reward_mean", 1.0) for i in half] for found in (half, whole)])
    assert np.corrcoef(rewards.argsort().argsort())[0, 1] > 0.9, "candidates keep their order"


def test_scores_in_16_bits_hardly_depend_on_the_batch(run, tmp_path):
    """Measured: 2e-4 nats per token as a signed mean, 4e-3 for the worst answer (3e-7 in float32)."""
    for name, batch_size in (("one", 1), ("many", 14)):
        score(run, tmp_path / name, batch_size=batch_size, **HALF)
    one, many = (read_candidates(tmp_path / name) for name in ("one", "many"))
    n_tokens = np.array([c.n_tokens for c in one])
    rewards = np.array([[reward_of(c, "reward_sum", 1.0) for c in found] for found in (one, many)])
    moved = rewards[0] - rewards[1]
    assert [c.response_id for c in one] == [c.response_id for c in many]
    assert abs(moved.sum() / n_tokens.sum()) < 2e-3, "noise averages out over many tokens"
    assert abs(moved / n_tokens).max() < 0.03


def test_sampled_candidates_in_16_bits(run, tmp_path):
    write_prompts(tmp_path / "prompts", {"test": 3})
    adapter = str(run / "05" / "adapter")
    run_guided_decoding(
        tmp_path / "prompts", tmp_path / "out", POLICY, adapter, n_candidates=4, max_new_tokens=60, **HALF
    )
    candidates = read_candidates(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rows_in"] == 24 == len(candidates) + sum(manifest["set_aside"].values())
    assert len(candidates) > 20
    assert any(abs(c.policy_sum_logp - c.reference_sum_logp) > 0.01 for c in candidates)


def test_the_notebooks_programs_in_16_bits(tmp_path):
    """One round of the tiny recipe through papermill, with every model in bfloat16 and NF4."""
    own = {
        "01_sampling": {"n_samples": 6, "max_new_tokens": 80},
        "02_claims": {},
        "03_feedback": {},
        "05_dpo": {"epochs": 1.0, "batch_size": 4, "min_steps": 1},
        "06_evaluation": {"n_scenes": 6},
        "07_guided_decoding": {"n_scenes": 2, "n_candidates": 2},
    }
    recipe = load_recipe(
        "tiny",
        {
            "rounds": 1,
            "prompts": {"n_per_round": 14, "n_dev": 4},
            "parameters": {stage: HALF | options for stage, options in own.items()},
        },
    )
    notebooks = package_folder("nbs")
    run_chain(check_recipe(recipe, notebooks), tmp_path / "run", notebooks)
    folders = [f"round_1/{stage}" for stage in ("01_sampling", "02_claims", "03_feedback", "05_dpo")]
    for folder in (*folders, "06_evaluation", "07_guided_decoding"):
        parameters = read_manifest(tmp_path / "run" / folder)["parameters"]
        assert {key: parameters[key] for key in HALF} == HALF, folder
    assert (tmp_path / "run" / "manifest.json").exists()
