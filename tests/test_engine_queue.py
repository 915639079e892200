"""Rows and slots that are refilled, blocks that grow, one instruction for all texts: on = off, on every
architecture, in every dtype, and when memory runs out."""

import functools
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, open_tiny
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlaifv_nb.claims import fill, read_templates
from rlaifv_nb.engine import prefix as prefixes
from rlaifv_nb.engine.attention import BLOCK
from rlaifv_nb.engine.models import open_llm, open_vlm, prompt_inputs, unsampled_ids
from rlaifv_nb.engine.prefix import (
    QueuedPrompt,
    SampleQueue,
    generate_texts,
    grow_texts,
    on_device,
    pick_tokens,
    read_prompts,
    sample_branches,
)
from rlaifv_nb.iconworld.world import DESCRIBE, draw_picture, make_scene

SIZES = ((150, 100), (90, 140), (120, 120), (56, 56))
QUESTIONS = (*DESCRIBE, "What is in the top left?")
tiny = functools.lru_cache(open_tiny)
on_every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.lru_cache
def inputs_of(vlm_name, scene):
    "A prompt with a picture and a question of its own size."
    vlm = tiny(vlm_name)
    return prompt_inputs(
        vlm,
        draw_picture(make_scene("dev", scene)).resize(SIZES[scene % 4]),
        QUESTIONS[scene % len(QUESTIONS)],
    )


def prompts_of(vlm_name, n, n_answers, temperatures=(0.9,)):
    "Prompts of a queue; seeds and temperatures differ."
    return [
        QueuedPrompt(
            f"p{k}",
            inputs_of(vlm_name, k),
            [100 * k + i for i in range(n_answers + k % 2)],
            [temperatures[i % len(temperatures)] for i in range(n_answers + k % 2)],
        )
        for k in range(n)
    ]


@contextmanager
def many_ends(vlm):
    "Models with random weights hardly ever end an answer: every seventh token of the vocabulary does, too."
    pick = prefixes.pick_tokens

    def ending(*args):
        tokens = pick(*args)
        return torch.where(tokens % 7 == 0, vlm.end_id, tokens)

    prefixes.pick_tokens = ending
    try:
        yield
    finally:
        prefixes.pick_tokens = pick


def sampled(vlm, prompts, **options):
    "Answers of a queue by prompt, and the queue."
    queue = SampleQueue(vlm, prompts, never=unsampled_ids(vlm), **options)
    with many_ends(vlm):
        return {p.name: [(a.tokens, a.reason) for a in p.answers] for p in queue}, queue


def one_by_one(vlm, prompts, **options):
    "The same, each answer alone."
    with many_ends(vlm):
        return {
            p.name: [
                sample_branches(
                    vlm, read_prompts(vlm, [p.inputs]), [0], [seed], t, never=unsampled_ids(vlm), **options
                )[0]
                for seed, t in zip(p.seeds, p.temperatures)
            ]
            for p in prompts
        }


@on_every_architecture
@pytest.mark.parametrize("look, rows", [(1, 1.0), (1, 2 / 3), (5, 0.4)])
def test_refilled_rows_give_the_same_answers(name, look, rows):
    vlm = tiny(name)
    alone = one_by_one(vlm, prompts_of(name, 7, 3), max_new_tokens=18)
    assert len({len(ids) for answers in alone.values() for ids, _ in answers}) > 3, "answers of many lengths"
    for batch_size in (1, 3):
        on, queue = sampled(
            vlm, prompts_of(name, 7, 3), batch_size=batch_size, max_new_tokens=18, look=look, row_share=rows
        )
        assert on == alone and queue.batch_size == batch_size and 0 < queue.use.share() <= 1
        if vlm.shares_prefix and look == 1 and batch_size == 3:
            off, waits = sampled(
                vlm, prompts_of(name, 7, 3), batch_size=batch_size, max_new_tokens=18, look=look, refill=False
            )
            assert (
                off == alone
                and queue.use.useful == waits.use.useful
                and queue.use.share() > waits.use.share()
            )


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from((0.3, 2 / 3, 1.0)),
    st.sampled_from(((0.7,), (0,), (0.8, 1.3), (0, 1.0))),
)
def test_any_shape_of_a_queue(n, n_answers, batch_size, look, rows, temperatures):
    vlm = tiny("qwen25_vl")  # positions in three dimensions
    prompts = prompts_of("qwen25_vl", n, n_answers, temperatures)
    found, _ = sampled(vlm, prompts, batch_size=batch_size, max_new_tokens=12, look=look, row_share=rows)
    assert found == one_by_one(vlm, prompts_of("qwen25_vl", n, n_answers, temperatures), max_new_tokens=12)


