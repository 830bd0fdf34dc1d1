"""Every expression of the scorers reads the examples that stand beside it, and leaves alone what it says it does."""
from __future__ import annotations

import re

import pytest

from tasks import answers as a
from tasks import choices as c
from tasks import values as v

EXAMPLES = [                            # expression, how it is used, what it reads, what it leaves alone
    (a._REFUSAL, "search", ["it cannot be determined", "i am unable to clearly see it", "i don't know", "i'm sorry",
                            "i do not have enough detail", "there is not enough information.", "there is no image",
                            "n/a"], ["the dog cannot fly"]),
    (a._NEGATION, "search", ["It is not B", "if the answer is B", "rather than B"], ["There is no doubt it is B"]),
    (a._CLAUSE_START, "search", ["It is not A but B"], ["It is B"]),
    (a._DENIED, "match", [") is wrong", ") isn't it", "not B"], [") is right"]),
    (c._ARTICLE, "match", ["A dog"], ["A because"]),
    (c._PRONOUN, "match", ["I think", "I'm"], ["I. it"]),
    (c._WHOLE, "fullmatch", ["# The correct answer is option (B)."], ["B because"]),
    (c._HEAD, "search", ["The answer is most likely ", "Option letter: ", "I would select option ", "答案："],
     ["see each option:"]),
    (c._NAMED, "match", ["(B", "the correct option: B"], ["Bus"]),
    (c._CORRECT, "search", ["B is correct.", "(C) is the right answer"], ["A is the best predictor"]),
    (c._BEFORE_CORRECT, "search", ["", "(", "Therefore "], ["Vitamin "]),
    (c._JOINED, "match", [" or maybe C", "/B", ", C"], [" because C"]),
    (c._ANOTHER, "match", [") one or (B) two"], [" because (A) or (B)"]),
    (c._NEXT_LABEL, "match", [". one\nB. two"], [". one"]),
    (c._SENTENCE_END, "search", ["a cat. It sits."], ["a cat"]),
    (c._LABEL, "match", ["- Option B: it", "(b) it", "B.", "B\n"], ["Bus"]),
    (c._LINE_LABEL, "search", ["one\n* B. two"], ["one\nBus. two"]),
    (c._LETTER_LINE, "search", ["it\n**B**."], ["it\nB it"]),
    (c._BRACKETED, "search", ["It is (B)"], ["f(A)"]),
    (c._AFTER_OPTION, "match", [", it does", " because it"], [" is not"]),
    (c._JOINING, "match", [" or a dog"], [" because"]),
    (c._LONE, "search", ["go with B here"], ["B-cell", "A+", "B's"]),
    (c._BEFORE_LONE, "search", ["", "it is ", "Point "], ["Vitamin "]),
    (v._NUMBER, "search", ["-1,234.5", ".5", "1e3"], ["H2O", "COVID-19"]),
    (v._JOINS, "fullmatch", [" to ", ":", ".", "}{"], [" and "]),
    (v._EQUALS, "fullmatch", [" = ", "} \\approx "], [" is "]),
    (v._BEFORE, "search", ["\\sqrt{"], ["is "]),
    (v._AFTER, "match", ["^3", "\\pi"], [" cm"]),
    (v._LATEX_DEGREE, "search", ["14^{\\circ}"], ["14^2"]),
    (v._UNIT_POWER, "search", ["14 cm^2", "14 kg/m^{3}"], ["14x^2", "14^2"]),
    (v._WHOLE, "fullmatch", ["about £1,000", "75 %", "14 square metres.", "= 1e3"], ["5 of them, or 6"]),
    (v._ANSWER_IS, "search", ["the answer is", "Answer:", "answer =", "答案："], ["two answers"]),
    (v._SENTENCE_END, "search", ["It is 7. So"], ["7.5"]),
    (v._OPEN_NUMBERS[0], "search", ["2,000,000"], ["2000"]),
    (v._OPEN_NUMBERS[1], "search", ["1.5e3"], ["1.5"]),
    (v._OPEN_NUMBERS[2], "search", ["-0.5", ".5", "7"], ["seven"])]


@pytest.mark.parametrize("expression, how, read, left_alone", EXAMPLES)
def test_examples(expression: re.Pattern, how: str, read: list[str], left_alone: list[str]) -> None:
    assert [text for text in read if not getattr(expression, how)(text)] == []
    assert [text for text in left_alone if getattr(expression, how)(text)] == []


def test_a_number_after_a_number_has_no_sign() -> None:
    assert v._NUMBER.findall("5-6") == ["5", "6"] and v._NUMBER.findall("(-6)") == ["-6"]
