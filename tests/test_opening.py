"""Opening a model: on which device and in which dtype, at which revision, with which packages; and one clear
message where it cannot be.
"""

import json
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import QWEN_TEMPLATE, QWEN_TOKENS, llama3, open_tiny, tokenizer_with

from rlaifv_nb.benchmarks.answers import beam_answer
from rlaifv_nb.engine import models
from rlaifv_nb.engine.models import (
    DEVICES,
    adapter_lineage,
    attention_for,
    card_name,
    cuda_problem,
    device_for,
    dtype_for,
    lora_targets,
    model_folder,
    open_llm,
    open_processor,
    open_vlm,
    pinned,
    processor_problem,
    save_adapter,
)
from rlaifv_nb.engine.pictures import VIDEO_PACKAGES, torchvision_for, torchvision_problem
from rlaifv_nb.runner.recipes import DEVICES as RECIPE_DEVICES

POLICY = "packaged:iconworld-vlm"


@pytest.fixture
def card(monkeypatch):
    "A function that pretends that a CUDA card of a compute capability is there; (0, 0) is none."

    def pretend(capability=(0, 0), cuda="13.0"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability > (0, 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return pretend


def test_no_cuda_is_said_with_its_likely_reason(card):
    card(cuda=None)
    assert cuda_problem().endswith("was built without CUDA")
    card()
    assert "built for CUDA 13.0, finds no card" in cuda_problem() and "CUDA 13 needs 580" in cuda_problem()
    card((8, 6))
    assert cuda_problem() == ""


def test_a_recipe_for_a_card_does_not_start_on_a_cpu(card):
    card()
    assert device_for("auto") == device_for("cpu") == "cpu"
    for open_model in (open_vlm, open_llm):
        with pytest.raises(ValueError, match="device='cuda' cannot be had: PyTorch .* finds no card"):
            open_model("packaged:iconworld-vlm", device="cuda")
    with pytest.raises(ValueError, match="device='gpu' is not supported: choose one of auto, cuda, cpu"):
        open_vlm(POLICY, device="gpu")
    card((9, 0))
    assert (device_for("auto"), device_for("cuda"), device_for("cpu")) == ("cuda", "cuda", "cpu")
    assert DEVICES == RECIPE_DEVICES, "09_recipes does not import 00_models, which would load PyTorch"


def test_the_cpu_is_used_beside_a_card_when_it_is_asked_for(card):
    card((8, 0))
    assert (
        str(open_vlm(POLICY, device="cpu").device) == "cpu"
        and open_vlm(POLICY, device="cpu").core.dtype == torch.float32
    )


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float16), ((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_is_float16_on_cards_without_bfloat16(card, monkeypatch, capability, dtype):
    card(capability)
    assert (
        dtype_for("auto", "cuda") == dtype
        and dtype_for("auto", "cpu") == torch.float32
        and dtype_for("bfloat16", "cuda") == torch.bfloat16
    )
    monkeypatch.setattr(models, "find_spec", lambda name: name == "flash_attn")
    assert attention_for("auto", "cuda", dtype) == ("sdpa" if capability < (8, 0) else "flash_attention_2")


def test_a_revision_is_pinned_in_its_name(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: asked.update(options, name=name) or str(tmp_path),
    )
    for name, found in (
        ("org/model@v1.2", ("org/model", "v1.2")),
        ("org/model", ("org/model", "")),
        ("org/model@refs/pr/3", ("org/model", "refs/pr/3")),
    ):
        assert pinned(name) == found
        assert model_folder(name) == tmp_path and (asked["name"], asked["revision"] or "") == found
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert (
        model_folder(str(folder)) == folder
        and pinned(str(folder)) == (str(folder), "")
        and pinned(POLICY) == (POLICY, "")
    )
    assert card_name("org/model@v1.2") == "org/model"


def test_an_adapter_names_the_revision_of_its_base(tmp_path):
    vlm = open_vlm(POLICY)
    vlm.model = get_peft_model(vlm.model, LoraConfig(r=2, target_modules=lora_targets(vlm.core)))
    vlm.name = "org/model@v1.2"
    save_adapter(vlm, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (
        "org/model",
        "v1.2",
    ) and adapter_lineage(tmp_path)["base"] == vlm.name
    card = (tmp_path / "README.md").read_text()
    assert 'from_pretrained("org/model", revision="v1.2")' in card and "base_model: org/model\n" in card


def test_a_language_model_without_template_is_named_before_its_weights_are_read(tmp_path, monkeypatch):
    model, tokenizer = llama3()
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(models, "open_weights", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=f"{tmp_path}: its tokenizer has no chat template"):
        open_llm(str(tmp_path))


def test_beam_search_takes_nothing_from_the_checkpoint():
    vlm, picture = open_tiny("llava"), Image.new("RGB", (80, 60), "red")
    plain = beam_answer(vlm, picture, "What is it?", 3, 24)
    own = dict(
        repetition_penalty=5.0,
        no_repeat_ngram_size=2,
        min_new_tokens=20,
        length_penalty=-3.0,
        temperature=0.1,
    )
    vlm.core.generation_config.update(**own)
    with torch.no_grad():
        ids = vlm.core.generate(
            **models.prompt_inputs(vlm, picture, "What is it?"),
            do_sample=False,
            num_beams=3,
            max_new_tokens=24,
        )
    inherited = vlm.tokenizer.decode(ids[0, -24:], skip_special_tokens=True)
    assert beam_answer(vlm, picture, "What is it?", 3, 24) == plain and plain[0] != inherited.strip()
    assert vlm.core.generation_config.repetition_penalty == 5.0, "and leaves it as it was"


def saved_processor(folder):
    "A folder with Qwen2.5-VL's processor, as its own `save_pretrained` writes it."
    tokenizer = tokenizer_with(*QWEN_TOKENS.values(), image_token="<|image_pad|>")
    tokenizer.save_pretrained(folder)
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12544},
    }
    config = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": pictures,
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return str(folder)


def test_a_missing_package_is_named_with_the_command_that_helps(tmp_path):
    folder = saved_processor(tmp_path)
    problem = processor_problem(folder)
    if models.find_spec("torchvision"):
        assert (
            problem == ""
            and type(open_processor(folder).image_processor).__name__ == "Qwen2VLImageProcessorPil"
        )
    else:
        assert (
            f"pip install torchvision=={torchvision_for(torch.__version__)} num2words" in problem
            and "\n" not in problem
        )
        with pytest.raises(ValueError, match="its processor needs torchvision"):
            open_vlm(folder)


def test_a_processor_that_is_not_there_is_named(tmp_path):
    assert (
        "its processor cannot be opened" in processor_problem(str(tmp_path))
        and processor_problem(model_folder(POLICY)) == ""
    )


def test_torchvision_belongs_to_one_version_of_torch(monkeypatch):
    assert torchvision_for("2.13.0+cpu") == "0.28.0" and torchvision_for("2.14.1") == "0.29.1"
    versions = {"torchvision": "0.28.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr("rlaifv_nb.engine.pictures.metadata.version", versions.get)

    def fails(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("rlaifv_nb.engine.pictures.importlib.import_module", fails)
    assert (
        "torchvision 0.28.0 does not work with PyTorch 2.13.0+cpu (operator torchvision::nms does not "
        "exist): pip uninstall" in torchvision_problem()
    )


def test_the_pinned_torchvision_belongs_to_the_pinned_torch():
    root = Path(__file__).resolve().parent.parent
    pins = dict(
        line.split("==")
        for line in (root / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert pins["torchvision"] == torchvision_for(pins["torch"]) and "num2words" in pins
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    extra = config["DEFAULT"]["processors_requirements"].split()
    assert [row.partition(">=")[0] for row in extra] == list(VIDEO_PACKAGES)
    assert not set(VIDEO_PACKAGES) & {
        row.partition(">=")[0] for row in config["DEFAULT"]["dev_requirements"].split()
    }
