"""The four programs end alike: the same fault, the same status, one sentence, nothing made on the disk; and signals."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval
import gate
import judge
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "model" / "tiny"
PROGRAMS: dict[str, ModuleType] = {"train": train, "judge": judge, "eval": eval, "gate": gate}
# A command line of each that would do its work; a fault adds flags to it, the last of which counts.
WORKING = {
    "train": ("--task", "bar", "--out", "run", "--device", "cpu"),
    "judge": ("--task", "bar", "--out", "run", "--device", "cpu"),
    "eval": ("--model", str(TINY / "student"), "--task", "bar", "--limit", "4", "--out", "run", "--device", "cpu"),
    "gate": ("--student", str(TINY / "student"), "--verifier", str(TINY / "verifier"), "--task", "bar", "--items", "4",
             "--out", "run/report.json", "--device", "cpu"),
}
LONG = "x" * 10_000
PATIENCE = 300                                          # seconds; other tests may share the cores
# Flags that are wrong, what is said, and the programs that have them.
FAULTS = [
    (("--device", "tpu"), "unknown device 'tpu'", "train judge eval gate"),
    (("--device", "cuda"), "torch sees no CUDA device", "train judge eval gate"),
    (("--device", "cuda:9"), "torch sees no CUDA device", "train judge eval gate"),
    (("--task", "mmmu"), "give --data", "train judge eval gate"),
    (("--task", "bear"), "bear", "train judge eval gate"),
    (("--split", "never"), "no split 'never'", "train judge eval gate"),
    (("--data", "somewhere"), "leave out --data somewhere", "train judge eval gate"),
    (("--task", "jsonl", "--data", "absent.jsonl"), "absent.jsonl", "train judge eval gate"),
    (("--task", "jsonl", "--data", LONG), "does not exist", "train judge eval gate"),
    (("--train-split", "never"), "no split 'never'", "train judge"),
    (("--trainable", "layers:5-99"), "the language model has layers 0 to", "train judge"),
    (("--resume",), "cannot resume: run is not a run", "train judge"),
    (("--student", "no/such/model"), "no/such/model", "train gate"),
    (("--verifier", "no/such/model"), "no/such/model", "train judge gate"),
    (("--verifier", LONG), "is neither a folder nor a hub id", "train judge gate"),
    (("--model", "no/such/model"), "no/such/model", "eval"),
    (("--model", LONG), "neither a folder nor a hub id", "eval"),
    (("--max-pixels", "1"), "pixels", "train judge eval gate"),
    (("--out", "/dev/null/run"), "/dev/null", "train judge eval gate"),
    (("--out", LONG), "name too long", "train judge eval"),
    (("--out", LONG), "or a file that", "gate"),
    (("--cache", "/dev/null/cache"), "--cache /dev/null/cache cannot be written", "gate"),
    (("--wrong",), "--wrong", "train judge eval gate"),
    ((f"--{LONG}",), "unrecognized arguments", "train judge eval gate"),
    (("--seed", LONG), "invalid int value", "train judge gate"),
    (("--dtype", LONG), "invalid choice", "train judge eval gate"),
    (("--dtype", "a\nb\x1b[2J"), "invalid choice", "train judge eval gate"),
]
CASES = [(program, *fault[:2]) for fault in FAULTS for program in fault[2].split()]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, without a GPU, with few items to draw, and without asking the hub for models that it does
    not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tasks.shapes.DEFAULT_ITEMS", 1200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_hub(name: str, **_: object) -> None:
        raise OSError(f"{name} was not found")
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)


def run(patch: pytest.MonkeyPatch, program: str, *words: str) -> int | str | None:
    """A program's command line in this process; its exit status."""
    patch.setattr(sys, "argv", [f"{program}.py", *words])
    try:
        module = PROGRAMS[program]
        return module.cli() if program in ("train", "judge") else module.main()
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("program, words, told", CASES,
                         ids=[f"{case[0]} {' '.join(case[1])[:30]!r}" for case in CASES])
def test_a_fault_is_the_same_everywhere(program: str, words: tuple[str, ...], told: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, program, *WORKING[program], *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{program}.py: ") and told in lines[0], lines
    assert len(lines[0]) <= 600 and lines[0].isprintable()
    assert list(tmp_path.iterdir()) == []


def test_answers_and_records_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture) -> None:
    for program, words in (("eval", ("--responses", "absent.jsonl", "--task", "bar", "--out", "run")),
                           ("eval", ("--export", "/dev/null/x.jsonl", "--task", "bar")),
                           ("gate", ("--records", "absent.jsonl", "--out", "run/report.json")),
                           ("gate", ("--records", str(tmp_path), "--out", "run/report.json"))):
        assert run(monkeypatch, program, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program, flag", [
    ("train", "--student"), ("judge", "--verifier"), ("eval", "--model"), ("gate", "--student")])
