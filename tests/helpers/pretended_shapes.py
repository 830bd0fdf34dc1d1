"""The pretended GPU for models that no memory here would hold: fractional numbers have their shape only.

Whole numbers and truth values keep their values, since a model's control flow depends on token ids and masks. What
depends on a fractional number (which token is drawn) has a shape only, and the host cannot read it. So bytes and FLOPs
of every operator are counted at true shapes, in seconds and without a GPU.

Bytes are those of what an operator reads and writes, each once; FLOPs those of products and attention.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from pretended_cuda import FUSED
from pretended_gpu import KINDS, OnGPU, Operators, PretendedGPU, convert, tensors_in

aten = torch.ops.aten
META = torch.device("meta")
# These read no more of their first operand than they give back, and these write no more of it than they are given.
READ_A_PART = {aten.gather.default, aten.index.Tensor, aten.embedding.default, aten.index_select.default}
WRITE_A_PART = {aten.index_put_.default, aten.index_copy_.default, aten.index_fill_.int_Scalar, aten.scatter_.src}


class ShapesOnlyGPU(PretendedGPU):
    """As PretendedGPU; `seen.costs` has "bytes" and "flops"."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = ShapesOnly(self)

    def take(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put a model that was made on the meta device onto the GPU."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                on_gpu = OnGPU(torch.empty(parameter.shape, dtype=dtype, device=META))
                setattr(module, name, nn.Parameter(on_gpu))


class ShapesOnly(Operators):
    """Computes no fractional number, and counts bytes and FLOPs."""

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = list(tensors_in([*args, *kwargs.values()]))
        as_given = args, kwargs                         # lengths of sequences have their values there
        if any(x.is_meta or x.is_floating_point() for x in given):
            args = convert(args, shape_of)
            kwargs = convert(kwargs, shape_of)
            if "device" in kwargs:
                kwargs["device"] = META
            out = super().compute(func, args, kwargs)
        elif given or "device" not in kwargs:
            out = super().compute(func, args, kwargs)
        else:                                           # it makes a tensor: of which dtype?
            out = super().compute(func, args, kwargs | {"device": META})
            if not out.is_floating_point():
                out = super().compute(func, args, kwargs)

        if KINDS.get(func) != "free" and not func.is_view:
            self.gpu.seen.costs["bytes"] += moved_bytes(func, args, kwargs, out)
            self.gpu.seen.costs["flops"] += flops(func, *as_given, out)
        return out


def shape_of(x: Tensor) -> Tensor:
    """The tensor without its numbers; itself where it has none."""
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)


def moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """What an operator reads and writes."""
    outs = list(tensors_in([out]))
    if func in READ_A_PART:
        return 2 * size_of(outs)
    if func in WRITE_A_PART:
        return 2 * size_of(list(tensors_in([*args[1:], *kwargs.values()])))
    if func is aten.copy_.default:
        return 2 * size_of([args[0]])
    return size_of(list(tensors_in([*args, *kwargs.values()]))) + size_of(outs)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors; an axis along which a tensor repeats itself counts once."""
    total = 0
    for x in tensors:
        lengths = [length for length, stride in zip(x.shape, x.stride()) if stride != 0]
        total += math.prod(lengths) * x.element_size()
    return total


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of products and of attention, as torch counts them: a causal mask halves nothing."""
    if func in (FUSED.attention.default, FUSED.attention_backward.default):
        backward = func is FUSED.attention_backward.default
        q, k = args[backward:backward + 2]
        products = 5 if backward else 2                 # of (T, hd) and (hd, S), or as many operations
        return 2 * products * math.prod(q.shape) * k.shape[2]
    formula = flop_registry.get(getattr(func, "overloadpacket", None))
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0
