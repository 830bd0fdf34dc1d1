"""Where do our activations and transformers' part? For whoever ports or changes a family.

    python tests/helpers/compare_layers.py FOLDER [--image FILE] [--prompt TEXT] [--dtype float32] [--tolerance 1e-4]

Runs one chat with a picture through both models, in FOLDER's weights, and compares the output of every module that both
have under one name, in the order of the forward pass. Prints a line a layer, and the first module that differs by more
than the tolerance (largest difference over largest value). Exit status 0 if none does, 1 otherwise.

The towers of Qwen2.5-VL and Mllama hold their tokens in an order of their own; it is undone before comparing.
"""
from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import VLM  # noqa: E402
from model.processor import Batch, Chat  # noqa: E402
from tiny import chat, load_like_transformers, load_reference, picture, reference_inputs  # noqa: E402

LAYER = re.compile(r"\.((blocks|layers|deepstack_merger_list)\.\d+|embed_tokens|merger|multi_modal_projector"
                   r"|patch_embed|language_model\.norm)$|^logits$")
MLLAMA_TOWER = re.compile(r"model\.vision_model\.(transformer|global_transformer|layernorm_post)")
WINDOWED = re.compile(r"model\.visual\.(blocks\.(?P<block>\d+)|merger)")



@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the output of every module inside, by name, in the order in which they finish."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                outputs[name] = first.detach().float()
        return hook
    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def natural_order(vlm: VLM, batch: Batch) -> tuple[Callable[[str, Tensor], Tensor], Callable[[str, Tensor], Tensor]]:
    """Two functions that put our, and transformers', outputs of the tower's layers into the order of the patches."""
    tower, grid = next(vlm.tower.children()) if hasattr(batch, "sees") else vlm.tower, batch.pictures[0].grid
    if hasattr(tower, "token_order"):                                               # Mllama: tokens in use first
        tiles, used = len(batch.pictures[0].pixels), grid[1] * grid[2]
        back = tower.token_order(tiles, used, torch.device("cpu"))[0].argsort()
        return lambda name, x: x[:, back] if MLLAMA_TOWER.match(name) else x, lambda name, x: x
    if hasattr(tower, "window_order"):                                              # Qwen2.5-VL: window after window
        area = tower.merge ** 2
        ours = tower.window_order([grid], torch.device("cpu"))[0].argsort()
        cells = tower.windows([grid])[0].argsort(stable=True)
        theirs = (cells[:, None] * area + torch.arange(area)).flatten().argsort()

        def unwind(name: str, x: Tensor) -> Tensor:
            match = WINDOWED.match(name)
            return x[ours] if match and match["block"] and int(match["block"]) not in tower.full else x

        def unwind_theirs(name: str, x: Tensor) -> Tensor:                          # windows throughout, merger too
            return x[theirs if len(x) == len(theirs) else cells.argsort()] if WINDOWED.match(name) else x
        return unwind, unwind_theirs
    return lambda name, x: x, lambda name, x: x


@torch.no_grad()
def compare(vlm: VLM, reference: nn.Module, messages: Chat) -> dict[str, float]:
    """The relative difference of every module that both models ran, in the order of ours. `messages`: one picture."""
    batch = vlm.processor([messages])
    with recorded(vlm) as ours:
        logits = vlm(batch).float()
    with recorded(reference) as theirs:
        theirs["logits"] = reference(**reference_inputs(vlm, batch)).logits.float()
    ours["logits"] = logits
    order, their_order = natural_order(vlm, batch)
    differences = {}
    for name, mine in ours.items():
        other = theirs.get(name)
        if other is None or other.numel() != mine.numel():
            continue
        mine, other = order(name, mine), their_order(name, other)
        if mine.dim() == 4 and mine.shape != other.shape:                           # heads before tokens, or after
            other = other.transpose(1, 2)
        mine, other = mine.reshape(-1, mine.shape[-1]), other.reshape(-1, other.shape[-1])
        if mine.shape == other.shape:
            differences[name] = float((mine - other).abs().max() / other.abs().max().clamp(min=1e-30))
    return differences


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model in the published layout")
    parser.add_argument("--image", type=Path, help="a picture; noise without it")
    parser.add_argument("--prompt", default="What is shown?", help="the question about it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference over largest value")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is needed to compare with: pip install transformers")
    dtype = getattr(torch, options.dtype)
    try:
        vlm = load_like_transformers(options.folder, dtype)
        shown = Image.open(options.image) if options.image else picture(250, 170)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    differences = compare(vlm, load_reference(options.folder, dtype), chat(shown, options.prompt))
    for name, difference in differences.items():
        if LAYER.search(name):
            print(f"{difference:9.2e}  {name}")
    parted = next((name for name, difference in differences.items() if not difference <= options.tolerance), None)
    if parted is None:
        print(f"All {len(differences)} modules agree within {options.tolerance:g}.")
        return 0
    print(f"The two part at {parted}: {differences[parted]:.2e} is more than {options.tolerance:g}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
