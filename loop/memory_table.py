"""What a GPU holds in each phase of a round, worked out from the shapes of the models alone; no weight is read.

    python -m loop.memory --student Qwen/Qwen3-VL-8B-Instruct --verifier Qwen/Qwen3-VL-8B-Instruct --gpus 8

The table has three lines for every student and verifier: nothing is shared out, --shard, and --shard-verifier as well.
Its phases:

    training     weights, gradients, Adam's moments, what the backward pass keeps of a micro-batch
    sampling     weights and moments, a whole copy in the dtype computed in, keys and values, logits
    scoring      the same with the verifier whole
    reference    weights and moments, and the model as it was at the start, whole

GB are 10^9 bytes. What CUDA, NCCL and the allocator take for themselves (some GB) comes on top. Without a verifier the
student stands for a judge. Letters: T tokens of a row, H hidden size, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo import LOGITS_AT_ONCE_CUDA
from model import empty_vlm
from model.checkpoint import ADAM_MOMENTS, resolve_folder
from model.layers import DecoderLayer
from model.lora import add_adapters
from model.settings import read_settings
from tasks.endings import end, say
from tasks.flags import DTYPES, check_ranges, flag, parse_flags

FP32 = 4                                                # bytes
LOGITS_WHILE_DRAWN = 3                                  # (samples, V) tensors in fp32 while tokens are drawn
WIDEST_AT_ONCE = 4                                      # of a layer's widest activations, beside what a pass keeps


@dataclass(frozen=True)
class Config:
    """Which models, and the flags of train.py that decide how much memory they take."""
    student: list[str] = flag([], "folders or hub ids of the models that are trained")
    verifier: list[str] = flag([], "folders or hub ids of the verifiers (none: the students are judges)")
    gpus: int = flag(8, "GPUs that torchrun starts a process on", low=1)
    trainable: str = flag("language", "what is trained", choices=("language", "all"))
    lora_rank: int = flag(0, "adapters of this rank instead (0: the weights themselves)", low=0)
    recompute: bool = flag(False, "activation checkpointing")
    dtype: str = flag("bfloat16", "of activations", choices=DTYPES)
    micro_tokens: int = flag(4096, "tokens a forward pass on one rank, at least one pair", low=1)
    prompt_tokens: int = flag(1100, "tokens of a prompt, its picture's included", low=1)
    max_new_tokens: int = flag(256, "longest answer", low=1)
    verdict_tokens: int = flag(64, "longest verdict", low=1)
    k: int = flag(8, "candidates an item", low=1)
    sample_batch: int = flag(16, "items sampled, and prompts scored, together", low=1)
    feature_cache_gb: float = flag(4.0, "memory for image features, GB a model", low=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.student:
            raise ValueError("--student names no model")
        if self.lora_rank and self.trainable == "all":
            raise ValueError(f"--lora-rank {self.lora_rank} has no meaning with --trainable all")

    @property
    def row_tokens(self) -> int:
        """Tokens of a pair's row: the prompt, and both completions at their longest."""
        return self.prompt_tokens + 2 * self.max_new_tokens

    @property
    def pass_tokens(self) -> int:
        """Tokens of a forward pass on one rank: at most --micro-tokens, but at least a row."""
        return max(self.micro_tokens, self.row_tokens)

    @property
    def computed_dtype(self) -> torch.dtype:
        """The dtype computed in."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def itemsize(self) -> int:
        """Bytes of a number in it."""
        return self.computed_dtype.itemsize


# ---- shapes

@dataclass(frozen=True)
class Shapes:
    """A model in numbers: how many parameters it has, and where; how wide its activations are."""
    tower: int                                          # parameters of the tower, its projector included
    layer: int                                          # of the largest decoder layer
    language: int                                       # of all that is not the tower
    outside: int                                        # of these, outside the layers: embedding, head, last norm
    adapters: int                                       # of all adapters
    layers: int                                         # decoder layers
    hidden: int                                         # H
    vocabulary: int                                     # V
    cached: int                                         # numbers of keys and values a token, all layers together
    widest: int                                         # of a layer's widest activation a token
    kept: float                                         # BYTES that a layer keeps for its backward pass, a token


def read_shapes(name: str, cfg: Config) -> Shapes:
    """The shapes of a model in a folder, or on the hub; of the latter config.json alone is downloaded."""
    folder = resolve_folder(name, ["config.json"])
    vlm = empty_vlm(read_settings(folder, "config.json")).to(cfg.computed_dtype)
    layers = vlm.decoder.layers
    sizes = [count(layer) for layer in layers]
    tower = count(vlm.tower)
    language = count(vlm) - tower
    plain = next(layer for layer in layers if isinstance(layer, DecoderLayer))
    kept = kept_bytes(plain, cfg.computed_dtype)
    cached = 2 * plain.self_attn.k_proj.out_features * len(layers)
    vocabulary, hidden = vlm.head_weight.shape
    if cfg.lora_rank:
        add_adapters(layers, cfg.lora_rank)

    return Shapes(
        tower=tower,
        layer=max(sizes),
        language=language,
        outside=language - sum(sizes),
        adapters=count(vlm) - tower - language,
        layers=len(layers),
        hidden=hidden,
        vocabulary=vocabulary,
        cached=cached,
        widest=plain.mlp.gate_proj.out_features,
        kept=kept,
    )


def count(module: nn.Module) -> int:
    """How many numbers the module's parameters are."""
    return sum(parameter.numel() for parameter in module.parameters())


