"""Numbers that are none, labelers that are not what they seem, one open model at a time: 03, 06 and 07."""

import ast
import dataclasses
import gc
import inspect
import json
import random
import re
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlaifv_nb.benchmarks.iconworld import read_cases
from rlaifv_nb.engine import models
from rlaifv_nb.engine.models import open_vlm, surface_ids
from rlaifv_nb.evaluation import Evaluation, run_evaluation
from rlaifv_nb.feedback import FeedbackOptions, judge_claims, label_of, labeler_warnings, run_feedback
from rlaifv_nb.guided_decoding import read_candidates, run_guided_decoding
from rlaifv_nb.iconworld.world import balanced_claims, make_scene, question_text, write_prompts
from rlaifv_nb.records import (
    Claim,
    Prompt,
    Response,
    SetAside,
    Verdict,
    package_folder,
    read_manifest,
    read_table,
    write_table,
)

POLICY, ADAPTER = "packaged:iconworld-vlm", "packaged:iconworld-aligned"
EXAMPLE = package_folder("data") / "example"
NBS = Path(__file__).resolve().parent.parent / "nbs"


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    "Four prompts of the example with three responses each, and their claims, as tables in one folder."
    folder = tmp_path_factory.mktemp("some")
    prompts = read_table(EXAMPLE / "prompts", "prompts", Prompt)[:4]
    wanted = {p.prompt_id for p in prompts}
    responses = [
        r
        for r in read_table(EXAMPLE / "01_sampling", "responses", Response)
        if r.prompt_id in wanted and r.sample_index < 3
    ]
    kept = {r.response_id for r in responses}
    claims = [c for c in read_table(EXAMPLE / "02_claims", "claims", Claim) if c.response_id in kept]
    write_prompts_at(folder, prompts)
    write_table(folder, "responses", responses)
    write_table(folder, "claims", claims)
    return folder


def write_prompts_at(folder, prompts):
    "Prompts of the example as a table in another folder."
    rows = [Prompt(**vars(p) | {"image_path": str(EXAMPLE / "prompts" / p.image_path)}) for p in prompts]
    write_table(folder, "prompts", rows)


def judge(some, out, vlm, **options):
    return run_feedback(some, some, some, out, vlm, options=FeedbackOptions(**options)).read(
        "verdicts", Verdict
    )


def tokens_of(vlm, word):
    return [i for i in range(len(vlm.tokenizer)) if vlm.tokenizer.decode([i]).strip() == word]


def break_word(vlm, word):
    "One damaged row of the embeddings: whatever contains the word is NaN."
    found = tokens_of(vlm, word)
    assert found
    with torch.no_grad():
        vlm.core.get_input_embeddings().weight[found] = float("nan")


def break_head(vlm):
    with torch.no_grad():
        vlm.core.lm_head.weight[5, 5] = float("nan")


# 03


@pytest.mark.parametrize(
    "p_yes, p_no, mass, label",
    [
        (0.0, 0.0, 0.0, "abstain"),
        (1e-9, 3e-8, 0.0, "abstain"),
        (3e-3, 1e-3, 0.0, "yes"),
        (3e-3, 1e-3, 0.1, "abstain"),
        (0.5, 0.5, 0.1, "no"),
    ],
)
def test_nothing_on_either_word_is_an_abstention(p_yes, p_no, mass, label):
    assert label_of(p_yes, p_no, mass) == label


@pytest.mark.parametrize("pair", [(float("nan"), 0.1), (0.1, float("nan")), (float("inf"), 0.0)])
def test_what_is_not_a_number_has_no_label(pair):
    with pytest.raises(ValueError, match="not a number, so not a verdict"):
        label_of(*pair)


