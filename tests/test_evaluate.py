"""Answers, judged benchmarks through a real server, refused requests, and the leaderboard."""

import base64
import functools
import io
import json
import re
import shutil
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_models import ARCHITECTURES, open_tiny

from rlaifv_nb.benchmarks.answers import answer_pictures, run_answers
from rlaifv_nb.benchmarks.evaluate import OWN_OF_OTHERS, Request, compare_folders, run_evaluate
from rlaifv_nb.benchmarks.protocol import Question
from rlaifv_nb.benchmarks.tables import BENCHMARKS, open_questions, read_counts, write_answer_file
from rlaifv_nb.evaluation import Evaluation, evaluate, evaluation_settings, with_own_sizes
from rlaifv_nb.iconworld.miniature import write_miniature
from rlaifv_nb.iconworld.world import DESCRIBE, draw_picture, make_scene
from rlaifv_nb.records import Score, package_folder, read_manifest, read_table
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.leaderboard import find_entries, write_leaderboard

QUESTIONS = (
    "Is there a car in the image?",
    "Is there a cat?",
    "Are the dogs red?",
    "Is the car in the top left?",
    DESCRIBE[0],
)
tiny = functools.cache(open_tiny)


def png(index):
    "The bytes of a picture."
    buffer = io.BytesIO()
    draw_picture(make_scene("dev", index)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_answers_are_the_same_with_and_without_a_shared_reading(name):
    pictures = [draw_picture(make_scene("dev", i), 112) for i in range(3)]
    texts = [list(QUESTIONS[:n]) for n in (4, 1, 5)]
    shared, plain = (answer_pictures(tiny(name), pictures, texts, 12, share=share) for share in (True, False))
    assert shared == plain and [len(row) for row in shared] == [4, 1, 5]
    alone = answer_pictures(tiny(name), pictures[2:], [texts[2][1:3]], 12)
    assert alone == [shared[2][1:3]], "an answer must not depend on its neighbours"
    assert answer_pictures(tiny(name), pictures[:1], [texts[0][:1]], 12, num_beams=3)[0][0][1] in (
        "stop",
        "length",
    )


def test_the_token_limit_is_the_answers_alone():
    found = answer_pictures(tiny("llava"), [draw_picture(make_scene("dev", 0), 112)], [list(QUESTIONS)], 3)
    ids = [tiny("llava").tokenizer(text, add_special_tokens=False).input_ids for text, _ in found[0]]
    assert any(reason == "length" for _, reason in found[0]) and all(len(i) <= 4 for i in ids)


def test_beams_are_stated_and_official_beams_are_the_published_ones(tmp_path):
    questions = [Question(i, f"{i}.png", DESCRIBE[0], data=png(i)) for i in range(2)]
    run_answers(questions, tmp_path, tmp_path / "a", tiny("llava"), max_new_tokens=5, num_beams=3)
    assert read_manifest(tmp_path / "a")["parameters"]["decoding"] == "beam search, 3 beams"
    assert [Request(bench, "m", mode="official").beams for bench in ("objhal", "mmhal", "amber")] == [3, 3, 1]
    assert Request("objhal", "m").beams == 1 and Request("objhal", "m", num_beams=2).beams == 2


def small_data(folder):
    "Hand-made files in the formats of the judged benchmarks, MMStar and Object HalBench."
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    inside = [base64.b64encode(png(i)).decode() for i in range(4)]

    def lines(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    mmhal = [
        {
            "question_type": t,
            "image_id": f"x{i}",
            "image_src": f"https://a.example/{i}.png",
            "image_content": ["Dog"],
            "question": f"Q{i}?",
            "gt_answer": "A dog.",
        }
        for i, t in enumerate(("attribute", "counting", "counting", "other"))
    ]
    (folder / "mmhal-bench_answer_template.json").write_text(
        json.dumps([row | {"model_answer": ""} for row in mmhal])
    )
    refomb = [
        {
            "image_url": f"https://a.example/{i}.png",
            "question": f"Q{i}?",
            "description": "A dog.",
            "type": "OCR",
            "split": "dev",
            "id": i,
        }
        for i in range(4)
    ]
    lines("RefoMB_dev.jsonl", [row | {"answer": ""} for row in refomb])
    lines("gpt4v_RefoMB_dev_0521.jsonl", [row | {"answer": "four words are here"} for row in refomb])
    lines(
        "obj_halbench_300_with_image.jsonl",
        [{"image_id": i, "image": inside[i], "question": "Describe it."} for i in range(4)],
    )
    lines(
        "questions.jsonl",
        [
            {
                "question_id": i,
                "image": f"{i}.png",
                "text": f"Q{i}?",
                "category": "conv" if i % 2 else "detail",
            }
            for i in range(4)
        ],
    )
    lines("context.jsonl", [{"image": f"{i}.png", "caption": "A dog."} for i in range(4)])
    lines("answers_gpt4.jsonl", [{"question_id": i, "text": "four words are here"} for i in range(4)])
    (folder / "synonyms_refine.txt").write_text("dog, puppy\ncat\nperson, man\n")
    for part, ids in (("train", (0, 1)), ("val", (2, 3))):
        about = {"images": [{"id": i} for i in ids]}
        found = {
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [{"image_id": i, "category_id": 1} for i in ids],
        }
        (folder / f"instances_{part}2014.json").write_text(json.dumps(about | found))
        (folder / f"captions_{part}2014.json").write_text(
            json.dumps(about | {"annotations": [{"image_id": ids[0], "caption": "A man."}]})
        )
    table = ["index\tquestion\tanswer\tcategory\tl2_category\tbench\timage"]
    table += [
        f'{i}\t"What is it?\nOptions: A: dog, B: cat"\tA\tmath\tgeometry\tX\t{inside[i]}' for i in range(4)
    ]
    (folder / "MMStar.tsv").write_text("\n".join(table) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data") / "files")


class JudgeHandler(BaseHTTPRequestHandler):
    "A judge of simple taste: more words are better, and a cat is always a hallucination."

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.server.asked.append(prompt)
        body = {
            "model": "taste-1",
            "choices": [{"message": {"content": self.verdict(prompt)}, "finish_reason": "stop"}],
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def verdict(self, prompt):
        def between(start, end):
            return re.search(f"{start}\n?(.*?){end}", prompt, re.DOTALL)[1].strip()

        if "Answer of model A:" in prompt:
            a, b = (
                len(between(f"Answer of model {x}:", end).split())
                for x, end in (("A", "Answer of model B"), ("B", "Write first"))
            )
            return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"
        if "following review" in prompt:
            return between("Review:", r"\(end of the review\)")
        if "Answer of assistant 1:" in prompt:
            parts = (("1", "Answer of assistant 2"), ("2", "Write on"))
            return " ".join(str(len(between(f"Answer of assistant {x}:", end).split())) for x, end in parts)
        if "The model's answer:" in prompt:
            return "Rating: 1" if "cat" in between("The model's answer:", "Explain").lower() else "Rating: 5"
        return json.dumps(
            [w for w in ("dog", "puppy", "cat", "man") if w in between("Description:", "Rules").lower()]
        )

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    with ThreadingHTTPServer(("127.0.0.1", 0), JudgeHandler) as server:
        server.asked, server.daemon_threads = [], True
        server.spec = f"http://127.0.0.1:{server.server_port}/v1|taste"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


SAID = [
    "One two three four five dogs.",
    "A cat on a dog here, with a man.",
    "A dog.",
    "A cat and one more cat there.",
]  # 6, 9, 2 and 7 words


def answer_file(bench, data, folder, said=SAID):
    "The answer file of a benchmark with these texts."
    questions = open_questions(bench, data)
    folder.mkdir(parents=True, exist_ok=True)
    return write_answer_file(
        bench,
        questions,
        {q.question_id: type("A", (), {"text": t}) for q, t in zip(questions, said, strict=True)},
        folder,
    )


def values(folder):
    return {s.metric: s.value for s in read_table(folder, "scores", Score)}


def test_mmhal_judged(data, judge, tmp_path):
    path = answer_file("mmhal", data, tmp_path)
    run_evaluate(tmp_path / "e", "mmhal", answers=path, data=data, judge=judge.spec)
    found = values(tmp_path / "e")
    assert (
        found["MMHal-Bench: score"],
        found["MMHal-Bench: hallucination"],
        found["MMHal-Bench: score: counting"],
    ) == (3, 50, 3)  # 5 1 5 1
    assert len(judge.asked) == 4 and "judge: taste at http" in (tmp_path / "e" / "table.md").read_text()
    run_evaluate(tmp_path / "official", "mmhal", answers=path, data=data, judge=judge.spec, mode="official")
    assert values(tmp_path / "official")["MMHal-Bench: hallucination"] == 0.5


def test_refomb_judged_in_both_orders_with_repeats_and_compared(data, judge, tmp_path):
    for name, said in (("first", SAID), ("second", SAID[:2] + ["Now this has five words.", SAID[3]])):
        run_evaluate(
            tmp_path / name,
            "refomb",
            answers=answer_file("refomb", data, tmp_path / f"{name}-a", said),
            data=data,
            judge=judge.spec,
        )
        found = values(tmp_path / name)
        assert (
            found["RefoMB win: win"] == found["RefoMB trust: win"] == (75 if name == "first" else 100)
            and found["RefoMB win: consistent"] == 100
        )
    assert (
        sum("Two models, A and B" in prompt for prompt in judge.asked) == 2 * 4 * 2 * 3
    )  # models, items, orders, repeats
    rows, _ = compare_folders(tmp_path / "first", tmp_path / "second")
    assert next(r["difference"] for r in rows if (r["part"], r["figure"]) == ("RefoMB win", "win")) == 25
    assert [m.part for m in read_counts(tmp_path / "first")] == ["RefoMB win", "RefoMB trust"]
    path = tmp_path / "first-a" / "refomb_answer.jsonl"
    run_evaluate(
        tmp_path / "official", "refomb", answers=path, data=data, judge=judge.spec, mode="official", repeats=1
    )
    assert values(tmp_path / "official")["RefoMB win: win"] == 0.75


def test_llava_bench_judged(data, judge, tmp_path):
    run_evaluate(
        tmp_path / "e",
        "llava-bench",
        answers=answer_file("llava-bench", data, tmp_path),
        data=data,
        judge=judge.spec,
    )
    found = values(tmp_path / "e")
    assert (
        found["LLaVA-Bench: all"] == 100 * (6 + 9 + 2 + 7) / 16 and found["LLaVA-Bench: conv"] == 100 * 16 / 8
    )


def test_halbench_with_and_without_a_judge(data, judge, tmp_path):
    path = answer_file("objhal", data, tmp_path)
    run_evaluate(tmp_path / "rule", "objhal", answers=path, data=data)
    run_evaluate(tmp_path / "judged", "objhal", answers=path, data=data, judge=judge.spec)
    rule, judged = values(tmp_path / "rule"), values(tmp_path / "judged")
    # dog is everywhere, a man in pictures 0 and 2: cat and man are false of 1, cat of 3;
    # the two-word answer is not asked about
    assert (rule["Object HalBench: response"], rule["Object HalBench: mention"]) == (50, 50)
    assert (
        judged["Object HalBench: response"] == pytest.approx(200 / 3)
        and judged["Object HalBench: mention"] == 60
        and len(judge.asked) == 3
    )
    assert read_manifest(tmp_path / "rule")["judged_by"] == "none (rule)"


def test_a_spent_budget_is_told_in_a_line_and_the_same_command_goes_on(data, judge, tmp_path, capsys):
    argv = [
        "evaluate",
        "--answers",
        str(answer_file("mmhal", data, tmp_path)),
        "--bench",
        "mmhal",
        "--data",
        str(data),
        "--judge",
        judge.spec,
        "--out",
        str(tmp_path / "e"),
    ]
    assert main([*argv, "--max-requests", "3"]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert main(argv) == 0 and len(judge.asked) == 4
    asked = list(judge.asked)
    assert main(argv) == 0 and judge.asked == asked


def test_your_own_prompt_is_used_and_part_of_the_setting(data, judge, tmp_path, capsys):
    (tmp_path / "own.txt").write_text(
        "{contents} {question} {standard}\nThe model's answer: {answer}\nExplain."
    )
    argv = [
        "evaluate",
        "--answers",
        str(answer_file("mmhal", data, tmp_path)),
        "--bench",
        "mmhal",
        "--data",
        str(data),
        "--judge",
        judge.spec,
    ]
    assert main([*argv, "--prompt", str(tmp_path / "own.txt"), "--out", str(tmp_path / "e")]) == 0
    assert sorted(judge.asked)[0].startswith("Dog Q0? A dog."), (
        "the contents, the question and the standard come first"
    )
    assert main([*argv, "--out", str(tmp_path / "e")]) == 2 and "prompt" in capsys.readouterr().err


def test_mmstar_from_its_table(data, tmp_path):
    path = answer_file("mmstar", data, tmp_path, ["A", "(B)", "The answer is A", "apple"])
    run_evaluate(tmp_path / "e", "mmstar", answers=path, data=data)
    assert (
        values(tmp_path / "e")["MMStar: final score"] == 50 and values(tmp_path / "e")["MMStar: unread"] == 25
    )
    assert open_questions("mmstar", data)[0].data == png(0)


@pytest.mark.parametrize("bench", ["mmhal", "refomb", "objhal", "mmstar", "llava-bench"])
def test_a_model_answers_every_format(bench, data, tmp_path):
    questions = open_questions(bench, data, limit=3)
    found = run_answers(questions, data / "images", tmp_path / "a", tiny("llava"), max_new_tokens=4)
    assert len(found) == len(questions) == 3, "every picture was found"
    rows = (write_answer_file(bench, questions, found, tmp_path)).read_text()
    assert all(json.dumps(a.text)[1:-1] in rows for a in found.values())


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda d: (d / "MMStar.tsv").write_text("index\tquestion\n1\tWhat?\n"), "no columns"),
        (lambda d: (d / "RefoMB_dev.jsonl").write_text('{"id": 1}\n'), "'question' must be a string"),
        (
            lambda d: (d / "mmhal-bench_answer_template.json").write_text('[{"image_id": "x"}]'),
            "row 1 has no question",
        ),
        (
            lambda d: (d / "obj_halbench_300_with_image.jsonl").write_text(
                '{"image_id": 1, "question": "Q"}\n' * 2
            ),
            "appears twice",
        ),
    ],
)
def test_bad_question_files_are_named(change, says, tmp_path):
    folder = small_data(tmp_path / "d")
    change(folder)
    with pytest.raises(ValueError, match=says):
        for bench in ("mmstar", "refomb", "mmhal", "objhal"):
            open_questions(bench, folder)


@pytest.mark.parametrize("bench", [name for name, b in BENCHMARKS.items() if b.files])
def test_missing_files_are_named_with_their_origin(bench, tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        open_questions(bench, tmp_path)
    assert all(
        name in str(e.value) and origin in str(e.value) for name, origin in BENCHMARKS[bench].files.items()
    )


@pytest.mark.parametrize(
    "request_, says",
    [
        (Request("nope", "m"), "choose one of iconworld, claims, amber"),
        (
            Request("iconworld", "m", data="x", num_beams=3),
            "data, num_beams: the benchmark iconworld does not use",
        ),
        (Request("iconworld", "m", name="x"), "name: the benchmark iconworld does not use"),
        (Request("iconworld", answers="a"), "needs a model; saved answers cannot"),
        (Request("claims", "org/m", data="x"), "claims needs a splitter"),
        (Request("claims", "org/m", splitter="org/s"), "claims needs data"),
        (
            Request("claims", "org/m", data="x", splitter="org/s", mode="official"),
            "mode: the benchmark claims",
        ),
        (Request("amber", "m", data="d", splitter="org/s"), "splitter: only the benchmark claims"),
        (Request("amber"), "give one of"),
        (Request("amber", "m", answers="a", data="d"), "give one of"),
        (Request("amber", answers="a", adapter="b", data="d"), "adapter"),
        (Request("amber", "m", data="d", mode="fast"), "official, clean"),
        (Request("amber", "m", data="d", tools="spacy"), "official, builtin"),
        (Request("refomb", "m", data="d"), "needs a judge"),
        (Request("pope-random", "m", data="d", judge="local:x"), "a judge is asked"),
        (Request("mhumaneval", "m", data="d"), "labels"),
        (Request("pope-random", reviews="r"), "has no reviews"),
        (Request("objhal", "m", data="d", mode="official"), "needs a judge"),
        (Request("refomb-facts", "m", data="d", judge="local:x", mode="official"), "no official"),
        (Request("mmhal", "m", data="d", judge="local:x", trust_prompt="p"), "does not use this"),
    ],
)
def test_requests_without_meaning_are_refused(request_, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        evaluate(tmp_path / "never", **vars(request_))
    assert not (tmp_path / "never").exists()


def test_official_tools_that_are_missing_are_named(tmp_path, capsys):
    write_miniature(tmp_path / "d", 2)
    (tmp_path / "a.json").write_text(json.dumps([{"id": i, "response": "A dog."} for i in (1, 2)]))
    code = main(
        [
            "evaluate",
            "--answers",
            str(tmp_path / "a.json"),
            "--bench",
            "amber-generative",
            "--data",
            str(tmp_path / "d"),
            "--mode",
            "official",
            "--out",
            str(tmp_path / "e"),
        ]
    )
    assert code == 0 or "pip install nltk spacy" in capsys.readouterr().err


def test_different_judges_and_modes_stand_in_different_tables(data, judge, tmp_path):
    path = answer_file("mmhal", data, tmp_path / "a")
    boards = tmp_path / "boards"
    for name, options in (
        ("one", {}),
        ("two", {}),
        ("official", {"mode": "official"}),
        ("other", {"judge": judge.spec + "-other"}),
    ):
        run_evaluate(
            boards / name,
            "mmhal",
            answers=path,
            data=data,
            name=f"<{name}>",
            **{"judge": judge.spec, **options},
        )
    run_evaluate(
        boards / "limited",
        "mmhal",
        answers=answer_file_of_first(data, tmp_path),
        data=data,
        judge=judge.spec,
        limit=2,
    )
    entries, problems = find_entries(boards)
    tables = {}
    for e in entries:
        tables.setdefault(e.measured, set()).add(e.name)
    assert (
        sorted(map(len, tables.values())) == [1, 1, 1, 2]
        and {"<one>", "<two>"} in tables.values()
        and problems == []
    )
    (boards / "two" / "manifest.json").write_text("{")
    (boards / "one" / "scores-00000.jsonl").unlink()
    text = write_leaderboard(boards).read_text()
    assert (
        "&lt;official&gt;" in text
        and "<official>" not in text
        and "FileNotFoundError" in text
        and "JSONDecodeError" in text
    )

    class Loads(HTMLParser):
        found = []

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k == "src" or k == "href" and tag == "link"]

    Loads().feed(text)
    assert Loads.found == []
    assert main(["leaderboard", str(tmp_path / "a")]) == 2


def answer_file_of_first(data, folder):
    "MMHal-Bench answers to the first two questions only."
    questions = open_questions("mmhal", data, limit=2)
    (folder / "first").mkdir()
    return write_answer_file(
        "mmhal",
        questions,
        {q.question_id: type("A", (), {"text": t}) for q, t in zip(questions, SAID)},
        folder / "first",
    )


def test_a_run_stands_on_the_board_with_its_recipe_and_every_model(tmp_path):
    run, results = tmp_path / "mine", package_folder("data") / "results" / "seed_0"
    evaluate(
        run / "06_evaluation", "iconworld", "packaged:iconworld-vlm", "packaged:iconworld-aligned", limit=3
    )
    shutil.copy(results / "manifest.json", run)
    entries, problems = find_entries(tmp_path)
    made = json.loads((results / "manifest.json").read_text())
    assert (
        [e.name for e in entries] == ["mine: base", "mine: adapted"]
        and not problems
        and entries[0].measured == entries[1].measured
    )
    assert {(e.facts["recipe"], e.facts["commit"]) for e in entries} == {
        (made["recipe"]["name"], made["commit"][:10])
    }
    assert "3 scenes of the split test" in write_leaderboard(tmp_path).read_text()


def test_evaluations_of_different_things_are_not_compared(data, judge, tmp_path):
    path = answer_file("mmhal", data, tmp_path)
    for mode in ("official", "clean"):
        run_evaluate(tmp_path / mode, "mmhal", answers=path, data=data, judge=judge.spec, mode=mode)
    with pytest.raises(ValueError, match="do not measure the same"):
        compare_folders(tmp_path / "official", tmp_path / "clean")


def test_sizes_that_are_not_given_are_the_benchmarks_own_at_every_door(data, tmp_path):
    """The command line's defaults were 1024 tokens and 1000 scenes, those of 06_evaluation 128 and 100."""
    settings = evaluation_settings(Request("iconworld", "packaged:iconworld-vlm"))
    assert with_own_sizes(Evaluation(**settings)) == with_own_sizes(Evaluation("packaged:iconworld-vlm"))
    published = run_evaluate(tmp_path, "mmstar", "packaged:iconworld-vlm", data=data, limit=1)
    assert published["parameters"]["max_new_tokens"] == OWN_OF_OTHERS[0]
