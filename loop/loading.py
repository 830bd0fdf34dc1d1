"""Models as the programs open them: frozen where they only answer, pictures resized within the limits of the flags."""
from __future__ import annotations

from typing import Protocol

import torch

from model import VLM, family_of
from model.checkpoint import resolve_folder
from model.fields import text_settings
from model.processor import Processor
from model.settings import read_settings
from model.vlm import FeatureCache


class AskFlags(Protocol):
    """The flags of a program that asks a model."""
    feature_cache_gb: float
    eager: bool
    min_pixels: int | None
    max_pixels: int | None


def activation_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of activations that --dtype names; without it bfloat16 on a GPU, float32 on a CPU.

    ValueError where bfloat16 is not to be had: the kernels of attention need a GPU of compute capability 8.0.
    """
    dtype: torch.dtype = getattr(torch, name) if name else torch.float32
    if device.type == "cuda":
        if not name:
            dtype = torch.bfloat16
        major, minor = torch.cuda.get_device_capability(device)
        if dtype == torch.bfloat16 and major < 8:
            raise ValueError(f"bfloat16 needs a GPU of compute capability 8.0 (A100) or later, and {device} has "
                             f"{major}.{minor}: --dtype float32")
    return dtype


def frozen(vlm: VLM, cfg: AskFlags) -> VLM:
    """The model, to be asked and not trained. It keeps the features of pictures, up to feature_cache_gb."""
    vlm.requires_grad_(False)
    vlm.eager = cfg.eager
    vlm.feature_cache = FeatureCache(int(cfg.feature_cache_gb * 1e9))
    limit_pixels(vlm.processor, cfg.min_pixels, cfg.max_pixels)
    return vlm


def limit_pixels(processor: Processor, min_pixels: int | None, max_pixels: int | None) -> None:
    """Resize pictures to areas between these limits; None (or 0) is what the model's own files say.

    ValueError where a limit cannot be kept, and for a family that does not resize to an area.
    """
    if min_pixels or max_pixels:
        processor.limit_pixels(min_pixels or None, max_pixels or None)


def processor_alone(name: str, min_pixels: int | None = None, max_pixels: int | None = None
                    ) -> tuple[Processor, int | None]:
    """The processor of a model whose weights are not read, and the model's positions, None where its files say none.

    ValueError where the model cannot keep the limits of its pictures' areas.
    """
    folder = resolve_folder(name)
    config = read_settings(folder, "config.json")
    processor = family_of(config).make_processor(folder, config)
    limit_pixels(processor, min_pixels, max_pixels)

    return processor, text_settings(config).get("max_position_embeddings")
