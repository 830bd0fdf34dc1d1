"""Our scoring against independent scorers, by hand: SCORERS=FOLDER python -m pytest tests/tasks/test_scorers.py -s

FOLDER holds what `pip download --no-deps evalscope==1.14.1 lmms_eval==0.7.3` brings, unzipped, and, where wanted,
BLINK's published outputs (eval/saved_outputs of its repository) and MathVista's (data/testmini.json, query.json and
results/*/output_*.json of its repository, in one folder mathvista/). Nothing of them is part of this project. Measured:

MMMU, open answers, evalscope's copy of the published parser, 20,000 made-up responses: 19,964 verdicts agree. The other
36 have a line that ends in an indicator word and a blank ("result \\n C"): the published rule then takes the empty rest
as that line's answer and falls back to the whole text; we drop blanks at line ends first.
BLINK val, lmms_eval's letter extraction, 38,335 published outputs of 21 runs, option texts not known: 33,638 agree,
1,092 have no letter by either, 3,042 only by theirs (lone letters inside prose, refusals that mention options), 563
differ (they take the article A and a label quoted last). Against BLINK's own rule, where it decides (29,916): 29,731
agree, 44 conflict ("...(B) seems right. So, the answer is **(A)**": its tokens miss the second), 141 have no letter by
ours (most are refusals that name an option). Where it asked GPT-3.5: 4,395 agree, 23 conflict, 2,760 we do not read.
MathVista testmini, verdicts with GPT-4's extraction, 16,998 published outputs of 17 runs (without those that are
programs): whole numbers 6,995 of 7,104 agree, decimals 676 of 680, lists 34 of 34, options 7,937 of 9,180 (989 of the
rest are non-answers that the published rule maps to the option nearest in spelling). Our prompts equal all 1,000 of
its query.json.
"""
from __future__ import annotations

import importlib.util
import json
import os
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from eval import make_item, score
from tasks import Item
from tasks.answers import settled_text
from tasks.choices import LETTERS, read_choice
from tasks.jsonl import prompt_text
from tasks.values import grade

FOLDER = Path(os.environ.get("SCORERS", "/nonexistent"))
GOLDS = ["0.9965", "6.333", "-120", "2000000", "242110.62", "9.20", "0.10", "Tampa", "1/64", "C", ["24/7", "3.429"],
         ["$MgS$", "MgS"], "embryonic"]
WORDS = ["so", "the answer is", "therefore", "is", "thus", "could be", "=", "\n", ".", ",", ":", "x", "result", "final",
         "about", "not", "1,234.5", "2,000,000", "-120", "\u2212120", "1e3", "9.2", "0.1", "1", "11/64", "Tampa",
         "tampa, florida", "the cell", "C", "c", "(C)", "3.43", "24", "$MgS$", "mgs", "embryonic", "242,110.62", "6.33",
         "99%", "$"]


def scorer(path: str) -> ModuleType:
    if not (FOLDER / path).exists():
        pytest.skip(f"needs {path} in the folder SCORERS")
    spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_open_answers_as_mmmu_publishes_them():
    theirs, rng, agree = scorer("evalscope/benchmarks/mmmu/utils.py"), random.Random(0), 0
    for _ in range(20_000):
        gold = rng.choice(GOLDS)
        response = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
        if rng.random() < 0.5:
            response += " " + (gold if isinstance(gold, str) else gold[0])
        right = bool(theirs.eval_open(gold, theirs.parse_open_response(response)))
        agree += right == grade(Item("1", "mmmu", ("?",), answer=gold), response).correct
    print(f"{agree} of 20000")
    assert agree >= 19_950


def test_letters_of_published_blink_outputs():
    theirs = scorer("lmms_eval/tasks/_task_utils/mcq_extract.py")
    counts: Counter[str] = Counter()
    for path in sorted(FOLDER.glob("eval/saved_outputs/*/*.json")):
        rows = json.loads(path.read_text())
        rows = rows.get("val", []) if isinstance(rows, dict) else []
        n = max([2, *(LETTERS.index(row["answer"][1]) + 1 for row in rows if len(row.get("answer", "")) == 3)])
        for text in (row.get("full_prediction") for row in rows):
            if isinstance(text, str):
                k = read_choice(settled_text(text), tuple(f"zzz{i}" for i in range(n)))
                ours, other = "" if k is None else LETTERS[k], theirs.extract_mcq_answer(text, list(LETTERS[:n]))
                counts["agree" if ours == other else "only theirs" if not ours else "differ"] += 1
    print(dict(counts))
    assert not counts or counts["agree"] > 0.9 * sum(counts.values())


def test_published_mathvista_outputs():
    folder = FOLDER / "mathvista"
    if not folder.is_dir():
        pytest.skip("needs the folder mathvista in the folder SCORERS")
    queries = json.loads((folder / "query.json").read_text())
    items = {pid: make_item("mathvista", {"pid": pid, **row, "query": None})
             for pid, row in json.loads((folder / "testmini.json").read_text()).items()}
    assert all(prompt_text(items[pid]) == query for pid, query in queries.items() if pid in items)
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("output_*.json")):
        for pid, row in json.loads(path.read_text()).items():
            if pid in items and isinstance(row.get("response"), str) and "true_false" in row:
                agrees = score(items[pid], row["response"]).correct == bool(row["true_false"])
                counts[f"{items[pid].answer_type} {'agrees' if agrees else 'differs'}"] += 1
    print(dict(counts))
    assert counts["integer agrees"] > 0.97 * (counts["integer agrees"] + counts["integer differs"])
