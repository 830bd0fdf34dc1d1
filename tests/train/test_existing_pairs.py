"""train.py --pairs: pairs that exist are trained on as any are; nothing is sampled, and no verifier is loaded."""
from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from loop import existing_pairs
from loop.existing_pairs import answer_tokens, load_splits
from loop.loading import processor_alone
from loop.ranks import Interrupted
from loop.run import Run
from model import load_vlm
from replay import Pair, ReplayBuffer
from runs import (
    command,
    config,
    few_items,
    no_weights,
    one_sentence,
    rows,
    same_run,
    start,
    state,
    steps,
    stop_at,
    summary,
    tree,
)
from tasks.pictures import encoded_bytes
from train import Config

FLAGS = {"force": False, "items_per_round": 12, "stop_on_regression": False}


@pytest.fixture(scope="module")
def file(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RLAIF-V's columns, beside the pictures: 30 items of the task, a wrong number against their answers."""
    folder = tmp_path_factory.mktemp("elsewhere")
    lines = []
    for number, item in enumerate(few_items("bar")[:30]):
        (folder / f"{number}.png").write_bytes(encoded_bytes(item.images[0]))
        wrong = str(1 + int(item.answer) % 9)
        lines.append({"question": item.prompt[1], "chosen": item.answer, "rejected": wrong, "image": f"{number}.png"})
    path = folder / "rlaif-v.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on them that nothing interrupted."""
    out = tmp_path_factory.mktemp("pairs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sample", "score", "gate_before"):
            patch.setattr(train, name, no_weights)
        patch.setattr("model.load_vlm", no_weights)    # the verifier's
        assert start(config(out, pairs=str(file), **FLAGS)) == 3
    return out


def test_a_run_on_rlaif_v(trained: Path, file: Path) -> None:
    """No gate before; the first loss is ln 2; watched, and judged by the gate after training."""
    found, log = summary(trained), rows(trained / "metrics.jsonl")
    assert found["pre_gate"] is None and found["post_gate"]["verdict"] == "REJECT"
    assert found["loss_first"] == pytest.approx(math.log(2), abs=1e-4) and found["loss_last"] < found["loss_first"]
    assert found["baseline_accuracy"]["n"] == found["final_accuracy"]["n"] == 16
    assert "eval/accuracy" in log[0] and "eval/accuracy" in log[-1] and found["steps"] == log[-1]["step"] == 12
    assert [told["pairs"] for told in found["rounds"]] == [told["unscored"] for told in found["rounds"]] == [12, 12]
    assert found["post_gate"]["diagnosis"] == "not measured" and not (trained / "deploy").exists()
    assert not (trained / "gate_records.jsonl").exists()
    pairs = [pair for number in (1, 2) for pair in rows(trained / "pairs" / f"round-{number}.jsonl")]
    assert len({pair["item_id"] for pair in pairs}) == 24                   # no pair comes twice before all have come
    assert all(pair["chosen_score"] is None and pair["reference_chosen_logp"] < 0 for pair in pairs)


def test_the_task_keeps_away_from_the_pairs(trained: Path, file: Path, capsys: pytest.CaptureFixture) -> None:
    """By picture; by id where a row has one; by the name of a picture that a run has written from another format."""
    cfg = config(Path("x"), pairs=str(file), **FLAGS)
    splits = load_splits(cfg, few_items)
    assert "30 of 160 items of bar share an id or a picture with the pairs" in capsys.readouterr().out
    taken = {picture for item in few_items("bar")[:30] for picture in item.picture_hashes}
    for item in (*splits.watch, *splits.held_out):
        assert taken.isdisjoint(item.picture_hashes)
    assert (len(splits.gate), len(splits.watch), len(splits.held_out), len(splits.train)) == (0, 8, 16, 30)
    held_out = {row["id"] for row in rows(trained / "held_out.jsonl")}
    assert held_out == {item.id for item in splits.held_out}

    items, [pair, *_] = few_items("bar"), splits.train
    bare = replace(pair, images=(), source_id=items[70].id)
    renamed = replace(pair, images=(file.parent / f"{min(items[80].picture_hashes)}.png",))
    renamed.images[0].write_bytes(b"the same picture, encoded in another way")
    left = {item.id for item in existing_pairs.without_pairs(items, [bare, renamed])}
    renamed.images[0].unlink()
    assert {item.id for item in items} - left == {items[70].id, items[80].id}


@pytest.mark.parametrize("step", [1, 9])
def test_resumed(trained: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stopped in the first round, and in the second: the same run bit for bit."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            start(config(out, pairs=str(file), **FLAGS))
    assert state(out)["step"] == step
    assert start(config(out, pairs=str(file), resume=True, **FLAGS)) == 3
    same_run(trained, out)


def test_resume_refuses_another_file(trained: Path, file: Path, tmp_path: Path) -> None:
    """Of the same name: half of its lines are gone."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copytree(file.parent, tmp_path / "other")
    other = tmp_path / "other" / file.name
    other.write_text("".join(file.read_text().splitlines(keepends=True)[:15]))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | {"pairs": str(other)}))
    before = tree(tmp_path / "run")
    with pytest.raises(ValueError, match="^cannot resume: scorer is "):
        start(config(tmp_path / "run", pairs=str(other), resume=True, **FLAGS))
    assert tree(tmp_path / "run") == before


def test_a_runs_own_pairs_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture) -> None:
    """The folder of a run's pairs, with scores: replayed by their margin. --no-evaluate: no task, no deploy/, status 0;
    a finished run says so again."""
    out = tmp_path / "run"
    flags = {"task": None, "evaluate": False, "pairs": str(whole / "pairs"), **FLAGS}
    assert start(config(out, **flags)) == 0
    found = summary(out)
    assert found["task"] is found["pre_gate"] is found["post_gate"] is found["final_accuracy"] is None
    assert found["steps"] > 0 and found["rounds"][0]["unscored"] == 0
    assert not (out / "deploy").exists() and load_vlm(out / "candidate")
    assert "Nothing was measured (--no-evaluate)" in (out / "report.html").read_text()
    kept = state(out)["state"]
    assert kept["frozen_held_out"] == [] and len(kept["buffer"]) == sum(
        told["above_margin"] for told in found["rounds"]) > 0
    assert [set(row) & {"eval/accuracy"} for row in rows(out / "metrics.jsonl")] == [set()] * (1 + found["steps"])

    monkeypatch.setattr(train, "load_trainable", no_weights)
    capsys.readouterr()
    assert start(config(out, resume=True, **flags)) == 0
    assert "is finished: nothing was measured (--no-evaluate)" in capsys.readouterr().out
    (out / "summary.json").unlink()                     # killed before it was written
    monkeypatch.undo()
    assert start(config(out, resume=True, **flags)) == 0 and summary(out) == found


def test_tokens_are_those_of_a_turn(whole: Path) -> None:
    """The tokens of what was sampled, where the tokenizer has one way to spell it: the stop token included."""
    processor, _ = processor_alone(Config().student)
    student = load_vlm(Config().student)
    told = rows(whole / "pairs" / "round-1.jsonl")
    same = [answer_tokens(processor, pair["chosen_text"]) == tuple(pair["chosen_tokens"]) for pair in told]
    assert processor.turn_end_id in student.stop_ids and sum(same) > len(same) / 2
    assert answer_tokens(processor, "3<|im_end|>")[-1] == processor.turn_end_id
    assert processor.turn_end_id not in answer_tokens(processor, "3<|im_end|>")[:-1]


def test_pairs_without_scores_are_never_replayed() -> None:
    """At no margin gate, not even 0; and their margin is 0."""
    bare, scored = Pair("a", (1,), (2,), None, None), Pair("b", (1,), (2,), 0.5, 0.5)
    buffer = ReplayBuffer(9, 0.0)
    assert bare.margin == 0 and buffer.add([bare, scored]) == 1 and list(buffer.pairs) == [scored]


def test_reach_is_said(file: Path, capsys: pytest.CaptureFixture) -> None:
    load_splits(config(Path("x"), pairs=str(file), **FLAGS), few_items)
    assert "2 rounds of 12 come to 24 of 30 pairs; --rounds 3 comes to all\n" in capsys.readouterr().out
    load_splits(config(Path("x"), pairs=str(file), **FLAGS | {"items_per_round": 15}), few_items)
    assert "come to" not in capsys.readouterr().out


def test_long_pairs(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The prompt and the longer answer must fit into the model's positions, the prompt into --max-prompt-tokens."""
    long = json.loads(file.read_text().splitlines()[0]) | {"rejected": "how many " * 3000}
    (tmp_path / "0.png").write_bytes((file.parent / "0.png").read_bytes())
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(long | {"rejected": "x"}) + "\n")
    flags = {"task": None, "evaluate": False, "pairs": str(tmp_path / "long.jsonl"), **FLAGS}
    with pytest.raises(ValueError, match=r"'long.jsonl line 1': its prompt with candidates has \d+ tokens, the limit"):
        load_splits(config(Path("x"), **flags), few_items)
    assert len(load_splits(config(Path("x"), skip_long=True, **flags), few_items).train) == 1
    with pytest.raises(ValueError, match="none of 2 items fits"):
        load_splits(config(Path("x"), skip_long=True, max_prompt_tokens=5, **flags), few_items)


@pytest.mark.parametrize("words, told", [
    (["--pairs", "x.jsonl"], "--pairs needs --task"), (["--no-evaluate"], "no meaning without --pairs"),
    (["--pairs", "x.jsonl", "--task", "bar", "--no-evaluate"], "--task bar has no meaning with --no-evaluate"),
    (["--pairs", "x.jsonl", "--task", "bar", "--force"], "--force has no meaning with --pairs"),
    (["--pairs", "x.jsonl", "--task", "bar", "--probe-items", "9"], "--probe-items has no meaning with --pairs"),
    (["--pairs", "x.jsonl", "--task", "bar", "--train-split", "make"], "--train-split has no meaning with --pairs"),
    (["--pairs", "x.jsonl", "--no-evaluate", "--data", "y"], "--data has no meaning without --task"),
    (["--pairs", "x.jsonl", "--no-evaluate"], "x.jsonl does not exist"),
    (["--pairs", "x.jsonl", "--no-evaluate", "--resume"], "cannot resume"),
    (["--resume"], "--resume has no meaning without --task")], ids=" ".join)
def test_usage(words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture) -> None:
    """One sentence, before any weight is loaded, and no folder."""
    monkeypatch.setattr(train, "load_trainable", no_weights)
    assert command(monkeypatch, *words, "--out", str(tmp_path / "run"), "--device", "cpu") == 2
    assert told in one_sentence(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, told", [
    ({"rejected": None}, "has nothing in column 'rejected'"), ({"image": "none.png"}, "none.png does not exist"),
    ({"rejected": " "}, "the rejected answer is empty"), ({"rejected": "3", "chosen": "3"}, "are the same answer"),
    ({"rejected": "e\u0301", "chosen": "\u00e9"}, "are the same tokens"), ("cut", "is not JSON"),
    ({"image": "half.png"}, "cannot decode the picture")])
