"""Tiny models whose tokenizer and chat template are as published where that matters: Qwen2.5-VL without
`<image>` in its vocabulary, and LLaVA-1.5.

Importing this module registers what stands in for processors whose packages are not installed
(tiny_models.py).
"""

import torch
import transformers as tf
from tiny_models import CLIP, QWEN_TOKENS, icon_vocabulary, processor_of, text_of, tokenizer_with
from tokenizers import Tokenizer

# As published with llava-hf/llava-1.5-7b-hf: the role, all pictures, then all text, a space behind each text.
LLAVA15_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As published with Qwen/Qwen2.5-VL-7B-Instruct, less its videos: a system turn unless there is one.
QWEN25_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llava15():
    "LLaVA-1.5: square pictures, cut to size; no special token between the turns."
    tokenizer = tokenizer_with()
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP),
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pictures = tf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA15_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def qwen_tokenizer():
    "A tokenizer that knows `<image>` as ordinary letters alone, as Qwen's does."
    vocabulary = icon_vocabulary().replace('"<image>"', '"<|image_pad|>"')
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary),
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *QWEN_TOKENS.values()]}
    )
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def qwen25_vl():
    "Qwen2.5-VL: pictures of any size, rotary positions in three dimensions, no `<image>`."
    tokenizer = qwen_tokenizer()
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    text = text_of(
        tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        out_hidden_size=48,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=56,
        fullatt_block_indexes=[1],
    )
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    pictures = tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor_of(
        tf.Qwen2_5_VLProcessor, pictures, tokenizer, QWEN25_TEMPLATE
    )


PUBLISHED = {f.__name__: f for f in (llava15, qwen25_vl)}


def build_published(name):
    """Model and processor of that name, with random weights of seed 0, so large that everything depends on
    everything."""
    torch.manual_seed(0)
    model, processor = PUBLISHED[name]()
    for p in model.parameters():
        p.data = p.data if p.ndim == 1 else p.data * 3
    return model.eval(), processor


def save_published(name, folder):
    "That model in the ordinary folder layout."
    for part in build_published(name):
        part.save_pretrained(folder)
