"""Pairs by the implicit reward: who may be chosen, the official draft's rule worked by hand, accounts, and
07's scores of given responses."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv_nb import reward_pairs as R
from rlaifv_nb.guided_decoding import given_ids, read_candidates, run_guided_decoding
from rlaifv_nb.pairs import length_gap
from rlaifv_nb.records import (
    Candidate,
    Pair,
    Prompt,
    Response,
    SetAside,
    package_folder,
    read_manifest,
    read_table,
    response_id_of,
    write_json,
    write_table,
    write_text,
)
from rlaifv_nb.runner.recipes import (
    RecipeError,
    chain_parameters,
    check_recipe,
    first_remade,
    load_recipe,
    plan_run,
)

quick = settings(max_examples=80, deadline=None, database=None)
WORDS = "red blue bus dog near two cars sit on it".split()


def candidate(index, text, reward, n_tokens=10, finish_reason="stop", prompt_id="p"):
    """A candidate with this summed reward."""
    return Candidate(
        "aligned",
        response_id_of(prompt_id, index),
        prompt_id,
        text,
        finish_reason,
        n_tokens,
        reward - 20.0,
        -20.0,
    )


def by_rank(n, **tokens):
    """n different answers, the best first, of 10 tokens each."""
    return [candidate(i, f"answer {i} " + "word " * 11, float(n - i), **tokens) for i in range(n)]


def numbers(pairs):
    """Pairs as (chosen index, rejected index)."""
    return [(int(p.chosen_id[-2:]), int(p.rejected_id[-2:])) for p in pairs]


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
rows = st.lists(
    st.tuples(st.sampled_from("pqr"), texts, st.integers(-40, 40), st.integers(1, 30)), max_size=24
)
candidate_lists = rows.map(
    lambda rows: [
        candidate(i, text, reward / 4, n, prompt_id=p) for i, (p, text, reward, n) in enumerate(rows)
    ]
)
limits = st.tuples(st.integers(1, 4), st.integers(1, 3))


# properties


def limited(limit, tolerance=0.02):
    "Options with a `(top_k, max_pairs_per_prompt)`, and n-grams of three words."
    top_k, max_pairs = limit
    return R.RewardPairOptions(
        top_k=top_k, ngram_words=3, max_pairs_per_prompt=max_pairs, length_tolerance=tolerance
    )


@quick
@given(candidate_lists, limits, st.randoms())
def test_order_of_rows_changes_nothing(candidates, limit, rng):
    def draw(rows):
        return R.draw_reward_pairs(R.usable_candidates(rows)[0], limited(limit))

    assert draw(candidates) == draw(candidates) == draw(rng.sample(candidates, len(candidates)))


@quick
@given(candidate_lists, limits)
def test_chosen_beats_rejected_and_top_never_meets_bottom(candidates, limit):
    top_k, max_pairs = limit
    usable, _ = R.usable_candidates(candidates)
    drawn, spare, twins, without = R.draw_reward_pairs(usable, limited(limit))
    of, lost = {c.response_id: c for c in candidates}, {s.row_id for s in twins}
    for p in drawn + spare:
        a, b = of[p.chosen_id], of[p.rejected_id]
        group = [c for c in candidates if c.prompt_id == p.prompt_id and c.response_id not in lost]
        k = min(top_k, len(group) // 2)
        for reward in (R.sum_reward, R.mean_reward):
            assert reward(a) > reward(b)
            assert sum(reward(c) > reward(a) for c in group) < k, "chosen is in the top k"
            assert sum(reward(c) < reward(b) for c in group) < k, "rejected is in the bottom k"
    assert not {p.chosen_id for p in drawn + spare} & {p.rejected_id for p in drawn + spare}
    assert len({p.pair_id for p in drawn + spare}) == len(drawn + spare)
    per_prompt = Counter(p.prompt_id for p in drawn)
    assert all(n <= max_pairs for n in per_prompt.values()) and all(
        n <= top_k**2 for n in Counter(p.prompt_id for p in drawn + spare).values()
    )
    assert {*per_prompt, *(s.row_id for s in without)} == {c.prompt_id for c in candidates} and not {
        *per_prompt
    } & {s.row_id for s in without}


@quick
@given(st.lists(texts, max_size=12), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(1, 10))
def test_what_stays_is_distinct_and_what_goes_has_a_twin(texts, similarity, n):
    candidates = [candidate(i, text, 0.0) for i, text in enumerate(texts)]
    kept, set_aside = R.distinct_candidates(candidates, similarity, n)

    def like(a, b):
        return R.jaccard(R.ngrams_of(a.text, n), R.ngrams_of(b.text, n))

    assert len(kept) + len(set_aside) == len(candidates) and kept[:1] == candidates[:1]
    assert all(like(a, b) <= similarity for i, a in enumerate(kept) for b in kept[:i])
    of = {c.response_id: c for c in candidates}
    assert all(like(of[s.row_id], of[s.detail]) > similarity and of[s.detail] in kept for s in set_aside)


@quick
@given(candidate_lists, limits, st.sampled_from([0.0, 0.02, 0.3]))
def test_stage_accounts_for_everything_and_balances(tmp_path_factory, candidates, limit, tolerance):
    tmp = tmp_path_factory.mktemp("stage")
    write_table(tmp, "prompts", [Prompt(p, "", "", "What?") for p in "pqr"])
    write_table(tmp, "candidates-aligned", candidates)
    try:
        pairs = R.run_reward_pairs(
            tmp,
            tmp,
            tmp / "out",
            options=limited(limit, tolerance),
        ).read("pairs", Pair)
    except ValueError as e:
        assert "no pair is left" in str(e)
        return
    manifest = read_manifest(tmp / "out")
    for account, whole in (("candidates", "in"), ("prompts", "with candidates"), ("pairs", "possible")):
        assert manifest[account][whole] == sum(
            n for reason, n in manifest[account].items() if reason != whole
        ), account
    assert abs(length_gap(pairs)) <= max(tolerance, 1e-12) and pairs == read_table(tmp / "out", "pairs", Pair)
    assert all(n <= limit[1] for n in Counter(p.prompt_id for p in pairs).values())
    again = R.run_reward_pairs(
        tmp,
        tmp,
        tmp / "again",
        options=limited(limit, tolerance),
    ).read("pairs", Pair)
    assert again == pairs and read_manifest(tmp / "again")["tables"] == manifest["tables"]


# the official draft's rule, worked by hand (pull request 37 of RLHF-V/RLAIF-V, data_pair_builder.py and
# dpo_data_filter)


def test_ten_answers_top_3_and_bottom_3():
    """Sum and mean agree: the draft's top is 0 1 2, its bottom 7 8 9. The same answers here, but best meets
    worst (there: 0>7, 1>8, 2>9)."""
    drawn, spare, _ = R.reward_pairs_of(by_rank(10), 3, 3)
    assert numbers(drawn) == [(0, 9), (1, 8), (2, 7)]
    assert {a for a, _ in numbers(drawn + spare)} == {0, 1, 2} and {b for _, b in numbers(drawn + spare)} == {
        7,
        8,
        9,
    }
    assert numbers(R.reward_pairs_of(by_rank(10), 3, 2)[0]) == [(0, 9), (1, 8)]


def test_only_what_is_in_both_tops_is_chosen():
    """Sums 9 8 7 6 5 4 -1 -2 -3 -4. Answer 2 is long (70 tokens: 0.1 a token), 3 short (1: 6.0): by mean the
    top 3 is 3 0 1. In both: 0 1. Answer 9 is long (400: -0.01), so the bottom 3 by mean is 6 7 8, by sum 7 8
    9. In both: 7 8."""
    tokens = [10, 10, 70, 1, 10, 10, 10, 10, 10, 400]
    ten = [
        replace(candidate(i, f"answer {i}", reward), n_tokens=n)
        for i, (reward, n) in enumerate(zip([9, 8, 7, 6, 5, 4, -1, -2, -3, -4], tokens))
    ]
    top, bottom = R.top_and_bottom(ten, 3)
    assert [c.response_id for c in top] == ["p-00", "p-01"] and [c.response_id for c in bottom] == [
        "p-08",
        "p-07",
    ]


def test_fault_top_and_bottom_overlap():
    """Four answers, k = 3: the draft's top is 0 1 2, its bottom 1 2 3, and its pairs 0>1, 1>2, 2>3. Here k
    shrinks to 2."""
    assert numbers(R.reward_pairs_of(by_rank(4), 3, 3)[0]) == [(0, 3), (1, 2)]
    assert numbers(R.reward_pairs_of(by_rank(3), 3, 3)[0]) == [(0, 2)]
    assert R.reward_pairs_of(by_rank(1), 3, 3)[2] == "fewer than two distinct candidates"


def test_fault_short_texts_are_never_duplicates():
    """A text of fewer than 10 words has no 10-gram, so the draft keeps two equal ones; a pair could then hold
    the same text twice."""
    kept, twins = R.distinct_candidates([candidate(0, "A dog.", 1.0), candidate(1, "A dog.", -1.0)])
    assert len(kept) == 1 and twins == [SetAside("p-01", "near-duplicate", "p-00")]


def test_ten_gram_similarity_by_hand():
    """100 words have 91 10-grams; a changed last word changes one of them: 90 / 92 = 0.978 > 0.9. One in the
    middle changes ten: 81 / 101 = 0.80."""
    words = [f"w{i}" for i in range(100)]
    end, middle = words[:99] + ["x"], words[:50] + ["x"] + words[51:]
    assert R.jaccard(R.ngrams_of(" ".join(words), 10), R.ngrams_of(" ".join(end), 10)) == 90 / 92
    assert R.jaccard(R.ngrams_of(" ".join(words), 10), R.ngrams_of(" ".join(middle), 10)) == 81 / 101
    kept, _ = R.distinct_candidates(
        [candidate(i, " ".join(w), 0.0) for i, w in enumerate((words, end, middle))]
    )
    assert [c.response_id for c in kept] == ["p-00", "p-02"]


def test_fault_slices_of_ten_mix_prompts():
    """A lost candidate (here: empty) shifts all later slices of the draft; ours are grouped by prompt."""
    p, q = by_rank(10), [replace(c, prompt_id="q", response_id="q" + c.response_id[1:]) for c in by_rank(10)]
    usable, _ = R.usable_candidates([replace(p[0], text=" "), *p[1:], *q])
    drawn = R.draw_reward_pairs(usable, R.RewardPairOptions())[0]
    assert all(d.chosen_id[0] == d.rejected_id[0] == d.prompt_id for d in drawn) and numbers(drawn[:3]) == [
        (1, 9),
        (2, 8),
        (3, 7),
    ]


def test_fault_a_tie_is_no_preference():
    same = [candidate(i, f"answer {i}", 1.0) for i in range(6)]
    assert R.reward_pairs_of(same, 3, 3) == ([], [], "equal rewards")


def test_fault_balance_is_one_sided(tmp_path):
    """Chosen answers that are too short: the draft's mean difference is below 0.5 tokens, so it keeps the
    bias; ours brings the gap down."""
    write_table(tmp_path, "prompts", [Prompt(f"p{i}", "", "", "What?") for i in range(20)])

    def words(n, name):
        return " ".join(f"{name}{j}" for j in range(n))

    rows = [
        (
            candidate(0, words(20, "good"), 1.0, prompt_id=f"p{i}"),
            candidate(1, words(24 if i % 4 else 16, "bad"), -1.0, prompt_id=f"p{i}"),
        )
        for i in range(20)
    ]
    write_table(tmp_path, "candidates-aligned", [c for row in rows for c in row])
    loose = R.run_reward_pairs(
        tmp_path, tmp_path, tmp_path / "loose", options=R.RewardPairOptions(length_balance=False)
    ).read("pairs", Pair)
    kept = R.run_reward_pairs(tmp_path, tmp_path, tmp_path / "tight").read("pairs", Pair)
    assert length_gap(loose) < -0.05 and abs(length_gap(kept)) <= 0.02 and 0 < len(kept) < len(loose)
    assert read_manifest(tmp_path / "tight")["prompts"]["length balance"] == len(loose) - len(kept)


# what is refused


@pytest.mark.parametrize(
    "change", [{"policy_sum_logp": float("nan")}, {"reference_sum_logp": float("-inf")}, {"n_tokens": 0}]
)
def test_a_candidate_without_reward_is_named(change):
    with pytest.raises(ValueError, match="candidate p-01 has no reward"):
        R.usable_candidates([candidate(0, "a", 1.0), replace(candidate(1, "b", 1.0), **change)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: R.reward_pairs_of(by_rank(4), 0, 1),
        lambda: R.reward_pairs_of(by_rank(4), 1, 0),
        lambda: R.distinct_candidates(by_rank(4), 1.1),
        lambda: R.distinct_candidates(by_rank(4), 0.9, 0),
    ],
)
def test_senseless_limits_are_refused(call):
    with pytest.raises(ValueError, match="need "):
        call()


def test_tables_of_two_runs_are_refused(tmp_path):
    write_table(tmp_path, "prompts", [Prompt("q", "", "", "What?")])
    write_table(tmp_path, "candidates-aligned", by_rank(4))
    with pytest.raises(ValueError, match="prompt_id p is in no table"):
        R.run_reward_pairs(tmp_path, tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="candidates-aligned"):
        R.run_reward_pairs(tmp_path, tmp_path / "nothing", tmp_path / "out")


# 07 scores given responses


def test_given_responses_get_the_scores_of_sampled_candidates(tmp_path):
    """07 samples candidates of the aligned policy; the same texts, given as responses, get the same rewards,
    and nothing is sampled."""
    example, policy, adapter = (
        package_folder("data") / "example",
        "packaged:iconworld-vlm",
        "packaged:iconworld-aligned",
    )
    prompts = [
        replace(p, image_path=str(example / "prompts" / p.image_path))
        for p in read_table(example / "prompts", "prompts", Prompt)[:2]
    ]
    write_table(tmp_path, "prompts", prompts)
    run_guided_decoding(tmp_path, tmp_path / "sampled", policy, adapter, n_candidates=2, max_new_tokens=100)
    sampled = [c for c in read_candidates(tmp_path / "sampled") if c.policy == "aligned"]
    responses = [
        Response(c.response_id, c.prompt_id, i % 2, 0, c.text, c.finish_reason) for i, c in enumerate(sampled)
    ]
    empty = Response(response_id_of(prompts[0].prompt_id, 2), prompts[0].prompt_id, 2, 0, " ", "stop")
    write_table(tmp_path / "given", "responses", [*responses, empty])
    stage = run_guided_decoding(
        tmp_path, tmp_path / "scored", policy, adapter, responses=str(tmp_path / "given")
    )
    scored, manifest = read_candidates(tmp_path / "scored"), read_manifest(stage.path)

    def same(c):
        return c.response_id, c.text, c.n_tokens, c.finish_reason

    assert [same(c) for c in scored] == [same(c) for c in sampled]
    assert max(abs(R.sum_reward(a) - R.sum_reward(b)) for a, b in zip(scored, sampled)) < 1e-3
    assert (manifest["rows_in"], manifest["rows_out"], manifest["set_aside"]) == (5, 4, {"empty response": 1})
    assert "n_candidates" not in manifest["parameters"] and manifest["inputs"]["responses"]


def test_responses_to_other_prompts_are_refused():
    with pytest.raises(ValueError, match="response x-00: its prompt x is not in the prompts table"):
        given_ids([Prompt("p", "", "", "What?")], [Response("x-00", "x", 0, 0, "A dog.", "stop")])
    with pytest.raises(FileNotFoundError, match="candidates-aligned"):
        read_candidates("nowhere")


# in a recipe


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"feedback": ["reward"]}, "round 1 cannot be reward"),
        ({"feedback": ["claims", "rewards"]}, "feedback: unknown 'rewards'; did you mean reward"),
        ({"feedback": []}, "one word a round"),
        ({"feedback": ["claims"] * 3}, "not 3 for 2 rounds"),
        ({"feedback": "claims"}, "feedback must be a list"),
    ],
)
def test_feedback_of_a_recipe_is_checked(changes, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe("tiny", changes)


def test_a_reward_round_samples_scores_and_pairs_with_the_adapter_of_the_round_before():
    recipe = load_recipe("tiny", {"rounds": 4, "feedback": ["claims", "reward"]})
    steps = {s.out: s.parameters for s in plan_run(recipe)}
    for k in (2, 3, 4):
        assert [o.split("/")[1] for o in steps if o.startswith(f"round_{k}/")] == [
            "01_sampling",
            "07_guided_decoding",
            "04_reward_pairs",
            "05_dpo",
        ]
        scoring = steps[f"round_{k}/07_guided_decoding"]
        assert (
            str(scoring["adapter"]) == f"round_{k - 1}/05_dpo/adapter"
            and str(scoring["responses"]) == f"round_{k}/01_sampling"
        )
        assert str(steps[f"round_{k}/04_reward_pairs"]["candidates"]) == f"round_{k}/07_guided_decoding"
        assert str(steps[f"round_{k}/05_dpo"]["pairs"]) == f"round_{k}/04_reward_pairs"
    assert (
        str(steps["07_guided_decoding"]["adapter"]) == "round_4/05_dpo/adapter"
        and "responses" not in steps["07_guided_decoding"]
    )
    assert {k: v for k, v in steps.items() if k.startswith("round_1/")} == {
        s.out: s.parameters for s in plan_run(load_recipe("tiny", {"rounds": 4})) if s.round == 1
    }, "round 1 is what it was"
    assert chain_parameters(recipe, "05_dpo", 1)["pairs"].parts == ("round_1", "04_pairs")


def test_restart_tells_the_scoring_of_a_round_from_the_last_step():
    steps = plan_run(load_recipe("tiny", {"feedback": ["claims", "reward"]}))
    assert [steps[first_remade(steps, "07_guided_decoding", k)].out for k in (0, 2)] == [
        "07_guided_decoding",
        "round_2/07_guided_decoding",
    ]
    with pytest.raises(RecipeError, match="there is no round 1"):
        first_remade(steps, "04_reward_pairs", 1)


def test_parameters_of_reward_pairs_are_checked_against_the_notebook():
    recipe = load_recipe(
        "tiny", {"feedback": ["claims", "reward"], "parameters": {"04_reward_pairs": {"top_k": 2}}}
    )
    assert check_recipe(recipe, package_folder("nbs")).parameters["04_reward_pairs"] == {"top_k": 2}
    for change, says in (
        ({"04_reward_pairs": {"topk": 2}}, "did you mean top_k"),
        ({"07_guided_decoding": {"responses": "x"}}, "set by the chain itself"),
    ):
        with pytest.raises(RecipeError, match=says):
            check_recipe(
                load_recipe("tiny", {"feedback": ["claims", "reward"], "parameters": change}),
                package_folder("nbs"),
            )


def test_a_step_knows_its_candidates_by_their_tables(tmp_path):
    """What else lies in 07's folder (its notebook, opened and saved) does not change what 04_reward_pairs was
    made from."""
    from rlaifv_nb.runner.chain import content_sha

    write_table(tmp_path, "candidates-aligned", by_rank(3))
    before = content_sha("candidates", tmp_path, 2)
    write_json(tmp_path / "step.json", {"seconds": 1})
    assert before and content_sha("candidates", tmp_path, 2) == before
    write_table(tmp_path, "candidates-aligned", by_rank(4))
    assert content_sha("candidates", tmp_path, 2) != before


def test_report_shows_pairs_that_the_reward_made_and_claims_no_missing_feedback(tmp_path):
    from rlaifv_nb.iconworld.world import write_prompts
    from rlaifv_nb.runner.report import write_report

    write_prompts(tmp_path / "prompts", {"train": 1})
    prompt_id = read_table(tmp_path / "prompts", "prompts", Prompt)[0].prompt_id
    texts = ("There is a red bus on the left.", "There is a blue cat on the right.")
    ids = [response_id_of(prompt_id, i) for i in (0, 1)]
    for k, stage in ((1, "04_pairs"), (2, "04_reward_pairs")):
        write_table(
            tmp_path / f"round_{k}/01_sampling",
            "responses",
            [Response(i, prompt_id, n, 0, texts[n], "stop") for n, i in enumerate(ids)],
        )
        write_table(
            tmp_path / f"round_{k}" / stage, "pairs", [Pair("a", prompt_id, *ids, *texts, 0.042, -0.017)]
        )
    write_text(tmp_path / "recipe.yaml", "name: x\nrounds: 2\ndescription: y\nfeedback: [claims, reward]\n")
    page = write_report(tmp_path).read_text()
    assert "Feedback in round 1" in page and "Feedback in round 2" not in page
    assert page.count("chosen (score 0.042)") == 1, "round 2's pair; round 1's waits for its verdicts"
    assert "no verdicts-*.jsonl in round_1/03_feedback" in page and "round_2/03_feedback" not in page
