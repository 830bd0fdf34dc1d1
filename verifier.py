"""The verifier: asks a model whether a candidate answer is right, or which of two is better, and reads its verdict.

    rubric prompt    (pictures, question, candidate)  ->  {"score": s}, s in [0, 1]; right means s >= 0.5
    verdict          the last JSON object with a "score" in the final text, or None: nothing is guessed

The paper ("When Good Verifiers Go Bad", arXiv 2606.14629) describes the prompt (task-agnostic, JSON with a score)
and does not print it; the wording below is ours. This file imports the standard library only: to use another
verifier (vLLM, an API), hand `score_candidates` a callable that answers chats.

The judge ("Self-Improving VLM Judges Without Human Annotations", arXiv 2512.05145): pairs are made without labels (the
majority of 16 samples against another; a response against its altered self), judged in both orders; what agrees with
the pairs in both is what the judge is trained on, in its own words. The loop that trains it is judge.py.
"""
from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

RUBRIC = ('You grade an answer to a question about pictures. Reply with JSON only: {"score": s}, '
          's from 0.0 (wrong) to 1.0 (right).\nQuestion: ')
CANDIDATE = "\nAnswer to grade: "
COMPARISON = """You are a highly capable multimodal AI assistant tasked with evaluating answers to visual questions. \
Look at the picture, read the question and both answers, and weigh them by accuracy (do they agree with the picture?), \
completeness, clarity and relevance. Neither the order of the answers nor their length may count.

Question: {question}

Answer 1: {first}

Answer 2: {second}

Explain your judgment briefly. Then end with one line of exactly this form, where X is 1 or 2:
Overall Judgment: Answer X is better."""
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
    parts = [{"type": "text", "text": RUBRIC}, *_parts(chat), {"type": "text", "text": CANDIDATE + candidate}]
    return [*chat[:-1], {"role": "user", "content": parts}]


