"""Runs the official scripts on the seeded answer files of tests/parity_cases.py and writes the figures that
they print beside this file.

    python tests/data/parity/make_fixtures.py --amber DIR --rlaifv DIR --rlhfv DIR --pope DIR --mmstar DIR
      [--data DIR]

Each DIR is a checkout: github.com/junyangwang0410/AMBER (the figures here: 534babf), RLHF-V/RLAIF-V
(83d917b), RLHF-V/RLHF-V (8daac8a), AoiDragon/POPE (08d957b), MMStar-Benchmark/MMStar (88f243a). `--data` is a
folder with `amber/annotations.json`, `amber/relation.json` and `rlaifv/synonyms_refine.txt` for the cases on
real word lists. The scripts run unchanged, but for POPE's two paths, which it asks users to fill in. What
they import and this project does not need is replaced: NLTK and spaCy by the stand-ins of parity_cases.py,
the judges' client by saved texts, jsonlines and the Excel writer by a few lines. Nothing of the scripts is
stored, only the figures and the SHA-256 of each script.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import runpy
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pandas

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import parity_cases as cases  # noqa: E402

N_SEEDS, N_REAL = 240, 24


def module(name, **content):
    "A module of stand-ins under the name that a script imports."
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]


def load(path):
    "A script as a module, without running its main part."
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def printed(work):
    "What a call prints, or the name of the error that ends it."
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            work()
    except (ZeroDivisionError, IndexError) as e:
        return type(e).__name__
    return out.getvalue()


def flat(figures, prefix=""):
    "Nested dicts as one, keys joined by a slash."
    if not isinstance(figures, dict):
        return {prefix.removesuffix("/") or "error": figures}
    return {k: v for key, value in figures.items() for k, v in flat(value, f"{prefix}{key}/").items()}


def write(name, scripts, figures):
    """One fixture file: the names of the figures, then a row of values for each seed (null where there is
    none).
    """
    shas = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in scripts}
    rows = [flat(f) for f in figures]
    columns = list(dict.fromkeys(k for row in rows for k in row))
    head = json.dumps({"script_sha256": shas, "columns": columns}, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps([row.get(c) for c in columns]) for row in rows)
    (HERE / f"{name}.json").write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    print(name, len(rows), "files")


def amber(script, real):
    "inference.py with all tasks, figures by their headings."
    official = load(script)
    headings = {"Generative Task": "generative", "Descriminative Task": "all", "Exsitence": "existence"}

    def run(case):
        folder, cases.Word.near = Path(tempfile.mkdtemp()), case["near"]
        files = {
            "word_association": case["association"],
            "inference_data": case["answers"],
            "annotation": case["annotations"],
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        (folder / "safe_words").write_text("\n".join(case["safe"]))
        official.args = argparse.Namespace(
            **{k: folder / k for k in files},
            safe_words=folder / "safe_words",
            evaluation_type="a",
            similarity_score=0.8,
            metrics=script.parent / "data" / "metrics.txt",
        )
        figures, part = {}, None  # the script prints headings, then "name: value" lines
        for line in printed(lambda: official.main(official.args)).splitlines():
            name, _, value = (s.strip() for s in line.partition(":"))
            if name and not value:
                part = headings.get(name, name.lower())
            elif name:
                figures[f"{part} {name if name == 'F1' or part == 'generative' else name.lower()}"] = float(
                    value
                )
        return figures

    write("amber", [script], [run(cases.amber_case(seed)) for seed in range(N_SEEDS)])
    if real:
        association, annotations = (
            json.loads((real / "amber" / f"{n}.json").read_text()) for n in ("relation", "annotations")
        )
        write(
            "amber_real",
            [script],
            [run(cases.amber_case(seed, association, annotations)) for seed in range(N_REAL)],
        )
        always_no = {
            "association": association,
            "annotations": annotations,
            "near": set(),
            "safe": cases.SAFE_WORDS,
            "answers": [{"id": a["id"], "response": "No"} for a in annotations if a["type"] != "generative"],
        }
        write("amber_always_no", [script], [run(always_no)])


def halbench(script, real):
    "compute_chair with and without a judge, and the summary's printed lines."
    module("gpt4_grpc", Chat=lambda **kw: None)
    official, summary = load(script), script.with_name("summarize_gpt_obj_halbench_review.py")

    def run(case):
        folder = Path(tempfile.mkdtemp())
        (folder / "eval" / "data").mkdir(parents=True)
        (folder / "eval" / "data" / "synonyms_refine.txt").write_text("\n".join(case["synonyms"]) + "\n")
        (folder / "caps.jsonl").write_text(
            "".join(
                json.dumps({k: c[k] for k in ("image_id", "question", "answer")}) + "\n" for c in case["caps"]
            )
        )
        base = {"info": 0, "licenses": 0}
        for kind in ("instances", "captions"):
            for part in ("train", "val"):
                rows = case[kind][part == "val" :: 2]
                content = base | {
                    "images": case["images"],
                    "annotations": rows,
                    "categories": case["categories"],
                }
                (folder / f"{kind}_{part}2014.json").write_text(json.dumps(content))
        phrases = {c["image_id"]: c["phrases"] for c in case["caps"]}
        result = {}
        with contextlib.chdir(folder):
            for judge in (True, False):
                chair = []

                def work(chair=chair, judge=judge):
                    evaluator = official.CHAIR(list(phrases), ".", "")
                    evaluator.get_annotations()
                    evaluator.gpt_caption_processor = lambda: (
                        [c | {"extract_objs": phrases[c["image_id"]]} for c in evaluator.caps],
                        {},
                        {},
                    )
                    chair.append(evaluator.compute_chair("caps.jsonl", -1, gpt_process=judge))

                error = printed(work)
                metrics = (
                    {k: v for k, v in chair[0]["overall_metrics"].items() if "tokens" not in k}
                    if chair
                    else error
                )
                result["judge" if judge else "classic"] = metrics
                if judge and chair:
                    place = folder / "model" / "x" / "checkpoint-1"
                    place.mkdir(parents=True)
                    (place / "hall_obj_halbench.json").write_text(json.dumps({"overall_metrics": metrics}))
                    sys.argv = ["summary", f"{folder}/model/"]
                    text = printed(lambda: runpy.run_path(str(summary), run_name="__main__"))
                    result["summary"] = dict(re.findall(r"^(\w[\w ]*?) *: (\S+)$", text, re.M)) or text
        return result

    write("halbench", [script, summary], [run(cases.halbench_case(seed)) for seed in range(N_SEEDS)])
    if real:
        lines = (real / "rlaifv" / "synonyms_refine.txt").read_text().rstrip("\n").split("\n")
        write("halbench_real", [script], [run(cases.halbench_case(seed, lines)) for seed in range(N_REAL)])

    def parse(reply):
        try:
            return official.parse_object_list(reply)
        except ValueError:
            return "ValueError"

    write("halbench_replies", [script], [parse(cases.reply_case(seed)) for seed in range(N_SEEDS)])


def mmhal(script):
    "The rating of saved judge texts, as the evaluation prints it and as the summary does."
    summary_script = script.with_name("summarize_gpt_mmhal_review.py")
    summary, template = (
        load(summary_script),
        json.loads((script.parent / "data" / "mmhal-bench_answer_template.json").read_text()),
    )
    patterns = {
        "score": r"Average score: (\S+)",
        "hallucination": r"Hallucination rate: (\S+)",
        "informativeness": r"Informativeness: (\S+)",
        "types": r"Average score for each question type: (\S+)",
    }

    def run(texts):
        folder, left = Path(tempfile.mkdtemp()), iter(texts)

        class Chat:
            def __init__(self, model, **kw):
                self.model = model

            def chat_completion(self, messages, temperature):
                return {"model": self.model, "choices": [{"message": {"content": next(left)}}]}

        module("gpt4_grpc", Chat=Chat)
        (folder / "response.json").write_text(json.dumps(template))
        sys.argv = [
            "mmhal",
            "--response",
            f"{folder}/response.json",
            "--evaluation",
            f"{folder}/out/saved.json",
            "--api-key",
            "none",
        ]
        outputs = [printed(lambda: runpy.run_path(str(script), run_name="__main__"))]
        outputs += [
            printed(lambda work=work: work(f"{folder}/out/saved.json"))
            for work in (summary.cal_informative, summary.cal_mmhalscore)
        ]
        found = [{k: m[1] for k, p in patterns.items() if (m := re.search(p, text))} for text in outputs]
        return {"evaluation": found[0], "summary": found[1] | found[2]}

    time.sleep = lambda seconds: None
    write("mmhal", [script, summary_script], [run(cases.mmhal_case(seed)) for seed in range(N_SEEDS)])


def refomb(script):
    "Win by the review script, trust by the hallucination script, both broken down by the Excel script."
    trust_script, excel_script, tables = (
        script.with_name("eval_hallucination.py"),
        script.with_name("json_to_excel.py"),
        [],
    )

    class Frame:
        def __init__(self, content):
            tables.append({k: v[0] for k, v in content.items()})

        def to_excel(self, *args, **kw):
            "Nothing: the content is what counts."

    class Writer(contextlib.nullcontext):
        def __init__(self, *args, **kw):
            super().__init__()

    def breakdown(path):
        module("pandas", DataFrame=Frame, ExcelWriter=Writer)
        tables.clear()
        sys.argv = ["excel", "--text_prompt", str(path)]
        error = printed(lambda: runpy.run_path(str(excel_script), run_name="__main__"))
        return {k: v for k, v in tables[0].items() if "model" not in k} if tables else error

    def run(items):
        folder, lock, asked = Path(tempfile.mkdtemp()), threading.Lock(), {}

        def get_eval(chat, content, **kw):
            id = int(re.search(r"ITEM(\d+)!", content)[1])
            with lock:
                asked[id] = asked.get(id, -1) + 1
            return items[id]["attempts"][asked[id]], None

        module("gpt4", Chat=lambda **kw: None, get_eval=get_eval)
        rows = [
            {
                "image_url": f"{i['id']}.jpg",
                "question": f"ITEM{i['id']}!",
                "description": "d",
                "type": i["type"],
                "answer": "a",
            }
            for i in items
        ]
        (folder / "reference").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "model").write_text(
            json.dumps(rows)
        )  # as an array: the script misreads JSON lines of one row
        sys.argv = [
            "review",
            "--answer_gpt_4v",
            f"{folder}/reference",
            "--answer_model",
            f"{folder}/model",
            "--save_dir",
            str(folder),
            "--modelB",
            "m",
        ]
        text = printed(lambda: runpy.run_path(str(script), run_name="__main__"))
        result = {
            "win": re.search(r"Score is (\S+)", text)[1],
            "win table": breakdown(folder / "A-GPT-4V_B-m.json"),
        }
        asked.clear()
        (folder / "reviews.json").write_text(
            json.dumps([{"review": f"ITEM{i['id']}!", "type_name": i["type"], "modelB": "m"} for i in items])
        )
        sys.argv = ["trust", "--jsonl_file", f"{folder}/reviews.json"]
        text = printed(lambda: runpy.run_path(str(trust_script), run_name="__main__"))
        return result | {
            "trust": re.search(r"Score is (\S+)", text)[1],
            "trust table": breakdown(folder / "reviews.hall.json"),
        }

    write(
        "refomb",
        [script, trust_script, excel_script],
        [run(cases.refomb_case(seed)) for seed in range(N_SEEDS)],
    )


def pope(script):
    "evaluate.py with its two paths filled in."
    source = script.read_text()
    names = {
        "Accuracy": "accuracy",
        "Precision": "precision",
        "Recall": "recall",
        "F1 score": "F1",
        "Yes ratio": "yes ratio",
    }

    def run(labels, answers):
        folder = Path(tempfile.mkdtemp())
        for name, rows in (("label_file", labels), ("ans_file", answers)):
            (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        filled = re.sub(
            r"^(ans_file|label_file) = ''$", lambda m: f"{m[1]} = {str(folder / m[1])!r}", source, flags=re.M
        )
        text = printed(lambda: exec(compile(filled, "evaluate.py", "exec"), {}))
        return {names[k]: float(v) for k, v in re.findall(r"^(\w[\w ]*): (\S+)$", text, re.M)} or text

    write("pope", [script], [run(*cases.pope_case(seed)) for seed in range(N_SEEDS)])


def mmstar(script):
    "MMStar_eval on a table in memory."
    import logging

    from tqdm import tqdm

    saved, tables = {}, {}
    module("vlmeval")
    module(
        "vlmeval.smp",
        load=tables.get,
        dump=lambda score, path: saved.update(score=score),
        get_logger=logging.getLogger,
        tqdm=tqdm,
    )
    official = load(script)

    def run(rows):
        tables["t.xlsx"] = pandas.DataFrame(rows)
        printed(lambda: official.MMStar_eval("t.xlsx"))
        return saved.pop("score")

    write("mmstar", [script], [run(cases.mmstar_case(seed)) for seed in range(N_SEEDS)])


def llava(script):
    "RLHF-V's summary of LLaVA-Bench reviews."

    def run(reviews):
        folder = Path(tempfile.mkdtemp())
        (folder / "llava_test_gpt4.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reviews))
        sys.argv = ["summary", str(folder)]
        text = printed(lambda: runpy.run_path(str(script), run_name="__main__"))
        return {category: float(value) for category, value in re.findall(r"^(\w+) \[.*\] (\S+)$", text, re.M)}

    write("llava", [script], [run(cases.llava_case(seed)) for seed in range(N_SEEDS)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("amber", "rlaifv", "rlhfv", "pope", "mmstar", "data"):
        parser.add_argument(f"--{name}", type=lambda p: Path(p).resolve())
    args = parser.parse_args()
    sys.modules.update(cases.stand_in_modules())
    module("jsonlines", Reader=lambda f: (json.loads(line) for line in f if line.strip()))
    os.environ["TQDM_DISABLE"] = "1"
    if args.amber:
        amber(args.amber / "inference.py", args.data)
    if args.pope:
        pope(args.pope / "evaluate.py")
    if args.mmstar:
        mmstar(args.mmstar / "eval" / "vlmeval" / "evaluate" / "mmstar.py")
    if args.rlhfv:
        llava(args.rlhfv / "eval" / "summarize_gpt_llava_review.py")
    if args.rlaifv:
        halbench(args.rlaifv / "eval" / "eval_gpt_obj_halbench.py", args.data)
        refomb(args.rlaifv / "eval" / "eval_RefoMB_p0.py")
        mmhal(args.rlaifv / "eval" / "eval_gpt_mmhal.py")
