"""05_dpo as it runs beside a graphics card: two devices, 16 bits, several cards, too little memory, too
few steps. All on a CPU."""

import gc
import json
import re
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from device_tags import CARD, CPU, DeviceTags, pinned
from safetensors.torch import load_file

import rlaifv_nb.dpo as dpo
import rlaifv_nb.engine.attention as attention
from rlaifv_nb.dpo import (
    DpoOptions,
    RowMaker,
    drift_of,
    preflight,
    reference_logps,
    require_enough,
    require_steps,
    run_dpo,
    split_pairs,
    steps_of,
    tenth_of,
)
from rlaifv_nb.engine.attention import kernel_for
from rlaifv_nb.engine.caches import ContentCache
from rlaifv_nb.engine.models import open_vlm
from rlaifv_nb.records import (
    Pair,
    Prompt,
    RefLogp,
    read_manifest,
    read_table,
    resolve_path,
    sha256_of,
    write_table,
)

POLICY, PROMPTS, PAIRS = (
    "packaged:iconworld-vlm",
    resolve_path("packaged:example/prompts"),
    resolve_path("packaged:example/04_pairs"),
)
SETTING = dict(learning_rate=5e-4, epochs=1.0, batch_size=4, evaluations=2, min_steps=1)
RESULTS = ("training-00000.jsonl", "reference-00000.jsonl", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    "Folders with few prompts and pairs: pictures of their own, 12 pairs for training, 4 held out."
    home = tmp_path_factory.mktemp("few")
    by_id = {p.prompt_id: p for p in read_table(PROMPTS, "prompts", Prompt)}
    pairs = read_table(PAIRS, "pairs", Pair)
    train = [p for p in pairs if by_id[p.prompt_id].split != "dev"][:12]
    dev = [p for p in pairs if by_id[p.prompt_id].split == "dev"][:4]
    used = list({p.prompt_id: by_id[p.prompt_id] for p in train + dev}.values())
    for prompt in used:
        place = home / "prompts" / prompt.image_path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(PROMPTS) / prompt.image_path, place)
    write_table(home / "prompts", "prompts", used)
    write_table(home / "pairs", "pairs", train + dev)
    return home


def train(few, out, adapter="", open_policy=None, **given):
    """`run_dpo` on the few pairs; returns its manifest. What is not an option of training is one of opening
    the policy."""
    names = {f.name for f in fields(DpoOptions)}
    options = SETTING | {k: v for k, v in given.items() if k in names}
    opening = {k: v for k, v in given.items() if k not in names}
    open_policy = open_policy or partial(open_vlm, POLICY, adapter, **opening)
    run_dpo(few / "prompts", few / "pairs", out, open_policy, options=DpoOptions(**options))
    return read_manifest(out)


def results(folder):
    "What must be the same bytes."
    return {name: (folder / name).read_bytes() for name in RESULTS}


def tables(folder):
    "Prompts by id, and pairs."
    return {p.prompt_id: p for p in read_table(folder / "prompts", "prompts", Prompt)}, read_table(
        folder / "pairs", "pairs", Pair
    )


def curve(folder, split):
    "Rows of the training table."
    return [row for row in map(json.loads, open(folder / "training-00000.jsonl")) if row["split"] == split]


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    "A training with nothing special about it."
    out = tmp_path_factory.mktemp("plain")
    train(few, out)
    return out


# two devices


@pytest.fixture
def card(monkeypatch):
    """A card that is not there: policies are opened on it, the trainer takes it for its device, and batches
    are pinned."""
    tags, open_plain, collate = DeviceTags(), open_vlm, dpo.PairDataset.collate

    def opened(*args, **kwargs):
        vlm = open_plain(*args, **kwargs)
        tags.put(vlm.model)
        return vlm

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(sys.modules[__name__], "open_vlm", opened)
    monkeypatch.setattr(dpo.PairDataset, "collate", lambda self, rows: pinned(tags, collate(self, rows)))
    with tags:
        yield tags


