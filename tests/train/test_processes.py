"""Several processes: torchrun with gloo gives the run of one process."""
from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from runs import DRIVER, argv, config, log, rows, spawn, start, state, steps, summary, tree

PROCESSES = """
real = train.main
def both(cfg, ranks):
    few = replace(cfg, out=cfg.out + "-lonely", batch_size=1, steps_per_round=3, pilot_steps=0)
    return max(real(each, ranks) for each in (cfg, few))
train.main = both"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """torchrun, gloo: the same pilot, the same pairs in round one, the same steps; then batches of one pair, so that
    a process has none. Gradients are compared by their norm too, since Adam does not see a wrong scale."""
    flags = {"rounds": 1, "items_per_round": 80, "steps_per_round": 20, "batch_size": 9, "sample_batch": 16,
             "eval_every": 10, "micro_tokens": 180, "pilot_steps": 2, "pilot_items": 40}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "driver.py").write_text(DRIVER % PROCESSES)
    two = spawn(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
                 str(tmp_path / "driver.py")], *argv(config(tmp_path / "two", **flags)))
    assert two.stdout.count("gate after training: REJECT") == 2, two.stderr
    one = config(tmp_path / "one", **flags)
    start(one)
    start(replace(one, out=str(tmp_path / "one-lonely"), batch_size=1, steps_per_round=3, pilot_steps=0))
    pilots = [summary(tmp_path / name)["pre_gate"]["pilot"] for name in ("one", "two")]
    assert pilots[0] | {"seconds": 0} == pilots[1] | {"seconds": 0} and pilots[0]["asked"] > 0
    for name, count in (("", 20), ("-lonely", 3)):
        runs = [tmp_path / ("one" + name), tmp_path / ("two" + name)]
        found = [rows(run / "pairs" / "round-1.jsonl") for run in runs]
        assert len(found[0]) > 3 and found[0] == found[1]
        assert tree(runs[0] / "pairs") == tree(runs[1] / "pairs")           # with the pictures; nothing is left aside
        assert (runs[0] / "gate_records.jsonl").read_bytes() == (runs[1] / "gate_records.jsonl").read_bytes()
        logs = [log(run) for run in runs]
        assert len(logs[0]) == count + 1
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        weights = [state(run)["model"] for run in runs]
        start_weights = state(runs[0], steps(runs[0])[0])["model"]
        moved = max((weights[0][n] - start_weights[n]).abs().max() for n in weights[0])
        apart = max((weights[0][n] - weights[1][n]).abs().max() for n in weights[0])
        assert apart < 1e-5 < moved
