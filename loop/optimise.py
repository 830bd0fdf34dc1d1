"""What is trained, and one optimiser step: AdamW over a batch that ranks share and micro-batches cut.

What is trained on (preference pairs, a judge's judgments) is the caller's: it hands in the loss of a part of a batch.

Letters: B rows, S completions in them, T tokens of a row, C tokens of the longest completion, H hidden size.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo import sequence_logps
from loop.flags import TrainingFlags, check_trainable
from loop.gradients import StepGradients
from loop.loading import activation_dtype, limit_pixels
from loop.ranks import NonFinite
from loop.run import Run
from loop.shard import gathered, is_sharded, local, shard_trained, sharing
from model import load_vlm
from model.compiled import are_compiled, compile_layers, timed_once
from model.layers import Block
from model.lora import adapters, adapters_off, add_adapters
from model.pairs import CompletionRows
from model.vlm import VLM, FeatureCache, weights_in_compute_dtype

T = TypeVar("T")
ONE_THREAD_PARAMETERS = 10_000_000                      # a model with fewer is computed fastest by one CPU thread


# ---- what is trained

def load_trainable(path: str, cfg: TrainingFlags, device: torch.device) -> VLM:
    """The model that is trained: as dtype, trainable, lora_rank, recompute, shard, feature_cache_gb and eager have it.

    Trained weights are held in fp32 and computed in `dtype`: a bf16 weight cannot take a step of 1e-6. Frozen weights
    are held in `dtype` where the files are, and always under adapters, which are fp32 themselves. With --shard a model
    is read in its files' dtype: its trained weights become fp32 as they are shared out.
    """
    dtype = activation_dtype(cfg.dtype, device)
    held_dtype = dtype if cfg.lora_rank else torch.float32
    vlm = load_vlm(path, device, None if sharing(cfg) else held_dtype)
    vlm.compute_dtype = dtype
    vlm.eager = cfg.eager
    limit_pixels(vlm.processor, cfg.min_pixels, cfg.max_pixels)

    set_trainable(vlm, cfg.trainable, cfg.lora_rank, cfg.seed)
    for parameter in vlm.parameters():
        if not parameter.requires_grad and vlm.file_dtype == dtype:     # nothing is lost: the files hold no more
            parameter.data = parameter.data.to(dtype)

    for module in vlm.modules():
        if isinstance(module, Block):
            module.recompute = cfg.recompute

    # A frozen tower sees each picture once; its features are kept between calls.
    if cfg.trainable != "all":
        vlm.feature_cache = FeatureCache(int(cfg.feature_cache_gb * 1e9))

    # Threads that share so little work mostly wait for each other.
    if device.type == "cpu" and sum(parameter.numel() for parameter in vlm.parameters()) < ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    if sharing(cfg):
        shard_trained(vlm)
    if device.type == "cuda" and not cfg.eager:
        compile_layers(vlm.decoder.layers)
    return vlm


def set_trainable(vlm: VLM, what: str, lora_rank: int = 0, seed: int = 0) -> None:
    """Freeze all but `what`: "all", "language" (the tower frozen), or "layers:A-B", decoder layers A to B, from 0.

    With a `lora_rank` these layers get adapters, and only the adapters are trained. ValueError for layers that the
    model does not have.
    """
    check_trainable(what, lora_rank)
    layers = vlm.decoder.layers
    first = 0
    last = len(layers) - 1
    span = re.fullmatch(r"layers:(\d+)-(\d+)", what)
    if span:
        first = int(span[1])
        last = int(span[2])
    if not first <= last < len(layers):
        raise ValueError(f"--trainable {what}: the language model has layers 0 to {len(layers) - 1}")
    chosen = layers[first:last + 1]

    if lora_rank:
        vlm.requires_grad_(False)
        add_adapters(chosen, lora_rank, seed)
    elif what == "all":
        vlm.requires_grad_(True)
    elif what == "language":
        vlm.requires_grad_(True)
        vlm.tower.requires_grad_(False)
    else:
        vlm.requires_grad_(False)
        chosen.requires_grad_(True)


@contextmanager
def reference_model(vlm: VLM) -> Iterator[VLM]:
    """The reference pi_ref: `vlm` as it was before training.

    With adapters it is the model itself, its adapters switched off. Otherwise it is a copy from disk, in memory only
    inside the `with` block.
    """
    if adapters(vlm):
        with adapters_off(vlm):
            yield vlm
        return
    copy = load_vlm(vlm.folder, vlm.device, vlm.dtype).requires_grad_(False)
    copy.feature_cache = vlm.feature_cache              # the same tower; None where the tower is trained
    copy.processor = vlm.processor                      # with its pixel limits, and what it knows of pictures
    if are_compiled(vlm.decoder.layers):                # policy and reference are computed by the same code
        compile_layers(copy.decoder.layers)
    yield copy


# ---- log-probabilities, with gradient

def row_logps(vlm: VLM, rows: CompletionRows) -> Tensor:
    """log pi(y|x), (S,), of the S completions in packed rows: sums over their tokens in nats, fp32."""
    hidden = vlm.hidden_states(rows.batch)                                      # (B, T, H)
    predictors = rows.predictors(hidden)                                        # (S, C, H)
    return sequence_logps(predictors, vlm.head_weight, rows.targets, rows.mask)


# ---- the optimiser

def make_optimiser(vlm: VLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained."""
    parameters = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def training_state(vlm: VLM, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of the training: the weights that are trained, and the optimiser's state."""
    trained = {name: parameter.detach() for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    return {"model": trained, "optimiser": optimiser.state_dict()}


def load_training_state(vlm: VLM, optimiser: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put what `training_state` returned into the model and the optimiser; saved.check_training_state comes before."""
    for name, tensor in saved["model"].items():
        local(vlm.get_parameter(name)).copy_(local(tensor))
    optimiser.load_state_dict(saved["optimiser"])


def learning_rate(peak: float, warmup_steps: int, step: int, planned: int) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it at step `planned`, the last (counted from 1)."""
    warm_up = step / max(warmup_steps, 1)
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / planned)
    return peak * min(warm_up, cosine)


def micro_batches(examples: Sequence[T], tokens: Callable[[T], int], most: int) -> list[list[T]]:
    """The examples, cut into parts that take a forward pass each; tokens(example) is the length of its row.

    A part's rows are padded to its longest. They have at most `most` tokens together, padding included, unless a single
    row has more. Examples that fit into one part stay in order; else rows of like length stand together.
    """
    lengths = [tokens(example) for example in examples]
    order = list(range(len(examples)))
    if max(lengths, default=0) * len(examples) > most:
        order.sort(key=lambda number: lengths[number])

    parts: list[list[T]] = []
    for number in order:
        # Lengths rise, or all fit: the newest row is as long as the part is padded to, or the part has room for it.
        if parts and lengths[number] * (len(parts[-1]) + 1) <= most:
            parts[-1].append(examples[number])
        else:
            parts.append([examples[number]])
    return parts


def optimiser_step(run: Run, vlm: VLM, optimiser: torch.optim.Optimizer, batch: Sequence[T],
                   tokens: Callable[[T], int], loss: Callable[[Sequence[T]], tuple[Tensor, dict[str, Tensor]]],
                   names: Sequence[str], step: int, planned: int) -> dict[str, float]:
    """One step over `batch`, shared between ranks and cut into micro-batches, normalised once over all of it.

    `tokens(example)` is the length of an example's row. `loss(part)` returns the losses of n examples, (n,), with
    gradient, and their metrics by name, (n,) each, "loss" among `names`. `step` counts from 1, `planned` is the last.
    run.cfg has micro_tokens, clip, lr and warmup_steps.
    Returns the metrics' means over the batch, grad_norm and lr. Raises NonFinite, before anything is updated, if the
    loss or the gradient is NaN or infinite.
    """
    cfg = run.cfg
    ranks = run.ranks
    parameters = optimiser.param_groups[0]["params"]
    sharded = is_sharded(parameters[0])

    mine = batch[ranks.rank::ranks.world]
    parts = micro_batches(mine, tokens, cfg.micro_tokens)
    # With --shard all ranks need as many passes: a rank that has fewer repeats a spare example with weight 0.
    weighted = [(part, 1.0) for part in parts]
    if sharded:
        weighted = ranks.as_many(parts, spare=list(batch[:1]))

    # Gradients add up over micro-batches and ranks; each is divided by the whole batch's size.
    totals = torch.zeros(len(names), device=ranks.device)
    cast = nullcontext() if sharded else weights_in_compute_dtype(vlm)          # FSDP casts what it gathers
    clock = timed_once("training") if are_compiled(vlm.decoder.layers) else nullcontext()
    with StepGradients(parameters, ranks) as gradients, cast, clock:
        for number, (part, weight) in enumerate(weighted, start=1):
            gradients.is_last = number == len(weighted)
            losses, metrics = loss(part)
            # Without a picture nothing depends on cross-attention: where that alone is trained there is no gradient.
            if losses.requires_grad:
                (weight * losses.sum() / len(batch)).backward()
            totals += weight * torch.stack([metrics[name] for name in names]).sum(1)
    means = (ranks.sum(totals) / len(batch)).tolist()
    row = dict(zip(names, means, strict=True))

    norm = gathered(torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)).item()
    if not all(math.isfinite(value) for value in (*means, norm)):
        raise NonFinite(f"step {step}: the loss is {row['loss']}, the gradient's norm {norm}; nothing was updated, "
                        "the newest checkpoint is from before")

    rate = learning_rate(cfg.lr, cfg.warmup_steps, step, planned)
    optimiser.param_groups[0]["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()
    return {**row, "grad_norm": norm, "lr": rate}
