"""`rlaifv plan`: what it says of memory is what torch's allocator counts, packaged recipes fit their cards,
and what cannot fit is refused.
"""

import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from full_size_configs import FULL_SIZE, write_configs
from PIL import Image
from tiny_models import open_tiny

import rlaifv_nb
from rlaifv_nb.dpo import (
    DpoOptions,
    PairDataset,
    RowMaker,
    new_adapter,
    reference_logps,
    train_adapter,
    training_maker,
    usable_pairs,
)
from rlaifv_nb.engine import dryrun as dry
from rlaifv_nb.engine import prefix as prefixes
from rlaifv_nb.engine.caches import ContentCache
from rlaifv_nb.engine.models import OpenModel, attention_for, open_vlm, prompt_inputs, sibling_ids
from rlaifv_nb.engine.packing import PER_TOKEN
from rlaifv_nb.guided_decoding import sample_candidates
from rlaifv_nb.records import YES_NO_SUFFIX, Pair, Prompt, package_folder, write_table
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.plan import (
    CARDS,
    Card,
    Lengths,
    advise,
    config_folder,
    milder_to_stronger,
    plan_stage,
    stage_parameters,
)
from rlaifv_nb.runner.recipes import (
    RecipeError,
    check_recipe,
    load_recipe,
    packaged_recipes,
    parameter_defaults,
)
from rlaifv_nb.sampling import Question, vlm_generator

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from workload import SIZES, open_random  # noqa: E402

QUESTION, N, ROOM = "Describe the picture.", 4, 32
TEXTS = ("A red cat sits.", "Two dogs and a cat.")
NOTEBOOKS = package_folder("nbs")
CARD_OF = {
    "llava15-7b-24gb": 24,
    "llava15-7b-40gb": 40,
    "llava15-7b-80gb": 80,
    "qwen25-vl-7b": 24,
    "selfalign": 40,
    "smolvlm": 8,
}


def allocated(run):
    "Most bytes that torch's CPU allocator had given out during `run` above what it had before."
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture
def long_answers(monkeypatch):
    "Answers never end, so that they are as long as the plan takes them to be."
    pick = prefixes.pick_tokens
    monkeypatch.setattr(prefixes, "pick_tokens", lambda *args: torch.full_like(pick(*args), 11))


def models():
    "Models of two sizes, one of them in 4 bits too, and one that shares no prompts."
    larger = dataclasses.replace(SIZES["tiny"], hidden=256, layers=4, intermediate=688, vocabulary=4000)
    return {
        "icon nf4": partial(open_vlm, "packaged:iconworld-vlm", quantisation="nf4"),
        "larger": lambda: open_random(larger)[0],
        "gemma3": partial(open_tiny, "gemma3"),
    }


def within_a_tenth(planned, measured, weights):
    "Asserts it of work and weights together, and, less strictly, of the work alone."
    assert abs((planned + weights) / (measured + weights) - 1) < 0.1, (planned, measured, weights)
    assert abs(planned / measured - 1) < 0.15, (planned, measured)


