"""Each architecture from its processor to a merged model and through the stages, on tiny models in the
ordinary folder layout.

What they show is noted with `show` and stands in data/results/architectures.json, which 00_models displays
(`pytest --write-table` writes it).
"""

import functools
import json
import random
import re

import pytest
import torch
from conftest import check_table
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    NOT_CACHED,
    NOT_INSTALLED,
    NOT_SHARED,
    VIDEO_PARTS,
    build_tiny,
    open_tiny,
)
from transformers import AutoModelForImageTextToText

from rlaifv_nb.claims import ClaimsOptions, run_claims
from rlaifv_nb.dpo import DpoOptions, run_dpo
from rlaifv_nb.engine.caches import picture_features
from rlaifv_nb.engine.models import (
    OpenModel,
    answer_ids,
    lora_targets,
    missing_parts,
    open_llm,
    open_vlm,
    prompt_inputs,
    prompt_positions,
    prompt_text,
    save_adapter,
    sibling_ids,
    unsampled_ids,
)
from rlaifv_nb.engine.packing import PER_TOKEN, collate_rows, pack_row, row_logps
from rlaifv_nb.engine.prefix import branch_logps, common_prefix_length, read_prompts
from rlaifv_nb.evaluation import run_evaluation
from rlaifv_nb.feedback import FeedbackOptions, run_feedback
from rlaifv_nb.guided_decoding import run_guided_decoding
from rlaifv_nb.iconworld.world import DESCRIBE, draw_picture, make_scene, question_text, read_claims
from rlaifv_nb.pairs import PairOptions, run_pairs
from rlaifv_nb.records import (
    YES_NO_SUFFIX,
    Claim,
    Pair,
    Prompt,
    Response,
    Score,
    Verdict,
    read_manifest,
    read_table,
    sha256_of,
    write_table,
)
from rlaifv_nb.sampling import SamplingOptions, run_sampling

SIZES = ((150, 100), (90, 140), (56, 56), (240, 60))
BRANCH = [[30, 31, 32, 40], [50, 60]]
CAPTIONS = (
    "Two red cats are in the top left. It is a lovely picture.",
    "A blue cup is in the top right. It is a lovely picture.",
    "There is a green dog in the bottom left. It is a lovely picture.",
    "Three brown clocks are in the bottom right. It is a lovely picture.",
)
CHECKED = {
    question_text(c) + YES_NO_SUFFIX: "No" if k % 2 else "Yes"
    for k, text in enumerate(CAPTIONS)
    for c in read_claims(text)
}
TITLES = {name: re.split(r"[:,.] |\.$", build.__doc__)[0] for name, build in ARCHITECTURES.items()}
tiny = functools.lru_cache(open_tiny)
on_every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def picture(scene, size=SIZES[0]):
    "A scene as a picture of that size."
    return draw_picture(make_scene("dev", scene)).resize(size)


def logps_of(vlm, image=None, question=DESCRIBE[0]):
    "Log-probabilities of two branches after a question about a picture."
    inputs = prompt_inputs(vlm, image or picture(0), question)
    return torch.cat(branch_logps(vlm, read_prompts(vlm, [inputs]), [0, 0], BRANCH))


def with_lora(vlm, rank=4):
    "The model with a LoRA adapter that changes it."
    torch.manual_seed(1)
    vlm.model = get_peft_model(
        vlm.model, LoraConfig(r=rank, target_modules=lora_targets(vlm.core), init_lora_weights=False)
    ).eval()
    return vlm


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A function from a name to the folder of that model, in the ordinary layout."

    @functools.lru_cache
    def save(name):
        folder = tmp_path_factory.mktemp(name)
        for part in build_tiny(name):
            part.save_pretrained(folder)
        return str(folder)

    return save


@on_every_architecture
def test_every_picture_reaches_the_model(name, show):
    vlm = tiny(name)
    for size in SIZES:
        inputs = prompt_inputs(vlm, picture(0, size), DESCRIBE[0])
        assert (inputs["input_ids"] == vlm.core.config.image_token_id).sum() == len(
            picture_features(vlm, inputs)
        ), size
        assert (logps_of(vlm, picture(0, size)) - logps_of(vlm, picture(1, size))).abs().max() > 1e-3, size
    show(TITLES[name], "image changes scores", "image tokens = features", "image sizes")


