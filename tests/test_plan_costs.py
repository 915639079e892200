"""What `rlaifv plan` says besides memory, each rule with numbers that can be worked out by hand: cards,
pictures, hours, disk, and that recipes fit."""

import json
from dataclasses import replace

import pytest
from full_size_configs import FULL_SIZE, write_configs
from PIL import Image

from rlaifv_nb.engine.dryrun import open_dry, put_adapter
from rlaifv_nb.records import Prompt, package_folder, write_table
from rlaifv_nb.runner import plan
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.plan import (
    CARDS,
    FAST,
    LIKELY,
    NAMED_CARDS,
    SLOW,
    Card,
    Decoder,
    Lengths,
    Load,
    Seen,
    card_of,
    decoder_of,
    decoding_steps,
    disk_problem,
    extremes,
    lengths_of,
    missing_bytes,
    nearest_card,
    open_stage,
    picture_shapes,
    pictures_of,
    plan_recipe,
    plan_stage,
    rows_of,
    seconds_of,
    spread,
    stage_parameters,
    step_floor,
    step_launches,
    step_seconds,
    upright_size,
)
from rlaifv_nb.runner.recipes import RecipeError, check_recipe, load_recipe, packaged_recipes

NOTEBOOKS = package_folder("nbs")
CARD_OF = {
    "llava15-7b-24gb": 24,
    "llava15-7b-40gb": 40,
    "llava15-7b-80gb": 80,
    "qwen25-vl-7b": 24,
    "selfalign": 40,
    "smolvlm": 8,
}
SHEET = Card("by hand", 24, tflops=100, gb_per_second=1000)
LLAMA_7B = Decoder(weights=7 * 10**9, packed=0, itemsize=2, layers=32, kv_bytes=2**19)
IN_4_BITS = replace(LLAMA_7B, packed=7 * 10**9)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    "Configurations of real models at full size, without weights."
    return write_configs(tmp_path_factory.mktemp("configs"))


# Cards


@pytest.mark.parametrize(
    "said, name",
    [
        ("h100", "H100 80 GB"),
        ("4090", "RTX 4090"),
        (24, "RTX 4090"),
        ("80", "A100 80 GB"),
        ("12", "RTX 3060 12 GB"),
        ("16", "RTX 4080"),
        ("48", "L40S"),
    ],
)
def test_a_card_is_named_or_meant_by_its_size(said, name):
    assert card_of(said).name == name


def test_an_unknown_card_lists_what_can_be_said(capsys):
    assert main(["plan", "tiny", "--gpu", "h1000"]) == 2
    err = capsys.readouterr().err
    assert "--gpu h1000: choose one of 8, 12, 16, 24" in err and all(name in err for name in NAMED_CARDS)


@pytest.mark.parametrize(
    "torch_name, gib, card",
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "4060ti"),
        ("Tesla T4", 14.6, "4060ti"),
    ],
)
def test_this_machines_card_is_known_by_its_name(torch_name, gib, card):
    found = nearest_card(torch_name, gib)
    assert (found.name, found.gib, found.tflops) == (torch_name, gib, NAMED_CARDS[card].tflops)


# Time


def test_an_h100_is_planned_at_the_floor_of_a_step_like_any_other_card():
    floor = step_floor(layers=32, launches=1868)
    assert floor == pytest.approx(0.0364, abs=1e-4)  # 32 x 0.45 ms + 1,868 x 11.8 us
    for card in (NAMED_CARDS["h100"], NAMED_CARDS["4090"]):
        assert step_seconds(LLAMA_7B, floor, 20, 0, card) == floor
    assert step_seconds(LLAMA_7B, floor, 20, 0, NAMED_CARDS["l4"]) == 14e9 / (300e9 * 0.7), (
        "14 GB take longer than that through an L4"
    )


def test_keys_and_values_are_read_in_every_step():
    assert step_seconds(LLAMA_7B, 0.0, 20, 10_000, SHEET) == (14e9 + 10_000 * 2**19) / 700e9


def test_four_bits_are_read_packed_by_few_rows_and_unpacked_by_many():
    assert IN_4_BITS.moved(64) == 0.55 * 7e9 and IN_4_BITS.moved(65) == 4.5 * 7e9


