"""The flags that train.py and judge.py share. A program's own Config adds to them, and changes defaults where its
models want others; tasks/flags.py turns either into a command line.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from tasks import TASKS
from tasks.flags import DTYPES, check_pixel_range, check_ranges, flag


@dataclass(frozen=True)
class TrainingFlags:
    """What any program depends on that trains a model on a task, in a folder of its own."""
    # What
    task: str | None = flag(None, "task to train on (without it: the demo, bar and red)", choices=tuple(TASKS))
    data: str | None = flag(None, "folder or file that holds the task's data; the shapes tasks need none")
    split: str | None = flag(None, "split of the data (default: the task's own)")
    train_split: str | None = flag(None, "train on the items of this split instead; its answers may be hidden")
    out: str | None = flag(None, "folder of the run")
    resume: bool = flag(False, "continue the run in --out from its newest checkpoint")
    seed: int = flag(0, "seed of the splits, the samples and the order of training", low=0)
    # Asking
    max_new_tokens: int = flag(16, "longest answer, in tokens", low=1)
    verdict_tokens: int = flag(16, "longest verdict, in tokens", low=1)
    max_prompt_tokens: int | None = flag(None, "longest prompt in tokens (default: what models have room for)", low=1)
    skip_long: bool = flag(False, "leave out items with longer prompts, instead of stopping at the first")
    sample_batch: int = flag(64, "prompts that are sampled together", low=1)
    min_pixels: int | None = flag(None, "enlarge smaller pictures to this area (default: the model's own)", low=1)
    max_pixels: int | None = flag(None, "shrink larger pictures to this area: less memory", low=1)
    # Optimisation
    lr: float = flag(3e-5, "peak learning rate", low=0, high=1)
    warmup_steps: int = flag(5, "steps of linear warm-up; a cosine to a tenth of the peak follows", low=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", low=0, high=1)
    clip: float = flag(1.0, "largest gradient norm", low=1e-6)
    batch_size: int = flag(32, "examples a step, over all ranks", low=1)
    micro_tokens: int = flag(4096, "tokens a forward pass on one rank, padding included; at least one example", low=1)
    epochs: int = flag(3, "passes over the examples", low=1)
    trainable: str = flag("language", "what is trained: language, all (the vision tower too), or layers:A-B")
    lora_rank: int = flag(0, "train adapters of this rank on these layers instead (0: the weights themselves)", low=0)
    recompute: bool = flag(False, "activation checkpointing: compute activations again instead of keeping them")
    shard: bool = flag(False, "share out weights, gradients and optimiser over torchrun's processes (FSDP2)")
    # Saving, machine
    save_every: int = flag(20, "steps between checkpoints", low=1)
    keep: int = flag(2, "checkpoints kept", low=1)
    device: str | None = flag(None, "cpu, cuda or cuda:N (default: cuda where there is one)")
    dtype: str | None = flag(None, "of activations (default: bfloat16 on cuda, else float32)", choices=DTYPES)
    feature_cache_gb: float = flag(4.0, "memory for image features kept between calls, GB a model", low=0)
    eager: bool = flag(True, "on a GPU: compute as written; --no-eager: compiled and captured (has run on no GPU)")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_pixel_range(self.min_pixels, self.max_pixels)
        check_trainable(self.trainable, self.lora_rank)
        if self.shard and (self.lora_rank or self.trainable.startswith("layers")):
            raise ValueError("--shard shares out a model that is trained whole (--trainable language or all); with "
                             "--lora-rank or --trainable layers:A-B little is trained: leave --shard out")

        for name in ("data", "split", "train_split", "resume"):
            needless = self.is_demo if name == "resume" else self.task is None
            if needless and getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} has no meaning without --task")

    @property
    def is_demo(self) -> bool:
        """Nothing says what to train on."""
        return self.task is None


def check_trainable(what: str, lora_rank: int) -> None:
    """ValueError for what `--trainable` and `--lora-rank` cannot mean in any model."""
    if not re.fullmatch(r"all|language|layers:\d+-\d+", what):
        raise ValueError(f"--trainable must be all, language or layers:A-B, not {what!r}")
    if lora_rank and what == "all":
        raise ValueError(f"--lora-rank {lora_rank} adapts the language model; it has no meaning with --trainable all")
