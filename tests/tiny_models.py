"""Tiny random-weight models of real architectures with their real processors, built from configurations alone
and saved in the ordinary layout.
"""

import functools
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from rlaifv_nb.engine.models import OpenModel, sharing_of
from rlaifv_nb.iconworld.training import CHAT_TEMPLATE, build_tokenizer

TEXT = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CLIP = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
    projection_dim=32,
)
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string "
    "%}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] "
    "}}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (  # as published with LLaVA-1.5 and the LLaVA-NeXT of Vicuna
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' "
    "}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% "
    "endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% if message['role'] "
    "== 'assistant' %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% else %}{{ content['text'] + ' ' }}{% "
    "endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOL_TEMPLATE = (  # as published with SmolVLM and Idefics3
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if "
    "message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}"
    "{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% "
    "elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA_TEMPLATE = (  # as published with Gemma 3, less its system turn
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' "
    "else message['role'] %}{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in "
    "message['content'] %}{% if item['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor "
    "%}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@functools.lru_cache
def icon_vocabulary():
    "The icon world's tokenizer as text."
    return build_tokenizer().backend_tokenizer.to_str()


def tokenizer_with(*special, eos="</s>", plain=(), **named):
    """The icon world's tokenizer with further special tokens, plain added tokens, and special tokens that
    become attributes.
    """
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(icon_vocabulary()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} | named,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)} if special else {})
    tokenizer.add_tokens(list(plain))
    tokenizer.eos_token = eos
    return tokenizer


def vocabulary(tokenizer):
    "Vocabulary size of a model for this tokenizer."
    return -(-len(tokenizer) // 64) * 64


def text_of(tokenizer, **more):
    "Configuration of a language model for this tokenizer."
    return TEXT | dict(vocab_size=vocabulary(tokenizer), eos_token_id=tokenizer.eos_token_id) | more


def llava(template=CHAT_TEMPLATE):
    "LLaVA-1.5."
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
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next():
    "LLaVA-NeXT: any resolution, a picture of several tiles."
    tokenizer = tokenizer_with()
    grid = [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP),
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-2,
    )
    pictures = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grid
    )
    processor = tf.LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


class PictureProcessor(tf.Qwen2_5_VLProcessor):
    "Qwen2.5-VL's processor without its video part, which needs torchvision."

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)


class Qwen3PictureProcessor(tf.Qwen3VLProcessor):
    "The same of Qwen3-VL."

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)


class InternPictureProcessor(tf.InternVLProcessor):
    "The same of InternVL."

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)


class SmolPictureProcessor(tf.SmolVLMProcessor):
    "The same of SmolVLM, whose video part needs the package num2words, too."

    video_processor = SimpleNamespace(num_frames=1, fps=1)

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None):
        self.fake_image_token, self.image_token, self.global_image_token = (
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
        )
        self.image_token_id, self.image_seq_len, self.video_token = (
            tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_len,
            "<video>",
        )
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class VideoPart(NamedTuple):
    "What a processor's video part needs, and what stands in for the processor where that is not installed."

    config: type
    cut: type
    video_processor: str
    packages: tuple


VIDEO_PARTS = {
    tf.Qwen2_5_VLProcessor: VideoPart(
        tf.Qwen2_5_VLConfig, PictureProcessor, "Qwen2VLVideoProcessor", ("torchvision",)
    ),
    tf.Qwen3VLProcessor: VideoPart(
        tf.Qwen3VLConfig, Qwen3PictureProcessor, "Qwen3VLVideoProcessor", ("torchvision",)
    ),
    tf.InternVLProcessor: VideoPart(
        tf.InternVLConfig, InternPictureProcessor, "InternVLVideoProcessor", ("torchvision",)
    ),
    tf.SmolVLMProcessor: VideoPart(
        tf.SmolVLMConfig, SmolPictureProcessor, "SmolVLMVideoProcessor", ("torchvision", "num2words")
    ),
}
NOT_INSTALLED = {
    real: [name for name in part.packages if find_spec(name) is None] for real, part in VIDEO_PARTS.items()
}
for real, part in VIDEO_PARTS.items():
    if NOT_INSTALLED[real]:
        tf.AutoProcessor.register(
            part.config, part.cut, exist_ok=True
        )  # so that AutoProcessor opens it from a folder


