"""01_sampling as a stage: a stream of prompts in shards, refill on = off, the adapter merged in 16 bits,
and what the manifest says."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from stages import prepare

from rlaifv_nb.engine.models import open_vlm, prompt_inputs
from rlaifv_nb.engine.prefix import branch_logps, read_prompts
from rlaifv_nb.iconworld.world import DESCRIBE, draw_picture, make_scene
from rlaifv_nb.records import (
    Prompt,
    Response,
    read_manifest,
    read_table,
    resolve_path,
    shard_paths,
    write_table,
)
from rlaifv_nb.sampling import SamplingOptions, can_merge, merged_adapter, run_sampling

POLICY, ADAPTER = "packaged:iconworld-vlm", "packaged:iconworld-aligned"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    "Eighteen prompts."
    prepare(tmp_path_factory.mktemp("inputs"))
    return tmp_path_factory.getbasetemp() / "inputs0" / "prompts"


def tables(folder):
    "Its shards, byte for byte."
    return {
        p.name: p.read_bytes()
        for p in (*shard_paths(folder, "responses"), *shard_paths(folder, "set_aside-responses"))
    }


def test_refill_batches_and_shards_change_no_byte(prompts, tmp_path):
    vlm = open_vlm(POLICY)
    run_sampling(
        prompts,
        tmp_path / "on",
        vlm,
        options=SamplingOptions(n_samples=4, max_new_tokens=60, batch_size=4),
        shard_size=5,
        row_share=2 / 3,
    )
    run_sampling(
        prompts,
        tmp_path / "off",
        vlm,
        options=SamplingOptions(n_samples=4, max_new_tokens=60, batch_size=7, refill=False),
        shard_size=5,
    )
    on, off = tables(tmp_path / "on"), tables(tmp_path / "off")
    assert on == off and len(on) == 8, "18 prompts in shards of 5, with what was set aside"
    told, waits = read_manifest(tmp_path / "on"), read_manifest(tmp_path / "off")
    assert told["parameters"] == waits["parameters"] and "batch_size" not in told["parameters"]
    assert (told["batch_size"], told["refill"], waits["refill"]) == ({"asked": 4, "used": 4}, True, False)
    assert 0.5 < waits["row_use"] < told["row_use"] <= 1
    run_sampling(
        prompts,
        tmp_path / "cpu",
        vlm,
        options=SamplingOptions(n_samples=4, max_new_tokens=60, batch_size=4),
        shard_size=5,
    )
    assert tables(tmp_path / "cpu") == on and read_manifest(tmp_path / "cpu")["refill"] is False, (
        "a CPU drops rows instead"
    )


def test_the_packaged_example_is_what_comes_out(tmp_path):
    made = run_sampling(
        resolve_path("packaged:example/prompts"),
        tmp_path,
        open_vlm(POLICY),
        options=SamplingOptions(max_new_tokens=128),
    ).read("responses", Response)
    assert made == read_table(resolve_path("packaged:example/01_sampling"), "responses", Response)


def test_a_shard_is_written_when_its_last_prompt_is_done_and_kept(prompts, tmp_path, monkeypatch):
    import rlaifv_nb.sampling as s

    run_sampling(
        prompts,
        tmp_path / "whole",
        open_vlm(POLICY),
        options=SamplingOptions(n_samples=2, max_new_tokens=40, batch_size=3),
        shard_size=4,
        row_share=0.7,
    )
    generator = s.vlm_generator
    monkeypatch.setattr(
        s, "vlm_generator", lambda *args: lambda questions: stopping(generator(*args)(questions), 9)
    )

    def stopping(answers, n):
        for k, answer in enumerate(answers):
            if k == n:
                raise KeyboardInterrupt
            yield answer

    with pytest.raises(KeyboardInterrupt):
        run_sampling(
            prompts,
            tmp_path / "part",
            open_vlm(POLICY),
            options=SamplingOptions(n_samples=2, max_new_tokens=40, batch_size=3),
            shard_size=4,
            row_share=0.7,
        )
    kept = {p.name: p.stat().st_mtime_ns for p in shard_paths(tmp_path / "part", "responses")}
    assert len(kept) in (1, 2)
    monkeypatch.setattr(s, "vlm_generator", generator)
    run_sampling(
        prompts,
        tmp_path / "part",
        open_vlm(POLICY),
        options=SamplingOptions(n_samples=2, max_new_tokens=40, batch_size=3),
        shard_size=4,
        row_share=0.7,
    )
    assert tables(tmp_path / "part") == tables(tmp_path / "whole")
    assert all((tmp_path / "part" / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_unreadable_pictures_and_an_empty_table(prompts, tmp_path):
    rows = read_table(prompts, "prompts", Prompt)[:3]
    broken = [Prompt(f"broken{k}", f"images/none{k}.png", "", "What?") for k in range(3)]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "images").symlink_to(prompts / "images")
    write_table(tmp_path / "p", "prompts", [broken[0], rows[0], broken[1], rows[1], rows[2], broken[2]])
    made = run_sampling(
        tmp_path / "p",
        tmp_path / "out",
        open_vlm(POLICY),
        options=SamplingOptions(n_samples=2, max_new_tokens=20, batch_size=2),
        shard_size=2,
    ).read("responses", Response)
    assert [r.prompt_id for r in made] == [r.prompt_id for r in rows for _ in range(2)]
    assert read_manifest(tmp_path / "out")["set_aside"] == {"unreadable picture": 6}
    write_table(tmp_path / "none", "prompts", [])
    assert (
        run_sampling(tmp_path / "none", tmp_path / "nothing", open_vlm(POLICY)).read("responses", Response)
        == []
    )
    assert read_manifest(tmp_path / "nothing")["rows_in"] == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"second_temperature": -0.5},
        {"top_p": 0},
        {"top_k": -1},
        {"n_samples": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
    ],
)
def test_what_cannot_be_is_refused(bad, prompts, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.* is not supported: choose"):
        run_sampling(prompts, tmp_path, open_vlm(POLICY), options=SamplingOptions(**bad))
    assert not list(tmp_path.iterdir())


def test_top_k_and_a_second_temperature(prompts, tmp_path):
    vlm = open_vlm(POLICY)
    options = dict(n_prompts=3, n_samples=4, temperature=0.0, second_temperature=1.5, max_new_tokens=40)
    free = run_sampling(prompts, tmp_path / "free", vlm, options=SamplingOptions(**options)).read(
        "responses", Response
    )
    best = run_sampling(prompts, tmp_path / "best", vlm, options=SamplingOptions(top_k=1, **options)).read(
        "responses", Response
    )
    assert read_manifest(tmp_path / "best")["parameters"]["top_k"] == 1
    for first in range(0, 12, 4):
        texts = [r.text for r in free[first : first + 4]]
        assert texts[0] == texts[2] and len(set(texts)) > 1, "even samples are greedy, odd ones are not"
        assert {r.text for r in best[first : first + 4]} == {texts[0]}, "of one token there is no choice"


def test_a_merged_adapter_is_taken_out_to_the_bit():
    vlm = open_vlm(POLICY, ADAPTER, dtype="bfloat16")
    assert can_merge(vlm)
    assert not can_merge(open_vlm(POLICY, ADAPTER)) and not can_merge(open_vlm(POLICY, dtype="bfloat16"))
    assert not can_merge(open_vlm(POLICY, ADAPTER, dtype="bfloat16", quantisation="nf4"))
    before = {k: v.clone() for k, v in vlm.model.state_dict().items()}
    layers = [m for m in vlm.model.modules() if isinstance(m, LoraLayer)]
    inputs = [prompt_inputs(vlm, draw_picture(make_scene("dev", k)), DESCRIBE[k]) for k in range(4)]
    answers = [
        vlm.tokenizer(
            "There are two red cats in the top left. A blue dog sits.", add_special_tokens=False
        ).input_ids
        + [vlm.end_id]
    ] * 4
    beside = torch.cat(branch_logps(vlm, read_prompts(vlm, inputs), range(4), answers))
    with vlm.model.disable_adapter():
        without = torch.cat(branch_logps(vlm, read_prompts(vlm, inputs), range(4), answers))
    with pytest.raises(KeyboardInterrupt), merged_adapter(vlm):
        assert all(layer.merged for layer in layers)
        merged = torch.cat(branch_logps(vlm, read_prompts(vlm, inputs), range(4), answers))
        raise KeyboardInterrupt
    assert not any(layer.merged for layer in layers)
    assert all(torch.equal(v, before[k]) for k, v in vlm.model.state_dict().items())
    assert (merged - beside).mean().abs() < 0.05 < (without - beside).mean().abs()


def test_the_stage_merges_in_16_bits_and_says_so(prompts, tmp_path):
    vlm, seen = open_vlm(POLICY, ADAPTER, dtype="bfloat16"), []
    layer = next(m for m in vlm.model.modules() if isinstance(m, LoraLayer))
    layer.register_forward_hook(lambda module, args, out: seen.append(module.merged))
    for merge in (True, False):
        run_sampling(
            prompts,
            tmp_path / str(merge),
            vlm,
            options=SamplingOptions(n_prompts=2, n_samples=2, max_new_tokens=20, merge_adapter=merge),
        )
        assert (
            set(seen) == {merge}
            and read_manifest(tmp_path / str(merge))["parameters"]["merge_adapter"] is merge
        )
        seen.clear()