def test_never_more_prompts_alive_than_asked_and_read_when_their_turn_comes():
    vlm, asked = tiny("llava"), []

    def source():
        for p in prompts_of("llava", 9, 2):
            assert sum(not q.is_done for q in asked) <= 2, (
                "at most two are alive when a further one is looked at"
            )
            asked.append(p)
            yield p

    found, _ = sampled(vlm, source(), batch_size=2, max_new_tokens=10, row_share=1.0)
    assert {p.name for p in asked} == set(found) and len(asked) == 9


@contextmanager
def memory_for(vlm, limit):
    """A language model that runs out of memory with more than `limit` tokens at a time; yields how often it
    did."""
    often = []

    def check(module, args, kwargs):
        states = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if states.shape[0] * states.shape[1] > limit:
            often.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = vlm.core.get_decoder().register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield often
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("refill", [True, False])
def test_out_of_memory_keeps_what_is_finished(name, refill, capsys):
    vlm = tiny(name)
    whole, _ = sampled(vlm, prompts_of(name, 6, 3), batch_size=4, max_new_tokens=16)
    size = max(inputs_of(name, k)["input_ids"].shape[1] for k in range(6))
    each = (
        size if vlm.shares_prefix else 4 * size
    )  # a model that does not share reads a prompt for each of its answers
    with memory_for(vlm, 2 * each + 1) as often:
        found, queue = sampled(
            vlm, prompts_of(name, 6, 3), batch_size=4, max_new_tokens=16, refill=refill, row_share=1.0
        )
    assert found == whole and often and queue.batch_size < 4
    assert "out of memory with 4 prompts at a time: going on with 2" in capsys.readouterr().out


def test_a_single_prompt_goes_on_with_fewer_answers_or_is_named(capsys):
    vlm, name = tiny("gemma3"), "gemma3"
    size = inputs_of(name, 1)["input_ids"].shape[1]
    whole, _ = sampled(vlm, prompts_of(name, 2, 3), max_new_tokens=8)
    with memory_for(vlm, 2 * size):
        found, queue = sampled(vlm, prompts_of(name, 2, 3), max_new_tokens=8)
    assert found == whole and queue.batch_size == 1 and queue.answers_at_once == 1
    with (
        memory_for(vlm, size - 1),
        pytest.raises(MemoryError, match="not enough memory for a single item: one answer to prompt p1"),
    ):
        sampled(vlm, prompts_of(name, 2, 3)[1:], max_new_tokens=8)
    assert "out of memory with 3 answers to one prompt: going on with 1 at a time" in capsys.readouterr().out


def test_other_errors_and_sources_that_break_are_not_taken_for_memory():
    vlm = tiny("llava")

    def source(error):
        yield prompts_of("llava", 1, 2)[0]
        raise error

    for rows in (0.0, 1.0):
        with pytest.raises(ValueError, match="not enough memory to make a prompt ready: 100 GB"):
            sampled(vlm, source(MemoryError("100 GB")), max_new_tokens=4, row_share=rows)
        with pytest.raises(ZeroDivisionError):
            sampled(vlm, source(ZeroDivisionError()), max_new_tokens=4, row_share=rows)


def test_own_tokens_grow_by_blocks():
    vlm = open_vlm("packaged:iconworld-vlm")
    inputs = prompt_inputs(vlm, draw_picture(make_scene("dev", 0)), DESCRIBE[0])
    branches = prefixes.grow(vlm, read_prompts(vlm, [inputs]), [0, 0, 0], 200)
    assert branches.own.buffers == [None] * 4, "nothing before the first token"
    widths = []
    for _ in range(2 * BLOCK + 1):
        branches.step(torch.tensor([20, 30, 40]))
        widths.append({pair[0].shape[2] for pair in branches.own.buffers})
    assert widths == [{BLOCK}] * BLOCK + [{2 * BLOCK}] * BLOCK + [{3 * BLOCK}]
    short = prefixes.grow(vlm, read_prompts(vlm, [inputs]), [0], 20)
    short.step(torch.tensor([20]))
    assert short.own.buffers[0][0].shape[2] == 20, "never more than there can be"


