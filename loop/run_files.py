"""What lies in a run's folder, seen from outside the run: its log's steps, how it ended, what a killed process left."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from model.checkpoint import COPIED_FILES
from model.settings import read_settings

LOCK = ".lock"                                          # whose lock keeps other processes out
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"                                # written when all else is
LEFTOVERS = (                                           # of a process that was killed while it wrote
    "checkpoints/.step-*", ".candidate.*", ".deploy.*", "*.json*.tmp", "pairs/*.json*.tmp", "pairs/images/*.tmp",
    "export/*/*.tmp", "candidates/*.json*.tmp", "report.html.*.tmp")
# All that train.py and judge.py write, part by part of a path: files, and folders that hold a model.
RUN_FILES = (
    "config.json", METRICS, SUMMARY, "gate_records.jsonl", "held_out.jsonl", "trained_on.jsonl", "pairs/*.jsonl",
    "pairs/images/*.png", "candidates/*.jsonl", "served/*.jsonl", "export/*/*.json*", "checkpoints/step-*/state.pt",
    "checkpoints/.step-*/state.pt", "checkpoints/*/shards/*", LOCK, "report.html", "report.html.*.tmp", "*.json*.tmp",
    "pairs/*.json*.tmp", "pairs/images/*.png*.tmp", "candidates/*.json*.tmp")
MODEL_FOLDERS = ("deploy", "candidate", ".candidate.*", ".deploy.*")


# ---- the log

def log_steps(path: Path) -> list[tuple[int, int]]:
    """The steps of metrics.jsonl, each with where its line ends in the file; none where there is no file.

    Half a line at the end, which a killed run may have left, does not count. ValueError for a line without a step.
    """
    steps: list[tuple[int, int]] = []
    if not path.is_file():
        return steps
    end = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        end += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            step = None
        if type(step) is not int:
            raise ValueError(f"{path}, line {number} holds no step: {line!r:.80}")
        steps.append((step, end))
    return steps


def cut_metrics(path: Path, step: int) -> None:
    """Cut off what metrics.jsonl holds of later steps, and half a line at its end; the rest is not written again."""
    kept = 0
    for line_step, line_end in log_steps(path):
        if line_step <= step:
            kept = line_end
    if path.is_file() and path.stat().st_size > kept:
        with open(path, "r+b") as file:
            file.truncate(kept)


# ---- what is there, what is missing

def check_checkpoints(folder: Path) -> None:
    """ValueError if a run that has taken steps holds no checkpoint: to begin it anew would cost what it still holds.

    A run that was stopped before its first checkpoint has taken none.
    """
    if any(folder.glob("checkpoints/step-*")):
        return
    steps = [step for step, _ in log_steps(folder / METRICS)]
    last_step = max(steps, default=0)
    told_by = METRICS
    if not last_step and (folder / SUMMARY).exists():
        last_step = read_settings(folder, SUMMARY).get("steps", 0)
        told_by = SUMMARY
    if last_step:
        raise ValueError(f"cannot resume: {folder / 'checkpoints'} holds no checkpoint, although {told_by} is at step "
                         f"{last_step}; put the checkpoints back, or choose another --out")


def outcome(path: Path) -> tuple[str, int]:
    """How a run ended, in words, and its exit status, from its summary.json; ValueError if that does not say.

    train.py writes the decision of the gate after training, None where the gate before stopped the run, and None for
    both gates where nothing was measured; judge.py the number of the iteration that was deployed, None for none.
    """
    summary: dict[str, Any] = dict(read_settings(path.parent, path.name))
    best = summary.get("deployed", 0)
    if best is None:
        return "no iteration was better than the judge that it started from, so nothing is deployed", 3
    if type(best) is int and best > 0:
        return f"iteration {best} is deployed", 0

    post_gate = summary.get("post_gate", 0)
    if post_gate is None and summary.get("pre_gate", 0) is None:
        return "nothing was measured (--no-evaluate), so nothing is deployed", 0
    if post_gate is None:
        return "the gate before training said no, so nothing was trained", 3
    verdict = post_gate.get("verdict") if isinstance(post_gate, dict) else None
    if verdict == "PROMOTE":
        return "the gate after training said PROMOTE, so the student is deployed", 0
    if verdict == "REJECT" and "difference" in post_gate:
        return "the gate after training said REJECT, so nothing is deployed", 3
    if verdict == "REJECT":
        return "--stop-on-regression stopped it, so nothing is deployed", 3
    raise ValueError(f"{path} does not say how the run ended; without it --resume goes on from the newest checkpoint")


def run_patterns() -> list[str]:
    """Patterns of every file that a run's folder may hold."""
    patterns = list(RUN_FILES)
    for folder in MODEL_FOLDERS:
        patterns += [f"{folder}/{name}" for name in (*COPIED_FILES, "*.safetensors")]
    return patterns


def foreign_file(folder: Path, patterns: Sequence[str]) -> Path | None:
    """A file below `folder` that no pattern allows for, relative to it; None if there is none."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and not any(fits(name, pattern) for pattern in patterns):
            return name
    return None


def fits(path: PurePath, pattern: str) -> bool:
    """Whether a path fits a pattern part by part: a * does not reach into another folder."""
    parts = pattern.split("/")
    if len(parts) != len(path.parts):
        return False
    return all(fnmatchcase(part, wanted) for part, wanted in zip(path.parts, parts, strict=True))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint, a model or a file that it was writing."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
