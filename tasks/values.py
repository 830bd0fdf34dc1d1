"""Reading numbers, lists and words from a settled text, and grading every type of answer.

    grade(item, response)       by Item.answer_type:
        choice                  answers.read_choice; options are compared by text, so equal ones are equally right
        integer, float          `read_number`; compared as numbers, floats at the item's precision
        list                    `read_list`, the last [...]; compared element by element
        text                    `open_candidates` against the answers: MMMU's published rule for open questions

A fraction, power, product, range or time ("3/4", "10^3", "5 to 6") is not evaluated: it is no number.
"""
from __future__ import annotations

import ast
import math
import re

from tasks import Item, Verdict
from tasks.answers import LETTERS, negated, plain, read_choice, refuses, same, settled_text


def grade(item: Item, response: str, texts_first: bool = False) -> Verdict:
    """The verdict on a response; ValueError where the item's answer is not known.

    `texts_first` looks for a whole response that is an option's text before it looks for letters.
    """
    if item.answer is None:
        raise ValueError(f"item {item.id!r} has no answer to score against")
    text = settled_text(response)
    if item.answer_type == "choice":
        k = read_choice(text, item.choices, texts_first)
        return Verdict(False, None) if k is None else Verdict(same(item.choices[k], item.answer), LETTERS[k])
    if item.answer_type in ("integer", "float"):
        x = read_number(text)
        return Verdict(False, None) if x is None else Verdict(equal_numbers(x, float(item.answer), item), f"{x:.15g}")
    if item.answer_type == "list":
        values = read_list(text)
        return Verdict(False, None) if values is None else Verdict(values == read_list(item.answer), repr(values))
    return grade_open(text, item.answer)


def check_answer(item: Item) -> Item:
    """The item, if its answer is of its type; a ValueError that names the item otherwise."""
    if item.answer is None:
        return item
    if item.answer_type in ("integer", "float"):
        try:
            finite = math.isfinite(float(item.answer))
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise ValueError(f"item {item.id!r}: the answer {item.answer!r} is not a number")
    if item.answer_type == "list" and (not isinstance(item.answer, str) or read_list(item.answer) is None):
        raise ValueError(f"item {item.id!r}: the answer {item.answer!r} is not a list written as in Python")
    if item.answer_type == "text" and not all(
            isinstance(a, str) and a.strip() for a in ([item.answer] if isinstance(item.answer, str) else item.answer)):
        raise ValueError(f"item {item.id!r}: the answer {item.answer!r} is empty")
    if item.answer_type == "choice" and not (item.choices and any(same(c, str(item.answer)) for c in item.choices)):
        raise ValueError(f"item {item.id!r}: the answer {item.answer!r} is none of the choices {item.choices}")
    return item


# ---- numbers