@on_every_architecture
def test_texts_behind_one_instruction(name):
    vlm = tiny(name)
    if vlm.sharing_problem:
        pytest.skip(vlm.sharing_problem)
    generator = torch.Generator().manual_seed(3)
    instruction = torch.randint(10, 700, (40,), generator=generator).tolist()
    rests = [torch.randint(10, 700, (n,), generator=generator).tolist() for n in (1, 9, 70, 3, 30)]
    branches = grow_texts(vlm, instruction, rests, 20)
    own = [
        prefixes.read(tiny(name, False), [{"input_ids": torch.tensor([instruction + rest])}])
        for rest in rests
    ]
    for step in range(12):
        for hidden, alone in zip(branches.hidden, own):
            assert torch.allclose(hidden, alone.last_hidden[0], atol=1e-4)
        tokens = [11 + step + k for k in range(len(rests))]
        branches.step(torch.tensor(tokens))
        own = [
            prefixes.read(
                tiny(name, False),
                [{"input_ids": torch.cat([a.inputs[0]["input_ids"], torch.tensor([[t]])], 1)}],
            )
            for a, t in zip(own, tokens)
        ]


@pytest.mark.parametrize("max_tokens", [65536, 700, 90, 1])
def test_texts_in_any_number_at_a_time(max_tokens):
    llm = open_llm("packaged:iconworld-splitter")
    facts = [
        f"There is a {colour} {noun}."
        for colour in ("red", "blue", "green")
        for noun in ("cat", "dog", "cup", "clock")
    ] + ["A " + "very " * 40 + "big dog."]
    prompts = [f"Turn the fact about an image into a question.\nFact: {fact}\nQuestion:" for fact in facts]
    plain = open_llm("packaged:iconworld-splitter", share_prefix=False)
    rows = []
    step = prefixes.SharedRows.step
    prefixes.SharedRows.step = lambda self, tokens: rows.append(len(tokens)) or step(self, tokens)
    try:
        found = generate_texts(llm, prompts, 24, max_tokens)
    finally:
        prefixes.SharedRows.step = step
    assert found == generate_texts(plain, prompts, 24, max_tokens) and max(rows) <= max(4, max_tokens // 30)
    assert generate_texts(llm, [], 24) == [] and generate_texts(llm, prompts[:1], 24) == found[:1]


def test_texts_when_memory_runs_out(capsys):
    llm = open_llm("packaged:iconworld-splitter")
    prompts = [
        f"Turn the fact about an image into a question.\nFact: There are {n} cats.\nQuestion:"
        for n in ("two", "three", "four", "five", "six")
    ]
    whole = generate_texts(llm, prompts, 24)
    with memory_for(llm, 30) as often:
        assert generate_texts(llm, prompts, 24) == whole and often
    assert "out of memory with 5 texts at a time: going on with 2" in capsys.readouterr().out
    with (
        memory_for(llm, 1),
        pytest.raises(MemoryError, match="not enough memory for a single item: a text of"),
    ):
        generate_texts(llm, prompts, 24)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-80, 80), min_size=2, max_size=12, unique=True),
    st.floats(0.2, 2),
    st.integers(0, 13),
    st.floats(0.05, 1),
)
def test_top_k_and_top_p_as_in_generate(tenths, temperature, top_k, top_p):
    n, logits = 4000, torch.tensor([tenths]) / 10
    tokens = pick_tokens(
        logits.expand(n, -1), ((torch.arange(n) + 0.5) / n).double(), temperature, top_p, top_k
    )
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    kept = LogitsProcessorList(warpers[:-1] if top_p < 1 else warpers)(None, logits.double())[0].softmax(-1)
    if (kept.sort(descending=True).values.cumsum(0) - top_p).abs().min() < 1e-9:
        return  # rounding decides whether the last token still belongs to it
    expected = LogitsProcessorList(warpers)(None, logits.double())[0].softmax(-1)
    assert torch.allclose(torch.bincount(tokens, minlength=len(tenths)) / n, expected.float(), atol=2e-3)


def test_each_row_may_have_a_temperature_of_its_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    temperatures = [0.0, 0.7, 1.4]
    together = pick_tokens(logits, uniform, torch.tensor(temperatures, dtype=torch.float64), 0.9, 20)
    assert together.tolist() == [
        pick_tokens(logits[[k]], uniform[[k]], t, 0.9, 20).item() for k, t in enumerate(temperatures)
    ]


