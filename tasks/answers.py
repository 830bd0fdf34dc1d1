"""Finding the answer in a response: ordered rules with names, no random choice, no first option, no nearest string.

    text = settled_text(response)           after </think>, inside <answer>, inside \\boxed{}, emphasis dropped
    k = read_choice(text, choices)          the first of LETTER_RULES that speaks names an option, or settles that there
                                            is no answer ("A or B", a refusal); None when none speaks

Numbers, lists and words are read in values.py, which grades. Every expression in both files takes linear time: runs of
white space are shortened first, repetitions are bounded, and of a very long final text only the end is read.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from verifier import drop_emphasis, final_text

LONGEST = 20_000                       # characters of final text; of a longer one only its end is read
NO_ANSWER = -1                         # a rule's word for "this response settles on no option"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---- the text that counts

def settled_text(response: str) -> str:
    """The final text, or what its last `\\boxed{}` holds, with every run of white space as one blank or line end.

    Two line ends (a paragraph) stay two. An unclosed box holds nothing.
    """
    text = final_text(response)
    start = text.rfind("\\boxed{")
    if start >= 0:
        text = _braced(text, start + len("\\boxed{"))
    if len(text) > LONGEST:
        text = "… " + text[-LONGEST:]                               # the sign keeps the cut from reading as a start
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _braced(text: str, start: int) -> str:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return drop_emphasis(text[start:start + match.start()])
    return ""


def plain(text: str) -> str:
    """A text for comparisons: case, emphasis, dollar signs, quotes and closing punctuation do not count, − is -."""
    text = " ".join(drop_emphasis(text).replace("$", "").replace("−", "-").casefold().split())
    return text.strip("\"'“”‘’").rstrip(".,;:!?").rstrip()


def same(a: str, b: str) -> bool:
    return a.strip() == b.strip()


_VERBS = ("determin|answer|tell|see|view|say|identif|provid|know|solv|find|decid|assist|help|confirm|infer|calculat|"
          "comput|estimat|read|give|access|choose|comply")
_REFUSAL = re.compile(
    rf"\b(?:can ?not|can['’]t|could not|couldn['’]t|unable to|not able to|impossible to|(?:not|n['’]t) possible to)"
    rf" (?:be )?(?:\w{{1,20}}ly )?(?:{_VERBS})"
    r"|\b(?:do not|don['’]t) (?:know|have enough|see (?:an|any|the) )|(?:^|\bi['’]m |\bi am )sorry\b"
    r"|\bnot enough (?:information|data|context)|\binsufficient (?:information|data|context)"
    r"|\bno (?:image|picture|answer)\b|^\W*(?:unknown|unclear|n/?a|none|not applicable|undetermined)\W*$")


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer."""
    return _REFUSAL.search(text.lower()) is not None


_NEGATION = re.compile(r"\b(?:not|never|neither|nor|(?:no|without)(?! (?:a )?(?:doubt|question))|cannot|except|than|"
                       r"instead of|if|whether)\b|n['’]t\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.!?;:,\n]|\b(?:but|so|hence|thus|therefore)\b", re.IGNORECASE)
_DENIED = re.compile(r"not\b|[)\]]? ?(?:(?:is|are|was|were|would be|seems) (?:not|wrong|incorrect|false|ruled out)\b"
                     r"|(?:is|are|was|were)n['’]t\b|wrong\b|incorrect\b)", re.IGNORECASE)


def negated(text: str, start: int, end: int) -> bool:
    """Whether what stands at text[start:end] is denied or supposed in its clause, or denied right after it."""
    clause = _CLAUSE.split(text[max(0, start - 80):start])[-1]
    return bool(_NEGATION.search(clause) or _DENIED.match(text, end))


# ---- letters and option texts

Rule = Callable[[str, Sequence[str]], "int | None"]


def read_choice(text: str, choices: Sequence[str], texts_first: bool = False) -> int | None:
    """The option that a settled text names, by the first rule that speaks; None for no answer."""
    rules = (whole_option_text, *LETTER_RULES) if texts_first else LETTER_RULES
    for rule in rules:
        k = rule(text, choices)
        if k is not None:
            return None if k == NO_ANSWER else k
    return None


_WHOLE = re.compile(
    r"[#>\-\s]{0,6}(?:(?:the |my )?(?:correct |final |best |right )?(?:answer|option|choice|letter)(?: letter)?(?: is)?"
    r" ?[:=]?\s{0,2})?(?:option |choice )?[(\[{$\"']{0,2}([A-Za-z])[)\]}$\"'.,:;!]{0,4}", re.IGNORECASE)


