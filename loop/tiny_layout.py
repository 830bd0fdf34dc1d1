"""A new tiny model in the published Qwen3-VL layout: random weights, a tokenizer, and the settings beside them."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from model import FAMILIES
from model.checkpoint import add_chat_template
from model.settings import read_settings
from model.vlm import VLM
from tasks.shapes import QUESTIONS
from verifier import COMPARISON

# Qwen's control tokens in the order of their published ids; here they follow the small vocabulary.
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# How Qwen cuts text before byte-pair merging: contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def new_model(folder: Path, seed: int, tokenizer: Tokenizer) -> VLM:
    """A model with random weights; the settings files that stand beside them are written to `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in settings(tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = read_settings(folder, "config.json")
    add_chat_template(folder, config["model_type"])

    torch.manual_seed(seed)
    vlm = FAMILIES[config["model_type"]](config)
    torch.nn.init.normal_(vlm.decoder.embed_tokens.weight, std=0.05)
    torch.nn.init.normal_(vlm.tower.pos_embed.weight, std=0.5)              # smaller delays the tasks about places
    vlm.folder = folder
    vlm.processor = vlm.make_processor(folder, config)
    vlm.disk_names = {name: name for name, _ in vlm.named_parameters()}
    return vlm


def make_tokenizer(texts: Sequence[str], reply: str) -> Tokenizer:
    """Byte-level BPE, cut as Qwen cuts, over prompts' `texts` and one `reply`, with Qwen's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()

    corpus = [*texts, *QUESTIONS.values(), "user\n", "assistant\n", "system\n", "\n", reply]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus * 2, trainer)                      # a merge needs two sightings
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def judge_tokenizer(reply: str) -> Tokenizer:
    """The same over the judge's texts, with one `reply` of its. Each fixed piece of the comparison prompt is one token:
    training then takes seconds, not minutes."""
    tokenizer = make_tokenizer((), reply)
    pieces = re.split(r"\{\w+\}", COMPARISON)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer


def settings(tokenizer: Tokenizer) -> dict[str, dict]:
    """The files beside the weights, by name."""
    ids = {token: tokenizer.token_to_id(token) for token in CONTROL}
    end_of_text = ids["<|endoftext|>"]
    end_of_turn = ids["<|im_end|>"]
    return {
        "config.json": model_config(tokenizer.get_vocab_size(), ids),
        "preprocessor_config.json": preprocessor_config(),
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "pad_token_id": end_of_text,
            "eos_token_id": [end_of_turn, end_of_text],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
        },
    }


def model_config(vocabulary: int, ids: dict[str, int]) -> dict:
    """config.json of a tiny Qwen3-VL; `ids` are those of CONTROL."""
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": math.ceil(vocabulary / 64) * 64,                      # published heads are padded, too
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": 64,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0],
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def preprocessor_config() -> dict:
    """preprocessor_config.json: pictures of 32 x 32 stay as they are."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 16384},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
