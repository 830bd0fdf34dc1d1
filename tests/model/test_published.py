"""The six published configurations: parameter counts on the meta device, and one layer of each at its true widths
against transformers, in fp32 and in bf16 (`-m true_shapes` selects these, `-m "not true_shapes"` leaves them out)."""
from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden.make import PREPROCESSING
from model import FAMILIES
from model.settings import read_settings
from model.vlm import VLM
from published import CONFIGS, PARAMETERS, TENSORS
from tiny import (
    LLAMA_SPECIAL,
    SPECIAL,
    byte_tokenizer,
    chat,
    load_like_transformers,
    load_reference,
    picture,
    reference_inputs,
)

FP32_TOLERANCE = 1e-4                                   # largest difference over largest logit
BF16_RATIO = 1.5                                        # our error in bf16 over transformers' own


def on_meta(folder: Path, config: dict) -> VLM:
    """The model of a configuration, without memory."""
    (folder / "config.json").write_text(json.dumps(config))
    settings = read_settings(folder, "config.json")
    with torch.device("meta"):
        return FAMILIES[config["model_type"]](settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name: str, tmp_path: Path) -> None:
    parameters = list(on_meta(tmp_path, CONFIGS[name]).parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS[name]
    assert len(parameters) == TENSORS[name]


def one_layer(config: dict) -> dict:
    """The configuration with one layer of each kind, a small vocabulary, and for Mllama small tiles."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    vision = config["vision_config"]
    text.update(num_hidden_layers=1, vocab_size=272)
    if config["model_type"] == "mllama":
        config["image_token_index"] = 272
        text.update(num_hidden_layers=2, cross_attention_layers=[1], bos_token_id=256, eos_token_id=262,
                    pad_token_id=258)
        vision.update(num_hidden_layers=2, num_global_layers=1, image_size=140, vision_output_dim=2560,
                      intermediate_layers_indices=[1])
        return config
    config.update(image_token_id=262, video_token_id=263, vision_start_token_id=259, vision_end_token_id=260)
    if config["model_type"] == "qwen3_vl":
        vision.update(depth=1, deepstack_visual_indexes=[0])
    else:
        vision.update(depth=2, fullatt_block_indexes=[1])                   # one layer with windows, one without
    return config


def write_one_layer(folder: Path, config: dict) -> Path:
    """A checkpoint in bf16 with weights of the size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(4_194_301, generator=generator)      # a prime number of them, so that no row of a matrix repeats
    weights = {}
    for name, parameter in on_meta(folder, config).named_parameters():
        weights[name] = weight_from_pool(name, parameter.shape, pool)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    family = config["model_type"]
    preprocessing = dict(PREPROCESSING[family])
    special = SPECIAL
    if family == "mllama":
        preprocessing["size"] = {"height": 140, "width": 140}
        special = LLAMA_SPECIAL
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    byte_tokenizer(special).save(str(folder / "tokenizer.json"))
    return folder


def weight_from_pool(name: str, shape: torch.Size, pool: Tensor) -> Tensor:
    """A random bf16 tensor, its numbers those of `pool`, scaled and repeated as often as it takes."""
    if len(shape) == 1 or "positional" in name:
        scale = 0.2
    else:
        scale = shape[-1] ** -0.5
    repeats = math.ceil(shape.numel() / len(pool))
    random = (pool * scale).bfloat16().repeat(repeats)
    random = random[:shape.numel()].view(shape)
    is_norm = "norm" in name and name.endswith("weight")
    return random + 1 if is_norm else random


@torch.no_grad()
def outputs(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Our logits and transformers' for one chat, in fp32 whatever was computed in; never two models at once."""
    vlm = load_like_transformers(folder, dtype)
    batch = vlm.processor([chat("see", picture(250, 170), "what?")])
    ours = vlm(batch).float()
    inputs = reference_inputs(vlm, batch)
    del vlm
    reference = load_reference(folder, dtype)
    return ours, reference(**inputs).logits.float()


def root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def relative_error(logits: Tensor, truth: Tensor) -> float:
    """Root mean square difference over the root mean square of the truth."""
    difference = root_mean_square(logits - truth)
    return float(difference / root_mean_square(truth))


@pytest.mark.true_shapes
@pytest.mark.parametrize("name", CONFIGS)
def test_one_layer_at_its_true_shapes(name: str, tmp_path: Path) -> None:
    """fp32 agrees; bf16 is at most 1.5 times as far from fp32 as transformers' own bf16."""
    pytest.importorskip("transformers")
    folder = write_one_layer(tmp_path, one_layer(CONFIGS[name]))
    ours, truth = outputs(folder, torch.float32)
    largest_difference = (ours - truth).abs().max()
    assert largest_difference <= FP32_TOLERANCE * truth.abs().max()

    half, reference_half = outputs(folder, torch.bfloat16)
    (folder / "model.safetensors").unlink()             # gigabytes, which pytest would keep
    fp32_error = relative_error(ours, truth)
    bf16_error = relative_error(half, truth)
    reference_error = relative_error(reference_half, truth)
    print(f"{name}: fp32 {fp32_error:.1e}, bf16 {bf16_error:.2e} against {reference_error:.2e}")
    assert 0 < bf16_error <= BF16_RATIO * reference_error
