"""Reading a prompt once changes nothing: on = off = the model's own forward and `generate`, over random
ragged batches of real architectures."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, NOT_CACHED, NOT_SHARED, open_tiny

from rlaifv_nb.engine.attention import sharing_problem
from rlaifv_nb.engine.caches import (
    ContentCache,
    entry_problem,
    features_problem,
    get_or_compute,
    layout_problem,
    picture_entry,
    picture_features,
    positions_of,
    question_inputs,
)
from rlaifv_nb.engine.models import lora_targets, prompt_inputs, prompt_positions, unsampled_ids
from rlaifv_nb.engine.packing import LAYOUTS, PER_TOKEN, collate_rows, pack_by_budget, pack_row, row_logps
from rlaifv_nb.engine.prefix import (
    branch_logps,
    next_token_sums,
    pick_tokens,
    read_prompts,
    sample_branches,
    uniform_numbers,
)
from rlaifv_nb.iconworld.world import DESCRIBE, draw_picture, make_scene

SIZES = ((150, 100), (90, 140), (120, 120), (56, 56))
QUESTIONS = (*DESCRIBE, "What is in the top left?")
tiny = functools.lru_cache(open_tiny)
on_every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.lru_cache
def inputs_of(name, scene, question):
    "A prompt with a picture of its own size."
    picture = draw_picture(make_scene("dev", scene)).resize(SIZES[scene % len(SIZES)])
    return prompt_inputs(tiny(name), picture, QUESTIONS[question])


def own_logps(vlm, inputs, branch):
    "Log-probabilities of a branch by the model's own forward over prompt and branch, all positions its own."
    ids = torch.cat([inputs["input_ids"], torch.tensor([branch])], 1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    rest |= {k: torch.nn.functional.pad(rest[k], (0, len(branch))) for k in PER_TOKEN if k in rest}
    with torch.no_grad():
        logits = (
            vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest).logits[0].log_softmax(-1)
        )
    return logits[-len(branch) - 1 : -1].gather(1, torch.tensor(branch)[:, None])[:, 0]


def next_token_logits(vlm, inputs, branch):
    "Logits (V,) of the token that follows a branch, by the model's own forward."
    ids = torch.cat([inputs["input_ids"], torch.tensor([branch], dtype=torch.long)], 1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    rest |= {k: torch.nn.functional.pad(rest[k], (0, len(branch))) for k in PER_TOKEN if k in rest}
    with torch.no_grad():
        return vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **rest).logits[0, -1]


def same_answer(a, b, vlm, inputs, seed, temperature, never, rounding=1e-5):
    """Whether two sampled answers are the same, or part where rounding decides: where the uniform number lies
    on the edge between both tokens (at temperature 0, where both are equally probable)."""
    if a == b:
        return True
    k = next(k for k, (x, y) in enumerate(zip(a[0] + [vlm.end_id], b[0] + [vlm.end_id])) if x != y)
    first, second = sorted((answer + [vlm.end_id])[k] for answer, _ in (a, b))
    logits = next_token_logits(vlm, inputs, a[0][:k]).double().index_fill(0, torch.tensor(never), -torch.inf)
    if temperature == 0:
        return abs(logits[first] - logits[second]) < rounding
    edges = (logits / temperature).softmax(-1).cumsum(-1)[first:second]
    return bool(((edges - uniform_numbers([seed], 20)[0, k]).abs() < rounding).all())


def packed_row(vlm, inputs, branches):
    "A training row."
    positions = prompt_positions(vlm.core, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])})
    return pack_row(inputs, branches, positions if positions.ndim == 2 else positions[:, 0])


tokens = st.integers(10, 700)
prompts = st.lists(st.tuples(st.integers(0, 7), st.integers(0, len(QUESTIONS) - 1)), min_size=1, max_size=3)


@on_every_architecture
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_branch_logps_equal_the_models_own(name, data):
    asked = data.draw(prompts)
    index = data.draw(st.lists(st.integers(0, len(asked) - 1), min_size=1, max_size=9))
    branches = [data.draw(st.lists(tokens, min_size=1, max_size=12)) for _ in index]
    inputs, shared, plain = [inputs_of(name, *a) for a in asked], tiny(name), tiny(name, False)
    assert plain.sharing_problem and (
        NOT_SHARED[name] in shared.sharing_problem if name in NOT_SHARED else shared.sharing_problem == ""
    )
    on, off = (branch_logps(vlm, read_prompts(vlm, inputs), index, branches) for vlm in (shared, plain))
    for k, branch, a, b in zip(index, branches, on, off):
        own = own_logps(plain, inputs[k], branch)
        assert torch.allclose(a, own, atol=1e-4) and torch.allclose(b, own, atol=1e-4)


@on_every_architecture
@pytest.mark.parametrize("n", [1, 2, 13, 64])
def test_one_to_sixty_four_branches(name, n):
    inputs, generator = [inputs_of(name, 0, 0), inputs_of(name, 1, 1)], torch.Generator().manual_seed(n)
    branches = [
        torch.randint(
            10, 700, (int(torch.randint(1, 15, (1,), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(n)
    ]
    index = [k % 2 for k in range(n)]
    scores = [
        next_token_sums(
            vlm, read_prompts(vlm, inputs), index, branches, ([20, 21], list(range(400))), max_tokens
        )
        for vlm, max_tokens in ((tiny(name), 16384), (tiny(name), 40), (tiny(name, False), 300))
    ]
    for other in scores[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(scores[0], other))


@on_every_architecture
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 8), temperature=st.sampled_from((0, 0.7, 1.2)))
def test_the_same_tokens_are_sampled(name, seed, n, temperature):
    inputs = [inputs_of(name, 0, 0), inputs_of(name, 1, 4)]
    index, seeds = [0] * n + [1] * n, range(seed, seed + 2 * n)
    vlm, plain = tiny(name), tiny(name, False)
    never = unsampled_ids(vlm)
    sampling = dict(temperature=temperature, max_new_tokens=20, never=never)
    together = sample_branches(vlm, read_prompts(vlm, inputs), index, seeds, **sampling)
    apart = sample_branches(plain, read_prompts(plain, inputs), index, seeds, **sampling)
    for k, of_seed, a, b in zip(index, seeds, together, apart, strict=True):
        assert same_answer(a, b, plain, inputs[k], of_seed, temperature, never)
    alone = sample_branches(vlm, read_prompts(vlm, inputs[1:]), [0], [seed + n], **sampling)
    same = same_answer(together[n], alone[0], plain, inputs[1], seed + n, temperature, never)
    assert same, "a response must not depend on its neighbours"


def test_a_wrong_token_is_not_taken_for_rounding():
    vlm, inputs = tiny("llava", False), inputs_of("llava", 0, 0)
    never = unsampled_ids(vlm)
    sampled = sample_branches(
        vlm, read_prompts(vlm, [inputs]), [0], [3], 1.0, max_new_tokens=20, never=never
    )[0]
    for other in (sampled[0][5] - 3, sampled[0][5] + 3, vlm.end_id):
        wrong = sampled[0][:5] + [other] + sampled[0][6:], sampled[1]
        assert not same_answer(sampled, wrong, vlm, inputs, 3, 1.0, never)


@on_every_architecture
def test_greedy_equals_generate(name):
    plain, shared, inputs = tiny(name, False), tiny(name), inputs_of(name, 2, 3)
    own = plain.model.generate(**inputs, do_sample=False, max_new_tokens=25)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    ids, _ = sample_branches(
        shared, read_prompts(shared, [inputs]), [0], [0], temperature=0, max_new_tokens=25
    )[0]
    assert own[: len(ids)] == ids and (own[len(ids) :] or [shared.end_id])[0] in (
        shared.end_id,
        shared.tokenizer.eos_token_id,
    )


def lora_gradients(vlm, rows, layout, checkpointing, budget=None):
    """Log-probabilities of all rows and gradients of every LoRA matrix for a loss that weighs all tokens
    differently."""
    torch.manual_seed(1)
    model = get_peft_model(
        vlm.core, LoraConfig(r=4, target_modules=lora_targets(vlm.core), init_lora_weights=False)
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    try:
        logps = [
            l
            for group in (pack_by_budget(rows, budget) if budget else [rows])
            for l in row_logps(vlm.core, collate_rows(group, layout))
        ]
        sum((l * torch.linspace(1, 2, len(l))).sum() * (k % 3 + 1) for k, l in enumerate(logps)).backward()
        return torch.cat(logps).detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.unload()
        vlm.core.eval()


@on_every_architecture
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_layouts_give_the_same_gradients(name, data):
    vlm = tiny(name)
    lists = st.lists(tokens, min_size=1, max_size=15)
    asked = data.draw(prompts)
    rows = [
        packed_row(vlm, inputs_of(name, *a), data.draw(st.lists(lists, min_size=2, max_size=2)))
        for a in asked
    ]
    with torch.no_grad():
        own = [
            own_logps(vlm, inputs_of(name, *a), branch)
            for a, row in zip(asked, rows)
            for branch in row["branches"]
        ]
        assert torch.allclose(
            torch.cat(row_logps(vlm.core, collate_rows(rows, "plain"))), torch.cat(own), atol=1e-4
        )
    plain, expected = lora_gradients(vlm, rows, "plain", False)
    together = (("shared", False, None), ("packed", False, None), ("packed", True, 150))
    for layout, checkpointing, budget in (("plain", True, 100),) if vlm.sharing_problem else together:
        logps, gradients = lora_gradients(vlm, rows, layout, checkpointing, budget)
        assert torch.allclose(plain, logps, atol=1e-4)
        assert gradients.keys() == expected.keys() and len(gradients) == 3 * 7 * 2
        for n, g in gradients.items():
            assert (g - expected[n]).norm() <= 1e-3 * expected[n].norm(), (layout, n)


def test_four_bit_layers_pack():
    from rlaifv_nb.engine.models import open_vlm

    vlm = open_vlm("packaged:iconworld-vlm", quantisation="nf4")
    picture = draw_picture(make_scene("dev", 3))
    rows = [packed_row(vlm, prompt_inputs(vlm, picture, q), [[30, 31, 32], [40, 41]]) for q in DESCRIBE[:2]]
    plain, expected = lora_gradients(vlm, rows, "plain", True)
    logps, gradients = lora_gradients(vlm, rows, "packed", True)
    assert torch.allclose(plain, logps, atol=1e-4)
    assert all((g - expected[n]).norm() <= 1e-3 * expected[n].norm() for n, g in gradients.items())


@on_every_architecture
def test_the_entry_of_a_picture_makes_the_row_of_any_question(name, tmp_path):
    vlm, cache = tiny(name), ContentCache(tmp_path, 1)
    layout = "plain" if vlm.sharing_problem else "packed"
    if name in NOT_CACHED:
        problem = features_problem(vlm, inputs_of(name, 0, 0))
        assert NOT_CACHED[name] in problem and type(vlm.core).__name__ in problem
        return
    for scene in range(3):
        inputs, other = inputs_of(name, scene, 0), inputs_of(name, scene, 1)
        assert (
            entry_problem(vlm, inputs, DESCRIBE[0]) == ""
            and layout_problem(vlm.core, packed_row(vlm, inputs, [[20, 30], [40]]), layout) == ""
        )
        row = packed_row(vlm, other, [[20, 21, 22], [23]])
        entry = get_or_compute(cache, [str(scene)], lambda keys: [picture_entry(vlm, inputs)])[0]
        made, positions = question_inputs(vlm, entry, DESCRIBE[1])
        assert all(torch.equal(made[k], other[k]) for k in made) and torch.equal(
            positions, positions_of(vlm.core, other)
        )
        cached = pack_row(made | {"image_features": entry["features"]}, row["branches"], positions)
        assert torch.equal(cached["position_ids"], row["position_ids"])
        with torch.no_grad():
            pixels, features = (
                torch.cat(row_logps(vlm.core, collate_rows([r], layout))) for r in (row, cached)
            )
        assert torch.allclose(pixels, features, atol=1e-4)
    assert len(ContentCache(tmp_path, 1).where) == 3, "one entry a picture, kept on disk"
    assert {len(cache.get(key)["features"]) for key in cache.where} == {
        len(picture_features(vlm, inputs_of(name, s, 0))) for s in range(3)
    }


@pytest.mark.parametrize("name", NOT_SHARED)
def test_rows_that_would_be_wrong_are_noticed(name):
    vlm = tiny(name)
    row = packed_row(vlm, inputs_of(name, 0, 0), [[20, 30], [40]])
    assert "other log-probabilities in the layout shared" in layout_problem(vlm.core, row, "shared")


def test_what_cannot_share_is_named_and_works_plainly():
    import transformers as tf

    small = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    for model, reason in (
        (tf.MistralForCausalLM(tf.MistralConfig(sliding_window=8, **small)), "sliding window"),
        (tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=8, **small)), "sliding_attention"),
    ):
        before = model.config._attn_implementation
        problem = sharing_problem(model.eval())
        assert (
            reason in problem
            and type(model).__name__ in problem
            and model.config._attn_implementation == before
        )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.2, 2), st.floats(0.05, 1))
def test_sampling_follows_the_distribution(logits, temperature, top_p):
    logits = torch.tensor([logits])
    uniform = (torch.arange(4000) + 0.5) / 4000
    tokens = pick_tokens(logits.expand(4000, -1), uniform.double(), temperature, top_p)
    probs = (logits[0].double() / temperature).softmax(-1)
    ranked, order = probs.sort(descending=True, stable=True)
    ranked[ranked.cumsum(0) - ranked >= top_p] = 0
    expected = torch.zeros_like(probs).scatter(0, order, ranked / ranked.sum())
    assert torch.allclose(torch.bincount(tokens, minlength=len(probs)).double() / 4000, expected, atol=2e-3)


def test_seeds_alone_decide_the_numbers():
    assert torch.equal(uniform_numbers([3, 5], 4)[1], uniform_numbers([5], 9)[0, :4])


def test_every_layout_is_tested():
    assert LAYOUTS == ("plain", "shared", "packed")
