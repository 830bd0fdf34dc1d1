"""tasks/lock.py: one process at a time, nothing left behind, killed holders keep nobody out."""
from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from locks import held_elsewhere
from tasks import lock as locks
from tasks.lock import take_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, pathlib
from tasks.lock import take_lock
lock = take_lock(pathlib.Path(sys.argv[1]), "the run")
print("held", flush=True)
sys.stdin.read()
"""


def test_it_is_there_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = take_lock(path, "the run")
    assert path.read_text().split()[0] == str(os.getpid())
    again = take_lock(path, "the run")                  # the same process, as a demo's two runs are
    assert again is lock
    del lock
    assert path.exists()
    del again
    assert not path.exists()


def test_another_process_holds_it(tmp_path: Path) -> None:
    """A real one: refused while it lives, with its number; free as soon as it was killed, though the file is there."""
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"^the run is in use by process {holder.pid} on [\w.-]+; wait for"):
            take_lock(path, "the run")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert path.exists()
    lock = take_lock(path, "the run")
    assert path.read_text().startswith(f"{os.getpid()} ")
    del lock
    assert not path.exists()


@pytest.mark.parametrize("holder", ["", "who knows\n", "71", "71 a b", "\x1b[31m", "9" * 300])
def test_a_holder_that_does_not_say(tmp_path: Path, holder: str) -> None:
    with held_elsewhere(tmp_path / "lock", holder):
        with pytest.raises(ValueError, match="^the run is in use by another process; wait for its end$"):
            take_lock(tmp_path / "lock", "the run")
        assert (tmp_path / "lock").read_text() == holder


def test_folders_that_were_made_for_it(tmp_path: Path) -> None:
    """They go with it if nothing came to lie there."""
    lock = take_lock(tmp_path / "a" / "b" / "lock", "the run")
    del lock
    assert not (tmp_path / "a").exists()
    lock = take_lock(tmp_path / "a" / "b" / "lock", "the run")
    (tmp_path / "a" / "result").write_text("")
    del lock
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_a_folder_that_is_renamed(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "aside" / "lock", "the run")
    (tmp_path / "aside").rename(tmp_path / "run")
    lock.path = tmp_path / "run" / "lock"
    assert take_lock(tmp_path / "run" / "lock", "the run") is lock
    del lock
    assert not (tmp_path / "run" / "lock").exists()


def test_removed_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ended just then: what was locked is a file that nobody else would find, so it is opened anew."""
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            path.unlink()
        real(handle, how)
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    lock = take_lock(path, "the run")
    assert len(calls) == 2 and locks.file_id(path) == locks.file_id(lock.handle)


def test_a_folder_that_is_removed_before_the_lock_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that had made it, and ended just then."""
    path, real, calls = tmp_path / "a" / "lock", locks.open_file, []

    def open_file(path: Path) -> int:
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return real(path)
    monkeypatch.setattr(locks, "open_file", open_file)
    lock = take_lock(path, "the run")
    assert len(calls) == 2 and locks.file_id(path) == locks.file_id(lock.handle)
    del lock
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("number", locks.NO_LOCKS)
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                     number: int) -> None:
    """Said once; the program goes on, and leaves no file."""
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks.say_unlocked.cache_clear()
    kept = [take_lock(tmp_path / "lock", "the run") for _ in range(3)]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path} is on a file system without locks" in told
    assert len(kept) == 3 and not (tmp_path / "lock").exists()


def test_a_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    locks.say_unlocked.cache_clear()
    take_lock(tmp_path / "lock", "the run")
    assert "this system has no file locks" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_errors_of_another_kind_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        take_lock(tmp_path / "lock", "the run")


def test_a_full_disk_locks_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "pwrite", full)
    lock = take_lock(tmp_path / "lock", "the run")
    assert lock.handle is not None


@pytest.mark.parametrize("number", locks.NOT_OURS)
def test_a_folder_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A ValueError, which all ranks of a run are told of; and 2 in all programs, for another folder mends it."""
    def refuse(path: Path, *_: object) -> int:
        raise OSError(number, os.strerror(number), str(path))
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be written: {os.strerror(number)}$"):
        take_lock(tmp_path / "lock", "the run")


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_cannot_be_a_lock(tmp_path: Path, kind: str) -> None:
    """A link is not followed: what it leads to would be emptied."""
    (tmp_path / "mine").write_text("mine")
    if kind == "folder":
        (tmp_path / "lock").mkdir()
    else:
        (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="lock is not a file that can be locked; remove it"):
        take_lock(tmp_path / "lock", "the run")
    assert (tmp_path / "mine").read_text() == "mine"