def test_bad_input(change: Any, told: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture) -> None:
    """The same from the command line, for the second of two lines."""
    shutil.copytree(file.parent, tmp_path / "data")
    (tmp_path / "data" / "half.png").write_bytes(b"no picture")
    first, second, *_ = file.read_text().splitlines()
    second = second[:-5] if change == "cut" else json.dumps(json.loads(second) | change)
    path = tmp_path / "data" / file.name
    path.write_text(f"{first}\n{second}\n")
    monkeypatch.setattr(train, "load_trainable", no_weights)
    assert command(monkeypatch, "--pairs", str(path), "--no-evaluate", "--out", str(tmp_path / "run")) == 2
    said = one_sentence(capsys)
    assert told in said and f"{path.name} line 2" in said and not (tmp_path / "run").exists()


def test_margin_gates_without_scores(file: Path, tmp_path: Path) -> None:
    """Where tau gates fresh pairs, those without scores do not reach it: nothing is trained, and it ends."""
    out = tmp_path / "run"
    assert start(config(out, task=None, evaluate=False, pairs=str(file), margin_gates="fresh", **FLAGS)) == 0
    assert summary(out)["steps"] == 0 and steps(out)[-1] == "step-000000-002"


def test_another_rank_writes_nothing(file: Path, tmp_path: Path) -> None:
    """A round on another rank: the same pairs, and nothing on disk."""
    run = Run(config(tmp_path / "run", pairs=str(file), **FLAGS), train.Ranks("cpu"))
    run.ranks.rank = 1
    splits = load_splits(run.cfg, few_items)
    pairs, counts = existing_pairs.take(run, load_vlm(Config().student), splits.train[:3], 1)
    assert len(pairs) == counts["pairs"] == 3 and not (tmp_path / "run").exists()