def _parts(chat: list[dict]) -> list[dict]:
    """The last message's content, texts and pictures in order."""
    content = chat[-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def comparison_chat(chat: list[dict], first: str, second: str) -> list[dict]:
    """The comparison prompt: the task's own question, then both answers, numbered in the order they are shown."""
    head, one, two, tail = re.split(r"\{\w+\}", COMPARISON)
    return _framed(chat, head, one + first + two + second + tail)


def _framed(chat: list[dict], head: str, tail: str) -> list[dict]:
    """The question between two texts; pictures that open it stay in front, as tasks/rewardbench.py shows them."""
    parts = _parts(chat)
    opening = next((k for k, part in enumerate(parts) if part["type"] != "image"), len(parts))
    parts.insert(opening, {"type": "text", "text": head})
    return [*chat[:-1], {"role": "user", "content": [*parts, {"type": "text", "text": tail}]}]


def score_candidates(answer: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                     candidates: list[list[str]]) -> list[list[Score]]:
    """Score every candidate of every item with the rubric prompt, greedily decoded.

    `answer(chats)` returns one completion a chat, with `.text` and `.finish_reason` ("stop" or "length").
    Returns one list a chat, one Score a candidate. Equal candidates of an item are asked about once.
    """
    return _for_each(lambda asked: [Score(parse_score(c.text), c.text, c.finish_reason == "length")
                                    for c in answer(asked)], chats, candidates)


def expected_scores(digits: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                    candidates: list[list[str]]) -> list[list[Score]]:
    """Score as `score_candidates` does, by the expected score, without decoding: P(1) + P(0) * E[first decimal].

    `digits(chats)` returns for each chat, and each of REPLIES as the reply's beginning, the probabilities that 0 to 9
    come next. More than two levels come of it, where decoded scores have few. Ours, not the paper's. None where
    neither 0 nor 1 is likely to come first: a model that would not reply with a score has none.
    """
    def expected(first: Sequence[float], decimal: Sequence[float]) -> Score:
        mean = sum(d * p for d, p in enumerate(decimal)) / (10 * sum(decimal) or 1)
        value = min(first[1] + first[0] * mean, 1.0) if first[0] + first[1] >= 0.5 else None
        return Score(value, "" if value is None else f'{{"score": {value:.3f}}}')
    return _for_each(lambda asked: [expected(*found) for found in digits(asked)], chats, candidates)


def _for_each(judge: Callable[[list[list[dict]]], Iterable[Score]], chats: list[list[dict]],
              candidates: list[list[str]]) -> list[list[Score]]:
    """The judgement of every candidate's rubric prompt; equal candidates of an item are asked about once."""
    if len(chats) != len(candidates):
        raise ValueError(f"{len(chats)} chats and {len(candidates)} lists of candidates do not belong together")
    asked = [(i, text) for i, texts in enumerate(candidates) for text in dict.fromkeys(texts)]
    scores = dict(zip(asked, judge([rubric_chat(chats[i], text) for i, text in asked]), strict=True))
    return [[scores[i, text] for text in texts] for i, texts in enumerate(candidates)]


def pairwise_scores(answer: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                    candidates: list[list[str]]) -> list[list[Score]]:
    """Score a candidate by the share of its comparisons with the item's other K - 1, in both orders, that it wins.

    `answer` as in `score_candidates`. A comparison without a verdict is not won; None where none of a candidate's has
    one. Each ordered pair of different texts is asked about once. Equal texts are not compared: whatever a judge says
    of them, each wins one of the two orders, so they count as half won. So all candidates of an item are worth 0.5
    where all are equal. A lone candidate has no score.
    """
    if len(chats) != len(candidates):
        raise ValueError(f"{len(chats)} chats and {len(candidates)} lists of candidates do not belong together")
    asked = [(i, a, b) for i, texts in enumerate(candidates) for a in dict.fromkeys(texts)
             for b in dict.fromkeys(texts) if a != b]
    replies = dict(zip(asked, answer([comparison_chat(chats[i], a, b) for i, a, b in asked]), strict=True))
    sides = {key: parse_preference(reply.text) for key, reply in replies.items()}

    def judged(i: int, texts: list[str], text: str) -> Score:
        met = [((i, text, other), (i, other, text)) for other in texts if other != text]
        wins = len(texts) - 1 - len(met) + sum((sides[ahead] == 1) + (sides[behind] == 2) for ahead, behind in met)
        count, keys = 2 * (len(texts) - 1), [key for both in met for key in both]
        known = count > 0 and (not met or any(sides[key] is not None for key in keys))
        return Score(wins / count if known else None, f"{wins} of {count} won",
                     any(replies[key].finish_reason == "length" for key in keys))
    return [[judged(i, texts, text) for text in texts] for i, texts in enumerate(candidates)]


# a way to score -> score(ask, chats, candidates): what `ask` must answer is said in each one's docstring
VERDICTS: dict[str, Callable] = {"json": score_candidates, "logits": expected_scores, "pairwise": pairwise_scores}


# ---- pairs without labels, and what a judge makes of them (arXiv 2512.05145)

@dataclass(frozen=True)
class SyntheticPair:
    """Two responses to the question of an item; that `better` is the better one is supposed, nobody was asked."""
    item_id: str
    better: str
    worse: str


@dataclass(frozen=True)
class Judgment:
    """A judge's words on a pair in one order. `side` is the place of the better response, `verdict` the judge's.

    `token_ids` are those that were sampled: they are what is trained on.
    """
    item_id: str
    first: str
    second: str
    side: int
    verdict: int | None
    token_ids: tuple[int, ...]
    text: str
    truncated: bool = False

    @property
    def agrees(self) -> bool:
        """Whether it finds the better response better; one that was cut off is no example."""
        return self.verdict == self.side and not self.truncated


def majority_pair(item_id: str, texts: Sequence[str], extract: Callable[[str], Hashable | None], seed: int,
                  votes: int = 5) -> SyntheticPair | str:
    """A sample with the majority's answer and one, drawn at random, with another; or the reason for none.

    `extract` finds the answer in a response, None where there is none, as the task's scorer does. Reasons: "unparsed"
    (no sample has an answer), "few_votes" (the most frequent one has fewer than `votes`), "tie" (two have most),
    "unanimous" (there is no other). A sample without an answer neither votes nor is paired. 16 samples and 5 votes are
    the paper's. The draw depends on `seed` and the item's id alone.
    """
    answers = [extract(text) for text in texts]
    (most, count), *others = [*Counter(a for a in answers if a is not None).most_common(), (None, 0)]
    if count == 0:
        return "unparsed"
    if count < votes:
        return "few_votes"
    if others[0][1] == count:
        return "tie"
    return _draw_pair(item_id, [text for text, a in zip(texts, answers) if a == most],
                      [text for text, a in zip(texts, answers) if a not in (most, None)], seed)


def correct_pair(item_id: str, texts: Sequence[str], correct: Sequence[bool | None], seed: int) -> SyntheticPair | str:
    """A right sample and a wrong one, drawn at random: the paper's comparison, which needs the answers.

    None in `correct`: no answer was found, so the sample is not paired. Reasons: "none_right", "none_wrong".
    """
    right, wrong = ([text for text, c in zip(texts, correct, strict=True) if c is kind] for kind in (True, False))
    if not right:
        return "none_right"
    return _draw_pair(item_id, right, wrong, seed) if wrong else "none_wrong"


def _draw_pair(item_id: str, better: list[str], worse: list[str], seed: int) -> SyntheticPair | str:
    rng = random.Random(f"{seed} {item_id}")
    return SyntheticPair(item_id, rng.choice(better), rng.choice(worse)) if worse else "unanimous"


ALTER = """Below is a response to a question about a picture. Write it again with one error: change {kind} in it, so \
that it no longer agrees with the picture. Keep everything else, the style and the length included. Reply with the \
altered response only.

Question: {question}

Response: {response}"""
KINDS = {"attribute": "one attribute (a colour, size, shape or material)", "count": "one count or number",
         "position": "one position or direction"}
STYLE_KEPT = 0.8                                                     # least likeness of the words that are no facts
_COUNTS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())} | {"single": "1", "pair": "2"}
_SAME = {"grey": "gray", "large": "big", "huge": "big", "little": "small", "tiny": "small", "circular": "round",
         "metallic": "metal", "wood": "wooden", "centre": "middle", "center": "middle", "over": "above",
         "under": "below", "beneath": "below", "underneath": "below", "within": "inside", "upper": "top",
         "lower": "bottom", "leftmost": "left", "rightmost": "right", "lefthand": "left", "righthand": "right",
         "rear": "back"}
