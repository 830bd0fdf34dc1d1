"""The disk that a training run takes, told from the shapes before anything is made."""
from __future__ import annotations

import shutil
from pathlib import Path

from loop.run import Run
from model.checkpoint import saved_bytes, training_bytes
from model.vlm import VLM


def check_disk(run: Run, vlm: VLM, deployed_copies: int) -> None:
    """Say what the run's folder will take at most; ValueError on every rank where the disk has less.

    A new checkpoint is written before the oldest goes, so there are --keep and one more. What a resumed run's folder
    already holds counts as taken. The run's other files are small.
    """
    cfg = run.cfg
    checkpoint = training_bytes(vlm)
    deployed = saved_bytes(vlm, vlm.disk_names, vlm.file_dtype)
    needed = (cfg.keep + 1) * checkpoint + deployed_copies * deployed
    run.say(f"disk: {run.folder} will take up to {size(needed)}, of which a checkpoint is {size(checkpoint)} and "
            f"deploy/ {size(deployed)}")

    free = free_bytes(run.folder) + held_bytes(run.folder)
    if run.ranks.any(run.ranks.first and free < needed):
        raise ValueError(f"{run.folder} needs {size(needed)} of disk for {cfg.keep + 1} checkpoints and deploy/, and "
                         f"there are {size(free)}; choose a smaller --keep, --lora-rank or another --out")


def free_bytes(folder: Path) -> int:
    """What the file system has left on which `folder` is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def held_bytes(folder: Path) -> int:
    """What the files below `folder` take; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
    return total


def size(count: int) -> str:
    """1.5 GB for 1,500,000,000 bytes, and in MB what is smaller than one GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"
