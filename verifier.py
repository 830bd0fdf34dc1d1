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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

RUBRIC = ('You grade an answer to a question about pictures. Reply with JSON only: {"score": s}, '
          's from 0.0 (wrong) to 1.0 (right).\nQuestion: ')
CANDIDATE = "\nAnswer to grade: "
REPLIES = ('{"score": ', '{"score": 0.')                             # after which a score's digits are read
LAST_CHARACTERS = 20_000                                             # a verdict comes last; no more is searched for it


@dataclass(frozen=True)
class Score:
    """A verifier's verdict on one candidate: `value` in [0, 1], or None when nothing could be parsed."""
    value: float | None
    text: str
    truncated: bool = False


def rubric_chat(chat: list[dict], candidate: str) -> list[dict]:
    """The rubric prompt for one candidate: the task's own question, then the candidate at the very end.

    `chat` is the question as the student saw it (Item.chat()); its last message is the user's. The candidate comes
    last: what precedes it is the same in all K prompts of an item.
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
    return _for_each(lambda asked: [Score(parse_score(c.text), c.text, c.finish_reason == "length")
                                    for c in answer(asked)], chats, candidates)


def expected_scores(odds: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                    candidates: list[list[str]]) -> list[list[Score]]:
    """Score as `score_candidates` does, by the expected score, without decoding: P(1) + P(0) * E[first decimal].

    `odds(chats)` returns for each chat, and each of REPLIES as the reply's beginning, the probabilities that the digits
    0 to 9 come next. More than two levels come of it, where decoded scores have few. Ours, not the paper's. None where
    neither 0 nor 1 is likely to come first: a model that would not reply with a score has none.
    """
    def expected(first: Sequence[float], decimal: Sequence[float]) -> Score:
        mean = sum(d * p for d, p in enumerate(decimal)) / (10 * sum(decimal) or 1)
        value = min(first[1] + first[0] * mean, 1.0) if first[0] + first[1] >= 0.5 else None
        return Score(value, "" if value is None else f'{{"score": {value:.3f}}}')
    return _for_each(lambda asked: [expected(*found) for found in odds(asked)], chats, candidates)


def _for_each(judge: Callable[[list[list[dict]]], Iterable[Score]], chats: list[list[dict]],
              candidates: list[list[str]]) -> list[list[Score]]:
    """The judgement of every candidate's rubric prompt; equal candidates of an item are asked about once."""
    if len(chats) != len(candidates):
        raise ValueError(f"{len(chats)} chats and {len(candidates)} lists of candidates do not belong together")
    asked = [(i, text) for i, texts in enumerate(candidates) for text in dict.fromkeys(texts)]
    scores = dict(zip(asked, judge([rubric_chat(chats[i], text) for i, text in asked]), strict=True))
    return [[scores[i, text] for text in texts] for i, texts in enumerate(candidates)]


# a way to score -> score(ask, chats, candidates): what `ask` must answer is said in each one's docstring
VERDICTS: dict[str, Callable] = {"json": score_candidates, "logits": expected_scores}


# \text{x} and its kin; *x* and _x_ around words, but not products (2*3), bullets (* x), names (a_b) or rules (___)
_LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|bb|sf)|boldsymbol)\s?\{([^{}]*)\}")
_STARS = re.compile(r"\*(?<![\w*]\*)(?=[^\s*])([^*\n]{1,200})(?<=\S)\*(?![\w*])")
_RULES = re.compile(r"_(?<!\w_)_?(?=[^\s_])([^_\n]{1,200})(?<=\S)__?(?!\w)")


def final_text(text: str) -> str:
    """What a response finally says: after the last `</think>`, inside the last `<answer>`; emphasis is dropped.

    A `<think>` that never closes leaves nothing: reasoning is not an answer. Time is linear in the text's length.
    """
    head, closed, tail = text.rpartition("</think>")
    text = tail if closed else text
    if "<think>" in text:
        return ""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>"):].partition("</answer>")[0]
    return drop_emphasis(text)


def drop_emphasis(text: str) -> str:
    """A text without Markdown's bold, italics and code marks and without LaTeX's font commands; trimmed."""
    text = _LATEX.sub(r"\1", text).replace("**", "").replace("`", "")
    return _RULES.sub(r"\1", _STARS.sub(r"\1", text)).strip()


