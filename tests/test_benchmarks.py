"""Benchmarks on the icon world: answer files written wrong on purpose score what counting by hand says; and
intervals keep their promise.
"""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaifv_nb.benchmarks.amber import (
    AmberWords,
    amber_figures,
    amber_table,
    count_amber_answers,
    count_amber_descriptions,
    description_figures,
    read_amber_annotations,
    read_amber_answers,
)
from rlaifv_nb.benchmarks.halbench import coco_words, count_mentions, mention_figures, text_mentions
from rlaifv_nb.benchmarks.intervals import (
    average_repeats,
    compare_models,
    figure_intervals,
    judge_agreement,
    kappa_of,
    middle,
    minimum_detectable_difference,
    sum_counts,
)
from rlaifv_nb.benchmarks.mmhal import count_ratings, rating_figures
from rlaifv_nb.benchmarks.pope import count_pope_answers, pope_figures
from rlaifv_nb.benchmarks.protocol import read_json_rows, require_ids
from rlaifv_nb.benchmarks.reading import simple_lemmas
from rlaifv_nb.benchmarks.refomb import count_preferences, preference_figures, read_preference
from rlaifv_nb.benchmarks.tables import compare_published, read_published
from rlaifv_nb.iconworld.world import OBJECTS, make_scene

SCENES = [make_scene("dev", i) for i in range(3)]
# Scene 0: chair, clock, door, cat. Scene 1: lamp, clock, bed. Scene 2: plane, sun, umbrella, star.
CAPTIONS = [
    # 4 mentions, 2 of an absent dog; 2 of 4 objects covered
    "There are two black chairs and a dog. The dog sits by a clock.",
    "A lamp, two clocks and three beds.",  # 3 mentions, all right; 3 of 3 covered
    "How lovely.",
]  # nothing; 0 of 4 covered
QUESTIONS = [
    ("discriminative-hallucination", "no", "No"),  # right
    ("discriminative-hallucination", "no", "yes"),  # wrong
    ("discriminative-attribute-state", "yes", "Yes"),  # right
    ("discriminative-attribute-state", "no", "no"),  # right, but not for the official script
    ("discriminative-attribute-number", "yes", "No"),  # wrong
    ("relation", "no", "Both."),  # unread
    ("relation", "yes", "Yes, it is."),
]  # right, but not for the official script