def test_reading_in_four_bits_unpacks_once_a_pass():
    load = Load(flops=50e12, passes=10)
    assert seconds_of(load, LLAMA_7B, 0.0, 0.0, SHEET).reading == 1.0  # 50 TFLOP at 50% of 100 TFLOP/s
    assert seconds_of(load, IN_4_BITS, 0.0, 0.0, SHEET).reading == pytest.approx(1.0 + 10 * 2.5 * 7 / 700)


def test_pictures_on_the_cpu_count_where_the_card_waits_for_them():
    assert seconds_of(Load(pictures=1000), LLAMA_7B, 0.0, 0.076, SHEET).total == 76


def test_a_bad_day_takes_longer_than_a_good_one():
    load = Load(flops=1e15, passes=10, steps=100, rows=20, held=1000)
    best, likely, worst = (
        seconds_of(load, IN_4_BITS, 0.036, 0.0, SHEET, pace).total for pace in (FAST, LIKELY, SLOW)
    )
    assert best < likely < worst


@pytest.mark.parametrize(
    "answers, rows, queue, steps",
    [
        (20, 20, 20, 280),  # one batch waits for its longest answer: 46% of its rows are in use
        (40_000, 50, 40_000, 40_000 * 130 / 41 + 150),  # refilled: 82%
        (1280, 60, 640, 1280 * 130 / 49.2 + 2 * 150),  # two queues end with a tail each
        (10, 60, 10, 280),
    ],
)  # fewer answers than rows
def test_steps_of_rows_that_are_refilled(answers, rows, queue, steps):
    assert decoding_steps(answers, rows, 130, 280, queue) == pytest.approx(steps)


def planned(notebook, name="tiny", card=None, configs="", **changes):
    recipe = load_recipe(name)
    return open_stage(
        notebook, stage_parameters(recipe, NOTEBOOKS)[notebook] | changes, recipe, card, Lengths(), configs
    )


def test_sampling_refills_rows_or_waits():
    card = CARDS[24]
    refilled, waiting = (
        plan.sampling_load(planned("01_sampling", card=card, refill=refill)) for refill in (True, False)
    )
    assert refilled.rows == 108 and waiting.rows == 160, "two thirds of the answers to 16 prompts, in fours"
    assert refilled.steps == pytest.approx(1600 * 128 / (108 * 0.82)), (
        "answers of 128 tokens at most: none is longer than the mean"
    )
    assert waiting.steps == 1600 / 160 * 128
    assert plan.sampling_load(planned("01_sampling")).rows == 160, (
        "a CPU, where a step takes as long as it has rows, refills all"
    )


def test_the_splitter_is_asked_for_facts_and_for_the_questions_that_no_rule_makes():
    facts_rows, questions_rows = 65536 // (28 + 128 + 512), 65536 // (28 + 512)  # texts with their answers
    facts = 1600 * 140 / (facts_rows * 0.9) + 1600 / 256 * 140
    for questions, share in (("rule", 0.25), ("splitter", 1.0), ("statement", 0.0)):
        texts = 1600 * 10 * share
        load = plan.claims_load(planned("02_claims", questions=questions))
        assert load.steps == pytest.approx(facts + texts * 14 / (questions_rows * 0.9) + texts / 256 * 14)
        assert load.sampled == 1600 * 140 + texts * 14
    assert plan.claims_load(planned("02_claims", divide="whole")) == Load()


def test_operations_of_a_step_are_counted_and_an_adapter_adds_to_them(configs):
    config, _, _ = plan.read_model(plan.config_folder("llava-hf/llava-1.5-7b-hf", configs))
    config.text_config.num_hidden_layers = 2
    vlm = open_dry(config, plan.Padding(), "bfloat16")
    two = step_launches(vlm)
    config.text_config.num_hidden_layers = 4
    four = step_launches(open_dry(config, plan.Padding(), "bfloat16"))
    a_layer = (four - two) / 2
    assert 30 <= a_layer <= 75, "transformers' own layer has 41; twice as many would be worth a look"
    assert step_launches(put_adapter(vlm, 8)) >= two + 2 * 7 * 3, (
        "two products and a sum for each of seven linear layers"
    )


