"""loop/probe.py: what is measured again between rounds, what it warns of, and that it changes nothing else."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from eval import score as exact_match
from gate import proportion
from loop.probe import Probe, measure_pairs
from loop.ranks import Interrupted
from model import Completion
from replay import Pair
from runs import config, equal, few_items, log, same_run, start, state, stop_at, summary
from tasks import Item
from verifier import Score

FINE = Probe(2, 40, 40, proportion(18, 20), 1, 1, 0.75)
pytestmark = pytest.mark.usefixtures("few_tasks")


def turns_round(patch: pytest.MonkeyPatch, after: int) -> None:
    """In place of train.score: grades well the first `after` times that it is asked, then the other way round."""
    asked: list[int] = []

    def score(run: Any, verifier: Any, items: list[Item], candidates: list[list[Completion]]) -> list[list[Score]]:
        asked.append(len(items))
        rows = []
        for item, row in zip(items, candidates, strict=True):
            right = [exact_match(item, completion.text).correct == (len(asked) <= after) for completion in row]
            rows.append([Score(float(value), "") for value in right])
        return rows
    patch.setattr(train, "score", score)


def pair(item: Item, chosen: str, rejected: str) -> Pair:
    return Pair(item.id, (1,), (2,), 0.9, 0.1, chosen_text=chosen, rejected_text=rejected)


def test_pairs_are_measured() -> None:
    """Direction of the mixed pairs, and on which side alone an answer is found."""
    items = few_items("bar")[:7]
    right = [str(item.answer) for item in items]
    pairs = [pair(items[0], right[0], "10"), pair(items[1], right[1], "none"), pair(items[2], "10", right[2]),
             pair(items[3], "none", right[3]), pair(items[4], "none", "10"), pair(items[5], "10", "11")]
    seen = measure_pairs(2, items, pairs)
    assert (seen.round, seen.items, seen.pairs) == (2, 7, 6)
    assert seen.direction == proportion(2, 4)
    assert (seen.chosen_unread, seen.rejected_unread) == (2, 1)
    assert seen.p_form == pytest.approx(0.5)            # two or more heads of three coins


def test_what_it_warns_of() -> None:
    assert FINE.holds
    assert replace(FINE, direction=proportion(6, 20)).holds                 # perhaps 1/2
    assert not replace(FINE, direction=proportion(5, 20)).holds             # shown to be below
    assert replace(FINE, direction=proportion(0, 0)).holds                  # nothing is known
    assert replace(FINE, p_form=0.051).holds and not replace(FINE, p_form=0.05).holds
    assert "before round 2 q is 0.900" in FINE.reason and "on 20 mixed pairs of 40 items" in FINE.reason


def test_a_verifier_that_turns_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate and round 1 are asked first; then the probe sees it, and the run ends before round 2."""
    turns_round(monkeypatch, after=2)
    flags = {"gate_items": 40, "probe_items": 40, "watch_items": 8, "held_out_items": 8}
    stopped = tmp_path / "stopped"
    assert start(config(stopped, stop_on_regression=True, **flags)) == 3
    found = summary(stopped)
    [seen] = found["probes"]
    assert seen["round"] == 2 and seen["items"] == 40 and seen["direction"]["high"] < 0.5
    assert found["post_gate"]["reasons"] == found["warnings"]
    assert found["warnings"][0].startswith("the verifier is exploited: before round 2")
    assert len(found["rounds"]) == 1 and found["steps"] == 6

    turns_round(monkeypatch, after=2)
    forced = tmp_path / "forced"
    assert start(config(forced, **flags)) == 3          # --force goes on to the end, and rejects there
    assert len(summary(forced)["rounds"]) == 2 and "difference" in summary(forced)["post_gate"]


def test_the_run_is_the_same(tmp_path: Path) -> None:
    """With and without probes: the same pairs, steps, weights and answers, bit for bit."""
    one, other = tmp_path / "one", tmp_path / "other"
    start(config(one))
    start(config(other, probe_items=8))
    for name in ("pairs/round-1.jsonl", "pairs/round-2.jsonl", "held_out.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert log(one) == log(other)
    assert equal(state(one)["model"], state(other)["model"])
    assert summary(one)["probes"] == [] and len(summary(other)["probes"]) == 1


def test_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the last step before the probe, and after it: the same run in the end."""
    whole = tmp_path / "whole"
    start(config(whole, probe_items=8))
    for step in (6, 8):
        out = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Interrupted):
                start(config(out, probe_items=8))
        start(config(out, probe_items=8, resume=True))
        same_run(out, whole)
