"""A training run's folder: its settings, its log, its checkpoints, what it deploys.

    runs/NAME/  config.json  metrics.jsonl  summary.json  pairs/round-1.jsonl  checkpoints/step-000020-001/  deploy/

Only rank 0 writes. Every file that others read appears whole or not at all; metrics.jsonl grows by whole lines. One
process at a time works on a run: it holds the lock of the folder's file .lock.
"""
from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from loop.endpoint import is_served
from loop.flags import TrainingFlags
from loop.ranks import Ranks
from loop.run_files import LOCK, METRICS, SUMMARY, check_checkpoints, cut_metrics, outcome, remove_leftovers
from loop.saving import saving
from loop.served import Asked, ServedModel
from loop.shard import whole
from loop.shard_files import SHARDS, read_sharded, write_sharded
from model import save_vlm
from model.checkpoint import whole_folder
from model.sampler import Completion, generate
from model.settings import read_settings
from model.vlm import VLM
from tasks import Item
from tasks.endings import check_can_write, first_line, say, writing
from tasks.jsonl import write_whole
from tasks.lock import Lock, take_lock

C = TypeVar("C", bound=TrainingFlags)                   # the program's own Config
# Flags that a resumed run may change.
NOT_COMPARED = ("resume", "out", "device", "eager", "concurrency", "max_failed", "request_timeout")
STEP_LINE = {                                           # what a step's line shows, and how
    "loss": "loss {:.4f}",
    "rewards/margins": "margin {:+.3f}",
    "rewards/accuracies": "ordered {:.2f}",
    "grad_norm": "grad {:.2f}",
    "lr": "lr {:.1e}",
    "pairs/s": "{:.1f} pairs/s",
    "judgments/s": "{:.1f} judgments/s",
    "tokens/s": "{:.0f} tokens/s",
    "preprocessing_share": "preprocessing {:.0%}",
    "peak_memory_gb": "peak {:.1f} GB",
    "eval/accuracy": "watched accuracy {:.3f}",
}


