"""Memory that runs out in the middle of a stage: smaller batches, the same rows, nothing lost.

The language model raises torch.OutOfMemoryError, as a card would, whenever more than so many tokens go
through it at once."""

import inspect
import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from stages import POLICY, SPLITTER
from transformers.models.llama.modeling_llama import LlamaModel

from rlaifv_nb.benchmarks.answers import ModelAnswer, run_answers
from rlaifv_nb.benchmarks.iconworld import Case
from rlaifv_nb.benchmarks.protocol import Question
from rlaifv_nb.claims import ClaimsOptions, run_claims
from rlaifv_nb.dpo import DpoOptions, run_dpo
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.evaluation import run_evaluation
from rlaifv_nb.feedback import FeedbackOptions, PortionedAsker, run_feedback
from rlaifv_nb.guided_decoding import run_guided_decoding
from rlaifv_nb.records import (
    Candidate,
    Claim,
    Prompt,
    RefLogp,
    Response,
    Verdict,
    read_manifest,
    read_table,
    shard_paths,
)
from rlaifv_nb.sampling import SamplingOptions, run_sampling

ADAPTER = "packaged:iconworld-aligned"


def sample(inputs, out, shard_size, **sizes):
    run_sampling(
        inputs / "prompts",
        out,
        open_vlm(POLICY),
        options=SamplingOptions(n_samples=2, max_new_tokens=60, **sizes),
        shard_size=shard_size,
    )


def divide(inputs, out, shard_size, **sizes):
    run_claims(
        inputs / "prompts",
        inputs / "01_sampling",
        out,
        open_llm(SPLITTER),
        options=ClaimsOptions(**sizes),
        shard_size=shard_size,
    )


def judge(inputs, out, shard_size, **sizes):
    folders = (inputs / name for name in ("prompts", "01_sampling", "02_claims"))
    run_feedback(*folders, out, open_vlm(POLICY), options=FeedbackOptions(**sizes), shard_size=shard_size)


def evaluate(inputs, out, **sizes):
    run_evaluation(out, POLICY, f"aligned={ADAPTER}", n_scenes=12, max_new_tokens=60, **sizes)


def guide(inputs, out, **sizes):
    run_guided_decoding(inputs / "prompts", out, POLICY, ADAPTER, n_candidates=2, max_new_tokens=60, **sizes)


def answer(inputs, out, shard_size, **sizes):
    rows = read_table(inputs / "prompts", "prompts", Prompt)
    questions = [Question(row.prompt_id, row.image_path, row.question) for row in rows]
    pictures = inputs / "prompts"
    run_answers(questions, pictures, out, open_vlm(POLICY), max_new_tokens=60, shard_size=shard_size, **sizes)


# each stage as a function, a batch and a shard that make two shards or more, and its tables
STAGES = {
    "01_sampling": (sample, 8, 8, {"responses": Response}),
    "02_claims": (divide, 32, 64, {"claims": Claim}),
    "03_feedback": (judge, 8, 8, {"verdicts": Verdict}),
    "06_evaluation": (evaluate, 8, 8, {"cases-0": Case, "cases-1": Case}),
    "answers to a benchmark": (answer, 8, 8, {"answers": ModelAnswer}),
    "07_guided_decoding": (guide, 8, 8, {"candidates-base": Candidate, "candidates-aligned": Candidate}),
}


@contextmanager
def memory_for(limit):
    "Language models that run out of memory above `limit()` tokens; yields how many they were given."
    forward = LlamaModel.forward
    given = []

    def limited(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **kwargs,
    ):
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        given.append(tokens.shape[0] * tokens.shape[1])
        if given[-1] > limit():
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {given[-1]} tokens")
        others = (attention_mask, position_ids, past_key_values, inputs_embeds)
        return forward(self, input_ids, *others, **kwargs)

    limited.__signature__ = inspect.signature(forward)
    LlamaModel.forward = limited
    try:
        yield given
    finally:
        LlamaModel.forward = forward


def rows_of(out, tables):
    "All rows of a stage, in order."
    return [row for table, record in tables.items() for row in read_table(out, table, record)]


