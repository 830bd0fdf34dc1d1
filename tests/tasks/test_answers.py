"""Every rule for finding an answer, both ways: what it reads and what it leaves alone. Written from the rules."""
from __future__ import annotations

import random
import time
from functools import partial

import pytest

from tasks import Item
from tasks import answers as a
from tasks import choices as c
from tasks import values as v
from tasks.values import grade
from verifier import final_text, parse_preference

ANIMALS = ("a dog", "a cat", "two cats", "a bus")
STOP = c.NO_ANSWER
HARD = {k: ("x", "y", "z", "w", "v", "u", "t", "s", "r")[:k] for k in (2, 4, 9)}       # texts that no sentence holds


def item(kind: str, answer: object, choices: tuple[str, ...] | None = None, precision: int | None = None) -> Item:
    return Item("1", "mmmu", ("?",), answer=answer, answer_type=kind, choices=choices, precision=precision)


@pytest.mark.parametrize("text, final", [
    ("It is B.", "It is B."), ("<think>A</think> B", "B"), ("<think>A</think> C <think>B</think> D", "D"),
    ("A</think>B", "B"), ("<think>the answer is B", ""), ("<think>A</think>B<think>C", ""),
    ("<answer>A</answer> or <answer>B</answer>", "B"), ("<answer>B", "B"), ("B <answer></answer>", ""), ("**B**", "B"),
    ("*B*", "B"), ("__B__", "B"), ("_B_", "B"), ("`B`", "B"), (r"\text{B}", "B"), (r"\textbf{B} x", "B x"),
    ("2*3*4", "2*3*4"), ("a_b_c", "a_b_c"), ("____", "____"), ("* one\n* two", "* one\n* two"), ("", "")])
def test_final_text(text, final):
    assert final_text(text) == final