class FusedAttention(torch.autograd.Function):
    """Attention on the meta device as a fused kernel does it: queries, keys, values and the result are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y


class TwoSuffixes:
    """Stands for the attention.Tree of a pair's row: each of two suffixes has its copy of the keys and values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (1, nh, T, hd); k, v: (1, nk, T, hd) -> (1, nh, T, hd)."""
        twice_k = torch.cat((k, k), 2)                                          # (1, nk, 2 T, hd)
        twice_v = torch.cat((v, v), 2)
        y: Tensor = FusedAttention.apply(q, twice_k, twice_v)                   # type: ignore[no-untyped-call]
        return y


def kept_bytes(layer: DecoderLayer, dtype: torch.dtype, tokens: int = 64) -> float:
    """Bytes that autograd keeps of a layer for its backward pass, a token: counted on the meta device.

    The layer is there, in the dtype computed in, so that no cast of a weight counts. A layer of cross-attention counts
    as one of self-attention.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    kept: dict[int, int] = {}
    held = []                                           # so that no storage's number is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    hidden = layer.self_attn.q_proj.in_features
    half_head = layer.self_attn.head_dim // 2
    x = torch.empty(1, tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
    rope = torch.empty(1, 1, tokens, half_head, dtype=dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, (rope, rope), TwoSuffixes(), None)
    return sum(kept.values()) / tokens


# ---- bytes

def trained_and_frozen(student: Shapes, cfg: Config) -> tuple[int, int]:
    """How many parameters are trained, and how many are not."""
    if cfg.lora_rank:
        return student.adapters, student.language + student.tower
    if cfg.trainable == "all":
        return student.language + student.tower, 0
    return student.language, student.tower


def always_held(student: Shapes, verifier: Shapes | None, cfg: Config, shared: int, verifier_shared: int) -> float:
    """Bytes that stay from phase to phase: weights, Adam's moments, image features, the verifier's weights.

    `shared` and `verifier_shared`: over how many GPUs each of the two is shared out, 1 where it is whole.
    """
    trained, frozen = trained_and_frozen(student, cfg)
    held = (1 + ADAM_MOMENTS) * FP32 * trained / shared + cfg.itemsize * frozen
    if cfg.trainable != "all":
        held += cfg.feature_cache_gb * 1e9
    if verifier is not None:
        held += cfg.itemsize * (verifier.language + verifier.tower) / verifier_shared + cfg.feature_cache_gb * 1e9
    return held


def training(student: Shapes, cfg: Config, shared: int) -> float:
    """Bytes that a training step adds at its largest moment."""
    trained, _ = trained_and_frozen(student, cfg)
    tokens = cfg.pass_tokens
    gradients = FP32 * trained / shared

    kept = student.kept * tokens * student.layers
    if cfg.recompute:                                   # the layers' inputs, and one layer that is computed again
        kept = (cfg.itemsize * student.hidden * student.layers + student.kept) * tokens
    answers = tokens * 2 * cfg.max_new_tokens // cfg.row_tokens
    logits = min(LOGITS_AT_ONCE_CUDA, answers * student.vocabulary) * (FP32 + cfg.itemsize)
    of_a_layer = cfg.itemsize * WIDEST_AT_ONCE * student.widest * tokens    # on its way back; the logits are gone then
    activations = kept + max(of_a_layer, logits)

    if cfg.lora_rank:
        return gradients + activations
    if shared == 1:
        casts = cfg.itemsize * student.language if cfg.itemsize < FP32 else 0
        return gradients + casts + activations + cfg.itemsize * student.outside     # a gradient, before it is added

    # What is gathered for the whole pass, and its gradient; two layers, one of them on its way, and a gradient; and
    # what gradients are added up in, in fp32: a layer's while activations are there, all the rest when they are gone.
    for_the_pass = student.outside + (student.tower if cfg.trainable == "all" else 0)
    gathered = 2 * cfg.itemsize * for_the_pass
    layers = (4 * cfg.itemsize + FP32) * student.layer
    return gradients + gathered + max(layers + activations, FP32 * for_the_pass)


def copied(student: Shapes, cfg: Config, shared: int) -> float:
    """Bytes of the copy that a student is asked in: none where the weights are whole and in the dtype computed in."""
    if cfg.lora_rank or (shared == 1 and cfg.itemsize == FP32):
        return 0
    tower = FP32 * student.tower if shared > 1 and cfg.trainable == "all" else 0
    return cfg.itemsize * student.language + tower


def asking(model: Shapes, cfg: Config, prompt: int, answer: int, samples: int) -> float:
    """Bytes that asking a whole model adds: --sample-batch prompts of that many tokens, `samples` answers to each."""
    prompts = cfg.sample_batch * prompt
    answers = cfg.sample_batch * samples
    cache = cfg.itemsize * model.cached * (prompts + answers * answer)
    prefill = cfg.itemsize * WIDEST_AT_ONCE * model.widest * prompts
    draws = LOGITS_WHILE_DRAWN * FP32 * answers * model.vocabulary
    return cache + max(prefill, draws)


def phases(student: Shapes, verifier: Shapes | None, cfg: Config, shared: int, verifier_shared: int
           ) -> dict[str, float]:
    """Bytes of a GPU at the largest moment of each phase; the letters are those of always_held."""
    held = always_held(student, verifier, cfg, shared, verifier_shared)
    found = {
        "training": held + training(student, cfg, shared),
        "sampling": held + copied(student, cfg, shared)
        + asking(student, cfg, cfg.prompt_tokens, cfg.max_new_tokens, cfg.k),
    }
    if verifier is None:
        return found
    gathered = cfg.itemsize * (verifier.language + verifier.tower) if verifier_shared > 1 else 0
    prompt = cfg.prompt_tokens + cfg.max_new_tokens     # the candidate stands in it
    found["scoring"] = held + gathered + asking(verifier, cfg, prompt, cfg.verdict_tokens, 1)

    reference = 0 if cfg.lora_rank else cfg.itemsize * (student.language + student.tower)
    forward = cfg.itemsize * WIDEST_AT_ONCE * student.widest * cfg.pass_tokens
    found["reference"] = held + reference + forward
    return found


# ---- the table

def table(cfg: Config) -> str:
    """The table, as Markdown has it."""
    verifiers: Sequence[str | None] = cfg.verifier or [None]
    read = {name: read_shapes(name, cfg) for name in {*cfg.student, *cfg.verifier}}
    lines = ["| student | verifier | shared out | training | sampling | scoring | reference | most, GB a GPU |",
             "|---|---|---|---|---|---|---|---|"]
    for student in cfg.student:
        for verifier in verifiers:
            for flags, shared, verifier_shared in ways_to_share(cfg):
                known = phases(read[student], read[verifier] if verifier else None, cfg, shared, verifier_shared)
                cells = [student, verifier or "-", flags]
                cells += [shown(known.get(phase)) for phase in ("training", "sampling", "scoring", "reference")]
                cells.append(shown(max(known.values())))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ways_to_share(cfg: Config) -> list[tuple[str, int, int]]:
    """The flags that share out weights, with the number of GPUs that student and verifier are then shared out over."""
    ways = [("nothing", 1, 1)]
    if cfg.gpus == 1:
        return ways
    if not cfg.lora_rank:
        ways.append(("--shard", cfg.gpus, 1))
    if cfg.verifier:
        ways.append(("--shard-verifier", 1, cfg.gpus) if cfg.lora_rank else
                    ("--shard --shard-verifier", cfg.gpus, cfg.gpus))
    return ways


def shown(size: float | None) -> str:
    """Bytes in GB; "-" for a phase that there is not."""
    return "-" if size is None else f"{size / 1e9:.1f}"


def cli() -> int:
    """Print the table; returns the exit status."""
    cfg = parse_flags(Config, __doc__)
    try:
        say(table(cfg))
    except (ValueError, OSError) as error:
        return end("loop.memory", error)
    return 0
