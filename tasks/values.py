"""Reading numbers, lists and words from a settled text, and grading every type of answer.

    grade(item, response)       by Item.answer_type:
        choice                  choices.read_choice; options are compared by text, so equal ones are equally right
        integer, float          `read_number`; compared as numbers, floats at the item's precision
        list                    `read_list`, the last [...]; compared element by element
        text                    `open_candidates` against the answers: MMMU's published rule for open questions

A fraction, power, product, range or time ("3/4", "10^3", "5 to 6") is not evaluated: it is no number.
"""
from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence

from tasks import Item, Verdict
from tasks.answers import negated, plain, refuses, same, settled_text
from tasks.choices import LETTERS, read_choice
from tasks.loading import shown

NOTHING_READ = Verdict(correct=False, answer=None)
LONGEST_LIST = 5000                    # characters before the last "]" in which its "[" is looked for
LONGEST_SENTENCE = 400                 # characters after "the answer is" that may declare an answer


def grade(item: Item, response: str, texts_first: bool = False) -> Verdict:
    """The verdict on a response; ValueError where the item's answer is not known.

    `texts_first` looks for a whole response that is an option's text before it looks for letters.
    """
    if item.answer is None:
        raise ValueError(f"item {item.id!r} has no answer to score against")
    text = settled_text(response)

    if item.answer_type == "choice":
        k = read_choice(text, item.choices, texts_first)
        if k is None:
            return NOTHING_READ
        return Verdict(same(item.choices[k], item.answer), LETTERS[k])

    if item.answer_type in ("integer", "float"):
        number = read_number(text)
        if number is None:
            return NOTHING_READ
        return Verdict(equal_numbers(number, float(item.answer), item), f"{number:.15g}")

    if item.answer_type == "list":
        values = read_list(text)
        if values is None:
            return NOTHING_READ
        return Verdict(values == read_list(item.answer), repr(values))

    return grade_open(text, item.answer)


def check_answer(item: Item) -> Item:
    """The item, if its answer is of its type; a ValueError that names the item otherwise."""
    answer = item.answer
    if answer is None:
        return item

    if item.answer_type in ("integer", "float") and not _is_finite(answer):
        raise ValueError(f"item {shown(item.id)}: the answer {shown(answer)} is not a number")

    if item.answer_type == "list" and (not isinstance(answer, str) or read_list(answer) is None):
        raise ValueError(f"item {shown(item.id)}: the answer {shown(answer)} is not a list written as in Python")

    if item.answer_type == "text":
        for text in [answer] if isinstance(answer, str) else answer:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"item {shown(item.id)}: the answer {shown(answer)} is empty")

    if item.answer_type == "choice":
        known = any(same(choice, str(answer)) for choice in item.choices or ())
        if not known:
            choices = shown(item.choices, 200)
            raise ValueError(f"item {shown(item.id)}: the answer {shown(answer)} is none of the choices {choices}")
    return item


def _is_finite(answer: str | list[str]) -> bool:
    """Whether an answer reads as a finite number."""
    try:
        return math.isfinite(float(answer))
    except (TypeError, ValueError, OverflowError):
        return False


# ---- numbers