def test_tags_are_as_strict_as_pytorch():
    with DeviceTags() as tags:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            there.numpy,
            there.pin_memory,
            lambda: here[there.bool()],
            lambda: torch.nn.functional.linear(here, there[None]),
            lambda: torch.stack([torch.ones(()), there.sum()]),
        ):
            with pytest.raises(RuntimeError, match="same device|is on cuda"):
                wrong()
        same = there * 2 + torch.tensor(1.0)
        assert (
            same.device == CARD
            and there[torch.tensor([0])].device == CARD
            and there.cpu().device == CPU
            and here.to(there).device == CARD
        )
        module = tags.put(torch.nn.Linear(3, 3))
        module(there).sum().backward()
        assert module.weight.grad.device == CARD and module.weight.is_cuda and not here.is_cuda
    assert there.device == CPU, "it was all pretence"


@pytest.mark.parametrize("cache_gb", [4.0, 2e-4, 0.0], ids=["room for all", "full", "of size 0"])
def test_no_tensor_of_another_device_enters_a_batch(card, few, tmp_path, cache_gb):
    """Reference, preflight, pinned batches, training and evaluation; with the cache empty and then as it was
    left."""
    for run in ("first", "again"):
        manifest = train(few, tmp_path / run, cache=str(tmp_path / "cache"), cache_gb=cache_gb)
    assert (manifest["engine"]["not_cached"] > 0) == (cache_gb < 1)
    if cache_gb == 2e-4:
        pictures = manifest["engine"]["not_cached"] - 16  # the reference of 16 pairs has no room
        assert 0 < pictures < len(tables(few)[0]), "some pictures are cached and some are not"


# several cards


def test_two_cards_are_one(card, few, tmp_path, monkeypatch):
    """No DataParallel, and steps of as many pairs as asked for."""
    steps, step = [], dpo.PreferenceTrainer.training_step

    def noted(self, model, inputs, *args):
        steps.append(len(inputs["rows"].rows))
        assert not isinstance(model, torch.nn.DataParallel) and self.args.train_batch_size == 4
        return step(self, model, inputs, *args)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dpo.PreferenceTrainer, "training_step", noted)
    train(few, tmp_path)
    assert steps == [4, 4, 4]


def test_adapter_products_are_in_tf32_beside_weights_of_16_bits(card, few, tmp_path, monkeypatch):
    seen, loss = [], dpo.PreferenceTrainer.compute_loss

    def noted(self, model, inputs, *args, **kwargs):
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        seen.append((torch.get_float32_matmul_precision(), *dtypes))
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(dpo.PreferenceTrainer, "compute_loss", noted)
    for name, options, expected in (
        ("on", {"dtype": "bfloat16"}, "high"),
        ("off", {"dtype": "bfloat16", "tf32": False}, "highest"),
        ("float32", {}, "highest"),
    ):
        train(few, tmp_path / name, kernel="sdpa", epochs=0.3, **options)
        assert set(seen) == {(expected, torch.float32)}, name
        seen.clear()
    assert torch.get_float32_matmul_precision() == "highest"


# sixteen bits


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_right_reference_passes_in_16_bits_and_a_wrong_one_does_not(few, tmp_path, quantisation):
    manifest = train(
        few, tmp_path, dtype="bfloat16", quantisation=quantisation, learning_rate=3e-3, epochs=2.0
    )
    assert (
        manifest["parameters"]["dtype"] == "bfloat16" and manifest["preflight"]["drift_nats_per_token"] < 0.01
    )
    by_id, pairs = tables(few)
    wrong = open_vlm(POLICY, str(tmp_path / "adapter"), dtype="bfloat16", quantisation=quantisation)
    maker = RowMaker(wrong, by_id, few / "prompts")
    reference = {r.pair_id: r for r in reference_logps(maker, pairs[:8])}
    preflight(maker, pairs[:8], reference)
    with (
        wrong.model.disable_adapter(),
        pytest.raises(RuntimeError, match="they are not the same model") as found,
    ):
        preflight(maker, pairs[:8], reference)
    assert 0.05 < float(re.search(r"differ by ([\d.]+)", str(found.value))[1]) < 1, (
        "as far as a round or two move a policy"
    )


