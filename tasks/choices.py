"""Which option a response names: ordered rules with names, no random choice, no first option, no nearest string.

    k = read_choice(settled_text(response), choices)

A rule is a function of (text, choices). It returns an option's index, or NO_ANSWER where the text speaks as the rule
expects but settles on no option ("A or B", a refusal), or None where the rule has nothing to say. The first rule that
says something decides; where none does, there is no answer either.

Beside each expression stands an example of what it reads.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tasks.answers import denied_after, names, negated, plain, refuses, same, whole_words

NO_ANSWER = -1                         # a rule's word for "this response settles on no option"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Rule = Callable[[str, Sequence[str]], "int | None"]


def read_choice(text: str, choices: Sequence[str], texts_first: bool = False) -> int | None:
    """The index of the option that a settled text names; None for no answer.

    `texts_first` looks for a whole response that is an option's text before it looks for letters.
    """
    rules = (whole_option_text, *LETTER_RULES) if texts_first else LETTER_RULES
    for rule in rules:
        k = rule(text, choices)
        if k is not None:
            return None if k == NO_ANSWER else k
    return None


def option_index(letter: str, choices: Sequence[str]) -> int | None:
    """The option that a single capital letter stands for, as data sets write answers; None where it is none."""
    if len(letter) != 1 or letter not in LETTERS:
        return None
    k = LETTERS.index(letter)
    return k if k < len(choices) else None


def _index(letter: str, choices: Sequence[str]) -> int:
    """The option that a letter of a response, large or small, stands for; a letter beyond the options is no answer."""
    k = LETTERS.index(letter.upper())
    return k if k < len(choices) else NO_ANSWER


# ---- letters that are words

# "A dog": the article stands before a word in small letters, but not before one that can follow a letter ("A because")
_FUNCTION = "because|since|as|and|or|which|is|but|due|not|for|given|based|so|with|in|at|on|by|from|where|that|are|was"
_ARTICLE = re.compile(rf"[Aa] (?!(?:{_FUNCTION})\b)[a-z]")

# "I think", "I'm"
_PRONOUN = re.compile(r"[Ii](?: [a-z]|['’])")


def _is_word(text: str, at: int) -> bool:
    """Whether the letter at `at` may be the article "A" (before a word that can follow it) or the pronoun "I"."""
    match = _ARTICLE.match(text, at) or _PRONOUN.match(text, at)
    return match is not None


# ---- rule: the whole response is a letter

# "# The correct answer is option (B)."
_WHOLE = re.compile(
    r"[#>\-\s]{0,6}(?:(?:the |my )?(?:correct |final |best |right )?(?:answer|option|choice|letter)(?: letter)?(?: is)?"
    r" ?[:=]?\s{0,2})?(?:option |choice )?[(\[{$\"']{0,2}([A-Za-z])[)\]}$\"'.,:;!]{0,4}", re.IGNORECASE)


def whole_letter(text: str, choices: Sequence[str]) -> int | None:
    """The whole response is one letter, bare or as "(B).", "Answer: B", "Option B"; out of range is no answer."""
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    return _index(match[1], choices)


# ---- rule: a declaration

# What announces an answer: "The answer is most likely ", "Option letter: ", "I would select option ", "答案："; but
# "see each option:" announces none.
_HEAD = re.compile(r"(?:(?<!each )(?<!every )(?<!following )\b(?:answer|option|choice|letter)"
                   r"(?: letter| option| choice)? ?(?:is|:|=|\n|(?:should|would|must) be)"
                   r"|\b(?:select|choose|pick) (?:the )?(?:option|choice|answer)\b|(?:答案|选项) ?(?:[是为]|[:：]))"
                   r"\s{0,2}:?\s{0,2}(?:(?:most|very) )?(?:likely |probably |\w{1,20}ly )?(?:that )?", re.IGNORECASE)

# What is announced: "(B", "the correct option: B" (group 1: what opens brackets, group 2: the letter)
_NAMED = re.compile(r"(?:the )?(?:(?:correct )?(?:option|choice|letter|answer):? )?"
                    r"([(\[{$\"']{0,2})([A-Za-z])(?![\w'’+])", re.IGNORECASE)

# "B is correct.", "(C) is the right answer"
_CORRECT = re.compile(r"([A-Z])\b(?<!\w[A-Z])[)\]]? is "
                      r"(?:(?:correct|right)(?=\s*(?:[.,;:!)]|because|since|as|$))"
                      r"|the (?:only )?(?:correct|right|best) (?:answer|option|choice|one)\b)")

# What may stand before that letter: nothing, a sign, "Therefore "; in "Vitamin C is correct" it is part of a name.
_BEFORE_CORRECT = re.compile(r"(?:^|[^\w\s]|\n|\b(?:option|choice|answer|letter|that|so|hence|thus|therefore|only|and|"
                             r"but)) ?[(\[]?$", re.IGNORECASE)

# A second letter right behind the first: "B or maybe C", "A/B", "A, C" (group 1: in brackets, group 2: bare)
_JOINED = re.compile(r"[)\]}$\"']{0,3}\.? ?(?:,? ?\(?(?:or|and|/|&)|,) ?"
                     r"(?:(?:maybe|perhaps|possibly|probably|likely|even|else|also) ){0,2}(?:options? |choices? )?"
                     r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?![\w'’]))")

# A second letter further on: "(A) one or (B) two"; what comes after "because" or "not" is about the others.
_ANOTHER = re.compile(r"(?:(?!\b(?:because|since|as|which|while|whereas|not|unlike|so|given|eliminat\w{1,5})\b)"
                      r"[^\n.]){0,80}(?:,? (?:or|and) |, )[(\[]([A-Z])[)\]]")

# A list of options: "A. one\nB. two" behind its A (group 1: A's text, group 2: the next label, group 3: its text)
_NEXT_LABEL = re.compile(r"[^\w\n]{0,4}(\w[^\n]{0,80})?\n{1,2}[(\[]?([A-Z])[)\].] ?([^\n]{0,200})")

# Where a declaration's sentence ends: "The answer is a cat. It sits."
_SENTENCE_END = re.compile(r"\n|[.!?;] |[.!?;]$")


def declared_option(text: str, choices: Sequence[str]) -> int | None:
    """The last declaration: "answer is B", "Answer: (B)", "option letter is B", "B is correct", "answer is <text>".

    Passed over when negated, or when the letter is the article "A dog" or the pronoun "I think". Two letters joined
    by or, and, a comma or a slash ("B or maybe C"), a list of options, and a capital that is no option are no answer;
    what a next line or a clause after "because" says of the others does not count.
    """
    declarations: list[tuple[int, str | None]] = []         # (where it ends, its letter; None: what follows names one)
    for head in _HEAD.finditer(text):
        if not negated(text, head.start(), head.end()):
            declarations.append((head.end(), None))
    for match in _CORRECT.finditer(text):
        before = text[max(0, match.start() - 12):match.start()]
        if _BEFORE_CORRECT.search(before) and not negated(text, match.start(), match.start()):
            declarations.append((match.end(), match[1]))

    declarations.sort(key=lambda declaration: declaration[0], reverse=True)
    for end, letter in declarations:
        k = _named_after(text, end, choices) if letter is None else _index(letter, choices)
        if k is not None:
            return k
    return None


def _named_after(text: str, end: int, choices: Sequence[str]) -> int | None:
    """The option named right after a declaration's head that ends at `end`, by its text or its letter."""
    sentence = _SENTENCE_END.split(text[end:end + 400], maxsplit=1)[0]
    for k, choice in enumerate(choices):
        if len(plain(choice)) > 1 and plain(choice) == plain(sentence):
            return k

    named = _NAMED.match(text, end)
    if named is None:
        return None
    bracketed = named[1] != ""
    if not bracketed and _is_word(text, named.start(2)):
        return None
    if _joins_another(text, named) or _starts_list(text, named, choices):
        return NO_ANSWER

    k = _index(named[2], choices)
    if k == NO_ANSWER and named[2].islower() and not bracketed:     # "the answer is x + 1"
        return None
    return k


