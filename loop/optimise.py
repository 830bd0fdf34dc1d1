"""What is trained, and one step of it: AdamW over a batch that ranks share and micro-batches cut, warm-up and cosine.

What is trained on (pairs, a judge's traces) is the caller's: it hands in the loss of a part of the batch.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from loop.flags import TrainingFlags, check_trainable
from loop.ranks import NonFinite
from loop.run import Run
from model import load_vlm
from model.layers import Block
from model.lora import adapters, adapters_off, add_adapters
from model.vlm import VLM, FeatureCache

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = 10_000_000                                      # parameters of a model that one CPU thread serves best


def load_trainable(path: str, cfg: TrainingFlags, device: torch.device) -> VLM:
    """The model that is trained, as `cfg` has it: dtype, trainable, lora_rank, recompute, feature_cache_gb, seed.

    Weights that are trained are held in fp32 and computed in `dtype`; those that are frozen have that dtype where the
    files do, and always under adapters, which are fp32. A frozen tower's features are kept between calls, up to
    `feature_cache_gb`.
    """
    dtype = DTYPES[cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    vlm = load_vlm(path, device, dtype if cfg.lora_rank else torch.float32)
    vlm.compute_dtype = dtype
    set_trainable(vlm, cfg.trainable, cfg.lora_rank, cfg.seed)
    for p in vlm.parameters():
        if not p.requires_grad and vlm.file_dtype == dtype:         # nothing is lost: the files hold no more
            p.data = p.data.to(dtype)
    for module in vlm.modules():
        if isinstance(module, Block):
            module.recompute = cfg.recompute
    if cfg.trainable != "all":
        vlm.feature_cache = FeatureCache(int(cfg.feature_cache_gb * 1e9))
    if device.type == "cpu" and sum(p.numel() for p in vlm.parameters()) < SMALL:
        torch.set_num_threads(1)                        # threads that share so little work mostly wait for each other
    return vlm


def set_trainable(vlm: VLM, what: str, lora_rank: int = 0, seed: int = 0) -> None:
    """Freeze all but `what`: "all", "language" (the tower frozen), or "layers:A-B", decoder layers A to B, from 0.

    With a `lora_rank` these layers get adapters, and only the adapters are trained.
    """
    check_trainable(what, lora_rank)
    layers, chosen = vlm.decoder.layers, re.fullmatch(r"layers:(\d+)-(\d+)", what)
    first, last = (int(chosen[1]), int(chosen[2])) if chosen else (0, len(layers) - 1)
    if not first <= last < len(layers):
        raise ValueError(f"--trainable {what}: the language model has layers 0 to {len(layers) - 1}")
    vlm.requires_grad_(what == "all" or what == "language" and not lora_rank)
    if what == "language":
        vlm.tower.requires_grad_(False)
    if lora_rank:
        add_adapters(layers[first:last + 1], lora_rank, seed)
    elif chosen:
        layers[first:last + 1].requires_grad_(True)


@contextmanager
def reference_model(vlm: VLM) -> Iterator[VLM]:
    """`vlm` as it was loaded: itself with the adapters off, else a copy, in memory only as long as it is used."""
    if adapters(vlm):
        with adapters_off(vlm):
            yield vlm
        return
    copy = load_vlm(vlm.folder, vlm.device, vlm.dtype).requires_grad_(False)
    copy.feature_cache = vlm.feature_cache              # None where the tower is trained
    yield copy


def make_optimiser(vlm: VLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained."""
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def training_state(vlm: VLM, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of the training: the weights that are trained, and the optimiser's state."""
    trained = {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad}
    return {"model": trained, "optimiser": optimiser.state_dict()}


def load_training_state(vlm: VLM, optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put what `training_state` returned into the model and the optimiser."""
    for name, tensor in saved["model"].items():
        vlm.get_parameter(name).data.copy_(tensor)
    optimiser.load_state_dict(saved["optimiser"])


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
        if summed.requires_grad:                        # cross-attention layers see nothing of a text
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
