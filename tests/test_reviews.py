"""Judged benchmarks through a real HTTP server: what counting by hand says, what is asked, what is kept, and
what a stopped review leaves.
"""

import json
import random
import re

import pytest
from judge_server import running_server
from test_benchmarks_parity import official_data
from test_evaluate import answer_file, small_data

from rlaifv_nb.benchmarks.halbench import coco_words, review_halbench
from rlaifv_nb.benchmarks.intervals import sum_counts
from rlaifv_nb.benchmarks.judges import BudgetSpent, open_judge
from rlaifv_nb.benchmarks.llava_bench import read_llava_bench_items, review_llava_bench
from rlaifv_nb.benchmarks.mmhal import read_mmhal_answers, read_mmhal_items, review_mmhal
from rlaifv_nb.benchmarks.refomb import (
    is_supported,
    read_refomb_answers,
    read_refomb_items,
    review_facts,
    review_refomb,
)
from rlaifv_nb.benchmarks.reviews import (
    read_figures,
    read_preference_labels,
    read_prompt,
    read_reviews_of,
    review_agreement,
    review_table,
)
from rlaifv_nb.benchmarks.tables import BENCHMARKS, figures_of
from rlaifv_nb.claims import parse_facts, read_templates
from rlaifv_nb.iconworld.world import caption_text, is_true, make_scene, read_claims
from rlaifv_nb.records import read_manifest, sha256_of

FACTS = read_templates().facts
# What the reference and the model say of a picture of a cat and a red ball.
CASES = [
    ("A cat.", "A cat and a red ball."),
    ("A cat.", "A dog."),
    ("A red ball.", "A cat."),
    ("A dog.", "A cat."),
    ("A cat and a dog.", "A dog and a cat."),
]
ITEMS = {
    i: {
        "question": f"What is in picture {i}?",
        "description": "A cat and a red ball.",
        "type": "OCR" if i < 2 else "Coarse Perception",
        "reference": reference,
    }
    for i, (reference, _) in enumerate(CASES)
}
ANSWERS = {i: answer for i, (_, answer) in enumerate(CASES)}
BETTER = {0: 0, 1: -1, 2: 0, 3: 1, 4: 0}  # by the number of dogs


@pytest.fixture
def server():
    with running_server() as s:
        s.reply = count_dogs
        yield s


def opened(server, folder, **options):
    return open_judge(server.spec, folder, **{"backoff": 0.01, "retries": 1, **options})


def answers_in(body):
    text = body["messages"][-1]["content"]
    return [re.search(rf"Answer of model {x}:\n(.*?)\n\n", text, re.DOTALL)[1] for x in "AB"]


def count_dogs(body):
    "A judge who counts dogs, and repeats its verdict when asked for trust."
    text = body["messages"][-1]["content"]
    if "Review:" in text:
        return (
            "As the review says: " + re.search(r"\[\[[ABC]\]\]", text.split("Review:")[1].split("(end")[0])[0]
        )
    a, b = (answer.count("dog") for answer in answers_in(body))
    return f"A has {a}, B has {b}. " + ("[[C]]" if a == b else "[[A]]" if a < b else "[[B]]")


def test_refomb_by_hand(server, tmp_path):
    figures = review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "out")
    assert (
        figures["win"][0] == figures["trust"][0] == 50 and figures["win: OCR"][0] == 25
    )  # a loss and a tie of two
    assert (
        figures["win: Coarse Perception"][0] == pytest.approx(100 * 2 / 3)
        and figures["consistent: win"][0] == 100
    )
    assert (
        figures["first: win"][0] == 50
        and figures["unread: win"][0] == 0
        and figures["win"][1] < 50 < figures["win"][2]
    )
    asked = [r["messages"][-1]["content"] for r in server.requests]
    assert (
        sum("Review:" not in text for text in asked) == 5 * 2 * 3
    )  # items, orders, repeats; reviews of the same words are summed up once
    assert (
        sum("Review:" in text for text in asked)
        == 3 * len({text for text in asked if "Review:" in text})
        < 30
    )
    manifest, rows = read_manifest(tmp_path / "out"), read_reviews_of(tmp_path / "out")
    assert (
        manifest["figures_of_repeats"] == {"win": [50, 50, 50], "trust": [50, 50, 50]}
        and manifest["repeats_note"] == "repeats: 3"
    )
    assert manifest["asked"] == {
        "verdicts": 60,
        "asked_again": 0,
        "unreadable": 0,
        "cut": 0,
        "judge_versions": {"echo-2 fp_7": 60},
    }
    assert (
        manifest["inputs"]["prompt: review"]
        == read_prompt("packaged:prompts/refomb_review.txt", "question").sha
    )
    assert (
        manifest["parameters"]["judge"]["model"] == "echo"
        and "gpt-4-1106-preview (retired" in manifest["note"]
    )
    assert all(
        r.judgement["prompt"] and r.judgement["version"] and r.judgement["parameters"] and r.text
        for r in rows
    )
    for part in ("win", "trust"):
        assert review_agreement(tmp_path / "out", BETTER, part)["accuracy"][0] == 100
    assert "| win | 50 |" in review_table(tmp_path / "out") and "60 verdicts, 0 unreadable" in review_table(
        tmp_path / "out"
    )