def same_rows(some, others):
    "Whether rows are equal: texts, counts and labels exactly, numbers within what a batch may change."
    assert len(some) == len(others) and some
    for one, other in zip(some, others):
        for name, value in vars(one).items():
            if isinstance(value, float):
                assert getattr(other, name) == pytest.approx(value, abs=2e-4), (one, other)
            else:
                assert getattr(other, name) == value, (one, other)
    return True


@pytest.fixture(scope="module")
def plenty(undisturbed, tmp_path_factory):
    "Each stage with all the memory it wants: its folder, and the most tokens that a model got at once."
    found = {}

    def run(stage):
        if stage not in found:
            function, batch_size, shard_size, _ = STAGES[stage]
            out = tmp_path_factory.mktemp(stage) / "plenty"
            with memory_for(lambda: 10**9) as given:
                function(undisturbed, out, batch_size=batch_size, shard_size=shard_size)
            found[stage] = out, max(given)
        return found[stage]

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_does_not_fit_is_halved(stage, plenty, undisturbed, tmp_path, capsys):
    function, batch_size, shard_size, tables = STAGES[stage]
    whole, most = plenty(stage)
    with memory_for(lambda: most - 1) as given:
        function(undisturbed, tmp_path, batch_size=batch_size, shard_size=shard_size)
    assert max(given) == most, "memory did run out"
    assert "out of memory with" in capsys.readouterr().out
    assert same_rows(rows_of(whole, tables), rows_of(tmp_path, tables))
    before, after = read_manifest(whole), read_manifest(tmp_path)
    assert before["batch_size"] == {"asked": batch_size, "used": batch_size}
    assert after["batch_size"]["asked"] == batch_size and after["batch_size"]["used"] <= batch_size // 2, (
        stage
    )
    for key in ("parameters", "inputs", "rows_in", "rows_out"):
        assert before[key] == after[key], "the batch size is not part of the identity"


