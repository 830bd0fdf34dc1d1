"""How a program ends: its status, its one sentence, closed output, files that cannot be written."""
from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import endings
from tasks.endings import check_can_write, end, end_on_signals, exit_with, first_line, one_line, say, status_of, writing


@pytest.mark.parametrize("error, status", [
    (ValueError("--k must be at least 2"), 2), (UnicodeError("half a character"), 2), (FileExistsError("taken"), 2),
    (FileNotFoundError(errno.ENOENT, "no such file", "x"), 2), (OSError(errno.ENAMETOOLONG, "File name too long"), 2),
    (OSError(errno.ENOSPC, "No space left on device"), 1), (OSError("cannot write x"), 1),
    (ModuleNotFoundError("pip install it"), 1), (MemoryError(), 1), (FloatingPointError("NaN"), 1),
    (RuntimeError("odd"), 1)], ids=repr)
def test_status(error: Exception, status: int, capsys: pytest.CaptureFixture) -> None:
    assert status_of(error) == end("eval.py", error) == status
    printed = capsys.readouterr().err
    assert printed.startswith("eval.py: ") and printed.count("\n") == 1
    assert (str(error) or "MemoryError") in printed


def test_first_line() -> None:
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(TimeoutError()) == "TimeoutError" and first_line(KeyError()) == "KeyError"


def test_one_line() -> None:
    assert one_line("plain: caf\u00e9 'x'") == "plain: caf\u00e9 'x'"
    assert one_line(" two\n  lines\x1b[2J \ud800") == "two lines\\x1b[2J \\ud800"
    long = one_line("begin " + 10_000 * "x" + " end")
    assert len(long) == 600 and long.startswith("begin xxx") and long.endswith("xxx end") and "x ... x" in long
    assert one_line("y" * 600) == "y" * 600


def test_signals_end_the_process_with_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """On rank 0; the others are silent. Nothing is raised, so nothing can swallow it."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["/some/where/eval.py"])
    end_on_signals("interrupted; the same command continues")
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
        assert capfd.readouterr().err == "\neval.py: interrupted; the same command continues\n"
    monkeypatch.setenv("RANK", "1")
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [1, 1, 1] and capfd.readouterr().err == ""


def test_output_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said after that is dropped; the status is the work's own."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        say("nobody hears this")
        say("nor this")

    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed, pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "stdout", closed)
        exit_with(lambda: print("still in the buffer") or 3)
    assert stop.value.code == 3
    os.kill(os.getpid(), signal.SIGINT)                                 # too late to change it


def test_output_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """`> log`: one sentence and status 1, whether it fails while the work is done or at the end; then no more of it."""
    monkeypatch.setattr(sys, "argv", ["/some/where/eval.py"])
    for work in (lambda: say("at once") or 0, lambda: print("in the buffer") or 0):
        def main(work: Any = work) -> int:
            try:
                return work()
            except OSError as error:
                say("this goes nowhere")
                return end("eval.py", error)
        with open("/dev/full", "w") as full, pytest.raises(SystemExit) as stop:
            monkeypatch.setattr(sys, "stdout", full)
            exit_with(main)
        assert stop.value.code == 1
        told = "eval.py: cannot write the output: the disk is full (No space left on device)\n"
        assert capsys.readouterr().err == told
    monkeypatch.setattr(sys, "stdout", None)                            # `>&-`
    with pytest.raises(SystemExit) as stop:
        exit_with(lambda: say("nowhere") or 3)
    assert stop.value.code == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_can_write(tmp_path / "not" / "yet", "--out")
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/none")):
        with pytest.raises(ValueError, match="--out .* cannot be written"):
            check_can_write(folder, "--out")

    def denied(dir: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(endings.tempfile, "TemporaryFile", denied)
    with pytest.raises(ValueError, match=r"^--out .*new cannot be written: Permission denied"):
        check_can_write(tmp_path / "new", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_names_its_file() -> None:
    with pytest.raises(OSError, match=r"^cannot write runs/x: the disk is full \(No space left on device\)$") as full:
        with writing(Path("runs/x")):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="^cannot write runs/x: Input/output error$"):
        with writing(Path("runs/x")):
            raise OSError(errno.EIO, "Input/output error")
    assert status_of(full.value) == 1
    for passed in (FileExistsError("runs/x exists"), ValueError("not a number")):
        with pytest.raises(type(passed)) as same, writing(Path("runs/x")):
            raise passed
        assert same.value is passed