def processor_of(real, pictures, tokenizer, chat_template, **more):
    "The real processor where the packages of its video part are installed, else the one without that part."
    part = VIDEO_PARTS[real]
    if NOT_INSTALLED[real]:
        return part.cut(pictures, tokenizer, chat_template=chat_template, **more)
    return real(
        pictures,
        tokenizer,
        video_processor=getattr(tf, part.video_processor)(),
        chat_template=chat_template,
        **more,
    )


QWEN_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


def qwen25_vl(tokenizer=None, template=QWEN_TEMPLATE):
    "Qwen2.5-VL: pictures of any size, rotary positions in three dimensions."
    tokenizer = tokenizer or tokenizer_with(*QWEN_TOKENS.values(), image_token="<|image_pad|>")
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
        tf.Qwen2_5_VLProcessor, pictures, tokenizer, template
    )


def qwen3_vl():
    "Qwen3-VL: a picture's features enter several layers of the language model."
    tokenizer = tokenizer_with(
        "<|im_start|>", "<|im_end|>", *QWEN_TOKENS.values(), eos="<|im_end|>", image_token="<|image_pad|>"
    )
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4, "mrope_interleaved": True}
    text = text_of(tokenizer, head_dim=12, rope_parameters=rope)
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        out_hidden_size=48,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    pictures = tf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    template = CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    return tf.Qwen3VLForConditionalGeneration(config), processor_of(
        tf.Qwen3VLProcessor, pictures, tokenizer, template
    )