@pytest.mark.parametrize("stage", STAGES)
def test_finished_shards_stay_when_nothing_fits_any_more(stage, plenty, undisturbed, tmp_path):
    function, batch_size, shard_size, tables = STAGES[stage]
    whole, _ = plenty(stage)
    first = next(iter(tables))

    def limit():
        return 0 if shard_paths(tmp_path, first) else 10**9

    with (
        memory_for(limit),
        pytest.raises(MemoryError, match="not enough memory (for a single|for one text|even for one)"),
    ):
        function(undisturbed, tmp_path, batch_size=batch_size, shard_size=shard_size)
    assert not (tmp_path / "manifest.json").exists()
    finished = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob(f"*{first}-*.jsonl")}
    assert len(shard_paths(tmp_path, first)) == 1
    function(undisturbed, tmp_path, batch_size=batch_size // 4, shard_size=shard_size)  # not refused
    assert all((p.stat().st_mtime_ns, p.read_bytes()) == kept for p, kept in finished.items())
    assert same_rows(rows_of(whole, tables), rows_of(tmp_path, tables))
    assert read_manifest(tmp_path)["batch_size"] == {"asked": batch_size // 4, "used": batch_size // 4}


def test_questions_about_one_picture_go_through_in_portions(plenty, undisturbed, tmp_path, capsys):
    whole, _ = plenty("03_feedback")
    with memory_for(lambda: 10**9) as given:
        judge(undisturbed, tmp_path / "one", batch_size=1, shard_size=8)
    # a single picture's questions do not fit, and its batch cannot be halved any more: fewer tokens at a time
    with memory_for(lambda: max(given) // 2) as limited:
        judge(undisturbed, tmp_path / "portions", batch_size=1, shard_size=8)
    assert max(limited) > max(given) // 2
    manifest = read_manifest(tmp_path / "portions")
    assert manifest["batch_size"] == {"asked": 1, "used": 1}
    assert manifest["max_tokens"]["asked"] == 16384 > manifest["max_tokens"]["used"] >= 64
    assert "one picture's questions: going on with" in capsys.readouterr().out
    tables = {"verdicts": Verdict}
    assert same_rows(rows_of(whole, tables), rows_of(tmp_path / "portions", tables))


def test_another_error_is_not_taken_for_memory(undisturbed, tmp_path):
    vlm = open_vlm(POLICY)
    asker = PortionedAsker(vlm, 4096)

    def fails(pictures, questions):
        raise RuntimeError("CUDA error: device-side assert triggered")

    asker.ask = fails
    with pytest.raises(RuntimeError, match="device-side assert"):
        asker([None], [["Is it?"]])
    assert asker.max_tokens == 4096


# 05: a row holds several pairs, so it is `max_tokens` that becomes less; the batch of the optimiser stays


def train(inputs, out, **sizes):
    training = dict(learning_rate=5e-4, epochs=1.0, batch_size=2, evaluations=1, min_steps=1)
    policy = partial(open_vlm, POLICY, quantisation="nf4")
    run_dpo(inputs / "prompts", inputs / "04_pairs", out, policy, options=DpoOptions(**training, **sizes))


def has_reference(out, rows):
    "Whether the reference of all pairs is written: training begins."
    paths = shard_paths(out, "reference")
    return bool(paths) and len(read_table(out, "reference", RefLogp)) == rows


@pytest.fixture(scope="module")
def trained(undisturbed, tmp_path_factory):
    "05_dpo with all the memory it wants: its folder, its pairs, the most tokens in reference and training."
    out = tmp_path_factory.mktemp("05_dpo") / "plenty"
    sizes = {True: [], False: []}
    n_pairs = read_manifest(undisturbed / "05_dpo")["rows_out"]

    def limit():
        sizes[has_reference(out, n_pairs)].append(len(given))
        return 10**9

    with memory_for(limit) as given:
        train(undisturbed, out)
    began = sizes[True][0] - 1
    return out, n_pairs, max(given[:began]), max(given[began:])


def same_training(some, others):
    "Whether two runs of 05_dpo have the same reference and, but for the order of sums, the same curve."
    assert same_rows(read_table(some, "reference", RefLogp), read_table(others, "reference", RefLogp))
    texts = [(out / "training-00000.jsonl").read_text() for out in (some, others)]
    curves = [[json.loads(line) for line in text.splitlines()] for text in texts]
    places = [[(row["step"], row["split"]) for row in curve] for curve in curves]
    losses = [[row["loss"] for row in curve] for curve in curves]
    assert places[0] == places[1] and losses[0] == pytest.approx(losses[1], abs=0.01)
    keys = ("parameters", "inputs", "rows_in", "rows_out", "train_pairs", "dev_pairs")
    assert {k: read_manifest(some)[k] for k in keys} == {k: read_manifest(others)[k] for k in keys}
    return True


@pytest.mark.parametrize("phase", ["reference", "training"])
def test_a_step_that_does_not_fit_goes_in_smaller_parts(phase, trained, undisturbed, tmp_path, capsys):
    whole, n_pairs, reference, step = trained

    def limit():
        return step - 1 if has_reference(tmp_path, n_pairs) else reference - (phase == "reference")

    with memory_for(limit) as given:
        train(undisturbed, tmp_path)
    assert "out of memory: going on with max_tokens" in capsys.readouterr().out
    assert max(given) == reference
    found = read_manifest(tmp_path)["max_tokens"]
    assert found["asked"] == 8192 == read_manifest(whole)["max_tokens"]["used"] and found["used"] < reference
    assert same_training(whole, tmp_path)


def test_a_reference_stays_when_nothing_fits_any_more(trained, undisturbed, tmp_path):
    whole, _, _, _ = trained

    def limit():
        return 0 if shard_paths(tmp_path, "reference") else 10**9

    with memory_for(limit), pytest.raises(RuntimeError, match="does not fit into memory even alone"):
        train(undisturbed, tmp_path)
    finished = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("*reference-*.jsonl")}
    assert len(shard_paths(tmp_path, "reference")) == 1 and not (tmp_path / "manifest.json").exists()
    train(undisturbed, tmp_path, max_tokens=512)  # not refused
    assert all((p.stat().st_mtime_ns, p.read_bytes()) == kept for p, kept in finished.items())
    assert read_manifest(tmp_path)["max_tokens"] == {"asked": 512, "used": 512}
    assert same_training(whole, tmp_path)


def test_a_batch_larger_than_a_shard_is_refused(undisturbed, tmp_path):
    with pytest.raises(ValueError, match="batch_size=9 is more than a shard holds: choose at most 8"):
        guide(undisturbed, tmp_path, batch_size=9, shard_size=8)