def save(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_the_scenes_are_those_that_were_counted():
    assert [" ".join(g.object for g in s.groups) for s in SCENES] == [
        "chair clock door cat",
        "lamp clock bed",
        "plane sun umbrella star",
    ]


def test_amber_by_hand(tmp_path):
    described = [
        {"id": i + 1, "type": "generative", "truth": [g.object for g in s.groups], "hallu": ["dog", "bus"]}
        for i, s in enumerate(SCENES)
    ]
    asked = [{"id": 4 + i, "type": type, "truth": truth} for i, (type, truth, _) in enumerate(QUESTIONS)]
    texts = CAPTIONS + [answer for *_, answer in QUESTIONS]
    answers = read_amber_answers(
        save(tmp_path / "answers.json", [{"id": i + 1, "response": t} for i, t in enumerate(texts)])
    )
    annotations = read_amber_annotations(save(tmp_path / "annotations.json", described + asked))
    require_ids(answers, annotations)
    sums = sum_counts(
        count_amber_descriptions(answers, annotations, AmberWords({o: [] for o in OBJECTS}, frozenset()))
    )
    assert description_figures(sums) == {
        "CHAIR": 100 * 2 / 7,
        "Cover": 100 * 5 / 11,
        "Hal": 100 / 3,
        "Cog": 100 / 6,
    }
    assert description_figures(sums, "official") == {
        "CHAIR": 28.6,
        "Cover": 45.5,
        "Hal": 33.4,
        "Cog": 16.7,
    }  # 33.3, but for the 0.001
    clean, official = (
        amber_figures(sum_counts(count_amber_answers(answers, annotations, mode)), mode)
        for mode in ("clean", "official")
    )
    assert clean["all accuracy"] == pytest.approx(100 * 4 / 7) and clean["all unread"] == pytest.approx(
        100 / 7
    )
    assert (
        clean["all precision"] == pytest.approx(100 * 2 / 3)
        and clean["all recall"] == 50
        and clean["all F1"] == pytest.approx(100 * 4 / 7)
    )
    assert (
        clean["state accuracy"] == 100
        and clean["number precision"] == 0
        and clean["relation accuracy"] == 50
        and "action F1" not in clean
    )
    assert (
        official["all accuracy"] == 28.6
        and official["all precision"] == 50.0
        and official["all recall"] == 25.0
        and official["all F1"] == 33.3
    )
    assert official["attribute accuracy"] == 33.3 and official["action F1"] == 0
    assert "| existence | 50.0 | 100.0 | 50.0 | 66.7 | 100.0 |" in amber_table(answers, annotations)


def test_halbench_by_hand():
    coco = coco_words([*OBJECTS, "hot dog"])
    answers, truth = (
        dict(enumerate(CAPTIONS)),
        {i: {g.object for g in s.groups} for i, s in enumerate(SCENES)},
    )
    mentions = {i: text_mentions(text, coco) for i, text in answers.items()}
    clean, official = (
        mention_figures(sum_counts(count_mentions(answers, mentions, truth, mode)), mode)
        for mode in ("clean", "official")
    )
    assert clean == pytest.approx(
        {
            "response": 50,
            "mention": 100 / 6,
            "recall": 500 / 11,
            "response over all": 100 / 3,
            "with object": 200 / 3,
            "words": (14 + 7 + 2) / 3,
        }
    )
    assert (
        official["CHAIRi"] == 2 / 7
        and official["CHAIRs_refine"] == 1 / 2
        and official["coco_word_count"] == 5
    )
    assert simple_lemmas("Hot dogs!", {"dog"}) == ["hot", "dog"] and text_mentions("Hot dogs!", coco) == [
        ("hot dog", "hot dog")
    ]


def test_a_description_that_says_nothing_has_no_rate_but_covers_nothing():
    figures = mention_figures(sum_counts(count_mentions({0: ""}, {0: []}, {0: {"cat"}})))
    assert (
        np.isnan(figures["response"])
        and np.isnan(figures["mention"])
        and figures["recall"] == figures["with object"] == figures["words"] == 0
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["Yes", "No", "no.", "YES", "maybe", ""])),
        min_size=1,
        max_size=40,
    )
)
def test_clean_figures_equal_counting_one_by_one(rows):
    read = {"Yes": "yes", "YES": "yes", "No": "no", "no.": "no"}
    pairs = [(truth, read.get(text)) for truth, text in rows]
    annotations = {i: {"type": "relation", "truth": t} for i, (t, _) in enumerate(rows)}
    amber = amber_figures(
        sum_counts(count_amber_answers({i: text for i, (_, text) in enumerate(rows)}, annotations))
    )
    pope = pope_figures(
        sum_counts(
            count_pope_answers(
                {i: text for i, (_, text) in enumerate(rows)}, {i: t for i, (t, _) in enumerate(rows)}
            )
        )
    )
    for figures, positive, prefix in ((amber, "no", "all "), (pope, "yes", "")):
        hit, said, true = (
            pairs.count((positive, positive)),
            sum(s == positive for _, s in pairs),
            sum(t == positive for t, _ in pairs),
        )
        assert figures[f"{prefix}accuracy"] == pytest.approx(100 * sum(t == s for t, s in pairs) / len(pairs))
        assert figures[f"{prefix}unread"] == pytest.approx(
            100 * sum(s is None for _, s in pairs) / len(pairs)
        )
        if said and true:
            assert figures[f"{prefix}precision"] == pytest.approx(100 * hit / said) and figures[
                f"{prefix}recall"
            ] == pytest.approx(100 * hit / true)
            assert figures[f"{prefix}F1"] == pytest.approx(200 * hit / (said + true))


@settings(max_examples=40)
@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=30))
def test_a_fair_judge_gives_the_same_in_both_orders_and_a_swap_turns_it_round(marks):
    turned, types = {"A": "B", "B": "A", "C": "C"}, dict.fromkeys(range(len(marks)), "OCR")
    second, first = (
        {i: f"[[{m}]]" for i, m in enumerate(row)} for row in (marks, [turned[m] for m in marks])
    )
    one, both, other = (
        preference_figures(sum_counts(count_preferences(a, types, b)))
        for a, b in ((second, None), (second, first), (first, second))
    )
    assert (
        both["win"] == one["win"]
        and both["consistent"] == 100
        and other["win"] == pytest.approx(100 - both["win"])
    )


def test_unread_judgements_stay_visible():
    texts = ["Rating: 6"] * 48 + ["I refuse."] * 48
    clean, official = (
        rating_figures(sum_counts(count_ratings(texts, mode=mode)), mode) for mode in ("clean", "official")
    )
    assert (clean["score"], clean["hallucination"], clean["unread"]) == (6, 0, 50) and (
        official["score"],
        official["hallucination"],
    ) == (3.0, 0.5)
    silent = rating_figures(sum_counts(count_ratings(["I refuse."] * 96)))
    assert np.isnan(silent["score"]) and silent["unread"] == 100
    figures = preference_figures(sum_counts(count_preferences({1: "[[B]]", 2: "?"}, {1: "OCR", 2: "OCR"})))
    assert figures["win"] == 100 and figures["unread"] == 50 and read_preference("?") is None


def test_intervals_cover_the_truth_as_often_as_they_promise():
    rng, inside = np.random.default_rng(0), 0
    for seed in range(150):
        counts = {i: {"n": 1, "bad": int(b)} for i, b in enumerate(rng.random(120) < 0.3)}
        _, low, high = figure_intervals(
            counts, lambda c: {"rate": 100 * c["bad"] / c["n"]}, seed=seed, n_resamples=400
        )["rate"]
        inside += low <= 30 <= high
    assert 0.89 <= inside / 150 <= 0.99


