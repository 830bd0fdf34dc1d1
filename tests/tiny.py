"""Small random checkpoints in the published layout, made in a second: what the model tests open."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and Qwen's control tokens at 256 and on."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def qwen3_vl_config(tied: bool = True) -> dict:
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
    return {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, "image_token_id": 262,
            "video_token_id": 263, "vision_start_token_id": 259, "vision_end_token_id": 260}


def write_checkpoint(folder: Path, config: dict, seed: int = 0) -> Path:
    """A folder that load_vlm and transformers open: random weights under the names the model itself expects."""
    from model import FAMILIES
    from model.checkpoint import read_settings
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "pad_token_id": 256}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 4096}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 3, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "rescale_factor": 1 / 255}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        names = {n: p.shape for n, p in FAMILIES[config["model_type"]](read_settings(folder, "config.json")
                                                                       ).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(s, generator=generator) * (0.5 if len(s) == 1 else 0.5 / s[-1] ** 0.5) + (
        1.0 if "norm" in n and n.endswith("weight") else 0.0) for n, s in names.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def chat(*parts: str | Image.Image) -> list[dict]:
    """One user turn of texts and pictures."""
    return [{"role": "user", "content": [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]}]
