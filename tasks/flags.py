"""Command-line flags from a frozen dataclass: one field is one flag, its help stands beside it.

    @dataclass(frozen=True)
    class Config:
        lr: float = flag(1e-4, "peak learning rate", low=0)

        def __post_init__(self) -> None:
            check_ranges(self)
    cfg = parse_flags(Config, __doc__)

A ValueError of `__post_init__` is a usage error (exit 2, see endings.py), as an unknown flag is. Standard library only.
"""
from __future__ import annotations

import argparse
import math
import types
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tasks.endings import one_line

C = TypeVar("C")                                # a Config
DTYPES = ("float32", "bfloat16")                # what --dtype takes: names of torch's
PLACEHOLDERS = {int: "N", float: "X"}           # what --help shows for a flag's value; TEXT for the rest


def flag(default: Any, help: str, choices: tuple | None = None, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field that is also a command-line flag; `low` and `high` are the bounds that check_ranges checks."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)      # a new list for every Config
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RequestFlags:
    """How a served model is asked, http://HOST:PORT/v1#NAME in place of a folder or hub id: see loop/served.py."""
    concurrency: int = flag(16, "requests to a served model that are under way at once, over all ranks", low=1)
    max_failed: float = flag(0.01, "share of the requests to a served model that may fail for good", low=0, high=1)
    request_timeout: float = flag(600.0, "seconds that a served model may take for one answer", low=0.001)


def check_ranges(config: Any) -> None:
    """ValueError that names the flag whose value lies outside its bounds (NaN does)."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not isinstance(value, (int, float)):
            continue
        low = entry.metadata["low"]
        high = entry.metadata["high"]
        if math.isfinite(value) and low <= value <= high:
            continue

        if high < math.inf:
            allowed = f"in [{low:g}, {high:g}]"
        elif math.isfinite(value):
            allowed = f"at least {low:g}"
        else:
            allowed = "a finite number"
        raise ValueError(f"{flag_name(entry)} must be {allowed}, not {value}")


def check_pixel_range(min_pixels: int | None, max_pixels: int | None) -> None:
    """ValueError where --min-pixels and --max-pixels are both given and leave no picture between them."""
    if min_pixels and max_pixels and min_pixels > max_pixels:
        raise ValueError(f"--min-pixels {min_pixels} is above --max-pixels {max_pixels}")


def flag_name(entry: Field) -> str:
    """max_new_tokens -> --max-new-tokens."""
    return "--" + entry.name.replace("_", "-")


def parse_flags(config: type[C], description: str | None, argv: list[str] | None = None) -> C:
    """Read `argv` (default: the command line) into `config`; usage errors print one sentence and exit with 2."""
    parser = build_parser(config, description)
    given = vars(parser.parse_args(argv))
    try:
        return config(**given)
    except ValueError as error:
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the forty lines of usage are for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message} (--help lists the flags)") + "\n")


def build_parser(config: type, description: str | None) -> argparse.ArgumentParser:
    """A parser whose namespace holds only the flags that were given: the dataclass fills in its own defaults."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    add_flags(parser, config)
    return parser


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add a flag for every field of `config` that stands for one."""
    hints = get_type_hints(config)
    for entry in fields(config):
        parser.add_argument(flag_name(entry), **_argument_options(entry, hints[entry.name]))


def _argument_options(entry: Field, hint: Any) -> dict[str, Any]:
    """What `add_argument` is told of a field: its help, its type and how many values it takes."""
    options: dict[str, Any] = {"help": _help(entry).replace("%", "%%")}     # argparse fills in what follows a %
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [part for part in get_args(hint) if part is not type(None)]        # int | None -> int

    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction                  # --fast and --no-fast
        return options
    if get_origin(hint) is list:
        options["nargs"] = "+"
        options["type"] = get_args(hint)[0]
        return options

    options["type"] = hint
    options["choices"] = entry.metadata["choices"]
    if entry.metadata["choices"] is None:
        options["metavar"] = PLACEHOLDERS.get(hint, "TEXT")
    return options


def _help(entry: Field) -> str:
    """A flag's help, with its default where that says something."""
    default = entry.default
    if entry.default_factory is not MISSING:
        default = entry.default_factory()
    if isinstance(default, bool) or default in (None, "", []):
        return entry.metadata["help"]
    return f"{entry.metadata['help']} (default {default})"
