"""A judge that follows a rule: what the tests of comparisons ask instead of a model."""
from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

Chats = list[list[dict]]


def shown(chat: list[dict]) -> tuple[str, str]:
    """The two answers of a comparison prompt."""
    text = "".join(part.get("text", "") for part in chat[-1]["content"])
    return re.search(r"Answer 1: (.*)\n\nAnswer 2: (.*)\n\nExplain", text).groups()


class FakeJudge:
    """Answers comparisons by a rule (first, second) -> 1, 2 or None; remembers what it was asked."""

    def __init__(self, rule: Callable[[str, str], int | None], cut: bool = False):
        self.rule, self.cut, self.asked = rule, cut, []

    def __call__(self, chats: Chats) -> list[SimpleNamespace]:
        self.asked += map(shown, chats)
        sides = [self.rule(*shown(chat)) for chat in chats]
        return [SimpleNamespace(text=f"Hm. Answer {s} is better." if s else "Both are fine.", token_ids=(7, s or 0),
                                finish_reason="length" if self.cut else "stop") for s in sides]


def larger(a: str, b: str) -> int | None:
    return 1 if a > b else 2 if b > a else None


def questions(*names: str) -> Chats:
    return [[{"role": "user", "content": name}] for name in names]
