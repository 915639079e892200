"""Branching from one reading of the prompt changes nothing: against `generate` and plain forwards, over random ragged batches."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv_nb.iconworld import DESCRIBE, draw_picture, make_scene
from rlaifv_nb.models import open_vlm, prompt_inputs
from rlaifv_nb.prefix import branch_logps, pick_tokens, read_prompts, sample_branches, uniform_numbers


@pytest.fixture(scope="module")
def vlm():
    return open_vlm("packaged:iconworld-vlm")


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_branch_logps_equal_plain_forwards(vlm, data):
    n = data.draw(st.integers(1, 3))
    inputs = [prompt_inputs(vlm, draw_picture(make_scene("dev", i)), data.draw(st.sampled_from(DESCRIBE + ("What is in the top left?",)))) for i in range(n)]
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
    branches = [data.draw(st.lists(st.integers(10, 700), min_size=1, max_size=12)) for _ in index]
    for k, branch, logps in zip(index, branches, branch_logps(vlm, read_prompts(vlm, inputs), index, branches)):
        ids = torch.cat([inputs[k]["input_ids"], torch.tensor([branch])], dim=1)
        with torch.no_grad():
            logits = vlm.model(input_ids=ids, pixel_values=inputs[k]["pixel_values"]).logits[0].log_softmax(-1)
        plain = logits[-len(branch) - 1 : -1].gather(1, torch.tensor(branch)[:, None])[:, 0]
        assert torch.allclose(plain, logps, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8))
def test_samples_do_not_depend_on_neighbours(vlm, seed, n):
    inputs = [prompt_inputs(vlm, draw_picture(make_scene("dev", i)), DESCRIBE[i]) for i in range(2)]
    index, seeds = [0] * n + [1] * n, range(seed, seed + 2 * n)
    together = sample_branches(vlm, read_prompts(vlm, inputs), index, seeds, 0.7, max_new_tokens=20)
    alone = sample_branches(vlm, read_prompts(vlm, inputs[1:]), [0], [seed + n], 0.7, max_new_tokens=20)
    assert together[n] == alone[0]


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