def test_refomb_official_is_one_order_with_the_reference_first(server, tmp_path):
    figures = review_refomb(
        ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "out", "official", repeats=1
    )
    assert {k: v[0] for k, v in figures.items()} == {
        "win": 0.5,
        "win: OCR": 0.25,
        "win: Coarse Perception": 2 / 3,
        "trust": 0.5,
        "trust: OCR": 0.25,
        "trust: Coarse Perception": 2 / 3,
    }
    shown = [answers_in(r) for r in server.requests if "Review:" not in r["messages"][-1]["content"]]
    assert sorted(shown) == sorted([ITEMS[i]["reference"], ANSWERS[i]] for i in ITEMS)


def test_a_favourite_place_cancels_and_shows(server, tmp_path):
    server.reply = lambda body: "[[A]]"
    figures = review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "out", repeats=1)
    assert figures["win"][0] == 50 and figures["consistent: win"][0] == 0 and figures["first: win"][0] == 100
    assert (
        review_refomb(
            ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "official", "official", repeats=1
        )["win"][0]
        == 0
    )


def test_repeats_may_differ(server, tmp_path):
    seeds = []

    def by_seed(body):
        if body["seed"] not in seeds:
            seeds.append(body["seed"])
        return ["[[A]]", "[[B]]", "[[C]]"][seeds.index(body["seed"])]

    server.reply = by_seed
    judge = opened(server, tmp_path / "judge", seed=1, temperature=1.0, concurrency=1)
    figures = review_refomb({0: "A cat."}, {0: ITEMS[0]}, judge, tmp_path / "out", "official")
    assert (
        read_manifest(tmp_path / "out")["figures_of_repeats"]["win"] == [0, 1, 0.5]
        and figures["win"][0] == 0.5
        and len(seeds) == 3
    )


def test_unreadable_verdicts_are_asked_again_and_then_counted_apart(server, tmp_path):
    asked = []

    def hesitant(body):
        text = body["messages"][-1]["content"]
        asked.append(text)
        stubborn = "picture 1" in text or "Hard to say." in text
        return "Hard to say." if stubborn or asked.count(text) < 2 else count_dogs(body)

    server.reply = hesitant
    judge = opened(server, tmp_path / "judge")
    figures = review_refomb(ANSWERS, ITEMS, judge, tmp_path / "out", repeats=1, retries=2)
    asked_for = read_manifest(tmp_path / "out")["asked"]
    rows = [r for r in read_reviews_of(tmp_path / "out") if r.part == "win"]
    assert [len([r for r in rows if (r.item_id, r.order) == (i, "second")]) for i in ITEMS] == [2, 3, 2, 2, 2]
    assert figures["unread: win"][0] == 20 and figures["win"][0] == 62.5  # without the loss
    assert asked_for["verdicts"] == 20 and asked_for["unreadable"] == 4  # item 1, two orders, win and trust
    server.reply = lambda body: "Hard to say."
    with pytest.raises(ValueError, match="item 0 has no"):
        review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "other"), tmp_path / "official", "official")


