"""The verifier: asks a model whether a candidate answer is right, or which of two is better.

    rubric       (pictures, question, candidate)    ->  {"score": s}, s in [0, 1]; s >= 0.5: right
    verdict      the last JSON object with a "score" in the final text, or None: nothing is guessed
    comparison   (pictures, question, two answers)  ->  Overall Judgment: Answer 1 is better.

The paper ("When Good Verifiers Go Bad", arXiv 2606.14629) describes the rubric prompt (the same for
every task, a JSON score) and does not print it; the wording below is ours. This file imports the
standard library only: to use another verifier (vLLM, an API), hand `score_candidates` a callable
that answers chats.

Letters: K candidates of an item.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Protocol

RUBRIC = ('You grade an answer to a question about pictures. Reply with JSON only: {"score": s}, '
          's from 0.0 (wrong) to 1.0 (right).\nQuestion: ')
CANDIDATE = "\nAnswer to grade: "
COMPARISON = """\
You are a highly capable multimodal AI assistant tasked with evaluating answers to visual \
questions. Look at the picture, read the question and both answers, and weigh them by accuracy (do \
they agree with the picture?), completeness, clarity and relevance. Neither the order of the \
answers nor their length may count.

Question: {question}

Answer 1: {first}

Answer 2: {second}

Explain your judgment briefly. Then end with one line of exactly this form, where X is 1 or 2:
Overall Judgment: Answer X is better."""
REPLIES = ('{"score": ', '{"score": 0.')    # a reply up to the score's first and second digit
LAST_CHARACTERS = 20_000                    # of a text are searched for a verdict; bounds the time

Chat = list[dict[str, Any]]                 # messages as Hugging Face writes them, the user's last


class Reply(Protocol):
    """What a model answers to a chat; model.Completion is one."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...     # "stop", or "length" where the reply was cut off


@dataclass(frozen=True)
class Score:
    """A verifier's verdict on one candidate: `value` in [0, 1], None when none could be read."""
    value: float | None
    text: str
    truncated: bool = False


# ---- prompts

def rubric_chat(chat: Chat, candidate: str) -> Chat:
    """The rubric prompt for one candidate: the task's own question, then the candidate.

    `chat` is the question as the student saw it (Item.chat()). The candidate comes at the very end,
    so the prompts of an item's K candidates share all that precedes it.
    """
    before = {"type": "text", "text": RUBRIC}
    after = {"type": "text", "text": CANDIDATE + candidate}
    content = [before, *_parts(chat), after]
    earlier = chat[:-1]
    return [*earlier, {"role": "user", "content": content}]


def comparison_chat(chat: Chat, first: str, second: str) -> Chat:
    """The comparison prompt: the task's own question, then both answers in the order given."""
    # The template is cut at its placeholders, not formatted: an answer may contain braces.
    before, before_first, before_second, end = re.split(r"\{\w+\}", COMPARISON)
    after = before_first + first + before_second + second + end
    return framed_chat(chat, before, after)


def framed_chat(chat: Chat, before: str, after: str) -> Chat:
    """The question of `chat` between two texts; pictures that open the question stay in front."""
    content = _parts(chat)
    pictures = 0
    while pictures < len(content) and content[pictures]["type"] == "image":
        pictures += 1

    content.insert(pictures, {"type": "text", "text": before})
    content.append({"type": "text", "text": after})
    earlier = chat[:-1]
    return [*earlier, {"role": "user", "content": content}]


