"""One process at a time: a lock on a file, which the system frees when its holder ends, however it ends.

A lock file is there while someone holds it. A holder that is killed leaves it behind; that keeps nobody out. It names
its holder, for the message that another process ends with.
"""
from __future__ import annotations

import errno
import functools
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from weakref import WeakValueDictionary

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:                             # Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # a file system that has none
NO_FILE = (errno.EISDIR, errno.ELOOP)                   # a folder, or a link, is where the lock file is to be
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)     # somebody else's folder, or one that nobody may write to
HOLDER = re.compile(r"(\d{1,20}) ([\w.-]{1,99})\s*")    # what a lock file holds: process id, host

FileId = tuple[int, int]                                # device and inode


class Lock:
    """A lock, made by `take_lock`. It is held for as long as anything refers to this object, and freed then."""

    def __init__(self, path: Path):
        self.path = path.absolute()                     # to be changed where its folder is renamed
        self.handle: int | None = None                  # of the open file; None where nothing is locked
        self.made = make_folders(self.path.parent)

    def __del__(self) -> None:
        """Remove the file, then free the lock; folders that were made for it go, too, if nothing else is in them."""
        if self.handle is not None:
            # Removed while it is still locked: it is never a file that another process has just locked.
            with suppress(OSError):
                if file_id(self.path) == file_id(self.handle):
                    self.path.unlink()
            os.close(self.handle)
        for folder in reversed(self.made):
            with suppress(OSError):
                folder.rmdir()


HELD: WeakValueDictionary[FileId, Lock] = WeakValueDictionary()     # this process's own


def take_lock(path: Path, what: str | Path) -> Lock:
    """Lock the file `path`, which is made, with its folders, where it is missing.

    `what` is used by one process at a time; where that is another one, a ValueError says which. Who takes a lock again
    that this process holds is given the same object. Where there are no locks this is said once, and nothing is locked.
    """
    lock = Lock(path)
    if fcntl is None:
        say_unlocked("this system has no file locks")
        return lock

    while True:
        try:
            handle = open_file(path)
        except FileNotFoundError:                       # another process has removed the folder that it had made
            made = make_folders(path.parent)
            if not made:
                raise
            lock.made += made
            continue
        identity = file_id(handle)
        if identity in HELD:
            os.close(handle)
            return HELD[identity]
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = read_holder(handle)
            os.close(handle)
            raise ValueError(f"{what} is in use by {holder}; wait for its end") from None
        except OSError as error:
            os.close(handle)
            if error.errno == errno.ESTALE:             # removed by its holder on another machine
                continue
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            say_unlocked(f"{path.parent} is on a file system without locks ({error.strerror})")
            return lock

        # Its holder may have removed the file after we opened it: then we have locked what nobody else will find.
        if file_id(path) != identity:
            os.close(handle)
            continue
        write_holder(handle)
        lock.handle = handle
        HELD[identity] = lock
        return lock


def open_file(path: Path) -> int:
    """Open the lock file for writing, without which network file systems do not lock it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno in NO_FILE:
            raise ValueError(f"{path} is not a file that can be locked; remove it") from None
        if error.errno in NOT_OURS:
            raise ValueError(f"{path.parent} cannot be written: {error.strerror}") from None
        raise


def file_id(file: Path | int) -> FileId | None:
    """What tells a file, by its path or its open handle, from every other; None where there is none."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that were missing, the outermost first."""
    missing = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def write_holder(handle: int) -> None:
    """Write down who holds the lock. It is for people: a disk that is full is no reason to refuse the lock."""
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def read_holder(handle: int) -> str:
    """Who holds the lock, "process 71 on node-3", as far as the file says."""
    text = ""
    with suppress(OSError):
        text = os.pread(handle, 200, 0).decode(errors="replace")
    found = HOLDER.fullmatch(text)
    return f"process {found[1]} on {found[2]}" if found else "another process"


@functools.cache
def say_unlocked(reason: str) -> None:
    """Say once that two processes would not be kept apart."""
    print(f"{reason}: do not start the same command twice", file=sys.stderr)