def test_noise_averages_out_and_a_preference_does_not():
    n_tokens = torch.full((8, 2), 100)
    noise = (
        torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) * 0.05 * 10
    )  # 0.05 nats a token, independent
    assert drift_of(noise, n_tokens) < 0.005
    assert drift_of(torch.tensor([[3.0, -3.0]]).expand(8, 2), n_tokens) == pytest.approx(0.03), (
        "chosen up, rejected down is no noise"
    )


def test_float16_cannot_be_trained(few, tmp_path):
    with pytest.raises(ValueError, match="choose bfloat16 or float32"):
        train(few, tmp_path, dtype="float16")


def test_old_cards_and_old_torch_take_sdpa(monkeypatch):
    attention.card_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert kernel_for("auto", CARD, torch.bfloat16) == "sdpa"
    for kernel in ("varlen", "flash_attn"):
        with pytest.raises(
            ValueError, match=f"kernel='{kernel}' needs a card of compute capability 8.0 .* this one has 7.5"
        ):
            kernel_for(kernel, CARD, torch.bfloat16)
    attention.card_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert (
        kernel_for("auto", CARD, torch.bfloat16) == "varlen"
        and kernel_for("auto", CARD, torch.float32) == "sdpa"
    )
    attention.card_problem.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value: None)
    assert kernel_for("auto", CARD, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="cannot group heads in torch"):
        kernel_for("varlen", CARD, torch.bfloat16)
    attention.card_problem.cache_clear()


# memory


def small_card(monkeypatch, room):
    "`row_logps` on a card that holds `room` tokens at a time; returns the sizes that are tried."
    real, tried = dpo.row_logps, []

    def row_logps(core, batch):
        tried.append(batch["inputs"]["input_ids"].numel())
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(core, batch)

    monkeypatch.setattr(dpo, "row_logps", row_logps)
    return tried


def test_what_does_not_fit_is_done_again_in_halves(plain, few, tmp_path, monkeypatch, capsys):
    tried = small_card(monkeypatch, room=300)
    manifest = train(few, tmp_path)
    used = manifest["max_tokens"]
    assert (
        used["asked"] == 8192
        and used["used"] <= 300
        and read_manifest(plain)["max_tokens"] == {"asked": 8192, "used": 8192}
    )
    assert "out of memory: going on with max_tokens" in capsys.readouterr().out
    assert sum(n > 300 for n in tried) < 8, "what is learned in the reference holds for the training"
    assert manifest["parameters"] == read_manifest(plain)["parameters"], (
        "max_tokens is no part of the identity"
    )
    for a, b in zip(
        curve(plain, "train") + curve(plain, "dev"),
        curve(tmp_path, "train") + curve(tmp_path, "dev"),
        strict=True,
    ):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["margin"] == pytest.approx(b["margin"], abs=5e-3) and a["accuracy"] == b["accuracy"], (
            "no pair is counted twice"
        )


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_step_that_does_not_fit_begins_anew(plain, few, tmp_path, monkeypatch, where):
    """Memory runs out in the second part of a step, when the first has left its gradients."""
    real, calls = dpo.row_logps, Counter()

    def row_logps(core, batch):
        kind = "training" if core.training else "evaluation" if "reference" in batch else "other"
        calls[kind] += 1
        if kind == where and calls[kind] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(core, batch)

    monkeypatch.setattr(dpo, "row_logps", row_logps)
    manifest = train(few, tmp_path, max_tokens=400)
    assert manifest["max_tokens"]["used"] < 400
    for a, b in zip(
        curve(plain, "train") + curve(plain, "dev"),
        curve(tmp_path, "train") + curve(tmp_path, "dev"),
        strict=True,
    ):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["margin"] == pytest.approx(
            b["margin"], abs=5e-3
        )


def test_a_pair_too_large_for_the_card_is_named(few, tmp_path, monkeypatch):
    by_id, pairs = tables(few)
    small_card(monkeypatch, room=50)
    maker = RowMaker(open_vlm(POLICY), by_id, few / "prompts")
    with pytest.raises(
        RuntimeError,
        match=r"the pair \w.* \(\d+ tokens\) does not fit into memory even alone: "
        r"smaller pictures \(max_pixels\)",
    ):
        reference_logps(maker, pairs[:4])


