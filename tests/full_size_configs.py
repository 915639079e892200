"""Configurations of the models that the packaged recipes name, as published, written as folders; no weights,
no processor.

On the Hub, Qwen2.5-VL's language model stands flat in config.json; here it is nested, as transformers writes
it.
"""

import json
from pathlib import Path

import transformers as tf

LLAMA = dict(rms_norm_eps=1e-5, max_position_embeddings=4096)
CLIP = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
VICUNA_7B = LLAMA | dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
)
VICUNA_13B = VICUNA_7B | dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
YI_34B = LLAMA | dict(
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    vocab_size=64064,
    eos_token_id=7,
    rope_parameters={"rope_type": "default", "rope_theta": 5e6},
)
LLAMA_3_8B = LLAMA | dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128001,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5},
)
QWEN = dict(
    num_hidden_layers=28,
    rms_norm_eps=1e-6,
    max_position_embeddings=32768,
    bos_token_id=151643,
    eos_token_id=151645,
    use_sliding_window=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
QWEN_7B = QWEN | dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
QWEN_1_5B = QWEN | dict(
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
QWEN_IDS = dict(
    image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653
)


def llava_next(text, image_token):
    "A LLaVA-NeXT with this language model."
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP),
        text_config=text,
        image_token_index=image_token,
        image_grid_pinpoints=PINPOINTS,
    )


def qwen25_7b():
    "Qwen2.5-VL-7B."
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = QWEN_7B | dict(max_position_embeddings=128000, rope_parameters=rope, sliding_window=32768)
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)


def smolvlm_2b():
    "SmolVLM-Instruct: SigLIP so400m with tiles of 384, and SmolLM2-1.7B."
    text = tf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=49155,
        rms_norm_eps=1e-5,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 273768.0},
    )
    vision = dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return tf.Idefics3Config(text_config=text, vision_config=vision, scale_factor=3, image_token_id=49153)


FULL_SIZE = {
    "llava-hf/llava-1.5-7b-hf": lambda: tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**CLIP),
        text_config=tf.LlamaConfig(**VICUNA_7B),
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=32001,
        tie_word_embeddings=False,
    ),
    "llava-hf/llava-v1.6-34b-hf": lambda: llava_next(tf.LlamaConfig(**YI_34B), 64000),
    "llava-hf/llava-v1.6-vicuna-13b-hf": lambda: llava_next(tf.LlamaConfig(**VICUNA_13B), 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": lambda: tf.LlamaConfig(**LLAMA_3_8B),
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen25_7b,
    "Qwen/Qwen2.5-7B-Instruct": lambda: tf.Qwen2Config(**QWEN_7B),
    "Qwen/Qwen2.5-1.5B-Instruct": lambda: tf.Qwen2Config(**QWEN_1_5B),
    "HuggingFaceTB/SmolVLM-Instruct": smolvlm_2b,
}


def write_configs(folder):
    "Writes every configuration as `<Hub id>/config.json`."
    for name, make in FULL_SIZE.items():
        path = Path(folder) / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        config = make()
        path.write_text(
            json.dumps(json.loads(config.to_json_string(use_diff=False)) | {"architectures": None})
        )
    return Path(folder)
