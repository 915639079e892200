"""Tiny models whose tokenizer and chat template are as published where that matters: Qwen2.5-VL without
`<image>` in its vocabulary, and LLaVA-1.5.

Importing this module registers what stands in for processors whose packages are not installed
(tiny_models.py).
"""

import tiny_models
import torch
import transformers as tf
from tiny_models import QWEN_TOKENS, icon_vocabulary, llava
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
    return llava(LLAVA15_TEMPLATE)


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
    return tiny_models.qwen25_vl(qwen_tokenizer(), QWEN25_TEMPLATE)


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
