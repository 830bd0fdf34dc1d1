"""What the README files say is true: commands are accepted, files and links exist, figures equal the committed ones."""
from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loop.survey_flags import SurveyConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = ("loop", "tasks", "model", "tests")
PAGES = [README, *(ROOT / folder / "README.md" for folder in FOLDERS)]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
LOOP = ROOT / "loop" / "README.md"
MODEL = ROOT / "model" / "README.md"
TESTS = ROOT / "tests" / "README.md"
PAGES_WITH_FILES = [page for page in PAGES if "\n## The files\n" in TEXT[page]]
EVIDENCE = (ROOT / "tests" / "evidence" / "table.md").read_text(encoding="utf-8")
KINDS = (ROOT / "tests" / "evidence" / "kinds.md").read_text(encoding="utf-8")

# program as it is called -> (folder that Python looks in first, module, the function that parses the command line)
PROGRAMS = {
    "train.py": ("", "train", "cli"),
    "judge.py": ("", "judge", "cli"),
    "eval.py": ("", "eval", "main"),
    "gate.py": ("", "gate", "main"),
    "-m loop.make_tiny": ("", "loop.make_tiny", "main"),
    "-m loop.export": ("", "loop.export", "main"),
    "-m loop.memory": ("", "loop.memory_table", "cli"),
    "tests/bench/bench.py": ("tests/bench", "bench", "main"),
    "tests/bench/counts.py": ("tests/bench", "counts", "main"),
    "tests/bench/scaling.py": ("tests/bench", "scaling", "main"),
    "tests/evidence/evidence.py": ("tests/evidence", "evidence", "main"),
    "tests/evidence/kinds.py": ("tests/evidence", "kinds", "main"),
    "tests/helpers/compare_layers.py": ("tests/helpers", "compare_layers", "main"),
}
WITHOUT_FLAGS = {"-m loop.demo", "-m loop.report"}
TORCHRUN = ("--standalone", "--nproc-per-node")
LMMS_EVAL = ("--log", "--repeats", "--reasoning")       # up to the underscore, where what is searched for ends
COMMAND = re.compile(r"\b(?:python|torchrun(?: --standalone)? --nproc-per-node \w+) (-m [\w.]+|[\w/]+\.py)([^`\n#&;]*)")
PYTEST = re.compile(r"(?:^|`|&& )pytest\b([^`\n#]*)", re.MULTILINE)


def joined(text: str) -> str:
    """The text with a line that ends in a backslash joined to the next."""
    return text.replace("\\\n", " ")


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, program, arguments) of every command; "..." is left out, and a shell's loop variable is a number."""
    rows = []
    for page, text in TEXT.items():
        for program, arguments in COMMAND.findall(joined(text)):
            words = [word for word in shlex.split(arguments) if word != "..."]
            words = [word.replace("$s", "0") for word in words]
            rows.append((NAMES[page], program, words))
    return rows


class Parsed(Exception):
    """Raised where a program has read its command line, with what it has read."""


