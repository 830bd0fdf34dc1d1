"""A run's folder and who works on it: one process at a time, nothing lost by resuming, an end that stays the end."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from locks import held_elsewhere
from loop.ranks import Ranks, exit_status
from loop.run import Run, first_or_none, write_json
from model.checkpoint import whole_folder
from run_folder import Flags, names, resumed


@pytest.mark.parametrize("killed_after", [1, 2])
def test_whole_folder_killed_between_its_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
                                                 ) -> None:
    """The old folder steps aside, the new one comes, the old one goes: whoever writes next finishes what was begun."""
    target = tmp_path / "target"
    left = tmp_path / ".target.77.old"
    left.mkdir()
    (left / "old").write_text("old")
    if killed_after == 2:
        target.mkdir()
        (target / "new").write_text("new")
    with pytest.raises(KeyError), whole_folder(target):
        raise KeyError                                  # this writing comes to nothing, so what there was is seen
    assert names(tmp_path) == ["target"] and names(target) == ["old" if killed_after == 1 else "new"]


def test_two_processes_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is half done when the other begins and ends: neither takes the other's half, the last one counts."""
    path, real, begun = tmp_path / "a.json", Path.write_bytes, []

    def slow(self: Path, content: bytes) -> None:
        begun.append(self)
        if len(begun) == 1:
            real(self, content[:3])
            write_json(path, {"a": "second"})
            assert json.loads(path.read_text()) == {"a": "second"} and self.read_bytes() == content[:3]
        real(self, content)
    monkeypatch.setattr(Path, "write_bytes", slow)
    write_json(path, {"a": "first"})
    assert len(begun) == 2 and json.loads(path.read_text()) == {"a": "first"} and names(tmp_path) == ["a.json"]


