"""The text of a response that counts, and what it names, denies or refuses; choices.py and values.py read it.

    text = settled_text(response)           after </think>, inside <answer>, inside \\boxed{}, emphasis dropped
    names(text, words)                      does it hold these words as words? "cat" is not in "cats"
    refuses(text)                           does it say that there is no answer? "I cannot tell."
    negated(text, start, end)               is text[start:end] denied? "It is not B."

Every expression here, in choices.py and in values.py takes linear time: runs of white space are shortened first,
repetitions are bounded, and of a very long final text only the end is read.
"""
from __future__ import annotations

import re

from verifier import drop_emphasis, final_text

LONGEST = 20_000                       # characters of final text; of a longer one only its end is read
CLAUSE = 80                            # characters before a name in which its negation is looked for
BOX = "\\boxed{"


# ---- the text that counts

def settled_text(response: str) -> str:
    """The final text, or what its last `\\boxed{}` holds, with every run of white space as one blank or line end.

    Two line ends (a paragraph) stay two. An unclosed box holds nothing.
    """
    text = final_text(response)
    start = text.rfind(BOX)
    if start >= 0:
        text = _to_closing_brace(text, start + len(BOX))
    if len(text) > LONGEST:
        text = "… " + text[-LONGEST:]                       # the sign keeps the cut from reading as a beginning

    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _to_closing_brace(text: str, start: int) -> str:
    """What a brace that was opened just before `start` holds; "" if it is never closed."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        if brace[0] == "{":
            depth += 1
        else:
            depth -= 1
        if depth == 0:
            return drop_emphasis(text[start:start + brace.start()])
    return ""


def plain(text: str) -> str:
    """A text for comparisons: case, emphasis, dollar signs, quotes and closing punctuation do not count, − is -."""
    text = drop_emphasis(text).replace("$", "").replace("−", "-")
    text = " ".join(text.casefold().split())
    return text.strip("\"'“”‘’").rstrip(".,;:!?").rstrip()


def same(a: str, b: str) -> bool:
    """Whether two options' texts are equal, but for white space around them."""
    return a.strip() == b.strip()


def whole_words(words: str) -> re.Pattern:
    """Finds plain words as whole words: not "cat" in "cats" or "cat-like", not "5" in "5.5", "-5", "√5" or "5 + 1"."""
    before = r"(?<![\w-])(?<!\d[.,])"
    if words[:1].isdigit():
        before += r"(?<!√)(?<!√[{( ])(?<!sqrt[{( ])"
    after = r"(?![\w-])(?![.,]\d)"
    if words[-1:].isdigit():
        after += r"(?! ?(?:[-+*/^×=] ?\d|√|\\?sqrt))"
    return re.compile(before + re.escape(words) + after)


def names(text: str, words: str) -> bool:
    """Whether a text holds some words, as whole words; no words are in no text."""
    words = plain(words)
    return words != "" and whole_words(words).search(plain(text)) is not None


# ---- refusals

_VERBS = ("determin|answer|tell|see|view|say|identif|provid|know|solv|find|decid|assist|help|confirm|infer|calculat|"
          "comput|estimat|read|give|access|choose|comply")
_REFUSAL = re.compile(
    # "It cannot be determined", "I am unable to clearly see it": the inability, and a verb of answering
    rf"\b(?:can ?not|can['’]t|could not|couldn['’]t|unable to|not able to|impossible to|(?:not|n['’]t) possible to)"
    rf" (?:be )?(?:\w{{1,20}}ly )?(?:{_VERBS})"
    # "I don't know", "I do not have enough detail", "I'm sorry"
    r"|\b(?:do not|don['’]t) (?:know|have enough|see (?:an|any|the) )|(?:^|\bi['’]m |\bi am )sorry\b"
    # "There is not enough information."
    r"|\bnot enough (?:information|data|context)|\binsufficient (?:information|data|context)"
    # "There is no image", or a whole response such as "N/A"
    r"|\bno (?:image|picture|answer)\b|^\W*(?:unknown|unclear|n/?a|none|not applicable|undetermined)\W*$")


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer."""
    return _REFUSAL.search(text.lower()) is not None


# ---- negation

# A word that denies or supposes what follows it: "It is not B", "if the answer is B", "rather than B"; but what there
# is no doubt about is asserted.
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|(?:no|without)(?! (?:a )?(?:doubt|question))|cannot|except|than|"
                       r"instead of|if|whether)\b|n['’]t\b", re.IGNORECASE)

# Where a clause begins: "It is not A but B" denies A alone.
_CLAUSE_START = re.compile(r"[.!?;:,\n]|\b(?:but|so|hence|thus|therefore)\b", re.IGNORECASE)

# A denial right after what is denied: "A) is wrong", "(A) isn't it", "The answer is not".
_DENIED = re.compile(r"not\b|[)\]]? ?(?:(?:is|are|was|were|would be|seems) (?:not|wrong|incorrect|false|ruled out)\b"
                     r"|(?:is|are|was|were)n['’]t\b|wrong\b|incorrect\b)", re.IGNORECASE)


def negated(text: str, start: int, end: int) -> bool:
    """Whether what stands at text[start:end] is denied or supposed in its clause, or denied right after it."""
    before = text[max(0, start - CLAUSE):start]
    clause = _CLAUSE_START.split(before)[-1]
    if _NEGATION.search(clause):
        return True
    return denied_after(text, end)


def denied_after(text: str, end: int) -> bool:
    """Whether what ends at text[end] is denied at once: "A) is wrong"."""
    return _DENIED.match(text, end) is not None