def test_a_model_that_gives_nan(program: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture) -> None:
    """Its weights are finite, and too large to be multiplied: that shows when it is first asked."""
    shutil.copytree(TINY / "student", "model")
    path = Path("model", "model.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("language_model.norm.weight"))
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, path, metadata={"format": "pt"})

    assert run(monkeypatch, program, *WORKING[program], flag, "model") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{program}.py: the model in model gives NaN or infinity")


# ---- before the flags are known to be right, torch is not imported

@pytest.mark.parametrize("program, words", [
    ("gate", ("--help",)), ("gate", ("--wrong",)), ("gate", ("--records", "absent.jsonl")),
    ("gate", ("--student", "s", "--verifier", "v", "--task", "bear")), ("eval", ("--help",)), ("eval", ("--wrong",)),
    ("eval", ("--model", "m", "--task", "mmmu"))], ids=str)
def test_wrong_flags_need_no_torch(program: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)                     # importing it is a ModuleNotFoundError
    for name in [name for name in sys.modules if name.split(".")[0] in ("loop", "model")]:
        monkeypatch.delitem(sys.modules, name)
    assert run(monkeypatch, program, *words) == (0 if words == ("--help",) else 2)


# ---- real processes

@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a program; what is left of it in the end is killed."""
    children = []

    def start(program: str, *words: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        children.append(subprocess.Popen(
            [sys.executable, str(ROOT / f"{program}.py"), *words], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return children[-1]
    yield start
    for child in children:
        child.kill()
        child.communicate()


def wait_until(child: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """Wait for something that the program does."""
    until = time.monotonic() + PATIENCE
    while not reached():
        assert child.poll() is None and time.monotonic() < until, child.communicate()
        time.sleep(0.02)


def last_line(child: subprocess.Popen) -> str:
    """What a program that was interrupted says last; no traceback stands before it."""
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1 and "Traceback" not in errors, errors
    return errors.splitlines()[-1]


def test_interrupted_while_it_works(tmp_path: Path, spawn: Callable[..., subprocess.Popen]) -> None:
    """All at once: train.py in a round, eval.py and gate.py between two batches; each keeps what it has."""
    few = ("--gate-items", "8", "--watch-items", "8", "--held-out-items", "8", "--items-per-round", "32", "--force",
           "--rounds", "99", "--eval-every", "99", "--pilot-steps", "0")
    trainer = spawn("train", *WORKING["train"], *few)
    asker = spawn("eval", *WORKING["eval"], "--limit", "4000", "--out", "answers")
    gatekeeper = spawn("gate", *WORKING["gate"], "--items", "1000", "--out", "gate/report.json")

    log = tmp_path / "run" / "metrics.jsonl"
    responses = tmp_path / "answers" / "responses.jsonl"
    wait_until(trainer, lambda: log.exists() and log.read_text().count("\n") > 2)
    trainer.send_signal(signal.SIGINT)
    wait_until(asker, lambda: responses.exists() and responses.read_text().count("\n") > 8)
    asker.send_signal(signal.SIGINT)
    wait_until(gatekeeper, lambda: len(list(tmp_path.glob("gate/gate_cache/*.json"))) > 2)
    gatekeeper.send_signal(signal.SIGTERM)

    assert last_line(trainer) == "train.py: interrupted; --resume continues from the newest checkpoint"
    assert last_line(asker) == "eval.py: interrupted; the same command continues"
    assert last_line(gatekeeper) == "gate.py: interrupted; the same command continues"

    # The step that was under way is saved.
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    last_step = log.read_text().splitlines()[-1]
    assert f'"step": {int(newest[5:11])},' in last_step
    assert responses.read_text().count("\n") >= 8


def test_interrupted_before_the_work(tmp_path: Path, spawn: Callable[..., subprocess.Popen]) -> None:
    """While torch is imported. What a signal raises there can be lost, or end in pybind11's abort."""
    children = {program: spawn(program, *WORKING[program]) for program in PROGRAMS}
    for child in children.values():
        maps = Path(f"/proc/{child.pid}/maps")
        wait_until(child, lambda: "libtorch_cpu" in maps.read_text())
        child.send_signal(signal.SIGINT)
    for program, child in children.items():
        assert last_line(child).startswith(f"{program}.py: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_output_cut_by_head(tmp_path: Path) -> None:
    """The reader goes after one line: no traceback, and the status is the verdict's."""
    record = '{"item": "%d", "correct": %s, "score": %d}\n'
    rows = [record % (item, str(right).lower(), right) for item in range(60) for right in (True, False)]
    (tmp_path / "records.jsonl").write_text("".join(rows))
    words = " ".join([sys.executable, str(ROOT / "gate.py"), *["--records", "records.jsonl"], "--out", "report.json"])
    done = subprocess.run(["bash", "-c", f"{words} | true; echo ${{PIPESTATUS[0]}}"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert (done.stdout, done.stderr) == ("0\n", "") and (tmp_path / "report.json").exists()