def whole_letter(text: str, choices: Sequence[str]) -> int | None:
    """The whole response is one letter, bare or as "(B).", "Answer: B", "Option B"; out of range is no answer."""
    match = _WHOLE.fullmatch(text)
    return match and _index(match[1], choices)


_HEAD = re.compile(r"(?:(?<!each )(?<!every )(?<!following )\b(?:answer|option|choice|letter)"
                   r"(?: letter| option| choice)? ?(?:is|:|=|\n|(?:should|would|must) be)"
                   r"|\b(?:select|choose|pick) (?:the )?(?:option|choice|answer)\b|(?:答案|选项) ?(?:[是为]|[:：]))"
                   r"\s{0,2}:?\s{0,2}(?:(?:most|very) )?(?:likely |probably |\w{1,20}ly )?(?:that )?", re.IGNORECASE)
_NAMED = re.compile(r"(?:the )?(?:(?:correct )?(?:option|choice|letter|answer):? )?"
                    r"([(\[{$\"']{0,2})([A-Za-z])(?![\w'’+])", re.IGNORECASE)
_CORRECT = re.compile(r"([A-Z])\b(?<!\w[A-Z])[)\]]? is "
                      r"(?:(?:correct|right)(?=\s*(?:[.,;:!)]|because|since|as|$))"
                      r"|the (?:only )?(?:correct|right|best) (?:answer|option|choice|one)\b)")
_BEFORE_CORRECT = re.compile(r"(?:^|[^\w\s]|\n|\b(?:option|choice|answer|letter|that|so|hence|thus|therefore|only|and|"
                             r"but)) ?[(\[]?$", re.IGNORECASE)
_ANOTHER = re.compile(r"(?:(?!\b(?:because|since|as|which|while|whereas|not|unlike|so|given|eliminat\w{1,5})\b)"
                      r"[^\n.]){0,80}(?:,? (?:or|and) |, )[(\[]([A-Z])[)\]]")
_NEXT_LABEL = re.compile(r"[^\w\n]{0,4}(\w[^\n]{0,80})?\n{1,2}[(\[]?([A-Z])[)\].] ?([^\n]{0,200})")
_JOINED = re.compile(r"[)\]}$\"']{0,3}\.? ?(?:,? ?\(?(?:or|and|/|&)|,) ?"
                     r"(?:(?:maybe|perhaps|possibly|probably|likely|even|else|also) ){0,2}(?:options? |choices? )?"
                     r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?![\w'’]))")


def declared_option(text: str, choices: Sequence[str]) -> int | None:
    """The last declaration: "answer is B", "Answer: (B)", "option letter is B", "B is correct", "answer is <text>".

    Passed over when negated, or when the letter is the article "A dog" or the pronoun "I think". Two letters joined
    by or, and, a comma or a slash ("B or maybe C"), a list of options, and a capital that is no option are no answer;
    what a next line or a clause after "because" says of the others does not count.
    """
    found = [(m.end(), False, m) for m in _HEAD.finditer(text) if not negated(text, m.start(), m.end())]
    found += [(m.end(), True, m) for m in _CORRECT.finditer(text) if not negated(text, m.start(), m.start())
              and _BEFORE_CORRECT.search(text[max(0, m.start() - 12):m.start()])]
    for end, correct, match in sorted(found, key=lambda f: f[0], reverse=True):
        k = _index(match[1], choices) if correct else _named_after(text, end, choices)
        if k is not None:
            return k
    return None


def _named_after(text: str, end: int, choices: Sequence[str]) -> int | None:
    """The option named right after a declaration's head that ends at `end`, by its text or its letter."""
    sentence = re.split(r"\n|[.!?;] |[.!?;]$", text[end:end + 400], maxsplit=1)[0]
    texts = [k for k, choice in enumerate(choices) if len(plain(choice)) > 1 and plain(choice) == plain(sentence)]
    if texts:
        return texts[0]
    match = _NAMED.match(text, end)
    if not match or not match[1] and _is_word(text, match.start(2)):
        return None
    for joined in (_JOINED.match(text, match.end()), _ANOTHER.match(text, match.end())):
        if joined and joined[joined.lastindex].upper() != match[2].upper() \
                and (joined[1] or not _is_word(text, joined.start(2))):
            return NO_ANSWER
    if _starts_list(text, match, choices):
        return NO_ANSWER
    k = _index(match[2], choices)
    return None if k == NO_ANSWER and match[2].islower() and not match[1] else k     # "the answer is x + 1"


def _starts_list(text: str, named: re.Match, choices: Sequence[str]) -> bool:
    """Whether the next line goes on with a list that the named letter begins: "Answer:\\n(A) one\\n(B) two"."""
    following = _NEXT_LABEL.match(text, named.end())
    if not following or following[2] == named[2].upper():
        return False
    k = _index(following[2], choices)                                # "Answer: A. one\nB. two", nothing said of B
    bare = k != NO_ANSWER and following[1] and plain(following[3]) == plain(choices[k])
    return text[named.start() - 1] == "\n" or bool(bare)


_FUNCTION = "because|since|as|and|or|which|is|but|due|not|for|given|based|so|with|in|at|on|by|from|where|that|are|was"
_ARTICLE = re.compile(rf"[Aa] (?!(?:{_FUNCTION})\b)[a-z]")
_PRONOUN = re.compile(r"[Ii](?: [a-z]|['’])")


def _is_word(text: str, at: int) -> bool:
    """Whether the letter at `at` may be the article "A" (before a word that can follow it) or the pronoun "I"."""
    return bool(_ARTICLE.match(text, at) or _PRONOUN.match(text, at))


def _index(letter: str, choices: Sequence[str]) -> int:
    k = LETTERS.index(letter.upper())
    return k if k < len(choices) else NO_ANSWER


def whole_option_text(text: str, choices: Sequence[str]) -> int | None:
    """The whole response is an option's text. Options that differ in case only must be met exactly."""
    if len(text) > 2 * max(map(len, choices)) + 20:
        return None
    found = [k for k, choice in enumerate(choices) if plain(choice) and plain(choice) == plain(text)]
    exact = [k for k in found if same(choices[k], text)]
    if not exact and len({choices[k].strip() for k in found}) > 1:
        return None
    return next(iter(exact or found), None)


def refusal(text: str, choices: Sequence[str]) -> int | None:
    """A refusal without a declared answer; an option that itself says so ("Cannot be determined") may be named."""
    own = any(refuses(choice) and _mentions(text, choice) for choice in choices)
    return NO_ANSWER if refuses(text) and not own else None


_LABEL = re.compile(r"[#>*\-•\s]{0,6}(?:(?i:option|choice|answer) )?"
                    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?:\)|[.:](?=\s|$)|(?=\n))|([a-z])\))")