def test_a_cut_verdict_is_unreadable_in_clean_mode(server, tmp_path):
    server.script, server.reply = [{"reason": "length"}] * 3, lambda body: "Rating: 5 or"
    judge = opened(server, tmp_path / "judge", concurrency=1)
    figures = review_mmhal({0: "A cat."}, {0: MMHAL[0]}, judge, tmp_path / "out", retries=2)
    assert figures["unread"][0] == 100 and read_manifest(tmp_path / "out")["asked"] == {
        "verdicts": 1,
        "asked_again": 2,
        "unreadable": 1,
        "cut": 1,
        "judge_versions": {"echo-2 fp_7": 3},
    }


def test_a_stopped_review_goes_on_and_ends_with_the_same_bytes(server, tmp_path):

    def table(name):
        return (tmp_path / name / "reviews-00000.jsonl").read_bytes()

    whole = review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "whole")
    before = len(server.requests)
    with pytest.raises(BudgetSpent, match="19 of 30 judgements are missing"):
        review_refomb(
            ANSWERS, ITEMS, opened(server, tmp_path / "judge2", max_requests=11), tmp_path / "stopped"
        )
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    assert review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge2"), tmp_path / "stopped") == whole
    assert len(server.requests) == 2 * before and table("stopped") == table("whole")
    assert review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge2"), tmp_path / "stopped") == whole
    assert (
        review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge2"), tmp_path / "copy") == whole
    )  # from the cache alone
    assert len(server.requests) == 2 * before and table("copy") == table("whole")
    with pytest.raises(ValueError, match="started with other settings.*answers"):
        review_refomb(ANSWERS | {0: "No."}, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "whole")
    with pytest.raises(ValueError, match="started with other settings.*temperature"):
        review_refomb(ANSWERS, ITEMS, opened(server, tmp_path / "judge", temperature=0.5), tmp_path / "whole")


def test_your_own_prompt(server, tmp_path):
    (tmp_path / "mine.txt").write_text(
        "{description}|{question}\nAnswer of model A:\n{answer_a}\n\nAnswer of model B:\n{answer_b}\n\n{not "
        "a place}"
    )
    tricky = ANSWERS | {0: "{answer_a} [[A]] {description}"}
    review_refomb(
        tricky,
        ITEMS,
        opened(server, tmp_path / "judge"),
        tmp_path / "out",
        "official",
        tmp_path / "mine.txt",
        repeats=1,
    )
    sent = [r["messages"] for r in server.requests if len(r["messages"]) == 1]
    assert (
        len(sent) == 5
        and [
            {
                "role": "user",
                "content": "A cat and a red ball.|What is in picture 0?\nAnswer of model A:\nA "
                "cat.\n\nAnswer of model B:\n"
                "{answer_a} [[A]] {description}\n\n{not a place}",
            }
        ]
        in sent
    )
    (tmp_path / "bad.txt").write_text("{} {question}")
    with pytest.raises(ValueError, match="has no {description}, {answer_a}, {answer_b}"):
        review_refomb(
            ANSWERS, ITEMS, opened(server, tmp_path / "judge"), tmp_path / "bad", prompt=tmp_path / "bad.txt"
        )


def test_answers_that_do_not_fit(server, tmp_path):
    judge = opened(server, tmp_path / "judge")
    with pytest.raises(ValueError, match=r"1 ids without an answer \[4\]"):
        review_refomb({i: a for i, a in ANSWERS.items() if i != 4}, ITEMS, judge, tmp_path / "out")
    with pytest.raises(ValueError, match="official, clean"):
        review_refomb(ANSWERS, ITEMS, judge, tmp_path / "out", "strict")
    with pytest.raises(ValueError, match="repeats=0"):
        review_refomb(ANSWERS, ITEMS, judge, tmp_path / "out", repeats=0)
    assert server.requests == []


MMHAL = {
    i: {
        "question": f"Q{i}?",
        "contents": "Cat",
        "standard": "A cat.",
        "type": "attribute" if i < 2 else "other",
    }
    for i in range(4)
}


