"""One optimiser step over a batch that ranks share and micro-batches cut: AdamW, warm-up and cosine, clipping.

What is trained on (pairs, a judge's traces) is the caller's: it hands in the loss of a part of the batch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .run import NonFinite, Run
from .vlm import VLM

T = TypeVar("T")


def make_optimiser(vlm: VLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained."""
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def learning_rate(peak: float, warmup_steps: int, step: int, planned: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak at step `planned`, the last that may come (from 1)."""
    return peak * min(step / max(warmup_steps, 1), 0.55 + 0.45 * math.cos(math.pi * step / planned))


def optimiser_step(run: Run, optimiser: torch.optim.Optimizer, batch: Sequence[T],
                   loss: Callable[[Sequence[T]], tuple[Tensor, Tensor]], names: Sequence[str], step: int,
                   planned: int) -> dict[str, float]:
    """One step over `batch`, shared between ranks and cut into micro-batches, normalised once over all of it.

    loss(part): (the summed loss of its entries, with gradient; the sums over them of what `names` name, (M,), the
    loss first). `step` counts from 1; run.cfg has micro_batch, clip, lr and warmup_steps. Returns the means, the
    gradient's norm and the learning rate; raises NonFinite, before anything is updated, if the loss or the gradient is.
    """
    cfg, ranks, parameters = run.cfg, run.ranks, optimiser.param_groups[0]["params"]
    mine, totals = batch[ranks.rank::ranks.world], torch.zeros(len(names), device=ranks.device)
    for start in range(0, len(mine), cfg.micro_batch):
        summed, metrics = loss(mine[start:start + cfg.micro_batch])
        (summed / len(batch)).backward()
        totals += metrics
    ranks.sum_gradients(parameters)
    means = (ranks.sum(totals) / len(batch)).tolist()
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip).item()
    if not all(map(math.isfinite, (*means, norm))):
        raise NonFinite(f"step {step}: the loss is {means[0]}, the gradient's norm {norm}; nothing was updated, "
                        "the newest checkpoint is from before")
    rate = optimiser.param_groups[0]["lr"] = learning_rate(cfg.lr, cfg.warmup_steps, step, planned)
    optimiser.step()
    optimiser.zero_grad()
    return {**dict(zip(names, means)), "grad_norm": norm, "lr": rate}