_LINE_LABEL = re.compile(r"^[#>*\-• ]{0,6}[(\[]?([A-Z])(?:[)\].:](?=\s|$)|$)", re.MULTILINE)


def leading_label(text: str, choices: Sequence[str]) -> int | None:
    """The response starts with a label: "B.", "B)", "B:", "(B)", or B on a line of its own.

    Unless another option's label starts a line or stands before its text (a list of the options), or the label is
    denied at once; "A) and B)" is no answer.
    """
    match = _LABEL.match(text)
    if not match:
        return None
    letter = match[1] or match[2] or match[3]
    k = _index(letter, choices)
    others = {_index(m, choices) for m in _LINE_LABEL.findall(text)} - {k, NO_ANSWER}
    if k == NO_ANSWER or others or _DENIED.match(text, match.end()) or _lists_options(text, choices, k):
        return None
    return NO_ANSWER if _JOINED.match(text, match.end()) else k


def _lists_options(text: str, choices: Sequence[str], k: int) -> bool:
    """Whether an option other than `k` is written out with its label: "... (C) a bus"."""
    return any(re.search(rf"(?<!\w)[(\[]?{LETTERS[i]}[)\].:]{{1,2}} ?{re.escape(choice.strip())}(?!\w)", text)
               for i, choice in enumerate(choices) if i != k and choice.strip())


_LETTER_LINE = re.compile(r"^[^\w\n]{0,4}([A-Z])[^\w\n]{0,4}$", re.MULTILINE)


def closing_letter(text: str, choices: Sequence[str]) -> int | None:
    """The last line is a letter, and the only line that is."""
    lines = _LETTER_LINE.findall(text)
    last = _LETTER_LINE.fullmatch(text.rsplit("\n", 1)[-1])
    return _index(lines[0], choices) if last and len(set(lines)) == 1 else None