def test_paired_comparison_finds_no_difference_where_there_is_none():
    rng, found = np.random.default_rng(1), 0
    for seed in range(150):
        hard = rng.random(100) < 0.3
        first, second = (
            {i: {"n": 1, "bad": int(b)} for i, b in enumerate(hard ^ (rng.random(100) < 0.1))} for _ in "ab"
        )
        difference, low, high, p = compare_models(
            first, second, lambda c: {"rate": 100 * c["bad"] / c["n"]}, seed=seed, n_resamples=400
        )["rate"]
        assert low <= difference <= high
        found += p < 0.05
    assert found / 150 < 0.12


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_kappa_is_symmetric_and_at_most_one(pairs):
    counts = {i: {pair: 1} for i, pair in enumerate(pairs)}
    kappa, turned = (
        kappa_of(sum_counts(counts)),
        kappa_of(sum_counts({i: {(b, a): 1} for i, (a, b) in enumerate(pairs)})),
    )
    assert (np.isnan(kappa) and np.isnan(turned)) or kappa == pytest.approx(turned)
    assert np.isnan(kappa) or kappa <= 1 + 1e-12


def test_interval_and_p_value_are_those_of_the_normal_approximation():
    assert middle(range(1001)) == pytest.approx((25, 975))

    def rate(c):
        return {"rate": 100 * c["bad"] / c["n"]}

    first, second = (
        {i: {"n": 1, "bad": int(start <= i < start + 80)} for i in range(400)} for start in (0, 60)
    )
    second |= {i: {"n": 1, "bad": 1} for i in range(140, 160)}  # 80 and 100 errors, 20 of them the same
    value, low, high = figure_intervals(first, rate, n_resamples=20000)["rate"]
    width = 2 * 1.96 * 100 * (0.2 * 0.8 / 400) ** 0.5
    assert value == 20 and high - low == pytest.approx(width, rel=0.05)
    difference, low, high, p = compare_models(first, second, rate, n_resamples=20000)["rate"]
    error = 100 * ((60 + 80) / 400 - 0.05**2) ** 0.5 / 400**0.5
    assert difference == 5 and high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert p == pytest.approx(2 * (1 - NormalDist().cdf(5 / error)), abs=0.015)


def test_repeats_do_not_narrow_an_interval():
    counts = {i: {"n": 1, "bad": int(i < 30)} for i in range(100)}
    once, thrice = (
        figure_intervals(c, lambda c: {"rate": 100 * c["bad"] / c["n"]})["rate"]
        for c in (counts, average_repeats([counts] * 3))
    )
    assert thrice == pytest.approx(once)


def test_agreement_counts_groups_as_the_units():
    judged, truth = {i: i % 20 < 10 for i in range(200)}, {i: i < 100 for i in range(200)}
    alone, grouped = (
        judge_agreement(judged, truth, groups)["accuracy"]
        for groups in (None, {i: i // 10 for i in range(200)})
    )
    assert alone[0] == grouped[0] == 50 and grouped[2] - grouped[1] > 2 * (alone[2] - alone[1])


@pytest.mark.parametrize(
    "work, message",
    [
        (lambda: judge_agreement({1: "a"}, {2: "a"}), "labels of different items"),
        (lambda: minimum_detectable_difference(0, 100), "rate=0"),
        (lambda: count_amber_answers({}, {}, "strict"), "mode='strict'"),
        (lambda: count_mentions({1: "a dog"}, {}, {1: {"dog"}}), "the mentions: 1 ids without an answer"),
        (lambda: count_preferences({1: "[[A]]"}, {1: "OCR"}, {1: "[[B]]"}, "official"), "one order only"),
        (lambda: compare_published({"m": ({"F2": 1.0}, "", "")}, "RefoMB"), "'F2'"),
    ],
)
def test_wrong_inputs_are_named(work, message):
    with pytest.raises(ValueError, match=message):
        work()


def test_a_row_that_is_no_object_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 2 is not a JSON object but list"):
        read_json_rows(save(tmp_path / "a.json", [{"id": 1}, ["id", 2]]))


def test_published_figures_are_told_apart_by_version():
    rows = [
        r["figures"]
        for r in read_published()
        if r["benchmark"] == "Object HalBench" and r["model"] == "RLAIF-V 7B"
    ]
    assert {"response": 10.5, "mention": 5.2} in rows and {"response": 8.5, "mention": 4.3} in rows
    table = compare_published(
        {"mine": ({"response": 12.3}, "clean mode", "a local model")}, "Object HalBench"
    )
    assert (
        "| **mine** | 12.3 |  | clean mode | a local model | measured here |" in table
        and "arXiv v1" in table
        and "retired" in table
    )
