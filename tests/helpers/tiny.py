"""Small random checkpoints in the published layout, made in a second: what the model tests open; and transformers' side
of a comparison."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
# By family: (pattern of a parameter name, what stands for it in published files), for re.sub
PUBLISHED = {
    "qwen3_vl": (),
    "qwen2_5_vl": (
        (r"^model\.visual\.", "visual."),
        (r"^model\.language_model\.", "model."),
    ),
    "mllama": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
    ),
}
# The mean and spread of each channel of CLIP's pictures, which two of the families use.
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def byte_tokenizer(special: list[str] = SPECIAL) -> Tokenizer:
    """One token a byte, and control tokens at 256 and on."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = {character: i for i, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def qwen3_vl_config(tied: bool = True, spelling: str = "published") -> dict:
    """Every shape differs from every other one that it could be mistaken for; query width 64 is not hidden 48."""
    text = {"model_type": "qwen3_vl_text", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 80, "vocab_size": 272, "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0, "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "tie_word_embeddings": tied}
    vision = {"model_type": "qwen3_vl", "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 56,
              "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 48, "in_channels": 3, "patch_size": 4,
              "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 36,
              "deepstack_visual_indexes": [0, 2]}
    if spelling == "transformers 5":
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    return {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, "image_token_id": 262,
            "video_token_id": 263, "vision_start_token_id": 259, "vision_end_token_id": 260}


def qwen2_5_vl_config(tied: bool = True, spelling: str = "published") -> dict:
    """Published: the language model's fields at the top. Windows are 2 x 2 merged cells; the tower ends with a full
    layer, or, untied, with one of windows."""
    text = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 80, "vocab_size": 272, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
            "max_position_embeddings": 4096, "use_sliding_window": False, "tie_word_embeddings": tied}
    vision = {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 56, "hidden_act": "silu",
              "out_hidden_size": 48, "in_chans": 3, "patch_size": 4, "spatial_patch_size": 4, "temporal_patch_size": 2,
              "spatial_merge_size": 2, "window_size": 16, "tokens_per_second": 2,
              "fullatt_block_indexes": [1, 3] if tied else [0, 2]}
    top = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": 262,
           "video_token_id": 263, "vision_start_token_id": 259, "vision_end_token_id": 260}
    if spelling == "published":
        return {**text, **top, "vision_config": vision}
    if spelling == "transformers 4":                                    # as its last versions saved the model again
        text["rope_scaling"] = {**text["rope_scaling"], "type": "default", "rope_type": "default"}
        return {**text, **top, "text_config": {"model_type": "qwen2_5_vl_text", **text},
                "vision_config": {"model_type": "qwen2_5_vl", "in_channels": 3, **vision}}
    vision["in_channels"] = vision.pop("in_chans")
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default",
                               "mrope_section": text.pop("rope_scaling")["mrope_section"]}
    return {**top, "text_config": {"model_type": "qwen2_5_vl_text", **text}, "tie_word_embeddings": tied,
            "vision_config": {"model_type": "qwen2_5_vl_vision", **vision}}


def mllama_config(tied: bool = False, spelling: str = "published") -> dict:
    """Two cross-attention layers among five; tiles of 7 x 7 patches, which 6 tokens of padding round up to 56."""
    text = {"model_type": "mllama_text_model", "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 268, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "cross_attention_layers": [1, 3], "max_position_embeddings": 4096,
            "rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            "tie_word_embeddings": tied, "bos_token_id": 256, "eos_token_id": [257, 262], "pad_token_id": 258}
    vision = {"model_type": "mllama_vision_model", "hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 4,
              "num_global_layers": 2, "intermediate_size": 56, "hidden_act": "gelu", "norm_eps": 1e-5, "image_size": 28,
              "patch_size": 4, "num_channels": 3, "max_num_tiles": 4, "vision_output_dim": 96,
              "intermediate_layers_indices": [1, 3],
              "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]}
    if spelling == "transformers 5":
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}
    return {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "text_config": text,
            "vision_config": vision, "image_token_index": 268}


CONFIGS = {"qwen3_vl": qwen3_vl_config, "qwen2_5_vl": qwen2_5_vl_config, "mllama": mllama_config}


def preprocessor_config(family: str) -> dict:
    """preprocessor_config.json in each family's own spelling."""
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
              "rescale_factor": 1 / 255}
    if family == "mllama":
        return {**common, **CLIP, "image_processor_type": "MllamaImageProcessor", "size": {"height": 28, "width": 28},
                "max_image_tiles": 4, "resample": 2, "do_pad": True}
    common.update({"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2,
                   "temporal_patch_size": 2, "resample": 3})
    if family == "qwen2_5_vl":
        return {**common, **CLIP, "min_pixels": 256, "max_pixels": 4096}
    return {**common, "size": {"shortest_edge": 256, "longest_edge": 4096}, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3}