@pytest.mark.parametrize("text, settled", [
    (r"x \boxed{B}", "B"), (r"\boxed{A} \boxed{B} y", "B"), (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"), (r"\boxed{}", ""),
    (r"\boxed{\text{B}}", "B"), (r"\boxed{12", ""), ("a  b\t c", "a b c"), ("a \n b", "a\nb"),
    ("a\n\n\n \nb", "a\n\nb"), (r"\boxed{A}</think>B", "B")])
def test_settled_text(text, settled):
    assert a.settled_text(text) == settled


@pytest.mark.parametrize("text, refused", [
    ("I cannot determine the answer from the image.", True), ("I'm sorry, but I can't help.", True), ("Sorry.", True),
    ("It is impossible to tell.", True), ("It cannot be determined.", True), ("I don't know.", True), ("N/A", True),
    ("There is not enough information.", True), ("unknown", True), ("None", True),
    ("I am unable to see the image.", True), ("It's not possible to clearly identify the object.", True), ("5", False),
    ("The unknown x is 5.", False), ("The dog cannot fly.", False), ("A sorry sight, a dog.", False),
    ("None of these but B", False), ("cat", False), ("", False)])
def test_refuses(text, refused):
    assert a.refuses(text) is refused


CHOICE_RULES = {
    c.whole_letter: [
        ("B", 4, 1), ("b", 4, 1), ("(B)", 4, 1), ("B.", 4, 1), ("(B).", 4, 1), ("[B]", 4, 1), ("$B$", 4, 1),
        ("{B}", 4, 1), ("Answer: B", 4, 1), ("Answer:\nB", 4, 1), ("Option B", 4, 1), ("The answer is B.", 4, 1),
        ("# B", 4, 1), ("The correct answer is option (B).", 4, 1), ("Final answer: (B)", 4, 1), ("I", 9, 8),
        ("E", 4, STOP), ("(Z)", 4, STOP), ("I", 4, STOP), ("BC", 4, None), ("B because", 4, None), ("", 4, None),
        ("5", 4, None), ("A or B", 4, None), ("The answer is not B", 4, None)],
    c.declared_option: [
        ("So the answer is B.", 4, 1), ("Reasons. Answer: (C)", 4, 2), ("answer = D", 4, 3),
        ("The correct option is B", 4, 1), ("The option letter is B", 4, 1), ("the answer should be (B)", 4, 1),
        ("The answer is: B\nDone.", 4, 1), ("Therefore B is correct.", 4, 1),
        ("Option C is correct because it is.", 4, 2), ("(C) is the correct answer", 4, 2),
        ("The answer is A. No, the answer is B.", 4, 1), ("The answer is B, not A.", 4, 1),
        ("The answer is not A. The answer is B.", 4, 1), ("The answer is B. The answer is not C.", 4, 1),
        ("the answer is b because x > 1", 4, 1), ("The answer is most likely B", 4, 1),
        ("The answer is A because", 4, 0), ("The answer is (A) dog", 4, 0), ("The answer is clearly option C", 4, 2),
        ("There is no doubt the answer is C", 4, 2), ("The answer is B and I think so", 4, 1),
        ("I of them. The answer is I.", 9, 8), ("I would select option (C)", 4, 2), ("\u7b54\u6848\uff1aC", 4, 2),
        ("Let us see each option:\n(A) it", 4, None),
        ("The answer is:\n(A) one\n(B) two", 4, STOP), ("The answer is (A) one or (B) two", 4, STOP),
        ("The answer is A or B.", 4, STOP), ("The answer is A and C", 4, STOP),
        ("The answer is A/B", 4, STOP), ("The answer is A, C", 4, STOP), ("The answer is (A) or (C)", 4, STOP),
        ("The answer is either way E.", 4, None), ("The answer is E", 4, STOP), ("The answer is (e)", 4, STOP),
        ("the answer is not B", 4, None), ("The answer isn't B", 4, None), ("I don't think the answer is B", 4, None),
        ("If the answer is B, then", 4, None), ("The answer is a dog", 4, None), ("The answer is A dog", 4, None),
        ("The answer is I think unclear", 9, None), ("B is not correct", 4, None),
        ("Neither A nor B is correct", 4, None), ("Vitamin C is correct", 4, None),
        ("A is the best predictor of it", 4, None), ("Answer with the letter", 4, None),
        ("the answer is x + 1", 4, None), ("B", 4, None), ("Choices: A", 4, None),
        ("The correct answer is B.\n\nA. one is wrong because it barks.\nC. three is wrong.", 4, 1),
        ("The answer is (B).\n\n(A) is incorrect because it is.", 4, 1), ("Answer: B. two\nA. one is not seen.", 4, 1),
        ("The answer is B.\n(C) is tempting but wrong.", 4, 1), ("The answer is (B), not (A) or (C).", 4, 1),
        ("The answer is (B) because (A) and (C) are cats.", 4, 1), ("The answer is B.\n\nA. one\nB. two", 4, 1),
        ("The answer is B since (A), (C) and (D) are wrong.", 4, 1), ("Answer:\n\nA. one\nB. two", 4, STOP),
        ("Answer: A. x\nB. y\nC. z", 4, STOP), ("The answer is (A) asleep and (C) up", 4, STOP),
        ("The answer is B or maybe C", 4, STOP), ("The answer is (B) or maybe (C)", 4, STOP),
        ("The answer is B (or C)", 4, STOP), ("The answer is B, or possibly C", 4, STOP),
        ("The answer is B or possibly even option (C)", 4, STOP), ("The answer is B, and likely I am right", 9, 1)],
    c.leading_label: [
        ("B. a cat", 4, 1), ("B) it", 4, 1), ("B: it", 4, 1), ("(B) it", 4, 1), ("[B] it", 4, 1), ("B\nIt is.", 4, 1),
        ("b) it", 4, 1), ("(b) it", 4, 1), ("B)45", 4, 1), ("Option B: it", 4, 1), ("- B. it", 4, 1),
        ("B. it\nB. again", 4, 1), ("I. it", 9, 8), ("C. A force is drawn", 4, 2),
        ("D. It is D. Options A, B and C are wrong", 4, 3), ("A. one\nB. two", 4, None), ("A\nB\nC\nD", 4, None),
        ("(A) is wrong, (B) is right", 4, None), ("(A) and (B)", 4, STOP), ("B) or C)", 4, STOP), ("E. it", 4, None),
        ("A.M. it", 4, None), ("A dog", 4, None), ("b. it", 4, None), ("Bus. it", 4, None)],
    c.closing_letter: [
        ("Long talk.\nB", 4, 1), ("A. one\nB. two\n\n(B).", 4, 1), ("Long.\nE", 4, STOP), ("A\nB", 4, None),
        ("talk B", 4, None), ("B\nLong talk.", 4, None)],
    c.bracketed_letter: [
        ("I see (B) there", 4, 1), ("(A) or (B)?\n\nIt is (B).", 4, 1), ("First (A).\n\nIt is so.", 4, 0),
        ("(B) and (E)", 4, 1), ("It is not (A) but (B)", 4, 1), ("(A) is wrong; see (C)", 4, 2),
        ("(A) and (B)", 4, None), ("(E)", 4, None), ("f(A)", 4, None), ("(A) is far.\n\nIt's (B) or (C)", 4, None),
        ("not (A)", 4, None), ("(b)", 4, None)],
    c.lone_letter: [
        ("I would go with B here", 4, 1), ("Point B", 4, 1), ("B because it is so", 4, 1), ("A because it is so", 4, 0),
        ("Point A is closer to the camera than point B.", 4, None), ("A dog", 4, None), ("A dog is at B", 4, None),
        ("Vitamin C", 4, None), ("B or C", 4, None), ("I think so", 9, None), ("I think it is B", 9, 1),
        ("not B", 4, None), ("Plan E", 4, None), ("B-cell", 4, None), ("A+", 4, None), ("B's", 4, None), ("", 4, None),
        ("It's C.", 4, 2), ("I think it's C.", 4, 2), ("That\u2019s B", 4, 1), ("The answer's C.", 4, 2),
        ("It's A.", 4, 0), ("Probably B", 4, 1), ("It is most likely B", 4, 1), ("We get B", 4, 1),
        ("One gets B here", 4, 1),
        ("It's A dog", 4, None), ("Probably A dog", 4, None), ("It's vitamin C", 4, None), ("It isn't C", 4, None),
        ("The doctor's C", 4, None), ("unlikely B", 4, None), ("widget B", 4, None)],
}


@pytest.mark.parametrize("rule, text, n, expected", [(r, *case) for r, cases in CHOICE_RULES.items() for case in cases],
                         ids=lambda x: x.__name__ if callable(x) else None)
def test_letter_rule(rule, text, n, expected):
    assert rule(a.settled_text(text), HARD[n]) == expected


TEXT_RULES = {
    c.declared_option: [("The answer is a cat.", ANIMALS, 1), ("Answer: two cats\nAs seen.", ANIMALS, 2),
                        ("The answer is a cat on a bus", ANIMALS, None),
                        ("The answer is C Major.", ("A", "B", "C", "C Major"), 3)],
    c.whole_option_text: [("a cat", ANIMALS, 1), ("A Cat.", ANIMALS, 1), ('"two cats"', ANIMALS, 2),
        ("$7", ("$6", "$7"), 1),
                          ("18", ("9", "18", "18"), 1), ("mg", ("Mg", "mg"), 1), ("MG", ("Mg", "mg"), None),
                          ("a cat, two cats", ANIMALS, None), ("cat", ANIMALS, None), ("", ("", "x"), None)],
    c.refusal: [("I cannot tell.", ANIMALS, STOP), ("a cat", ANIMALS, None),
                ("It cannot be determined.", ("yes", "cannot be determined"), None)],
    c.leading_label: [("A. a dog B. a cat C. two cats D. a bus", ANIMALS, None), ("A. a dog, not a cat", ANIMALS, 0)],
    c.option_text: [
        ("It shows a cat", ANIMALS, 1), ("two cats, not a dog", ANIMALS, 2), ("A cat sits by a dog.", ANIMALS, 1),
        ("a cat or a dog", ANIMALS, STOP),
        ("quarter to nine", ("quarter", "quarter to"), 1), ("It is quarter to", ("quarter", "quarter to"), 1),
        ("6 of 36", ("6", "36"), 0),
        ("The grasshoppers", ("grass", "grasshoppers"), 1), ("145 degrees", ("45 degrees", "90 degrees"), None),
        ("It is 5.5", ("5", "6"), None),
        ("It is -5", ("5", "6"), None), ("see 3 and 5", ("3", "5"), None), ("It is 18", ("9", "18", "18"), 1),
        ("3 + 4 gives it", ("3", "9"), None),
        ("It is not a cat", ANIMALS, None), ("No a cat", ("no", "yes"), 0), ("Bus A", ("A", "B"), None),
        ("There's no dog but a cat", ANIMALS, 1),
        ("Yes, because " + "it is so " * 40, ("yes", "no"), 0), ("talk " * 60 + "a cat " + "talk " * 60, ANIMALS, None),
        ("talk " * 60 + ". So it shows a cat.", ANIMALS, 1), ("talk " * 60 + ". So not a cat.", ANIMALS, None),
        ("x = \u22122", ("-2", "2"), 0), ("x = -2", ("\u22122", "2"), 0), ("\u22122", ("2", "3"), None),
        ("x = \u22122", ("2", "3"), None), ("\u221a3", (r"\sqrt{3}", "3"), None), ("It is \u221a 3", ("3", "4"), None),
        (r"It is \sqrt{3}", (r"\sqrt{3}", "3"), 0), (r"It is \sqrt{3}", ("3", "4"), None),
        ("2\u221a3", ("2", "3"), None), ("\u221a(3)", ("3", "4"), None),
        ("", ANIMALS, None)],
}


@pytest.mark.parametrize("rule, text, choices, expected", [(r, *c) for r, cases in TEXT_RULES.items() for c in cases],
                         ids=lambda x: x.__name__ if callable(x) else None)
def test_text_rule(rule, text, choices, expected):
    assert rule(a.settled_text(text), choices) == expected


def choose(text: str, choices: tuple[str, ...], texts_first: bool = False) -> str | None:
    k = c.read_choice(a.settled_text(text), choices, texts_first)
    return None if k is None else choices[k]


@pytest.mark.parametrize("text, expected", [
    ("B", "a cat"), ("(B) a cat", "a cat"), ("**B**", "a cat"), ("B\n", "a cat"), ("B) it is so", "a cat"),
    (r"\boxed{B}", "a cat"), (r"The answer is A. \boxed{B}", "a cat"), ("A cat.", "a cat"),
    ("It shows a cat.", "a cat"), ("<think>A</think>B", "a cat"),
    ("**(A)** seems right. So, the answer is **(B)** a cat.", "a cat"), ("The answer is B, not A.", "a cat"),
    ("I can't see it well, but the answer is B.", "a cat"), ("D. It is. Options A, B and C are wrong", "a bus"),
    (r"\boxed{E}", None), (r"B \boxed{}", None), ("E", None), ("", None),
    ("I cannot determine it. Perhaps a cat.", None), ("The answer is A or B.", None), ("A, B, C, D", None),
    ("A. a dog\nB. a cat\nC. two cats\nD. a bus", None),
    ("Answer with the option's letter from the given choices directly.", None), ("Based on this, who knows?", None),
    ("The picture", None), ("NASA", None), ("<think>The answer is B", None), ("a cat and a dog", None)])
def test_read_choice(text, expected):
    assert choose(text, ANIMALS) == expected


@pytest.mark.parametrize("text", ["\u22122", "x = \u22122", "The answer is \u22122.", "\\boxed{\u22122}", "-2"])
def test_a_minus_sign_is_a_minus(text):
    assert choose(text, ("-2", "2")) == choose(text, ("2", "-2"), texts_first=True) == "-2"
    assert choose(text, ("2", "3")) is None


def test_texts_before_letters_where_they_disagree():
    labels = ("(c)", "(a)", "(e)", "(d)", "(b)")
    assert choose("(b)", labels) == "(a)" and choose("(b)", labels, texts_first=True) == "(b)"
    assert choose("E", labels, texts_first=True) == "(b)" and choose("(E) (b)", labels, texts_first=True) == "(b)"


def test_equal_option_texts_are_equally_right():
    question = item("choice", "18", ("9", "12", "18", "18"))
    assert [grade(question, letter).correct for letter in "ABCD"] == [False, False, True, True]
    assert grade(question, "18").correct


NUMBERS = [
    ("5", [5]), ("1,234.50", [1234.5]), ("-5 and \u22126", [-5, -6]), ("1e3, .5", [1000, 0.5]), ("$5 or so", [5]),
    ("x = 5", [5]), ("3 + 4 = 7", [7]), ("3/4 = 0.75", [0.75]), ("75%", [75]), ("5 cm", [5]), ("5cm", [5]),
    ("1, 2, 3", [1, 2, 3]), ("5.", [5]), ("1.5.", [1.5]), ("3/4", [None]), (r"\frac{3}{4}", [None]), (r"2\pi", [None]),
    ("2\u03c0", [None]), ("10^3", [None]), ("3 \u00d7 10^4", [None]), (r"\sqrt{2}", [None]), ("5 to 6", [None]),
    ("5 or 6", [None]), ("2010-2014", [None]), ("3:15", [None]), ("1,00", [None]), ("1.2.3", [None]), ("x^2", [None]),
    (r"12^\circ + 2^\circ = 14^{\circ}", [14]), (r"5^\circ or 6\u00b0", [None]), ("14x^2", [14, None]),
    ("14 m^3 and 2 m/s^2", [14, 2]), ("14 x^2", [14, None]), ("14 cm^20", [14, None]), ("14^2", [None]),
    ("1e999", [None]), ("H2O x2 COVID-19", []), ("nan inf", []), ("", [])]


@pytest.mark.parametrize("text, expected", NUMBERS)
def test_numbers(text, expected):
    assert v.numbers(a.settled_text(text)) == expected


@pytest.mark.parametrize("text, expected", [
    ("14", 14), ("14.", 14), ("14.0", 14), ("1,000", 1000), ("$14", 14), ("14 years old", 14), ("75 %", 75),
    ("45\u00b0", 45), ("\u22125", -5), ("**14**", 14), (r"\boxed{14}", 14), (r"\boxed{14 \text{ cm}}", 14),
    (r"$x = 14$", 14), ("about 14", 14), ("<answer>14</answer>", 14),
    ("The answer is 14, since 2 * 7 = 14 and not 15.", 14), ("Answer: 14\nCheck: 3", 14),
    ("The answer is 3. No, the answer is 14 (of 20).", 14), ("There are 3 here and 4 there. So 7 in all. Done.", 7),
    ("5 dogs, 6 cats", 6), ("The answer is 3 + 4 = 7", 7), ("The answer is:\n\n14", 14),
    ("I cannot see all of it, but the answer is 14.", 14), ("The answer is not 5. It is 6.", 6),
    ("The answer is as follows:\n6", 6), ("3/4", None), (r"\frac{3}{4}", None), ("The answer is 3/4.", None),
    ("pi", None), ("nan", None), ("inf", None), ("1e999", None), ("", None),
    ("I cannot determine which of the 4 it is.", None), ("Sorry, I see 4 of them at most.", None), ("five", None),
    ("It is 5 or 6", None), (r"5 \boxed{}", None), ("<think>5", None), ("9" * 5000, None)])
def test_read_number(text, expected):
    assert v.read_number(a.settled_text(text)) == expected


@pytest.mark.parametrize("kind, precision, gold, right, wrong", [
    ("integer", None, "14", [
        r"14^\circ", r"$14^\circ$", r"14^{\circ}", r"\boxed{14^\circ}", r"The answer is $14^\circ$",
        r"Answer: $14^{\circ}$", r"So x = 14^\circ", "14 cm^2", "14 cm^{2}", "14 m^3", "14 units^2",
        r"\boxed{14\ \text{cm}^2}", r"The area is $14\,\mathrm{cm}^{2}$.", "14 kg/m^3"],
        ["14^2", r"\boxed{14^2}", "14x^2"]),
    ("integer", None, "14", ["14", "14.0", "14 cm"], ["14.7", "13", "-14", "14%4", "", "nan"]),
    ("integer", None, "-3", ["-3", "\u22123", "It is -3."], ["3"]),
    ("integer", None, "1000", ["1,000", "1e3"], ["1 or 1000", "1000/1"]),
    ("float", 2, "5.77", ["5.774", "5.77", "5.7749"], ["5.78", "5.7"]),
    ("float", 1, "0.0", ["-0.04", "0", "0.0"], ["0.06", "nan"]),
    ("float", 1, "28.6", ["28.6%", "28.6"], ["0.286"]), ("float", None, "0.25", ["0.25"], ["0.2501", "1/4"]),
    ("list", None, "[2014, 2016]", ["[2014,2016]", "It is [2014, 2016].", "[2014.0, 2016]", "[1] then [2014, 2016]"],
     ["2014, 2016", "[2016, 2014]", "[2014]", "[2014, 2016", "[2014, x]", "2014, 2016]", "]", "[[2014, 2016]]",
      "[{[1]: 2}]"])])
def test_values(kind, precision, gold, right, wrong):
    question = item(kind, gold, precision=precision)
    assert [text for text in right if not grade(question, text).correct] == []
    assert [text for text in wrong if grade(question, text).correct] == []


@pytest.mark.parametrize("gold, right, wrong", [
    ("Tampa", ["Tampa", "It is Tampa, Florida", "tampa."], ["Miami", "", "I cannot tell."]),
    (["24/7", "3.429"], ["24/7", "3.429", "So x = 3.43", "The result is 24/7"], ["3.5", "24"]),
    ("0.9965", ["1", "0.9965", "about 1.0"], ["0.5", "I don't know, 1"]), ("2000000", ["2,000,000", "2000000"], ["2"]),
    ("C", ["the cell is in C", "C"], ["(C)", "B"]), ("none", ["None", "There is none"], ["one"])])
def test_open_answers(gold, right, wrong):
    assert [text for text in right if not grade(item("text", gold), text).correct] == []
    assert [text for text in wrong if grade(item("text", gold), text).correct] == []


def test_an_unknown_answer_is_never_scored():
    with pytest.raises(ValueError, match="'1' has no answer"):
        grade(item("integer", None), "5")


@pytest.mark.parametrize("bad", [
    item("integer", "many"), item("float", "1/2", precision=1), item("list", "1, 2"), item("choice", "x", ("a", "b")),
    item("text", " "), item("text", ["Rome", ""])])
def test_an_answer_that_is_not_of_its_type_is_refused(bad):
    with pytest.raises(ValueError, match="item '1'"):
        v.check_answer(bad)


# ---- properties

QUESTIONS = [
    (item("choice", "a cat", ANIMALS), ["B", "(B)", "a cat", "The answer is B.", "The answer is (B)", "It shows a cat",
                                        "A", "E", "A or B", "I cannot tell.", "B because of it"]),
    (item("integer", "14"), ["14", "The answer is 14.", "So 14 cm", "13", "I cannot tell.", "14.5"]),
    (item("float", "1.25", precision=2), ["1.25", "1.251 m", "the answer is 1.25"]),
    (item("list", "[1, 2]"), ["[1, 2]", "It is [1, 2]", "1, 2"]),
    (item("text", "Tampa"), ["Tampa", "It is Tampa", "Miami"])]


@pytest.mark.parametrize("question, response", [(q, r) for q, responses in QUESTIONS for r in responses])
def test_white_space_and_emphasis_around_the_answer_do_not_count(question, response):
    verdict = grade(question, response)
    for other in (response + "\n", response + "  \n\n", f"**{response}**", f"*{response}*", f"__{response}__",
                  f"`{response}`", f"  {response}\t", f"<think>The answer is D, or 99.</think>\n{response}"):
        assert grade(question, other).correct == verdict.correct, other
        assert (grade(question, other).answer is None) == (verdict.answer is None), other
    words = response.split(" ")
    emphasised = " ".join([*words[:-1], f"**{words[-1]}**"])
    assert grade(question, emphasised).correct == verdict.correct


@pytest.mark.parametrize("refusal", [
    "I cannot determine the answer from the image.", "I'm sorry, I can't see option B or the number 14.",
    "It is impossible to tell whether it is a cat, Tampa, 1.25 or 14.", "unknown", "N/A"])
def test_a_refusal_is_none_for_every_type(refusal):
    for question, _ in QUESTIONS:
        if question.answer_type != "list":
            assert grade(question, refusal).answer is None, question.answer_type


def test_shuffled_options_keep_the_verdict():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 9)
        choices = tuple(rng.sample(["oak", "elm", "ash", "fir", "yew", "birch", "a pine", "beech tree", "larch"], n))
        order = rng.sample(range(n), n)
        shuffled = tuple(choices[k] for k in order)
        gold, said = rng.choice(choices), rng.randrange(n)
        for form in ("{}", "({})", "The answer is {}."):
            before = grade(item("choice", gold, choices), form.format(c.LETTERS[said]))
            after = grade(item("choice", gold, shuffled), form.format(c.LETTERS[order.index(said)]))
            assert before.correct == after.correct == (choices[said] == gold)


