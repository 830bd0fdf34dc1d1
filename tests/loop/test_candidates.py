"""gate.py --candidates: a log's responses in place of sampling, by the shipped models and by files alone."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gate
import harness_logs as made
from eval import load_task, score
from loop import survey
from loop.cached_model import CachedModel
from loop.candidates import read_candidates
from loop.lengths import fitting, verifier_uses
from loop.survey_flags import SurveyConfig
from replay import check_record, gather_records
from tasks import Item
from tasks.jsonl import Response

TINY = Path(gate.__file__).parent / "model" / "tiny"
K, ITEMS = 4, 12


def lmms_log(path: Path, said: dict[str, list[str]]) -> Path:
    """A log of the task `bar`, as lmms-eval writes those of a task of one's own."""
    rows = [made.lmms_row(k, "?", texts, {"bar_acc": {"id": name, "is_correct": True}})
            for k, (name, texts) in enumerate(said.items())]
    return made.write_lines(path, rows)


def texts(found: Any, name: str) -> list[str]:
    return [response.text for response in found.samples[name]]


# ---- the whole gate

@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """The task's items, as many as a test can wait for."""
    items = load_task("bar", limit=20)
    monkeypatch.setattr(survey, "load_task", lambda *_: items)
    return items


def test_a_log_of_what_the_student_sampled_gives_the_same_report(few: list[Item], tmp_path: Path, capsys) -> None:
    """All but what only the student can tell: its greedy answers, and what depends on them."""
    flags = ["--verifier", TINY / "verifier", "--task", "bar", "--items", ITEMS, "--max-new-tokens", 16,
             "--verdict-tokens", 16, "--batch-size", 6, "--device", "cpu", "--cache", tmp_path / "cache"]
    words = [str(word) for word in flags]
    out = tmp_path / "report.json"
    gate.main([*words, "--student", str(TINY / "student"), "--k", str(K), "--out", str(out)])
    sampled = json.loads(out.read_text())

    cfg = SurveyConfig(student=str(TINY / "student"), verifier=["-"], task="bar", k=K, max_new_tokens=16, batch_size=6,
                       items=ITEMS, device="cpu")
    items, _ = survey.draw_twice(few, cfg)
    student = CachedModel(cfg.student, cfg, tmp_path / "cache")
    said = [[response.text for response in row] for row in student.samples(items)]
    assert "vlm" not in vars(student)                                   # what the first gate asked for
    log = lmms_log(tmp_path / "log.jsonl", {item.id: row for item, row in zip(items, said)})

    capsys.readouterr()
    code = gate.main([*words, "--candidates", str(log), "--out", str(out)])
    logged = json.loads(out.read_text())
    assert code in (0, 3) and "student" not in capsys.readouterr().err.replace("student's", "")     # is not loaded
    same = ("records", "items", "rubric_accuracy", "baseline_accuracy", "direction", "mixed_share", "pick_lift",
            "own_answer_accuracy", "answer_parse_rate", "min_margin", "balanced_accuracy")
    assert {name: logged[name] for name in same} == {name: sampled[name] for name in same}
    assert "greedy_accuracy" in sampled and "greedy_accuracy" not in logged
    assert "answer_truncation_rate" in sampled and "answer_truncation_rate" not in logged
    [told] = [reason for reason in logged["reasons"] if reason.startswith("candidates:")]
    assert f"{K} an item, on {ITEMS} items of {log}; nothing was sampled" in told
    assert f"{len(few) - ITEMS} items of the task are not in the logs" in told
    assert "greedy answers are not measured" in told