class Run(Generic[C]):
    """The folder of one run, `cfg.out`. All methods are called on every rank; rank 0 writes."""

    def __init__(self, cfg: C, ranks: Ranks):
        self.cfg = cfg
        self.ranks = ranks
        self.folder = Path(cfg.out)
        self.checkpoints = self.folder / "checkpoints"
        self.lock: Lock | None = None                   # rank 0's, for as long as this object lives

        if not cfg.resume:
            self._refuse(self.folder.exists())
            check_can_write(self.folder, "--out")
        else:
            self._reopen()

    def _reopen(self) -> None:
        """Take the folder of a run that is resumed. ValueError if it is none, is in use, or has lost its checkpoints.

        Everything that can be known before a model is loaded is checked here, and nothing is changed.
        """
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"cannot resume: {self.folder} is not a run, it holds no config.json")
        first_or_none(self.ranks, self._take_lock)

        flags = self._flags()
        flags.pop("dtype", None)                        # start() compares what it came to
        before = dict(read_settings(self.folder, "config.json"))
        check_same({name: before.get(name) for name in flags}, flags)
        check_checkpoints(self.folder)

    def _take_lock(self) -> None:
        self.lock = take_lock(self.folder / LOCK, self.folder)

    def _flags(self) -> dict[str, Any]:
        """The flags that a resumed run must have again."""
        flags = asdict(self.cfg)
        return {name: value for name, value in flags.items() if name not in NOT_COMPARED}

    def start(self, **identities: str) -> None:
        """Make the folder with its config.json: the flags, and the `identities` of models. On --resume compare them.

        Raises ValueError that names the first field in which a resumed run differs; FileExistsError if another run has
        made the folder in the meantime.
        """
        self.ranks.stop_after_step()                    # from here on there is a run to go on with
        settings = self._flags() | identities

        taken = False
        if self.cfg.resume:
            check_same(dict(read_settings(self.folder, "config.json")), settings)
        elif self.ranks.first:
            try:
                with whole_folder(self.folder, replace=False) as folder:
                    (folder / "checkpoints").mkdir()
                    write_json(folder / "config.json", settings)
                    # Locked before it has its name: from then on a run with --resume could take it.
                    self.lock = take_lock(folder / LOCK, self.folder)
                self.lock.path = self.folder.absolute() / LOCK
            except FileExistsError:
                self.lock = None
                taken = True
        self._refuse(taken)

    def _refuse(self, taken: bool) -> None:
        """FileExistsError on every rank if the folder is `taken` on one."""
        if self.ranks.any(taken):
            raise FileExistsError(f"{self.folder} exists; continue it with --resume, or choose another --out")

    # ---- a run that has ended

    @property
    def has_ended(self) -> bool:
        """Whether this is a run that is resumed after its end: its summary.json is there, which is written last."""
        return self.cfg.resume and (self.folder / SUMMARY).exists()

    def end_again(self) -> int:
        """Say in one line how the run ended; returns the exit status that it ended with. Nothing is changed."""
        words, status = outcome(self.folder / SUMMARY)
        self.say(f"{self.folder} is finished: {words}")
        return status

    # ---- telling

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.ranks.first:
            say(text)

    def say_all(self, title: str, points: Iterable[str]) -> None:
        """Print a title and a list below it."""
        lines = [title]
        lines += [f"  - {point}" for point in points]
        self.say("\n".join(lines))

    def log(self, row: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and print one line for people."""
        if self.ranks.first:
            path = self.folder / METRICS
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

        parts = ["step {:4d}".format(row["step"])]
        parts += [form.format(row[name]) for name, form in STEP_LINE.items() if name in row]
        self.say("  ".join(parts))

    # ---- asking

    def ask(self, vlm: Asked, items: Sequence[Item], label: str, **sampling: Any) -> list[list[Completion]]:
        """generate(vlm, ...) over the chats of `items`, shared between ranks: a list (per item) of lists.

        Of a served model these are Responses, which have the same names.
        """
        def generate_part(part: Sequence[Item]) -> list[list[Completion]]:
            chats = [item.lazy_chat() for item in part]
            if isinstance(vlm, ServedModel):
                return vlm.generate(chats, max_new_tokens=self.cfg.max_new_tokens, **sampling)
            return generate(model, chats, max_new_tokens=self.cfg.max_new_tokens, **sampling)

        def prepare(part: Sequence[Item]) -> None:
            vlm.prepare([item.lazy_chat() for item in part])

        with whole(vlm) as model:
            return self.ranks.map(generate_part, items, self.cfg.sample_batch, label, prepare)

    # ---- files

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run's folder, whole or not at all."""
        if self.ranks.first:
            write_json(self.folder / name, value)

    def write_lines(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a JSON Lines file of the run's folder, whole or not at all."""
        if self.ranks.first:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_whole(self.folder / name, "".join(lines))

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write checkpoints/NAME aside, sync it and rename it; then drop all but the newest `cfg.keep`, by name.

        A checkpoint that exists is left as it is: a resumed run would only write the same again. With --shard every
        rank writes its part of it.
        """
        target = self.checkpoints / name
        if self.ranks.any(self.ranks.first and target.exists()):
            return
        if self.cfg.shard:
            write_sharded(self.ranks, target, state)
        elif self.ranks.first:
            with saving(target), whole_folder(target) as folder:
                torch.save(state, folder / "state.pt")

        if self.ranks.first:
            by_age = sorted(self.checkpoints.glob("step-*"))
            for outdated in by_age[:-self.cfg.keep]:
                shutil.rmtree(outdated)
        self.ranks.barrier()

    def load(self, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any] | None:
        """The newest checkpoint's state, None if there is none. Nothing is changed if `check` of it raises ValueError.

        What an interrupted write has left is removed, and metrics.jsonl is cut back to the checkpoint's step. Raises
        ValueError that names a damaged file, and says how to go on from an older checkpoint if there is one.
        """
        by_age = sorted(self.checkpoints.glob("step-*"))
        state = None
        refusal = None
        if by_age:
            try:
                state = read_state(by_age[-1] / "state.pt", check, self.ranks.device)
            except ValueError as error:
                way_out = ", the only checkpoint"
                if len(by_age) > 1:
                    way_out = f"; remove {by_age[-1]} to resume from {by_age[-2].name}"
                refusal = f"{error}{way_out}"
        refusals = [reason for reason in self.ranks.gather(refusal) if reason is not None]
        if refusals:                                    # what is wrong may stand in one rank's part alone
            raise ValueError(refusals[0])

        def clean_up() -> None:
            cut_metrics(self.folder / METRICS, state["step"] if state else -1)
            remove_leftovers(self.folder)
        first_or_none(self.ranks, clean_up)
        return state

    def save_candidate(self, vlm: VLM) -> Path:
        """Save a model as it would be deployed, in the dtype of the files it came from; returns its folder."""
        candidate = self.folder / "candidate"
        with whole(vlm, vlm.file_dtype) as model:
            if self.ranks.first:
                with saving(candidate):
                    save_vlm(model, candidate, vlm.file_dtype)
        self.ranks.barrier()
        return candidate

    def deploy_or_discard(self, candidate: Path, keep: bool) -> None:
        """Turn the candidate's folder into deploy/, or remove it; an older deploy/ goes either way.

        At any moment deploy/ is whole or absent. A resumed run repeats what a killed one did not finish.
        """
        self.ranks.barrier()
        if self.ranks.first:
            deploy = self.folder / "deploy"
            older = self.folder / ".deploy.old"
            if deploy.exists():
                os.replace(deploy, older)
            if keep:
                os.replace(candidate, deploy)
            for folder in (older, candidate):
                if folder.exists():
                    shutil.rmtree(folder)


def first_or_none(ranks: Ranks, work: Callable[[], None]) -> None:
    """work() on rank 0. What it refuses with a ValueError is refused on every rank, so that all end alike."""
    refusal = None
    if ranks.first:
        try:
            work()
        except ValueError as error:
            refusal = str(error)
    [refusal, *_] = ranks.gather(refusal)
    if refusal is not None:
        raise ValueError(refusal)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; NaN is a ValueError."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_state(path: Path, check: Callable[[dict[str, Any]], None] | None = None,
               device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's content; a damaged file, or one that `check` refuses, is a ValueError that names it.

    Where ranks have written shards, this rank's parts of tensors are on `device`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError,
            RecursionError, OverflowError, MemoryError, pickle.UnpicklingError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {first_line(error):.200}") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise ValueError(f"{path} is damaged: it holds no step")
    if (path.parent / SHARDS).is_dir():
        state = read_sharded(state, path.parent, torch.device(device))
    if check is not None:
        try:
            check(state)
        except ValueError as error:
            raise ValueError(f"{path} is not a checkpoint of this run: {error}") from None
    return state


def state_fields(state: Any) -> dict[str, Any]:
    """The fields of a program's State for a checkpoint: a dataclass in a list as its own fields, all else as it is.

    Nothing is copied; dataclasses.asdict would copy all that was ever answered, at every save.
    """
    content: dict[str, Any] = {}
    for name, value in vars(state).items():
        if isinstance(value, list):
            content[name] = [vars(entry) if is_dataclass(entry) else entry for entry in value]
        else:
            content[name] = value
    return content


def check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError that names the first field in which a resumed run differs.

    A served model is the same by its name alone: its server may have been started again, elsewhere.
    """
    for name in sorted(set(before) | set(now)):
        if not is_same(before.get(name), now.get(name)):
            raise ValueError(f"cannot resume: {name} is {now.get(name)!r:.200} and was {before.get(name)!r:.200} at "
                             "the start")


def is_same(before: Any, now: Any) -> bool:
    """Equal settings, or addresses of a served model by one name. One without a name may be it: start() will tell."""
    if before == now:
        return True
    if not (isinstance(before, str) and isinstance(now, str) and is_served(before) and is_served(now)):
        return False
    names = [address.partition("#")[2] for address in (before, now)]
    return names[0] == names[1] or "" in names
