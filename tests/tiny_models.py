"""Tiny random-weight models of real architectures with their real processors, built from configurations alone and saved in the ordinary layout."""
import functools

import torch
import transformers as tf

from rlaifv_nb.iconworld_models import CHAT_TEMPLATE, build_tokenizer
from rlaifv_nb.models import OpenModel, sharing_of

TEXT = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, projection_dim=32)
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")


@functools.lru_cache
def tokenizer_with(*special):
    "The icon world's tokenizer with further special tokens."
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def vocabulary(tokenizer):
    "Vocabulary size of a model for this tokenizer."
    return -(-len(tokenizer) // 64) * 64


def llava():
    "LLaVA-1.5."
    tokenizer = tokenizer_with()
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**CLIP), text_config=tf.LlamaConfig(vocab_size=vocabulary(tokenizer), **TEXT),
                            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default")
    pictures = tf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(image_processor=pictures, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                  chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1)
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next():
    "LLaVA-NeXT: any resolution, a picture of several tiles."
    tokenizer = tokenizer_with()
    grid = [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(vision_config=tf.CLIPVisionConfig(**CLIP), text_config=tf.LlamaConfig(vocab_size=vocabulary(tokenizer), **TEXT),
                                image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grid, vision_feature_layer=-2)
    pictures = tf.LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grid)
    processor = tf.LlavaNextProcessor(image_processor=pictures, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                      chat_template=CHAT_TEMPLATE, image_token="<image>", num_additional_image_tokens=1)
    return tf.LlavaNextForConditionalGeneration(config), processor


class PictureProcessor(tf.Qwen2_5_VLProcessor):
    "Qwen2.5-VL's processor without its video part, which needs torchvision."

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token))
        tf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen25_vl():
    "Qwen2.5-VL: pictures of any size, rotary positions in three dimensions."
    tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in (
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"))}
    text = dict(vocab_size=vocabulary(tokenizer), rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}, **TEXT)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=48, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
                  window_size=56, fullatt_block_indexes=[1])
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    pictures = tf.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return tf.Qwen2_5_VLForConditionalGeneration(config), PictureProcessor(pictures, tokenizer, chat_template=QWEN_TEMPLATE)


ARCHITECTURES = {f.__name__: f for f in (llava, llava_next, qwen25_vl)}


def open_tiny(name, share_prefix=True):
    "The model of that name with random weights of seed 0, opened as `open_vlm` would."
    torch.manual_seed(0)
    model, processor = ARCHITECTURES[name]()
    for p in model.parameters():  # initial weights are so small that hardly anything would depend on anything
        p.data = p.data * 3 if p.ndim > 1 else p.data
    return OpenModel(model.eval(), processor, name, name, "none", sharing_of(model, share_prefix))