def _parts(chat: Chat) -> list[dict[str, Any]]:
    """The texts and pictures of the last message in order, as a new list."""
    content = chat[-1]["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content)


# ---- scores

def score_candidates(answer: Callable[[list[Chat]], Sequence[Reply]], chats: list[Chat],
                     candidates: list[list[str]]) -> list[list[Score]]:
    """Score every candidate of every item with the rubric prompt.

    `chats` holds each item's question, `candidates` each item's answers to it. `answer(chats)`
    returns one reply a chat, decoded greedily. Equal candidates of an item are asked about once.
    Returns one list an item, one Score a candidate; raises ValueError where the numbers differ.
    """
    prompts = _rubric_prompts(chats, candidates)
    scores = []
    for reply in answer(list(prompts.values())):
        value = parse_score(reply.text)
        truncated = reply.finish_reason == "length"
        scores.append(Score(value, reply.text, truncated))
    return _scores_by_item(prompts, scores, candidates)


def expected_scores(digits: Callable[[list[Chat]], Sequence[Sequence[Sequence[float]]]],
                    chats: list[Chat], candidates: list[list[str]]) -> list[list[Score]]:
    """Score as `score_candidates` does, by the expected score, without decoding.

    `digits(chats)` returns for each chat, and each of REPLIES as the reply's beginning, the
    probabilities that the digits 0 to 9 come next. Ours, not the paper's: decoded scores take few
    values, expected ones tell more candidates apart.
    """
    prompts = _rubric_prompts(chats, candidates)
    digits_of = digits(list(prompts.values()))
    scores = [_expected_score(first, second) for first, second in digits_of]
    return _scores_by_item(prompts, scores, candidates)


def _expected_score(first: Sequence[float], second: Sequence[float]) -> Score:
    """P(1) + P(0) E[d] / 10, where d is the first decimal; what begins with 1 counts as 1.

    `first` and `second` hold the probabilities of the digits 0 to 9 before and after the point.
    There is no score where neither 0 nor 1 is likely to come first: none would be replied.
    """
    p_zero = first[0]
    p_one = first[1]
    begins_with_score = p_zero + p_one >= 0.5
    if not begins_with_score:
        return Score(None, "")

    total = sum(second)                     # below 1: other tokens than digits may come next
    weighted = sum(digit * p for digit, p in enumerate(second))
    decimals = weighted / (10 * total) if total else 0.0
    value = min(p_one + p_zero * decimals, 1.0)
    return Score(value, f'{{"score": {value:.3f}}}')


def _rubric_prompts(chats: list[Chat], candidates: list[list[str]]) -> dict[tuple[int, str], Chat]:
    """The prompt of each candidate by (item number, candidate): one for equal ones of an item."""
    _check_lengths(chats, candidates)
    prompts = {}
    for item, texts in enumerate(candidates):
        for text in texts:
            prompts[item, text] = rubric_chat(chats[item], text)
    return prompts


def _scores_by_item(keys: Iterable[tuple[int, str]], scores: list[Score],
                    candidates: list[list[str]]) -> list[list[Score]]:
    """The scores of the candidates that `keys` name, in the shape of `candidates`."""
    score_of = dict(zip(keys, scores, strict=True))
    rows = []
    for item, texts in enumerate(candidates):
        rows.append([score_of[item, text] for text in texts])
    return rows


def _check_lengths(chats: list[Chat], candidates: list[list[str]]) -> None:
    if len(chats) != len(candidates):
        raise ValueError(f"{len(chats)} chats and {len(candidates)} lists of candidates "
                         "do not belong together")


# ---- pairwise scores

@dataclass(frozen=True)
class _Comparison:
    """The outcome of comparing two candidates in one order."""
    side: int | None                        # the better one's place, None where none could be read
    truncated: bool


# (item number, text shown first, text shown second) -> outcome
_Comparisons = dict[tuple[int, str, str], _Comparison]


def pairwise_scores(answer: Callable[[list[Chat]], Sequence[Reply]], chats: list[Chat],
                    candidates: list[list[str]]) -> list[list[Score]]:
    """Score a candidate by the share of its comparisons that it wins.

    A candidate is compared with the item's other K - 1 candidates, in both orders. `answer` is as
    in `score_candidates`. Each ordered pair of different texts is asked about once. Equal texts
    are not asked about: they count as half won.
    """
    _check_lengths(chats, candidates)

    prompts = {}
    for item, texts in enumerate(candidates):
        distinct = dict.fromkeys(texts)
        for first, second in permutations(distinct, 2):
            prompts[item, first, second] = comparison_chat(chats[item], first, second)

    replies = answer(list(prompts.values()))
    comparisons: _Comparisons = {}
    for key, reply in zip(prompts, replies, strict=True):
        side = parse_preference(reply.text)
        truncated = reply.finish_reason == "length"
        comparisons[key] = _Comparison(side, truncated)

    scores = []
    for item, texts in enumerate(candidates):
        scores.append([_share_won(comparisons, item, texts, text) for text in texts])
    return scores


def _share_won(comparisons: _Comparisons, item: int, texts: list[str], text: str) -> Score:
    """The share of its 2 (K - 1) comparisons that `text`, one of an item's K `texts`, wins.

    A comparison whose verdict cannot be read is not won. There is no score where none of the
    verdicts can be read, nor where K is 1.
    """
    others = [other for other in texts if other != text]
    equals = len(texts) - 1 - len(others)   # candidates of the same text beside this one
    total = 2 * (len(texts) - 1)

    results = []                            # (the place where `text` was shown, the outcome)
    for other in others:
        results.append((1, comparisons[item, text, other]))
        results.append((2, comparisons[item, other, text]))

    # Whatever a judge says of two equal texts, each of them wins one of the two orders.
    won = equals
    for place, comparison in results:
        if comparison.side == place:
            won += 1
    sides = [comparison.side for _, comparison in results]
    none_read = bool(sides) and sides.count(None) == len(sides)
    value = None if total == 0 or none_read else won / total

    truncated = any(comparison.truncated for _, comparison in results)
    return Score(value, f"{won} of {total} won", truncated)


# The ways to score: score(ask, chats, candidates). What `ask` must answer each docstring says.
VERDICTS: dict[str, Callable[..., list[list[Score]]]] = {
    "json": score_candidates, "logits": expected_scores, "pairwise": pairwise_scores}


# ---- the final text of a response

# LaTeX's font commands, \text{x}, \textbf{x}, \mathrm{x}, ...: the group is inside the braces.
_LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|bb|sf)|boldsymbol)"
                    r"\s?\{([^{}]*)\}")
