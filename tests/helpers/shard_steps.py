"""Some optimiser steps on tiny models, alone or, started by torchrun, with --shard. Rank 0 saves what came of them.

    python tests/helpers/shard_steps.py FOLDER

FOLDER/FAMILY holds a model each; FOLDER/FAMILY-DTYPE-WORLD.pt is written.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HELPERS = Path(__file__).resolve().parent
sys.path[:0] = [str(HELPERS.parents[1]), str(HELPERS)]

import train
from loop.optimise import load_trainable, make_optimiser, optimiser_step, row_logps
from loop.ranks import Ranks
from loop.shard import gathered, is_sharded
from model.pairs import pack_pairs, row_length
from tiny import CONFIGS, example_chats

STEPS = 6
DTYPES = ("float32", "bfloat16")
SIDES = ([5, 6, 7], [9, 8]), ([11], [12, 13, 14, 15]), ([70, 71], [70]), ([5], [6])


def steps(folder: Path, dtype: str, ranks: Ranks) -> dict[str, Any]:
    """The metrics of each step, and the weights after the last."""
    torch.manual_seed(0)
    cfg = train.Config(task="bar", dtype=dtype, device="cpu", shard=True, lr=1e-3, warmup_steps=0, micro_tokens=150)
    vlm = load_trainable(str(folder), cfg, ranks.device)
    assert is_sharded(vlm.head_weight) == (ranks.world > 1)
    optimiser = make_optimiser(vlm, cfg.lr, 0.0)
    triples = [(chat, *sides) for chat, sides in zip(example_chats(), SIDES, strict=True)]

    def tokens(triple: tuple) -> int:
        return row_length(vlm.processor, *triple)

    def loss(part: Sequence[tuple]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = pack_pairs(vlm.processor, part).to(vlm.device, vlm.dtype)
        chosen, rejected = row_logps(vlm, rows).chunk(2)
        losses = F.softplus(rejected - chosen)
        return losses, {"loss": losses.detach()}

    run = SimpleNamespace(cfg=cfg, ranks=ranks)
    log = [optimiser_step(run, vlm, optimiser, triples, tokens, loss, ("loss",), step, STEPS)
           for step in range(1, STEPS + 1)]
    return {"log": log, "weights": {name: gathered(p.detach()) for name, p in vlm.named_parameters()}}


if __name__ == "__main__":
    with Ranks("cpu") as ranks:
        for family in CONFIGS:
            for dtype in DTYPES:
                found = steps(Path(sys.argv[1]) / family, dtype, ranks)
                if ranks.first:
                    torch.save(found, Path(sys.argv[1]) / f"{family}-{dtype}-{ranks.world}.pt")
