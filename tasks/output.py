"""The files of an evaluation: where they are, and how one that was interrupted goes on."""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.jsonl import write_whole
from tasks.loading import read_json_object, shown
from tasks.lock import Lock, take_lock


@dataclass
class Output:
    """Where an evaluation's files are, and what keeps other processes from writing them meanwhile."""
    report: Path
    answers: Path
    responses: Path
    served: Path                                                # what a server answered, as it came
    config: Path
    page: Path
    lock: Path
    settings: dict[str, Any] = field(default_factory=dict)      # what the answers depend on
    held: Lock | None = None

    @property
    def written(self) -> tuple[Path, ...]:
        """The files that an evaluation writes."""
        return self.report, self.answers, self.responses, self.served, self.config, self.page, self.lock

    def check_unused(self) -> None:
        """ValueError where another process writes these files. It looks before a model is loaded, and holds nothing."""
        if self.lock.exists():
            take_lock(self.lock, self.report)

    def reopen(self) -> None:
        """Keep other processes out, and make sure that what is there was answered under the same settings.

        ValueError where another process writes these files, or they hold answers of other settings. No file is changed.
        """
        self.held = take_lock(self.lock, self.report)
        if not self.responses.exists():
            return
        before = self._earlier_settings()
        for name, now in self.settings.items():
            if before.get(name) != now:
                raise ValueError(f"{self.responses} holds answers of another run: {name} was "
                                 f"{shown(before.get(name))}, is {shown(now)}; give another --out")

    def _earlier_settings(self) -> dict[str, Any]:
        """What the settings' file holds; ValueError if it is not an object."""
        if not self.config.exists():
            return {}
        try:
            return read_json_object(self.config)
        except ValueError as error:
            raise ValueError(f"{error}; give another --out") from None

    def begin(self) -> None:
        """Write the settings down, and cut off half a line that an interruption may have left of the responses."""
        write_whole(self.config, json.dumps(self.settings, indent=1))
        if not self.responses.exists():
            return
        written = self.responses.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            with self.responses.open("r+b") as file:
                file.truncate(whole)


def output_files(out: str | Path) -> Output:
    """The files of a run: in the folder `out`, or beside the report where `out` is X.json."""
    out = Path(out)
    beside = out.suffix == ".json"
    folder = out.parent if beside else out
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; give a folder, or X.json")
    start = out.stem + "." if beside else ""
    return Output(
        report=out if beside else folder / "report.json",
        answers=folder / f"{start}answers.jsonl",
        responses=folder / f"{start}responses.jsonl",
        served=folder / f"{start}served.jsonl",
        config=folder / f"{start}config.json",
        page=folder / f"{start or 'report.'}html",
        lock=folder / f".{start}lock")
