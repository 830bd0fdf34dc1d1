"""A run from outside: work shared between processes, files that are whole or absent, a log cut back, flags compared."""
from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from loop.ranks import Interrupted, LostRank, Ranks, exit_status
from loop.run import Run, check_same, write_json
from model.checkpoint import folder_digest, whole_folder
from run_folder import Flags, names, resumed

ON_CPU = Flags("")                                      # what exit_status reads of a program's flags

# ---- processes

@pytest.mark.parametrize("count, size", [(10, 3), (9, 3), (2, 64), (1, 1), (0, 4)])
def test_map_keeps_the_order(ranks: Ranks, count: int, size: int) -> None:
    chunks = []

    def double(chunk: list[int]) -> list[int]:
        chunks.append(list(chunk))
        return [2 * x for x in chunk]
    assert ranks.map(double, range(count), size, "doubling") == [2 * x for x in range(count)]
    assert chunks == [list(range(i, min(i + size, count))) for i in range(0, count, size)]


class Share(Ranks):
    """One of several processes, which run one after another: what each would gather is put together afterwards."""

    def __init__(self, rank: int, world: int, parts: list[Any], pretended: list[Any] | None = None):
        self.rank, self.world, self.stop_requested, self.is_uninterrupted = rank, world, False, False
        self.parts, self.pretended = parts, pretended

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, bool):
            return [value]
        self.parts.append(value)
        return self.pretended or [{number: [] for number in range(99)}]


def test_chunks_do_not_depend_on_the_processes() -> None:
    """Three processes take the chunks that one takes, each some, none twice; put together they are in order."""
    seen: dict[int, list[list[int]]] = {}
    for world in (1, 2, 3, 7):
        chunks, parts = [], []

        def part(chunk: list[int]) -> list[int]:
            chunks.append(list(chunk))
            return [10 * x for x in chunk]
        for rank in range(world):
            Share(rank, world, parts).map(part, list(range(20)), 3, "sharing")
        seen[world] = sorted(chunks)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        whole = Share(0, world, [], parts).map(part, list(range(20)), 3, "sharing")
        assert whole == [10 * x for x in range(20)]
    assert seen[1] == seen[2] == seen[3] == seen[7] and len(seen[1]) == 7


def test_map_stops_between_chunks(ranks: Ranks) -> None:
    """SIGTERM, from the system itself: the chunk that is under way is finished, no other is begun."""
    done = []
    ranks.stop_after_step()

    def work(chunk: list[int]) -> list[int]:
        os.kill(os.getpid(), signal.SIGTERM) if 2 in chunk else None
        done.extend(chunk)
        return list(chunk)
    with pytest.raises(Interrupted):
        ranks.map(work, list(range(10)), 2, "working")
    assert done == [0, 1, 2, 3] and ranks.stop_requested
    with pytest.raises(Interrupted):
        ranks.map(work, [5], 2, "more work")
    assert done == [0, 1, 2, 3]


def test_map_is_patient_where_it_is_told(ranks: Ranks) -> None:
    """A look that belongs to a step is finished; what comes after it is not begun."""
    with ranks.uninterrupted():
        ranks.stop_requested = True
        assert ranks.map(list, list(range(10)), 2, "looking") == list(range(10))
    with pytest.raises(Interrupted):
        ranks.map(list, list(range(10)), 2, "sampling")


def test_one_process_without_torchrun(ranks: Ranks) -> None:
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True) and ranks.device == torch.device("cpu")
    assert ranks.gather("x") == ["x"] and ranks.any(True) and not ranks.any(False)
    assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))


