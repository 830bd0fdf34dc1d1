"""How a program ends: with which exit status, with which sentence, and what a signal does. Standard library only.

    0  done or passed
    1  something went wrong while running: a full disk, no memory, a package that is missing, a signal
    2  what the caller can mend: a flag, or a file or folder that a flag names
    3  a gate said no

train.py, judge.py and eval.py end by this file; gate.py, which also runs alone, keeps to the same rule by itself.
An exception that is not EXPECTED is a mistake of ours: it stays a traceback.
"""
from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

LONGEST = 600                                   # characters of the last sentence, the program's name included
# These end a program with one sentence; FloatingPointError: a loss or a model's logits that are NaN or infinite.
EXPECTED = (ValueError, OSError, ModuleNotFoundError, MemoryError, FloatingPointError)
# A file or folder that is not there, is of another kind, or is not to be read; what fails in writing is another matter.
NAMES = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
NO_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
FULL = (errno.ENOSPC, errno.EDQUOT)
STOPPING = (signal.SIGINT, signal.SIGTERM)      # Ctrl-C; what schedulers send before they kill


# ---- the status and the sentence

def end(program: str, error: BaseException) -> int:
    """Say in one sentence why the program ends; returns its exit status."""
    say_last(program, str(error) or type(error).__name__)
    return status_of(error)


def status_of(error: BaseException) -> int:
    """2 where the caller can mend it, 1 for what went wrong while running."""
    if isinstance(error, (ValueError, *NAMES)):
        return 2
    if isinstance(error, OSError) and error.errno in NO_NAMES:
        return 2
    return 1


def say_last(program: str, message: str) -> None:
    """Print the sentence that a program ends with, to stderr."""
    print(one_line(f"{program}: {message}"), file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text in one line of at most `longest` characters, cut in the middle; what cannot be printed is escaped."""
    joined = " ".join(line.strip() for line in text.strip().splitlines())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in joined)
    if len(shown) <= longest:
        return shown

    gap = " ... "
    tail = longest // 3
    head = longest - tail - len(gap)
    return shown[:head] + gap + shown[-tail:]


# ---- signals

def is_first_process() -> bool:
    """Whether this process speaks for the run: it is alone, or torchrun calls it rank 0."""
    return os.environ.get("RANK", "0") == "0"


def end_on_signals(words: str) -> None:
    """From now on SIGINT and SIGTERM end the process at once, with these words and exit status 1.

    They raise no exception: in an import or a destructor it would be swallowed or printed. Nothing is lost by it, for
    files appear whole or not at all, and what grows by lines is read as far as its lines are whole.
    """
    line = f"\n{Path(sys.argv[0]).name}: {words}\n"         # a progress bar, or ^C, stands in the line before

    def end_now(number: int, frame: FrameType | None) -> None:
        try:
            if is_first_process():
                os.write(2, line.encode())
        finally:
            os._exit(1)                                     # even if nobody reads stderr

    for number in STOPPING:
        signal.signal(number, end_now)


# ---- output that nobody reads any more, or that cannot be written

def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its status, even where its output is closed (`| head`)."""
    try:
        sys.exit(main())
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)           # the status is settled, the interpreter takes its time
        try:
            with printing():
                if sys.stdout is not None:                  # None: it was closed from the beginning (`>&-`)
                    sys.stdout.flush()
        except OSError as error:
            sys.exit(end(Path(sys.argv[0]).name, error))


def say(text: str = "") -> None:
    """Print at once. After whoever read the output has gone the rest of it is dropped, and the work goes on."""
    with printing():
        print(text, flush=True)


@contextmanager
def printing() -> Iterator[None]:
    """Around what writes to stdout. Once that fails, what is still to come of it goes nowhere.

    A reader that has gone is no error; a disk that is full is an OSError that says so.
    """
    try:
        yield
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"cannot write the output: {reason_of(error)}") from None


# ---- files that are written

def check_can_write(folder: Path, flag: str) -> None:
    """ValueError where files cannot be made in `folder`, which need not exist yet. Leaves nothing behind."""
    existing = folder.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be written: {error.strerror} ({existing})") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the writing of a file or folder: an OSError says which one, and whether the disk is full."""
    try:
        yield
    except FileExistsError:                                 # not a matter of writing: somebody was faster
        raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {reason_of(error)}") from None


def reason_of(error: OSError) -> str:
    """Why something cannot be written, in words."""
    reason = error.strerror or str(error)
    return f"the disk is full ({reason})" if error.errno in FULL else reason
