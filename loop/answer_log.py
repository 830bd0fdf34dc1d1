"""What servers answered, one line a request, written as it comes: what was asked once is not asked again.

    {"key": SHA-256 of the request, "value": what was answered, "digest": SHA-256 of both}
    {"key": .., "failed": why it failed for good}

A line that was cut short, or that holds something else than was written, is not believed. Files grow by whole lines, so
several processes on one machine may add to the same one; on several machines each rank has a file of its own.
"""
from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

from tasks.endings import writing


class AnswerLog:
    """Answers by their requests' keys. It adds to `path`, and reads `path` and all `others` at the first look."""

    def __init__(self, path: Path, *others: Path):
        self.path = path
        self.others = others
        self.lock = threading.Lock()
        self.answers: dict[str, Any] | None = None      # None: nothing was read yet
        self.failed: set[str] = set()                   # requests that have failed for good and were not answered since

    def get(self, key: str) -> Any | None:
        """What was answered to the request; None where it has to be asked."""
        with self.lock:
            if self.answers is None:
                self._read()
            return self.answers.get(key)

    def count_failed(self) -> int:
        """How many requests have failed for good and were not answered since."""
        self.get("")                                    # so that all is read
        return len(self.failed)

    def add(self, key: str, value: Any) -> None:
        """Keep an answer."""
        self._append({"key": key, "value": value, "digest": digest([key, value])})
        with self.lock:
            self.answers[key] = value
            self.failed.discard(key)

    def add_failure(self, key: str, reason: str) -> None:
        """Note that a request has failed for good; it will be asked again."""
        self._append({"key": key, "failed": reason})
        with self.lock:
            self.failed.add(key)

    def _append(self, row: dict[str, Any]) -> None:
        """Write one line at the end of the file, behind whole lines."""
        with self.lock, writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                line = json.dumps(row).encode() + b"\n"
                if file.tell() and not ends_with_newline(file):
                    line = b"\n" + line                 # half a line was left by a process that was killed
                file.write(line)

    def _read(self) -> None:
        self.answers = {}
        for path in dict.fromkeys([self.path, *self.others]):
            if path.is_file():
                for line in path.read_bytes().split(b"\n"):
                    self._read_line(line)
        self.failed -= self.answers.keys()

    def _read_line(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            return
        if "failed" in row:
            self.failed.add(row["key"])
        elif row.get("digest") == digest([row["key"], row.get("value")]):
            self.answers[row["key"]] = row["value"]


def ends_with_newline(file: BinaryIO) -> bool:
    """Whether the last byte of a file that is not empty, opened for reading too, ends a line."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
