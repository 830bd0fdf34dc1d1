"""Judgments of pairs: the prompt, both orders, the filter, the balance, and the loss on a judgment."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import judge
from eval import load_task
from fake_judge import FakeJudge, larger, questions
from judge import Judgment, SyntheticPair, balanced, judge_pairs, kept_judgments
from model import load_vlm
from tasks.rewardbench import Comparison, show
from verifier import COMPARISON, comparison_chat

# ---- comparisons

def test_comparison_prompt_is_the_benchmarks() -> None:
    """The same text and pictures as `eval.py --task jsonl` shows; braces in a response stay what they are."""
    item = load_task("red", limit=1)[0]
    question = item.prompt[1]
    pair = show(Comparison("x", "jsonl", (), item.images, question=question, responses=("{second}", "5")))

    def flat(chat: list[dict]) -> tuple[str, list]:
        content = chat[0]["content"]
        return ("".join(part.get("text", "<picture>") for part in content),
                [part["image"].tobytes() for part in content if part["type"] == "image"])
    assert flat(comparison_chat(item.chat(), "{second}", "5")) == flat(pair.chat())
    assert flat(comparison_chat([{"role": "user", "content": "Why?"}], "a", "b"))[0] == COMPARISON.replace(
        "{question}", "Why?").replace("{first}", "a").replace("{second}", "b")


# ---- judgments

PAIRS = [SyntheticPair("a", "9", "1"), SyntheticPair("b", "2", "8"), SyntheticPair("c", "6", "5")]


def test_judgments_in_both_orders() -> None:
    fake = FakeJudge(larger)
    judged = judge_pairs(fake, questions("qa", "qb", "qc"), PAIRS)
    assert fake.asked == [("9", "1"), ("1", "9"), ("2", "8"), ("8", "2"), ("6", "5"), ("5", "6")]
    assert judged[0] == (Judgment("a", "9", "1", 1, 1, (7, 1), "Hm. Answer 1 is better."),
                         Judgment("a", "1", "9", 2, 2, (7, 2), "Hm. Answer 2 is better."))
    assert [[j.agrees for j in both] for both in judged] == [[True, True], [False, False], [True, True]]
    with pytest.raises(ValueError):
        judge_pairs(fake, questions("qa"), PAIRS)


@pytest.mark.parametrize("rule, both, each", [
    (larger, ["a", "a", "c", "c"], ["a", "a", "c", "c"]),
    (lambda a, b: 1, [], ["a", "b", "c"]), (lambda a, b: 2, [], ["a", "b", "c"]),        # a judge of places
    (lambda a, b: None, [], []),
    (lambda a, b: larger(a, b) if a == "9" else None, [], ["a"]),
    (lambda a, b: 1 if a > b else None, [], ["a", "b", "c"][::2])])
def test_filter(rule: Callable, both: list[str], each: list[str]) -> None:
    """A pair is kept if both orders agree with it; a judge that always names the first answer keeps none."""
    judged = judge_pairs(FakeJudge(rule), questions("qa", "qb", "qc"), PAIRS)
    assert [j.item_id for j in kept_judgments(judged)] == both
    assert [j.item_id for j in kept_judgments(judged, both_orders=False)] == each
    assert kept_judgments(judge_pairs(FakeJudge(rule, cut=True), questions("qa", "qb", "qc"), PAIRS)) == []


@pytest.mark.parametrize("sides, most, left", [
    ((1, 2, 1, 2), 100, 2), ((1, 1, 1, 2), 100, 1), ((1, 1, 1), 100, 0), ((), 100, 0), ((2, 2, 1, 2, 1), 100, 2),
    ((1, 2, 1, 2, 1, 2), 5, 2), ((1, 2), 1, 0)])
def test_balance(sides: tuple[int, ...], most: int, left: int) -> None:
    judgments = [Judgment(str(k), "x", "y", side, side, (k,), "") for k, side in enumerate(sides)]
    found = balanced(judgments, 0, most)
    assert sorted(j.side for j in found) == [1] * left + [2] * left
    assert found == [j for j in judgments if j in found] == balanced(judgments, 0, most)


# ---- the loss

def test_loss_is_on_the_judgment_alone() -> None:
    """Teacher-forced log-probabilities of the sampled tokens, each predicted by what precedes it."""
    vlm = load_vlm(judge.Config().verifier)
    items = load_task("red", limit=2)
    chats = [comparison_chat(item.chat(), *sides) for item, sides in zip(items, (("3", "4"), ("11", "5")))]
    said = [vlm.processor.encode("I see 3."), vlm.processor.encode("No.\n")]
    with torch.no_grad():
        found = judge.completion_logps(vlm, chats, said)
        for chat, ids, total in zip(chats, said, found):
            text = [*chat, {"role": "assistant", "content": vlm.processor.decode(ids)}]
            batch = vlm.processor([text], add_generation_prompt=False)
            start = vlm.processor([chat]).input_ids.shape[1]
            logps = vlm(batch).log_softmax(-1)[0]
            assert batch.input_ids[0, start:start + len(ids)].tolist() == ids
            expected = sum(logps[start + k - 1, token] for k, token in enumerate(ids))
            assert torch.allclose(total, expected, atol=1e-4)