@on_every_architecture
def test_scores_are_those_of_processor_and_model_alone(name):
    vlm, image = tiny(name), picture(2)
    text = prompt_text(vlm, DESCRIBE[2])
    inputs = vlm.processor(
        text=[text],
        images=[image],
        add_special_tokens=False,
        return_token_type_ids=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        own = vlm.core(**inputs).logits[0, -1].log_softmax(-1)[[branch[0] for branch in BRANCH]]
    assert torch.allclose(logps_of(vlm, image, DESCRIBE[2])[[0, len(BRANCH[0])]], own, atol=1e-4)


@on_every_architecture
def test_another_question_keeps_the_picture(name):
    vlm = tiny(name)
    for size in SIZES:
        first = prompt_inputs(vlm, picture(0, size), DESCRIBE[0])
        for question in (*DESCRIBE, "\n Is there a cat? ", "1 + 1 = 2, isn't it?"):
            assert (
                sibling_ids(vlm, question, first)
                == prompt_inputs(vlm, picture(1, size), question)["input_ids"][0].tolist()
            ), (size, question)


@on_every_architecture
def test_the_template_loses_and_doubles_nothing(name, show):
    vlm = tiny(name)
    decode, question = functools.partial(vlm.tokenizer.decode, skip_special_tokens=False), DESCRIBE[1]
    before, _, behind = prompt_text(vlm, question).partition(vlm.processor.image_token)
    text = decode(prompt_inputs(vlm, picture(0), question)["input_ids"][0])
    assert text.startswith(before) and text.endswith(behind)
    turns = {vlm.tokenizer.bos_token, vlm.tokenizer.eos_token, vlm.tokenizer.pad_token, decode([vlm.end_id])}
    assert not any(t in text[len(before) : len(text) - len(behind)] for t in turns), "a picture is no turn"
    for answer in ("A red cat.", "Two dogs\n\nand a cup", "1"):
        ids, whole = (
            answer_ids(vlm, question, answer),
            vlm.processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                tokenize=False,
            ),
        )
        assert (
            ids[-1] == vlm.end_id
            and not set(ids[:-1]) & set(vlm.special_ids)
            and decode(ids[:-1]).strip() == answer
        )
        assert (prompt_text(vlm, question) + decode(ids)) == whole.rstrip()
    show(TITLES[name], "chat template")


@pytest.mark.parametrize(
    "part, other",
    [
        ("{% for message", "{{ messages | length }}{% for message"),
        ("{{ part['text'] }}", "{{ part['text'] | upper }}"),
    ],
)
def test_templates_that_rewrite_a_turn_are_refused(part, other):
    vlm = open_tiny("llava")
    vlm.processor.chat_template = vlm.processor.chat_template.replace(part, other)
    with pytest.raises(
        ValueError, match="the chat template or tokenizer changes the prompt when an answer follows"
    ):
        answer_ids(vlm, "What?", "A red cat.")


def test_an_answer_has_its_spaces_where_the_template_keeps_them():
    for name, kept in (("llava", True), ("gemma3", False)):
        assert (
            answer_ids(tiny(name), "What?", "A cat. ") != answer_ids(tiny(name), "What?", "A cat.")
        ) == kept


@on_every_architecture
def test_special_tokens_are_never_part_of_an_answer(name):
    vlm = tiny(name)
    text = prompt_text(vlm, "?") + vlm.tokenizer.decode(prompt_inputs(vlm, picture(0), "?")["input_ids"][0])
    never, words = unsampled_ids(vlm), set(re.findall(r"<[^<>\s]+>", text))
    assert vlm.end_id not in never and set(vlm.tokenizer.convert_tokens_to_ids(list(words))) <= {
        *never,
        vlm.end_id,
    }
    assert {vlm.core.config.image_token_id, vlm.tokenizer.bos_token_id, vlm.tokenizer.pad_token_id} <= set(
        never
    )
    for token in vlm.tokenizer.convert_ids_to_tokens(vlm.special_ids):
        with pytest.raises(ValueError, match=re.escape(f"the answer contains the special token {token}")):
            answer_ids(vlm, "What?", f"A cat {token} sits.")