@pytest.mark.parametrize("name", models())
def test_planned_memory_is_what_the_allocator_counts(name, tmp_path, long_answers):
    vlm = models()[name]()
    pictures, device = [Image.new("RGB", (224, 224), c) for c in ("white", "red")], "cpu"
    inputs = [prompt_inputs(vlm, picture, QUESTION) for picture in pictures]

    def fresh():
        config, processor = vlm.core.config, vlm.processor
        return dry.open_dry(config, processor, "float32", vlm.quantisation, share_prefix=vlm.shares_prefix)

    d = fresh()
    weights = dry.weight_bytes(d.model)
    assert (
        weights == sum(p.nbytes for p in vlm.model.parameters()) + sum(b.nbytes for b in vlm.model.buffers())
        or vlm.quantisation == "nf4"
    )

    asked = [
        Question(k, Prompt(str(k), "", "", QUESTION), picture, [1] * N, [0.7] * N)
        for k, picture in enumerate(pictures)
    ]
    measured = allocated(lambda: list(vlm_generator(vlm, 1.0, ROOM)(asked)))
    within_a_tenth(
        dry.dry_peak(d, lambda: dry.sampling_work(d, dry.read_prompts(d, inputs), N, ROOM)), measured, weights
    )

    questions = [f"Is there a cat number {i}?" for i in range(6)]
    ask, head = prefixes.yes_no_asker(vlm), prompt_inputs(vlm, pictures[0], questions[0] + YES_NO_SUFFIX)
    rows = [sibling_ids(vlm, q + YES_NO_SUFFIX, head) for q in questions]
    n = prefixes.common_prefix_length(rows)
    head = {k: v[:, :n] if k in ("input_ids", "attention_mask", *PER_TOKEN) else v for k, v in head.items()}
    measured = allocated(lambda: ask(pictures, [questions] * 2))
    within_a_tenth(
        dry.dry_peak(d, lambda: dry.feedback_work(d, [head] * 2, len(questions), len(rows[0]) - n)),
        measured,
        weights,
    )

    prompts = {str(k): Prompt(str(k), f"{k}.png", "", QUESTION) for k in range(8)}
    for k in prompts:
        pictures[int(k) % 2].save(tmp_path / f"{k}.png")
    pairs = [Pair(f"pair {k}", k, "a", "b", *TEXTS, 0, -1) for k in prompts]

    def check_training(checkpointing):
        trained = new_adapter(
            OpenModel(vlm.model, vlm.processor, vlm.name, vlm.sha, vlm.quantisation, vlm.sharing_problem),
            8,
            16,
            0,
        )
        options = DpoOptions(
            learning_rate=1e-4,
            epochs=0.5,
            batch_size=4,
            gradient_checkpointing=checkpointing,
            evaluations=1,
            nll_weight=0.0,
        )
        features = ContentCache(tmp_path / "cache", 1.0)
        maker, engine = training_maker(RowMaker(trained, prompts, tmp_path), pairs[0], features)
        assert usable_pairs(maker, pairs) == (pairs, [])
        data = PairDataset(maker, pairs, {r.pair_id: r for r in reference_logps(maker, pairs)})
        measured = allocated(
            lambda: train_adapter(trained, data, data, tmp_path / f"{checkpointing}", options)
        )
        d = dry.put_adapter(fresh(), 8)
        p = dict(
            layout=engine["layout"],
            batch_size=4,
            max_tokens=8192,
            gradient_checkpointing=checkpointing,
            beta=0.1,
        )
        longest = max(len(b) for b in maker.row(pairs[0])["branches"])
        weights = dry.weight_bytes(d.model)
        within_a_tenth(
            dry.dry_peak(d, lambda: dry.training_work(d, inputs[0], longest, p, device)), measured, weights
        )
        if checkpointing:
            few = [prompts[str(k)] for k in range(2)]
            measured = allocated(lambda: sample_candidates(trained, "aligned", pictures, few, N, 0.7, ROOM))
            within_a_tenth(dry.dry_peak(d, lambda: dry.guided_work(d, inputs, N, ROOM)), measured, weights)
        vlm.model = trained.model.unload()

    for checkpointing in (False, True):
        check_training(checkpointing)


