"""Write the page of a run's folder again, from what lies in it: python -m loop.report RUN

The task's items are read once more, for their questions and pictures; where they cannot be, the page does without them.
"""
from __future__ import annotations

import sys
from pathlib import Path

from loop.report.candidates import read_object
from loop.report.judging import judge_page
from loop.report.page import PAGE, Page, write_page
from loop.report.training import load_items, training_page
from tasks.endings import say, say_last, status_of

USAGE = "usage: python -m loop.report RUN"


def main(*words: str) -> int:
    """Write RUN/report.html; returns the exit status."""
    if len(words) != 1 or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    folder = Path(words[0])
    path = folder / PAGE
    try:
        write_page(path, page_of(folder))
    except (OSError, ModuleNotFoundError) as error:
        say_last("loop.report", str(error))
        return status_of(error)
    except (ValueError, LookupError, TypeError, AttributeError) as error:       # its files hold something else
        say_last("loop.report", f"{folder} is not a run's folder: {error}")
        return 2
    say(f"page: {path}")
    return 0


def page_of(folder: Path) -> Page:
    """The page of a run of train.py or judge.py; ValueError where the folder holds neither."""
    settings = read_object(folder / "config.json")
    if not settings:
        raise ValueError("it holds no config.json")
    items = load_items(settings)
    if "iterations" in settings:
        return judge_page(folder, items)
    return training_page(folder, items)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