def test_the_decoder_is_what_is_read_in_a_step(configs):
    config, _, _ = plan.read_model(plan.config_folder("llava-hf/llava-1.5-7b-hf", configs))
    found = decoder_of(put_adapter(open_dry(config, None, "bfloat16", "nf4"), 64))
    assert found.packed == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.weights == found.packed + 65 * 4096 + 32064 * 4096, (
        "norms and head; no embedding, no vision tower, no adapter"
    )
    assert found.kv_bytes == 2 * 32 * 4096 * 2


def test_measured_speeds_take_the_place_of_all_this(capsys):
    recipe = check_recipe(load_recipe("tiny"), NOTEBOOKS)
    found, _ = plan_stage(
        "03_feedback",
        stage_parameters(recipe, NOTEBOOKS)["03_feedback"],
        recipe,
        CARDS[24],
        Lengths(),
        speed=1000.0,
    )
    assert found.seconds == found.best == found.worst == found.tokens / 1000


def test_rounds_are_counted_as_the_chain_runs_them():
    recipe = check_recipe(load_recipe("reward-reuse"), NOTEBOOKS).variants["reward"]
    times = {name: p["times"] for name, p in stage_parameters(recipe, NOTEBOOKS).items()}
    assert times == {
        "01_sampling": 2,
        "02_claims": 1,
        "03_feedback": 1,
        "05_dpo": 2,
        "07_guided_decoding": 1,
        "06_evaluation": 1,
    }


# Pictures


def save(path, size, turned=False, **options):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_the_size_of_a_picture_is_read_without_decoding_it(name, tmp_path, monkeypatch):
    path = save(tmp_path / name, (40, 30), turned=True)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert upright_size(path) == upright_size(path.read_bytes()) == (30, 40)


def sources(folder):
    "Three pictures and one that is broken, as each kind of source that has files."
    import datasets

    sizes = [(64, 48), (4000, 3000), (30, 90)]
    files = [save(folder / "photos" / f"{k}.jpg", size) for k, size in enumerate(sizes)]
    (folder / "photos" / "3.jpg").write_bytes(b"no picture")
    names = [f"photos/{k}.jpg" for k in range(4)]
    (folder / "mine.jsonl").write_text(
        "\n".join(json.dumps({"image": name, "question": f"Question {name}?"}) for name in names)
    )
    rows = [Prompt(f"{k}", name, "", f"Question {name}?") for k, name in enumerate(names[:3])]
    (folder / "table").mkdir()
    write_table(
        folder / "table", "prompts", [replace(row, image_path=f"../{row.image_path}") for row in rows]
    )
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "question": [row.question for row in rows],
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "rows.parquet")
    return sizes


@pytest.mark.parametrize(
    "source, options",
    [("photos", {"question": "What is it?"}), ("mine.jsonl", {}), ("table", {}), ("rows.parquet", {})],
)
def test_sizes_are_read_from_every_kind_of_source(source, options, tmp_path):
    sizes = sources(tmp_path)
    found = rows_of(str(tmp_path / source), 10, options)
    assert [(row.width, row.height) for row in found] == sizes
    assert len(rows_of(str(tmp_path / source), 2, options)) == 2, "no more than the recipe takes"
    assert all(row.question for row in found)


def own_recipe(folder, **changes):
    import yaml

    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"extends": "tiny", "name": "mine", "evaluate": [], "rounds": 1} | changes)
    )
    return check_recipe(load_recipe(str(path)), NOTEBOOKS)


def test_the_largest_picture_decides_about_memory_and_ordinary_ones_about_hours(tmp_path):
    for k in range(11):
        save(tmp_path / "photos" / f"{k}.jpg", (4000, 3000) if k == 10 else (64, 48))
    recipe = own_recipe(
        tmp_path, prompts={"source": "./photos", "question": "What?", "n_per_round": 11, "n_dev": 1}
    )
    pictures = pictures_of(recipe, Lengths())
    assert Seen(4000, 3000, "What?") in pictures.extreme and len(pictures.ordinary) == 8
    assert [row.width for row in pictures.ordinary].count(64) == 7, (
        "one in eight at most, though the largest is a thousand times larger"
    )
    assert "11 looked at" in pictures.about and "largest 4000x3000" in pictures.about
    few = replace(recipe, prompts=recipe.prompts | {"n_per_round": 40})
    assert "too few, the recipe takes 40" in pictures_of(few, Lengths()).about
    assert pictures_of(recipe, lengths_of("100x50")).extreme == [Seen(100, 50)]