_NUMBER = re.compile(r"(?<![A-Za-z_\d])(?<![A-Za-z_]-)(?:(?<![\d)\]])-)?"
                     r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_JOINS = re.compile(r"|°? ?(?:[-+*/×·÷~–]|\*\*|\\times|\\cdot|\\div|\^\{?|or|to|x) ?|[,.:]|\} ?\{| ?\\?sqrt[{(]")
_EQUALS = re.compile(r"[})]?°? ?(?:=|≈|\\approx) ?")
_BEFORE = re.compile(r"(?:frac|sqrt|√|\^|/)[ {(]{0,2}$")
_AFTER = re.compile(r"[})]? ?(?:\^|²|³|π|\\?pi\b|√|\\?sqrt|/|\\times|\\cdot)")
_LATEX_DEGREE = re.compile(r"\^ ?(?:\{ ?)?\\circ(?: ?\})?")
_UNIT_POWER = re.compile(                                            # "14 cm^2", "14 kg/m^{3}"; not "14x^2", not "14^2"
    r"(\d[ ~]{0,3}(?:(?:k?[gmNWJ]|mol|lb)/)?(?:[ckdmnµμ]?m|in|ft|yd|mi|s|units?|inch(?:es)?|feet|foot|yards?|miles?"
    r"|(?:centi|deci|kilo|milli)?met(?:er|re)s?))\^(?:[23](?!\d)|\{[23]\})")
_WHOLE = re.compile(r"(?:(?:about|approximately|roughly|around) |[≈~=] ?)?[-+]?[£€¥]?[\d,.]+(?:[eE][-+]?\d+)?"
                    r" ?(?:[%°]|[^\W\d_]{1,20}\.?(?:[ /][^\W\d_]{1,20}\.?){0,2})?[²³]?[.!]?", re.IGNORECASE)
_ANSWER_IS = re.compile(r"(?:\banswer ?(?:is|:|=)|答案 ?(?:[是为]|[:：])) ?:?\s{0,2}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?]) |\n")


def numbers(text: str) -> list[float | None]:
    """The numbers of a text in order, None for an expression that is not evaluated; "3 + 4 = 7" is 7.

    LaTeX's degrees and the power of a unit ("14^\\circ", "14 cm^2") belong to no expression.
    """
    for sign, meant in (("\\$", ""), ("$", ""), ("−", "-"), ("{,}", ","), ("\\ ", " "), ("\\,", " "), ("\\;", " ")):
        text = text.replace(sign, meant)
    text = _UNIT_POWER.sub(r"\1", _LATEX_DEGREE.sub("°", text))
    found: list[float | None] = []
    end = -1
    for match in _NUMBER.finditer(text):
        part = _BEFORE.search(text, max(0, match.start() - 10), match.start()) or _AFTER.match(text, match.end())
        value = None if part else float(match[0].replace(",", ""))
        if found and _EQUALS.fullmatch(text, end, match.start()):
            found[-1] = value                                        # the right-hand side is what is said
        elif found and _JOINS.fullmatch(text, end, match.start()):
            found[-1] = None
        else:
            found.append(value)
        end = match.end()
    return [x if x is not None and math.isfinite(x) else None for x in found]


def read_number(text: str) -> float | None:
    """The number that a settled text gives; None for no answer.

    The whole response; else the first number after the last "answer is"; else, unless the response refuses, the last
    number of the last sentence that has one.
    """
    for values in (whole_number(text), declared_numbers(text)):
        if values:
            return values[0]
    return None if refuses(text) else closing_number(text)


def whole_number(text: str) -> list[float | None]:
    """The number that is the whole response; commas, a currency, a trailing unit, percent or degree do not count."""
    return numbers(text) if _WHOLE.fullmatch(text.replace("$", "").replace("\\%", "%").replace("−", "-")) else []


def declared_numbers(text: str) -> list[float | None]:
    """The numbers of the sentence after the last "answer is", "answer:" or "answer =" that is not negated."""
    return numbers(declared_words(text))


def declared_words(text: str) -> str:
    """The sentence after the last "answer is" that is not negated; "" without one."""
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        if not negated(text, match.start(), match.end()):
            return _SENTENCE_END.split(text[match.end():match.end() + 400], maxsplit=1)[0]
    return ""


def closing_number(text: str) -> float | None:
    """The last number of the last sentence that has one."""
    for sentence in reversed(_SENTENCE_END.split(text)):
        if values := numbers(sentence):
            return values[-1]
    return None


def equal_numbers(x: float, gold: float, item: Item) -> bool:
    """Whole numbers exactly, without truncation; floats rounded to the item's precision, exactly where it has none."""
    if item.answer_type == "integer" or item.precision is None:
        return x == gold
    return round(x, item.precision) == round(gold, item.precision)


# ---- lists

def read_list(text: str) -> list | None:
    """The last [...] of a text read as a Python list, texts made plain; None if it cannot be read."""
    end = text.rfind("]")
    depth = 0
    for start in range(end, max(-1, end - 5000), -1):
        depth += {"]": 1, "[": -1}.get(text[start], 0)
        if depth == 0:
            break
    if end < 0 or depth:
        return None
    try:
        return [plain(x) if isinstance(x, str) else x for x in ast.literal_eval(text[start:end + 1])]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


# ---- words: MMMU's published rule for open questions

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_OPEN_NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
                 r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def grade_open(text: str, answer: str | list[str]) -> Verdict:
    """A text form of an answer that occurs in a text candidate, or a number form that equals a number candidate.

    What is shown as the answer is the candidate that matched, or else the last one. A refusal that declares no
    answer gives none, unless the answer itself reads so.
    """
    answers = [answer] if isinstance(answer, str) else answer
    declared = declared_words(text)
    if not text or refuses(text) and (not declared or refuses(declared)) and not any(map(refuses, answers)):
        return Verdict(False, None)
    forms = [form for each in answers for form in open_forms(each)]
    candidates = open_candidates(text)
    for candidate in candidates:
        for said in open_forms(candidate):
            if said in forms or isinstance(said, str) and any(isinstance(f, str) and f in said for f in forms):
                return Verdict(True, candidate)
    return Verdict(False, next((c for c in candidates if c), None))


def open_candidates(text: str) -> list[str]:
    """The shortest tail of each line after an indicator word (= in the last), or else the text; then their numbers."""
    text = text.strip().strip(".").lower()
    lines, keys = text.split("\n"), []
    for line in lines:
        marks = (*_INDICATORS, "=") if line is lines[-1] else _INDICATORS
        tail = ""
        for said in (line.rsplit(mark, 1)[1].strip() for mark in marks if mark in line):
            tail = said if not tail or len(said) < len(tail) else tail
        if tail and tail not in ":,.!?;'":
            keys.append(tail)
    keys = keys or [text]
    return keys + [number for key in keys for rule in _OPEN_NUMBERS for number in re.findall(rule, key)]


def open_forms(text: str) -> list[str | float]:
    """A number rounded to two places; a text in lower case, one character long only with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [text] if len(text) != 1 else [f" {text}", f"{text} "]