def _joins_another(text: str, named: re.Match) -> bool:
    """Whether a different letter is joined to the named one: "B or maybe C", "(A) one or (B) two"."""
    letter = named[2].upper()

    joined = _JOINED.match(text, named.end())
    if joined:
        other = joined[1] or joined[2]
        is_word = joined[1] is None and _is_word(text, joined.start(2))
        if other.upper() != letter and not is_word:
            return True

    another = _ANOTHER.match(text, named.end())
    return another is not None and another[1] != letter


def _starts_list(text: str, named: re.Match, choices: Sequence[str]) -> bool:
    """Whether the named letter begins a list of the options: "Answer:\\n(A) one\\n(B) two"."""
    following = _NEXT_LABEL.match(text, named.end())
    if following is None or following[2] == named[2].upper():
        return False
    if text[named.start() - 1] == "\n":
        return True

    # On the head's own line, "Answer: A. one\nB. two" is a list if it says nothing of B but its text.
    k = _index(following[2], choices)
    if k == NO_ANSWER or not following[1]:
        return False
    return plain(following[3]) == plain(choices[k])


# ---- rule: the whole response is an option's text

def whole_option_text(text: str, choices: Sequence[str]) -> int | None:
    """The whole response is an option's text. Options that differ in case only must be met exactly."""
    longest = max(len(choice) for choice in choices)
    if len(text) > 2 * longest + 20:
        return None

    said = plain(text)
    matching = [k for k, choice in enumerate(choices) if plain(choice) and plain(choice) == said]
    exact = [k for k in matching if same(choices[k], text)]
    if exact:
        return exact[0]
    different = {choices[k].strip() for k in matching}
    return matching[0] if len(different) == 1 else None


