"""The six published configurations: parameter counts on the meta device, and one layer of each at its true widths
against transformers, in fp32 and in bf16 (`-m true_shapes` selects these, `-m "not true_shapes"` leaves them out)."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden.make import PREPROCESSING
from model import FAMILIES
from model.checkpoint import read_settings
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

FP32_TOLERANCE, BF16_RATIO = 1e-4, 1.5


def on_meta(folder: Path, config: dict) -> VLM:
    """The model of a configuration, without memory."""
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        return FAMILIES[config["model_type"]](read_settings(folder, "config.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name: str, tmp_path: Path) -> None:
    vlm = on_meta(tmp_path, CONFIGS[name])
    assert sum(p.numel() for p in vlm.parameters()) == PARAMETERS[name]
    assert len(list(vlm.parameters())) == TENSORS[name]


def one_layer(config: dict) -> dict:
    """The configuration with one layer of each kind, a small vocabulary, and for Mllama small tiles."""
    config = copy.deepcopy(config)
    text, vision = config.get("text_config", config), config["vision_config"]
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
    pool, weights = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0)), {}    # a prime: no row repeats
    for name, p in on_meta(folder, config).named_parameters():
        scale = 0.2 if p.dim() == 1 or "positional" in name else p.shape[-1] ** -0.5
        random = (pool * scale).bfloat16().repeat(-(-p.numel() // len(pool)))[:p.numel()].view(p.shape)
        weights[name] = random + 1 if "norm" in name and name.endswith("weight") else random
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    family = config["model_type"]
    preprocessing = dict(PREPROCESSING[family])
    if family == "mllama":
        preprocessing["size"] = {"height": 140, "width": 140}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    byte_tokenizer(LLAMA_SPECIAL if family == "mllama" else SPECIAL).save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
def outputs(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Our logits and transformers' for one chat, in fp32 whatever was computed in; never two models at once."""
    vlm = load_like_transformers(folder, dtype)
    batch = vlm.processor([chat("see", picture(250, 170), "what?")])
    ours, inputs = vlm(batch).float(), reference_inputs(vlm, batch)
    del vlm
    reference = load_reference(folder, dtype)
    return ours, reference(**inputs).logits.float()


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square difference over the root mean square of the truth."""
    return float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.true_shapes
@pytest.mark.parametrize("name", CONFIGS)
def test_one_layer_at_its_true_shapes(name: str, tmp_path: Path) -> None:
    """fp32 agrees; bf16 is at most 1.5 times as far from fp32 as transformers' own bf16."""
    pytest.importorskip("transformers")
    folder = write_one_layer(tmp_path, one_layer(CONFIGS[name]))
    ours, truth = outputs(folder, torch.float32)
    assert (ours - truth).abs().max() <= FP32_TOLERANCE * truth.abs().max()
    half, reference_half = outputs(folder, torch.bfloat16)
    (folder / "model.safetensors").unlink()
    measured = error(half, truth), error(reference_half, truth)
    print(f"{name}: fp32 {error(ours, truth):.1e}, bf16 {measured[0]:.2e} against {measured[1]:.2e}")
    assert 0 < measured[0] <= BF16_RATIO * measured[1]
