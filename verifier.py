"""The verifier: asks a frozen model whether a candidate answer is right, and reads its verdict.

    rubric prompt    (pictures, question, candidate)  ->  {"score": s}, s in [0, 1]; right means s >= 0.5
    verdict          the last JSON object with a "score" in the final text, or None: nothing is guessed

The paper ("When Good Verifiers Go Bad", arXiv 2606.14629) describes the prompt (task-agnostic, JSON with a score)
and does not print it; the wording below is ours. This file imports the standard library only: to use another
verifier (vLLM, an API), hand `score_candidates` a callable that answers chats.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RUBRIC = ('You grade an answer to a question about pictures. Reply with JSON only: {"score": s}, '
          's from 0.0 (wrong) to 1.0 (right).\nQuestion: ')
CANDIDATE = "\nAnswer to grade: "


@dataclass(frozen=True)
class Score:
    """A verifier's verdict on one candidate: `value` in [0, 1], or None when nothing could be parsed."""
    value: float | None
    text: str
    truncated: bool = False


def rubric_chat(chat: list[dict], candidate: str) -> list[dict]:
    """The rubric prompt for one candidate: the task's own question, then the candidate at the very end.

    `chat` is the question as the student saw it (Item.chat()); its last message is the user's. The candidate comes
    last so that the K prompts of one item share everything before it.
    """
    *earlier, question = chat
    content = question["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    parts = [{"type": "text", "text": RUBRIC}, *parts, {"type": "text", "text": CANDIDATE + candidate}]
    return [*earlier, {"role": "user", "content": parts}]


def score_candidates(answer: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                     candidates: list[list[str]]) -> list[list[Score]]:
    """Score every candidate of every item with the rubric prompt, greedily decoded.

    `answer(chats)` returns one completion a chat, with `.text` and `.finish_reason` ("stop" or "length").
    Returns one list a chat, one Score a candidate. Equal candidates of an item are asked about once.
    """
    asked = [(i, text) for i, texts in enumerate(candidates) for text in dict.fromkeys(texts)]
    completions = answer([rubric_chat(chats[i], text) for i, text in asked])
    scores = {key: Score(parse_score(c.text), c.text, c.finish_reason == "length")
              for key, c in zip(asked, completions, strict=True)}
    return [[scores[i, text] for text in texts] for i, texts in enumerate(candidates)]


def final_text(text: str) -> str:
    """What a response finally says: after the last `</think>`, inside the last `<answer>`; emphasis is dropped.

    A `<think>` that never closes leaves nothing: reasoning is not an answer.
    """
    head, closed, tail = text.rpartition("</think>")
    text = tail if closed else text
    if "<think>" in text:
        return ""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>"):].partition("</answer>")[0]
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return text.replace("**", "").replace("`", "").strip()


def parse_score(text: str) -> float | None:
    """The score of the last JSON object with a "score" in the final text; None unless it is a number in [0, 1].

    Fails closed: a last verdict that is malformed is not replaced by an earlier one.
    """
    verdict, rest = _last_object(final_text(text), "score")
    score = verdict.get("score")
    if '"score"' in rest or isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    return float(score) if 0.0 <= score <= 1.0 else None            # NaN compares false


def _last_object(text: str, key: str) -> tuple[dict, str]:
    """The last of the outermost JSON objects in `text` that hold `key` ({} if none does), and the text after it."""
    decoder, found, rest, at = json.JSONDecoder(), {}, text, text.find("{")
    while at >= 0:
        end = at + 1
        try:
            value, stop = decoder.raw_decode(text, at)
            if key in value:
                found, rest, end = value, text[stop:], stop
        except (json.JSONDecodeError, RecursionError):
            pass                                                     # not an object: look for the next brace
        at = text.find("{", end)
    return found, rest


# Forms of a preference, each with the group that names the better response. The last one in the text counts.
_PREFERENCE = re.compile(
    r"\[\[\s*(?P<bracket>\w+)\s*\]\]"
    r"|\b(?:answer|response|assistant)\s*\(?(?P<answer>\w+)\)?\s+is\s+(?:the\s+)?(?:slightly\s+|much\s+)?better\b"
    r'|"better"\s*:\s*"?(?P<json>\w+)"?', re.IGNORECASE)
_SIDE = {"1": 1, "a": 1, "2": 2, "b": 2}


def parse_preference(text: str) -> int | None:
    """Which of two responses a judge prefers: 1, 2, or None for a tie, another number, or no verdict.

    Reads the last of `[[A]]`, `Answer 1 is better`, `{"better": 1}` in the final text, or a reply that is nothing
    but the label.
    """
    final = final_text(text)
    matches = [next(g for g in m.groups() if g is not None) for m in _PREFERENCE.finditer(final)]
    label = matches[-1] if matches else final.strip(" .:()[]")
    return _SIDE.get(label.lower())