# "-1,234.5", ".5", "1e3"; not the 2 of "H2O" or the 19 of "COVID-19", and a "-" between two numbers is no sign
_NUMBER = re.compile(r"(?<![A-Za-z_\d])(?<![A-Za-z_]-)(?:(?<![\d)\]])-)?"
                     r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")

# What makes one expression of two numbers when it stands between them: "5 to 6", "3:15", "1.2.3", "\frac{3}{4}"
_JOINS = re.compile(r"|°? ?(?:[-+*/×·÷~–]|\*\*|\\times|\\cdot|\\div|\^\{?|or|to|x) ?|[,.:]|\} ?\{| ?\\?sqrt[{(]")

# What makes the second number the first one's value: "3 + 4 = 7", "\sqrt{4} \approx 2"
_EQUALS = re.compile(r"[})]?°? ?(?:=|≈|\\approx) ?")

# What makes an expression of a number when it stands right before or after it: "\sqrt{2}", "10^3", "2\pi"
_BEFORE = re.compile(r"(?:frac|sqrt|√|\^|/)[ {(]{0,2}$")
_AFTER = re.compile(r"[})]? ?(?:\^|²|³|π|\\?pi\b|√|\\?sqrt|/|\\times|\\cdot)")

# "14^{\circ}", in LaTeX
_LATEX_DEGREE = re.compile(r"\^ ?(?:\{ ?)?\\circ(?: ?\})?")

# "14 cm^2", "14 kg/m^{3}"; not "14x^2", not "14^2" (group 1: all but the power)
_UNIT_POWER = re.compile(
    r"(\d[ ~]{0,3}(?:(?:k?[gmNWJ]|mol|lb)/)?(?:[ckdmnµμ]?m|in|ft|yd|mi|s|units?|inch(?:es)?|feet|foot|yards?|miles?"
    r"|(?:centi|deci|kilo|milli)?met(?:er|re)s?))\^(?:[23](?!\d)|\{[23]\})")

# A response that is a number and nothing else: "about £1,000", "75 %", "14 square metres.", "= 1e3"
_WHOLE = re.compile(r"(?:(?:about|approximately|roughly|around) |[≈~=] ?)?[-+]?[£€¥]?[\d,.]+(?:[eE][-+]?\d+)?"
                    r" ?(?:[%°]|[^\W\d_]{1,20}\.?(?:[ /][^\W\d_]{1,20}\.?){0,2})?[²³]?[.!]?", re.IGNORECASE)

# "the answer is", "Answer:", "answer =", "答案："
_ANSWER_IS = re.compile(r"(?:\banswer ?(?:is|:|=)|答案 ?(?:[是为]|[:：])) ?:?\s{0,2}", re.IGNORECASE)

# The blank after "It is 7.", or a line's end
_SENTENCE_END = re.compile(r"(?<=[.!?]) |\n")

# Signs that do not count, and what they stand for: currency and mathematics in LaTeX, the minus sign, thin spaces
_SIGNS = (("\\$", ""), ("$", ""), ("−", "-"), ("{,}", ","), ("\\ ", " "), ("\\,", " "), ("\\;", " "))


def numbers(text: str) -> list[float | None]:
    """The numbers of a text in order, None for an expression that is not evaluated; "3 + 4 = 7" is 7.

    LaTeX's degrees and the power of a unit ("14^\\circ", "14 cm^2") belong to no expression.
    """
    for sign, meant in _SIGNS:
        text = text.replace(sign, meant)
    text = _LATEX_DEGREE.sub("°", text)
    text = _UNIT_POWER.sub(r"\1", text)

    values: list[float | None] = []
    end = -1                                                # of the number before
    for match in _NUMBER.finditer(text):
        value = _evaluate(text, match)
        if values and _EQUALS.fullmatch(text, end, match.start()):
            values[-1] = value                              # the right-hand side is what is said
        elif values and _JOINS.fullmatch(text, end, match.start()):
            values[-1] = None
        else:
            values.append(value)
        end = match.end()
    return values


def _evaluate(text: str, match: re.Match) -> float | None:
    """The number that was matched in a text; None where it is too large, or part of a root, a power or a fraction."""
    start = match.start()
    if _BEFORE.search(text, max(0, start - 10), start) or _AFTER.match(text, match.end()):
        return None
    value = float(match[0].replace(",", ""))
    return value if math.isfinite(value) else None


def read_number(text: str) -> float | None:
    """The number that a settled text gives; None for no answer.

    The whole response; else the first number after the last "answer is"; else, unless the response refuses, the last
    number of the last sentence that has one.
    """
    values = whole_number(text) or declared_numbers(text)
    if values:
        return values[0]
    if refuses(text):
        return None
    return closing_number(text)


def whole_number(text: str) -> list[float | None]:
    """The number that is the whole response; commas, a currency, a trailing unit, percent or degree do not count."""
    shown = text.replace("$", "").replace("\\%", "%").replace("−", "-")
    if _WHOLE.fullmatch(shown) is None:
        return []
    return numbers(text)


def declared_numbers(text: str) -> list[float | None]:
    """The numbers of the sentence after the last "answer is", "answer:" or "answer =" that is not negated."""
    return numbers(declared_words(text))


def declared_words(text: str) -> str:
    """The sentence after the last "answer is" that is not negated; "" without one."""
    declarations = list(_ANSWER_IS.finditer(text))
    for match in reversed(declarations):
        if not negated(text, match.start(), match.end()):
            following = text[match.end():match.end() + LONGEST_SENTENCE]
            return _SENTENCE_END.split(following, maxsplit=1)[0]
    return ""


def closing_number(text: str) -> float | None:
    """The last number of the last sentence that has one."""
    sentences = _SENTENCE_END.split(text)
    for sentence in reversed(sentences):
        values = numbers(sentence)
        if values:
            return values[-1]
    return None


def equal_numbers(number: float, gold: float, item: Item) -> bool:
    """Whole numbers exactly, without truncation; floats rounded to the item's precision, exactly where it has none."""
    if item.answer_type == "integer" or item.precision is None:
        return number == gold
    return round(number, item.precision) == round(gold, item.precision)


# ---- lists

def read_list(text: str) -> list | None:
    """The last [...] of a text read as a Python list, texts made plain; None if it cannot be read."""
    brackets = _last_brackets(text)
    if brackets is None:
        return None
    try:
        values = ast.literal_eval(brackets)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return [plain(value) if isinstance(value, str) else value for value in values]


def _last_brackets(text: str) -> str | None:
    """The last [...] of a text, brackets included; None where there is none, or it is too long."""
    end = text.rfind("]")
    first = max(0, end - LONGEST_LIST + 1)
    depth = 0
    for start in range(end, first - 1, -1):                 # backwards, to the bracket that opens it
        if text[start] == "]":
            depth += 1
        elif text[start] == "[":
            depth -= 1
        if depth == 0:
            return text[start:end + 1]
    return None


# ---- words: MMMU's published rule for open questions

# What an answer stands behind in a line: "So the result is 7"
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")

_OPEN_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),                                        # "2,000,000"
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),                              # "1.5e3"
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),       # "-0.5", ".5", "7"
)