def test_the_other_ranks_are_gone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """An error of torch.distributed, of many lines, is one sentence; an error of the work itself stays what it is."""
    def closed(*_: Any) -> None:
        raise RuntimeError("[/gloo/pair.cc:553] Connection closed by peer. Good luck\nException raised from\nframe #0")
    for name in ("all_gather_object", "all_reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, closed)
    two = Share(1, 2, [])
    monkeypatch.setattr("loop.ranks.Ranks", lambda device: two)
    for work in (lambda r: Ranks.gather(r, 1), lambda r: r.sum(torch.ones(1)), lambda r: r.barrier()):
        assert exit_status("train.py", work, ON_CPU) == 1
        assert capsys.readouterr().err == "train.py: rank 1 cannot reach the other ranks: Connection closed by peer\n"
    with pytest.raises(LostRank):
        two.sum(torch.ones(1))
    with pytest.raises(RuntimeError, match="^shape$"):
        exit_status("train.py", lambda r: closed_by_work(), ON_CPU)


def closed_by_work() -> int:
    raise RuntimeError("shape")


@pytest.mark.parametrize("device", ["abacus", "cuda"])
def test_devices_that_are_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device '{device}'"):
        Ranks(device)


# ---- folders and files

def test_whole_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with whole_folder(target) as folder:
        (folder / "a").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == (target / "sub" / "b").read_text() == "new"
    assert names(target.parent) == ["target"]
    with whole_folder(target) as folder:
        (folder / "c").write_text("newer")
        assert names(target) == ["a", "sub"]
    assert names(target) == ["c"] and names(target.parent) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whole_folder_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    for existed in (False, True):
        if existed:
            target.mkdir()
            (target / "old").write_text("old")
        with pytest.raises(error), whole_folder(target) as folder:
            (folder / "half").write_text("ha")
            raise error
        assert names(tmp_path) == ["target"] * existed
    assert names(target) == ["old"]


def test_whole_folder_that_replaces_nothing(tmp_path: Path) -> None:
    """Neither a folder that was there nor one that appeared meanwhile; an error of another kind stays what it is."""
    target = tmp_path / "target"
    with whole_folder(target, replace=False) as folder:
        (folder / "a").write_text("first")
    for late in (False, True):
        late and target.rename(tmp_path / "later")
        with pytest.raises(FileExistsError, match="target exists"), whole_folder(target, replace=False) as folder:
            (folder / "b").write_text("second")
            late and (tmp_path / "later").rename(target)
        assert names(tmp_path) == ["target"] and (target / "a").read_text() == "first"


def test_write_json_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})                           # not JSON
    assert json.loads(path.read_text()) == {"a": 1} and path.read_text().endswith("\n")

    def torn(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:3])
        raise OSError("disk full")
    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# ---- a run's folder

def test_start_writes_what_the_run_depends_on(run: Run) -> None:
    assert json.loads((run.folder / "config.json").read_text()) == {
        "lr": 0.1, "keep": 2, "shard": False, "reference": "abc"}
    assert names(run.folder) == [".lock", "checkpoints", "config.json"]


