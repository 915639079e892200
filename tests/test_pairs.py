"""Preference pairs: scores, draws, length balance and accounts."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rlaifv_nb import pairs as P
from rlaifv_nb.records import (
    Claim,
    Pair,
    Prompt,
    Response,
    SetAside,
    Verdict,
    prompt_id_of,
    read_manifest,
    read_table,
    response_id_of,
    sha256_of,
    write_table,
)

quick = settings(max_examples=60, deadline=None, database=None)
LABELS = {"y": "yes", "n": "no", "a": "abstain"}


def answer(prompt_id, index, text, letters, finish_reason="stop"):
    """A response with one claim a letter; `?` is a claim without verdict."""
    r = Response(response_id_of(prompt_id, index), prompt_id, index, 0, text, finish_reason)
    claims = [
        Claim(f"{r.response_id}-{i:02d}", r.response_id, "claim", "question?") for i in range(len(letters))
    ]
    return (
        r,
        claims,
        [Verdict(c.claim_id, 0.5, 0.5, LABELS[x]) for c, x in zip(claims, letters) if x in LABELS],
    )


def tables_of(answers):
    """Three tables from several answers."""
    return [
        [row for rows in part for row in (rows if isinstance(rows, list) else [rows])]
        for part in zip(*answers)
    ]


def pair(index, chosen, rejected, prompt_id="p"):
    """A pair whose answers have so many words."""
    return Pair(
        f"{prompt_id}-{index:03d}",
        prompt_id,
        f"c{index}",
        f"r{index}",
        "word " * chosen,
        "other " * rejected,
        0.0,
        -1.0,
    )


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=30)
pair_lists = lengths.map(lambda rows: [pair(i, c, r, f"p{i % 5}") for i, (c, r) in enumerate(rows)])


# scores


def test_score_counts_rejected_claims_only():
    responses, claims, verdicts = tables_of(
        [answer("p", 0, "A.", "yyy"), answer("p", 1, "B.", "ynan"), answer("p", 2, "C.", "aa")]
    )
    assert P.score_responses(responses, claims, verdicts) == ({"p-00": 0.0, "p-01": -2.0, "p-02": 0.0}, [])


@pytest.mark.parametrize(
    "row, reason",
    [
        (answer("p", 0, "  \n", "y"), "empty response"),
        (answer("p", 0, "Cut of", "yn", "length"), "truncated"),
        (answer("p", 0, "How nice.", ""), "no claims"),
        (answer("p", 0, "A dog.", "y?"), "missing verdict"),
    ],
)
def test_unusable_response_is_set_aside_and_never_paired(row, reason):
    responses, claims, verdicts = tables_of([row, answer("p", 1, "A cat.", "nn")])
    scores, set_aside = P.score_responses(responses, claims, verdicts)
    assert [(s.row_id, s.reason) for s in set_aside] == [("p-00", reason)] and scores == {"p-01": -2.0}
    assert P.candidate_pairs(responses, scores) == ([], [])


def test_unknown_label_is_refused():
    responses, claims, verdicts = tables_of([answer("p", 0, "A.", "y")])
    with pytest.raises(ValueError, match="not No"):
        P.score_responses(responses, claims, [replace(verdicts[0], label="No")])


def test_equal_questions_stay_two_claims():
    responses, claims, verdicts = tables_of([answer("p", 0, "A dog and a dog.", "nn")])
    assert claims[0].question == claims[1].question and P.score_responses(responses, claims, verdicts)[0] == {
        "p-00": -2.0
    }


# scores of one's own, and why there are no pairs


def scored(*rows):
    """Responses and scores from (prompt, score) pairs; a score of None is an unusable answer."""
    responses = [
        Response(response_id_of(p, i), p, i, 0, f"text {i}", "stop") for i, (p, _) in enumerate(rows)
    ]
    return responses, {r.response_id: score for r, (_, score) in zip(responses, rows) if score is not None}


@pytest.mark.parametrize("least, n", [(0.1, 3), (0.2, 1), (0.21, 0), (1.0, 0)])
def test_fractional_scores_need_a_smaller_difference(least, n):
    """0.3 - 0.2 is a little less than 0.1 in floating point, and counts."""
    responses, scores = scored(("p", 0.1), ("p", 0.2), ("p", 0.3))
    pairs, _ = P.candidate_pairs(responses, scores, least)
    assert len(pairs) == n == P.compare_scores(responses, scores, least)["comparisons"]["candidates"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_never_decides(score):
    responses, scores = scored(("p", 0.0), ("p", score))
    for function in (P.candidate_pairs, P.compare_scores):
        with pytest.raises(ValueError, match="response p-01 has the score"):
            function(responses, scores)


@pytest.mark.parametrize("least", [0.0, -1.0, float("nan")])
def test_equal_scores_are_never_a_pair(least):
    with pytest.raises(ValueError, match="must be more than 0"):
        P.candidate_pairs(*scored(("p", 0.0), ("p", 0.0)), least)


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.sampled_from([None, 0.0, -0.25, -0.5, -1.0, -2.0])), max_size=12
    ),
    st.sampled_from([0.25, 0.5, 1.0]),
)
def test_every_comparison_and_every_prompt_is_counted_once(rows, least):
    responses, scores = scored(*rows)
    found = P.compare_scores(responses, scores, least)
    for account in (found["comparisons"], found["prompts"]):
        assert account["in"] == sum(n for reason, n in account.items() if reason != "in")
    pairs, aside = P.candidate_pairs(responses, scores, least)
    assert found["comparisons"]["candidates"] == len(pairs) + len(aside)
    assert found["prompts"]["in"] == len({p for p, _ in rows}) and found["prompts"]["candidates"] == len(
        {p.prompt_id for p in pairs}
    )
    gaps = [
        abs(scores[a.response_id] - scores[b.response_id])
        for a, b in combinations(responses, 2)
        if a.prompt_id == b.prompt_id and {a.response_id, b.response_id} <= set(scores)
    ]
    assert found["largest_difference"] == max(gaps, default=0.0)


@pytest.mark.parametrize(
    "rows, least, says",
    [
        (
            [("p", None), ("p", 0.0), ("q", None)],
            1.0,
            "No prompt has two usable answers .*1 no usable answer, 1 one usable answer.* "
            "01_sampling.n_samples",
        ),
        ([("p", -1.0), ("p", -1.0)], 1.0, "All 1 comparisons .* equal scores"),
        (
            [("p", 0.2), ("p", 0.6), ("p", 0.6)],
            1.0,
            "Of 3 comparisons .* 1 are of equal scores and 2 differ by less than min_difference=1, at most "
            "by 0.4: lower",
        ),
    ],
)
def test_why_no_pair_names_the_reason_and_the_key(rows, least, says):
    responses, scores = scored(*rows)
    unscored = [SetAside(r.response_id, "truncated") for r in responses if r.response_id not in scores]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(
            P.why_no_pair(
                len(responses), unscored, P.compare_scores(responses, scores, least), 0, [], least, 0.02
            )
        )


def test_warnings_name_what_will_not_teach():
    responses, scores = scored(*[("p", 0.0), ("p", -1.0)], *[(q, 0.0) for q in "qrsqrs"])
    compared, pairs = P.compare_scores(responses, scores), [pair(i, 10, 10) for i in range(4)]
    aside = [SetAside(f"x-{i}", "truncated") for i in range(3)]
    (few,) = P.pair_warnings(8, [], compared, pairs, pairs, 0.02)
    assert few.startswith("Only 1 of 4 prompts have a pair (of the others: 3 equal scores)")
    many, _ = P.pair_warnings(8, aside, compared, pairs, pairs, 0.02)
    assert (
        "3 of 8 answers (38%) have no score: 3 truncated. Likely reason: they reach the token limit: raise "
        "01_sampling.max_new_tokens" in many
    )
    all_with = compared | {"prompts": compared["prompts"] | {"in": 1}}
    assert P.pair_warnings(20, aside, all_with, pairs, pairs, 0.02) == []
    (dropped,) = P.pair_warnings(8, [], all_with, pairs, pairs[:3], 0.02)
    assert "dropped 1 of 4 pairs" in dropped
    (shorter,) = P.pair_warnings(8, [], all_with, [pair(0, 8, 10)], [pair(0, 8, 10)], 0.02)
    assert "20% shorter" in shorter and "length_balance is off" in shorter


# candidates and draw


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from("pq"), st.integers(-3, 0), st.sampled_from(["a", "b", "c d", "e"])),
        max_size=12,
    ),
    st.randoms(),
)
def test_candidates_are_right_complete_and_independent_of_order(rows, rng):
    responses = [Response(response_id_of(p, i), p, i, 0, text, "stop") for i, (p, _, text) in enumerate(rows)]
    scores = {r.response_id: float(score) for r, (_, score, _) in zip(responses, rows)}
    found, set_aside = P.candidate_pairs(responses, scores)
    n_different = sum(
        a.prompt_id == b.prompt_id and scores[a.response_id] != scores[b.response_id]
        for a, b in combinations(responses, 2)
    )
    assert len(found) + len(set_aside) == n_different
    assert all(p.chosen_score > p.rejected_score and p.chosen != p.rejected for p in found)
    assert (
        len({(p.prompt_id, p.chosen, p.rejected) for p in found})
        == len({p.pair_id for p in found})
        == len(found)
    )
    rng.shuffle(responses)
    assert P.candidate_pairs(responses, scores) == (found, set_aside)


@quick
@given(pair_lists, st.integers(1, 4), st.integers(0, 5), st.randoms())
def test_draw_takes_k_of_each_prompt_whatever_the_order(rows, k, seed, rng):
    sampled, spare = P.sample_pairs(rows, k, seed, 1)
    assert Counter(p.prompt_id for p in sampled) == {
        q: min(k, n) for q, n in Counter(p.prompt_id for p in rows).items()
    }
    assert sorted(p.pair_id for p in sampled + spare) == sorted(p.pair_id for p in rows)
    shuffled = rng.sample(rows, len(rows))
    assert P.sample_pairs(shuffled, k, seed, 1) == (sampled, spare)
    alone = [p for p in rows if p.prompt_id == "p0"]
    assert P.sample_pairs(alone, k, seed, 1)[0] == [p for p in sampled if p.prompt_id == "p0"], (
        "other prompts must not matter"
    )


def test_draw_depends_on_seed_and_round():
    rows = [pair(i, 5, 5) for i in range(20)]
    draws = {
        tuple(p.pair_id for p in P.sample_pairs(rows, 2, seed, round)[0])
        for seed in range(5)
        for round in range(5)
    }
    assert len(draws) > 15
    with pytest.raises(ValueError, match="at least one"):
        P.sample_pairs(rows, 0, 0, 1)
    with pytest.raises(ValueError, match="choose one of random, extremes"):
        P.sample_pairs(rows, 1, 0, 1, "best")


@quick
@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.integers(-5, 0)), min_size=2, max_size=12),
    st.integers(1, 4),
    st.randoms(),
)
def test_extremes_differ_most_and_use_no_response_twice(scored, k, rng):
    responses = [
        Response(response_id_of(p, i), p, i, 0, f"text {i}", "stop") for i, (p, _) in enumerate(scored)
    ]
    rows, _ = P.candidate_pairs(
        responses, {r.response_id: float(score) for r, (_, score) in zip(responses, scored)}
    )

    def gap(p):
        return p.chosen_score - p.rejected_score

    sampled, spare = P.sample_pairs(rows, k, 0, 1, "extremes")
    assert sorted(p.pair_id for p in sampled + spare) == sorted(p.pair_id for p in rows)
    for prompt_id in {p.prompt_id for p in rows}:
        own, rest = ([p for p in part if p.prompt_id == prompt_id] for part in (sampled, spare))
        used = [i for p in own for i in (p.chosen_id, p.rejected_id)]
        assert 1 <= len(own) <= k and len(used) == len(set(used))
        assert gap(own[0]) == max(map(gap, own + rest))
        assert len(own) == k or all({p.chosen_id, p.rejected_id} & set(used) for p in rest), (
            "stopped before it had to"
        )
    assert P.sample_pairs(rng.sample(rows, len(rows)), k, 5, 3, "extremes")[0] == sampled, (
        "neither order, seed nor round matter"
    )


# length


@quick
@given(pair_lists, st.integers(0, 15), st.sampled_from([0.0, 0.02, 0.2]), st.randoms())
def test_balance_reaches_tolerance_on_both_sides(rows, n_spare, tolerance, rng):
    spare, used = rows[:n_spare], rows[n_spare:]
    kept, dropped, n_exchanged = P.balance_lengths(used, spare, tolerance)
    assert abs(P.length_gap(kept)) <= max(tolerance, 1e-12), "the gap"
    assert abs(P.length_gap(kept)) <= abs(P.length_gap(used)) or not used
    assert len(kept) + len(dropped) == len(used) and {p.pair_id for p in kept + dropped} <= {
        p.pair_id for p in rows
    }
    assert len({p.pair_id for p in kept + dropped}) == len(used) and n_exchanged <= len(spare)
    per_prompt = Counter(p.prompt_id for p in used)
    assert all(n <= per_prompt[q] for q, n in Counter(p.prompt_id for p in kept).items()), (
        "an exchange stays with its prompt"
    )
    shuffled = P.balance_lengths(rng.sample(used, len(used)), rng.sample(spare, len(spare)), tolerance)
    assert shuffled[0] == kept and shuffled[2] == n_exchanged
    mirrored = P.drop_to_balance(kept, tolerance)
    assert mirrored == (kept, []), "what is balanced stays"


@quick
@given(st.lists(st.tuples(st.integers(8, 14), st.integers(8, 12)), min_size=1, max_size=7))
def test_drops_are_few(rows):
    """Tiny tables are the hard case: the last drop may tip the balance over. Even there at most two drops
    more than the best choice."""
    rows = [pair(i, c, r) for i, (c, r) in enumerate(rows)]

    def balanced(kept):
        return abs(P.length_gap(kept)) <= 0.1

    best = next(
        n for n in range(len(rows) + 1) if any(balanced(c) for c in combinations(rows, len(rows) - n))
    )
    assert best <= len(P.drop_to_balance(rows, 0.1)[1]) <= best + 2


@pytest.mark.parametrize("sign", [1, -1])
def test_drops_are_the_fewest_where_the_last_does_not_tip_over(sign):
    rows = [pair(i, 20 + sign * d, 20) for i, d in enumerate((9, 8, 7, 3, 2, 1, 0, 0, -1, -2, -3))]
    kept, dropped = P.drop_to_balance(rows, 0.02)
    fewer = [c for c in combinations(rows, len(kept) + 1) if abs(P.length_gap(c)) <= 0.02]
    assert len(dropped) == 3 and fewer == []


def test_exchange_saves_pairs():
    biased = [pair(i, 5, 10, f"q{i}") for i in range(10)]
    spare = [pair(100 + i, 10, 10, f"q{i}") for i in range(8)]
    assert len(P.balance_lengths(biased)[0]) == 0
    kept, dropped, n_exchanged = P.balance_lengths(biased, spare)
    assert (len(kept), len(dropped), n_exchanged) == (8, 2, 8)


def test_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        P.balance_lengths([pair(0, 5, 5)], tolerance=-0.1)


def test_length_gap_by_hand():
    assert P.length_gap([]) == 0.0
    assert P.length_gap([pair(0, 6, 10), pair(1, 10, 10)]) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "rows, n_kept, ratio",
    [
        ([(10, 10), (12, 10), (8, 10)], 3, 0.2),  # r = 0.18 drops the 8: gap 0.1; r = 0.2 keeps all: gap 0
        ([(5, 10), (9, 10), (11, 10)], 2, 0.1),  # r = 0 keeps one: 0.1; r = 0.1 keeps 9 and 11: 0
        ([(12, 10), (15, 10)], 2, 0.0),  # one-sided: chosen too long stays, at the smallest ratio
        ([(1, 100), (100, 100)], 1, 0.0),  # 0.99 is above the last ratio: that pair is always dropped
    ],
)
def test_official_filter_by_hand(rows, n_kept, ratio):
    kept, r = P.official_length_filter([pair(i, c, j) for i, (c, j) in enumerate(rows)])
    assert len(kept) == n_kept and r == pytest.approx(ratio)


def test_official_filter_drops_equal_texts_and_refuses_nothing_left():
    same = replace(pair(0, 5, 5), rejected="word " * 5)
    assert P.official_length_filter([same, pair(1, 5, 5)])[0] == [pair(1, 5, 5)]
    with pytest.raises(ValueError, match="no ratio"):  # where the official code divides by zero
        P.official_length_filter([same, pair(1, 5, 0)])


# the stage


@pytest.fixture
def stage(tmp_path):
    """Folders of the four tables: six prompts with five answers each, some of them unusable."""
    prompts, answers = [], []
    (tmp_path / "prompts").mkdir()
    for n in range(6):
        Image.new("RGB", (12, 8), (40 * n, 90, 120)).save(tmp_path / f"prompts/{n}.png")
        sha = sha256_of((tmp_path / f"prompts/{n}.png").read_bytes())
        p = Prompt(prompt_id_of(sha, "What?"), f"{n}.png", sha, "What?", "by hand", "dev")
        prompts.append(p)
        answers += [
            answer(p.prompt_id, i, f"answer {n} " + "long " * i, letters)
            for i, letters in enumerate(("yy", "yn", "nnn", "", "ya"))
        ]
    for name, rows in zip(("prompts", "responses", "claims", "verdicts"), (prompts, *tables_of(answers))):
        write_table(tmp_path / name, name, rows)
    return tmp_path


def run(folder, out="out", **settings):
    return P.run_pairs(
        *(folder / t for t in ("prompts", "responses", "claims", "verdicts")),
        folder / out,
        options=P.PairOptions(**settings),
    ).read("pairs", Pair)


def test_run_accounts_for_every_row(stage):
    rows, manifest = run(stage, length_tolerance=0.05), read_manifest(stage / "out")
    assert rows == read_table(stage / "out", "pairs", Pair)
    set_aside = read_table(stage / "out", "set_aside-pairs", SetAside)
    assert manifest["rows_in"] == 30 and manifest["rows_out"] == len(rows) > 0
    assert manifest["responses"] == {"in": 30, "scored": 24, "no claims": 6}
    assert manifest["verdicts"] == {"abstain": 6, "no": 24, "yes": 24}
    assert manifest["scores"]["comparisons"] == {
        "in": 36,
        "equal scores": 6,
        "difference too small": 0,
        "candidates": 30,
    }
    assert manifest["scores"]["largest_difference"] == 3.0 and all(
        isinstance(w, str) for w in manifest["warnings"]
    )
    for account, whole in ((manifest["responses"], "in"), (manifest["pairs"], "candidates")):
        assert account[whole] == sum(n for reason, n in account.items() if reason != whole)
    assert manifest["set_aside"] == Counter(s.reason for s in set_aside)
    assert abs(P.length_gap(rows)) <= 0.05 and max(Counter(p.prompt_id for p in rows).values()) <= 2
    assert all(
        p.pair_id == P.pair_id_of(p.prompt_id, int(p.chosen_id[-2:]), int(p.rejected_id[-2:])) for p in rows
    )


def test_run_is_deterministic_under_row_order_and_comes_back_when_done(stage):
    rows = run(stage, length_balance=False)
    written = (stage / "out/manifest.json").read_bytes()
    assert run(stage, length_balance=False) == rows and (stage / "out/manifest.json").read_bytes() == written
    for name, record in (("responses", Response), ("claims", Claim), ("verdicts", Verdict)):
        write_table(stage / name, name, read_table(stage / name, name, record)[::-1])
    assert run(stage, "again", length_balance=False) == rows
    with pytest.raises(ValueError, match="other settings"):
        run(stage, length_balance=True)


def test_run_without_any_difference_is_refused_with_a_remedy(stage):
    verdicts = read_table(stage / "verdicts", "verdicts", Verdict)
    write_table(stage / "verdicts", "verdicts", [replace(v, label="abstain") for v in verdicts])
    with pytest.raises(
        ValueError,
        match="no pair is left of 30 answers to 6 prompts.* All 36 comparisons .* are of equal scores"
        ".*01_sampling.n_samples",
    ):
        run(stage)
    assert (
        not (stage / "out/manifest.json").exists()
        and len(read_table(stage / "out", "set_aside-pairs", SetAside)) == 6
    )


def test_run_without_a_balanced_pair_names_the_tolerance(stage):
    """Every better answer is the shorter one: no exchange and no choice of pairs can balance that."""
    answers = [
        answer(p.prompt_id, i, "word " * (5 + 5 * i), "n" * i + "y")
        for p in read_table(stage / "prompts", "prompts", Prompt)
        for i in range(2)
    ]
    for name, rows in zip(("responses", "claims", "verdicts"), tables_of(answers)):
        write_table(stage / name, name, rows)
    with pytest.raises(
        ValueError,
        match="length balance dropped all 6 .* 50% shorter .* raise 04_pairs.length_tolerance .now 0.02.",
    ):
        run(stage)
    rows = run(stage, "off", length_balance=False)
    assert len(rows) == 6 and "50% shorter" in read_manifest(stage / "off")["warnings"][0]


def test_a_larger_difference_is_asked_for(stage):
    assert {
        p.chosen_score - p.rejected_score for p in run(stage, length_balance=False, min_difference=3.0)
    } == {3.0}
    with pytest.raises(ValueError, match="at most by 3: lower 04_pairs.min_difference"):
        run(stage, "none", min_difference=4.0)


def test_prompt_ids_may_be_any_text(stage):
    """Ids come from other people's tables: numbers, spaces, slashes, dashes, umlauts."""
    names = ["7", "photo 1/left", "größe-00", "a-00-01", "z#?&<b>", "x" * 300]
    prompts = read_table(stage / "prompts", "prompts", Prompt)
    new = dict(zip([p.prompt_id for p in prompts], names))
    answers = [
        answer(name, i, f"answer {name} " + "long " * i, letters)
        for name in names
        for i, letters in enumerate(("yy", "yn", "nnn"))
    ]
    tables = zip(
        ("prompts", "responses", "claims", "verdicts"),
        ([replace(p, prompt_id=new[p.prompt_id]) for p in prompts], *tables_of(answers)),
    )
    for name, rows in tables:
        write_table(stage / name, name, rows)
    rows = run(stage, length_balance=False)
    assert {p.prompt_id for p in rows} == set(names) and len({p.pair_id for p in rows}) == len(rows) == 12


@pytest.mark.parametrize(
    "table, record, change, message",
    [
        (
            "responses",
            Response,
            lambda rows: [replace(rows[0], prompt_id="other"), *rows[1:]],
            "prompt_id other is in no table",
        ),
        (
            "claims",
            Claim,
            lambda rows: [replace(rows[0], response_id="other"), *rows[1:]],
            "response_id other is in no table",
        ),
        (
            "verdicts",
            Verdict,
            lambda rows: [replace(rows[0], claim_id="other"), *rows[1:]],
            "claim_id other is in no table",
        ),
        ("verdicts", Verdict, lambda rows: rows + rows[:1], "occurs twice"),
        ("prompts", Prompt, lambda rows: rows + rows[:1], "occurs twice"),
    ],
)
def test_run_refuses_tables_that_do_not_belong_together(stage, table, record, change, message):
    write_table(stage / table, table, change(read_table(stage / table, table, record)))
    with pytest.raises(ValueError, match=message):
        run(stage)


def test_import_is_light():
    """Neither torch nor `datasets` is needed to make pairs."""
    import subprocess

    heavy = "{'torch', 'datasets', 'transformers'}"
    code = f"import sys, rlaifv_nb.pairs; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