def grade_open(text: str, answer: str | list[str]) -> Verdict:
    """A text form of an answer that occurs in a text candidate, or a number form that equals a number candidate.

    What is shown as the answer is the candidate that matched, or else the first one. A refusal that declares no
    answer gives none, unless the answer itself reads so.
    """
    answers = [answer] if isinstance(answer, str) else answer
    if not text or _refuses_to_answer(text, answers):
        return NOTHING_READ

    forms = []
    for accepted in answers:
        forms += open_forms(accepted)
    candidates = open_candidates(text)
    for candidate in candidates:
        if any(_matches(form, forms) for form in open_forms(candidate)):
            return Verdict(True, candidate)
    return Verdict(False, next((candidate for candidate in candidates if candidate), None))


def _refuses_to_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text refuses, declares nothing else, and a refusal is not what is asked for ("none")."""
    if not refuses(text):
        return False
    declared = declared_words(text)
    if declared and not refuses(declared):
        return False
    return not any(refuses(answer) for answer in answers)


def _matches(said: str | float, forms: Sequence[str | float]) -> bool:
    """Whether one form of a candidate equals one of the answer's forms or, as a text, holds one."""
    if said in forms:
        return True
    if not isinstance(said, str):
        return False
    return any(isinstance(form, str) and form in said for form in forms)


def open_candidates(text: str) -> list[str]:
    """The shortest tail of each line after an indicator word (= in the last), or else the text; then their numbers."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")

    keys = []
    for number, line in enumerate(lines, 1):
        marks = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        tail = _shortest_tail(line, marks)
        if tail and tail not in ":,.!?;'":
            keys.append(tail)
    if not keys:
        keys = [text]

    candidates = list(keys)
    for key in keys:
        for rule in _OPEN_NUMBERS:
            candidates += rule.findall(key)
    return candidates


def _shortest_tail(line: str, marks: Sequence[str]) -> str:
    """What follows the last of the marks in a line. An empty tail gives way to the next mark's."""
    tail = ""
    for mark in marks:
        if mark in line:
            said = line.rsplit(mark, 1)[1].strip()
            if not tail or len(said) < len(tail):
                tail = said
    return tail


def open_forms(text: str) -> list[str | float]:
    """A number rounded to two places; a text in lower case, one character long only with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    if len(text) == 1:
        return [f" {text}", f"{text} "]
    return [text]
