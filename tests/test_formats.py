"""Public formats there and back, merged weights, the adapter's card and lineage, and a run's exports."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from rlaifv_nb.engine.models import adapter_lineage, card_name, folder_sha, open_vlm, write_adapter_card
from rlaifv_nb.exchange import public as P
from rlaifv_nb.records import (
    Pair,
    Prompt,
    RefLogp,
    SetAside,
    read_manifest,
    read_table,
    resolve_path,
    sha256_of,
)
from rlaifv_nb.runner.recipes import load_recipe, recipe_text

POLICY, ADAPTER = "packaged:iconworld-vlm", "packaged:iconworld-aligned"


@pytest.fixture
def written(tmp_path):
    """The example's prompts in a folder of the test's own, and eight pairs about them."""
    shutil.copytree(resolve_path("packaged:example/prompts"), tmp_path / "prompts")
    pairs = read_table(resolve_path("packaged:example/04_pairs"), "pairs", Pair)[:8]
    used = {p.prompt_id for p in pairs}
    return (
        tmp_path,
        [p for p in read_table(tmp_path / "prompts", "prompts", Prompt) if p.prompt_id in used],
        pairs,
    )


def test_rlaifv_round_trip_through_parquet_is_exact(written):
    folder, prompts, rows = written
    dataset, set_aside = P.to_rlaifv_dataset(rows, prompts, folder / "prompts")
    assert dataset.column_names == list(P.RLAIFV_COLUMNS) and set_aside == []
    (folder / "parquet").mkdir()
    dataset.select(range(3)).to_parquet(folder / "parquet/0.parquet")
    dataset.select(range(3, len(rows))).to_parquet(folder / "parquet/1.parquet")
    back_prompts, back, set_aside = P.from_rlaifv_dataset(folder / "parquet", folder / "back")
    assert back == rows == read_table(folder / "back", "pairs", Pair) and set_aside == []

    def plain(table):
        return {replace(p, image_path="") for p in table}

    assert plain(back_prompts) == plain(prompts) and len(back_prompts) == len(prompts)
    assert all(sha256_of((folder / "back" / p.image_path).read_bytes()) == p.image_sha for p in back_prompts)
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        P.from_rlaifv_dataset(folder / "nowhere", folder / "back2")


def test_trl_round_trip_keeps_question_answers_and_image(written):
    folder, prompts, rows = written
    dataset, _ = P.to_trl_dataset(rows, prompts, folder / "prompts")
    assert dataset[0]["prompt"] == [
        {"role": "user", "content": next(p.question for p in prompts if p.prompt_id == rows[0].prompt_id)}
    ] and dataset[0]["images"][0].size == (224, 224)
    back_prompts, back, set_aside = P.from_trl_dataset(dataset, folder / "back")
    assert [(p.prompt_id, p.chosen, p.rejected) for p in back] == [
        (p.prompt_id, p.chosen, p.rejected) for p in rows
    ] and set_aside == []
    assert {p.image_sha for p in back_prompts} == {p.image_sha for p in prompts}


def picture(colour="red", kind="PNG", size=6):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, kind)
    return {"bytes": file.getvalue(), "path": "../../escape.png"}


def dataset_of(rows):
    import datasets

    features = {n: datasets.Image() if n == "image" else datasets.Value("string") for n in P.RLAIFV_COLUMNS}
    return datasets.Dataset.from_list(
        [{n: r.get(n) for n in P.RLAIFV_COLUMNS} for r in rows], features=datasets.Features(features)
    )


GOOD = {
    "image": picture(),
    "question": "What?",
    "chosen": "A dog.",
    "rejected": "A cat.",
    "origin_split": json.dumps({"model": "x"}),
    "idx": "1",
}


def test_unusable_rows_are_set_aside_with_index_and_reason(tmp_path):
    half = {"bytes": picture(kind="JPEG", size=200)["bytes"][:-400], "path": None}
    rows = [
        GOOD,
        GOOD | {"image": {"bytes": b"no image", "path": None}},
        GOOD | {"image": half},
        GOOD | {"image": None},
        GOOD | {"chosen": None},
        GOOD | {"question": " "},
        GOOD | {"rejected": "A <image> cat."},
        GOOD,
    ]
    prompts, pairs, set_aside = P.from_rlaifv_dataset(dataset_of(rows), tmp_path)
    assert [(s.row_id, s.reason) for s in set_aside] == [
        ("row 1", "broken image"),
        ("row 2", "broken image"),
        ("row 3", "missing field"),
        ("row 4", "missing field"),
        ("row 5", "missing field"),
        ("row 6", "image placeholder in text"),
        ("row 7", "same texts as another pair"),
    ]
    assert len(prompts) == len(pairs) == 1 and read_table(tmp_path, "set_aside-pairs", SetAside) == set_aside
    assert [p.parent.name for p in tmp_path.rglob("*.png")] == ["images"], (
        "the row's own path must not be used"
    )


def test_rows_from_elsewhere_get_ids_by_text(tmp_path):
    rows = [GOOD, GOOD | {"chosen": "A cow."}, GOOD | {"image": picture("blue")}]
    _, pairs, _ = P.from_rlaifv_dataset(dataset_of(rows), tmp_path)
    first = pairs[0].prompt_id
    assert [p.pair_id for p in pairs] == [f"{first}-00-01", f"{first}-02-01", f"{pairs[2].prompt_id}-00-01"]
    assert pairs[0].rejected_id == pairs[1].rejected_id == f"{first}-01" and pairs[2].prompt_id != first
    assert all((p.chosen_score, p.rejected_score) == (0.0, -1.0) for p in pairs)


@pytest.mark.parametrize(
    "origin_split", [None, "train", "[1]", json.dumps({"prompt_id": "of another image", "chosen_id": "x"})]
)
def test_origin_split_of_others_is_not_ours(tmp_path, origin_split):
    _, [only], _ = P.from_rlaifv_dataset(dataset_of([GOOD | {"origin_split": origin_split}]), tmp_path)
    assert only.chosen_id == f"{only.prompt_id}-00"


def test_equal_texts_are_refused_naming_the_row(tmp_path, written):
    with pytest.raises(ValueError, match="row 1: chosen equals rejected"):
        P.from_rlaifv_dataset(dataset_of([GOOD, GOOD | {"rejected": "A dog. "}]), tmp_path / "x")
    folder, prompts, rows = written
    with pytest.raises(ValueError, match="row 0: chosen equals rejected"):
        P.to_trl_dataset([replace(rows[0], rejected=rows[0].chosen)], prompts, folder / "prompts")


def test_export_sets_a_missing_picture_aside_and_refuses_a_pair_without_prompt(written):
    folder, prompts, rows = written
    (folder / "prompts" / prompts[0].image_path).unlink()
    dataset, set_aside = P.to_rlaifv_dataset(rows, prompts, folder / "prompts")
    lost = [i for i, p in enumerate(rows) if p.prompt_id == prompts[0].prompt_id]
    assert set_aside == [SetAside(f"row {i}", "missing field", "image") for i in lost] and len(
        dataset
    ) == len(rows) - len(lost)
    with pytest.raises(ValueError, match="is in no table"):
        P.to_rlaifv_dataset(
            rows, [p for p in prompts if p.prompt_id != rows[0].prompt_id], folder / "prompts"
        )


def test_trl_blocks_are_read_and_other_shapes_set_aside(tmp_path):
    import datasets

    def say(role, *blocks):
        return [{"role": role, "content": [{"type": kind, "text": text} for kind, text in blocks]}]

    good = {
        "images": [picture()],
        "prompt": say("user", ("image", None), ("text", "What?")),
        "chosen": say("assistant", ("text", "A dog.")),
        "rejected": say("assistant", ("text", "A cat.")),
    }
    rows = [
        good,
        good | {"images": [picture(), picture()]},
        good | {"prompt": good["prompt"] * 2},
        good | {"images": None},
    ]
    block = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.List(block)})
    features = datasets.Features(
        {n: turns for n in ("prompt", "chosen", "rejected")} | {"images": datasets.List(datasets.Image())}
    )
    prompts, pairs, set_aside = P.from_trl_dataset(
        datasets.Dataset.from_list(rows, features=features), tmp_path
    )
    assert (prompts[0].question, pairs[0].chosen, pairs[0].rejected) == ("What?", "A dog.", "A cat.") and len(
        pairs
    ) == 1
    assert [(s.row_id, s.detail) for s in set_aside] == [
        ("row 1", "image"),
        ("row 2", "question"),
        ("row 3", "image"),
    ]


def test_files_are_written_in_slices_and_nothing_stays_half_written(written):
    folder, prompts, rows = written
    reference = [RefLogp(p.pair_id, -10.0 - k, 20 + k, -0.0 - 3 * (k + 1), 7) for k, p in enumerate(rows)]

    def make(part):
        return P.to_rlaifv_dataset(part, prompts, folder / "prompts", reference)

    assert (
        P.write_parquet(rows, make, folder / "logp", "RLAIF-V-Dataset-withlogp", rows_per_file=5, step=2)
        == []
    )
    assert sorted(p.name for p in (folder / "logp").iterdir()) == [
        "RLAIF-V-Dataset-withlogp_000-5.parquet",
        "RLAIF-V-Dataset-withlogp_001-3.parquet",
    ]
    _, back, _ = P.from_rlaifv_dataset(folder / "logp", folder / "back")
    assert back == rows and read_table(folder / "back", "reference", RefLogp) == reference


def test_slices_name_the_pair_that_is_set_aside(written):
    folder, prompts, rows = written
    lost = next(p for p in prompts if p.prompt_id == rows[-1].prompt_id)
    (folder / "prompts" / lost.image_path).unlink()
    aside = P.write_parquet(
        rows, lambda part: P.to_rlaifv_dataset(part, prompts, folder / "prompts"), folder / "out", step=3
    )
    assert [s.row_id for s in aside] == [p.pair_id for p in rows if p.prompt_id == lost.prompt_id]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"logps": [-4.0, -0.5, [-0.5, -3.5], -6.0, -2.0, []]}', RefLogp("p", -4.0, 8, -6.0, 3)),
        ("[-4.0, -0.5, [], -6.0, -2.0, []]", RefLogp("p", -4.0, 8, -6.0, 3)),
        ("[-4.0, 0.0, [], -6.0, -2.0, []]", None),
        ("[1, 2]", None),
        (None, None),
        ("no JSON", None),
        ('{"other": 1}', None),
    ],
)
def test_both_official_forms_of_logps_are_read(text, expected):
    """As `muffin/data/datasets.py`, `RLAIFVDataset.__getitem__`: a list, or an object with that list."""
    assert P.read_logps({"logps": text}, "p") == expected


@pytest.mark.parametrize(
    "text, model, round, expected",
    [
        ('{"model": "LLaVA-1.5-7B"}', "llava15", 0, True),
        ('{"model": "LLaVA-1.5-7B"}', "omnilmm", 0, False),
        ('{"iter": 3}', "", 3, True),
        ('{"iter": 3}', "", 30, False),
        ('{"model": "m_iter2_x"}', "", 2, True),
        ('{"model": "m_iter12"}', "", 2, False),
        ('{"a": {"b": ["OmniLMM-12B", "2nd round"]}}', "omni", 2, True),
        ("plain text round1", "", 1, True),
        (None, "", 0, True),
        (None, "", 1, False),
        ('{"model": "7b"}', "", 7, False),
    ],
)
def test_origin_is_matched_whatever_its_keys(text, model, round, expected):
    assert P.origin_matches(text, model, round) == expected


# merged weights, card, lineage


def test_merged_weights_are_a_plain_model_with_the_adapters_logprobs(tmp_path):
    """Plain transformers on one side, plain transformers with PEFT on the other."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    made = P.merge_adapter(POLICY, ADAPTER, tmp_path / "merged", dtype="float32")
    assert (
        made == json.loads((tmp_path / "merged/merged.json").read_text())
        and made["adapter_trained_with"] == "nf4"
        and not list(tmp_path.glob(".*"))
    )

    def base(path):
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    with_adapter = PeftModel.from_pretrained(base(resolve_path(POLICY)), resolve_path(ADAPTER)).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.new("RGB", (90, 60), "green")},
                {"type": "text", "text": "What is it?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        merged, adapted, plain = (
            m(**inputs).logits.log_softmax(-1)
            for m in (base(tmp_path / "merged"), with_adapter, base(resolve_path(POLICY)))
        )
    assert (merged - adapted).abs().max() < 1e-4 < 1e-2 < (merged - plain).abs().max()
    with pytest.raises(ValueError, match="not empty"):
        P.merge_adapter(POLICY, ADAPTER, tmp_path / "merged")


