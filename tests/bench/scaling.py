"""How cost grows with the number of candidates, and falls with the number of ranks, each beside its law.

    python tests/bench/scaling.py [--json FILE] [--quick]

    sampling, scoring, scoring_logits       bench.py's lines with K = 2, 4, 8, 16, 32 candidates
    dpo_step                                bench.py's line on 1 and on 2 ranks

Every process has one thread. The law: seconds grow as floating-point operations do. A prompt is computed once for all
of its candidates, so from K to 2 K they less than double; two ranks have half of them each. "of law" is measured
seconds over these. It falls below 1 where a step is bound by the weights, which it reads once for all candidates. On
two ranks it lies above 1 by what these say to each other.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import child

CANDIDATES = (2, 4, 8, 16, 32)
RANKS = (1, 2)
JOBS = ("sampling", "scoring", "scoring_logits")


def beside_law(line: str, counts: tuple[int, ...], seconds: list[float], work: list[float]) -> list[dict[str, Any]]:
    """A row for each count: the law starts at the first one."""
    rows = []
    for count, measured, operations in zip(counts, seconds, work, strict=True):
        law = seconds[0] * operations / work[0]
        rows.append({"line": line, "count": count, "seconds": measured, "law": law, "of_law": measured / law})
    return rows


def measure(size: str, folder: Path) -> list[dict[str, Any]]:
    """All rows; every figure comes from a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"                 # as torchrun has it: a rank more is a core more
    child("ours", "checkpoint", size, folder)
    rows = []
    for job in JOBS:
        found = [child("ours", job, size, folder, samples=count) for count in CANDIDATES]
        rows += beside_law(job, CANDIDATES, [x["seconds"] for x in found], [x["flops"] for x in found])

    found = [child("ours", "dpo", size, folder, ranks=count) for count in RANKS]
    work = [found[0]["flops"] / count for count in RANKS]
    rows += beside_law("dpo_step", RANKS, [x["seconds"] for x in found], work)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'line':16}{'K or ranks':>10}{'seconds':>10}{'law':>10}{'of law':>8}"]
    for row in rows:
        lines.append(f"{row['line']:16}{row['count']:>10}{row['seconds']:>10.3f}{row['law']:>10.3f}"
                     f"{row['of_law']:>8.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run?")
    args = parser.parse_args()
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure("quick" if args.quick else "cpu", Path(folder))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