def test_packaged_recipes_name_models_and_keys_that_exist():
    for name in packaged_recipes():
        recipe = check_recipe(load_recipe(name), NOTEBOOKS)
        for model in (recipe.policy, recipe.splitter, recipe.labeler):
            assert model in FULL_SIZE or model.startswith("packaged:") or model in ("base", "policy"), (
                name,
                model,
            )


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    "Configurations of real models at full size, without weights."
    return write_configs(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("notebook, low, high", [("03_feedback", 18, 19), ("05_dpo", 4, 5)])
def test_7b_and_34b_fit_a_24_gb_card_in_4_bits(configs, notebook, low, high):
    recipe = check_recipe(load_recipe("llava15-7b-24gb"), NOTEBOOKS)
    plan, line = plan_stage(
        notebook, stage_parameters(recipe, NOTEBOOKS)[notebook], recipe, CARDS[24], Lengths(), configs
    )
    assert (
        low < plan.weights / 2**30 < high and plan.gib(CARDS[24]) <= 0.9 * CARDS[24].gib and "assumed" in line
    )
    assert plan.tokens > 1e6 and plan.seconds > 0


def test_what_does_not_fit_is_refused_with_the_key_to_change():
    recipe = check_recipe(load_recipe("tiny"), NOTEBOOKS)
    p = stage_parameters(recipe, NOTEBOOKS)["01_sampling"]
    plan, _ = plan_stage("01_sampling", p, recipe, CARDS[8], Lengths())
    card = Card("a small one", plan.gib(CARDS[8]) - plan.work / 2**31, 1, 1)
    advice = advise("01_sampling", p, recipe, card, Lengths(), "")
    assert advice.startswith("set 01_sampling.batch_size=")
    changed = p | {"batch_size": int(advice.rpartition("=")[2])}
    assert plan_stage("01_sampling", changed, recipe, card, Lengths())[0].gib(card) <= card.gib
    assert "no setting" in advise("01_sampling", p, recipe, Card("none", 0.5, 1, 1), Lengths(), "")


def planned_claims(**entry):
    "The parts of the benchmark `claims` as the plan sees them, of a recipe with one round of 40 prompts."
    prompts = {"source": "dataset:org/pictures", "n_per_round": 40, "n_dev": 8}
    evaluate = [{"bench": "claims", **entry}]
    recipe = dataclasses.replace(load_recipe("tiny"), prompts=prompts, rounds=1, evaluate=evaluate)
    recipe = check_recipe(recipe, NOTEBOOKS)
    return stage_parameters(recipe, NOTEBOOKS)


def test_the_advice_for_a_part_of_the_evaluation_names_its_parameters():
    planned = planned_claims()
    known = set(parameter_defaults(NOTEBOOKS / "06_evaluation.ipynb"))
    parts = [name for name, p in planned.items() if "kind" in p]
    assert [planned[name]["kind"] for name in parts] == ["01_sampling", "02_claims", "03_feedback"]
    for name in parts:
        p = planned[name]
        strongest = milder_to_stronger(p["kind"], p, {})[-1]
        assert strongest.keys() == {"batch_size"}
        assert {p.get("keys", {}).get(key, key) for key in strongest} <= known
    p = planned["03_feedback"]
    assert milder_to_stronger("03_feedback", p, {})[-1].keys() == {"batch_size", "max_tokens"}, (
        "the stage's own"
    )


def test_claims_about_data_of_its_own_is_planned_with_as_many_rows(tmp_path):
    def n_asked(**entry):
        planned = planned_claims(**entry)
        return {p["n_per_round"] for p in planned.values() if "kind" in p}

    assert n_asked() == {8} and n_asked(limit=5) == {5}
    rows = [
        Prompt(f"p{k}", "a.png", "sha", "?", split=split)
        for k, split in enumerate(("train", "dev", "test", "test"))
    ]
    write_table(tmp_path / "table", "prompts", rows)
    assert n_asked(data=str(tmp_path / "table")) == {3}
    assert n_asked(data=str(tmp_path / "table"), limit=2) == {2}
    for k in range(11):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"photos/{k}.png")
    assert n_asked(data=str(tmp_path / "photos")) == {11}, "nobody has trained on them"
    write_table(tmp_path / "trained", "prompts", rows[:1])
    with pytest.raises(RecipeError, match="evaluate: claims: data: none of 1 prompts is kept from training"):
        n_asked(data=str(tmp_path / "trained"))


def test_a_model_without_configuration_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="plan needs config.json of some-one/unknown .*--configs FOLDER"):
        config_folder("some-one/unknown")
    assert main(["plan", "llava15-7b-24gb", "--gpu", "24", "--configs", str(tmp_path)]) == 2
    assert "config.json of llava-hf/llava-1.5-7b-hf" in capsys.readouterr().err
    assert main(["plan", "tiny", "--gpu", "25"]) == 2
    assert "--gpu 25: choose one of" in capsys.readouterr().err


def test_attention_is_chosen_or_refused_in_one_line(monkeypatch):
    assert attention_for("auto", "cpu", torch.float32) == "sdpa"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention_for("flex_attention", "cpu", torch.float32)
    monkeypatch.setattr("rlaifv_nb.engine.models.find_spec", lambda name: None)
    assert attention_for("auto", "cuda", torch.bfloat16) == "sdpa"
    with pytest.raises(ImportError, match="pip install flash-attn"):
        attention_for("flash_attention_2", "cuda", torch.bfloat16)
    monkeypatch.setattr("rlaifv_nb.engine.models.find_spec", lambda name: True)
    assert (
        attention_for("auto", "cuda", torch.bfloat16) == "flash_attention_2"
        and attention_for("auto", "cuda", torch.float32) == "sdpa"
    )
    with pytest.raises(ValueError, match="needs dtype"):
        attention_for("flash_attention_2", "cuda", torch.float32)


def test_the_library_imports_without_cuda():
    library = Path(rlaifv_nb.__file__).parent
    modules = (p.relative_to(library).with_suffix("") for p in library.rglob("[a-z]*.py"))
    names = sorted(".".join(("rlaifv_nb", *module.parts)) for module in modules)
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "import torch\nassert not torch.cuda.is_initialized() and not {'flash_attn', 'triton', 'pycuda'} & "
        "set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
