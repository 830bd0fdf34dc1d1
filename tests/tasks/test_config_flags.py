"""Command-line flags from a dataclass."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tasks.flags import build_parser, check_ranges, flag, parse_flags


@dataclass(frozen=True)
class Config:
    lr: float = flag(1e-4, "peak learning rate, 100% of it", low=0, high=1)
    steps: int = flag(3, "how many", low=1)
    kind: str = flag("a", "which kind", choices=("a", "b"))
    out: str | None = flag(None, "where to")
    limit: int | None = flag(None, "at most", low=1)
    fast: bool = flag(False, "hurry")
    careful: bool = flag(True, "look twice")
    names: list[str] = flag([], "several")
    numbers: list[int] = flag([1, 2], "several numbers")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.out == "nowhere":
            raise ValueError("nowhere is no place")


def parse(*argv: str) -> Config:
    return parse_flags(Config, "What it does.", list(argv))


def test_defaults() -> None:
    assert parse() == Config() and (parse().lr, parse().out, parse().numbers) == (1e-4, None, [1, 2])
    assert parse().names is not parse().names                           # no list is shared


@pytest.mark.parametrize("argv, name, value", [
    ("--lr 0.5", "lr", 0.5), ("--lr=1", "lr", 1.0), ("--lr 0", "lr", 0.0), ("--steps 1", "steps", 1),
    ("--kind b", "kind", "b"), ("--out x", "out", "x"), ("--limit 1", "limit", 1), ("--fast", "fast", True),
    ("--no-fast", "fast", False), ("--no-careful", "careful", False), ("--careful", "careful", True),
    ("--names a b", "names", ["a", "b"]), ("--numbers 7", "numbers", [7])])
def test_flags(argv: str, name: str, value: Any) -> None:
    found = getattr(parse(*argv.split()), name)
    assert found == value and type(found) is type(value)
    assert replace(parse(*argv.split()), **{name: getattr(Config(), name)}) == Config()     # and nothing else


@pytest.mark.parametrize("argv, words", [
    ("--wat", "--wat"), ("--step 2", "--step"), ("stray", "stray"), ("--lr", "--lr"), ("--lr fast", "--lr"),
    ("--steps 1.5", "--steps"), ("--kind c", "--kind"), ("--names", "--names"), ("--numbers 1 x", "--numbers"),
    ("--lr -0.1", "--lr must be in [0, 1], not -0.1"), ("--lr 1.1", "not 1.1"), ("--lr nan", "not nan"),
    ("--lr inf", "not inf"), ("--steps 0", "--steps must be at least 1, not 0"),
    ("--limit 0", "--limit must be at least 1"), ("--fast yes", "yes"), ("--out nowhere", "nowhere is no place")])
def test_usage_errors(argv: str, words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*argv.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2 and words in printed.err.splitlines()[-1] and "Traceback" not in printed.err
    assert not printed.out


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("What it does.", "peak learning rate, 100% of it (default 0.0001)", "which kind (default a)", "{a,b}",
                  "--fast, --no-fast hurry --careful", "--limit N at most --fast", "[NAMES ...] several --",
                  "several numbers (default [1, 2])"):
        assert words in shown, shown


def test_names_with_underscores_are_flags_with_dashes() -> None:
    @dataclass(frozen=True)
    class Long:
        batch_size: int = flag(8, "", low=1)

        def __post_init__(self) -> None:
            check_ranges(self)
    assert build_parser(Long, None).parse_args(["--batch-size", "3"]).batch_size == 3
    with pytest.raises(ValueError, match="--batch-size must be at least 1, not 0"):
        Long(0)