def test_a_claim_without_a_number_is_set_aside_alone(some, tmp_path, capsys):
    """NaN in a single word: its claims get no verdict, and their neighbours in the same rows keep theirs."""
    healthy = {v.claim_id: v for v in judge(some, tmp_path / "healthy", open_vlm(POLICY))}
    claims = read_table(some, "claims", Claim)
    word, n = Counter(
        w for c in claims for w in re.findall(r"[a-z]{3,}", c.question) if w not in ("there", "the", "image")
    ).most_common()[-1]
    vlm = open_vlm(POLICY)
    break_word(vlm, word)
    verdicts = judge(some, tmp_path / "broken", vlm)
    manifest = read_manifest(tmp_path / "broken")
    without = {c.claim_id for c in claims if word in re.findall(r"[a-z]+", c.question)}
    set_aside = read_table(tmp_path / "broken", "set_aside-verdicts", SetAside)
    assert {s.row_id for s in set_aside} == without and 0 < len(without) < len(claims) / 2
    assert all(s.reason == "not a number" and "float16 overflowed" in s.detail for s in set_aside)
    assert manifest["rows_in"] == len(claims) == manifest["rows_out"] + manifest["set_aside"]["not a number"]
    assert {v.claim_id for v in verdicts} == {c.claim_id for c in claims} - without
    for v in verdicts:
        assert v.label == healthy[v.claim_id].label and abs(v.p_yes - healthy[v.claim_id].p_yes) < 1e-4
    (warning,) = manifest["warnings"]
    assert f"{len(without)} of {len(claims)} rows are set aside" in warning
    assert f"WARNING: {warning}" in capsys.readouterr().out


def test_a_labeler_without_numbers_stops_the_stage(some, tmp_path):
    vlm = open_vlm(POLICY)
    break_head(vlm)
    with pytest.raises(ValueError, match="iconworld-vlm gives no numbers: all .*p_yes = nan.*float16"):
        judge(some, tmp_path, vlm)
    assert not (tmp_path / "manifest.json").exists()


def test_it_stops_before_it_has_judged_everything(tmp_path):
    asked = []

    def broken(pictures, questions):
        asked.extend(pictures)
        return [[(float("nan"), float("nan"))] * len(qs) for qs in questions]

    prompts = read_table(EXAMPLE / "prompts", "prompts", Prompt)
    claims = {p.prompt_id: [Claim(f"{p.prompt_id}-{k}", "", "", f"{k}?") for k in range(3)] for p in prompts}
    verdicts, set_aside = judge_claims(prompts[:2], claims, EXAMPLE / "prompts", broken)
    assert not verdicts and len(set_aside) == 6
    assert len(asked) == 2, "a model without any number is not asked again"


def test_a_half_precision_overflow_is_named(some, tmp_path):
    """Weights that bfloat16 and float32 stand, and float16 does not."""

    def large(dtype):
        vlm = open_vlm(POLICY, dtype=dtype)
        with torch.no_grad():
            vlm.core.model.language_model.layers[2].mlp.down_proj.weight *= 1e5
        return vlm

    with pytest.raises(ValueError, match="gives no numbers.*choose dtype bfloat16 or float32"):
        judge(some, tmp_path / "float16", large("float16"))
    assert judge(some, tmp_path / "bfloat16", large("bfloat16"))
    assert read_manifest(tmp_path / "bfloat16")["set_aside"] == {}


def without_picture(vlm):
    for p in vlm.core.model.multi_modal_projector.parameters():
        p.data.zero_()


def without_yes(vlm):
    with torch.no_grad():
        vlm.core.lm_head.weight[surface_ids(vlm.tokenizer, "yes")] = 0


def another_template(vlm):
    text = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    vlm.processor.chat_template = text
    vlm.tokenizer.chat_template = text


@pytest.mark.parametrize(
    "spoil, says",
    [
        (without_picture, "are rejected. Likely reason: the labeler says no to everything"),
        (without_yes, "are rejected. Likely reason: the labeler says no to everything"),
        (another_template, r"abstains on .* \(100%\).*chat template that is not its own"),
    ],
)
def test_a_labeler_that_is_not_what_it_seems_is_a_warning(spoil, says, some, tmp_path, capsys):
    vlm = open_vlm(POLICY)
    spoil(vlm)
    judge(some, tmp_path, vlm)
    warnings = read_manifest(tmp_path)["warnings"]
    assert len(warnings) == 1 and re.search(says, warnings[0]), warnings
    assert f"WARNING: {warnings[0]}" in capsys.readouterr().out


def test_a_good_labeler_is_no_warning(some, tmp_path):
    judge(some, tmp_path, open_vlm(POLICY))
    assert read_manifest(tmp_path)["warnings"] == []


