"""loop/served.py and what it stands on, against a server of our own that answers by a rule and fails on demand."""
from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from eval import load_task
from fake_server import MODEL, FakeServer, Fault, completion, prompt_of, serving
from loop import endpoint
from loop.answer_log import AnswerLog
from loop.asking import ask_verifier, count_prompts, counting_failures
from loop.endpoint import Endpoint, is_served, parse_address, retry_after
from loop.lengths import answer_uses, verifier_uses
from loop.run import check_same
from loop.served import FAILED, ServedModel, TooManyFailed
from loop.served_digits import find_digits
from model import load_vlm, next_digits
from tasks.flags import RequestFlags
from tiny import chat
from verifier import REPLIES, expected_scores, score_candidates

TINY = Path(__file__).parents[2] / "model" / "tiny"
SECRET = "sk-very-secret-key"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second tries come at once, and there is no key."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def model_of(server: FakeServer, folder: Path, expect: int = 1000, share: int = 1, **flags: Any) -> ServedModel:
    """A served model whose answers are kept below `folder`."""
    model = ServedModel(server.model, RequestFlags(**flags), AnswerLog(folder / "served.jsonl"), share)
    model.expect(expect)
    return model


def questions(count: int) -> list[list[dict]]:
    return [chat(f"question {number}") for number in range(count)]


def echo(body: dict[str, Any], number: int) -> str:
    """The prompt, turned around."""
    return prompt_of(body)[::-1]


def failing(faults: list[Fault]) -> Callable[[dict[str, Any], int], Any]:
    """The first requests go wrong, one by each of the faults; the others are answered."""
    return lambda body, number: faults[number] if number < len(faults) else echo(body, number)


# ---- addresses and names

def test_addresses() -> None:
    address = parse_address("https://h.example:8000/v1/#owner/name")
    assert (address.url, address.name, str(address)) == (
        "https://h.example:8000/v1", "owner/name", "https://h.example:8000/v1#owner/name")
    assert str(parse_address("http://[::1]:80/v1")) == "http://[::1]:80/v1"
    assert is_served("HTTP://h/v1") and not is_served("http/model") and not is_served(None)


