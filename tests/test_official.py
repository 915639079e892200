"""Files of the official scripts: written by hand as those scripts write them, read into our tables, and our
tables there and back.
"""

import json
import shutil
from dataclasses import replace

import pytest

from rlaifv_nb.exchange.inputs import import_prompts, numbered_rows
from rlaifv_nb.exchange.official import from_official, official_kind, read_tables, to_official
from rlaifv_nb.records import (
    Claim,
    Pair,
    Prompt,
    Response,
    SetAside,
    Verdict,
    read_manifest,
    read_table,
    resolve_path,
    write_rows,
    write_table,
)

EXAMPLE = {
    "prompts": "prompts",
    "responses": "01_sampling",
    "claims": "02_claims",
    "verdicts": "03_feedback",
    "pairs": "04_pairs",
}
EXAMPLE = {table: resolve_path(f"packaged:example/{folder}") for table, folder in EXAMPLE.items()}
RECORD = {"responses": Response, "claims": Claim, "verdicts": Verdict, "pairs": Pair}
PATH, QUESTION = "./examples/data_gen_example_imgs/imgs_detail/a.png", "What is shown?"
SUFFIX = " Please answer yes or no."


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The example run as official files."""
    folder = tmp_path_factory.mktemp("official")
    to_official(EXAMPLE, folder, "our-vlm", "our-labeler")
    return folder


def rows_of(path):
    return [row for _, row in numbered_rows(path)]


@pytest.mark.parametrize(
    "table, file, needs",
    [
        ("responses", "answers.jsonl", ()),
        ("responses", "divided.jsonl", ()),
        ("claims", "divided.gq.jsonl", ("responses",)),
        ("responses", "divided.gq.jsonl", ()),
        ("claims", "divided.gq.jsonl", ()),
        ("verdicts", "autocheck.jsonl", ("responses", "claims")),
        ("pairs", "pairs.jsonl", ()),
    ],
)
def test_our_tables_come_back_equal(official, tmp_path, table, file, needs):
    from_official(official / file, tmp_path, EXAMPLE["prompts"], **{t: EXAMPLE[t] for t in needs})
    assert read_table(tmp_path, table, RECORD[table]) == read_table(EXAMPLE[table], table, RECORD[table])
    assert read_manifest(tmp_path)["set_aside"] == {}


def test_input_file_comes_back_as_the_same_prompts(official, tmp_path):
    import_prompts(official / "input.jsonl", tmp_path)
    kept = {(p.prompt_id, p.image_sha, p.question) for p in read_table(EXAMPLE["prompts"], "prompts", Prompt)}
    assert {(p.prompt_id, p.image_sha, p.question) for p in read_table(tmp_path, "prompts", Prompt)} == kept


def test_written_rows_have_the_keys_that_the_official_scripts_read(official):
    """Keys from `GenDataset`, `construct_question_yesno` and `pair_construction.py`."""
    assert (official / "answers.jsonl").read_text()[0] == "[", "the official sampling writes an array"
    question, checked, pair = (
        rows_of(official / name)[0] for name in ("divided.gq.qas.jsonl", "autocheck.jsonl", "pairs.jsonl")
    )
    assert (
        question["question"] == question["metainfos"]["origin_changed_fact"] + SUFFIX
        and (official / question["image_path"]).exists()
    )
    assert checked["metainfos"]["metainfos"]["origin_question"] == question["metainfos"][
        "origin_question"
    ] and set(checked["scores"]) == {"yes", "Yes", "no", "No"}
    assert set(question["metainfos"]) >= {
        "origin_answer",
        "origin_fact",
        "origin_all_facts",
        "origin_changed_all_facts",
    }
    judge = pair["org_infos"]["scores"]["rejected"]["judge"]
    assert -list(judge.values()).count("0") == int(pair["org_infos"]["scores"]["rejected"]["score"]) and all(
        q.endswith(SUFFIX) for q in judge
    )


# rows as the official scripts write them


def answer(question_id, text, facts=None, questions=None):
    row = {
        "question_id": question_id,
        "ds_question_id": PATH,
        "raw_question": QUESTION,
        "answer": text,
        "metainfos": {"ds_question_id": PATH, "image_path": PATH, "metainfos": {"reference": ""}},
        "model_path": "liuhaotian/llava-v1.5-7b",
    }
    more = (
        {"raw_facts": "...", "facts": facts, "raw_changed_facts": "...", "changed_facts": questions}
        if questions is not None
        else {}
    )
    return row | more


def checked(question_id, question, yes, no):
    return {
        "question_id": question_id,
        "ds_question_id": PATH,
        "raw_question": question + SUFFIX,
        "answer": "Yes",
        "model_path": "openbmb/OmniLMM-12B",
        "scores": {"yes": yes[0], "Yes": yes[1], "no": no[0], "No": no[1]},
        "metainfos": {
            "question_id": question_id,
            "ds_question_id": PATH,
            "image_path": PATH,
            "metainfos": {"origin_question": QUESTION},
        },
    }


@pytest.fixture
def elsewhere(tmp_path):
    """One prompt whose picture lies in a folder `images`, and the folder."""
    picture = read_table(EXAMPLE["prompts"], "prompts", Prompt)[0]
    (tmp_path / "images/imgs_detail").mkdir(parents=True)
    shutil.copy(f"{EXAMPLE['prompts']}/{picture.image_path}", tmp_path / "images/imgs_detail/a.png")
    write_rows(
        tmp_path / "input.jsonl",
        [{"ds_question_id": PATH, "image_path": PATH, "question": QUESTION, "metainfos": {"reference": "x"}}],
    )
    import_prompts(tmp_path / "input.jsonl", tmp_path / "prompts", images=str(tmp_path / "images"))
    return tmp_path, read_table(tmp_path / "prompts", "prompts", Prompt)[0].prompt_id


@pytest.mark.parametrize("as_array", [True, False])
def test_official_answers_are_numbered_and_their_ids_kept(elsewhere, as_array):
    folder, prompt_id = elsewhere
    rows = [
        answer(40, "A cat."),
        answer(41, "A dog."),
        answer(42, "x") | {"raw_question": "Something else?"},
        answer(43, "x") | {"metainfos": {"image_path": "b.png"}},
    ]
    (folder / "a.jsonl").write_text(
        json.dumps(rows) if as_array else "".join(json.dumps(r) + "\n" for r in rows)
    )
    from_official(folder / "a.jsonl", folder / "r", folder / "prompts", images=folder / "images")
    assert read_table(folder / "r", "responses", Response) == [
        Response(f"{prompt_id}-{k:02d}", prompt_id, k, 0, t, "stop")
        for k, t in enumerate(("A cat.", "A dog."))
    ]
    assert rows_of(folder / "r/question_ids.jsonl")[1] == {
        "question_id": 41,
        "response_id": f"{prompt_id}-01",
    }
    assert [(s.row_id, s.reason) for s in read_table(folder / "r", "set_aside-responses", SetAside)] == [
        ("row 3", "no such prompt"),
        ("row 4", "no such prompt"),
    ]


def test_official_facts_and_scores_become_claims_and_verdicts(elsewhere):
    folder, prompt_id = elsewhere
    rows = [
        answer(7, "A cat. A cat.", ["A cat.", "A cat.", ""], ["Is there a cat?", "Is there a cat?", ""]),
        answer(8, "B", ["One", "Two"], ["One?"]),
        answer(9, "C", "none", []),
    ]
    write_rows(folder / "gq.jsonl", rows)
    from_official(folder / "gq.jsonl", folder / "c", folder / "prompts", images=folder / "images")
    claims = read_table(folder / "c", "claims", Claim)
    assert [(c.claim_id, c.text) for c in claims] == [
        (f"{prompt_id}-00-00", "A cat."),
        (f"{prompt_id}-00-01", "A cat."),
    ], "equal facts are two claims"
    assert read_manifest(folder / "c")["set_aside"] == {"facts and questions do not match": 2}
    write_rows(
        folder / "check.jsonl",
        [
            checked(7, "Is there a cat?", (0.25, 0.5), (0.125, 0.0)),
            checked(7, "Is there a cat?", (0.0, 0.0625), (0.0, 0.015625)),
            checked(7, "Is there a cat?", (0.5, 0), (0, 0)),
            checked(99, "One?", (0.5, 0), (0, 0)),
        ],
    )
    for name, mass, label in (("v", 0.1, "abstain"), ("v0", 0.0, "yes")):
        from_official(
            folder / "check.jsonl",
            folder / name,
            folder / "prompts",
            folder / "c",
            folder / "c",
            abstain_mass=mass,
        )
        assert read_table(folder / name, "verdicts", Verdict) == [
            Verdict(claims[0].claim_id, 0.75, 0.125, "yes"),
            Verdict(claims[1].claim_id, 0.0625, 0.015625, label),
        ]
        assert read_manifest(folder / name)["set_aside"] == {"no such claim": 2}


def test_official_pairs(elsewhere):
    folder, prompt_id = elsewhere
    info = {
        "scores": {
            "chosen": {"judge": {"Cat? Please answer yes or no.": "1"}, "score": "0"},
            "rejected": {"judge": {}, "score": "-2"},
        }
    }
    row = {
        "image_id": "a.png",
        "image_path": PATH,
        "ds_question_id": PATH,
        "question": QUESTION,
        "chosen": "A.",
        "rejected": "B.",
        "org_infos": info,
    }
    write_rows(
        folder / "p.jsonl", [row, row, row | {"chosen": "B. "}, row | {"chosen": "C.", "org_infos": {}}]
    )
    from_official(folder / "p.jsonl", folder / "p", folder / "prompts", images=folder / "images")
    assert read_table(folder / "p", "pairs", Pair) == [
        Pair(f"{prompt_id}-00-01", prompt_id, f"{prompt_id}-00", f"{prompt_id}-01", "A.", "B.", 0.0, -2.0),
        Pair(f"{prompt_id}-02-01", prompt_id, f"{prompt_id}-02", f"{prompt_id}-01", "C.", "B.", 0.0, -1.0),
    ]
    assert read_manifest(folder / "p")["set_aside"] == {
        "same texts as another pair": 1,
        "chosen equals rejected": 1,
    }


def test_abstention_survives_our_own_round_trip_only(official, tmp_path):
    """The official scores have no place for it; the label travels beside them."""
    verdicts = read_table(EXAMPLE["verdicts"], "verdicts", Verdict)
    write_table(tmp_path / "v", "verdicts", [replace(verdicts[0], label="abstain"), *verdicts[1:]])
    to_official(EXAMPLE | {"verdicts": tmp_path / "v"}, tmp_path / "o")
    from_official(
        tmp_path / "o/autocheck.jsonl",
        tmp_path / "back",
        EXAMPLE["prompts"],
        EXAMPLE["responses"],
        EXAMPLE["claims"],
    )
    assert read_table(tmp_path / "back", "verdicts", Verdict)[0].label == "abstain"
    bare = [row | {"metainfos": {}} for row in rows_of(tmp_path / "o/autocheck.jsonl")]
    write_rows(tmp_path / "bare.jsonl", bare)
    from_official(
        tmp_path / "bare.jsonl",
        tmp_path / "bare",
        EXAMPLE["prompts"],
        EXAMPLE["responses"],
        EXAMPLE["claims"],
    )
    assert read_table(tmp_path / "bare", "verdicts", Verdict)[0].label == verdicts[0].label


@pytest.mark.parametrize(
    "rows, says",
    [
        ([], "no keys"),
        ([{"a": 1}], "it has a; known are"),
        ([answer(1, "x"), {"a": 1}], "not a row of the official"),
    ],
)
def test_other_files_are_refused(elsewhere, rows, says):
    folder, _ = elsewhere
    write_rows(folder / "x.jsonl", rows)
    with pytest.raises(ValueError, match=says):
        from_official(folder / "x.jsonl", folder / "x", folder / "prompts")


def test_command_imports_an_official_file(official, tmp_path, capsys):
    from rlaifv_nb.runner.command import main

    assert (
        main(
            [
                "import",
                str(official / "answers.jsonl"),
                "--prompts",
                EXAMPLE["prompts"],
                "--out",
                str(tmp_path / "r"),
            ]
        )
        == 0
    )
    assert "responses: 240 rows" in capsys.readouterr().out
    assert (
        main(
            [
                "import",
                str(official / "autocheck.jsonl"),
                "--prompts",
                EXAMPLE["prompts"],
                "--out",
                str(tmp_path / "v"),
            ]
        )
        == 2
    )
    assert "name the folders of the responses and claims" in capsys.readouterr().err
    assert (
        official_kind(answer(1, "x")) == "answers"
        and len(read_tables({"prompts": EXAMPLE["prompts"]}).prompts) == 24
    )
