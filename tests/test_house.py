"""The house: imports run one way, no files import each other in a circle, and the portable files run when copied."""
from __future__ import annotations

import ast
import json
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom to the top: a file imports from its own level and from those below.
LEVELS = (("dpo", "replay", "gate", "verifier"), ("model", "tasks"), ("eval",), ("loop",), ("train", "judge"))
# The only places that import, when they run, what lies above them or costs what not every caller has.
LAZY_PLACES = {("gate.py", "main"), ("eval.py", "main")}
# What a portable file, a task and eval.py import when they are imported, beside the standard library.
AT_TOP = {"dpo.py": {"torch"}, "replay.py": set(), "gate.py": set(), "verifier.py": set(),
          "eval.py": {"numpy", "PIL", "verifier", "tasks"}}
TASKS_TOP = {"numpy", "PIL", "verifier", "tasks"}
PORTABLE = ("dpo.py", "replay.py", "gate.py", "verifier.py")
COLUMNS = 100                                           # of the portable files and train.py; 120 elsewhere


@dataclass(frozen=True)
class Import:
    """One import: the file it stands in, the outermost function around it, and what is imported, with dots."""
    file: str
    function: str | None
    module: str

    @property
    def part(self) -> str:
        """The package or top-level file that is imported from."""
        return self.module.partition(".")[0]


def project_files() -> list[str]:
    """The project's own Python files, tests left out."""
    top = [path.name for path in ROOT.glob("*.py")]
    folders = [path.relative_to(ROOT).as_posix() for part in ("model", "tasks", "loop")
               for path in (ROOT / part).rglob("*.py")]
    return sorted(top + folders)


def imports_of(file: str) -> Iterator[Import]:
    """Every import of a file, those inside functions included; `from . import x` is spelled out."""
    package = Path(file).parent.as_posix().replace("/", ".") if "/" in file else ""

    def walk(node: ast.AST, function: str | None) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, function, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                assert node.level == 1, f"{file} imports from above its own package"
                module = f"{package}.{module}".rstrip(".")
            yield Import(file, function, module)
            for alias in node.names:
                yield Import(file, function, f"{module}.{alias.name}")      # it may be a module itself
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and function is None
            yield from walk(child, child.name if inside else function)

    yield from walk(ast.parse((ROOT / file).read_text(encoding="utf-8")), None)


def module_file(module: str) -> str | None:
    """The project's file behind a module's name, None if there is none."""
    path = module.replace(".", "/")
    for name in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / name).is_file():
            return name
    return None


def level(name: str) -> int | None:
    """The level of a file or module, None for what is not the project's."""
    part = name.removesuffix(".py").split("/")[0].split(".")[0]
    for number, parts in enumerate(LEVELS):
        if part in parts:
            return number
    return None


def test_every_file_has_a_level() -> None:
    assert [file for file in project_files() if level(file) is None] == []


@pytest.mark.parametrize("file", project_files())
def test_imports_run_one_way(file: str) -> None:
    """Lazy imports count as well, but for those of LAZY_PLACES."""
    for each in imports_of(file):
        target = level(each.module)
        if target is not None and (file, each.function) not in LAZY_PLACES:
            assert target <= level(file), f"{file} imports {each.module}, which lies above it"
        if file.startswith("model/"):
            assert each.part != "tasks", f"{file} imports {each.module}"
        if file.startswith("tasks/"):
            assert each.part != "model", f"{file} imports {each.module}"


def test_the_lazy_places_are_needed() -> None:
    """Each of LAZY_PLACES does import upward or what only a model needs; one that does not is to be taken off."""
    for file, function in LAZY_PLACES:
        parts = {each.part for each in imports_of(file) if each.function == function}
        assert parts & {"loop", "model"}, (file, function)


def test_what_asks_models_does_not_know_the_gate() -> None:
    asking = [file for file in project_files() if file in ("loop/survey.py", "loop/cached_model.py")]
    assert asking
    for file in asking:
        assert "gate" not in {each.part for each in imports_of(file)}, file


def test_no_circle_of_files() -> None:
    graph: dict[str, set[str]] = {}
    for file in project_files():
        targets = {module_file(each.module) for each in imports_of(file) if (file, each.function) not in LAZY_PLACES}
        graph[file] = targets - {None, file}
    finished: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, " -> ".join((*path[path.index(file):], file))
        if file not in finished:
            for target in sorted(graph[file]):
                visit(target, (*path, file))
            finished.add(file)
    for file in graph:
        visit(file, ())