# Markdown's *x*, where the stars hug words. Products (2*3*4) and bullets (* x) stay.
_STARS = re.compile(r"\*(?<![\w*]\*)(?=[^\s*])([^*\n]{1,200})(?<=\S)\*(?![\w*])")
# Markdown's _x_ and __x__, likewise. Names (a_b) and rules (___) stay.
_RULES = re.compile(r"_(?<!\w_)_?(?=[^\s_])([^_\n]{1,200})(?<=\S)__?(?!\w)")


def final_text(text: str) -> str:
    """What a response finally says: after the last `</think>`, inside the last `<answer>`.

    Emphasis is dropped. A `<think>` that never closes leaves nothing: reasoning is not an answer.
    Takes time linear in the text's length.
    """
    return drop_emphasis(_final_part(text))


def _final_part(text: str) -> str:
    _, closed, after_thinking = text.rpartition("</think>")
    if closed:
        text = after_thinking
    if "<think>" in text:
        return ""

    start = text.rfind("<answer>")
    if start < 0:
        return text
    answer, _, _ = text[start + len("<answer>"):].partition("</answer>")
    return answer


def drop_emphasis(text: str) -> str:
    """A text without Markdown's bold, italics and code marks and LaTeX's font commands; trimmed."""
    return _drop_marks(_LATEX.sub(r"\1", text))


def _drop_marks(text: str) -> str:
    """A text without Markdown's bold, italics and code marks; trimmed."""
    text = text.replace("**", "").replace("`", "")
    text = _STARS.sub(r"\1", text)
    text = _RULES.sub(r"\1", text)
    return text.strip()


# ---- verdicts

_OBJECT = re.compile(r'\{\s*"')             # where a JSON object with a key may begin


def parse_score(text: str) -> float | None:
    """The score of the last JSON object with a "score" in the final text; else None.

    None, too, unless it is a number in [0, 1], and where a later verdict is malformed: an earlier
    one does not stand in for it. LaTeX is left alone, for JSON has backslashes of its own.
    """
    final = _drop_marks(_final_part(text))[-LAST_CHARACTERS:]
    verdict, rest = _last_object(final, "score")
    if re.search("[\"']score[\"']", rest):  # a later verdict, which is not JSON
        return None

    score = verdict.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    return float(score) if 0.0 <= score <= 1.0 else None            # NaN compares false


def _last_object(text: str, key: str) -> tuple[dict[str, Any], str]:
    """The last JSON object in `text` that holds `key`, {} if none does, and the text after it.

    An object within another that holds `key` is a part of that one.
    """
    decoder = json.JSONDecoder()
    last: dict[str, Any] = {}
    rest = text
    position = 0
    while match := _OBJECT.search(text, position):
        position = match.end()
        try:
            value, end = decoder.raw_decode(text, match.start())
        except ValueError:                  # not an object: go on to the next brace
            continue
        except RecursionError:              # braces within braces, a thousand deep: no verdict
            return {}, text
        if key in value:
            last = value
            rest = text[end:]
            position = end
    return last, rest