def test_folders_that_are_no_runs(run: Run, tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(FileExistsError, match="run exists; continue it with --resume"):
        Run(Flags(str(run.folder)), ranks)
    (tmp_path / "other").mkdir()
    for name in ("other", "absent"):
        with pytest.raises(ValueError, match=f"{name} is not a run, it holds no config.json"):
            Run(Flags(str(tmp_path / name), resume=True), ranks)


def test_two_runs_of_one_folder(tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture) -> None:
    """Begun at the same time: the second loses nothing of the first, and is told what it would have been told later."""
    first, second = (Run(Flags(str(tmp_path / "run")), ranks) for _ in range(2))
    first.start(reference="abc")
    first.save("step-000001-001", {"step": 1})
    assert exit_status("train.py", lambda ranks: second.start(reference="abd"), ON_CPU) == 2
    assert capsys.readouterr().err == (
        f"train.py: {tmp_path / 'run'} exists; continue it with --resume, or choose another --out\n")
    assert names(tmp_path) == ["run"] and resumed(first).load() == {"step": 1}
    resumed(first).start(reference="abc")


@pytest.mark.parametrize("text, told", [("[1]", "does not hold a JSON object"), ('{"lr": 0.', "is not JSON"),
                                        ("", "is not JSON"), ("\xff", "is not JSON")])
def test_resume_from_damaged_flags(run: Run, text: str, told: str) -> None:
    (run.folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json {told}"):
        resumed(run).start(reference="abc")


def test_resume_compares_flags_and_identities(run: Run) -> None:
    resumed(run).start(reference="abc")
    resumed(run, device="other").start(reference="abc")
    with pytest.raises(ValueError, match=r"^cannot resume: lr is 0\.2 and was 0\.1 at the start$"):
        resumed(run, lr=0.2).start(reference="abc")
    with pytest.raises(ValueError, match="^cannot resume: reference is 'abd' and was 'abc'"):
        resumed(run).start(reference="abd")


def test_check_same_names_the_field() -> None:
    check_same({"a": 1, "b": None}, {"b": None, "a": 1})
    for before, now, field in (({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b"), ({"a": 1}, {"a": 1, "new": 2}, "new"),
                               ({"a": 1, "old": 2}, {"a": 1}, "old"), ({"a": "1"}, {"a": 1}, "a")):
        with pytest.raises(ValueError, match=f"^cannot resume: {field} is "):
            check_same(before, now)


def test_checkpoints(run: Run) -> None:
    """The newest is loaded; all but the newest two are dropped; one that exists is left as it is."""
    assert run.load() is None
    for step in (9, 10, 100):
        run.save(f"step-{step:06d}-001", {"step": step, "weights": torch.full((2,), float(step))})
    assert names(run.checkpoints) == ["step-000010-001", "step-000100-001"]
    run.save("step-000100-001", {"step": -1})
    found = resumed(run).load()
    assert found["step"] == 100 and found["weights"].tolist() == [100, 100]
    run.save("step-000100-002", {"step": 100})
    assert names(run.checkpoints) == ["step-000100-001", "step-000100-002"]


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "list", "no step", "absent"])
def test_damaged_checkpoints(run: Run, damage: str) -> None:
    """One sentence that says what to remove; nothing is lost, and without the damaged one the run goes on."""
    def spoil(path: Path) -> None:
        if damage in ("list", "no step"):
            torch.save([1, 2] if damage == "list" else {"steps": 1}, path)
        elif damage == "absent":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "garbage": b"garbage\n", "truncated": path.read_bytes()[:-100]}[damage])
    run.log({"step": 2})
    older, newest = (run.checkpoints / f"step-00000{step}-001" for step in (1, 2))
    for step, folder in enumerate((older, newest), 1):
        run.save(folder.name, {"step": step, "weights": torch.ones(99)})
    spoil(newest / "state.pt")
    with pytest.raises(ValueError, match=re.escape(str(newest / "state.pt")) + " is damaged: .+; "
                       + re.escape(f"remove {newest} to resume from {older.name}") + "$"):
        resumed(run).load()
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 2}\n'
    newest.rename(run.folder / "damaged")
    assert resumed(run).load()["step"] == 1
    spoil(older / "state.pt")
    with pytest.raises(ValueError, match="is damaged: .*, the only checkpoint$"):
        resumed(run).load()


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b"{}", b'{"step": "x"}', b"\xff", b"[" * 100_000])
def test_a_damaged_log(run: Run, line: bytes) -> None:
    path = run.folder / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    run.save("step-000002-001", {"step": 2})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 holds no step: "):
        resumed(run).load()
    assert path.read_bytes() == before