def test_pictures_that_are_elsewhere_are_assumed_and_said():
    recipe = load_recipe("llava15-7b-24gb")
    about = pictures_of(recipe, Lengths()).about
    assert (
        "assumed: 640x480" in about
        and "4000x3000" in about
        and "openbmb/RLAIF-V-Dataset is not on this machine" in about
    )
    assert pictures_of(recipe, lengths_of("1024x768")).about == "assumed: 1024x768"
    with pytest.raises(RecipeError, match="--picture 10: write WIDTHxHEIGHT"):
        lengths_of("10")


def test_spread_and_extremes():
    rows = [Seen(k, k) for k in range(1, 101)]
    assert [row.width for row in spread(rows, 4)] == [13, 38, 63, 88]
    wide, tall = Seen(300, 10), Seen(10, 300)
    assert extremes([*rows, wide, tall]) == [Seen(100, 100), wide, tall, Seen(1, 1)]


@pytest.mark.parametrize(
    "size, max_pixels, tokens",
    [
        ((640, 480), 0, 23 * 17),
        ((4000, 3000), 0, 143 * 107),
        ((4000, 3000), 1003520, 41 * 30),
        ((8000, 6000), 0, 147 * 110),
        ((20, 20), 0, 4),
    ],
)
def test_qwens_pictures_keep_the_limits_of_its_processor(configs, size, max_pixels, tokens):
    config, _, _ = plan.read_model(plan.config_folder("Qwen/Qwen2.5-VL-7B-Instruct", configs))
    shape, more = picture_shapes(config, size, max_pixels)
    assert more["image_grid_thw"].prod() == shape[0] == 4 * tokens


def test_a_limit_of_pixels_is_planned_for(configs):
    recipe = load_recipe("qwen25-vl-7b")
    p = stage_parameters(recipe, NOTEBOOKS)["03_feedback"]
    assert p["max_pixels"] == 1003520
    found = open_stage("03_feedback", p, recipe, CARDS[24], Lengths(), configs).prompts
    assert 1200 < plan.n_tokens(found.longest) < 1400 and 440 < found.tokens < 470, (
        "an ordinary picture is below the limit"
    )


def test_a_picture_costs_its_vision_tower_too(configs):
    recipe = load_recipe("smolvlm")
    p = stage_parameters(recipe, NOTEBOOKS)["03_feedback"]
    found = open_stage("03_feedback", p, recipe, CARDS[8], Lengths(), configs)
    language = (
        2 * found.prompts.tokens * (decoder_of(found.vlm).weights - 49155 * 2048)
    )  # the head does not read prompts
    assert found.prompts.flops == pytest.approx(language + found.prompts.picture_flops, rel=0.02)
    assert found.prompts.picture_flops > language, "thirteen tiles cost more than the language model"
    assert found.prompts.preparing == pytest.approx(0.292 + 0.307 * 0.010, abs=1e-3)


def test_features_that_the_cache_cannot_hold_are_made_again(configs):
    recipe = load_recipe("llava15-7b-24gb")
    p = stage_parameters(recipe, NOTEBOOKS)["05_dpo"]
    s = open_stage("05_dpo", p | {"cache_gb": 1000.0}, recipe, CARDS[24], Lengths(), configs)
    assert plan.features_bytes(s) == 576 * 4096 * 2
    s.p["loader_workers"] = 0
    assert plan.dpo_load(s).pictures == 4000
    s.p["cache_gb"] = 0.5 * 4000 * 576 * 4096 * 2 / 1e9
    rows = 8000 * (1 + 0.1 * 17 + 0.9 * 4)  # reference, dev pairs at the start and 16 times, four epochs
    assert plan.dpo_load(s).pictures == pytest.approx(0.5 * 4000 + 0.5 * rows)
    s.p["loader_workers"] = 4
    assert plan.dpo_load(s).pictures == pytest.approx((0.5 * 4000 + 0.5 * rows) / 4)


# Disk