def internvl():
    "InternVL: tiles of one size, between `<img>` and `</img>`; a Qwen2 inside."
    tokenizer = tokenizer_with(
        "<|im_start|>",
        "<|im_end|>",
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config = tf.InternVLConfig(
        text_config=tf.Qwen2Config(**text_of(tokenizer)),
        vision_config=tf.InternVLVisionConfig(**vision),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    pictures = tf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4
    )
    template = CHATML.replace("PICTURE", "<IMG_CONTEXT>\n")
    return tf.InternVLForConditionalGeneration(config), processor_of(
        tf.InternVLProcessor, pictures, tokenizer, template, image_seq_length=4
    )


TILES = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
SMOL_TOKENS = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>")


def smol(config_class, vision_class, tokenizer):
    "Configuration of Idefics3 or SmolVLM."
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return config_class(
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        vision_config=vision_class(**vision),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def idefics3():
    """Idefics3: tiles in rows and columns, each named by tokens that are not special; its language model is
    called `text_model`.
    """
    tokenizer = tokenizer_with(*SMOL_TOKENS, plain=TILES, eos="<end_of_utterance>")
    pictures = tf.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = tf.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=SMOL_TEMPLATE)
    return tf.Idefics3ForConditionalGeneration(
        smol(tf.Idefics3Config, tf.Idefics3VisionConfig, tokenizer)
    ), processor


def smolvlm():
    "SmolVLM: Idefics3 with other class names and special tile tokens."
    tokenizer = tokenizer_with(*SMOL_TOKENS, *TILES, eos="<end_of_utterance>")
    pictures = tf.SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = processor_of(tf.SmolVLMProcessor, pictures, tokenizer, SMOL_TEMPLATE, image_seq_len=4)
    return tf.SmolVLMForConditionalGeneration(
        smol(tf.SmolVLMConfig, tf.SmolVLMVisionConfig, tokenizer)
    ), processor


def gemma3():
    """Gemma 3: layers with a sliding window (shorter than a prompt here), image tokens that see each other,
    an end of turn that is not the end token.
    """
    tokenizer = tokenizer_with(
        "<start_of_turn>", "<end_of_turn>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    text = text_of(
        tokenizer, head_dim=12, sliding_window=24, sliding_window_pattern=2, query_pre_attn_scalar=12
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=tf.SiglipVisionConfig(**vision),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    pictures = tf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    model = tf.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<end_of_turn>"),
    ]
    return model, tf.Gemma3Processor(pictures, tokenizer, GEMMA_TEMPLATE, image_seq_length=4)


ARCHITECTURES = {
    f.__name__: f for f in (llava, llava_next, qwen25_vl, qwen3_vl, internvl, idefics3, smolvlm, gemma3)
}
NOT_SHARED = {"gemma3": "has layers of type sliding_attention"}  # why branches of a prompt cannot share it
NOT_CACHED = {
    "qwen3_vl": "puts more of a picture into the language model"
}  # why features at image tokens are not enough


def build_tiny(name):
    "Model and processor of that name, with random weights of seed 0."
    torch.manual_seed(0)
    model, processor = ARCHITECTURES[name]()
    # initial weights are zero (Gemma's projector) or so small that hardly anything would depend on anything
    for p in model.parameters():
        p.data = p.data if p.ndim == 1 else p.data * 3 if p.any() else torch.randn_like(p) * 0.1
    return model.eval(), processor


def open_tiny(name, share_prefix=True):
    "The model of that name, opened as `open_vlm` would."
    model, processor = build_tiny(name)
    return OpenModel(model, processor, name, name, "none", sharing_of(model, share_prefix))


LLAMA3_TEMPLATE = (  # as published with Llama 3
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + "
    "content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% "
    "endif %}" + CHATML
)  # adds a system turn
MISTRAL_TEMPLATE = (  # as published with Mistral 7B, less its errors
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def chat_tokenizer(template, *special, bos="", end):
    """A tokenizer with a chat template that, like the real ones, puts `bos` before every text, whether or not
    the template has done so.
    """
    tokenizer = tokenizer_with(*special, eos=end)
    if bos:
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = template
    return tokenizer


def llama3():
    "Llama 3: header tokens around the role, an end of turn."
    tokenizer = chat_tokenizer(
        LLAMA3_TEMPLATE,
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        end="<|eot_id|>",
    )
    return tf.LlamaForCausalLM(tf.LlamaConfig(**text_of(tokenizer))), tokenizer


def qwen2():
    "Qwen 2.5: no token at the beginning, a system turn that the template adds."
    tokenizer = chat_tokenizer(QWEN2_TEMPLATE, "<|im_start|>", "<|im_end|>", end="<|im_end|>")
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**text_of(tokenizer))), tokenizer


def gemma3_text():
    "Gemma 3: layers with a sliding window, an end of turn that is not the end token."
    tokenizer = chat_tokenizer(
        GEMMA_TEMPLATE, "<bos>", "<start_of_turn>", "<end_of_turn>", bos="<bos>", end="</s>"
    )
    text = text_of(
        tokenizer, head_dim=12, sliding_window=24, sliding_window_pattern=2, query_pre_attn_scalar=12
    )
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**text)), tokenizer


def mistral():
    "Mistral: instructions between two tokens, the end token behind an answer."
    tokenizer = chat_tokenizer(MISTRAL_TEMPLATE, "[INST]", "[/INST]", bos="<s>", end="</s>")
    return tf.MistralForCausalLM(tf.MistralConfig(sliding_window=None, **text_of(tokenizer))), tokenizer


SPLITTERS = {f.__name__: f for f in (llama3, qwen2, gemma3_text, mistral)}
END_OF_TURN = {
    "llama3": "<|eot_id|>",
    "qwen2": "<|im_end|>",
    "gemma3_text": "<end_of_turn>",
    "mistral": "</s>",
}