def test_nothing_waits_for_the_device_between_two_looks():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        "Operations that read from the device, choose a size by what is there, or send a number to it."

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in (
                "_local_scalar_dense",
                "nonzero",
                "equal",
                "masked_select",
                "lift_fresh",
                "_unique2",
            ) or "bool" in str([a.dtype for a in args if name == "index" and hasattr(a, "dtype")]):
                found.append(name)
            return func(*args, **(kwargs or {}))

    vlm, found, looks = tiny("llava"), [], []
    queue = SampleQueue(
        vlm,
        prompts_of("llava", 5, 4),
        batch_size=2,
        max_new_tokens=40,
        never=unsampled_ids(vlm),
        look=10,
        row_share=0.7,
    )
    step = prefixes.SharedRows.step

    def watched(self, tokens):
        with Waits():
            step(self, tokens)

    draw = prefixes.Sampler.draw

    def watched_draw(self, hidden, rows=None):
        if rows is not None:
            return draw(self, hidden, rows)
        looks.append(self.steps >= self.next_look)
        with Waits():
            return draw(self, hidden)

    with pytest.MonkeyPatch.context() as patch, many_ends(vlm):
        patch.setattr(prefixes.SharedRows, "step", watched)
        patch.setattr(prefixes.Sampler, "draw", watched_draw)
        assert len(list(queue)) == 5
    assert found == [] and len(looks) > 20 and sum(looks) < len(looks) / 3


HALF = pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"quantisation": "nf4"}, {"dtype": "bfloat16", "quantisation": "nf4"}],
    ids=["bf16", "nf4", "bf16 nf4"],
)


@HALF
def test_refilled_rows_in_16_and_4_bits(options):
    vlm, plain = (
        open_vlm("packaged:iconworld-vlm", **options),
        open_vlm("packaged:iconworld-vlm", share_prefix=False, **options),
    )
    inputs = [
        prompt_inputs(vlm, draw_picture(make_scene("dev", k)), DESCRIBE[k % len(DESCRIBE)]) for k in range(10)
    ]
    prompts = [QueuedPrompt(str(k), i, [0], [0]) for k, i in enumerate(inputs)]
    done = list(
        SampleQueue(
            vlm, prompts, batch_size=4, max_new_tokens=80, never=unsampled_ids(vlm), row_share=0.5, look=3
        )
    )
    assert len(done) == 10 and all(a.reason == "stop" for p in done for a in p.answers)
    index, branches = range(10), [p.answers[0].tokens + [vlm.end_id] for p in prompts]
    # greedy: each token is the best one to the plain path, too, but for ties that rounding breaks
    states = prefixes.score_branches(plain, read_prompts(plain, inputs), list(index), branches)
    with torch.no_grad():
        regrets = torch.cat(
            [
                logps.max(-1).values - logps[range(len(b)), b]
                for b, logps in zip(
                    branches, (vlm.core.lm_head(h[:-1]).float().log_softmax(-1) for h in states)
                )
            ]
        )
    assert len(regrets) > 300 and 0 <= regrets.mean() < (1e-4 if "dtype" not in options else 5e-3), (
        regrets.mean()
    )


@HALF
def test_texts_in_16_and_4_bits(options):
    shared, plain = (
        open_llm("packaged:iconworld-splitter", **options),
        open_llm("packaged:iconworld-splitter", share_prefix=False, **options),
    )
    facts = [
        "There is a cat.",
        "The cat is red.",
        "There are two dogs.",
        "The dogs are in the top left.",
        "There are three cups.",
        "The cups are blue.",
        "The cat is in the bottom right.",
        "There is a clock.",
        "The clock is green.",
    ]
    template = read_templates().question
    prompts = [fill(template, fact=fact) for fact in facts]
    on, off = generate_texts(shared, prompts, 24, 200), generate_texts(plain, prompts, 24)
    assert on == off and all(text.endswith("?") and reason == "stop" for text, reason in on)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_prompts_tensors_go_where_the_model_is(where):
    moved = on_device({"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(2)}, where)
    assert {k: (tuple(v.shape), v.device.type) for k, v in moved.items()} == {
        "input_ids": ((1, 3), where),
        "pixel_values": ((2,), where),
    }
