"""gate.py, eval.py and train.py with models behind a server: reports, what is told apart, and going on after the server
was gone."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eval as eval_program
import gate
import train
from fake_server import FakeServer, Fault, prompt_of, serving
from loop import endpoint, survey
from runs import command, config, few_items, one_sentence, summary
from verifier import CANDIDATE, RUBRIC

TINY = Path(gate.__file__).parent / "model" / "tiny"
NEVER = 10 ** 9


class Rule:
    """Answers as a model would: the n-th of its samples is a digit, verdicts like what the candidate's last digit
    says. From request `breaks_at` on, and to a prompt that holds `poison`, it answers 500 and 400."""

    def __init__(self) -> None:
        self.breaks_at = NEVER
        self.poison: str | None = None
        self.answered: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any], number: int) -> Any:
        if number >= self.breaks_at:
            return Fault(500)
        prompt = prompt_of(body)
        if self.poison and self.poison in prompt:
            return Fault(400, b"cannot read this")
        sent = {name: value for name, value in body.items() if name != "response_format"}
        self.answered[json.dumps(sent)] += 1
        if prompt.startswith(RUBRIC):
            digits = re.findall(r"\d", prompt.rpartition(CANDIDATE)[2])
            return json.dumps({"score": int(digits[-1]) / 10 if digits else 0.0})
        return [str((body["seed"] + draw) % 9 + 1) for draw in range(body.get("n", 1))]


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Rule:
    monkeypatch.setattr(survey, "load_task", few_items)
    monkeypatch.setattr(train, "load_task", few_items)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return Rule()


@pytest.fixture
def server(rule: Rule) -> Iterator[FakeServer]:
    with serving(rule) as found:
        yield found


def ask_gate(server: FakeServer, out: Path, **flags: Any) -> int:
    """gate.py with both models served."""
    values = {"student": server.model, "verifier": server.model, "task": "bar", "items": 30, "k": 4, "out": out,
              "device": "cpu", "concurrency": 4} | flags
    return gate.main([word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))])


def told(capsys: pytest.CaptureFixture, program: str) -> str:
    """The one line of stderr that begins with the program's name."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    [line] = [line for line in lines if line.startswith(program)]
    assert len(line) < 600
    return line


