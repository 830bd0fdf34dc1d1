"""Makes the golden files beside this script from transformers: `python tests/helpers/golden/make.py` (needs transformers).

NAME.safetensors: for the tiny checkpoint of that name, four columns of the logits of each example chat, and, in the
metadata, the greedy continuations. pixels.json: digests of what its PIL image processors make of sample pictures.
"""
from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent
sys.path[:0] = [str(GOLDEN.parents[2]), str(GOLDEN.parent)]

from model import load_vlm  # noqa: E402
from tiny import (
    CLIP,
    CONFIGS,
    example_chats,
    follow_meta,
    load_reference,
    reference_greedy,
    reference_inputs,
    write_checkpoint,  # noqa: E402
)

COLUMNS, TOKENS = [0, 50, 120, 255], 6
PREPROCESSING = {
    "qwen3_vl": {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
                 "image_std": [0.5] * 3, "resample": 3, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
    "qwen2_5_vl": {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "resample": 3, "min_pixels": 3136,
                   "max_pixels": 12845056, **CLIP},
    "mllama": {"size": {"height": 560, "width": 560}, "max_image_tiles": 4, "resample": 2, **CLIP},
}


def sample_pictures() -> dict[str, Image.Image]:
    """Sizes and modes that preprocessing may stumble over."""
    random = np.random.RandomState(0)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        return Image.fromarray(random.randint(0, 256, (height, width, channels), np.uint8))
    found = {f"{w}x{h}": noise(w, h) for w, h in ((1, 1), (3, 2), (90, 60), (321, 323), (900, 10), (10, 900),
                                                  (561, 561), (300, 900), (640, 480), (100, 1000))}
    rgb, rgba = noise(90, 70), noise(90, 70, 4)
    found.update({mode: rgb.convert(mode) for mode in ("L", "1", "P", "CMYK", "YCbCr")})
    found.update({mode: rgba.convert(mode) for mode in ("RGBA", "LA", "PA")})
    found["P with a transparent colour"], found["RGB with a transparent colour"] = rgb.convert("P"), rgb.copy()
    found["P with a transparent colour"].info["transparency"] = 3
    found["RGB with a transparent colour"].info["transparency"] = tuple(rgb.getpixel((4, 4)))
    return found


def digest(pixels: torch.Tensor) -> str:
    """Of the shape and the fp32 bits."""
    return hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()[:16]


def reference_pixels(family: str, image: Image.Image) -> torch.Tensor:
    """What transformers' PIL image processor makes of one picture."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor = (MllamaImageProcessorPil if family == "mllama" else Qwen2VLImageProcessorPil)(**PREPROCESSING[family])
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    return pixels[0, 0] if family == "mllama" else pixels


@torch.no_grad()
def make_logits(name: str, family: str, tied: bool, follow: str, work: Path) -> None:
    """Write NAME.safetensors."""
    spelling = "transformers 5" if follow == "transformers" else "published"
    folder = write_checkpoint(work / name, CONFIGS[family](tied, spelling))
    vlm, reference = load_vlm(folder), load_reference(folder, attention="eager")
    if name == "mllama":
        follow_meta(reference)
    logits = {str(i): reference(**reference_inputs(vlm, vlm.processor([c]))).logits[0][:, COLUMNS].contiguous()
              for i, c in enumerate(example_chats())}
    greedy = [reference_greedy(vlm, reference, c, TOKENS) for c in example_chats()]
    save_file(logits, GOLDEN / f"{name}.safetensors", metadata={"greedy": json.dumps(greedy)})


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        for name, family, tied, follow in (("qwen3_vl", "qwen3_vl", True, "meta"),
                                           ("qwen2_5_vl", "qwen2_5_vl", True, "meta"),
                                           ("mllama", "mllama", False, "meta"),
                                           ("mllama-transformers", "mllama", False, "transformers")):
            make_logits(name, family, tied, follow, Path(work))
    pixels = {family: {name: digest(reference_pixels(family, image)) for name, image in sample_pictures().items()}
              for family in PREPROCESSING}
    (GOLDEN / "pixels.json").write_text(json.dumps(pixels, indent=1) + "\n")


if __name__ == "__main__":
    main()