def test_one_large_model_and_none_afterwards(few, tmp_path):
    opened = []

    def noted(**kwargs):
        vlm = open_vlm(POLICY, **kwargs)
        opened.append(weakref.ref(vlm.model))
        return vlm

    train(few, tmp_path, open_policy=noted)
    assert len(opened) == 1 and opened[0]() is None


# rows without decoding


@pytest.fixture
def decoded(monkeypatch):
    "How often each picture is decoded."
    counts, load = Counter(), dpo.load_image

    def counted(path, sha=""):
        counts[Path(path).name] += 1
        return load(path, sha)

    monkeypatch.setattr(dpo, "load_image", counted)
    return counts


def test_a_picture_is_decoded_once_or_not_at_all(plain, few, tmp_path, decoded, monkeypatch):
    """Beside the three looks at the first picture (is it readable, do layout and cache fit) and the
    preflight's, which read pixels on purpose."""
    monkeypatch.setattr(dpo, "preflight", lambda *args: {})
    n_pictures = len(tables(few)[0])
    train(few, tmp_path / "cold", cache=str(tmp_path / "cache"), epochs=4.0, evaluations=6)
    assert sum(decoded.values()) == n_pictures + 3 and sorted(decoded.values())[:-1] == [1] * (n_pictures - 1)
    decoded.clear()
    train(few, tmp_path / "warm", cache=str(tmp_path / "cache"))
    assert sum(decoded.values()) == 3 and results(tmp_path / "warm") == results(plain)


def test_a_picture_that_has_changed_is_refused_though_it_is_known(few, tmp_path, decoded):
    shutil.copytree(few, tmp_path / "few")
    cache = ContentCache(tmp_path / "cache", 1)
    by_id, pairs = tables(tmp_path / "few")
    maker = RowMaker(open_vlm(POLICY), by_id, tmp_path / "few/prompts", features=cache)
    assert dpo.usable_pairs(maker, pairs) == (pairs, []) and len(cache.where) == len(by_id)
    changed = by_id[pairs[3].prompt_id]
    (tmp_path / "few/prompts" / changed.image_path).write_bytes(b"another picture")
    decoded.clear()
    good, set_aside = dpo.usable_pairs(maker, pairs)
    assert {s.row_id for s in set_aside} == {
        p.pair_id for p in pairs if p.prompt_id == changed.prompt_id
    } and not decoded
    assert all("has changed since the prompts were written" in s.detail for s in set_aside) and len(
        good
    ) + len(set_aside) == len(pairs)


def test_questions_and_pairs_that_cannot_be_asked_are_set_aside(few, tmp_path):
    by_id, pairs = tables(few)
    vlm = open_vlm(POLICY)
    odd = replace(
        by_id[pairs[0].prompt_id], prompt_id="odd", question=f"What is {vlm.processor.image_token}?"
    )
    maker = RowMaker(vlm, by_id | {"odd": odd}, few / "prompts", features=ContentCache(tmp_path, 1))
    strange = [
        replace(pairs[0], pair_id="a", prompt_id="odd"),
        replace(pairs[0], pair_id="b", prompt_id="nowhere"),
    ]
    good, set_aside = dpo.usable_pairs(maker, pairs[:2] + strange)
    assert good == pairs[:2] and [s.row_id for s in set_aside] == ["a", "b"]
    assert "stands for a picture" in set_aside[0].detail and "no such prompt" in set_aside[1].detail


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_processes_that_prepare_rows_change_no_byte(plain, few, tmp_path, cache_gb):
    train(few, tmp_path, loader_workers=2, cache_gb=cache_gb)
    assert results(tmp_path) == results(plain)


def test_the_cache_has_one_budget(few, tmp_path):
    for cache_gb in (1.0, 2e-4):
        manifest = train(
            few, tmp_path / f"{cache_gb}", cache=str(tmp_path / f"cache {cache_gb}"), cache_gb=cache_gb
        )
        size = sum(p.stat().st_size for p in (tmp_path / f"cache {cache_gb}").glob("*/*"))
        assert 0 < size <= 1e9 * cache_gb and (manifest["engine"]["not_cached"] > 0) == (cache_gb < 1)


def test_a_cache_leaves_half_of_the_free_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1000))
    cache = ContentCache(tmp_path, 1)
    cache.put({"small": {"x": torch.zeros(50)}})
    cache.put({"large": {"x": torch.zeros(200)}})
    assert "small" in cache and "large" not in cache and cache.skipped == 1


