"""`transformers serve ...` in this process, with a torchvision that was built for CUDA on a CPU's torch.

    python tests/helpers/serve_transformers.py FOLDER --device cpu --port 8000

transformers' fast processors need torchvision. One built for CUDA looks for two operators that a CPU torch lacks:
declaring them, without code, makes it importable (as tests/bench/bench_peers.py does). Its PNG decoder needs libraries
of CUDA, too: Pillow stands in for it.
"""
from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image


def import_torchvision() -> Any:
    """torchvision, importable on any torch; kept alive: the library that declares its operators."""
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


if __name__ == "__main__":
    kept = import_torchvision()
    from transformers.cli.transformers import main
    sys.argv[1:1] = ["serve"]
    main()