@on_every_architecture
def test_lora_adapts_the_language_model_and_nothing_else(name):
    core = tiny(name).core
    linear = {n for n, m in core.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {n for n in linear if n.startswith(("model.language_model.", "model.text_model."))}
    assert {n for n in linear if re.fullmatch(lora_targets(core), n)} == inside and len(
        inside
    ) == 3 * 7 < len(linear)
    if name == "llava":
        assert (
            lora_targets(core)
            == r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        )


@on_every_architecture
def test_an_adapter_survives_saving_and_merging(name, saved, tmp_path, show):
    vlm = open_vlm(saved(name))
    base = logps_of(vlm)
    adapted = logps_of(with_lora(vlm))
    assert (base - adapted).abs().max() > 0.01
    save_adapter(vlm, tmp_path / "adapter")
    assert torch.equal(adapted, logps_of(open_vlm(saved(name), str(tmp_path / "adapter"))))
    vlm.model = vlm.model.merge_and_unload()
    assert torch.allclose(adapted, logps_of(vlm), atol=1e-4)
    vlm.model.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(
        adapted,
        logps_of(OpenModel(reloaded, vlm.processor, name, name, sharing_problem="not asked")),
        atol=1e-4,
    )
    show(TITLES[name], "adapter saved, reloaded, merged")


@on_every_architecture
def test_four_bit_is_for_the_language_model_alone(name, saved, show):
    shared, plain = (open_vlm(saved(name), quantisation="nf4", share_prefix=share) for share in (True, False))
    four_bit = {n for n, m in shared.model.named_modules() if type(m).__name__ == "Linear4bit"}
    core = tiny(name).core
    assert four_bit == {
        n
        for n, m in core.named_modules()
        if isinstance(m, torch.nn.Linear) and re.fullmatch(lora_targets(core), n)
    }
    assert all(
        p.dtype == torch.float32
        for n, p in shared.model.named_parameters()
        if n.rpartition(".")[0] not in four_bit
    )
    assert lora_targets(shared.core) == lora_targets(core)
    assert NOT_SHARED[name] in shared.sharing_problem if name in NOT_SHARED else shared.sharing_problem == ""
    assert torch.allclose(logps_of(shared), logps_of(plain), atol=1e-4)
    assert 0.01 < (logps_of(shared) - logps_of(tiny(name))).abs().max() < 20, "4 bits are not 32"
    show(TITLES[name], "4-bit")
    show(TITLES[name], "prefix sharing on = off", but=NOT_SHARED.get(name, ""))


def lesson(vlm, k):
    """A row about picture k with the captions and some of the checked questions as branches, and the length
    of each answer.
    """
    turns = [(DESCRIBE[k], text) for text in CAPTIONS] + random.Random(k).sample(sorted(CHECKED.items()), 7)
    inputs = prompt_inputs(vlm, picture(k, SIZES[k]), DESCRIBE[k])
    asked, answers = (
        [sibling_ids(vlm, q, inputs) for q, _ in turns],
        [answer_ids(vlm, q, a) for q, a in turns],
    )
    positions, n = (
        prompt_positions(vlm.core, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}),
        common_prefix_length(asked),
    )
    head = {
        key: v[:, :n] if key in ("input_ids", "attention_mask", *PER_TOKEN) else v
        for key, v in inputs.items()
    }
    positions = (positions if positions.ndim == 2 else positions[:, 0])[:, :n]
    return pack_row(head, [q[n:] + a for q, a in zip(asked, answers)], positions), [len(a) for a in answers]


