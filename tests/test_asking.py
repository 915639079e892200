"""How a model is asked: system prompt, padding, a limit of pixels, compared with what the official LLaVA and
RLAIF-V code makes of the same.

The official rules stand here in words and few lines: `llava_v1` of its conversation.py,
`tokenizer_image_token`, `expand2square` and `process_images` of its mm_utils.py, with CLIP's preprocessing;
no code is taken over.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import CHATML, LLAVA_TEMPLATE, SMOL_TEMPLATE, build_tiny, open_tiny, processor_of

from rlaifv_nb.benchmarks.answers import run_answers
from rlaifv_nb.benchmarks.evaluate import Request, check_request
from rlaifv_nb.benchmarks.protocol import Question
from rlaifv_nb.engine.caches import picture_features
from rlaifv_nb.engine.models import (
    answer_ids,
    ask_with,
    chat_messages,
    lora_targets,
    open_vlm,
    padding_colour,
    prompt_inputs,
    prompt_text,
    save_adapter,
    sibling_ids,
)
from rlaifv_nb.engine.pictures import load_image, pad_to_square, within_pixels
from rlaifv_nb.records import Prompt, read_manifest, sha256_of, write_table
from rlaifv_nb.runner.command import make_parser
from rlaifv_nb.sampling import run_sampling

LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
QUESTION, ANSWER = "What is in the top left?", "Two red cats.\n\nIt is a lovely picture."
PHOTOGRAPHS = sorted(
    (Path(__file__).resolve().parents[1].parent / "shared/official/rlaifv/images").rglob("*.jpg")
)
ARCHITECTURES = ("llava", "llava_next", "qwen25_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "gemma3")
ONE_SIZE = (
    "llava",
    "gemma3",
)  # these make one size of every picture; the others keep its shape by themselves


def llava(**options):
    "A tiny LLaVA-1.5 with its published chat template, asked with these options."
    vlm = open_tiny("llava")
    vlm.processor.chat_template = LLAVA_TEMPLATE
    return ask_with(vlm, **options)


def official_ids(tokenizer, text, image_tokens):
    """`tokenizer_image_token`: the text is cut at `<image>`, each part tokenised by itself, and the picture's
    tokens put between.
    """
    parts = [tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<image>")]
    image = [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
    return [token for k, part in enumerate(parts) for token in (image if k else []) + part]


def official_pixels(picture, side, mean, std):
    """Pad to a square with the mean colour (an odd rest below or right), CLIP's preprocessing: shorter side
    to `side` (bicubic, Pillow's), centre crop of `side` (nothing left to cut), divide by 255, subtract the
    mean, divide by the deviation: (3, side, side), float32.
    """
    width, height = picture.size
    longest = max(width, height)
    square = np.empty((longest, longest, 3), np.uint8)
    square[:] = [int(m * 255) for m in mean]
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = np.asarray(picture)
    small = Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC)
    return ((np.asarray(small, np.float32) / 255 - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


def test_token_ids_are_those_of_the_official_conversation():
    vlm = llava(system_prompt=LLAVA_V1, pad_pictures=True)
    inputs = prompt_inputs(vlm, Image.new("RGB", (640, 480), "green"), QUESTION)
    prompt = f"{LLAVA_V1} USER: <image>\n{QUESTION} ASSISTANT:"
    assert prompt_text(vlm, QUESTION) == prompt
    asked = official_ids(vlm.tokenizer, prompt, (56 // 14) ** 2)
    assert inputs["input_ids"][0].tolist() == asked
    assert asked + answer_ids(vlm, QUESTION, ANSWER) == official_ids(
        vlm.tokenizer, f"{prompt} {ANSWER}</s>", (56 // 14) ** 2
    )
    assert sibling_ids(vlm, "Is it a dog?", inputs) == official_ids(
        vlm.tokenizer, f"{LLAVA_V1} USER: <image>\nIs it a dog? ASSISTANT:", (56 // 14) ** 2
    )
    assert LLAVA_V1 not in prompt_text(llava(), QUESTION), "the Hub's template alone says none of this"


@pytest.mark.skipif(
    not PHOTOGRAPHS,
    reason="needs the photographs of the official repository beside the checkout (../shared/official)",
)
@pytest.mark.parametrize("side", [56, 336])
def test_pixels_of_photographs_are_those_of_the_official_code(side):
    vlm = llava(pad_pictures=True)
    pictures = vlm.processor.image_processor
    pictures.size = {"shortest_edge": side}
    pictures.crop_size = {"height": side, "width": side}
    shapes = set()
    for path in PHOTOGRAPHS[:: 10 if side == 336 else 1]:
        photograph = load_image(path)
        shapes.add(np.sign(photograph.width - photograph.height))
        ours = prompt_inputs(vlm, photograph, QUESTION)["pixel_values"][0].numpy()
        assert (
            np.abs(ours - official_pixels(photograph, side, pictures.image_mean, pictures.image_std)).max()
            < 1e-5
        ), path.name
    assert side == 336 or shapes >= {1, -1}, "wide and tall ones"


def test_what_lies_at_the_edge_is_seen_only_with_padding():
    grey, coloured = Image.new("RGB", (640, 480), "grey"), Image.new("RGB", (640, 480), "grey")
    coloured.paste("red", (0, 0, 60, 480))
    coloured.paste("blue", (580, 0, 640, 480))

    def pixels(vlm, picture):
        return prompt_inputs(vlm, picture, QUESTION)["pixel_values"]

    cropped, padded = llava(), llava(pad_pictures=True)
    assert torch.equal(pixels(cropped, grey), pixels(cropped, coloured)), (
        "the centre crop cuts a quarter of a 4:3 picture"
    )
    seen = (pixels(padded, grey) - pixels(padded, coloured)).abs().amax((0, 1))
    assert seen[28, :4].min() > 0.5 and seen[28, -4:].min() > 0.5 and seen[:, 28].max() < 1e-6


def test_a_square_picture_and_odd_sides():
    square = Image.new("RGB", (31, 31), "red")
    assert pad_to_square(square, (0, 0, 0)).tobytes() == square.tobytes()
    odd = np.asarray(pad_to_square(Image.new("RGB", (4, 1), "white"), (1, 2, 3)))
    assert odd[:, 0].tolist() == [[1, 2, 3], [255] * 3, [1, 2, 3], [1, 2, 3]], "one row above, two below"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_is_refused_where_nothing_is_cropped(name):
    vlm = open_tiny(name)
    if name in ONE_SIZE:
        ask_with(vlm, pad_pictures=True)
        inputs = prompt_inputs(vlm, Image.new("RGB", (200, 50), "white"), QUESTION)
        bar = inputs["pixel_values"][0, :, 2, 28] * torch.tensor(vlm.processor.image_processor.image_std)
        colour = (bar + torch.tensor(vlm.processor.image_processor.image_mean)) * 255
        assert torch.allclose(
            colour.round(), torch.tensor(padding_colour(vlm.processor), dtype=torch.float32)
        )
    else:
        with pytest.raises(
            ValueError, match=f"{name}: pad_pictures=True cannot be obeyed: its processor crops nothing"
        ):
            ask_with(vlm, pad_pictures=True)
        assert vlm.asked == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_way_to_a_prompt_has_the_system_prompt(name):
    vlm = open_tiny(name)
    if "USER: " in vlm.processor.chat_template:
        vlm.processor.chat_template = CHATML.replace(
            "PICTURE",
            vlm.processor.apply_chat_template(chat_messages("", True), tokenize=False)
            .removeprefix("USER: ")
            .split("USER")[0]
            .strip()
            + "\n",
        )
    before = prompt_inputs(vlm, Image.new("RGB", (120, 80)), QUESTION)["input_ids"][0].tolist()
    plain = answer_ids(vlm, QUESTION, "A cat.")
    ask_with(vlm, system_prompt="A cat sits there.")
    inputs = prompt_inputs(vlm, Image.new("RGB", (120, 80)), QUESTION)
    asked = inputs["input_ids"][0].tolist()
    text = vlm.tokenizer.decode(asked)
    assert text.count("A cat sits there.") == prompt_text(vlm, QUESTION).count(
        "A cat sits there."
    ) == 1 and len(asked) > len(before)
    assert text.index("A cat sits there.") < text.index(QUESTION)
    assert (
        sibling_ids(vlm, "Is it a dog?", inputs)
        == prompt_inputs(vlm, Image.new("RGB", (120, 80)), "Is it a dog?")["input_ids"][0].tolist()
    )
    assert answer_ids(vlm, QUESTION, "A cat.") == plain, "an answer is the same, whatever came before"


ROLELESS = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{{ m['content'][-1]['text'] "
    "}}<image>{% endfor %}"
)
RAISING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('only user and assistant') }}{% endif %}"
    + ROLELESS
)
RAW = (
    "{% for m in messages %}{% if m['role'] == 'system' %}SYSTEM {{ m['content'] }}{% else %}{{ m['role'] "
    "}} <image>Question?{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "becomes the turn of the user or the assistant"),
        (ROLELESS, "the text does not appear once before the question"),
        (RAISING, "its chat template says: only user and assistant"),
        (RAW, "the text does not appear once before the question"),
    ],
)
def test_a_template_without_place_for_a_system_prompt_is_named(template, reason):
    vlm = open_tiny("llava")
    vlm.processor.chat_template = template or vlm.processor.chat_template
    with pytest.raises(ValueError, match=f"llava: system_prompt='Be brief.' cannot be obeyed: .*({reason})"):
        ask_with(vlm, system_prompt="Be brief.")


@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, CHATML.replace("PICTURE", "<image>\n"), SMOL_TEMPLATE])
def test_published_templates_have_a_place_for_it(template):
    vlm = open_tiny("llava")
    vlm.processor.chat_template = template
    assert "Answer the questions." in prompt_text(
        ask_with(vlm, system_prompt="Answer the questions."), QUESTION
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"system_prompt": "See <image>."}, "it contains the special token <image>"),
        ({"system_prompt": "  "}, "does not appear once"),
        ({"max_pixels": -1}, "max_pixels=-1: it is a whole number of pixels"),
        ({"max_pixels": True}, "it is a whole number of pixels"),
        ({"max_pixels": 1e6}, "it is a whole number of pixels"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        llava(**options)


def test_what_is_asked_is_in_manifests_and_keys_only_where_it_differs(tmp_path):
    default, asked = llava(), llava(system_prompt=LLAVA_V1, pad_pictures=True, max_pixels=10_000)
    assert (
        set(default.settings) == {"dtype", "quantisation", "attention", "sharing"} and default.asked_sha == ""
    )
    assert asked.settings == default.settings | {
        "system_prompt": LLAVA_V1,
        "pad_pictures": True,
        "max_pixels": 10_000,
    }
    assert (
        len(
            {asked.asked_sha, llava(system_prompt=LLAVA_V1).asked_sha, llava(pad_pictures=True).asked_sha, ""}
        )
        == 4
    )


def test_an_adapter_remembers_how_its_policy_was_asked(tmp_path):
    for part in build_tiny("llava"):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(LLAVA_TEMPLATE)
    asked = {"system_prompt": "Be brief.", "pad_pictures": True}
    for name, options in (("plain", {}), ("asked", asked)):
        vlm = open_vlm(str(tmp_path / "model"), **options)
        vlm.model = get_peft_model(vlm.model, LoraConfig(r=2, target_modules=lora_targets(vlm.core)))
        save_adapter(vlm, tmp_path / name)
    assert list(json.loads((tmp_path / "plain/lineage.json").read_text())) == [
        "base",
        "base_sha",
        "quantisation",
        "parent_sha",
    ]
    assert json.loads((tmp_path / "asked/lineage.json").read_text())["asked"] == asked
    assert (
        "asked with system_prompt 'Be brief.', pad_pictures True."
        in (tmp_path / "asked/README.md").read_text()
    )
    assert "with quantisation none.\n" in (tmp_path / "plain/README.md").read_text()
    at = {name: str(tmp_path / name) for name in ("model", "plain", "asked")}
    assert (
        open_vlm(at["model"], at["asked"], trainable=True, **asked).notes
        == open_vlm(at["model"], at["plain"], trainable=True).notes
        == {}
    )
    for adapter, options in (("asked", {}), ("plain", asked), ("asked", {"pad_pictures": True})):
        assert "trained with" in open_vlm(at["model"], at[adapter], **options).notes["adapter_asked"]
        with pytest.raises(ValueError, match="asked in another way than it was trained"):
            open_vlm(at["model"], at[adapter], trainable=True, **options)


def full_size(name):
    """The processor of an architecture with the sizes of its published checkpoint, and the tokenizer of its
    tiny model.
    """
    processor = open_tiny(name).processor
    tokenizer, template = processor.tokenizer, processor.chat_template
    clip = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    llava = dict(
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return {
        "llava": lambda: tf.LlavaProcessor(image_processor=tf.CLIPImageProcessorPil(**clip), **llava),
        "llava_next": lambda: tf.LlavaNextProcessor(
            image_processor=tf.LlavaNextImageProcessorPil(image_grid_pinpoints=grid, **clip), **llava
        ),
        "qwen25_vl": lambda: processor_of(
            tf.Qwen2_5_VLProcessor,
            tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056}),
            tokenizer,
            template,
        ),
        "qwen3_vl": lambda: processor_of(
            tf.Qwen3VLProcessor,
            tf.Qwen2VLImageProcessorPil(
                size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16
            ),
            tokenizer,
            template,
        ),
        "internvl": lambda: processor_of(
            tf.InternVLProcessor,
            tf.GotOcr2ImageProcessorPil(
                size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12
            ),
            tokenizer,
            template,
            image_seq_length=256,
        ),
        "idefics3": lambda: tf.Idefics3Processor(
            tf.Idefics3ImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
            tokenizer,
            image_seq_len=81,
            chat_template=template,
        ),
        "smolvlm": lambda: processor_of(
            tf.SmolVLMProcessor,
            tf.SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
            tokenizer,
            template,
            image_seq_len=81,
        ),
        "gemma3": lambda: tf.Gemma3Processor(
            tf.Gemma3ImageProcessorPil(size={"height": 896, "width": 896}),
            tokenizer,
            template,
            image_seq_length=256,
        ),
    }[name]()


# Image tokens of a picture of 4,000 x 3,000 at the published sizes. Qwen alone lets them grow with the
# picture: 15,301 without a limit.
LIMIT = 1280 * 28 * 28
TOKENS = {
    "llava": 576,
    "llava_next": 576 + 48 * 36 + 36,
    "qwen25_vl": 41 * 30,
    "qwen3_vl": 36 * 27,
    "internvl": 13 * 256,
    "idefics3": 13 * 81,
    "smolvlm": 13 * 81,
    "gemma3": 256,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_large_photograph_has_a_bounded_number_of_tokens(name):
    vlm = open_tiny(name)
    vlm.processor = full_size(name)
    limit = LIMIT if name.startswith("qwen") else 0
    ask_with(vlm, max_pixels=limit)
    ids = prompt_inputs(vlm, Image.new("RGB", (4000, 3000), "orange"), QUESTION)["input_ids"]
    assert (ids == vlm.core.config.image_token_id).sum() == TOKENS[name]
    if name == "qwen25_vl":
        patches = vlm.processor.image_processor.get_number_of_image_patches(
            3000, 4000, {"min_pixels": 3136, "max_pixels": 12845056}
        )
        assert patches / 4 == 15301, "what its own default would take"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_limit_of_pixels_holds_in_every_architecture(name):
    free, limited = open_tiny(name), open_tiny(name)
    ask_with(limited, max_pixels=9000)
    large, small = Image.new("RGB", (400, 300), "white"), Image.new("RGB", (80, 60), "white")
    large.paste("red", (0, 0, 200, 300))
    inputs = prompt_inputs(limited, large, QUESTION)
    tokens = int((inputs["input_ids"] == limited.core.config.image_token_id).sum())
    assert len(picture_features(limited, inputs)) == tokens
    if name.startswith("qwen"):
        assert tokens * 28 * 28 <= 9000 < 112 * 112, "the processor's own limit"
    else:
        direct = prompt_inputs(free, within_pixels(large, 9000), QUESTION)
        assert all(torch.equal(inputs[key], direct[key]) for key in inputs) and within_pixels(
            large, 9000
        ).size == (109, 82)
    assert all(
        torch.equal(v, prompt_inputs(free, small, QUESTION)[k])
        for k, v in prompt_inputs(limited, small, QUESTION).items()
    ), "a smaller picture is left alone"


def test_a_limit_below_what_the_processor_can_do_is_refused():
    with pytest.raises(
        ValueError,
        match="max_pixels=784 cannot be obeyed: its processor makes no picture smaller than 3136 pixels",
    ):
        ask_with(open_tiny("qwen25_vl"), max_pixels=784)


def test_an_evaluation_asks_as_the_adapter_was_trained_unless_it_is_told(tmp_path):
    (tmp_path / "lineage.json").write_text(
        json.dumps({"base_sha": "", "quantisation": "none", "asked": {"pad_pictures": True}})
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    adapted = Request("amber-generative", "org/model", str(tmp_path), "data")
    assert adapted.asked == {"pad_pictures": True} and Request("amber-generative", "org/model").asked == {}
    assert replace(adapted, system_prompt="Be brief.").asked == {"system_prompt": "Be brief."}
    with pytest.raises(ValueError, match="say how a model is asked: name the model"):
        check_request(Request("amber-generative", answers="answers.jsonl", data="data", pad_pictures=True))
    args = make_parser().parse_args(
        ["evaluate", "org/model", "--bench", "amber", "--pad-pictures", "--system-prompt", "Be brief."]
    )
    assert (args.pad_pictures, args.system_prompt) == (True, "Be brief.") and not hasattr(args, "max_pixels")


def test_answers_to_a_benchmark_say_how_they_were_asked(tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    questions = [Question("q", "red.png", "What is it?")]
    for name, options in (("plain", {}), ("padded", {"pad_pictures": True})):
        run_answers(questions, tmp_path, tmp_path / name, llava(**options), max_new_tokens=4)
        assert {
            k: v for k, v in read_manifest(tmp_path / name)["parameters"].items() if k == "pad_pictures"
        } == options


def test_a_stage_begun_with_one_way_of_asking_does_not_go_on_with_another(tmp_path):
    picture = tmp_path / "prompts/images/0.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (90, 60), "red").save(picture)
    write_table(
        tmp_path / "prompts",
        "prompts",
        [Prompt("0a", "images/0.png", sha256_of(picture.read_bytes()), QUESTION, "here", "train")],
    )
    asked = dict(system_prompt=LLAVA_V1, pad_pictures=True)

    def sample(**options):
        return run_sampling(
            str(tmp_path / "prompts"),
            str(tmp_path / "01"),
            llava(**options),
            n_samples=2,
            max_new_tokens=4,
            batch_size=1,
        )

    responses = sample(**asked)
    assert len(responses) == 2 and read_manifest(tmp_path / "01")["parameters"].items() >= asked.items()
    assert sample(**asked) == responses
    with pytest.raises(ValueError, match="pad_pictures|system_prompt"):
        sample()