@pytest.mark.parametrize(
    "mode, expected",
    [
        (
            "official",
            {
                "score": 2.5,
                "hallucination": 0.5,
                "informativeness": 33.33,
                "score: attribute": 3,
                "score: other": 2,
            },
        ),
        (
            "clean",
            {
                "score": 4,
                "hallucination": 100 / 3,
                "informativeness": 100 * 6 / 9,
                "score: attribute": 4,
                "score: other": 4,
                "unread": 25,
            },
        ),
    ],
)
def test_mmhal_by_hand(server, tmp_path, mode, expected):
    texts = ["Good. Rating: 6", "**Rating:** 2", "I cannot rate this.", "Rating: 4"]
    server.reply = lambda body: texts[int(re.search(r"Question: Q(\d)", body["messages"][-1]["content"])[1])]
    figures = review_mmhal(
        dict.fromkeys(MMHAL, "A dog."), MMHAL, opened(server, tmp_path / "judge"), tmp_path / "out", mode
    )
    assert {k: v[0] for k, v in figures.items()} == pytest.approx(expected)


def test_mmhal_files(tmp_path):
    rows = [
        {
            "question": "Q?",
            "gt_answer": "A.",
            "question_type": "other",
            "image_content": ["Cat", "Dog"],
            "image_id": "x",
            "model_answer": "Assistant: B",
        }
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert read_mmhal_items(tmp_path / "t.json") == {
        0: {"question": "Q?", "contents": "Cat, Dog", "standard": "A.", "type": "other", "image": "x"}
    }
    assert read_mmhal_answers(tmp_path / "t.json") == {0: "B"}
    (tmp_path / "bad.json").write_text(json.dumps([rows[0] | {"gt_answer": ""}]))
    with pytest.raises(ValueError, match="row 1 has no gt_answer"):
        read_mmhal_items(tmp_path / "bad.json")


def test_llava_bench_by_hand(server, tmp_path):
    files = {
        "q": [
            {"question_id": i, "text": f"Q{i}?", "category": c, "image": "x.jpg"}
            for i, c in enumerate(("conv", "conv", "detail"))
        ],
        "c": [{"image": "x.jpg", "caption": "A cat."}],
        "r": [{"question_id": i, "text": "reference"} for i in range(3)],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    items = read_llava_bench_items(*(tmp_path / name for name in "qcr"))
    points = {
        (0, "second"): "9 6",
        (1, "second"): "8 8",
        (2, "second"): "no idea",
        (0, "first"): "7, 8",
        (1, "first"): "8 8",
        (2, "first"): "5/10",
    }

    def judge_points(body):
        text = body["messages"][-1]["content"]
        order = "second" if "assistant 1:\nreference" in text else "first"
        return points[int(re.search(r"Q(\d)", text)[1]), order] + "\nbecause"

    server.reply = judge_points
    answers, judge = dict.fromkeys(items, "model"), opened(server, tmp_path / "judge")
    clean = {k: v[0] for k, v in review_llava_bench(answers, items, judge, tmp_path / "clean").items()}
    assert clean == pytest.approx(
        {"all": 100 * (6.5 + 8) / (8.5 + 8), "conv": 100 * 14.5 / 16.5, "failed": 100 / 3}
    )
    official = {
        k: v[0]
        for k, v in review_llava_bench(answers, items, judge, tmp_path / "official", "official").items()
    }
    assert official == {"all": 82.4, "conv": 82.4}  # 7 of 8.5 points
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match="no caption of the image 'x.jpg'"):
        read_llava_bench_items(*(tmp_path / name for name in "qcr"))


def test_objects_by_hand(server, tmp_path):
    coco = coco_words(["dog, puppy", "cat", "person, man, woman", "car"])
    items = {i: {"question": "Describe it.", "truth": {"dog", "person"}} for i in range(4)}
    answers = {
        0: "A man walks his puppy past a car.",
        1: "There is no cat here, only a dog.",
        2: "A cat.",
        3: "A woman drives a car home.",
    }
    lists = {"puppy": '["man", "puppy", "car"]', "no cat": 'Objects:\n["dog"]', "drives": "a woman and a car"}
    server.reply = lambda body: next(v for k, v in lists.items() if k in body["messages"][-1]["content"])
    judge = opened(server, tmp_path / "judge")
    clean = review_halbench(answers, items, judge, tmp_path / "clean", coco)
    assert len(server.requests) == 5  # item 2 is too short to ask, item 3 is asked three times
    assert (
        clean["mention"][0] == 25
        and clean["response"][0] == 50
        and clean["unread"][0] == 25
        and clean["response over all"][0] == pytest.approx(100 / 3)
    )
    assert clean["words: mention"][0] == pytest.approx(100 * 4 / 8) and clean["words: response"][0] == 100
    official = review_halbench(answers, items, judge, tmp_path / "official", coco, "official")
    assert (
        official["sentence_num"][0] == 4
        and official["CHAIRs"][0] == 0.25
        and official["CHAIRi"][0] == 0.25
        and len(server.requests) == 5
    )
    assert "gpt-3.5-turbo-0613 (retired" in read_manifest(tmp_path / "clean")["note"]


def test_labels_of_people(tmp_path):
    (tmp_path / "l.jsonl").write_text(
        '{"id": 0, "better": "model"}\n{"id": 1, "better": "tie"}\n{"id": 2, "better": "reference"}'
    )
    assert read_preference_labels(tmp_path / "l.jsonl") == {0: 1, 1: 0, 2: -1}
    (tmp_path / "l.jsonl").write_text('{"id": 0, "better": "A"}')
    with pytest.raises(ValueError, match="id 0: better must be one of model, reference, tie"):
        read_preference_labels(tmp_path / "l.jsonl")


def test_refomb_files(tmp_path):
    row = {"image_url": "u0", "question": "Q?", "description": "D", "type": "OCR", "answer": "R"}
    (tmp_path / "items.jsonl").write_text(
        "".join(json.dumps(row | {"image_url": f"u{i}"}) + "\n" for i in range(2))
    )
    items = read_refomb_items(tmp_path / "items.jsonl")
    (tmp_path / "answers.jsonl").write_text(
        "".join(json.dumps({"image_url": u, "prompt": "Q?", "text": u}) + "\n" for u in ("u1", "u0"))
    )
    assert read_refomb_answers(tmp_path / "answers.jsonl", items) == {0: "u0", 1: "u1"}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"image_url": "u1", "question": "Q?", "answer": "x"}))
    with pytest.raises(ValueError, match="1 ids without an answer"):
        read_refomb_answers(tmp_path / "answers.jsonl", items)
    (tmp_path / "items.jsonl").write_text(json.dumps(row | {"answer": ""}))
    with pytest.raises(ValueError, match="row 1 has no answer: take the file with GPT-4V's answers"):
        read_refomb_items(tmp_path / "items.jsonl")