HOSTILE = [
    " ", "\n", "\n ", "A", "(", "(A) ", "A or ", "answer ", "the answer is ", "answer is A or ", "1", "1,", "1.", "1 ",
    ",111", "1e", "1/", "-", "[", "]", "[[", "[1,", "\\boxed{", "{", "}", "\\text{", "*", "*a", "a*", "_", "_a", "**",
    "`", "<think>", "</think>", "<answer>", "not ", "is ", "so =", "a dog ", "a cat, ", "A. a dog ", "I am sorry ", "$",
    "\u2212", "Answer 1 is better ", "(A), ", "14 m/", "\u221a3", "answer is A\nB. ",
    "[[A]] ", '"better": ', "verdict "]


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_megabyte_takes_bounded_time(unit):
    text = "B" + unit * (1_000_000 // len(unit)) + "x"
    for judge in (*(partial(grade, question) for question, _ in QUESTIONS), parse_preference):
        start = time.perf_counter()
        judge(text)
        assert time.perf_counter() - start < 3                       # less than a tenth of that on an idle core


# ---- judges

@pytest.mark.parametrize("text, side", [
    ("[[A]]", 1), ("Long talk. [[B]].", 2), ("[[1]]", 1), ("Overall Judgment: Answer 1 is better.", 1),
    ("**Answer 2** is slightly better", 2), ("Therefore, Answer 2 is the better one.", 2),
    ("Response B is much better", 2), ("Assistant A is better", 1), ("Answer (2) is better", 2), ('{"better": 1}', 1),
    ('{"better": "B"}', 2), ("Verdict: B.", 2), ("Overall Judgment:\nAnswer 1", 1), (r"\boxed{2}", 2), ("2", 2),
    ("(A).", 1), ("Answer 2", 2), ("Answer 1\nis better", 1), ("Answer 1 is better than Answer 2.", 1),
    ("[[A]] at first, but finally [[B]]", 2), ("<think>[[A]]</think>[[B]]", 2),
    ("If we look at accuracy, Answer 1 is better.", 1), ("Answer 1 is better.\n\n[[A]]", 1), ("", None),
    ("[[C]]", None), ("[[tie]]", None), ("Answer 1 is better. Yet: [[tie]]", None), ("Answer 3 is better", None),
    ("Answer 10 is better", None), ("Overall Judgment: Answer X is better.", None),
    ('"[[A]]" if assistant A is better, "[[B]]" if assistant B is better.', None),
    ("Neither Answer 1 nor Answer 2 is better.", None), ("I can't say whether Answer 1 is better", None),
    ("Answer 1 is not better", None), ("[[A]] or [[B]]", None), ('{"better": 1.5}', None), ('{"better": null}', None),
    ('{"better": "tie"}', None), ("Both are good.", None), ("12", None), ("Verdict: A careful look", None),
    ("Overall Judgment: tie", None), ("<think>[[A]]", None), ("<think>[[A]]</think>", None), ("3", None),
    ("Both Answer 1 and Answer 2 are good", None), ("I prefer neither", None),
    ("I don't think Answer 1 is better", None), ("I wouldn’t say Answer 2 is better.", None),
    ("I cannot say Answer 2 is better", None), ("It is not true that Answer 1 is better", None),
    ("Either Answer 1 or Answer 2 is better", None), ("Answer 1/Answer 2 is better", None),
    ("Answer 1 is worse and Answer 2 is better", 2), ("I don't think so. Answer 2 is better", 2)])
def test_parse_preference(text, side):
    assert parse_preference(text) == side
