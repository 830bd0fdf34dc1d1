"""Makes the golden files beside this script, which needs transformers: `python tests/helpers/golden/make.py`.

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))            # tests/helpers
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))            # the repository

from model import load_vlm
from tiny import (
    CLIP,
    CONFIGS,
    example_chats,
    follow_meta,
    load_reference,
    reference_greedy,
    reference_inputs,
    write_checkpoint,
)

GOLDEN = Path(__file__).resolve().parent                # where the golden files are
COLUMNS = [0, 50, 120, 255]                             # of the vocabulary, whose logits are kept
TOKENS = 6                                              # of a greedy continuation
# The fields of the published preprocessor_config.json files that the preprocessing depends on.
PREPROCESSING = {
    "qwen3_vl": {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "qwen2_5_vl": {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "resample": 3,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        **CLIP,
    },
    "mllama": {
        "size": {"height": 560, "width": 560},
        "max_image_tiles": 4,
        "resample": 2,
        **CLIP,
    },
}
SIZES = [(1, 1), (3, 2), (90, 60), (321, 323), (900, 10), (10, 900), (561, 561), (300, 900), (640, 480), (100, 1000)]


def sample_pictures() -> dict[str, Image.Image]:
    """Sizes and modes that preprocessing may stumble over."""
    random = np.random.RandomState(0)

    def noise(width: int, height: int, channels: int = 3) -> Image.Image:
        return Image.fromarray(random.randint(0, 256, (height, width, channels), np.uint8))

    pictures = {}
    for width, height in SIZES:
        pictures[f"{width}x{height}"] = noise(width, height)

    rgb = noise(90, 70)
    rgba = noise(90, 70, channels=4)
    for mode in ("L", "1", "P", "CMYK", "YCbCr"):
        pictures[mode] = rgb.convert(mode)
    for mode in ("RGBA", "LA", "PA"):
        pictures[mode] = rgba.convert(mode)

    transparent_palette = rgb.convert("P")
    transparent_palette.info["transparency"] = 3
    pictures["P with a transparent colour"] = transparent_palette
    transparent_rgb = rgb.copy()
    transparent_rgb.info["transparency"] = tuple(rgb.getpixel((4, 4)))
    pictures["RGB with a transparent colour"] = transparent_rgb
    return pictures


def digest(pixels: torch.Tensor) -> str:
    """Of the shape and the fp32 bits."""
    shape = repr(tuple(pixels.shape)).encode()
    return hashlib.sha256(shape + pixels.numpy().tobytes()).hexdigest()[:16]


def reference_pixels(family: str, image: Image.Image) -> torch.Tensor:
    """What transformers' PIL image processor makes of one picture."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    if family == "mllama":
        processor = MllamaImageProcessorPil(**PREPROCESSING[family])
        return processor(images=[image], return_tensors="pt")["pixel_values"][0, 0]
    processor = Qwen2VLImageProcessorPil(**PREPROCESSING[family])
    return processor(images=[image], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def make_logits(name: str, config: dict, work: Path) -> None:
    """Write NAME.safetensors from a tiny checkpoint of that configuration."""
    folder = write_checkpoint(work / name, config)
    vlm = load_vlm(folder)                              # for its processor
    reference = load_reference(folder, attention="eager")
    if name == "mllama":
        follow_meta(reference)

    logits = {}
    greedy = []
    for i, messages in enumerate(example_chats()):
        inputs = reference_inputs(vlm, vlm.processor([messages]))
        chat_logits = reference(**inputs).logits[0]                                       # (T, V)
        logits[str(i)] = chat_logits[:, COLUMNS].contiguous()
        greedy.append(reference_greedy(vlm, reference, messages, TOKENS))
    save_file(logits, GOLDEN / f"{name}.safetensors", metadata={"greedy": json.dumps(greedy)})


def main() -> None:
    configs = {
        "qwen3_vl": CONFIGS["qwen3_vl"](),
        "qwen2_5_vl": CONFIGS["qwen2_5_vl"](),
        "mllama": CONFIGS["mllama"](),
        "mllama-transformers": CONFIGS["mllama"](spelling="transformers 5"),
    }
    with tempfile.TemporaryDirectory() as work:
        for name, config in configs.items():
            make_logits(name, config, Path(work))

    pixels = {}
    for family in PREPROCESSING:
        pixels[family] = {}
        for name, image in sample_pictures().items():
            pixels[family][name] = digest(reference_pixels(family, image))
    (GOLDEN / "pixels.json").write_text(json.dumps(pixels, indent=1) + "\n")


if __name__ == "__main__":
    main()
