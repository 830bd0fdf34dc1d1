"""Judge benchmarks: which of two responses to a question about a picture is better?

    load    MMInstruction/VL-RewardBench, test-*.parquet (1,250 pairs); Multimodal RewardBench, all_data.json with
            pictures beside it, or its repack as test-*.parquet (4,711 pairs)
    ask     picture, question and both responses; the verdict "Answer 1 is better" or "[[A]]"
    score   verifier.parse_preference against the response that people preferred

https://vl-rewardbench.github.io, https://github.com/facebookresearch/multimodal_rewardbench. Almost every row of
VL-RewardBench has its better response first, so a pair counts only when it is seen in both orders: `swap()`.
The prompts ask what the published ones ask, for verdicts of the published form; their wording is ours.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tasks import Item, Verdict
from tasks.loading import (
    column,
    data_path,
    encoded_image,
    read_parquet,
    read_rows,
    row_name,
    shown,
    text_column,
    texts_column,
)
from verifier import COMPARISON, parse_preference

SPLIT = "test"
MACRO = {"vl_rewardbench": "group", "mm_rewardbench": "category", "jsonl": "group"}
VL_COLUMNS = ("id", "query", "response", "image", "human_ranking")
MM_COLUMNS = ("ID", "Text", "Image", "Output1", "Output2", "Better", "Category")

# VL-RewardBench's groups, told by the id's beginning; the rest is "general".
VL_GROUPS = {
    "mathverse": "reasoning",
    "mmmu": "reasoning",
    "rlaif": "hallucination",
    "rlhf": "hallucination",
    "hallucination_pair": "hallucination",
}
# Multimodal RewardBench reports two categories in two parts: (the id's beginning, its part, the part of other ids).
MM_PARTS = {
    "safety": ("pairs", "bias", "toxicity"),
    "reasoning": ("math", "math", "coding"),
}

LETTERED = """Compare the answers of two AI assistants to the user's question about the picture, and decide which one \
follows the instructions and answers the question better. Weigh helpfulness, relevance, accuracy and detail. Neither \
the order of the answers nor their length nor the assistants' names may count. Explain your comparison briefly, then \
output your final verdict by strictly following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B \
is better.

[User Question]
{question}