def parse(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The program's module, and the arguments as the program itself reads them; it does nothing else."""
    folder, name, entry = PROGRAMS[program]
    monkeypatch.syspath_prepend(str(ROOT / folder))
    module = importlib.import_module(name)
    real = argparse.ArgumentParser.parse_known_args                     # which parse_args calls, too

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        given, unknown = real(self, args, namespace)
        assert not unknown
        raise Parsed(vars(given))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(Parsed) as parsed:
        getattr(module, entry)()
    return module, parsed.value.args[0]


# ---- commands

@pytest.mark.parametrize("page, program, words", commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_are_accepted(page: str, program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program knows every flag, and its Config accepts every value."""
    if program in WITHOUT_FLAGS:
        assert importlib.util.find_spec(program.removeprefix("-m "))
        return
    module, arguments = parse(program, words, monkeypatch)
    if program == "gate.py":
        own = {entry.name for entry in fields(module.Config)}
        asking = {name: value for name, value in arguments.items() if name not in own}
        module.Config(**{name: value for name, value in arguments.items() if name in own})
        if asking:
            SurveyConfig(**asking)
    elif hasattr(module, "Config"):
        module.Config(**arguments)


def test_commands_are_found() -> None:
    pages = [page for page, _, _ in commands()]
    programs = [program for _, program, _ in commands()]
    assert set(pages) == set(NAMES.values())
    assert set(programs) == {*PROGRAMS, *WITHOUT_FLAGS}

    at_top_level = [program for program in programs if "/" not in program and not program.startswith("-m")]
    assert len(at_top_level) >= 20


def known_flags(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every flag of every program."""
    flags = {*TORCHRUN, *LMMS_EVAL, "--help", "--ignore"}               # pytest's, the last
    for folder, name, _ in PROGRAMS.values():
        monkeypatch.syspath_prepend(str(ROOT / folder))
        module = importlib.import_module(name)
        if hasattr(module, "Config"):
            for entry in [*fields(module.Config), *fields(SurveyConfig)]:
                flag = entry.name.replace("_", "-")
                flags.add("--" + flag)
                if entry.type in (bool, "bool", "bool | None"):
                    flags.add("--no-" + flag)
        else:
            source = Path(module.__file__).read_text(encoding="utf-8")
            flags |= set(re.findall(r'add_argument\("(--[\w-]+)"', source))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_flags_that_are_mentioned_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mentioned = re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT[page])
    assert set(mentioned) <= known_flags(monkeypatch)


def test_pytest_is_called_on_what_exists() -> None:
    calls = [shlex.split(words) for text in TEXT.values() for words in PYTEST.findall(text)]
    markers = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    assert len(calls) >= 5
    for words in calls:
        for word in words:
            if word.startswith("tests"):
                assert (ROOT / word).exists(), word
        if "-m" in words:
            marker = words[words.index("-m") + 1].removeprefix("not ")
            assert f'"{marker}:' in markers, marker


def test_the_two_commands_stand_on_lines_of_their_own() -> None:
    lines = TEXT[README].splitlines()
    assert "pip install -r requirements.txt && python train.py" in lines
    assert "pip install -r requirements.txt && pytest" in lines


# ---- files, links, names

def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above it."""
    level = len(heading) - len(heading.lstrip("#"))
    _, found, below = text.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"\n#{{1,{level}}} ", below)[0]


@pytest.mark.parametrize("page", PAGES_WITH_FILES, ids=NAMES.get)
def test_the_list_of_files_is_right(page: Path) -> None:
    """Each line of the list names something that exists, and no file of the folder is left out."""
    listed = section(TEXT[page], "## The files").split("```")[1]
    names = re.findall(r"^([\w./]+)", listed, re.MULTILINE)
    for name in names:
        assert (page.parent / name).exists(), name

    modules = {path.name for path in page.parent.glob("*.py")}
    if page.parent.name == "loop":
        modules.discard("__init__.py")                  # it holds a docstring only
    assert modules <= set(names)


def test_lists_of_files_are_found() -> None:
    assert len(PAGES_WITH_FILES) == 4


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_paths_that_are_mentioned_exist(page: Path) -> None:
    folders = "|".join(FOLDERS)
    for name in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]*\w)", TEXT[page]):
        assert (ROOT / name).exists(), name


def anchors(text: str) -> set[str]:
    """The names by which a link can point to a page's headings: lower case, no punctuation, - for a blank."""
    names = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(words.replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT[page])
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_functions_of_the_algorithm_exist() -> None:
    rows = table_below(README, "## The algorithm")[1:]
    assert len(rows) >= 10

    for row in rows:
        names = re.findall(r"`([\w.]+)`", row[2])
        assert names, row
        for name in names:
            module_name, _, function = name.rpartition(".")
            module = importlib.import_module(module_name)
            assert callable(getattr(module, function)), name


def test_size_and_sketch() -> None:
    assert 9_000 <= README.stat().st_size <= 12_500

    _, _, below = TEXT[README].partition("```python\n")
    sketch, _, _ = below.partition("```")
    assert len(sketch.splitlines()) == 12


# ---- figures

def table(text: str) -> list[list[str]]:
    """The cells of the first table of a text, row by row, its head first; the line below the head is left out."""
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return [rows[0], *rows[2:]]


def table_below(page: Path, heading: str) -> list[list[str]]:
    """The first table below a heading of a page."""
    return table(section(TEXT[page], heading))


def committed_table(heading: str) -> dict[str, list[str]]:
    """The first table below a heading of evidence/table.md, its rows by their first cell."""
    return by_name(table(section(EVIDENCE, heading)))


def by_name(rows: list[list[str]]) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    return {row[0]: row for row in rows}


def test_the_demos_rows_are_those_of_its_page() -> None:
    short = table_below(README, "## The demo")
    whole = table_below(LOOP, "## The demo")
    assert len(short) == 3
    assert len(whole) == 7
    assert short == whole[:3]


def test_the_lines_of_speed_are_those_of_the_benchmark() -> None:
    short = table_below(README, "## Speed")
    whole = table_below(TESTS, "## The benchmark")
    assert short[0] == whole[0]
    assert len(short) == 6
    assert len(whole) == 18
    for row in short[1:]:
        assert row in whole


@pytest.mark.parametrize("page", [README, TESTS], ids=NAMES.get)
def test_the_rules_are_those_of_the_evidence(page: Path) -> None:
    """What each rule let through and stopped, and the numbers of runs, are those of evidence/kinds.md."""
    text = section(TEXT[page], "## The evidence")
    head, *rows = table(text)
    judged = section(KINDS, "## Judged on")
    committed_head, *committed_rows = table(judged)
    committed = by_name(committed_rows)
    assert len(rows) >= 3
    for row in rows:
        for name, cell in zip(head, row, strict=True):
            place = committed_head.index(name) if head.count(name) == 1 else None
            if place is not None:
                assert cell == committed[row[0]][place], (row[0], name)
    if page == TESTS:
        assert rows == committed_rows

    counts = re.search(r"(\d+) harmful, \d+ neither, (\d+) helpful", judged)
    assert counts
    words = " ".join(text.split())
    assert f"({counts[1]})" in words and f"({counts[2]})" in words
    runs = [json.loads(line) for line in (ROOT / "tests" / "evidence" / "kinds.jsonl").read_text().splitlines()]
    judging = [run for run in runs if run["half"] == "judge" and run["gates"] == "replay"]
    pooled = re.search(r"(\d+) runs, \d+ distinct", judged)
    assert pooled and (f"{pooled[1]} runs" if page == README else f"{len(judging)} runs") in words


def test_what_was_chosen_on_is_what_was_run() -> None:
    """The sentence on the half to choose on."""
    chosen = section(KINDS, "## Chosen on")
    text = " ".join(section(TEXT[TESTS], "### Chosen on").split())
    gate = by_name(table(chosen)[1:])["the gate"]
    through = without_interval(gate[1])
    stopped = without_interval(gate[4])
    assert f"lets {through} harmful runs through" in text
    assert f"stops {stopped} helpful ones" in text


def test_the_sentences_are_those_of_the_evidence() -> None:
    """Figures in the sentences of tests/README.md."""
    text = " ".join(section(TEXT[TESTS], "## The evidence").split())

    loss = re.search(r"in (153 of 160) runs that had pairs, and in (60) of 60 of the harmful", EVIDENCE)
    assert loss
    assert f"all {loss[2]} harmful runs ({loss[1]} in all)" in text

    _, _, places = EVIDENCE.partition("Harmful runs allowed, by where they were:")
    _, runs, allowed, *_ = by_name(table(places))["`student-weak`, `json`, tau 0.5"]
    assert f"a weak student: {allowed} of {runs}." in text

    [margin] = [row for row in table(section(EVIDENCE, "## The margin gate")) if row[:2] == ["`red`", "`verifier`"]]
    all_pairs = without_count(margin[6])
    at_tau = without_count(margin[9])
    assert f"q falls from {all_pairs} over all pairs to {at_tau} at tau 0.5" in text
    assert f"turns {margin[3]} points into {margin[4]}." in text

    agreement = committed_table("## Agreement and damage")
    red = without_count(agreement["`red`"][2])
    bar = without_count(agreement["`bar`"][2])
    assert f"{red} on `red` and {bar} on `bar`" in text

    harmful = re.search(r"(\d+) harmful, 8 neither, (\d+) helpful", EVIDENCE)
    assert harmful and "160 runs, 2026-11-20, with 12 trained verifiers" in text


def without_count(cell: str) -> str:
    """0.36 (526) -> 0.36."""
    return cell.partition(" (")[0]


def without_interval(cell: str) -> str:
    """0 of 43 [0.00, 0.63] -> 0 of 43."""
    return cell.partition(" [")[0]


def test_memory_is_that_of_the_models_page() -> None:
    rows = table_below(MODEL, "## Memory")
    [row] = [row for row in rows if row[:2] == ["Qwen3-VL-2B", "language model"]]
    text = TEXT[README].replace("\n", " ")
    assert f"need {row[-1]} a GPU" in text
