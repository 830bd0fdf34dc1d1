"""An OpenAI-compatible server in this process that answers by a rule and fails on demand."""
from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "a/served-model"


@dataclass(frozen=True)
class Fault:
    """An answer that goes wrong: a status with headers, a body that is no chat completion, or one that is cut short."""
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0                                        # bytes that are promised and do not come
    wait: float = 0.0                                   # seconds before anything comes


class FakeServer:
    """`say(body, number)` answers request `number` to /v1/chat/completions, from 0: a text, texts (one a choice), a
    whole answer, or a Fault. All that came is in `bodies` and `headers`."""

    def __init__(self, say: Callable[[dict[str, Any], int], Any]):
        self.say = say
        self.models = [MODEL]
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0                                # requests under way
        self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.headers.append(dict(self.headers))
                listed = {"data": [{"id": name} for name in server.models]}
                self.answer(Fault(200 if self.path == "/v1/models" else 404, json.dumps(listed).encode()))

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    said = server.say(body, number)
                finally:
                    with server.lock:
                        server.at_once -= 1
                self.answer(said if isinstance(said, Fault) else Fault(200, json.dumps(completion(said)).encode()))

            def answer(self, fault: Fault) -> None:
                time.sleep(fault.wait)
                self.send_response(fault.status)
                for name, value in fault.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(fault.body) + fault.cut))
                self.end_headers()
                self.wfile.write(fault.body)

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                """A client that did not wait for the answer."""
        self.http = Quiet(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def model(self) -> str:
        """The address of its model."""
        return f"{self.url}#{MODEL}"


def completion(said: Any) -> dict[str, Any]:
    """A chat completion of a text, or of texts; a dict is one already."""
    if isinstance(said, dict):
        return said
    texts = [said] if isinstance(said, str) else said
    choices = [{"index": k, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
               for k, text in enumerate(texts)]
    return {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 2 * len(choices)}}


def prompt_of(body: dict[str, Any]) -> str:
    """The texts of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def serving(say: Callable[[dict[str, Any], int], Any]) -> Iterator[FakeServer]:
    """A server that runs inside the block."""
    server = FakeServer(say)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
