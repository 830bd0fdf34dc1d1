"""The benchmark program runs on a toy, so that a change elsewhere cannot break it unseen."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import counts
import scaling
from pretended_cuda import taped_graphs

BENCH = Path(__file__).with_name("bench.py")


def test_quick(tmp_path: Path) -> None:
    out, names = tmp_path / "bench.json", ["dpo_step", "dpo_memory", "host_time", "load_memory"]
    done = subprocess.run([sys.executable, BENCH, "--quick", "--json", out, "--lines", *names], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert [line["name"] for line in written["lines"]] == names and written["machine"]
    for line in written["lines"]:
        assert line["ours"] > 0 and line["unit"] and (line["ratio"] is None) == (line["peer"] is None)
        assert line["ratio"] is None or abs(line["ratio"] - line["ours"] / line["peer"]) < 1e-6 * line["ratio"]


def test_floors_are_added() -> None:
    """Operations at a product's rate, bytes at a copy's."""
    machine = {"copy": 10.0, "torch.float32": 100.0}
    ours = {"seconds": 8.0, "dtype": "torch.float32", "flops": 200.0, "bytes": 20.0}
    assert bench.share(ours, machine) == pytest.approx((2 + 2) / 8)
    assert bench.share({"seconds": 8.0, "dtype": "torch.float32", "bytes": 20.0}, machine) == pytest.approx(2 / 8)
    assert bench.share({"seconds": 8.0, "dtype": "torch.float32"}, machine) is None


def test_replays_of_a_graph_are_counted() -> None:
    a = torch.ones(4, 4)
    with taped_graphs(), FlopCounterMode(display=False) as counter:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            b = a @ a
        before = counter.get_total_flops()
        for _ in range(3):
            graph.replay()
    assert counter.get_total_flops() - before == 3 * 2 * 4 ** 3 and b.tolist() == [[4.0] * 4] * 4
    assert torch.cuda.CUDAGraph.__name__ == "CUDAGraph"


def test_counts_of_a_toy(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each phase; the host does not wait in a decode step, and looks three times in a micro-batch."""
    assert counts.main(["--quick", "--prompts", "2", "--pairs", "2", "--samples", "2"]) == 0
    rows = re.findall(r"^([a-z -]+?) +(\d+) +(\d+) +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    looks = {name: int(count) for name, _, count, _ in rows}
    assert list(looks) == ["features", "prefill", "decode step", "micro-batch"]
    assert looks["decode step"] == 0 and looks["micro-batch"] <= 3
    with pytest.raises(SystemExit):
        counts.main(["--samples", "0"])


def test_scaling_beside_its_law() -> None:
    """Seconds grow as operations do, from the first row on."""
    first, second = scaling.beside_law("sampling", (2, 4), [1.0, 1.2], [10.0, 15.0])
    assert first["of_law"] == 1.0 and second["law"] == 1.5 and second["of_law"] == pytest.approx(0.8)
    assert "sampling" in scaling.table([first, second])