_FACTS = {"attribute": set("""red orange yellow green blue purple violet pink brown black white gray gold silver beige
          big small tall short long wide narrow thick thin round square rectangular triangular oval flat curved straight
          wooden metal plastic glass stone leather paper open closed empty full young old wet dry striped plain dark
          bright""".split()),
          "position": set("""left right top bottom above below inside outside middle front back behind near far north
          south east west foreground background corner edge beside between""".split())}


def alter_chat(chat: list[dict], response: str, kind: str) -> list[dict]:
    """Ask for `response` to the question of `chat` with an error of `kind` (of KINDS). The wording is ours."""
    head, between, tail = re.split(r"\{question\}|\{response\}", ALTER.replace("{kind}", KINDS[kind]))
    return _framed(chat, head, between + response + tail)


def altered_pair(item_id: str, response: str, altered: str, kind: str) -> SyntheticPair | str:
    """A response and its altered self, or the reason for none. What counts as an alteration is ours.

    Facts are the words that name an attribute, a count or a position, synonyms and spellings of a number as one.
    Reasons: "unchanged" (the facts of `kind` are the same, in whatever order: at most the style differs), "added" (a
    fact came or went, none was replaced), "style" (of the other words less than STYLE_KEPT stayed as they were).
    English only: what cannot be shown to be an error is dropped.
    """
    (before, rest), (after, other) = (_facts(final_text(text), kind) for text in (response, altered))
    if before == after:
        return "unchanged"
    if before.total() != after.total():
        return "added"
    if SequenceMatcher(None, rest, other, autojunk=False).ratio() < STYLE_KEPT:
        return "style"
    return SyntheticPair(item_id, response, altered)


def _facts(text: str, kind: str) -> tuple[Counter[str], list[str]]:
    """The facts of a kind in a text, and its other words in order; of a long text its beginning."""
    facts, rest = Counter(), []
    for word in re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", text[:LAST_CHARACTERS // 4].lower()):
        word = _COUNTS.get(word, _SAME.get(word, word))
        number = re.fullmatch(r"[\d.,]+", word)
        if (number if kind == "count" else word in _FACTS[kind]):
            facts[str(float(word.replace(",", ""))) if number and word.count(".") < 2 else word] += 1
        else:
            rest.append(word)
    return facts, rest