# ---- rule: a refusal

def refusal(text: str, choices: Sequence[str]) -> int | None:
    """A refusal without a declared answer; an option that itself says so ("Cannot be determined") may be named."""
    if not refuses(text):
        return None
    for choice in choices:
        if refuses(choice) and names(text, choice):
            return None
    return NO_ANSWER


# ---- rule: a label at the start

# "- Option B: it", "(b) it", "B.", "B\n" (group 1: in brackets, group 2: a capital, group 3: a small letter and ")")
_LABEL = re.compile(r"[#>*\-•\s]{0,6}(?:(?i:option|choice|answer) )?"
                    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?:\)|[.:](?=\s|$)|(?=\n))|([a-z])\))")

# A label at the start of any line: "* B. two"
_LINE_LABEL = re.compile(r"^[#>*\-• ]{0,6}[(\[]?([A-Z])(?:[)\].:](?=\s|$)|$)", re.MULTILINE)


def leading_label(text: str, choices: Sequence[str]) -> int | None:
    """The response starts with a label: "B.", "B)", "B:", "(B)", or B on a line of its own.

    Unless another option's label starts a line or stands before its text (a list of the options), or the label is
    denied at once; "A) and B)" is no answer.
    """
    label = _LABEL.match(text)
    if label is None:
        return None
    k = _index(label[1] or label[2] or label[3], choices)
    if k == NO_ANSWER:
        return None

    labels = {_index(letter, choices) for letter in _LINE_LABEL.findall(text)}
    if labels - {k, NO_ANSWER} or denied_after(text, label.end()) or _lists_options(text, choices, k):
        return None
    return NO_ANSWER if _JOINED.match(text, label.end()) else k


def _lists_options(text: str, choices: Sequence[str], k: int) -> bool:
    """Whether an option other than `k` is written out with its label: "... (C) a bus"."""
    for i, choice in enumerate(choices):
        words = choice.strip()
        if i == k or not words:
            continue
        if re.search(rf"(?<!\w)[(\[]?{LETTERS[i]}[)\].:]{{1,2}} ?{re.escape(words)}(?!\w)", text):
            return True
    return False


# ---- rule: a letter as the last line

# "**B**.", as a line
_LETTER_LINE = re.compile(r"^[^\w\n]{0,4}([A-Z])[^\w\n]{0,4}$", re.MULTILINE)


def closing_letter(text: str, choices: Sequence[str]) -> int | None:
    """The last line is a letter, and the only line that is."""
    last_line = text.rsplit("\n", 1)[-1]
    if _LETTER_LINE.fullmatch(last_line) is None:
        return None
    letters = set(_LETTER_LINE.findall(text))
    if len(letters) != 1:
        return None
    return _index(letters.pop(), choices)


# ---- rule: one letter in brackets

# "It is (B)", but not "f(A)"
_BRACKETED = re.compile(r"(?<!\w)\(([A-Z])\)(?!\w)")


def bracketed_letter(text: str, choices: Sequence[str]) -> int | None:
    """Exactly one distinct "(X)" that is an option, in the last paragraph or else in the whole text."""
    last_paragraph = text.rsplit("\n\n", 1)[-1]
    for part in (last_paragraph, text):
        options = set()
        for match in _BRACKETED.finditer(part):
            if not negated(part, match.start(), match.end()):
                options.add(_index(match[1], choices))
        options.discard(NO_ANSWER)
        if len(options) == 1:
            return options.pop()
    return None


# ---- rule: an option's text in the response

# What ends an option's text at the start of a long response: "Yes, it does ...", "yes because ..."
_AFTER_OPTION = re.compile(r" ?(?:[,.;:!(-]|because\b|since\b|$)")

# "a cat or a dog"
_JOINING = re.compile(r",? ?(?:and|or|/|&) ")

_SENTENCES = re.compile(r"[.!?] |\n")


class Mention(NamedTuple):
    """A flat text names an option's text at text[start:end]."""
    start: int
    end: int
    option: int