[The Start of Assistant A's Answer]
{first}
[The End of Assistant A's Answer]

[The Start of Assistant B's Answer]
{second}
[The End of Assistant B's Answer]"""
PROMPTS = {"vl_rewardbench": COMPARISON, "mm_rewardbench": LETTERED, "jsonl": COMPARISON}


@dataclass(frozen=True)
class Comparison(Item):
    """A pair to be judged. `responses` and `better` (1 or 2, None: not known) are in the data set's order; prompt,
    `choices` and `answer` ("1" or "2") in the order shown, which `swapped` turns around."""
    question: str = ""
    responses: tuple[str, str] = ("", "")
    better: int | None = None
    swapped: bool = False

    def swap(self) -> Comparison:
        """The same pair, shown in the other order."""
        return show(replace(self, swapped=not self.swapped))


def show(pair: Comparison) -> Comparison:
    """The pair with prompt, choices and answer for the order it is shown in."""
    first, second = pair.responses
    shown_better = pair.better
    if pair.swapped:
        first, second = second, first
        if pair.better is not None:
            shown_better = 3 - pair.better                          # 1 <-> 2

    text = PROMPTS[pair.task].format(question=pair.question, first=first, second=second)
    return replace(
        pair,
        prompt=(*range(len(pair.images)), text),
        choices=(first, second),
        answer=None if shown_better is None else str(shown_better),
        answer_type="preference")


def both_orders(items: Sequence[Item]) -> list[Item]:
    """Every pair as it stands and swapped, next to each other; other items as they are."""
    shown = []
    for item in items:
        shown.append(item)
        if isinstance(item, Comparison):
            shown.append(item.swap())
    return shown


def check_both_orders(items: Sequence[Comparison]) -> None:
    """ValueError unless the items are pairs in both orders, as `both_orders` gives them."""
    paired = len(items) % 2 == 0
    for one, two in zip(items[::2], items[1::2], strict=False):
        if one.id != two.id or one.swapped == two.swapped:
            paired = False
    if not paired:
        raise ValueError("a judge is reported over pairs in both orders, one after the other: see both_orders")


def load(name: str, directory: str | Path | None = None, split: str | None = None,
         limit: int | None = None) -> list[Comparison]:
    """One item a pair, in the data set's order; an id that occurs more than once gets its row's number."""
    path = data_path(name, directory)
    if name == "vl_rewardbench":
        return _load_vl(path, split or SPLIT, limit)
    return _load_mm(path, split or SPLIT, limit)


def _load_vl(path: Path, split: str, limit: int | None) -> list[Comparison]:
    """VL-RewardBench's pairs; it gives some ids twice."""
    task = "vl_rewardbench"
    times = Counter(str(row["id"]) for row in read_parquet(task, path, split, ("id",)) if "id" in row)

    items = []
    rows = read_parquet(task, path, split, VL_COLUMNS)
    for number, row in enumerate(islice(rows, limit)):
        name = str(row.get("id", ""))
        if times[name] > 1:
            name = f"{name}#{number}"
        items.append(make_item({**row, "task": task, "id": name}))
    return items


def _load_mm(path: Path, split: str, limit: int | None) -> list[Comparison]:
    """Multimodal RewardBench's pairs, from all_data.json or, where there is none, from the repack."""
    task = "mm_rewardbench"
    files = [path] if path.suffix == ".json" else sorted(path.rglob("all_data.json"))
    if not files:
        rows = read_parquet(task, path, split, MM_COLUMNS)
        return [make_item({**row, "task": task}) for row in islice(rows, limit)]

    rows = read_rows(files[0]).values()
    return [make_item({**row, "task": task}, base=files[0].parent) for row in islice(rows, limit)]


def make_item(row: dict, swapped: bool = False, base: Path | None = None) -> Comparison:
    """A row of row["task"] as a pair; `swapped` shows the second response first. Named pictures lie below `base`."""
    pair = _vl_pair(row) if row["task"] == "vl_rewardbench" else _mm_pair(row, base)
    return show(replace(pair, swapped=swapped))


def _vl_pair(row: dict) -> Comparison:
    """A row of VL-RewardBench; `human_ranking` holds the rank, 0 or 1, of each response."""
    name = str(row.get("id", ""))
    responses = texts_column(row, "response")
    ranking = column(row, "human_ranking")
    if len(responses) != 2 or ranking not in ([0, 1], [1, 0]):
        raise ValueError(f"row {row_name(row)!r}: needs 2 responses, ranked 0 and 1, not {len(responses)}, "
                         f"{shown(ranking)}")

    image = encoded_image(row.get("image"))
    question = text_column(row, "query").replace("<image>\n", "").replace("<image>", "")
    return Comparison(
        id=name,
        task="vl_rewardbench",
        prompt=(),                                                  # show() writes it
        images=(image,) if image else (),
        group={"group": _vl_group(name)} if name else {},
        question=question,
        responses=responses,
        better=1 + ranking.index(0))


def _vl_group(name: str) -> str:
    """The group of a pair, told by its id."""
    for start, group in VL_GROUPS.items():
        if name.lower().startswith(start):
            return group
    return "general"


def _mm_pair(row: dict, base: Path | None) -> Comparison:
    """A row of Multimodal RewardBench."""
    name = str(row.get("ID", ""))
    better = text_column(row, "Better")
    outputs = {"Output1": 1, "Output2": 2}
    if better not in outputs:
        raise ValueError(f"row {row_name(row)!r}: Better is {shown(better)}, not Output1 or Output2")

    image = encoded_image(row.get("Image"), base)
    return Comparison(
        id=name,
        task="mm_rewardbench",
        prompt=(),                                                  # show() writes it
        images=(image,) if image else (),
        group=_mm_group(name, row),
        question=text_column(row, "Text"),
        responses=(text_column(row, "Output1"), text_column(row, "Output2")),
        better=outputs[better])


def _mm_group(name: str, row: dict) -> dict[str, str]:
    """Category, and the part of safety or reasoning that a pair is reported in."""
    if not row.get("Category"):
        return {}
    category = text_column(row, "Category")
    if category not in MM_PARTS:
        return {"category": category, "split": category}
    start, part, other_part = MM_PARTS[category]
    if not name.lower().startswith(start):
        part = other_part
    return {"category": category, "split": f"{category}/{part}"}


def score(item: Item, response: str) -> Verdict:
    """Right if the verdict names the better response; a tie, another number, an echo or nothing is wrong."""
    if item.answer is None:
        raise ValueError(f"pair {item.id!r} has no preference to score against")
    side = parse_preference(response)
    if side is None:
        return Verdict(correct=False, answer=None)
    return Verdict(str(side) == item.answer, str(side))
