"""Low-rank adapters: y = W x + (alpha / r) B A x with W frozen (LoRA, Hu et al., arXiv 2106.09685, eq. 3).

A starts random and B zero, so an adapted model starts as the model that it adapts. With its adapters off it is that
model again: no second copy is needed as a reference. Our choices: alpha / r = 2, and adapters on every linear layer of
the decoder.

Letters: r rank of the adapters, in and out features of a layer.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear
from .vlm import VLM

SCALE = 2.0                                             # alpha / r


class Adapted(Linear):
    """A linear layer with an adapter; its weight keeps its name, dtype and storage. The adapter is held in fp32."""

    def __init__(self, base: Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)                        # not Linear's: that would make a new weight
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.active = True                              # False: the layer is the one it adapts

        device = base.weight.device
        a = torch.randn(rank, base.in_features, generator=generator) * base.in_features ** -0.5
        self.lora_a = nn.Parameter(a.to(device))                                          # (r, in)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))   # (out, r)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = super().forward(x)
        if not self.active:
            return y
        low_rank = F.linear(x, self.lora_a.to(x.dtype))                                   # (..., r)
        return y + SCALE * F.linear(low_rank, self.lora_b.to(x.dtype))

    def merged(self) -> Tensor:
        """W + (alpha / r) B A, computed in fp32 and returned in the weight's dtype: (out, in)."""
        update = SCALE * self.lora_b @ self.lora_a                                        # (out, in)
        merged = self.weight.float() + update
        return merged.to(self.weight.dtype)


def add_adapters(layers: Iterable[nn.Module], rank: int, seed: int = 0) -> None:
    """Give every linear layer inside `layers` an adapter of that rank.

    ValueError, before any is made, for a rank above the smaller side of one of them: it would hold more numbers than
    the layer, and still no other updates.
    """
    layers = list(layers)
    for layer in layers:
        for name, linear in layer.named_modules():
            if isinstance(linear, Linear) and rank > min(linear.in_features, linear.out_features):
                raise ValueError(f"--lora-rank {rank}: {name} is {linear.in_features} x {linear.out_features}, so at "
                                 f"most {min(linear.in_features, linear.out_features)} makes sense")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for parent in list(layer.modules()):            # lists: layers are replaced as we go
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, Adapted(child, rank, generator))


def adapters(vlm: VLM) -> dict[str, Adapted]:
    """The adapted layers by name; empty for a model without any."""
    layers = {}
    for name, module in vlm.named_modules():
        if isinstance(module, Adapted):
            layers[name] = module
    return layers


@contextmanager
def adapters_off(vlm: VLM) -> Iterator[None]:
    """Inside, the model is the one that was adapted."""
    layers = adapters(vlm).values()
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


@torch.no_grad()
def merged_parameters(vlm: VLM) -> dict[str, Tensor]:
    """The parameters by the names that `vlm` was loaded with, adapters merged into the weights."""
    parameters: dict[str, Tensor] = {name: vlm.get_parameter(name) for name in vlm.disk_names}
    for name, layer in adapters(vlm).items():
        parameters[f"{name}.weight"] = layer.merged()
    return parameters