def test_a_failed_save_leaves_the_older_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        run.save(f"step-{step:06d}-001", {"step": step})

    def torn(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        run.save("step-000003-001", {"step": 3})
    assert names(run.checkpoints) == ["step-000001-001", "step-000002-001"] and run.load()["step"] == 2


def test_load_removes_what_a_killed_write_left(run: Run) -> None:
    run.save("step-000001-001", {"step": 1})
    left = run.checkpoints / ".step-000002-001.77.new"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    assert resumed(run).load()["step"] == 1
    assert names(run.checkpoints) == ["step-000001-001"]


def test_load_removes_what_a_killed_candidate_left(run: Run) -> None:
    """Of the folder of weights that the gate after training asks, of an older deploy/, of a file that was written."""
    for name in (".candidate.77.new", ".candidate.77.old", ".deploy.old"):
        left = run.folder / name
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    (run.folder / "summary.json.12ab.tmp").write_text("{")
    resumed(run).load()
    assert names(run.folder) == [".lock", "checkpoints", "config.json"]


def test_a_leftover_of_the_same_process_number(tmp_path: Path) -> None:
    """Numbers come again, in containers with nearly every start."""
    left = tmp_path / f".target.{os.getpid()}.new"
    left.mkdir()
    (left / "half").write_text("ha")
    with whole_folder(tmp_path / "target") as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["target"] and names(tmp_path / "target") == ["a"]


def test_load_cuts_the_log(run: Run) -> None:
    """Lines after the checkpoint's step, and half a line at the end."""
    path = run.folder / "metrics.jsonl"
    for step in range(4):
        run.log({"step": step, "loss": 0.1 * step})
    whole = path.read_text()
    run.save("step-000002-001", {"step": 2})
    path.write_text(whole + '{"step": 4, "lo')
    resumed(run).load()
    assert path.read_text().splitlines() == whole.splitlines()[:3] and path.read_text().endswith("\n")
    path.write_text(whole.splitlines()[0] + "\n" + '{"step": 1, "loss": 0.1}')       # whole, but for its line's end
    resumed(run).load()
    assert path.read_text() == whole.splitlines()[0] + "\n"


def test_load_without_a_checkpoint_empties_the_log(run: Run) -> None:
    run.log({"step": 0, "eval/accuracy": 0.5})
    assert resumed(run).load() is None and (run.folder / "metrics.jsonl").read_text() == ""


def test_log_is_read_by_machines_and_people(run: Run, capsys: pytest.CaptureFixture) -> None:
    row = {"step": 3, "loss": 0.69314, "rewards/margins": -0.5, "eval/accuracy": 0.25, "pairs": 7}
    run.log(row)
    assert json.loads((run.folder / "metrics.jsonl").read_text()) == row
    assert capsys.readouterr().out == "step    3  loss 0.6931  margin -0.500  watched accuracy 0.250\n"
    with pytest.raises(ValueError):
        run.log({"step": 4, "loss": float("nan")})
    assert json.loads((run.folder / "metrics.jsonl").read_text()) == row


@pytest.mark.parametrize("keep", [True, False])
def test_deploy_or_discard(run: Run, keep: bool) -> None:
    """deploy/ is the candidate or nothing; one of an earlier end does not stay."""
    for name in ("candidate", "deploy"):
        (run.folder / name).mkdir()
        (run.folder / name / name).write_text("x")
    run.deploy_or_discard(run.folder / "candidate", keep)
    assert not (run.folder / "candidate").exists()
    assert (names(run.folder / "deploy") == ["candidate"]) if keep else not (run.folder / "deploy").exists()


def test_lines_are_whole(run: Run) -> None:
    run.write_lines("pairs/round-1.jsonl", iter([{"a": "ä"}, {"a": 2}]))
    assert (run.folder / "pairs" / "round-1.jsonl").read_text(encoding="utf-8") == '{"a": "ä"}\n{"a": 2}\n'
    run.write("summary.json", {"a": 1})
    assert json.loads((run.folder / "summary.json").read_text()) == {"a": 1}
    assert names(run.folder / "pairs") == ["round-1.jsonl"]


def test_digest_of_a_folder(tmp_path: Path) -> None:
    """It depends on the names and bytes of weights and settings, and on nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    first = folder_digest(folder)
    (folder / "README.md").write_text("about it")
    assert folder_digest(folder) == first
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert folder_digest(folder) != first
    (folder / "model.safetensors").write_bytes(b"weights")
    assert folder_digest(folder) == first
    (folder / "config.json").rename(folder / "other.json")
    assert folder_digest(folder) != first