def test_downloads_are_what_the_hub_says_else_two_bytes_a_weight(configs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe("llava15-7b-24gb")
    p = stage_parameters(recipe, NOTEBOOKS)["02_claims"]
    found, _ = plan_stage("02_claims", p, recipe, CARDS[24], Lengths(), configs)
    weights = sum(w.numel() for w in open_dry(FULL_SIZE[found.model](), is_vlm=False).model.parameters())
    assert found.download == 2 * weights == 2 * 8030261248
    assert missing_bytes([found], {}) == {found.model: found.download}
    assert (
        missing_bytes([found], {found.model: 5}) == {found.model: 5}
        and missing_bytes([found], {found.model: 0}) == {}
    )
    snapshot = tmp_path / "models--meta-llama--Meta-Llama-3-8B-Instruct" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00004.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "models--meta-llama--Meta-Llama-3-8B-Instruct" / "refs").mkdir()
    (tmp_path / "models--meta-llama--Meta-Llama-3-8B-Instruct" / "refs" / "main").write_text("1")
    assert plan.download_bytes(found.model, weights) == found.download - 1000


def test_a_local_model_is_not_downloaded(tmp_path):
    assert (
        plan.download_bytes(str(tmp_path), 10**9) == plan.download_bytes("packaged:iconworld-vlm", 10**9) == 0
    )


def test_a_disk_without_room_is_refused_here_and_told_elsewhere(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 10 * 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    assert disk_problem(4e9, 5e9, tmp_path, tmp_path / "not" / "there") == ""
    lacking = "the Hub's cache and the run folder: 11.0 GB are needed, 10.0 are free"
    assert disk_problem(6e9, 5e9, tmp_path, tmp_path) == lacking
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = plan.StagePlan(
        "05_dpo", "some/model", 0, 0, "", kept=3 * 10**9, meanwhile=2 * 10**9, download=7 * 10**9
    )
    monkeypatch.setattr(plan, "plan_recipe", lambda *args: ([found], []))
    recipe = load_recipe("tiny")
    with pytest.raises(RecipeError, match="tiny does not fit this machine's disk: .*12.0 GB are needed"):
        plan.print_plan(recipe, NOTEBOOKS, run=tmp_path / "run")
    plan.print_plan(recipe, NOTEBOOKS, CARDS[24], run=tmp_path / "run", elsewhere=True)
    assert (
        "if it is to run on this machine: the Hub's cache and the run folder: 12.0 GB"
        in capsys.readouterr().out
    )
    plan.print_plan(recipe, NOTEBOOKS, to_download={"some/model": 0}, run=tmp_path / "run")
    out = capsys.readouterr().out
    assert (
        "downloads: 0.0 GB" in out and "run folder: 3.0 GB at the end, 2.0 more while a round trains" in out
    )


# Whole recipes


def real_recipes():
    return [name for name in packaged_recipes() if name in CARD_OF]


def test_every_recipe_for_a_card_is_planned():
    real = [name for name in packaged_recipes() if not load_recipe(name).policy.startswith("packaged:")]
    assert set(real) - set(CARD_OF) == {"llava15-7b"}, "the common part, which is not for any card"


@pytest.mark.parametrize("name", CARD_OF)
def test_packaged_recipes_fit_their_card_with_a_tenth_to_spare(name, configs):
    recipe, card = check_recipe(load_recipe(name), NOTEBOOKS), CARDS[CARD_OF[name]]
    plans, lines = plan_recipe(recipe, NOTEBOOKS, card, Lengths(), configs)
    assert {p.notebook: p.gib(card) for p in plans if p.gib(card) > 0.9 * card.gib} == {}
    assert all(0 < p.best < p.seconds < p.worst for p in plans) and "assumed" in lines[0]
    if name == "llava15-7b-24gb":
        assert sum(p.seconds for p in plans) <= 60 * 3600
    smaller = Card("half of it", card.gib / 2, card.tflops, card.gb_per_second)
    assert any(p.gib(smaller) > smaller.gib for p in plans), (
        "batches are for this card, not for a smaller one"
    )


def test_the_table_says_what_it_assumes(configs, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "smolvlm", "--gpu", "8", "--configs", str(configs), "--picture", "800x600"]) == 0
    out = capsys.readouterr().out
    assert "time: about" in out and "assumed: 50% of the card's peak (35% to 60%)" in out
    assert "pictures: assumed: 800x600" in out and "GB (4.5 SmolVLM-Instruct by its configuration" in out
    assert "run folder:" in out
