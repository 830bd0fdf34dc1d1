"""Altered responses: the prompt that asks a model for one error, and the check that it made one.

A response to an open-ended question has no majority. "Self-Improving VLM Judges Without Human Annotations" (arXiv
2512.05145) pairs it with its altered self: the same text with one attribute, count or position changed, so that it no
longer agrees with the picture. The wording of the prompt is ours, and so is the check:

    facts    the words that name an attribute, a count or a position; "grey" and "gray", "3" and "three" are one fact
    error    facts of the kind asked for were replaced, and at least STYLE_KEPT of the other words stayed as they were

The check knows English only. What it cannot show to be an error is not used.
"""
from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher

from verifier import Chat, final_text, framed_chat

ALTER = """Below is a response to a question about a picture. Write it again with one error: change {kind} in it, so \
that it no longer agrees with the picture. Keep everything else, the style and the length included. Reply with the \
altered response only.

Question: {question}

Response: {response}"""
KINDS = {"attribute": "one attribute (a colour, size, shape or material)", "count": "one count or number",
         "position": "one position or direction"}
STYLE_KEPT = 0.8                            # least likeness (difflib's ratio) of the words that are no facts
FIRST_CHARACTERS = 5_000                    # of a response are compared: difflib's time is quadratic

WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")         # a number, or letters
NUMBER = re.compile(r"[\d.,]+")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"single": "1", "pair": "2"}
SYNONYMS = {"grey": "gray", "large": "big", "huge": "big", "little": "small", "tiny": "small", "circular": "round",
            "metallic": "metal", "wood": "wooden", "centre": "middle", "center": "middle", "over": "above",
            "under": "below", "beneath": "below", "underneath": "below", "within": "inside", "upper": "top",
            "lower": "bottom", "leftmost": "left", "rightmost": "right", "lefthand": "left", "righthand": "right",
            "rear": "back"}
ATTRIBUTES = frozenset("""
    red orange yellow green blue purple violet pink brown black white gray gold silver beige
    big small tall short long wide narrow thick thin round square rectangular triangular oval flat curved straight
    wooden metal plastic glass stone leather paper
    open closed empty full young old wet dry striped plain dark bright""".split())
POSITIONS = frozenset("""
    left right top bottom above below inside outside middle front back behind near far
    north south east west foreground background corner edge beside between""".split())


def alter_chat(chat: Chat, response: str, kind: str) -> Chat:
    """Ask for `response` to the question of `chat` with an error of `kind`, a key of KINDS."""
    template = ALTER.replace("{kind}", KINDS[kind])
    before, between, end = re.split(r"\{question\}|\{response\}", template)
    return framed_chat(chat, before, between + response + end)


def why_no_error(response: str, altered: str, kind: str) -> str | None:
    """Why `altered` is not `response` with an error of `kind`; None where it is.

    "unchanged"   the facts of `kind` are the same, in whatever order: at most the style differs
    "added"       a fact came or went, none was replaced
    "style"       fewer than STYLE_KEPT of the other words stayed as they were
    """
    facts_before, words_before = split_facts(final_text(response), kind)
    facts_after, words_after = split_facts(final_text(altered), kind)
    if facts_before == facts_after:
        return "unchanged"
    if facts_before.total() != facts_after.total():
        return "added"

    # Without autojunk, which leaves frequent words out of texts of 200 words and more.
    likeness = SequenceMatcher(None, words_before, words_after, autojunk=False).ratio()
    if likeness < STYLE_KEPT:
        return "style"
    return None


def split_facts(text: str, kind: str) -> tuple[Counter[str], list[str]]:
    """The facts of `kind` in the beginning of a text, with how often each occurs; and its other words in order."""
    facts: Counter[str] = Counter()
    other_words = []
    for word in WORD.findall(text[:FIRST_CHARACTERS].lower()):
        word = DIGITS.get(word, SYNONYMS.get(word, word))
        if is_fact(word, kind):
            facts[one_spelling(word)] += 1
        else:
            other_words.append(word)
    return facts, other_words


def is_fact(word: str, kind: str) -> bool:
    """Whether a word names an attribute, a count or a position, whichever `kind` is."""
    if kind == "count":
        return NUMBER.fullmatch(word) is not None
    return word in (ATTRIBUTES if kind == "attribute" else POSITIONS)


def one_spelling(fact: str) -> str:
    """A number as "2000.0", so that "2,000" and "2000" are the same fact; a date (1.2.2025) or a word as it is."""
    is_number = NUMBER.fullmatch(fact) is not None and fact.count(".") < 2
    if not is_number:
        return fact
    return str(float(fact.replace(",", "")))
