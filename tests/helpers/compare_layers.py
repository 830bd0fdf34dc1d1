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

from model import VLM
from model.batch import Batch
from model.images import Picture
from model.mllama import Mllama
from model.processor import Chat
from model.qwen2_5_vl import Qwen25VL
from tiny import chat, load_like_transformers, load_reference, picture, reference_inputs

# Modules that get a line of their own in the output.
LAYER = re.compile(r"\.((blocks|layers|deepstack_merger_list)\.\d+|embed_tokens|merger|multi_modal_projector"
                   r"|patch_embed|language_model\.norm)$|^logits$")
# Modules whose outputs hold the tokens in an order of the tower's own.
MLLAMA_TOWER = re.compile(r"model\.vision_model\.(transformer|global_transformer|layernorm_post)")
QWEN25_TOWER = re.compile(r"model\.visual\.(blocks\.(?P<block>\d+)|merger)")
Reorder = Callable[[str, Tensor], Tensor]               # (module's name, its output) -> the output in natural order


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the output of every module inside, by name, in the order in which they finish."""
    outputs: dict[str, Tensor] = {}

    def make_hook(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                outputs[name] = first.detach().float()

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:                                        # the model itself has none
            handles.append(module.register_forward_hook(make_hook(name)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def natural_order(vlm: VLM, batch: Batch) -> tuple[Reorder, Reorder]:
    """Two functions that put our, and transformers', outputs of the tower's layers into the order of the patches."""
    picture_shown = batch.pictures[0]
    if isinstance(vlm, Mllama):
        return mllama_order(vlm.model["vision_model"], picture_shown), unchanged
    if isinstance(vlm, Qwen25VL):
        return qwen25_orders(vlm.tower, picture_shown)
    return unchanged, unchanged


def unchanged(name: str, x: Tensor) -> Tensor:
    return x


def mllama_order(tower: nn.Module, picture_shown: Picture) -> Reorder:
    """Ours of Mllama: tokens in use come first. transformers keeps them tile after tile."""
    _, rows, columns = picture_shown.grid
    order, _ = tower.token_order(len(picture_shown.pixels), rows * columns, torch.device("cpu"))
    back = order.argsort()

    def reorder(name: str, x: Tensor) -> Tensor:
        return x[:, back] if MLLAMA_TOWER.match(name) else x

    return reorder


def qwen25_orders(tower: nn.Module, picture_shown: Picture) -> tuple[Reorder, Reorder]:
    """Qwen2.5-VL: ours lie window after window in the layers with windows, transformers' in all layers and the merger.

    Ours has the smallest windows first, transformers has them in raster order.
    """
    grids = [picture_shown.grid]
    order, _ = tower.window_order(grids, torch.device("cpu"))
    our_back = order.argsort()                                              # of patches

    window, _ = tower.windows(grids)
    their_cells = window.argsort(stable=True)
    cells_back = their_cells.argsort()
    area = tower.merge ** 2
    their_patches = their_cells[:, None] * area + torch.arange(area)
    patches_back = their_patches.flatten().argsort()

    def reorder_ours(name: str, x: Tensor) -> Tensor:
        match = QWEN25_TOWER.match(name)
        if not match or not match["block"]:
            return x
        in_windows = int(match["block"]) not in tower.full
        return x[our_back] if in_windows else x

    def reorder_theirs(name: str, x: Tensor) -> Tensor:
        if not QWEN25_TOWER.match(name):
            return x
        if len(x) == len(patches_back):
            return x[patches_back]
        return x[cells_back]                                                # the merger's output

    return reorder_ours, reorder_theirs


@torch.no_grad()
def compare(vlm: VLM, reference: nn.Module, messages: Chat) -> dict[str, float]:
    """The relative difference of every module that both models ran, in the order of ours. `messages`: one picture."""
    batch = vlm.processor([messages])
    with recorded(vlm) as ours:
        our_logits = vlm(batch).float()
    with recorded(reference) as theirs:
        their_logits = reference(**reference_inputs(vlm, batch)).logits.float()
    ours["logits"] = our_logits
    theirs["logits"] = their_logits

    reorder_ours, reorder_theirs = natural_order(vlm, batch)
    differences = {}
    for name, our_output in ours.items():
        their_output = theirs.get(name)
        if their_output is None or their_output.numel() != our_output.numel():
            continue
        our_output = reorder_ours(name, our_output)
        their_output = reorder_theirs(name, their_output)
        if our_output.dim() == 4 and our_output.shape != their_output.shape:        # heads before tokens, or after
            their_output = their_output.transpose(1, 2)
        our_rows = our_output.reshape(-1, our_output.shape[-1])
        their_rows = their_output.reshape(-1, their_output.shape[-1])
        if our_rows.shape == their_rows.shape:
            differences[name] = relative_difference(our_rows, their_rows)
    return differences


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    largest_difference = (ours - theirs).abs().max()
    largest_value = theirs.abs().max().clamp(min=1e-30)
    return float(largest_difference / largest_value)


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
        image = Image.open(options.image) if options.image else picture(250, 170)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    reference = load_reference(options.folder, dtype)
    differences = compare(vlm, reference, chat(image, options.prompt))
    for name, difference in differences.items():
        if LAYER.search(name):
            print(f"{difference:9.2e}  {name}")
    for name, difference in differences.items():
        if not difference <= options.tolerance:         # NaN is a difference too
            print(f"The two part at {name}: {difference:.2e} is more than {options.tolerance:g}.")
            return 1
    print(f"All {len(differences)} modules agree within {options.tolerance:g}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
