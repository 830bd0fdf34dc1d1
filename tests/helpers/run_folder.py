"""A run's folder without a model: flags, the same run resumed, what lies in a folder."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.run import Run


@dataclass(frozen=True)
class Flags:
    out: str
    lr: float = 0.1
    keep: int = 2
    resume: bool = False
    shard: bool = False
    device: str = "cpu"


def resumed(run: Run, **flags: Any) -> Run:
    return Run(Flags(**{"out": str(run.folder), "resume": True} | flags), run.ranks)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