def test_another_quantisation_is_noted_or_refused():
    assert open_vlm(POLICY, ADAPTER).notes == {"adapter_quantisation": "trained with nf4, opened with none"}
    assert open_vlm(POLICY, ADAPTER, quantisation="nf4", trainable=True).notes == {}
    for options in ({"trainable": True}, {"any_quantisation": False}):
        with pytest.raises(
            ValueError,
            match="trained with quantisation 'nf4' and is opened with 'none': .*rlaifv export RUN --to "
            "merged",
        ):
            open_vlm(POLICY, ADAPTER, **options)
    assert open_vlm(POLICY, ADAPTER, trainable=True, any_quantisation=True).notes


def test_card_is_made_from_the_manifest_and_names_no_machine(undisturbed, tmp_path):
    adapter, manifest = undisturbed / "05_dpo/adapter", read_manifest(undisturbed / "05_dpo")
    text = (adapter / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert (
        yaml.safe_load(head)["base_model"] == "iconworld-vlm"
        and yaml.safe_load(head)["library_name"] == "peft"
    )
    for shown in (
        f"| pairs | {manifest['rows_out']} |",
        "| learning_rate | 0.0005 |",
        f"| best_dev_loss | {manifest['best_dev_loss']} |",
        "| round | 1 |",
        "iconworld 18",
    ):
        assert shown in body, shown
    import socket

    assert (
        str(undisturbed) not in text
        and socket.gethostname() not in body.split()
        and str(Path.home()) not in text
        and manifest["adapter_sha"] == folder_sha(adapter)
    )
    shutil.copytree(adapter, tmp_path / "adapter")
    lineage = adapter_lineage(adapter) | {"base": "/some/where/my-vlm"}
    (tmp_path / "adapter/lineage.json").write_text(json.dumps(lineage))
    write_adapter_card(tmp_path / "adapter", manifest)
    assert (
        "base_model: my-vlm\n" in (tmp_path / "adapter/README.md").read_text()
        and "/some" not in (tmp_path / "adapter/README.md").read_text()
    )
    assert [card_name(n) for n in ("packaged:x", "org/model", "~/m/a", "../b")] == [
        "x",
        "org/model",
        "a",
        "b",
    ]


# exports of a run


@pytest.fixture
def run(undisturbed, tmp_path):
    """The small run in the shape that the chain gives a run folder."""
    here = tmp_path / "run"
    here.mkdir()
    (here / "recipe.yaml").write_text(recipe_text(load_recipe("tiny", {"rounds": 1}), here))
    shutil.copytree(undisturbed / "prompts", here / "prompts")
    for stage in ("01_sampling", "02_claims", "03_feedback", "04_pairs", "05_dpo"):
        shutil.copytree(undisturbed / stage, here / "round_1" / stage)
    return here


def test_every_export_of_a_run(run, tmp_path, capsys):
    from rlaifv_nb.runner.command import main

    pairs = read_table(run / "round_1/04_pairs", "pairs", Pair)
    for to, more in (
        ("official", []),
        ("rlaifv-dataset", []),
        ("trl", []),
        ("rlaifv-dataset", ["--logps"]),
        ("merged", []),
    ):
        assert (
            main(["export", str(run), "--to", to, "--out", str(tmp_path / "".join([to, *more])), *more]) == 0
        )
    assert "answers.jsonl 108" in capsys.readouterr().out
    assert P.from_rlaifv_dataset(tmp_path / "rlaifv-dataset", tmp_path / "back")[1] == pairs
    assert P.from_rlaifv_dataset(tmp_path / "rlaifv-dataset--logps", tmp_path / "back2")[1] == [
        p for p in pairs if p in pairs
    ]
    assert read_table(tmp_path / "back2", "reference", RefLogp) == read_table(
        run / "round_1/05_dpo", "reference", RefLogp
    )
    assert [p.chosen for p in P.from_trl_dataset(P.open_rows(tmp_path / "trl"), tmp_path / "back3")[1]] == [
        p.chosen for p in pairs
    ]
    assert open_vlm(str(tmp_path / "merged")).sha != open_vlm(POLICY).sha


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--to", "xml"], "choose one of official, rlaifv-dataset, trl, merged"),
        (["--to", "trl", "--round", "4"], "no finished 04_pairs in round 4"),
        (["--to", "trl", "--logps"], "logps for --to rlaifv-dataset"),
        (["--to", "official", "--adapter", "x"], "for --to merged"),
    ],
)
def test_exports_that_cannot_be_are_refused_in_one_line(run, tmp_path, capsys, argv, says):
    from rlaifv_nb.runner.command import main

    assert main(["export", str(run), "--out", str(tmp_path / "x"), *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