def random_weights(shapes: dict[str, torch.Size], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size that keeps activations near 1, and larger ones before a GELU, whose two forms differ little;
    from a generator whose stream never changes."""
    generator = np.random.RandomState(seed)
    weights = {}
    for name, shape in shapes.items():
        random = torch.from_numpy(generator.standard_normal(tuple(shape)).astype(np.float32))
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = random * weight_scale(name, shape) + (1.0 if is_norm else 0.0)
    return weights


def weight_scale(name: str, shape: torch.Size) -> float:
    """The standard deviation of a random weight."""
    if len(shape) == 1 or "positional" in name:
        return 0.5
    before_gelu = "fc1" in name or "merger.mlp.0" in name
    scale = 2.0 if before_gelu else 0.5
    return scale / shape[-1] ** 0.5


def write_checkpoint(folder: Path, config: dict, seed: int = 0, layout: str = "published", shards: int = 1) -> Path:
    """A folder that load_vlm and transformers open. `layout`: the key names, "published" or "transformers 5"."""
    from model import FAMILIES
    from model.settings import read_settings
    family = config["model_type"]
    folder.mkdir(parents=True, exist_ok=True)
    if family == "mllama":
        generation = {"eos_token_id": [257, 262], "pad_token_id": 258, "bos_token_id": 256}
        special = LLAMA_SPECIAL
    else:
        generation = {"eos_token_id": [258, 256], "pad_token_id": 256}
        special = SPECIAL
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(family)))
    byte_tokenizer(special).save(str(folder / "tokenizer.json"))

    settings = read_settings(folder, "config.json")
    with torch.device("meta"):
        vlm = FAMILIES[family](settings)
    shapes = {name: parameter.shape for name, parameter in vlm.named_parameters()}
    weights = random_weights(shapes, seed)
    if layout == "published":
        weights = {disk_name(family, name): weight for name, weight in weights.items()}
    write_shards(folder, weights, shards)
    return folder


def disk_name(family: str, name: str) -> str:
    """The published name of a parameter."""
    for pattern, replacement in PUBLISHED[family]:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            return renamed
    return name


def write_shards(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    """model.safetensors, or that many shards with their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        shard = dict(list(weights.items())[i::shards])
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels."""
    generator = np.random.RandomState(seed)
    return Image.fromarray(generator.randint(0, 256, (height, width, 3), np.uint8))


def chat(*parts: str | Image.Image) -> list[dict]:
    """One user turn of texts and pictures."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image"
        content.append({"type": kind, kind: part})
    return [{"role": "user", "content": content}]


def example_chats() -> list[list[dict]]:
    """Chats of different lengths: no picture, one, neighbouring ones, ones with text between, odd and thin grids."""
    return [
        chat("hello"),
        chat(picture(30, 40), "what is this?"),
        chat("a", picture(16, 64, 1), "b", picture(50, 20, 2), "c"),
        chat(picture(70, 24, 3), picture(24, 24, 4), "which of the two, and why?"),
    ]


def load_like_transformers(folder: Path, dtype: torch.dtype | None = torch.float32) -> Any:
    """Our model of the folder; Mllama treats the tokens before the first picture as transformers does."""
    from model import load_vlm
    from model.mllama import Mllama
    vlm = load_vlm(folder, dtype=dtype)
    if isinstance(vlm, Mllama):
        vlm.follow = "transformers"
    return vlm


def load_reference(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """transformers' model of the folder; Mllama's features set to layer inputs, with which the weights were trained."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mllama":
        depths = config.vision_config.intermediate_layers_indices
        config.vision_config.intermediate_layers_indices = [depth - 1 for depth in depths]
    reference = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
    )
    return reference.eval()


def follow_meta(reference: Any) -> Any:
    """Change transformers' Mllama as the weights were trained: a token that sees no picture gets no cross-attention."""
    for layer in reference.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            drop_attention_of_blind_tokens(layer)
    return reference


def drop_attention_of_blind_tokens(layer: Any) -> None:
    """Multiply what a cross-attention layer's attention gives by 0 for tokens that see no picture."""
    sees_any: dict[str, Tensor] = {}

    def remember_mask(_: Any, args: tuple, options: dict) -> None:
        sees_any["mask"] = options["full_text_row_masked_out_mask"]

    def apply_mask(_: Any, args: tuple, outputs: tuple) -> tuple:
        attended, *others = outputs
        return (attended * sees_any["mask"][:, 0], *others)

    layer.register_forward_pre_hook(remember_mask, with_kwargs=True)
    layer.cross_attn.register_forward_hook(apply_mask)


def reference_inputs(vlm: Any, batch: Any) -> dict[str, Tensor]:
    """The keyword arguments with which transformers' model takes `batch`."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    is_mllama = hasattr(batch, "sees")
    if is_mllama:
        of_pictures = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    else:
        of_pictures = ("pixel_values", "image_grid_thw")
        inputs["mm_token_type_ids"] = (batch.input_ids == vlm.image_token_id).long()
    if batch.pictures:
        for name in of_pictures:
            inputs[name] = getattr(batch, name)
    return inputs


def reference_greedy(vlm: Any, reference: Any, messages: list[dict], tokens: int) -> list[int]:
    """transformers' greedy continuation of one chat, without ids that ours never samples."""
    from model.samples import banned_tokens
    inputs = reference_inputs(vlm, vlm.processor([messages]))
    banned = [[token] for token in banned_tokens(vlm).tolist()]
    output = reference.generate(**inputs, max_new_tokens=tokens, do_sample=False, bad_words_ids=banned)
    prompt_length = inputs["input_ids"].shape[1]
    return output[0, prompt_length:].tolist()
