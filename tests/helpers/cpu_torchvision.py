"""A torchvision that was built for CUDA, importable beside a CPU's torch: transformers' processors need it.

It looks for two operators that a CPU torch lacks; declaring them, without code, is enough. Its PNG decoder needs
libraries of CUDA, too: Pillow stands in for it.
"""
from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image


def import_torchvision() -> Any:
    """Import it, before transformers is; what is returned must be kept alive: the library that declares its operators.

    ModuleNotFoundError where it is not installed.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.io
    try:
        torchvision.io.decode_image(encoded(Image.new("RGB", (1, 1))))
    except RuntimeError:
        torchvision.io.decode_image = decode_image
    return library


def encoded(image: Image.Image) -> torch.Tensor:
    """A picture as PNG, in the bytes of a tensor."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def decode_image(data: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What torchvision.io.decode_image does of PNG: (3, height, width), uint8."""
    pixels = np.array(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