@pytest.mark.parametrize("text", ["http://h", "http://h:8000/", "http://:80/v1", "http://h:x/v1", "http://h/v1 #n",
                                  f"http://u:{SECRET}@h/v1", f"http://{SECRET}@h/v1", f"http://h/v1?key={SECRET}"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="served model|not of the form") as caught:
        parse_address(text)
    assert SECRET not in str(caught.value)


def test_the_only_model_is_found(tmp_path: Path) -> None:
    with serving(echo) as server:
        model = ServedModel(server.url, RequestFlags(), AnswerLog(tmp_path / "log"))
        assert str(model.address) == server.model
        server.models = ["one", "two"]
        with pytest.raises(ValueError, match=r"lists 2 models: one, two; name one: http://.*/v1#NAME"):
            ServedModel(server.url, RequestFlags(), AnswerLog(tmp_path / "log"))
        assert ServedModel(server.url + "#three", RequestFlags(), AnswerLog(tmp_path / "log")).address.name == "three"
        with pytest.raises(ValueError, match="404"):
            ServedModel(server.url + "/typo", RequestFlags(), AnswerLog(tmp_path / "log"))


def test_no_server(tmp_path: Path) -> None:
    with serving(echo) as server:
        pass
    with pytest.raises(ValueError, match=r"cannot ask http://.*/v1/models: Connection refused"):
        ServedModel(server.model, RequestFlags(), AnswerLog(tmp_path / "log"))


# ---- what is sent

def test_a_request(tmp_path: Path) -> None:
    """Pictures as the pixels that a local model sees: RGB, what is transparent on white. Each is encoded once."""
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 255, 0))
    with serving(echo) as server:
        model = model_of(server, tmp_path)
        [[answer]] = model.generate([chat(half, "what?", half)], max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    assert answer.text == "?tahw" and answer.finish_reason == "stop" and len(answer.token_ids) == 2
    [body] = server.bodies
    [message] = body.pop("messages")
    assert body == {"model": MODEL, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert message["role"] == "user" and [part["type"] for part in message["content"]] == [
        "image_url", "text", "image_url"]
    url = message["content"][0]["image_url"]["url"]
    assert url == message["content"][2]["image_url"]["url"] and url.startswith("data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.mode == "RGB" and picture.tobytes() == bytes([255, 0, 0, 255, 255, 255])


def test_answers_come_in_order_and_at_once(tmp_path: Path) -> None:
    """As many as --concurrency are under way, shared between ranks, and never more."""
    together = threading.Barrier(4)

    def say(body: dict[str, Any], number: int) -> str:
        together.wait(timeout=10)
        return echo(body, number)
    with serving(say) as server:
        answers = model_of(server, tmp_path, concurrency=8, share=2).generate(questions(12), temperature=0.0)
    assert [answer.text for [answer] in answers] == [f"question {number}"[::-1] for number in range(12)]
    assert server.most_at_once == 4
    with serving(echo) as server:
        assert model_of(server, tmp_path, concurrency=2, share=3).concurrency == 1


def test_greedy_samples_are_equal(tmp_path: Path) -> None:
    with serving(echo) as server:
        [answers] = model_of(server, tmp_path).generate(questions(1), n=3, temperature=0.0)
    assert [answer.text for answer in answers] == ["0 noitseuq"] * 3 and len(server.bodies) == 1


# ---- what goes wrong on the way

FAULTS = {
    "429": Fault(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "408": Fault(408),
    "500": Fault(500, b"Internal Server Error"),
    "503": Fault(503),
    "cut": Fault(200, b'{"choices": [{"message": {"content": "4"', cut=50),
    "garbage": Fault(200, b"<html>\xff"),
    "deep": Fault(200, b"[" * 100_000),
    "no completion": Fault(200, b'{"choices": []}'),
    "a list": Fault(200, b"[1]"),
    "no text": Fault(200, b'{"choices": [{"message": {"content": 4}}]}'),
    "no answer": Fault(200, b"", cut=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again(name: str, tmp_path: Path) -> None:
    with serving(failing([FAULTS[name]] * 2)) as server:
        model = model_of(server, tmp_path)
        assert [answer.text for [answer] in model.generate(questions(1), temperature=0.0)] == ["0 noitseuq"]
    assert len(server.bodies) == 3 and model.failures == 0


def test_a_slow_answer_is_tried_again(tmp_path: Path) -> None:
    with serving(failing([Fault(200, json.dumps(completion("late")).encode(), wait=0.5)])) as server:
        model = model_of(server, tmp_path, request_timeout=0.2)
        assert [answer.text for [answer] in model.generate(questions(1), temperature=0.0)] == ["0 noitseuq"]
    assert len(server.bodies) == 2


def test_an_answer_that_drips_has_a_deadline() -> None:
    """Each part comes in time, the whole does not."""
    response = SimpleNamespace(read1=lambda _: b" ", length=None)
    with pytest.raises(TimeoutError):
        endpoint.read_all(response, time.monotonic() + 0.01)


@pytest.mark.parametrize("fault, told", [
    (FAULTS["500"], r"HTTP 500: Internal Server Error \(try 6\)"), (FAULTS["cut"], r"cut short \(try 6\)"),
    (Fault(400, b'{"error": {"message": "picture\\nis too large"}}'), "HTTP 400: picture is too large"),
    (Fault(404, b'{"detail": "no such model"}'), "HTTP 404: no such model"),
    (Fault(403, b'{"error": "no"}'), r"HTTP 403 \(the key is read from OPENAI_API_KEY\): no")],
    ids=["500", "cut", "400", "404", "403"])
def test_a_request_that_fails_for_good(fault: Fault, told: str, tmp_path: Path) -> None:
    """It is no answer and no verdict; at most --max-failed of all may fail. What others answered is kept."""
    with serving(lambda body, number: fault if "question 1" in prompt_of(body) else echo(body, number)) as server:
        model = model_of(server, tmp_path, expect=4, max_failed=0.25, concurrency=1)
        answers = model.generate(questions(4), n=2, temperature=0.0)
        model.check()
        assert [row == [FAILED] * 2 for row in answers] == [False, True, False, False]
        tries = sum("question 1" in prompt_of(body) for body in server.bodies)
        assert tries == (6 if "try 6" in told else 1) and model.failures == 1

        strict = model_of(server, tmp_path / "strict", expect=4, max_failed=0.24, concurrency=1)
        server.bodies.clear()
        assert strict.generate(questions(4), temperature=0.0)[2:] == [[FAILED], [FAILED]]       # these were not sent
        assert not any("question 2" in prompt_of(body) for body in server.bodies)
        with pytest.raises(TooManyFailed, match=r"1 of 4 requests to http.* for good, more than --max-failed 0.24 .*"
                                                + told):
            strict.check()


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """After a server that broke down in the middle, the same questions are asked of it as far as they were not
    answered; a log that was cut in a line loses that line."""
    breaks = {"at": 5}

    def say(body: dict[str, Any], number: int) -> Any:
        return Fault(500) if number >= breaks["at"] else echo(body, number)
    with serving(say) as server:
        model = model_of(server, tmp_path, expect=20, concurrency=1)
        model.generate(questions(20), temperature=0.0)
        with pytest.raises(TooManyFailed):
            model.check()
        assert len(server.bodies) == 5 + endpoint.TRIES
        log = tmp_path / "served.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([*lines[:4], lines[4][:-20]]))
        breaks["at"] = 10 ** 9
        server.bodies.clear()
        again = model_of(server, tmp_path, expect=20)
        assert [answer.text for [answer] in again.generate(questions(20), temperature=0.0)] == [
            f"question {number}"[::-1] for number in range(20)]
        again.check()
        assert sorted(map(prompt_of, server.bodies)) == sorted(f"question {number}" for number in range(4, 20))
        assert model_of(server, tmp_path).generate(questions(20), temperature=0.0) and len(server.bodies) == 16
        assert model_of(server, tmp_path).generate(questions(1), temperature=0.5) and len(server.bodies) == 17


# ---- waiting

def test_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They double; Retry-After says how long instead, in seconds or as a date, unless it says too long."""
    waits: list[float] = []
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.5)
    for header, expected in ((None, [0.5, 1, 2, 4, 8]), ("3", [3] * 5), (formatdate(time.time() + 60), [60] * 5),
                             ("soon", [0.5, 1, 2, 4, 8]), ("301", [])):
        waits.clear()
        with serving(lambda body, number, header=header: Fault(429, b"", {"Retry-After": header} if header else {})
                     ) as server:
            asked = Endpoint(server.url, 5)
            asked.given_up.wait = lambda seconds: waits.append(seconds)
            with pytest.raises(endpoint.RequestFailed):
                asked.ask("/chat/completions", {"messages": []}, lambda value: value)
        assert len(waits) == len(expected)
        for wait, least in zip(waits, expected, strict=True):
            assert least - 2 <= wait <= 1.5 * least
    assert retry_after("2.5") == 2.5 and retry_after(None) is None and retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0


# ---- the key

def test_the_key_goes_to_the_server_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to where a redirect leads, nor into the log or a message, even if a server repeats it."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\n")
    with serving(echo) as other:
        leads_on = Fault(302, b"", {"Location": f"{other.url}/chat/completions"})
        with serving(lambda body, number: leads_on if number else Fault(400, f"bad key {SECRET}".encode())) as server:
            model = model_of(server, tmp_path, expect=1, concurrency=1)
            assert model.generate(questions(1), temperature=0.0) == [[FAILED]]
            with pytest.raises(TooManyFailed, match=r"bad key \*\*\*"):
                model.check()
            model = model_of(server, tmp_path, expect=1)
            assert model.generate(questions(1), temperature=0.0) == [[FAILED]]
            with pytest.raises(TooManyFailed, match="HTTP 302, a redirect to 127.0.0.1, which is not followed"):
                model.check()
    assert not other.bodies and not other.headers
    assert {headers.get("Authorization") for headers in server.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in (tmp_path / "served.jsonl").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\nX: y")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        Endpoint(server.url, 1)
    assert SECRET not in str(caught.value)


# ---- fields that a server may not take

def test_samples_in_one_request(tmp_path: Path) -> None:
    with serving(lambda body, number: [f"{body['seed']}"] * body["n"]) as server:
        model = model_of(server, tmp_path)
        answers = model.generate(questions(3), n=4, temperature=1.0, seed=5)
        assert [body["n"] for body in server.bodies] == [4] * 3 and [len(row) for row in answers] == [4] * 3
        assert len({body["seed"] for body in server.bodies}) == 3 and answers[0][0].token_ids is None
        assert model_of(server, tmp_path).generate(questions(3), n=4, temperature=1.0, seed=5) == answers
        assert len(server.bodies) == 3
        assert model.generate(questions(3), n=4, temperature=1.0, seed=6)[0] != answers[0]


@pytest.mark.parametrize("count", [None, 1, 3, 9], ids=["refused", "one", "too few", "too many"])
def test_samples_of_a_server_without_n(count: int | None, tmp_path: Path) -> None:
    """It refuses n, or passes it over: found out once. What came is kept; other samples have seeds of their own."""
    def say(body: dict[str, Any], number: int) -> Any:
        if "n" not in body:
            return f"{prompt_of(body)}: {body['seed']}"
        return Fault(422, b'{"detail": "unexpected n"}') if count is None else [f"whole {k}" for k in range(count)]
    with serving(say) as server:
        answers = model_of(server, tmp_path).generate(questions(5), n=4, temperature=1.0)
        many = sum("n" in body for body in server.bodies)
        before = len(server.bodies)
        assert model_of(server, tmp_path).generate(questions(5), n=4, temperature=1.0) == answers
        assert len(server.bodies) == before
    assert [len({answer.text for answer in row}) for row in answers] == [4] * 5
    if count == 9:
        assert many == before == 5
    else:
        assert many == 1 and before == 1 + 20 - (count or 0)


def test_samples_one_by_one_go_on(tmp_path: Path) -> None:
    """A server without n that broke down between the samples of one prompt is asked for the others alone."""
    def say(body: dict[str, Any], number: int) -> Any:
        return Fault(400) if "n" in body or number in (3, 4) else f"{body['seed']}"
    with serving(say) as server:
        assert model_of(server, tmp_path).generate(questions(1), n=5, temperature=1.0) == [[FAILED] * 5]
        server.bodies.extend([{}] * 10)                 # no request has the number 3 or 4 any more
        before = len(server.bodies)
        [answers] = model_of(server, tmp_path).generate(questions(1), n=5, temperature=1.0)
    assert len({answer.text for answer in answers}) == 5 and len(server.bodies) == before + 3


@pytest.mark.parametrize("refused", [False, True])
def test_the_format_of_json_verdicts(refused: bool, tmp_path: Path) -> None:
    """Asked for where it is taken; where it is refused, this is found out once. No other verdict asks for it."""
    def say(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.01)
        return Fault(400) if refused and "response_format" in body else '{"score": 0.75}'
    with serving(say) as server:
        model = model_of(server, tmp_path)
        scores = score_candidates(lambda chats: ask_verifier(model, chats, "json", 16, 64), questions(8), [["a"]] * 8)
        assert [score.value for [score] in scores] == [0.75] * 8
        forms = [body["response_format"] for body in server.bodies if "response_format" in body]
        assert len(forms) == (1 if refused else 8) and forms[0]["json_schema"]["schema"]["required"] == ["score"]
        assert len(server.bodies) == (9 if refused else 8) and model.tokens == 8 * 12 and model.seconds > 0
        server.bodies.clear()
        model.verdicts(questions(2), "pairwise", 16)
        assert not any("response_format" in body for body in server.bodies)


def test_a_prompt_that_is_refused_says_nothing_of_the_format(tmp_path: Path) -> None:
    with serving(lambda body, number: Fault(400) if "question 0" in prompt_of(body) else "{}") as server:
        model = model_of(server, tmp_path, concurrency=1)
        assert model.verdicts(questions(3), "json", 16)[0] == FAILED
    assert [("response_format" in body) for body in server.bodies] == [True, False, True, True]


# ---- log-probabilities

def logprobs(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """choices[0].logprobs of a reply: its tokens, each with the probabilities of the likeliest ones in its place."""
    content = []
    for text, likely in tokens:
        top = [{"token": other, "logprob": math.log(share)} for other, share in likely.items()]
        content.append({"token": text, "logprob": 0.0, "top_logprobs": top})
    return {"content": content}


def with_logprobs(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    answer = completion("".join(text for text, _ in tokens))
    answer["choices"][0]["logprobs"] = logprobs(*tokens)
    return answer


BEGUN = ('{"', {}), ("score", {}), ('":', {})


def test_digits_are_those_of_the_last_score() -> None:
    first, second = find_digits(logprobs(
        *BEGUN, (" ", {}), ("1", {"1": 1.0}), ("} ", {}), *BEGUN, (" 0", {" 0": 0.5, "0": 0.2, "1": 0.2, "x": 0.1}),
        (".", {}), ("75", {"75": 0.6, "7": 0.1, "2": 0.3}), ("}", {}))["content"])
    assert first == pytest.approx([0.7, 0.2] + [0] * 8)
    assert second == pytest.approx([0, 0, 0.3, 0, 0, 0, 0, 0.7, 0, 0])
    assert find_digits(logprobs(("no", {}), (" score", {}))["content"]) == ([0.0] * 10, None)
    assert find_digits(logprobs(*BEGUN, ("0", {"0": 1.0}), ("}", {}))["content"])[1] is None


@pytest.mark.parametrize("continues", [True, False])
def test_expected_scores_are_those_of_a_local_verifier(continues: bool, tmp_path: Path) -> None:
    """A server that tells of its tokens what the shipped verifier thinks. Where that replies 1, the digit behind "0."
    is asked for with a reply that is begun; a server that does not continue it is told so in one sentence."""
    vlm = load_vlm(TINY / "verifier")
    chats = [item.chat() for item in load_task("bar", limit=2)]
    texts = [["1", "2"], ["3", "4"]]
    known: dict[str, Any] = {}

    def local(asked: list[Any]) -> Any:
        found = next_digits(vlm, asked, REPLIES)
        for one, digits in zip(asked, found, strict=True):
            known[prompt_of({"messages": one}) + one[-1]["content"][1]["image"].tobytes().hex()] = digits
        return found
    expected_scores(local, chats, texts)
    likely = list(known.values())
    likely[0][0][:2] = [0.3, 0.7]                       # one that replies 1, and 0 is not unlikely
    scores = expected_scores(lambda asked: likely, chats, texts)

    def say(body: dict[str, Any], number: int) -> Any:
        begun = body["messages"][-1]["role"] == "assistant"
        if begun and not continues:
            return with_logprobs(("Hello", {"Hello": 1.0}))
        [message] = body["messages"][:1]
        url = message["content"][1]["image_url"]["url"]
        pixels = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).tobytes().hex()
        first, second = known[prompt_of({"messages": [message]}) + pixels]
        shares = [{str(digit): share for digit, share in enumerate(digits) if share} for digits in (first, second)]
        if begun:
            assert body["max_tokens"] == 1 and body["messages"][-1]["content"] == REPLIES[1]
            return with_logprobs(("5", shares[1]))
        assert body["logprobs"] is True and body["top_logprobs"] == 20
        if first[1] > first[0]:
            return with_logprobs(*BEGUN, (" ", {}), ("1", shares[0]), (".", {}), ("0", {"0": 1.0}), ("}", {}))
        return with_logprobs(*BEGUN, (" ", {}), ("0", shares[0]), (".", {}), ("5", shares[1]), ("}", {}))
    with serving(say) as server:
        model = model_of(server, tmp_path)
        if continues:
            found = expected_scores(lambda asked: ask_verifier(model, asked, "logits", 16, 64), chats, texts)
            for row, others in zip(found, scores, strict=True):
                assert [score.value for score in row] == pytest.approx([score.value for score in others], abs=1e-6)
            assert any(body["messages"][-1]["role"] == "assistant" for body in server.bodies)
        else:
            with pytest.raises(ValueError, match="does not continue a reply that was begun, so the digits"):
                expected_scores(lambda asked: ask_verifier(model, asked, "logits", 16, 64), chats, texts)


@pytest.mark.parametrize("refused", [False, True])
def test_a_server_without_logprobs(refused: bool, tmp_path: Path) -> None:
    def say(body: dict[str, Any], number: int) -> Any:
        return Fault(400) if refused and "logprobs" in body else '{"score": 0.5}'
    with serving(say) as server, pytest.raises(ValueError, match="gives no log-probabilities .top_logprobs."):
        model_of(server, tmp_path).verdicts(questions(1), "logits", 16)


# ---- what the programs' parts do with it

def test_failures_of_all_ranks_count_together(tmp_path: Path) -> None:
    """Each rank sees its own; the run ends on all of them, with the same limit."""
    with serving(lambda body, number: Fault(400)) as server:
        model = model_of(server, tmp_path, expect=0, max_failed=0.1, concurrency=1)
        for gathered, ends in (([1, 1], False), ([1, 2], True)):
            model.planned = 0
            run = SimpleNamespace(ranks=SimpleNamespace(gather=lambda value, gathered=gathered: gathered))
            try:
                with counting_failures(run, model, 20):
                    model.verdicts(questions(1), "json", 16)
            except TooManyFailed:
                assert ends
            else:
                assert not ends


def test_prompts_are_counted_as_they_are_asked() -> None:
    texts = [["a", "b", "a", "c"], ["a", "a"]]
    assert count_prompts(texts, "json") == count_prompts(texts, "logits") == 4 and count_prompts(texts, "pairwise") == 6


def test_no_length_of_a_served_model_is_known() -> None:
    cfg: Any = SimpleNamespace(max_prompt_tokens=5)
    assert answer_uses("http://h/v1#n", cfg) == verifier_uses("http://h/v1#n", cfg, "json") == []


def test_a_served_model_is_the_same_elsewhere() -> None:
    check_same({"verifier": "http://h:1/v1#name"}, {"verifier": "https://other/v1#name"})
    check_same({"verifier": "http://h:1/v1"}, {"verifier": "https://other/v1#name"})       # start() compares the names
    for other in ("http://h:1/v1#another", "name", "#name2"):
        with pytest.raises(ValueError, match=re.escape(f"verifier is '{other}' and was 'http://h:1/v1#name'")):
            check_same({"verifier": "http://h:1/v1#name"}, {"verifier": other})


def test_the_log(tmp_path: Path) -> None:
    """Lines that are damaged or foreign are not believed; a failure counts until there is an answer."""
    log = AnswerLog(tmp_path / "a" / "rank-0.jsonl")
    assert log.get("one") is None
    log.add("one", {"text": "1"})
    log.add_failure("two", "why")
    log.add_failure("three", "why")
    path = tmp_path / "a" / "rank-0.jsonl"
    text = path.read_text()
    path.write_text(text + text.splitlines()[0].replace('"1"', '"2"').replace('"one"', '"four"') + "\n[1]\n{\n\xff")
    other = AnswerLog(tmp_path / "a" / "rank-1.jsonl", path)
    assert other.get("one") == {"text": "1"} and other.get("four") is None and other.count_failed() == 2
    other.add("two", 2)
    assert other.count_failed() == 1 and AnswerLog(path, tmp_path / "a" / "rank-1.jsonl").count_failed() == 1
    log.add("five", 5)                                  # behind a line that was cut
    assert AnswerLog(path).get("five") == 5