def test_the_official_refomb_items():
    items = read_refomb_items(official_data("rlaifv", "gpt4v_RefoMB_dev_0521.jsonl"))
    assert len(items) == 99 and sum(i["type"] == "OCR" for i in items.values()) == 11
    with pytest.raises(ValueError, match="take the file with GPT-4V's answers"):
        read_refomb_items(official_data("rlaifv", "RefoMB_dev.jsonl"))


def wrong(groups, rng, n):
    "The groups with the colour of n of them changed."
    changed = rng.sample(range(len(groups)), n)
    return [
        type(g)(g.object, next(c for c in ("red", "blue") if c != g.colour), g.count, g.place)
        if k in changed
        else g
        for k, g in enumerate(groups)
    ]


def test_a_review_of_facts_follows_the_truth(tmp_path):
    scenes, rng = [make_scene("test", i) for i in range(12)], random.Random(0)
    texts = [[caption_text(wrong(s.groups, rng, rng.randrange(3)), rng) for _ in "AB"] for s in scenes]
    bad = [[sum(not is_true(s, c) for c in read_claims(t)) for t in pair] for s, pair in zip(scenes, texts)]
    truth = {i: (m < r) - (m > r) for i, (r, m) in enumerate(bad)}
    assert set(truth.values()) == {-1, 0, 1}
    items = {
        i: {
            "question": "Describe the image in detail.",
            "description": caption_text(s.groups, rng),
            "type": "OCR",
            "reference": texts[i][0],
        }
        for i, s in enumerate(scenes)
    }
    answers = {i: pair[1] for i, pair in enumerate(texts)}
    splitter = open_judge(
        "local:packaged:iconworld-splitter", tmp_path / "judge", max_new_tokens=256, batch_size=36
    )
    figures = review_facts(answers, items, splitter, tmp_path / "out", FACTS, parse_facts)
    assert review_agreement(tmp_path / "out", truth)["accuracy"][0] >= 96
    win = 50 * sum(1 + t for t in truth.values()) / len(truth)
    assert figures["trust"][0] == pytest.approx(win, abs=3)
    claims = sum(len(read_claims(pair[1])) for pair in texts)
    assert figures["unsupported: model"][0] == pytest.approx(100 * sum(b[1] for b in bad) / claims, abs=1)
    asked = splitter.budget.requests
    again = review_facts(answers, items, splitter, tmp_path / "again", FACTS, parse_facts)
    assert again == figures and splitter.budget.requests == asked
    nothing = review_facts(
        answers,
        items,
        splitter,
        tmp_path / "none",
        FACTS,
        parse_facts,
        support=lambda id, found: [True] * len(found),
    )
    assert nothing["trust"][0] == 50 and nothing["unsupported: model"][0] == 0
    with pytest.raises(ValueError, match="choose clean"):
        review_facts(answers, items, splitter, tmp_path / "official", FACTS, parse_facts, "official")


