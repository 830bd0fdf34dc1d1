"""Faster matrix products on a CPU while tokens are sampled: oneDNN's, in fp32 too.

A sampled token multiplies every weight of the decoder by few rows, so that reading the weights is most of the work.
Below fp32 PyTorch asks oneDNN by itself. In fp32 it asks MKL, which takes twice the time for so few rows (measured on
an AMD EPYC). oneDNN reads a weight fastest from a copy in a layout of its own. Packing, the making of that copy, takes
the time of some dozens of decode steps, and as much memory as the weight:

    a model that is trained     is packed in each call that decodes long enough, and let go when the call ends
    a frozen model              is packed once; the copies are held until its weights change (or `forget_packed`)

Whether a weight is packed makes no difference to the results, to the last bit.

The operators are private to PyTorch (torch.ops.mkldnn); no other file calls them. Their sums run in another order than
F.linear's, so this is not for training, nor for what is compared with it.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .layers import Linear, linear
from .vlm import VLM

MIN_ENTRIES = 100_000                                   # of a weight: oneDNN is faster from there on
MIN_STEPS_TO_PACK = 64                                  # decode steps: they save more time than packing takes


@dataclass
class HeldCopies:
    """What is held of a frozen model from call to call."""
    steps: int = 0                                      # decode steps that its calls have asked for so far
    sums: list[Tensor] = field(default_factory=list)    # row_sums of its large weights when they were packed
    copies: list[Tensor | None] = field(default_factory=list)           # one a weight; None: not packed


# A model that is let go takes its copies with it. They are no attribute of it, for packed tensors cannot be copied.
HELD: WeakKeyDictionary[VLM, HeldCopies] = WeakKeyDictionary()


def forget_packed(vlm: VLM) -> None:
    """Let go of the packed copies of the model's weights. They are made again when they are needed."""
    HELD.pop(vlm, None)


@contextmanager
def onednn_products(vlm: VLM, steps: int) -> Iterator[None]:
    """Inside, the language model's large fp32 weights are multiplied by oneDNN, for that many decode steps.

    The decoder's linear layers and the model itself, for the head, get a `product` of their own, and lose it however
    the block is left. The weights must not change meanwhile: what is packed is a copy.
    """
    layers = [module for module in vlm.decoder.modules() if isinstance(module, Linear)]
    owners: list[Linear | VLM] = [*layers, vlm]
    weights = [layer.weight.data for layer in layers]
    weights.append(vlm.head_weight.data)
    try:
        copies = copies_for(vlm, weights, steps)
        for owner, copy in zip(owners, copies, strict=True):
            if copy is not None:
                owner.product = partial(onednn_linear, copy)
        yield
    finally:
        for owner in owners:
            vars(owner).pop("product", None)            # the class's own is seen again


def copies_for(vlm: VLM, weights: list[Tensor], steps: int) -> list[Tensor | None]:
    """What oneDNN is to read for each of the model's `weights`, as `pack` says; of a frozen model what is held."""
    if not is_frozen(vlm):
        forget_packed(vlm)
        return [pack(weight, steps) for weight in weights]

    held = HELD.setdefault(vlm, HeldCopies())
    held.steps += steps
    if steps == 0 or held.steps < MIN_STEPS_TO_PACK:
        return [pack(weight, 0) for weight in weights]

    # Weights may change without PyTorch's noticing (`parameter.data`, a tensor of numpy's), so what they hold is
    # compared: this reads every weight once, as a decode step does.
    sums = [row_sums(weight) for weight in weights if is_large(weight)]
    if not held.copies or not all_equal(sums, held.sums):
        held.copies = []                                # before the new ones take memory too
        held.copies = [pack(weight, held.steps) for weight in weights]
        held.sums = sums
    return held.copies


def is_frozen(vlm: VLM) -> bool:
    """Whether no parameter of the language model is trained."""
    trained = [parameter for parameter in vlm.decoder.parameters() if parameter.requires_grad]
    return not trained and not vlm.head_weight.requires_grad


def row_sums(weight: Tensor) -> Tensor:
    """The sum of each row of a (out, in) weight, its bits read as integers: exact, so that any one change shows."""
    even = weight.shape[1] % 2 == 0
    integers = weight.contiguous().view(torch.int64 if even else torch.int32)
    return integers.sum(1)                              # (out,) int64, modulo 2^64


def all_equal(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether both hold the same tensors."""
    if len(tensors) != len(others):
        return False
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def is_large(weight: Tensor) -> bool:
    """Whether oneDNN is faster than PyTorch's own choice, and there."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < MIN_ENTRIES:
        return False
    return torch.backends.mkldnn.is_available()


def pack(weight: Tensor, steps: int) -> Tensor | None:
    """The weight for oneDNN, in its layout or as it is; None if it is better left to PyTorch's own choice."""
    if not is_large(weight):
        return None
    if steps < MIN_STEPS_TO_PACK:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def onednn_linear(packed: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, `packed` being W as oneDNN is to read it. For an x of another dtype: linear(x, W, b)."""
    if packed.dtype != x.dtype:
        return linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rows == 1 and not packed.is_mkldnn:
        # oneDNN adds up a single row in another order, unless the weight is packed. Of two rows it does not.
        twice = x.reshape(1, -1).expand(2, -1)                                  # (2, in)
        y = torch.ops.mkldnn._linear_pointwise(twice, packed, bias, "none", [], "")
        return y[:1].view(*x.shape[:-1], -1)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
