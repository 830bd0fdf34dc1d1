"""The probabilities of a score's digits, from a server's `top_logprobs`, for --verdict logits. Standard library only.

Locally the digits after `{"score": ` and after `{"score": 0.` are read, both as the beginning of a reply that the model
is made to give. A server tells the likeliest tokens beside each token of the reply that it gives by itself:

    {"score": 0.9}      both can be read: at the 0, and at the 9
    {"score": 1.0}      the first alone; the second is asked for with a reply that is begun, if 0 is likely at all
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loop.endpoint import BadAnswer

NO_DIGITS = [0.0] * 10
NEGLIGIBLE = 1e-4                                       # a probability of 0 as first digit that moves no score
BEFORE_SCORE = re.compile(r'"score"\s*:\s*$')


def find_digits(tokens: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float] | None]:
    """The probabilities of the digits 0 to 9 at the first digit of the last score and behind its "0.".

    `tokens`: choices[0].logprobs.content. The first are all 0 where there is no score, the second None where the reply
    does not go by "0.". BadAnswer where they are of another form.
    """
    texts = [token_text(token) for token in tokens]
    first = NO_DIGITS
    second = None
    before = ""
    for place, text in enumerate(texts):
        if text.strip() and BEFORE_SCORE.search(before):
            first = read_digits(tokens[place])
            behind = place_behind_point(texts, place)
            second = read_digits(tokens[behind]) if behind is not None else None
        before += text
    return first, second


def place_behind_point(texts: Sequence[str], place: int) -> int | None:
    """Where the token stands that follows "0.", which the tokens from `place` on spell; None where they do not."""
    spelled = ""
    for number in range(place, len(texts)):
        if spelled.lstrip() == "0.":
            return number
        spelled += texts[number]
    return None


def read_digits(token: Mapping[str, Any]) -> list[float]:
    """The probability that a token begins with the digit 0, .., 9, as far as the likeliest ones tell."""
    shares = list(NO_DIGITS)
    try:
        for other in token["top_logprobs"]:
            text = token_text(other).lstrip()
            if text[:1] in tuple("0123456789"):
                shares[int(text[0])] += math.exp(min(float(other["logprob"]), 0.0))
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("the answer's top_logprobs cannot be read") from None
    return shares


def token_text(token: Mapping[str, Any]) -> str:
    """The text of a token."""
    try:
        text = token["token"]
    except (KeyError, TypeError):
        raise BadAnswer("the answer's logprobs cannot be read") from None
    if not isinstance(text, str):
        raise BadAnswer("the answer's logprobs cannot be read")
    return text


def needs_second(first: Sequence[float]) -> bool:
    """Whether a score depends on the digit behind the point: verifier.expected_scores has the equation."""
    begins_with_score = first[0] + first[1] >= 0.5
    return begins_with_score and first[0] > NEGLIGIBLE