def held(folder: Path) -> bytes:
    """All that lies below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_gate_whose_server_was_gone(rule: Rule, server: FakeServer, tmp_path: Path,
                                      capsys: pytest.CaptureFixture) -> None:
    """One sentence wherever it happens, and the same command goes on; what was answered is not asked again. The report
    is that of an undisturbed run."""
    assert ask_gate(server, tmp_path / "whole" / "report.json") in (0, 3)
    expected = json.loads((tmp_path / "whole" / "report.json").read_text())
    total = rule.answered.total()
    assert expected["failed_requests"] == 0 and expected["parameters"] is None and "tokens_per_verdict" in expected
    rule.answered.clear()

    out = tmp_path / "broken" / "report.json"
    for broken_after in (7, 40, 50):                    # among the student's answers, samples, verdicts
        rule.breaks_at = len(server.bodies) + broken_after
        capsys.readouterr()
        assert ask_gate(server, out) == 1 and not out.exists()
        line = told(capsys, "gate.py")
        assert "requests to" in line and "HTTP 500" in line and "more than --max-failed 0.01 allows" in line
    rule.breaks_at = NEVER
    assert ask_gate(server, out) in (0, 3)
    assert rule.answered.total() == total and set(rule.answered.values()) == {1}
    report = json.loads(out.read_text())
    assert {**report, "seconds_per_verdict": 0} == {**expected, "seconds_per_verdict": 0}
    assert b"sk-secret" not in held(tmp_path)


def test_failed_requests_are_no_unread_verdicts(rule: Rule, server: FakeServer, tmp_path: Path) -> None:
    """Within --max-failed the gate goes on, counts them and says so; they are asked for again by the next command."""
    flags = {"items": 12, "k": 2, "max_failed": 0.5}
    rule.poison = CANDIDATE + "1"                       # all verdicts on the candidate 1
    assert ask_gate(server, tmp_path / "report.json", **flags) in (0, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed_requests"] > 0
    assert f"{report['failed_requests']} requests to served models failed for good" in report["reasons"][-1]
    rule.poison = None
    rule.answered.clear()
    assert ask_gate(server, tmp_path / "report.json", **flags) in (0, 3)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["failed_requests"] == 0 and rule.answered.total() == report["failed_requests"]


def test_a_student_that_fails_is_not_judged(rule: Rule, server: FakeServer, tmp_path: Path) -> None:
    """What a served student was not asked successfully: its candidates are empty and no verifier sees them."""
    refused = set()

    def say(body: dict[str, Any], number: int) -> Any:
        picture = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if "image_url" in part)
        if not refused:
            refused.add(picture)
        return Fault(400) if picture in refused else rule(body, number)
    server.say = say
    assert ask_gate(server, tmp_path / "report.json", items=10, max_failed=0.3) in (0, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    [picture] = refused
    assert report["failed_requests"] == 2 and report["items"] == 10         # its greedy answer, and its samples
    verdicts = [body for body in server.bodies if prompt_of(body).startswith(RUBRIC)]
    assert verdicts and not any(picture in json.dumps(body) for body in verdicts)


def evaluate(*words: Any) -> int:
    return eval_program.main([str(word) for word in words])


def test_an_evaluation_whose_server_was_gone(rule: Rule, server: FakeServer, tmp_path: Path,
                                             capsys: pytest.CaptureFixture) -> None:
    words = ["--model", server.url, "--task", "bar", "--limit", 30, "--max-new-tokens", 4, "--out", tmp_path / "o",
             "--concurrency", 3]
    rule.breaks_at = 12
    assert evaluate(*words) == 1
    assert "of 30 requests to" in told(capsys, "eval.py") and not (tmp_path / "o" / "report.json").exists()
    rule.breaks_at = NEVER
    assert evaluate(*words) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert rule.answered.total() == 30 and set(rule.answered.values()) == {1}
    assert report["failed"] == 0 and report["accuracy"]["n"] == 30 and report["mean_tokens"] == 2
    assert json.loads((tmp_path / "o" / "config.json").read_text())["model"] == server.model
    server.models = ["another"]                         # behind the same address
    assert evaluate(*words) == 2 and "holds answers of another run: model was" in told(capsys, "eval.py")
    assert b"sk-secret" not in held(tmp_path)


def test_an_evaluation_with_failed_requests(rule: Rule, server: FakeServer, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    """They count as wrong, are told apart, and are asked for again by the same command."""
    items = [{"id": f"q{k}", "question": f"say {k}", "images": [], "answer": "1", "answer_type": "integer",
              "choices": None, "precision": None} for k in range(20)]
    task = tmp_path / "items.jsonl"
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    words = ["--model", server.model, "--task", "jsonl", "--data", task, "--out", tmp_path / "o", "--max-failed", 0.1]
    rule.poison = "say 7"
    assert evaluate(*words) == 0 and "failed requests, which count as wrong" in capsys.readouterr().out
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["failed"] == 1 and report["accuracy"]["value"] == 0.95
    assert len((tmp_path / "o" / "responses.jsonl").read_text().splitlines()) == 19
    rule.poison = None
    rule.answered.clear()
    assert evaluate(*words) == 0 and rule.answered.total() == 1
    assert json.loads((tmp_path / "o" / "report.json").read_text())["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("flag", ["--max-pixels", "--max-prompt-tokens"])
def test_flags_without_meaning_for_a_server(flag: str, server: FakeServer, tmp_path: Path,
                                            capsys: pytest.CaptureFixture) -> None:
    words = ["--model", server.model, "--task", "bar", "--limit", 2, "--out", tmp_path / "o", flag, 100]
    assert evaluate(*words) == 2 and f"{flag} has no meaning for a served model" in told(capsys, "eval.py")
    assert not (tmp_path / "o").exists() and not server.bodies


def test_a_run_whose_verifier_was_gone(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    """One sentence; --resume goes on with the model's name, wherever its server is now, and asks no verdict twice. The
    run is the one that was not disturbed."""
    def run(name: str, server: FakeServer, *words: str) -> int:
        cfg = config(tmp_path / name, verifier=server.model, rounds=1, steps_per_round=2, force=True)
        given = [f"--{field.replace('_', '-')}={getattr(cfg, field)}" for field in (
            "task", "device", "gate_items", "watch_items", "held_out_items", "items_per_round", "rounds", "k",
            "min_pairs", "epochs", "steps_per_round", "pilot_steps", "eval_every", "out", "verifier", "min_low")]
        return command(monkeypatch, *given, "--force", *words)
    with serving(rule) as server:
        assert run("whole", server) == 3
    total = rule.answered.total()
    rule.answered.clear()
    with serving(rule) as server:
        rule.breaks_at = 30
        capsys.readouterr()
        assert run("broken", server) == 1
        assert "more than --max-failed 0.01 allows; what was answered is kept" in one_sentence(capsys)
    rule.breaks_at = NEVER
    with serving(rule) as elsewhere:
        assert run("broken", elsewhere, "--resume", "--concurrency", "2") == 3
    assert rule.answered.total() == total and set(rule.answered.values()) == {1}
    whole, broken = summary(tmp_path / "whole"), summary(tmp_path / "broken")
    assert whole == broken and whole["failed_requests"] == 0
    saved = json.loads((tmp_path / "broken" / "config.json").read_text())
    assert saved["scorer"] == "a/served-model" and saved["verifier"] == server.model and "concurrency" not in saved
    assert b"sk-secret" not in held(tmp_path)
