"""What a page consists of, and its writing: sections of blocks, drawn by page.html.jinja.

A page is the last thing that a program writes, when all that counts is on the disk. So what goes wrong with it is told
in a sentence and changes no exit status.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tasks.endings import one_line, say
from tasks.jsonl import write_bytes_whole

PAGE = "report.html"                                    # in a run's folder
TEMPLATE = "page.html.jinja"
OURS = b'<meta name="generator" content="loop.report">'     # at the beginning of every page
TONES = {"PASS": "good", "PROMOTE": "good", "BLOCK": "bad", "REJECT": "bad"}


# ---- blocks

@dataclass(frozen=True)
class Verdict:
    """What a gate said, and why."""
    kind: ClassVar[str] = "verdict"
    title: str
    word: str
    reasons: Sequence[str]

    @property
    def tone(self) -> str:
        return TONES.get(self.word, "plain")


@dataclass(frozen=True)
class Verdicts:
    """Verdicts side by side."""
    kind: ClassVar[str] = "verdicts"
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Tile:
    """A figure that is to be seen first."""
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures in a row."""
    kind: ClassVar[str] = "tiles"
    tiles: list[Tile]


@dataclass(frozen=True)
class Table:
    """A table of texts. A cell that is a word of TONES is coloured."""
    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Notes:
    """Lines of text; with a title they are folded away."""
    kind: ClassVar[str] = "notes"
    lines: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, some words, and blocks below them. None among the blocks stands for one that there is nothing for."""
    title: str
    words: str = ""
    blocks: Sequence[Any] = ()
    level: int = 2


@dataclass(frozen=True)
class Page:
    """All of a page."""
    title: str
    program: str                                        # which made the run
    tone: str                                           # of the whole: "good", "bad" or "plain"
    lead: str                                           # the outcome in a sentence or two
    sections: list[Section] = field(default_factory=list)
    footer: str = "Figures with brackets are 95 % intervals. Right and wrong are by exact match with the task's answer."


# ---- writing

def render(page: Page) -> bytes:
    """The page as HTML. Whatever its texts hold is shown as text."""
    # Here and not above: whoever only decides from records needs no Jinja2.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(page=page, tones=TONES)
    text = text.lstrip()                                # the macros leave blank lines
    return text.encode(errors="replace")                # a response may hold half of a surrogate pair


def write_page(path: Path, page: Page) -> None:
    """Write a page, whole or not at all. OSError where that fails, or where `path` is something that is not a page of
    this program's."""
    if path.exists() and not is_ours(path):
        raise OSError(f"{path} is no page of this program's and is left as it is")
    write_bytes_whole(path, render(page))


def is_ours(path: Path) -> bool:
    """Whether a file is a page that was written here before."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return OURS in file.read(1000)


def leave_page(path: Path, make: Callable[[], Page]) -> None:
    """The last thing that a program does: write the page that `make` returns and name it, or say why there is none."""
    try:
        write_page(path, make())
    except (OSError, ModuleNotFoundError) as error:
        say(one_line(f"no page: {error}"))
    else:
        say(f"page: {path}")