# learning that is none


def test_too_few_steps_are_refused_before_anything_is_opened(few, tmp_path):
    def never(**kwargs):
        pytest.fail("nothing may be opened")

    with pytest.raises(
        ValueError,
        match=r"12 training pairs make 3 steps at batch_size 4 and epochs 1: too few to learn from "
        r"\(min_steps 10\).*n_per_round",
    ):
        train(few, tmp_path, open_policy=never, min_steps=10)
    by_id, pairs = tables(few)
    with pytest.raises(ValueError) as found:
        require_steps(pairs, 1.0, 4, 10)
    epochs, smaller = (
        float(re.search(rf"{name} [<>]= ([\d.]+)", str(found.value))[1]) for name in ("epochs", "batch_size")
    )
    assert steps_of(16, epochs, 4) >= 10 > steps_of(16, epochs - 0.1, 4) and steps_of(
        16, 1.0, smaller
    ) >= 10 > steps_of(16, 1.0, smaller + 1)
    require_steps(pairs, epochs, 4, 10)


def test_what_ships_has_enough_steps():
    """The notebook's own defaults on the packaged example, and the tiny recipe (282 training pairs in round
    1)."""
    by_id = {p.prompt_id: p for p in read_table(PROMPTS, "prompts", Prompt)}
    require_enough(read_table(PAIRS, "pairs", Pair), by_id, DpoOptions())
    assert steps_of(282, 2.0, 16) == 36


def test_a_short_run_has_no_warm_up_and_its_first_step_teaches(few, tmp_path):
    for steps, epochs in ((1, 0.3), (3, 1.0)):
        train(few, tmp_path / str(steps), epochs=epochs)
        weights = load_file(tmp_path / str(steps) / "adapter/adapter_model.safetensors")
        assert all(v.any() for k, v in weights.items() if "lora_B" in k), steps
    warm_up = [
        dpo.trainer_arguments(open_vlm(POLICY), tmp_path, n, DpoOptions()).warmup_steps
        for n in (3, 19, 20, 36, 400)
    ]
    assert warm_up == [0, 0, 1, 1, 20], "from 20 steps on what it always was"


def test_the_dev_loss_is_known_from_the_start(plain):
    manifest, dev = read_manifest(plain), curve(plain, "dev")
    assert dev[0]["step"] == 0 and dev[0]["loss"] == manifest["dev_loss_before"] and dev[0]["margin"] == 0
    assert manifest["best_dev_loss"] < manifest["dev_loss_before"] and manifest["warnings"] == []


def test_training_that_makes_it_worse_is_said(few, tmp_path):
    manifest = train(few, tmp_path, learning_rate=0.05)
    assert manifest["best_dev_loss"] >= manifest["dev_loss_before"]
    assert "training did not improve the dev loss" in manifest["warnings"][0]


@pytest.mark.parametrize("parent", [False, True], ids=["round 1", "round 2"])
def test_an_adapter_that_equals_its_start_is_an_error(plain, few, tmp_path, parent):
    with pytest.raises(RuntimeError, match="it learned nothing"):
        train(few, tmp_path, learning_rate=0.0, **({"adapter": str(plain / "adapter")} if parent else {}))
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "adapter").exists()


def test_numbers_that_are_none_stop_the_training(few, tmp_path, monkeypatch):
    real = dpo.row_logps
    broken = tables(few)[1][5].pair_id

    def row_logps(core, batch):
        logps = list(real(core, batch))
        if core.training and broken in batch["pair_ids"]:
            logps[2 * batch["pair_ids"].index(broken)] = logps[0] * torch.nan
        return logps

    monkeypatch.setattr(dpo, "row_logps", row_logps)
    with pytest.raises(
        FloatingPointError, match=f"log-probabilities or loss are not finite, with the pairs .*{broken}"
    ):
        train(few, tmp_path / "loss")
    monkeypatch.setattr(
        dpo,
        "row_logps",
        lambda core, batch: [
            _InfiniteGradient.apply(logps) if core.training else logps for logps in real(core, batch)
        ],
    )
    with pytest.raises(FloatingPointError, match="step 0: the gradient is not finite, with the pairs"):
        train(few, tmp_path / "gradient")