def parse_score(text: str) -> float | None:
    """The score of the last JSON object with a "score" in the final text; None unless it is a number in [0, 1].

    Fails closed: a last verdict that is malformed is not replaced by an earlier one.
    """
    verdict, rest = _last_object(final_text(text)[-LAST_CHARACTERS:], "score")
    score = verdict.get("score")
    if re.search("[\"']score[\"']", rest) or isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    return float(score) if 0.0 <= score <= 1.0 else None            # NaN compares false


_OBJECT = re.compile(r'\{\s*"')                                      # where a JSON object with a key may begin


def _last_object(text: str, key: str) -> tuple[dict, str]:
    """The last of the outermost JSON objects in `text` that hold `key` ({} if none does), and the text after it."""
    decoder, found, rest, match = json.JSONDecoder(), {}, text, _OBJECT.search(text)
    while match:
        start, end = match.start(), match.end()
        try:
            value, stop = decoder.raw_decode(text, start)
            if key in value:
                found, rest, end = value, text[stop:], stop
        except ValueError:
            pass                                                     # not an object: look for the next brace
        except RecursionError:
            return {}, text                                          # nested a thousandfold: no verdict
        match = _OBJECT.search(text, end)
    return found, rest


# Forms of a preference, each with the group that names the better response. The last one in the text counts, also
# where it names neither side: a tie after a verdict is a tie.
_PREFERENCE = re.compile(
    r"\[\[\s?(?P<bracket>[^\[\]\n]{1,40}?)\s?\]\]"
    r"|\b(?:answer|response|assistant)\s?\(?(?P<answer>\w{1,20})\)?\s+is\s+(?:the\s+)?(?:slightly\s+|much\s+)?better\b"
    r"|\b(?:judge?ment|verdict|preference|winner)(?:\s+is)?\s?:?\s?(?:answer|response|assistant)?\s?\(?"
    r"(?P<verdict>\w{1,20})\)?[.!]?$"
    r"|\\boxed\{\s?(?:answer|response|assistant)?\s?(?P<boxed>[^{}\n]{0,40})\}"
    r'|"better"\s?:\s?(?P<json>"[^"\n]{0,40}"|[^\s,}]{0,40})', re.IGNORECASE | re.MULTILINE)
_LABEL = re.compile(r"(?:answer|response|assistant)?[\s(\[]*(\w+)[\s)\].:!]*", re.IGNORECASE)
_CONDITION = re.compile(r"[\"'”\s]{0,3}if\b", re.IGNORECASE)
_HYPOTHETICAL = re.compile(r"\b(?:if|whether|neither|nor|not (?:think|believe|say|clear|sure))\b[^.,;:!?\n]*$",
                           re.IGNORECASE)
_OR = re.compile(r"\s?[,/]?\s?(?:or|and)?\s?", re.IGNORECASE)
_SIDE = {"1": 1, "a": 1, "2": 2, "b": 2}


def parse_preference(text: str) -> int | None:
    """Which of two responses a judge prefers: 1, 2, or None for a tie, another number, an echo, or no verdict.

    Reads the last of `[[A]]`, `Answer 1 is better`, `Verdict: 1`, `\\boxed{1}`, `{"better": 1}` in the final text, or
    a reply that is nothing but the label. What stands in a condition or a denial ("[[A]] if ...", "neither ... nor
    Answer 2 is better") echoes the instructions or declines, and is passed over; "[[A]] or [[B]]" is no verdict.
    """
    final = final_text(text)[-LAST_CHARACTERS:]
    matches = list(_PREFERENCE.finditer(final))
    stated = [m for m in matches if not _CONDITION.match(final, m.end())
              and not _HYPOTHETICAL.search(final[max(0, m.start() - 80):m.start()])]
    if not matches:
        return _side(final)
    if not stated:
        return None
    sides = [_side(next(g for g in m.groups() if g is not None)) for m in stated]
    joined = len(stated) > 1 and _OR.fullmatch(final, stated[-2].end(), stated[-1].start())
    return None if joined and sides[-2] != sides[-1] else sides[-1]


def _side(label: str) -> int | None:
    whole = _LABEL.fullmatch(label.strip(' "'))
    return _SIDE.get(whole[1].lower()) if whole else None