@pytest.mark.parametrize("file", [*AT_TOP, *(file for file in project_files() if file.startswith("tasks/"))])
def test_what_is_imported_at_the_top(file: str) -> None:
    allowed = AT_TOP.get(file, TASKS_TOP)
    parts = {each.part for each in imports_of(file) if each.function is None}
    assert parts - set(sys.stdlib_module_names) <= allowed


# ---- portable files

# What each does in an empty folder, with the standard library alone (dpo.py: and torch).
USES = {
    "dpo.py": """
import torch
from dpo import dpo_loss, sequence_logps
logps = sequence_logps(torch.zeros(1, 2, 4), torch.zeros(8, 4), torch.zeros(1, 2, dtype=torch.long),
                       torch.ones(1, 2, dtype=torch.bool))
assert abs(logps.item() + 2 * torch.tensor(8.0).log().item()) < 1e-6
losses, chosen, rejected = dpo_loss(logps, logps, logps, logps)
assert abs(losses.item() - 0.693147) < 1e-5
""",
    "replay.py": """
from replay import Pair, ReplayBuffer, select_pair
assert select_pair("q", ["a", "b"], [0.9, 0.1]) == (0, 1)
buffer = ReplayBuffer(4, 0.5)
assert buffer.add([Pair("q", (1,), (2,), 0.9, 0.1)]) == 1
""",
    "verifier.py": """
from verifier import parse_preference, parse_score, score_candidates
assert parse_score('so {"score": 0.5}') == 0.5 and parse_preference("Answer 2 is better") == 2
class Reply:
    text = '{"score": 1}'
    finish_reason = "stop"
[[score]] = score_candidates(lambda chats: [Reply() for chat in chats], [[{"role": "user", "content": "?"}]], [["3"]])
assert score.value == 1.0
""",
    "gate.py": """
from gate import decide_before, gate_after, measure
from replay import select_pair
records = [{"item": str(k), "correct": bool(k % 2), "score": k % 2} for k in range(20)]
assert decide_before(measure(records, select_pair, 0.5)).verdict == "BLOCK"
assert gate_after([False] * 50, [True] * 50).verdict == "PROMOTE"
""",
}


def alone(folder: Path, *words: str, packages: bool = False) -> subprocess.CompletedProcess[str]:
    """Python with the standard library only, in `folder`; with `packages` those that are installed, too."""
    setting = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if packages:
        paths = [*site.getsitepackages(), str(folder)]
        return subprocess.run([sys.executable, "-s", *words], cwd=folder, capture_output=True, text=True,
                              env=setting | {"PYTHONPATH": os.pathsep.join(paths)})
    return subprocess.run([sys.executable, "-S", "-E", "-s", *words], cwd=folder, capture_output=True, text=True,
                          env=setting)


@pytest.mark.parametrize("name", PORTABLE)
def test_runs_when_copied(name: str, tmp_path: Path) -> None:
    """The file alone (gate.py with replay.py), used by a script in the same empty folder."""
    shutil.copy(ROOT / name, tmp_path)
    if name == "gate.py":
        shutil.copy(ROOT / "replay.py", tmp_path)
    (tmp_path / "use.py").write_text(USES[name])
    done = alone(tmp_path, "use.py", packages=name == "dpo.py")
    assert done.returncode == 0, done.stderr
    assert alone(tmp_path, name, packages=name == "dpo.py").returncode in (0, 2)


def test_the_gate_decides_from_records_when_copied(tmp_path: Path) -> None:
    """python gate.py --records ..., with nothing but gate.py and replay.py on the disk: PASS, BLOCK, several files."""
    for name in ("gate.py", "replay.py"):
        shutil.copy(ROOT / name, tmp_path)

    def write(name: str, right_way: bool) -> None:
        rows = []
        for item in range(60):
            for text in ("right", "wrong"):
                score = 0.9 if (text == "right") == right_way else 0.1
                rows.append({"item": str(item), "correct": text == "right", "score": score, "text": text})
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("good.jsonl", True)
    write("bad.jsonl", False)

    done = alone(tmp_path, "gate.py", "--records", "good.jsonl", "--out", "good.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "good.json").read_text())["verdict"] == "PASS"

    done = alone(tmp_path, "gate.py", "--records", "bad.jsonl", "--out", "bad.json")
    assert done.returncode == 3, done.stderr
    report = json.loads((tmp_path / "bad.json").read_text())
    assert report["verdict"] == "BLOCK" and report["reasons"]

    done = alone(tmp_path, "gate.py", "--records", "bad.jsonl", "good.jsonl", "--out", "both.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "both.json").read_text())["recommended"] == "good.jsonl"

    done = alone(tmp_path, "gate.py", "--records", "none.jsonl", "--out", "none.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("file", [*PORTABLE, "train.py"])
def test_narrow_enough_to_be_read_beside_something(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS] == []
