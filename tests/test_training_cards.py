"""05_dpo as it runs beside a graphics card: two devices, 16 bits, several cards, too little memory, too few steps. All on a CPU."""
import re

import pytest
import torch
from device_tags import CARD, CPU, DeviceTags, pinned

import rlaifv_nb.dpo as dpo
from rlaifv_nb.dpo import RowMaker, preflight, reference_logps, run_dpo
from rlaifv_nb.models import open_vlm
from rlaifv_nb.records import Pair, Prompt, read_manifest, read_table, resolve_path

POLICY, PROMPTS, PAIRS = "packaged:iconworld-vlm", resolve_path("packaged:example/prompts"), resolve_path("packaged:example/04_pairs")
SETTING = dict(learning_rate=5e-4, epochs=1.0, batch_size=6, evaluations=2)


def tables():
    "The packaged example's prompts by id, and its pairs."
    return {p.prompt_id: p for p in read_table(PROMPTS, "prompts", Prompt)}, read_table(PAIRS, "pairs", Pair)


# two devices


@pytest.fixture
def card(monkeypatch):
    "A card that is not there: policies are opened on it, the trainer takes it for its device, and batches are pinned."
    tags, open_plain, collate = DeviceTags(), dpo.open_vlm, dpo.PairDataset.collate

    def opened(*args, **kwargs):
        vlm = open_plain(*args, **kwargs)
        tags.put(vlm.model)
        return vlm

    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dpo, "open_vlm", opened)
    monkeypatch.setattr(dpo.PairDataset, "collate", lambda self, rows: pinned(tags, collate(self, rows)))
    with tags:
        yield tags


def test_tags_are_as_strict_as_pytorch():
    with DeviceTags() as tags:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for wrong in (lambda: here + there, lambda: torch.cat([here, there]), there.numpy, there.pin_memory, lambda: here[there.bool()],
                      lambda: torch.nn.functional.linear(here, there[None]), lambda: torch.stack([torch.ones(()), there.sum()])):
            with pytest.raises(RuntimeError, match="same device|is on cuda"):
                wrong()
        same = there * 2 + torch.tensor(1.0)
        assert same.device == CARD and there[torch.tensor([0])].device == CARD and there.cpu().device == CPU and here.to(there).device == CARD
        module = tags.put(torch.nn.Linear(3, 3))
        module(there).sum().backward()
        assert module.weight.grad.device == CARD and module.weight.is_cuda and not here.is_cuda
    assert there.device == CPU, "it was all pretence"


@pytest.mark.parametrize("cache_gb", [4.0, 1e-4, 0.0], ids=["room for all", "full", "of size 0"])
def test_no_tensor_of_another_device_enters_a_batch(card, tmp_path, cache_gb):
    """Reference, preflight, pinned batches, training and evaluation; with the cache empty and then as it was left."""
    for run in ("first", "again"):
        run_dpo(PROMPTS, PAIRS, tmp_path / run, POLICY, quantisation="none", cache=str(tmp_path / "cache"), cache_gb=cache_gb, **SETTING)
    assert (read_manifest(tmp_path / "again")["engine"]["not_cached"] > 0) == (cache_gb < 1)
    assert card.device_of(torch.ones(2)) == CPU


# sixteen bits


@pytest.fixture(scope="module", params=["none", "nf4"])
def half(request, tmp_path_factory):
    "A training in bfloat16, what a card does by default, with and without 4-bit weights."
    folder = tmp_path_factory.mktemp(f"half_{request.param}")
    run_dpo(PROMPTS, PAIRS, folder, POLICY, dtype="bfloat16", quantisation=request.param, **SETTING | {"learning_rate": 2e-3, "epochs": 2.0})
    return folder


def test_a_right_reference_passes_in_16_bits_and_a_wrong_one_does_not(half, tmp_path):
    manifest = read_manifest(half)
    assert manifest["parameters"]["dtype"] == "bfloat16" and manifest["preflight"]["drift_nats_per_token"] < 0.01
    by_id, pairs = tables()
    wrong = open_vlm(POLICY, str(half / "adapter"), dtype="bfloat16", quantisation=manifest["parameters"]["quantisation"])
    maker = RowMaker(wrong, by_id, PROMPTS)
    reference = {r.pair_id: r for r in reference_logps(maker, pairs[:8])}
    preflight(maker, pairs[:8], reference)
    with wrong.model.disable_adapter(), pytest.raises(RuntimeError, match="they are not the same model") as found:
        preflight(maker, pairs[:8], reference)
    assert 0.05 < float(re.search(r"differ by ([\d.]+)", str(found.value))[1]) < 1, "as far as a round of training moves a policy"
