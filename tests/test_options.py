"""Options and parameters cells agree, and a value out of its range is refused before any work."""

import inspect
import json
from dataclasses import fields

import pytest

from rlaifv_nb import claims, dpo, feedback, pairs, reward_pairs, sampling
from rlaifv_nb.claims import ClaimsOptions
from rlaifv_nb.dpo import DpoOptions
from rlaifv_nb.feedback import FeedbackOptions
from rlaifv_nb.pairs import PairOptions
from rlaifv_nb.records import StageFolder, package_folder, read_manifest, resolve_path
from rlaifv_nb.reward_pairs import RewardPairOptions
from rlaifv_nb.runner.recipes import WORKING_PARAMETERS, notebook_parameters, parameter_defaults
from rlaifv_nb.sampling import SamplingOptions

STAGES = {
    "01_sampling": (SamplingOptions, sampling.run_sampling),
    "02_claims": (ClaimsOptions, claims.run_claims),
    "03_feedback": (FeedbackOptions, feedback.run_feedback),
    "04_pairs": (PairOptions, pairs.run_pairs),
    "04_reward_pairs": (RewardPairOptions, reward_pairs.run_reward_pairs),
    "05_dpo": (DpoOptions, dpo.run_dpo),
}
# Parameters of a notebook that say where tables are, which model is opened, and how.
PLACES = {"out", "prompts", "responses", "claims", "verdicts", "candidates", "pairs"}
OPENING = {
    "policy",
    "adapter",
    "splitter",
    "labeler",
    "labeler_adapter",
    "quantisation",
    "dtype",
    "attention",
    "device",
    "share_prefix",
    "system_prompt",
    "pad_pictures",
    "max_pixels",
}


def own_name(f):
    "A field's name in the parameters cell."
    return "round_number" if f.name == "round" else f.name


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_are_those_of_the_parameters_cell(stage):
    options, _ = STAGES[stage]
    notebook = package_folder("nbs") / f"{stage}.ipynb"
    defaults = parameter_defaults(notebook)
    kinds = notebook_parameters(notebook)
    assert {own_name(f): f.default for f in fields(options)} == {
        name: value for name, value in defaults.items() if name not in PLACES | OPENING
    }
    assert {own_name(f): f.type for f in fields(options)} == {
        name: kind for name, kind in kinds.items() if name not in PLACES | OPENING
    }
    assert options.of(defaults) == options()


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_recipe_may_change_before_it_resumes_is_not_in_the_manifest(stage):
    options, _ = STAGES[stage]
    working = {f.name for f in fields(options) if f.metadata["working"]}
    by_content = {"facts_prompt", "question_prompt"}  # the manifest names them by the hash of their texts
    assert working - by_content == set(WORKING_PARAMETERS.get(stage, ()))
    assert set(options().parameters) == {f.name for f in fields(options)} - working


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_called_alike(stage):
    "Folders and the model come first, everything else has a name, and what returns is the stage's folder."
    options, run = STAGES[stage]
    signature = inspect.signature(run)
    kinds = {name: p.kind for name, p in signature.parameters.items()}
    places = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert set(places) <= PLACES | {"vlm", "llm", "open_policy"} and "out" in places
    assert kinds["options"] is inspect.Parameter.KEYWORD_ONLY and signature.return_annotation is StageFolder


OUT_OF_RANGE = [
    (SamplingOptions, {"temperature": -0.1}, "temperature=-0.1 is not supported: choose at least 0"),
    (SamplingOptions, {"top_p": 0.0}, "top_p=0.0 is not supported: choose more than 0 and at most 1"),
    (SamplingOptions, {"n_samples": 0}, "n_samples=0 is not supported: choose at least 1"),
    (ClaimsOptions, {"divide": "half"}, "divide='half' is not supported: choose one of facts, whole"),
    (FeedbackOptions, {"abstain_mass": 1.5}, "choose at least 0 and at most 1"),
    (PairOptions, {"min_difference": 0.0}, "min_difference=0.0 is not supported: choose more than 0"),
    (PairOptions, {"draw": "best"}, "draw='best' is not supported: choose one of random, extremes"),
    (RewardPairOptions, {"max_similarity": float("nan")}, "max_similarity=nan is not supported"),
    (DpoOptions, {"loss_type": "cubic"}, "choose one of sigmoid, ipo, hinge"),
    (DpoOptions, {"loss_type": "hinge", "label_smoothing": 0.1}, "for the sigmoid loss only"),
    (DpoOptions, {"beta": float("inf")}, "beta=inf is not supported: choose more than 0"),
    (
        DpoOptions,
        {"lora_dropout": 1.0},
        "lora_dropout=1.0 is not supported: choose at least 0 and less than 1",
    ),
    (DpoOptions, {"epochs": "two"}, "epochs='two' is not supported: choose more than 0"),
]


@pytest.mark.parametrize("options, values, says", OUT_OF_RANGE)
def test_a_value_out_of_its_range_is_refused(options, values, says):
    with pytest.raises(ValueError) as found:
        options(**values)
    assert says in str(found.value)


def test_a_parameter_that_a_notebook_lacks_is_an_error():
    values = {f.name: f.default for f in fields(DpoOptions)} | {"round_number": 1}
    del values["beta"]
    with pytest.raises(KeyError, match="beta"):
        DpoOptions.of(values)


def test_the_manifest_holds_the_options(tmp_path):
    example = {name: resolve_path(f"packaged:example/{name}") for name in ("01_sampling", "02_claims")}
    options = PairOptions(max_pairs_per_prompt=1, draw="extremes")
    stage = pairs.run_pairs(
        resolve_path("packaged:example/prompts"),
        example["01_sampling"],
        example["02_claims"],
        resolve_path("packaged:example/03_feedback"),
        tmp_path,
        options=options,
    )
    assert stage.manifest == read_manifest(tmp_path)
    assert PairOptions(**stage.manifest["parameters"]) == options
    assert json.loads((tmp_path / "started.json").read_text())["parameters"] == options.parameters