def teach(vlm, steps=64):
    """Teaches a model four captions, whatever the picture, and that two of them are wrong, so that the stages
    have claims and pairs to work on.
    """
    lessons, layout = (
        [lesson(vlm, k) for k in range(len(SIZES))],
        "plain" if vlm.sharing_problem else "packed",
    )
    learnt = {id(p): p for part in (vlm.core.get_decoder(), vlm.core.lm_head) for p in part.parameters()}
    optimizer = torch.optim.AdamW(learnt.values(), lr=6e-3, weight_decay=0.0)
    vlm.model.train()
    for step in range(steps):
        row, lengths = lessons[step % len(lessons)]
        logps = [branch[-n:] for branch, n in zip(row_logps(vlm.core, collate_rows([row], layout)), lengths)]
        loss = -sum(torch.cat(part).mean() for part in (logps[: len(CAPTIONS)], logps[len(CAPTIONS) :]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    vlm.model.eval()


def write_prompts(folder):
    "Prompts with a picture of each size, the last one for dev; returns them."
    prompts = []
    (folder / "prompts/images").mkdir(parents=True)
    for k, size in enumerate(SIZES):
        path = folder / f"prompts/images/{k}.png"
        picture(k, size).save(path)
        split = "dev" if k == len(SIZES) - 1 else "train"
        prompts.append(
            Prompt(f"{k:02x}", f"images/{k}.png", sha256_of(path.read_bytes()), DESCRIBE[k], "here", split)
        )
    write_table(folder / "prompts", "prompts", prompts)
    return prompts


@pytest.fixture(scope="module")
def splitter():
    "The packaged splitter, opened once."
    return open_llm("packaged:iconworld-splitter")


@on_every_architecture
def test_the_stages_run(name, splitter, tmp_path, show):
    opened, prompts, at = open_tiny(name), write_prompts(tmp_path), lambda part: str(tmp_path / part)
    teach(opened)
    for part in (opened.model, opened.processor):
        part.save_pretrained(at("model"))
    vlm = open_vlm(at("model"), quantisation="nf4")
    responses = run_sampling(
        at("prompts"), at("01"), vlm, options=SamplingOptions(n_samples=6, max_new_tokens=24, batch_size=3)
    ).read("responses", Response)
    assert len(responses) == 6 * len(prompts) and len({r.text for r in responses}) > 2
    show(TITLES[name], "01 sampling")
    claims = run_claims(
        at("prompts"), at("01"), at("02"), splitter, options=ClaimsOptions(max_new_tokens=64)
    ).read("claims", Claim)
    assert len({c.response_id for c in claims}) > len(responses) / 2
    show(TITLES[name], "02 claims")
    verdicts = run_feedback(
        at("prompts"), at("01"), at("02"), at("03"), vlm, options=FeedbackOptions(batch_size=2)
    ).read("verdicts", Verdict)
    assert len(verdicts) == len(claims) and len({v.label for v in verdicts}) > 1
    answers = {(c.response_id[:2], c.question): (v.p_yes, v.p_no) for c, v in zip(claims, verdicts)}
    different = len(set(answers.values()))
    assert different > len({q for _, q in answers}) and different > len({p for p, _ in answers}), (
        "picture and question both matter"
    )
    show(TITLES[name], "03 feedback")
    pairs = run_pairs(
        at("prompts"), at("01"), at("02"), at("03"), at("04"), options=PairOptions(length_balance=False)
    ).read("pairs", Pair)
    assert pairs and {p.prompt_id for p in pairs} <= {p.prompt_id for p in prompts}
    show(TITLES[name], "04 pairs")
    save_adapter(with_lora(vlm), at("parent"))
    run_dpo(
        at("prompts"),
        at("04"),
        at("05"),
        functools.partial(open_vlm, at("model"), at("parent"), quantisation="nf4"),
        options=DpoOptions(learning_rate=1e-3, epochs=1.0, batch_size=1, evaluations=1, min_steps=1),
    )
    engine = read_manifest(at("05"))["engine"]
    assert engine["layout"] == ("plain" if name in NOT_SHARED else "packed") and NOT_SHARED.get(
        name, ""
    ) in engine.get("layout_problem", "")
    assert (
        NOT_CACHED[name] in engine["image_features"]
        if name in NOT_CACHED
        else engine["image_features"] == "cached"
    )
    parent, trained = (
        load_file(f"{at(part)}/adapter_model.safetensors") for part in ("parent", "05/adapter")
    )
    assert (
        parent.keys() == trained.keys()
        and len(parent) == 3 * 7 * 2
        and all((parent[k] - trained[k]).abs().max() > 0 for k in parent)
    )
    show(TITLES[name], "05 dpo")
    run_evaluation(
        at("06"),
        at("model"),
        f"aligned={at('05/adapter')}",
        quantisation="nf4",
        n_scenes=2,
        max_new_tokens=16,
    )
    scores = read_table(at("06"), "scores", Score)
    assert {s.model for s in scores} == {"base", "aligned"} and all(
        s.n > 0 for s in scores if s.metric.startswith("accuracy")
    )
    show(TITLES[name], "06 evaluation")
    run_guided_decoding(
        at("prompts"),
        at("07"),
        at("model"),
        at("05/adapter"),
        quantisation="nf4",
        n_candidates=2,
        max_new_tokens=8,
        batch_size=4,
    )
    rows = [json.loads(line) for line in open(at("07/candidates-aligned-00000.jsonl"))]
    assert rows and any(abs(r["policy_sum_logp"] - r["reference_sum_logp"]) > 1e-2 for r in rows)
    show(TITLES[name], "07 guided decoding")


@pytest.mark.parametrize("real", VIDEO_PARTS, ids=lambda real: real.__name__)
def test_processors_have_their_video_part(real):
    if NOT_INSTALLED[real]:
        pytest.skip(
            f"its video part is cut away in these tests: {' and '.join(NOT_INSTALLED[real])} not installed"
        )
    used = [type(tiny(name).processor) for name in ARCHITECTURES]
    assert used.count(real) == 1 and not {part.cut for part in VIDEO_PARTS.values()} & set(used)


def test_a_model_with_parts_missing_is_named(tmp_path):
    import transformers as tf

    model, processor = build_tiny("llava")
    hook = model.register_forward_hook(lambda module, inputs, out: setattr(out, "logits", out.logits * 0.5))
    assert missing_parts(OpenModel(model, processor, "llava", "")) == [
        "logits that are its head's output alone"
    ]
    hook.remove()
    text = tf.Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    processor.chat_template = None
    missing = missing_parts(OpenModel(model, processor, "llava", ""))
    assert missing == ["chat template"]
    assert missing_parts(OpenModel(tf.Gemma2ForCausalLM(text), processor, "gemma2", ""))[0].startswith(
        "image features"
    )
    model.save_pretrained(tmp_path)
    processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="LlavaForConditionalGeneration is not supported: it has no chat template"
    ):
        open_vlm(str(tmp_path))


def test_the_table_says_what_was_shown(request):
    check_table(request, "architectures", globals(), [TITLES[name] for name in ARCHITECTURES])
