"""A server that speaks the chat-completions contract over real HTTP, and can be broken.

It is as strict about requests as the strictest servers: every tool call is answered at once, by its
id, and nothing else is. What it says is decided from the messages alone.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, Any]]


def call(name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    """A tool call as an endpoint gives it."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": text}}


def say(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls) or None}


class ChatServer:
    """See the module's docstring.

    Attributes:
      faults: what becomes of the next requests, once each: "429", "500", "cut", "hang", "garbage",
        "empty", "drip", "huge", or ("status", 401, "text").
      requests: (time, body) of all that were well-formed; broken: what was wrong with others.
      tools: names of those that every request must offer.
      paid: (prompt, completion) tokens of every whole answer that was sent.
    """

    def __init__(self, act: Callable[[Messages], dict[str, Any]], key: str = "") -> None:
        self.faults: deque[Any] = deque()
        self.requests: list[tuple[float, dict[str, Any]]] = []
        self.broken: list[str] = []
        self.paid: list[tuple[int, int]] = []
        self.finish_reason, self.delay = "tool_calls", 0.0
        self.tools = ["view", "search", "edit", "run_tests", "submit"]
        self._act, self._key, self._lock = act, key, threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with contextlib.suppress(ConnectionError):
                    server._post(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        wrong = _wrong(body, self.tools)
        if self._key and handler.headers["authorization"] != f"Bearer {self._key}":
            wrong = f"wrong key {handler.headers['authorization']}"
        with self._lock:
            (self.broken.append(wrong) if wrong else self.requests.append((time.time(), body)))
            fault = self.faults.popleft() if self.faults else None
        if wrong or handler.path != "/v1/chat/completions":
            return _send(handler, 400, wrong.encode())
        time.sleep(self.delay)
        if isinstance(fault, tuple):
            return _send(handler, fault[1], fault[2].encode())
        if fault == "429":
            return _send(handler, 429, b"slow down", {"retry-after": "0.4"})
        if fault == "500":
            return _send(handler, 500, b"oops")
        if fault == "hang":
            self._closing.wait(20)
            return None
        usage = {"prompt_tokens": len(json.dumps(body)) // 4, "completion_tokens": 20}
        choice = {
            "index": 0,
            "finish_reason": self.finish_reason,
            "message": self._act(body["messages"]),
        }
        answer = json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage})
        data = answer.encode()
        if fault == "garbage":
            return _send(handler, 200, b"<html>busy</html>")
        if fault == "empty":
            return _send(handler, 200, b'{"choices": []}')
        if fault == "huge":
            return _send(handler, 200, b" " * (9 << 20))
        if fault in ("cut", "drip"):
            handler.send_response(200)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            for at in range(len(data) // 2):
                handler.wfile.write(data[at : at + 1])
                if fault == "drip" and self._closing.wait(0.05):
                    break
            handler.close_connection = True
            return None
        with self._lock:
            self.paid.append((usage["prompt_tokens"], usage["completion_tokens"]))
        return _send(handler, 200, data)


def _send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _wrong(body: dict[str, Any], tools: list[str]) -> str:
    """What a strict server would refuse a request for; "" if nothing."""
    if not body.get("model") or body.get("max_tokens", 0) <= 0 or "temperature" not in body:
        return "model, max_tokens and temperature are needed"
    names = [tool["function"]["name"] for tool in body["tools"]]
    if names != tools:
        return f"tools {names}"
    roles = [message["role"] for message in body["messages"]]
    if roles[:2] != ["system", "user"] or roles[-1] not in ("user", "tool"):
        return f"roles {roles}"
    open_ids: list[str] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            if not open_ids or message["tool_call_id"] != open_ids.pop(0):
                return "a tool message that answers no call"
        elif open_ids:
            return f"calls {open_ids} are not answered"
        if not isinstance(message["content"], str):
            return "content is no text"
        for made in message.get("tool_calls", []):
            if not isinstance(json.loads(made["function"]["arguments"]), dict):
                return "arguments are no object"
            open_ids.append(made["id"])
    if len(set(ids := [m["tool_call_id"] for m in body["messages"] if "tool_call_id" in m])) < len(
        ids
    ):
        return "ids are not unique"
    return f"calls {open_ids} are not answered" if open_ids else ""