def test_a_cut_split_is_unread(tmp_path):
    items = {
        0: {
            "question": "Describe the image in detail.",
            "description": "There is a red dog in the top left.",
            "type": "OCR",
            "reference": "",
        }
    }
    splitter = open_judge("local:packaged:iconworld-splitter", tmp_path / "judge", max_new_tokens=4)
    figures = review_facts(
        {0: "There is a blue dog in the top left."}, items, splitter, tmp_path / "out", FACTS, parse_facts
    )
    assert (
        figures["unread"][0] == 100
        and "trust" not in figures
        and review_agreement(tmp_path / "out", {0: 1})["accuracy"][0] == 0
    )


@pytest.mark.parametrize(
    "fact, supported",
    [
        ("There is a dog.", True),
        ("There are three dogs.", False),
        ("The dog is red.", True),
        ("Dogs are not red.", False),
        ("The buses are blue.", True),
        ("The bus is in the top right.", False),
        ("Lovely.", False),
    ],
)
def test_support(fact, supported):
    assert (
        is_supported(
            fact,
            [
                "The dogs are red.",
                "There are two dogs.",
                "The bus is blue.",
                "The dogs are in the top right.",
            ],
        )
        == supported
    )


def moody(bench):
    "A judge whose verdicts depend on every letter of the prompt, now and then unreadable."

    def reply(body):
        text = body["messages"][-1]["content"]
        n = int(sha256_of(text)[:8], 16)
        objects = ["dog", "puppy", "cat", "man"]
        return {
            "refomb": f"[[{'ABC'[n % 3]}]]",
            "refomb-facts": "- There is a dog.\n" + "- There is a cat.\n" * (n % 2),
            "mmhal": f"Rating: {n % 8}",
            "llava-bench": f"{n % 11 or 'none'} {1 + n // 11 % 10}",
            "objhal": json.dumps(objects[n % 3 :]) if n % 4 else "none",
        }[bench]

    return reply


def name_in_review(part, name):
    "How a figure is called in the review of RefoMB, which has two parts with the same figures."
    if part not in ("RefoMB win", "RefoMB trust"):
        return name
    part = part.removeprefix("RefoMB ")
    return name.replace("win", part) if name.startswith("win") else f"{name}: {part}"


JUDGED = [(name, mode) for name, b in BENCHMARKS.items() if b.judge for mode in b.modes]


@pytest.mark.parametrize("bench, mode", JUDGED)
def test_the_counts_of_a_benchmark_have_the_figures_of_its_review(bench, mode, server, tmp_path):
    "An evaluation keeps counts per item, a review keeps figures: they must be the same numbers."
    benchmark, data = BENCHMARKS[bench], small_data(tmp_path / "data")
    server.reply = moody(bench)
    path = answer_file(bench, data, tmp_path / "answers")
    judge = opened(server, tmp_path / "judge", temperature=1.0, seed=1)
    measured = benchmark.judge(
        data, path, benchmark.open_questions(data), mode, "builtin", judge, tmp_path / "out"
    )
    kept, n_figures = read_figures(tmp_path / "out"), 0
    assert [m.part for m in measured] == [part.name for part in benchmark.parts]
    for m in measured:
        for name, value in figures_of(m.part, mode)(sum_counts(m.counts)).items():
            there = kept[name_in_review(m.part, name)][0]
            assert value == there or value != value and there != there, (m.part, name)
            n_figures += 1
    assert n_figures >= 2
