"""The folders of the true-shape tests, built and removed one by one, and what each took of memory, disk and time."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from build import narrow, shorten, teach, write_checkpoint
from published import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
CORES = os.cpu_count() or 1
MOST_MEMORY = 8 * 2 ** 30                               # bytes that a process may hold at its peak
MOST_DISK = 10 * 10 ** 9                                # bytes that the folders may take together
LONGEST_PROGRAM = 600                                   # seconds
SCORES = [f'{{"score": 0.{digit}}}' for digit in range(1, 10)]       # what a verifier is taught to say
WATCH_EVERY = 0.1                                       # seconds between looks at a program's memory and disk


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "models(*names): on these of the six published models alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the tests that the marker `models` rules out. (To parametrize them would reorder the folders.)"""
    kept = []
    dropped = []
    for item in items:
        marker = item.get_closest_marker("models")
        wanted = marker is None or item.callspec.params["checkpoint"] in marker.args
        (kept if wanted else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Unlike elsewhere: here the matrices are large, and every core has work."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@dataclass
class Checkpoint:
    """One published model's folder, in a folder of its own that tests may write into."""
    name: str
    family: str
    folder: Path                                        # the model
    work: Path                                          # whatever tests write
    memory: dict[str, int] = field(default_factory=dict)        # peak bytes of each process that looked
    seconds: dict[str, float] = field(default_factory=dict)     # of processor time, the same
    disk: int = 0                                       # most bytes that were seen

    def look(self) -> None:
        """Take note of what is on the disk now."""
        sizes = []
        for folder, _, names in os.walk(self.work):     # which goes on where a program has just removed a folder
            for name in names:
                try:
                    sizes.append(os.path.getsize(os.path.join(folder, name)))
                except FileNotFoundError:               # ... or a file
                    continue
        self.disk = max(self.disk, sum(sizes))

    def run(self, program: str, *words: str) -> tuple[int, str]:
        """One of our programs in a process of its own: its exit status, and what it printed."""
        env = {**os.environ, "OMP_NUM_THREADS": str(CORES), "PYTHONPATH": str(ROOT)}
        log = self.work / f"{program}.log"
        before = seconds_of_programs()
        with open(log, "w") as output:
            child = subprocess.Popen([sys.executable, program, *words], cwd=ROOT, env=env, stdout=output,
                                     stderr=subprocess.STDOUT)
            try:
                self._watch(child, program)
            finally:
                child.kill()
                child.wait()
        self.seconds[program] = self.seconds.get(program, 0) + seconds_of_programs() - before
        return child.returncode, log.read_text()

    def _watch(self, child: subprocess.Popen, program: str) -> None:
        """Wait for a program; meanwhile look at its memory, and at the disk."""
        end = time.monotonic() + LONGEST_PROGRAM
        while child.poll() is None:
            assert time.monotonic() < end, f"{program} takes longer than {LONGEST_PROGRAM} s"
            self.memory[program] = max(self.memory.get(program, 0), peak_memory(child.pid))
            self.look()
            time.sleep(WATCH_EVERY)


def peak_memory(process: int | str = "self", field: str = "VmHWM") -> int:
    """The most bytes that a process has held at once so far, as Linux counts them; 0 where nobody counts.

    With the field "VmRSS" what it holds now.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) * 1024 if lines else 0      # a process that has just ended holds nothing


def forget_peak_memory() -> None:
    """Let peak_memory() of this process count from now."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


@pytest.fixture(scope="session", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """The six folders, one after the other; each is removed before the next one is built. Checks what they took."""
    name = request.param
    work = tmp_path_factory.mktemp("true_shapes")
    begun = time.process_time()
    forget_peak_memory()
    held_before = peak_memory(field="VmRSS")            # by tests of other things, in a run of all of them
    folder = write_checkpoint(work / name, shorten(CONFIGS[name]))
    held = Checkpoint(name, CONFIGS[name]["model_type"], folder, work)
    held.look()
    yield held

    held.memory["tests"] = peak_memory() - held_before
    held.seconds["tests"] = time.process_time() - begun
    shutil.rmtree(work)
    print(report(held))
    assert max(held.memory.values()) <= MOST_MEMORY, held.memory
    assert held.disk <= MOST_DISK


@pytest.fixture(scope="session")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that gives scores."""
    folder = tmp_path_factory.mktemp("partner") / "verifier"
    write_checkpoint(folder, narrow(CONFIGS["Qwen3-VL-2B"]))
    teach(folder, SCORES)
    return folder


def seconds_of_programs() -> float:
    """Processor time of the programs that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def report(held: Checkpoint) -> str:
    """One line: what a configuration took."""
    total = sum(held.seconds.values())
    line = f"{held.name}: {total:.0f} s of processor time, {held.disk / 1e9:.1f} GB on the disk"
    for process, seconds in held.seconds.items():
        line += f"; {process} {seconds:.0f} s, {held.memory[process] / 2 ** 30:.1f} GiB"
    return line


def flags(**values: object) -> Sequence[str]:
    """A command line of a program's flags."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words