def bracketed_letter(text: str, choices: Sequence[str]) -> int | None:
    """Exactly one distinct "(X)" that is an option, in the last paragraph or else in the whole text."""
    for part in (text.rsplit("\n\n", 1)[-1], text):
        found = {_index(m[1], choices) for m in re.finditer(r"(?<!\w)\(([A-Z])\)(?!\w)", part)
                 if not negated(part, m.start(), m.end())} - {NO_ANSWER}
        if len(found) == 1:
            return found.pop()
    return None


def option_text(text: str, choices: Sequence[str]) -> int | None:
    """The option whose text the response starts with, or the only one whose text it mentions, undenied.

    Words count whole, the longest match wins, and a text much longer than the options is judged by its last sentence:
    in a long text a mention is no answer.
    """
    flat, longest = plain(text), max(80, 2 * sum(map(len, choices)))
    short = len(flat) <= longest
    spans = _mentioned(flat[:longest], choices)
    starting = [(end, k) for start, end, k in spans if start == 0 and not negated(flat, 0, end)
                and (short or re.match(r" ?(?:[,.;:!(-]|because\b|since\b|$)", flat[end:end + 10]))]
    if starting:
        end, k = max(starting)
        joined = re.match(r",? ?(?:and|or|/|&) ", flat[end:end + 10])
        after = end + joined.end() if joined else -1
        return NO_ANSWER if any(start == after for start, _, _ in spans) else k
    if not short:
        flat = plain(re.split(r"[.!?] |\n", text.rstrip(" .!?\n"))[-1])
        spans = _mentioned(flat, choices) if len(flat) <= longest else []
    texts = {plain(choices[k]): k for start, end, k in reversed(spans) if not negated(flat, start, end)}
    return next(iter(texts.values())) if len(texts) == 1 else None


def _mentioned(flat: str, choices: Sequence[str]) -> list[tuple[int, int, int]]:
    """(start, end, option) where a flat text names an option's text, without those inside a longer option's."""
    texts = [plain(choice) for choice in choices]                    # a single letter is the other rules' business
    spans = [(*m.span(), k) for k, words in enumerate(texts) if len(words) > 1 or words.isdigit() or not words.isascii()
             for m in _whole_words(words).finditer(flat)]
    longer: dict[int, int] = {}
    for start, end, _ in sorted(spans, key=lambda s: s[1] - s[0]):
        longer.update(dict.fromkeys(range(start, end), end - start))  # the longest span that covers each character
    return [(s, e, k) for s, e, k in spans if longer[s] == e - s or longer[e - 1] == e - s]


def _whole_words(words: str) -> re.Pattern:
    root = r"(?<!√)(?<!√[{( ])(?<!sqrt[{( ])" if words[:1].isdigit() else ""
    operand = r"(?! ?(?:[-+*/^×=] ?\d|√|\\?sqrt))" if words[-1:].isdigit() else ""
    return re.compile(rf"(?<![\w-])(?<!\d[.,]){root}{re.escape(words)}(?![\w-])(?![.,]\d){operand}")


def _mentions(text: str, choice: str) -> bool:
    return bool(plain(choice)) and _whole_words(plain(choice)).search(plain(text)) is not None


_LONE = re.compile(r"([A-Z])(?<![\w'’\-][A-Z])(?![\w'’+#\-])")
_BEFORE_LONE = re.compile(
    r"(?:^|[.,;:!?()（\[{\"'“*>=$-]|\n|\b(?:options?|choice|answer|letter|point|image|figure|picture|graph|object|label|"
    r"is|be|choose|select|pick|say|with|to|therefore|so|thus|hence|probably|likely|perhaps|maybe|gets?|"
    r"(?:it|that|this|answer|choice|option)['’]s)) ?$", re.IGNORECASE)


def lone_letter(text: str, choices: Sequence[str]) -> int | None:
    """Exactly one distinct capital stands alone in the text, and is neither denied nor part of a name (Vitamin C).

    A capital A that may be an article makes it ambiguous: "Point A is closer than point B." names two.
    """
    found, named = set(), set()
    for m in _LONE.finditer(text):
        k = _index(m[1], choices)
        if k == NO_ANSWER or m[1] == "I" and _PRONOUN.match(text, m.start()):
            continue
        found.add(k)
        if _BEFORE_LONE.search(text[max(0, m.start() - 12):m.start()]) and not _is_word(text, m.start()) \
                and not negated(text, m.start(), m.end()):
            named.add(k)
    return named.pop() if len(found) == 1 and named else None


LETTER_RULES: tuple[Rule, ...] = (whole_letter, declared_option, whole_option_text, refusal, leading_label,
                                  closing_letter, bracketed_letter, option_text, lone_letter)