def option_text(text: str, choices: Sequence[str]) -> int | None:
    """The option whose text the response starts with, or the only one whose text it mentions, undenied.

    Words count whole, the longest match wins, and a text much longer than the options is judged by its last sentence:
    in a long text a mention is no answer.
    """
    flat = plain(text)
    longest = max(80, 2 * sum(len(choice) for choice in choices))
    short = len(flat) <= longest

    mentions = _mentioned(flat[:longest], choices)
    k = _starts_with_option(flat, mentions, short)
    if k is not None:
        return k

    if not short:
        flat = plain(_SENTENCES.split(text.rstrip(" .!?\n"))[-1])
        mentions = _mentioned(flat, choices) if len(flat) <= longest else []
    options: dict[str, int] = {}                            # equal texts are one answer: the first of them
    for mention in mentions:
        if not negated(flat, mention.start, mention.end):
            options.setdefault(plain(choices[mention.option]), mention.option)
    return next(iter(options.values())) if len(options) == 1 else None


def _starts_with_option(flat: str, mentions: Sequence[Mention], short: bool) -> int | None:
    """The option whose text a flat text starts with; "a cat or a dog" is no answer.

    In a text that is not `short`, the option's text must end there: "Yes, because ...".
    """
    starting = []
    for mention in mentions:
        ends = short or _AFTER_OPTION.match(flat[mention.end:mention.end + 10])
        if mention.start == 0 and ends and not negated(flat, 0, mention.end):
            starting.append(mention)
    if not starting:
        return None

    longest = max(starting, key=lambda mention: (mention.end, mention.option))
    joining = _JOINING.match(flat[longest.end:longest.end + 10])
    if joining:
        second = longest.end + joining.end()                # where a second option would start
        if any(mention.start == second for mention in mentions):
            return NO_ANSWER
    return longest.option


def _mentioned(flat: str, choices: Sequence[str]) -> list[Mention]:
    """Where a flat text names an option's text, without those inside a longer option's: "quarter" in "quarter to"."""
    mentions = []
    for k, choice in enumerate(choices):
        words = plain(choice)
        # A single Latin letter is the other rules' business.
        if len(words) > 1 or words.isdigit() or not words.isascii():
            for match in whole_words(words).finditer(flat):
                mentions.append(Mention(match.start(), match.end(), k))

    longest: dict[int, int] = {}                            # character -> length of the longest mention that covers it
    for start, end, _ in sorted(mentions, key=lambda mention: mention.end - mention.start):
        for at in range(start, end):
            longest[at] = end - start

    outermost = []
    for mention in mentions:
        length = mention.end - mention.start
        if longest[mention.start] == length or longest[mention.end - 1] == length:
            outermost.append(mention)
    return outermost


# ---- rule: one lone capital

# "go with B here", but not "B-cell", "A+" or "B's"
_LONE = re.compile(r"([A-Z])(?<![\w'’\-][A-Z])(?![\w'’+#\-])")

# What may stand before it: nothing, a sign, "it is ", "Point "; in "Vitamin C" it is part of a name.
_BEFORE_LONE = re.compile(
    r"(?:^|[.,;:!?()（\[{\"'“*>=$-]|\n|\b(?:options?|choice|answer|letter|point|image|figure|picture|graph|object|label|"
    r"is|be|choose|select|pick|say|with|to|therefore|so|thus|hence|probably|likely|perhaps|maybe|gets?|"
    r"(?:it|that|this|answer|choice|option)['’]s)) ?$", re.IGNORECASE)


def lone_letter(text: str, choices: Sequence[str]) -> int | None:
    """Exactly one distinct capital stands alone in the text, and is neither denied nor part of a name (Vitamin C).

    A capital A that may be an article makes it ambiguous: "Point A is closer than point B." names two.
    """
    capitals = set()                                        # options whose letter stands alone
    named = set()                                           # those of them that some letter names as an answer
    for match in _LONE.finditer(text):
        k = _index(match[1], choices)
        is_pronoun = match[1] == "I" and _PRONOUN.match(text, match.start())
        if k == NO_ANSWER or is_pronoun:
            continue
        capitals.add(k)
        before = text[max(0, match.start() - 12):match.start()]
        is_word = _is_word(text, match.start())
        if _BEFORE_LONE.search(before) and not is_word and not negated(text, match.start(), match.end()):
            named.add(k)
    return named.pop() if len(capitals) == 1 and named else None


LETTER_RULES: tuple[Rule, ...] = (
    whole_letter,
    declared_option,
    whole_option_text,
    refusal,
    leading_label,
    closing_letter,
    bracketed_letter,
    option_text,
    lone_letter,
)
