"""The shipped models behind `transformers serve`: the programs find the same of them as when they are loaded."""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eval as eval_program
import gate
from loop import survey
from runs import few_items

ROOT = Path(gate.__file__).parent
TINY = ROOT / "model" / "tiny"
COSTS = ("seconds_per_verdict", "tokens_per_verdict", "parameters", "cost")
SECONDS_TO_START = 600                                  # on a machine that is busy

for package in ("transformers", "torchvision", "fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason='needs pip install "transformers[serving]" torchvision')


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that loads what it is asked for: a model's name is its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    program = str(ROOT / "tests" / "helpers" / "serve_transformers.py")
    with log.open("w") as file:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen([sys.executable, program, "--device", "cpu", "--port", str(port)], cwd=ROOT, env=env,
                                  stdout=file, stderr=file)
    try:
        wait_for(f"http://localhost:{port}/health", server, log)
        yield f"http://localhost:{port}/v1"
    finally:
        server.kill()
        server.wait()


def wait_for(health: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers."""
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(health, timeout=5).close()
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no server after {SECONDS_TO_START} s: {log.read_text()}")


def report_of(out: Path, student: str, verifier: str, **flags: Any) -> dict[str, Any]:
    """gate.py's report, without what names and costs the verifier."""
    values = {"student": student, "verifier": verifier, "task": "bar", "items": 16, "k": 4, "max_new_tokens": 16,
              "verdict_tokens": 32, "device": "cpu", "out": out} | flags
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert gate.main(words) in (0, 3)
    text = out.read_text().replace(json.dumps(verifier)[1:-1], "VERIFIER")
    return {name: value for name, value in json.loads(text).items() if name not in COSTS}


def test_the_gate_says_the_same_of_a_served_verifier(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "load_task", few_items)
    student = str(TINY / "student")
    verifier = str(TINY / "verifier")
    local = report_of(tmp_path / "local" / "report.json", student, verifier)
    served = report_of(tmp_path / "served" / "report.json", student, f"{url}#{verifier}")
    assert local == served and local["records"] == 64


def test_a_served_student_is_surveyed(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greedy answers are the local one's; its samples are the server's own. This server passes over n."""
    monkeypatch.setattr(survey, "load_task", few_items)
    student = str(TINY / "student")
    verifier = str(TINY / "verifier")
    local = report_of(tmp_path / "local" / "report.json", student, verifier)
    served = report_of(tmp_path / "served" / "report.json", f"{url}#{student}", verifier)
    assert served["records"] == local["records"] and served["failed_requests"] == 0
    assert served["own_answer_accuracy"] == local["own_answer_accuracy"]
    assert served["greedy_accuracy"] == local["greedy_accuracy"]


def test_an_evaluation_is_the_same(url: str, tmp_path: Path) -> None:
    for name, model in (("local", str(TINY / "student")), ("served", f"{url}#{TINY / 'student'}")):
        words = ["--model", model, "--task", "bar", "--limit", "30", "--max-new-tokens", "16"]
        assert eval_program.main([*words, "--out", str(tmp_path / name)]) == 0
    for file in ("report.json", "answers.jsonl"):
        assert (tmp_path / "local" / file).read_text() == (tmp_path / "served" / file).read_text()


def test_no_log_probabilities(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture) -> None:
    """This server gives none: one sentence."""
    monkeypatch.setattr(survey, "load_task", few_items)
    words = ["--student", str(TINY / "student"), "--verifier", f"{url}#{TINY / 'verifier'}", "--task", "bar", "--items",
             "2", "--k", "2", "--verdict", "logits", "--device", "cpu", "--out", str(tmp_path / "report.json")]
    assert gate.main(words) == 2
    assert "gives no log-probabilities (top_logprobs)" in capsys.readouterr().err.splitlines()[-1]
