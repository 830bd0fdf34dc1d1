"""Products of the same input as one: q, k and v of a layer, and gate and up of its MLP.

On a GPU three small products take three times as long as one. The weights of the files stay what they are, by name,
shape and number; in memory they become views of one storage, which is read as a whole.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .layers import Linear, SelfAttention, SwiGLU, linear
from .vlm import VLM


def product(x: Tensor, joint: tuple[Tensor, Tensor | None] | None, *layers: Linear) -> Tensor:
    """What the layers make of x side by side, by one product where they have been joined: (R, sum of out)."""
    if joint is None:
        return torch.cat([layer(x) for layer in layers], -1)
    return linear(x, *joint)


@contextmanager
def joint_products(vlm: VLM, wanted: bool | None = None) -> Iterator[None]:
    """Inside, q, k and v of each layer are read as one weight, and so are gate and up (wanted None: on a GPU).

    No weight is held twice: the parameters become views of the joint storage, and stay such. Their names, shapes and
    numbers stay as they were. Layers with adapters stay apart.
    """
    if wanted is None:
        wanted = vlm.device.type == "cuda"
    owners: list[SelfAttention | SwiGLU] = []
    try:
        if wanted:
            for module in vlm.decoder.modules():
                if isinstance(module, (SelfAttention, SwiGLU)):
                    module.joint = joined(module)
                    owners.append(module)
        yield
    finally:
        for owner in owners:
            del owner.joint                             # the class's own is seen again


def joined(module: SelfAttention | SwiGLU) -> tuple[Tensor, Tensor | None] | None:
    """The joint weight and bias of a module's products of the same input; None where one of them is no plain Linear."""
    if isinstance(module, SelfAttention):
        layers = [module.q_proj, module.k_proj, module.v_proj]
    else:
        layers = [module.gate_proj, module.up_proj]
    if any(type(layer) is not Linear for layer in layers):
        return None
    weight = side_by_side([layer.weight for layer in layers])
    bias = None
    if layers[0].bias is not None:
        bias = side_by_side([layer.bias for layer in layers])
    return weight, bias


def side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters in one tensor, along the first axis; they become views of it."""
    together = torch.cat([parameter.data for parameter in parameters])
    parts = together.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return together