def test_the_same_answer_about_every_picture_is_named():
    claims = [Claim(f"{p}{k}", p, "", f"Is there a thing {k}?") for p in "ab" for k in range(30)]
    prompt_of = {"a": "a", "b": "b"}
    unsure = [Verdict(c.claim_id, 0.3, 0.6, "no") for c in claims]
    assert "picture does not reach the labeler: 30 of 30" in labeler_warnings(unsure, claims, prompt_of)[0]
    sure = [Verdict(c.claim_id, 0.0, 1.0, "no") for c in claims]
    assert "says no to everything" in labeler_warnings(sure, claims, prompt_of)[0]
    seeing = [Verdict(c.claim_id, 0.3 if c.response_id == "a" else 0.1, 0.6, "no") for c in claims]
    assert "does not reach" not in labeler_warnings(seeing, claims, prompt_of)[0]
    half = [Verdict(c.claim_id, 0.3, 0.6, "no" if k % 2 else "yes") for k, c in enumerate(claims)]
    assert labeler_warnings(half, claims, prompt_of) == [], "half is not more than half"
    assert "float16" in labeler_warnings(unsure, claims, prompt_of, "float16")[0]


def test_the_plain_path_is_said(some, tmp_path, capsys):
    judge(some, tmp_path, open_vlm(POLICY, share_prefix=False))
    out = capsys.readouterr().out
    assert "packaged:iconworld-vlm reads the picture and its prompt again for each question" in out
    assert "share_prefix is false" in out


def test_claims_of_another_run_are_refused(some, tmp_path):
    write_table(tmp_path, "responses", read_table(some, "responses", Response)[3:])
    with pytest.raises(ValueError, match="its response .* is not in the responses table"):
        run_feedback(some, tmp_path, some, tmp_path / "out", open_vlm(POLICY))


# 06 and 07


def opened_broken(monkeypatch, spoil):
    "Every model that is opened from now on is spoilt."
    right = models.open_vlm

    def wrong(*args, **options):
        vlm = right(*args, **options)
        spoil(vlm)
        return vlm

    monkeypatch.setattr(models, "open_vlm", wrong)


def test_evaluation_without_numbers_stops(monkeypatch, tmp_path):
    opened_broken(monkeypatch, break_head)
    with pytest.raises(ValueError, match=r"base \(packaged:iconworld-vlm\) gives no numbers: all 3 rows"):
        run_evaluation(tmp_path, POLICY, n_scenes=3, max_new_tokens=8)


def questions_of(scene):
    return balanced_claims(scene, random.Random(f"questions/0/{scene.scene_id}"))


def test_a_scene_without_numbers_is_set_aside(monkeypatch, tmp_path):
    asked = [question_text(c) for i in range(30) for c, _ in questions_of(make_scene("test", i))]
    word = Counter(w for text in asked for w in set(re.findall(r"[a-z]{3,}", text))).most_common()[-1][0]
    run_evaluation(tmp_path / "healthy", POLICY, n_scenes=30, max_new_tokens=8)
    opened_broken(monkeypatch, lambda vlm: break_word(vlm, word))
    run_evaluation(tmp_path / "broken", POLICY, n_scenes=30, max_new_tokens=8)
    healthy, broken = (read_cases(tmp_path / name, 0) for name in ("healthy", "broken"))
    manifest = read_manifest(tmp_path / "broken")
    n = manifest["set_aside"]["not a number"]
    assert manifest["rows_in"] == 30 == manifest["rows_out"] + n and 0 < n < 15
    assert len(broken) == manifest["rows_out"]
    kept = {c.scene_id for c in broken}
    assert [c.answers for c in broken] == [c.answers for c in healthy if c.scene_id in kept]
    assert "not a number" not in str(broken) and manifest["warnings"]


def test_guided_decoding_without_numbers_stops(monkeypatch, some, tmp_path):
    write_prompts(tmp_path / "prompts", {"test": 2})
    opened_broken(monkeypatch, break_head)
    with pytest.raises(ValueError, match="not one candidate .*'empty response': 8.*gives no numbers"):
        run_guided_decoding(
            tmp_path / "prompts", tmp_path / "out", POLICY, ADAPTER, n_candidates=2, max_new_tokens=8
        )
    with pytest.raises(ValueError, match="gives no numbers: all .*policy_sum_logp = nan"):
        run_guided_decoding(some, tmp_path / "given", POLICY, ADAPTER, responses=some)