def judge_pairs(answer: Callable[[list[list[dict]]], Sequence], chats: list[list[dict]],
                pairs: Sequence[SyntheticPair]) -> list[tuple[Judgment, Judgment]]:
    """The judge's words on each pair, the better response shown first and then second. `answer` as above."""
    shown = [(pair, *order) for pair in pairs for order in ((pair.better, pair.worse, 1), (pair.worse, pair.better, 2))]
    twice = [chat for chat in chats for _ in range(2)]
    asked = [comparison_chat(chat, first, second) for chat, (_, first, second, _) in zip(twice, shown, strict=True)]
    found = [Judgment(pair.item_id, first, second, side, parse_preference(c.text), tuple(c.token_ids), c.text,
                      c.finish_reason == "length")
             for (pair, first, second, side), c in zip(shown, answer(asked), strict=True)]
    return list(zip(found[::2], found[1::2]))


def kept_judgments(judged: Iterable[tuple[Judgment, Judgment]], both_orders: bool = True) -> list[Judgment]:
    """The judgments that agree with their pair: of a pair both or none, or, without `both_orders`, each by itself."""
    return [each for pair in judged for each in pair
            if (all(j.agrees for j in pair) if both_orders else each.agrees)]


def balanced(judgments: Sequence[Judgment], seed: int, most: int = sys.maxsize) -> list[Judgment]:
    """As many with the better response first as second, `most` together: of a side with more, some are drawn."""
    sides = [[k for k, j in enumerate(judgments) if j.side == side] for side in (1, 2)]
    rng, least = random.Random(seed), min(*map(len, sides), most // 2)
    return [judgments[k] for k in sorted(k for side in sides for k in rng.sample(side, least))]



# \text{x} and its kin; *x* and _x_ around words, but not products (2*3), bullets (* x), names (a_b) or rules (___)
_LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|bb|sf)|boldsymbol)\s?\{([^{}]*)\}")
_STARS = re.compile(r"\*(?<![\w*]\*)(?=[^\s*])([^*\n]{1,200})(?<=\S)\*(?![\w*])")
_RULES = re.compile(r"_(?<!\w_)_?(?=[^\s_])([^_\n]{1,200})(?<=\S)__?(?!\w)")


def final_text(text: str) -> str:
    """What a response finally says: after the last `</think>`, inside the last `<answer>`; emphasis is dropped.

    A `<think>` that never closes leaves nothing: reasoning is not an answer. Time is linear in the text's length.
    """
    return drop_emphasis(_final_part(text))


def _final_part(text: str) -> str:
    head, closed, tail = text.rpartition("</think>")
    text = tail if closed else text
    if "<think>" in text:
        return ""
    start = text.rfind("<answer>")
    if start >= 0:
        text = text[start + len("<answer>"):].partition("</answer>")[0]
    return text


def drop_emphasis(text: str) -> str:
    """A text without Markdown's bold, italics and code marks and without LaTeX's font commands; trimmed."""
    return _drop_marks(_LATEX.sub(r"\1", text))


def _drop_marks(text: str) -> str:
    return _RULES.sub(r"\1", _STARS.sub(r"\1", text.replace("**", "").replace("`", ""))).strip()


def parse_score(text: str) -> float | None:
    """The score of the last JSON object with a "score" in the final text; None unless it is a number in [0, 1].

    Fails closed: a last verdict that is malformed is not replaced by an earlier one. LaTeX in a reason is left alone:
    its backslashes are JSON's.
    """
    verdict, rest = _last_object(_drop_marks(_final_part(text))[-LAST_CHARACTERS:], "score")
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
_HYPOTHETICAL = re.compile(r"(?:\b(?:if|whether|neither|nor)|(?:not|n['’]t) (?:think|believe|say|clear|sure|true))\b"
                           r"[^.,;:!?\n]*$", re.IGNORECASE)
_EITHER = re.compile(r"\b(?:answer|response|assistant)\s?\(?\w{1,20}\)?\s?(?:or|and|/)\s?$", re.IGNORECASE)
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
    if stated[-1]["answer"] and _EITHER.search(final[max(0, stated[-1].start() - 40):stated[-1].start()]):
        return None                                                  # "Answer 1 or Answer 2 is better"
    joined = len(stated) > 1 and _OR.fullmatch(final, stated[-2].end(), stated[-1].start())
    return None if joined and sides[-2] != sides[-1] else sides[-1]


def _side(label: str) -> int | None:
    whole = _LABEL.fullmatch(label.strip(' "'))
    return _SIDE.get(whole[1].lower()) if whole else None
