"""Command-line flags from a frozen dataclass: one field is one flag, its help stands beside it.

    @dataclass(frozen=True)
    class Config:
        lr: float = flag(1e-4, "peak learning rate", low=0)

        def __post_init__(self) -> None:
            check_ranges(self)
    cfg = parse_flags(Config, __doc__)

A ValueError of `__post_init__` is, like an unknown flag, a usage error (exit 2).
"""
from __future__ import annotations

import argparse
import math
import types
from dataclasses import MISSING, Field, field, fields
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


def flag(default: Any, help: str, choices: tuple | None = None, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field that is also a command-line flag; `low` and `high` are the bounds that check_ranges checks."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(config: Any) -> None:
    """ValueError that names the flag whose value lies outside its bounds (NaN does)."""
    for each in fields(config):
        value, low, high = getattr(config, each.name), each.metadata["low"], each.metadata["high"]
        if isinstance(value, (int, float)) and not (math.isfinite(value) and low <= value <= high):
            allowed = (f"in [{low:g}, {high:g}]" if high < math.inf else
                       f"at least {low:g}" if math.isfinite(value) else "a finite number")
            raise ValueError(f"--{each.name.replace('_', '-')} must be {allowed}, not {value}")


def parse_flags(config: type[C], description: str | None, argv: list[str] | None = None) -> C:
    """Read `argv` (default: the command line) into `config`; usage errors print one sentence and exit with 2."""
    parser = build_parser(config, description)
    try:
        return config(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the forty lines of usage are for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def build_parser(config: type, description: str | None) -> argparse.ArgumentParser:
    """A parser whose namespace holds only the flags that were given: the dataclass fills in its own defaults."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    hints = get_type_hints(config)
    for each in fields(config):
        parser.add_argument("--" + each.name.replace("_", "-"), **_argument(each, hints[each.name]))
    return parser


def _argument(each: Field, hint: Any) -> dict[str, Any]:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    shown = "" if default in (None, "", []) or isinstance(default, bool) else f" (default {default})"
    options: dict[str, Any] = {"help": (each.metadata["help"] + shown).replace("%", "%%")}
    if get_origin(hint) in (Union, types.UnionType):                       # int | None -> int
        hint = next(a for a in get_args(hint) if a is not type(None))
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is list:
        return options | {"nargs": "+", "type": get_args(hint)[0]}
    options |= {"type": hint, "choices": each.metadata["choices"]}
    if each.metadata["choices"] is None:
        options["metavar"] = {int: "N", float: "X"}.get(hint, "TEXT")
    return options