# The forms of a preference, each with a group for the better response's label:
# [[A]]; Answer 1 is better; Verdict: 1 (ends a line); \boxed{1}; {"better": 1}.
_PREFERENCE = re.compile(
    r"\[\[\s?(?P<bracket>[^\[\]\n]{1,40}?)\s?\]\]"
    r"|\b(?:answer|response|assistant)\s?\(?(?P<answer>\w{1,20})\)?"
    r"\s+is\s+(?:the\s+)?(?:slightly\s+|much\s+)?better\b"
    r"|\b(?:judge?ment|verdict|preference|winner)(?:\s+is)?\s?:?"
    r"\s?(?:answer|response|assistant)?\s?\(?(?P<verdict>\w{1,20})\)?[.!]?$"
    r"|\\boxed\{\s?(?:answer|response|assistant)?\s?(?P<boxed>[^{}\n]{0,40})\}"
    r'|"better"\s?:\s?(?P<json>"[^"\n]{0,40}"|[^\s,}]{0,40})', re.IGNORECASE | re.MULTILINE)
# A label and nothing else: 1; (A).; Answer 2.
_LABEL = re.compile(r"(?:answer|response|assistant)?[\s(\[]*(\w+)[\s)\].:!]*", re.IGNORECASE)
# After a preference that has a condition, as in the instructions: "[[A]]" if assistant A is better.
_CONDITION = re.compile(r"[\"'”\s]{0,3}if\b", re.IGNORECASE)
# In the same clause before one that is not stated: if, neither, don't think, not sure, ...
_HYPOTHETICAL = re.compile(
    r"(?:\b(?:if|whether|neither|nor)|(?:not|n['’]t) (?:think|believe|say|clear|sure|true))\b"
    r"[^.,;:!?\n]*$", re.IGNORECASE)
# Before the second of two alternatives: Answer 1 or ...; Answer 1/...
_EITHER = re.compile(r"\b(?:answer|response|assistant)\s?\(?\w{1,20}\)?\s?(?:or|and|/)\s?$",
                     re.IGNORECASE)
# Between two preferences that are alternatives: [[A]] or [[B]]; [[A]], [[B]]; [[A]][[B]].
_OR = re.compile(r"\s?[,/]?\s?(?:or|and)?\s?", re.IGNORECASE)
_SIDE = {"1": 1, "a": 1, "2": 2, "b": 2}


def parse_preference(text: str) -> int | None:
    """Which of two responses a judge prefers: 1, 2, or None for a tie, an echo or no verdict.

    Reads the last of `[[A]]`, `Answer 1 is better`, `Verdict: 1`, `\\boxed{1}`, `{"better": 1}` in
    the final text, or a reply that is nothing but the label. A preference within a condition or a
    denial ("[[A]] if ...", "neither Answer 1 nor Answer 2 is better") echoes the instructions or
    declines, and is passed over. "[[A]] or [[B]]" is no verdict; a tie after a verdict is a tie.
    """
    final = final_text(text)[-LAST_CHARACTERS:]
    preferences = list(_PREFERENCE.finditer(final))
    if not preferences:
        return _side(final)
    stated = [preference for preference in preferences if _is_stated(preference)]
    if not stated:
        return None

    last = stated[-1]
    if last["answer"] and _EITHER.search(_text_before(last, 40)):   # Answer 1 or Answer 2 is better
        return None
    side = _side(_label(last))
    if len(stated) > 1:
        previous = stated[-2]
        joined = _OR.fullmatch(final, previous.end(), last.start())
        if joined and side != _side(_label(previous)):              # [[A]] or [[B]]
            return None
    return side


def _is_stated(preference: re.Match[str]) -> bool:
    """Whether no condition follows a match of _PREFERENCE and no "if" or denial precedes it."""
    text = preference.string
    conditional = _CONDITION.match(text, preference.end())
    hypothetical = _HYPOTHETICAL.search(_text_before(preference, 80))
    return not conditional and not hypothetical


def _text_before(match: re.Match[str], width: int) -> str:
    """At most `width` characters that precede a match."""
    end = match.start()
    start = max(0, end - width)
    return match.string[start:end]


def _label(preference: re.Match[str]) -> str:
    """The label in a match of _PREFERENCE: the text of the one group that took part."""
    labels = [label for label in preference.groups() if label is not None]
    return labels[0]


def _side(label: str) -> int | None:
    """1 for the label "1" or "A", 2 for "2" or "B", as _LABEL allows; else None."""
    match = _LABEL.fullmatch(label.strip(' "'))
    if match is None:
        return None
    return _SIDE.get(match[1].lower())
