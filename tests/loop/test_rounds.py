"""loop/rounds.py: which way a round's pairs point."""
from __future__ import annotations

from gate import proportion
from loop.rounds import pair_directions
from replay import Pair
from tasks import Item


def items(count: int) -> list[Item]:
    """Questions q0, q1, ... whose answers are 1 to 9; every seventh answer, that of q0 too, is not known."""
    made = []
    for number in range(count):
        answer = str(1 + number % 9) if number % 7 else None
        made.append(Item(f"q{number}", "bar", (f"say {1 + number % 9}",), (), answer, "integer"))
    return made


def test_pair_directions() -> None:
    """Mixed pairs are those with one side right; items without an answer (q0, q7) count nowhere."""
    said = {"q1": ("2", "9"), "q2": ("9", "3"), "q3": ("4", "4."), "q4": ("1", "9"), "q5": ("6", "no"),
            "q0": ("1", "2"), "q7": ("8", "1"), "q6": ("7", "2")}
    pairs = [Pair(name, (1,), (2,), 1.0, 0.0, chosen, rejected) for name, (chosen, rejected) in said.items()]
    assert pair_directions(pairs, items(20)) == {"mixed": 4, "right_way": 3, "direction": proportion(3, 4)}
    assert pair_directions([], items(20)) == {"mixed": 0, "right_way": 0, "direction": proportion(0, 0)}
