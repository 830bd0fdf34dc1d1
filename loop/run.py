"""A training run's folder: its settings, its log, its checkpoints, what it deploys.

    runs/NAME/  config.json  metrics.jsonl  summary.json  pairs/round-1.jsonl  checkpoints/step-000020-001/  deploy/

Only rank 0 writes. Every file that others read appears whole or not at all; metrics.jsonl grows by whole lines.
"""
from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from loop.flags import TrainingFlags
from loop.ranks import Ranks, first_line
from model.checkpoint import read_settings, whole_folder
from model.sampler import Completion, generate
from model.vlm import VLM
from tasks.jsonl import write_whole

NOT_COMPARED = ("resume", "out", "device")              # flags that a resumed run may change
SHOWN = {"loss": "loss {:.4f}", "rewards/margins": "margin {:+.3f}", "rewards/accuracies": "right way {:.2f}",
         "grad_norm": "grad {:.2f}", "lr": "lr {:.1e}", "eval/accuracy": "watched accuracy {:.3f}"}


class Run:
    """The folder of one run, `cfg.out`. All methods are called on every rank; rank 0 writes."""

    def __init__(self, cfg: TrainingFlags, ranks: Ranks):
        self.cfg, self.ranks, self.folder = cfg, ranks, Path(cfg.out)
        self.checkpoints = self.folder / "checkpoints"
        if not cfg.resume:
            self._refuse(self.folder.exists())
        if cfg.resume and not (self.folder / "config.json").is_file():
            raise ValueError(f"cannot resume: {self.folder} is not a run, it holds no config.json")

    def start(self, **identities: str) -> None:
        """Make the folder with its config.json: the flags and `identities`. Those of a resumed run must be equal.

        Raises ValueError that names the field which is not; FileExistsError if another run has made the folder since.
        """
        now = {k: v for k, v in asdict(self.cfg).items() if k not in NOT_COMPARED} | identities
        taken = False
        if self.cfg.resume:
            check_same(dict(read_settings(self.folder, "config.json")), now)
        elif self.ranks.first:
            try:
                with whole_folder(self.folder, replace=False) as folder:
                    (folder / "checkpoints").mkdir()
                    write_json(folder / "config.json", now)
            except FileExistsError:
                taken = True
        self._refuse(taken)

    def _refuse(self, taken: bool) -> None:
        """FileExistsError on every rank if the folder is `taken` on one."""
        if self.ranks.any(taken):
            raise FileExistsError(f"{self.folder} exists; continue it with --resume, or choose another --out")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.first:
            print(text, flush=True)

    def say_all(self, title: str, points: Iterable[str]) -> None:
        """Print a title and a list below it."""
        self.say("\n".join((title, *(f"  - {point}" for point in points))))

    def log(self, row: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and print one line for people."""
        if self.ranks.first:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        shown = (text.format(row[name]) for name, text in SHOWN.items() if name in row)
        self.say("  ".join(("step {:4d}".format(row["step"]), *shown)))

    def ask(self, vlm: VLM, items: Sequence[Any], label: str, **sampling: Any) -> list[list[Completion]]:
        """generate(vlm, ...) over the chats of `items`, shared between ranks: a list (per item) of lists."""
        def part(items: Sequence[Any]) -> list[list[Completion]]:
            return generate(vlm, [item.chat() for item in items], max_new_tokens=self.cfg.max_new_tokens, **sampling)
        return self.ranks.map(part, items, self.cfg.sample_batch, label)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run's folder, whole or not at all."""
        if self.ranks.first:
            write_json(self.folder / name, value)

    def write_lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a JSONL file of the run's folder, whole or not at all."""
        if self.ranks.first:
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write checkpoints/NAME aside, sync and rename it; then drop all but the newest `cfg.keep`, by name.

        One that exists is left as it is: a resumed run would only write the same again.
        """
        if self.ranks.first and not (self.checkpoints / name).exists():
            with whole_folder(self.checkpoints / name) as folder:
                torch.save(state, folder / "state.pt")
            for old in sorted(self.checkpoints.glob("step-*"))[:-self.cfg.keep]:
                shutil.rmtree(old)
        self.ranks.barrier()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint's state, None if there is none; leftovers of an interrupted write are removed, and
        metrics.jsonl is cut back to the checkpoint's step.

        Raises ValueError that names a damaged file, and says how to go on from an older checkpoint if there is one.
        """
        *older, newest = [None, *sorted(self.checkpoints.glob("step-*"))]
        try:
            state = read_state(newest / "state.pt") if newest else None
        except ValueError as error:
            way_out = f"; remove {newest} to resume from {older[-1].name}" if older[-1] else ", the only checkpoint"
            raise ValueError(f"{error}{way_out}") from None
        self.ranks.barrier()
        if self.ranks.first:
            for left in [*self.checkpoints.glob(".step-*"), *self.folder.glob(".candidate.*")]:
                shutil.rmtree(left)
            self._cut_metrics(state["step"] if state else -1)
        return state

    def deploy_or_discard(self, candidate: Path, keep: bool) -> None:
        """Turn the candidate's folder into deploy/, or remove it; an older deploy/ goes either way."""
        self.ranks.barrier()
        if self.ranks.first:
            shutil.rmtree(self.folder / "deploy", ignore_errors=True)
            if keep:
                os.replace(candidate, self.folder / "deploy")
            else:
                shutil.rmtree(candidate)

    def _cut_metrics(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            kept = []
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                try:
                    if line.endswith(b"\n") and json.loads(line)["step"] <= step:   # a killed run may leave half a line
                        kept.append(line.decode())
                except (ValueError, TypeError, KeyError):
                    raise ValueError(f"{path}, line {number} holds no step: {line!r:.80}") from None
            write_whole(path, "".join(kept))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; NaN is a ValueError."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's content; a damaged file is a ValueError that names it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError,
            pickle.UnpicklingError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise ValueError(f"{path} is damaged: it holds no step")
    return state


def state_fields(state: Any) -> dict[str, Any]:
    """The fields of a script's State, for a checkpoint: dataclasses in a list as their fields, nothing else is copied.
    (dataclasses.asdict copies all that was ever answered, at every save.)"""
    return {name: [vars(each) if is_dataclass(each) else each for each in value] if isinstance(value, list) else value
            for name, value in vars(state).items()}


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError that names the first field in which a resumed run differs."""
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            raise ValueError(f"cannot resume: {name} is {now.get(name)!r} and was {before.get(name)!r} at the start")
