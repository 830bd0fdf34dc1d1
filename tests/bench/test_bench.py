"""The benchmark program runs on a toy, so that a change elsewhere cannot break it unseen."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