def test_what_the_gate_refuses(few: list[Item], tmp_path: Path, capsys) -> None:
    """Each in one sentence, before a model is loaded."""
    log = str(lmms_log(tmp_path / "log.jsonl", {item.id: ["1"] for item in few}))
    common = ["--verifier", "absent", "--task", "bar", "--out", str(tmp_path / "report.json")]
    for words, message in [
            (["--candidates", log], "no item has more than one response, and the gate needs 2 candidates an item"),
            (["--candidates", log, "--student", "s"], "give one of --student and --candidates"),
            (["--candidates", log, "--k", "4"], "--k says how to sample"),
            (["--candidates", log, "--temperature", "0.5"], "--temperature says how to sample"),
            (["--candidates", str(tmp_path / "gone")], "cannot read"), ([], "--student or --candidates"),
            (["--candidates", log, "--records", "x"], "give --records, or")]:
        assert gate.main([*common, *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and len(error) < 600
    assert gate.main([*common[:4], "--candidates", log, "--out", log]) == 2
    assert "is the file of --candidates" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl"]


# ---- what logs hold

def test_several_logs_are_put_side_by_side(tmp_path: Path) -> None:
    """Two runs of VLMEvalKit, one response each, and one of lmms-eval."""
    items = made.items_of("mmmu")
    one = made.write_table(tmp_path / "1.tsv", made.kit_mmmu(["A", "B", "A", "1", "2", "I"]))
    two = made.write_records(tmp_path / "2.json", made.kit_mmmu(["A", "C", "Failed to obtain answer via API.", "3", "4",
                                                                 "H"]))
    row = made.MMMU_ROWS[4]
    three = made.write_lines(tmp_path / "3.jsonl", [made.lmms_row(4, "I", ["D", "E"], made.mmmu_metrics(row, ["D"]))])
    found = read_candidates([str(path) for path in (three, two, one)], items)
    assert [item.id for item in found.items] == [items[0].id, items[2].id, items[3].id, items[4].id]
    assert texts(found, items[0].id) == ["C", "B"] and texts(found, items[4].id) == ["D", "E", "H", "I"]
    told = found.told()
    assert "candidates: 2 to 4 an item, on 4 items of " in told and "1 rows hold no answer and are left out" in told
    assert "1 items have one response alone" in told and "2 rows of the logs are about no item of the task" in told
    assert "items of the task are not" not in told


def test_lines_of_our_own(tmp_path: Path) -> None:
    items = made.items_of("blink")
    rows = [{"id": items[0].id, "response": "A", "finish_reason": "length"}, {"id": items[0].id, "response": "B"},
            {"id": items[1].id, "response": "C"}, {"id": "z", "response": "C"}]
    path = made.write_lines(tmp_path / "r.jsonl", rows)
    found = read_candidates([str(path)], items)
    assert found.items == items[:1] and texts(found, items[0].id) == ["A", "B"]
    assert "2 items of the task are not in the logs; 1 rows of the logs" in found.told()
    with pytest.raises(ValueError, match="no line of .* is about an item"):
        read_candidates([str(made.write_lines(path, rows[3:]))], items)


def test_pairs_are_judged_as_they_were_shown(tmp_path: Path) -> None:
    items = made.items_of("vl_rewardbench")
    path = made.write_table(tmp_path / "v.tsv", made.kit_vl(["Answer 1 is better"] * 6, [1.0] * 6))
    found = read_candidates([str(path), str(path)], items)
    assert {item.swapped for item in found.items} == {True, False} and len(found.items) == 6
    lines = made.write_lines(tmp_path / "l.jsonl", [{"id": item.id, "response": "x", "swapped": not item.swapped}
                                                    for item in found.items])
    with pytest.raises(ValueError, match="line 1: pair 'RLAIF-V-1#0' has responses to both orders"):
        read_candidates([str(path), str(lines)], items)
    found = read_candidates([str(lines), str(lines)], items)
    assert [item.swapped for item in found.items] == [False, True, False, True, False, True]


# ---- records and lengths

def test_what_is_not_known_is_not_false() -> None:
    [item] = load_task("bar", limit=1)
    verdict = SimpleNamespace(value=0.5, truncated=False)
    [record] = gather_records(
        [item], greedy=lambda _: [None], sample=lambda _: [[Response("3")]], score=lambda *_: [[verdict]],
        own=lambda _: [Response("3", None, "length")], correct=score)
    check_record(record)
    assert record["candidate_truncated"] is None and record["own_truncated"] is True
    assert not {"greedy_correct", "greedy_parsed", "greedy_truncated"} & record.keys()


def test_candidates_have_the_length_that_they_have() -> None:
    """A log's may be longer than --max-new-tokens, or shorter: the prompts that hold them count."""
    items = load_task("bar", limit=2)
    cfg = SurveyConfig(student="s", verifier=["v"], task="bar", max_new_tokens=4, verdict_tokens=4)
    for kind, each in (("json", 1), ("pairwise", 2)):
        uses = verifier_uses(TINY / "verifier", cfg, kind)
        use = uses[-1]
        framed = use.processor.count_tokens(use.frame(items[0].chat()))
        room = (use.limit - framed) // each
        token = use.processor.encode("1" * 50)
        fits = "1" * (50 * (room // len(token)))
        said = {items[0].id: ["2", fits], items[1].id: ["2"]}
        assert fitting(items, uses, False, said) == items
        said[items[0].id] = ["2", fits + "1" * 100]
        assert fitting(items, uses, True, said) == items[1:]
        with pytest.raises(ValueError, match="its prompt with candidates has"):
            fitting(items, uses, False, said)
