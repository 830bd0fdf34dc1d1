"""Faster matrix products on a CPU while tokens are sampled: oneDNN's, in fp32 too.

A sampled token multiplies every weight of the decoder by few rows, so that reading the weights is most of the work.
Below fp32 PyTorch asks oneDNN by itself. In fp32 it asks MKL, which takes twice the time for so few rows (measured on
an AMD EPYC). oneDNN reads a weight fastest from a copy in a layout of its own: packing it pays if many tokens follow.

The operators are private to PyTorch (torch.ops.mkldnn); no other file calls them. Their sums run in another order than
F.linear's, so this is not for training, nor for what is compared with it.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from .layers import Linear, linear
from .vlm import VLM

MIN_ENTRIES = 100_000                                   # of a weight: oneDNN is faster from there on
MIN_TOKENS_TO_PACK = 64                                 # to be sampled: packing a weight saves more time than it takes


@contextmanager
def onednn_products(vlm: VLM, tokens: int) -> Iterator[None]:
    """Inside, the language model's large fp32 weights are multiplied by oneDNN, to sample that many tokens.

    The decoder's linear layers and the model itself, for the head, get a `product` of their own, and lose it however
    the block is left. The weights must not change meanwhile: what is packed is a copy.
    """
    layers = [module for module in vlm.decoder.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            set_product(layer, layer.weight, tokens)
        set_product(vlm, vlm.head_weight, tokens)
        yield
    finally:
        for owner in (*layers, vlm):
            vars(owner).pop("product", None)            # the class's own is seen again


def set_product(owner: Linear | VLM, weight: Tensor, tokens: int) -> None:
    """Let `owner` multiply by `weight` with oneDNN, if that is faster."""
    packed = pack(weight.data, tokens)
    if packed is not None:
        owner.product = partial(onednn_linear, packed)


def pack(weight: Tensor, tokens: int) -> Tensor | None:
    """The weight for oneDNN, in its layout or as it is; None if it is better left to PyTorch's own choice."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < MIN_ENTRIES:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    if tokens < MIN_TOKENS_TO_PACK:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def onednn_linear(packed: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, `packed` being W as oneDNN is to read it. For an x of another dtype: linear(x, W, b)."""
    if packed.dtype != x.dtype:
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