def test_a_run_that_another_process_works_on(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Resumed meanwhile: exit 2 and one sentence that says which process, before anything is read; nothing changes."""
    lock = run.folder / ".lock"
    lock.unlink()                                       # this process's own
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n{"st')
    with held_elsewhere(lock):
        assert exit_status("train.py", lambda ranks: resumed(run, lr=0.2), Flags("")) == 2
        told = f"{run.folder} is in use by process 71 on node-3; wait for its end"
        assert capsys.readouterr().err == f"train.py: {told}\n"
        with pytest.raises(ValueError, match="is in use by"):
            resumed(run)
        assert (run.folder / "metrics.jsonl").read_text() == '{"step": 3}\n{"st'
    with pytest.raises(ValueError, match="lr is"):
        resumed(run, lr=0.2)


def test_a_new_run_holds_its_folder_from_the_first_moment(tmp_path: Path, ranks: Ranks) -> None:
    """The lock is in the folder before the folder has its name, and goes with the run."""
    run = Run(Flags(str(tmp_path / "run")), ranks)
    run.start(reference="abc")
    assert (run.folder / ".lock").read_text().startswith(f"{os.getpid()} ")
    other = resumed(run)
    del run
    assert (other.folder / ".lock").exists()
    del other
    assert names(tmp_path / "run") == ["checkpoints", "config.json"]


class Second(Ranks):
    """Rank 1 of two; what rank 0 would gather is given."""

    def __init__(self, of_first: Any):
        self.rank, self.world, self.of_first = 1, 2, of_first

    def gather(self, value: Any) -> list[Any]:
        return [self.of_first, value]


def test_what_rank_0_refuses_all_refuse(ranks: Ranks) -> None:
    def refuse() -> None:
        raise ValueError("it is in use")
    done = []
    first_or_none(ranks, lambda: done.append(1))
    assert done == [1]
    for each, work in ((ranks, refuse), (Second("it is in use"), lambda: done.append(2))):
        with pytest.raises(ValueError, match="^it is in use$"):
            first_or_none(each, work)
    first_or_none(Second(None), lambda: done.append(3))
    assert done == [1]


def test_a_damaged_log_ends_all_ranks(run: Run) -> None:
    """Rank 0 alone reads it; without its refusal the others would end as if it had been lost."""
    run.ranks = Second("metrics.jsonl, line 2 holds no step")
    run.ranks.barrier = lambda: None
    with pytest.raises(ValueError, match="line 2 holds no step"):
        run.load()


def test_the_log_is_cut_and_not_written_again(run: Run) -> None:
    """On a full disk, too, where nothing could be written."""
    path = run.folder / "metrics.jsonl"
    for step in range(4):
        run.log({"step": step})
    run.save("step-000002-001", {"step": 2})
    before = path.stat().st_ino
    resumed(run).load()
    assert path.stat().st_ino == before and path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


LOST = [                                                # what a run holds without a checkpoint, and who tells of steps
    ({"metrics.jsonl": '{"step": 0}\n{"step": 1}\n'}, "metrics.jsonl is at step 1"),
    ({"metrics.jsonl": '{"step": 0}\n{"step": 7}\n{"st'}, "metrics.jsonl is at step 7"),
    ({"summary.json": '{"steps": 12, "post_gate": {"verdict": "PROMOTE"}}'}, "summary.json is at step 12"),
    ({"metrics.jsonl": '{"step": 5}\n', "summary.json": '{"steps": 5, "deployed": 1}'}, "metrics.jsonl is at step 5")]


@pytest.mark.parametrize("held, told", LOST, ids=[told for _, told in LOST])
@pytest.mark.parametrize("folder", ["empty", "absent", "half a checkpoint"])
def test_a_run_that_has_lost_its_checkpoints(run: Run, held: dict[str, str], told: str, folder: str) -> None:
    """To start over would empty its log: it is refused, and nothing is touched."""
    if folder == "absent":
        run.checkpoints.rmdir()
    if folder == "half a checkpoint":
        (run.checkpoints / ".step-000001-001.77.new").mkdir()
    for name, text in held.items():
        (run.folder / name).write_text(text)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(ValueError, match=f"checkpoints holds no checkpoint, although {told}; put the checkpoints back"):
        resumed(run)
    assert sorted(run.folder.rglob("*")) == before
    assert {name: (run.folder / name).read_text() for name in held} == held


ENDS = [                                                # of train.py and of judge.py
    ({"post_gate": {"verdict": "PROMOTE", "difference": {}}}, "said PROMOTE, so the student is deployed", 0),
    ({"post_gate": {"verdict": "REJECT", "difference": {}}}, "said REJECT, so nothing is deployed", 3),
    ({"post_gate": {"verdict": "REJECT", "reasons": []}}, "--stop-on-regression stopped it", 3),
    ({"post_gate": None, "pre_gate": {"verdict": "BLOCK"}}, "so nothing was trained", 3),
    ({"deployed": 2}, "iteration 2 is deployed", 0), ({"deployed": None}, "so nothing is deployed", 3)]


@pytest.mark.parametrize("summary, told, status", ENDS, ids=[told for _, told, _ in ENDS])
def test_a_finished_run_ends_as_it_ended(run: Run, capsys: pytest.CaptureFixture, summary: dict[str, Any], told: str,
                                         status: int) -> None:
    assert not resumed(run).has_ended
    run.write("summary.json", summary)
    again = resumed(run)
    assert again.has_ended and again.end_again() == status
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run.folder} is finished: ") and told in shown and shown.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", "", "{}", '{"post_gate": 1}', '{"deployed": "yes"}', '{"deployed": 0}',
                                  '{"post_gate": {"verdict": "MAYBE"}}', "\xff"])
def test_a_summary_that_says_nothing(run: Run, text: str) -> None:
    run.save("step-000002-001", {"step": 2})
    (run.folder / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="summary.json") as caught:
        resumed(run).end_again()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_deploy_is_never_half(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while an older deploy/ is removed: the new one has its place already."""
    for name in ("candidate", "deploy"):
        (run.folder / name).mkdir()
        (run.folder / name / name).write_text("x")

    def killed(folder: Path) -> None:
        assert folder.name != "deploy" and names(run.folder / "deploy") == ["candidate"]
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.deploy_or_discard(run.folder / "candidate", keep=True)
    resumed(run).load()
    assert names(run.folder) == [".lock", "checkpoints", "config.json", "deploy"]