class _InfiniteGradient(torch.autograd.Function):
    "Itself, with a gradient that overflows."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


def test_a_reference_that_is_not_finite_is_set_aside(few, tmp_path, monkeypatch):
    sums = dpo.row_sums
    unlucky = [p.pair_id for p in tables(few)[1]][2]

    def overflowing(maker, rows):
        found, n_tokens = sums(maker, rows)
        for row, pair in zip(found, rows):
            if pair["pair_id"] == unlucky and not overflowing.fresh:
                row[1] = -torch.inf
        return found, n_tokens

    overflowing.fresh = False
    monkeypatch.setattr(dpo, "row_sums", overflowing)
    manifest = train(few, tmp_path / "out", cache=str(tmp_path / "cache"))
    assert (
        manifest["set_aside"] == {"log-probabilities that are not finite": 1} and manifest["rows_out"] == 15
    )
    assert unlucky not in {r.pair_id for r in read_table(tmp_path / "out", "reference", RefLogp)}
    assert manifest["train_pairs"] + manifest["dev_pairs"] == 15
    overflowing.fresh = True
    assert train(few, tmp_path / "again", cache=str(tmp_path / "cache"))["rows_out"] == 16, (
        "the cache has not kept it"
    )


def test_prompt_ids_of_any_text_split():
    def prompt(name):
        return Prompt(name, "x.png", "", "What?")

    for names in (
        ["photo one", "photo two", "éléphant 3"],
        [f"picture-{i}.jpg" for i in range(40)],
        ["a", "b"],
    ):
        by_id = {n: prompt(n) for n in names}
        pairs = [Pair(f"{n}{k}", n, "a", "b", "A", "B", 0, -1) for n in names for k in range(2)]
        train, dev = split_pairs(pairs, by_id)
        assert train and dev and not {p.prompt_id for p in train} & {p.prompt_id for p in dev}
        assert split_pairs(pairs[::-1], by_id)[1] == [p for p in pairs[::-1] if p in dev], (
            "the order does not matter"
        )
    hexadecimal = [sha256_of(str(i))[:12] for i in range(50)]
    assert [tenth_of(h) for h in hexadecimal] == [int(h, 16) % 10 for h in hexadecimal], "as it always was"
    with pytest.raises(ValueError, match="pairs of at least two prompts"):
        split_pairs(pairs[:1], by_id)


# the paper's setting


def test_dropout_is_seeded_and_resumed_to_the_same_bytes(plain, few, tmp_path, monkeypatch):
    setting = dict(lora_dropout=0.3, epochs=2.0, evaluations=3)
    manifest = train(few, tmp_path / "whole", **setting)
    assert manifest["parameters"]["lora_dropout"] == 0.3
    assert manifest["preflight"]["drift_nats_per_token"] < 1e-6, "reference and preflight know no dropout"
    assert (tmp_path / "whole/reference-00000.jsonl").read_bytes() == (
        plain / "reference-00000.jsonl"
    ).read_bytes()
    assert json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.3
    step = dpo.PreferenceTrainer.training_step
    calls = []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(dpo.PreferenceTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(few, tmp_path / "parts", **setting)
    assert (tmp_path / "parts/checkpoints/checkpoint-2/complete").exists()
    monkeypatch.setattr(dpo.PreferenceTrainer, "training_step", step)
    train(few, tmp_path / "parts", loader_workers=2, max_tokens=4096, cache_gb=1.0, **setting)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    gc.collect()
    without = train(few, tmp_path / "without", **setting | {"lora_dropout": 0.0})
    assert without["adapter_sha"] != manifest["adapter_sha"]


def test_a_later_round_takes_its_own_dropout(plain, few, tmp_path):
    train(few, tmp_path, adapter=str(plain / "adapter"), lora_dropout=0.25, epochs=0.3)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_how_the_policy_is_asked_is_part_of_the_result(few, tmp_path):
    manifest = train(few, tmp_path, max_pixels=2000, device="cpu")
    assert manifest["parameters"]["max_pixels"] == 2000 and "system_prompt" not in manifest["parameters"]