def test_a_candidate_without_a_number_is_set_aside_alone(monkeypatch, some, tmp_path):
    score = dict(responses=some, batch_size=2)
    run_guided_decoding(some, tmp_path / "healthy", POLICY, ADAPTER, **score)
    responses = read_table(some, "responses", Response)
    said = Counter(w for r in responses for w in set(re.findall(r"[a-z]{3,}", r.text.lower())))
    vocabulary = open_vlm(POLICY)
    word = next(w for w, n in said.items() if n == 1 and tokens_of(vocabulary, w))
    opened_broken(monkeypatch, lambda vlm: break_word(vlm, word))
    run_guided_decoding(some, tmp_path / "broken", POLICY, ADAPTER, **score)
    manifest = read_manifest(tmp_path / "broken")
    candidates = (read_candidates(tmp_path / name) for name in ("healthy", "broken"))
    healthy, broken = ({c.response_id: c for c in found} for found in candidates)
    missing = {r.response_id for r in responses if word in re.findall(r"[a-z]+", r.text.lower())}
    assert set(healthy) - set(broken) == missing and len(missing) == 1
    assert manifest["set_aside"] == {"not a number": 1} and len(manifest["warnings"]) == 1
    assert all(abs(c.policy_sum_logp - healthy[i].policy_sum_logp) < 1e-3 for i, c in broken.items())


def test_an_answer_with_a_special_token_is_set_aside(some, tmp_path):
    responses = read_table(some, "responses", Response)
    spoilt = [Response(**vars(responses[0]) | {"text": "A cat <image>."}), *responses[1:]]
    write_table(tmp_path / "given", "responses", spoilt)
    run_guided_decoding(some, tmp_path / "out", POLICY, ADAPTER, responses=tmp_path / "given")
    assert read_manifest(tmp_path / "out")["set_aside"] == {"cannot be scored": 1}
    (aside,) = read_table(tmp_path / "out", "set_aside-candidates-aligned", SetAside)
    assert aside.row_id == responses[0].response_id and "special token <image>" in aside.detail


@pytest.mark.parametrize("stage", ["06", "07"])
def test_one_model_is_open_at_a_time(stage, monkeypatch, tmp_path):
    right, alive, most = models.open_vlm, [], []

    def counted(*args, **options):
        vlm = right(*args, **options)
        alive.append(weakref.ref(vlm.core))
        most.append(sum(model() is not None for model in alive))
        return vlm

    monkeypatch.setattr(models, "open_vlm", counted)
    if stage == "06":
        run_evaluation(tmp_path / "out", POLICY, f"a={ADAPTER},b={ADAPTER}", n_scenes=2, max_new_tokens=8)
    else:
        write_prompts(tmp_path / "prompts", {"test": 2})
        run_guided_decoding(
            tmp_path / "prompts", tmp_path / "out", POLICY, ADAPTER, n_candidates=2, max_new_tokens=8
        )
    assert most == [1, 1, 1] if stage == "06" else most == [1]
    gc.collect()
    assert not any(model() for model in alive), "nothing holds a model behind the stage"


# parameters


def told_in(notebook):
    "Parameter -> default in a notebook's parameters cell."
    cells = json.loads((NBS / f"{notebook}.ipynb").read_text())["cells"]
    (source,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def test_defaults_of_guided_decoding_are_those_of_the_parameters_cell():
    told = told_in("07_guided_decoding")
    parameters = inspect.signature(run_guided_decoding).parameters
    known = {name: p for name, p in parameters.items() if name in told}
    defaults = {name: p.default for name, p in known.items() if p.default is not p.empty}
    assert len(defaults) >= 3 and defaults == {name: told[name] for name in defaults}
    assert all(known[name].kind is inspect.Parameter.KEYWORD_ONLY for name in defaults)


def test_defaults_of_an_evaluation_are_those_of_the_parameters_cell():
    """Policy and adapters have none of their own: the notebook shows the packaged models."""
    told = told_in("06_evaluation")
    defaults = {f.name: f.default for f in dataclasses.fields(Evaluation)}
    packaged = {"policy", "adapters", "out"}
    assert set(told) - packaged == set(defaults) - packaged
    assert {name: told[name] for name in set(told) - packaged} == {
        name: defaults[name] for name in set(defaults) - packaged
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda out: run_evaluation(out, POLICY, n_scenes=0),
        lambda out: run_evaluation(out, POLICY, batch_size=-1),
        lambda out: run_guided_decoding(out, out, POLICY, ADAPTER, top_k=-1),
        lambda out: run_guided_decoding(out, out, POLICY, ADAPTER, temperature=-1.0),
        lambda out: run_feedback(out, out, out, out, None, options=FeedbackOptions(abstain_mass=1.5)),
        lambda out: run_feedback(out, out, out, out, None, options=FeedbackOptions(batch_size=0)),
    ],
)
def test_senseless_options_are_refused_before_work(call, tmp_path):
    with pytest.raises(ValueError, match="need |is not supported: choose"):
        call(tmp_path)
