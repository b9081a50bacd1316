"""A server with SGLang's HTTP contract and habits, over a real tiny network, that can be broken.

Speaks real HTTP on a loopback port from threads of its own. Like SGLang it loads whatever a folder
holds and calls that a success, dies of a token id outside its vocabulary, and answers an aborted
request with 200 and what it had.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from model.config import Qwen3Config
from model.hf_names import tensors
from model.qwen3 import bind, init

LENGTH = 64  # what is computed is padded to multiples


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Qwen3Config, params: Any, ids: jax.Array) -> jax.Array:
    model = bind(config, params)
    hidden, _ = model(ids[None], jnp.arange(len(ids))[None])
    return hidden[0] @ model.head()


def all_logprobs(
    config: Qwen3Config, params: Any, ids: list[int], temperature: float
) -> np.ndarray:
    """Of every vocabulary entry behind each prefix, [len(ids), V]."""
    padded = jnp.array(ids + [0] * (-len(ids) % LENGTH))
    logits = np.asarray(_logits(config, params, padded))[: len(ids)].astype(np.float64)
    logits /= temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class FakeSGLang:
    """See the module's docstring.

    Attributes:
      faults: what becomes of the next answers of `/generate` that sample: "500", "cut", "hang",
        "abort", "stale", "nan", "alien" or "short"; once each, then it is well again.
      lie: say that weights were updated, and spoil them.
      versions: False for a server that knows no weight versions and no updates (sglang-jax).
    """

    def __init__(self, config: Qwen3Config, *, versions: bool = True, token_s: float = 0.0) -> None:
        self.config, self.versions, self.token_s = config, versions, token_s
        self.faults: deque[str] = deque()
        self.lie = False
        self.label, self.folder = "default", ""
        self.params: Any = None
        self.prompts: list[list[int]] = []
        self.aborted: set[str] = set()
        self.updates: list[str] = []
        self.running = 0
        self._going = threading.Event()
        self._going.set()
        self._weights = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._sockets: set[socket.socket] = set()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, folder: Path, label: str) -> FakeSGLang:
        """Come up with a snapshot, as a process that was just started."""
        self._load(folder)
        self.label, self.folder = label, str(folder)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                fake._sockets.add(self.connection)

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.answer(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with contextlib.suppress(OSError):
                    fake.answer(self, json.loads(body))

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def kill(self) -> None:
        """As SIGKILL: connections break, the port is closed, what it held is lost."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    @property
    def up(self) -> bool:
        return self._server is not None

    def answer(self, handler: Any, body: dict[str, Any]) -> None:
        path = handler.path
        if path in ("/model_info", "/get_model_info"):
            info = {"model_path": self.folder, "weight_version": self.label}
            self._send(handler, info if self.versions else {"model_path": self.folder})
        elif path == "/generate" and isinstance(body["input_ids"][0], list):
            self._send(handler, [self._score(row) for row in body["input_ids"]])
        elif path == "/generate":
            self._generate(handler, body)
        elif path == "/abort_request":
            self.aborted.add(body.get("rid", "all"))
            self._send(handler, None)
        elif not self.versions:
            self._send(handler, {"detail": "Not Found"}, 404)
        elif path == "/update_weights_from_disk":
            self.updates.append(body["weight_version"])
            with self._weights:
                self._load(Path(body["model_path"]))
                self.label = body["weight_version"]
            self._send(handler, {"success": True, "message": "Succeeded to update model weights."})
        elif path == "/update_weight_version":
            self.label = body["new_version"]
            self._send(handler, {"success": True})
        elif path == "/pause_generation":
            self._going.clear()
            self._send(handler, {"status": "ok"})
        elif path == "/continue_generation":
            self._going.set()
            self._send(handler, {"status": "ok"})
        else:
            self._send(handler, {"detail": "Not Found"}, 404)

    def _load(self, folder: Path) -> None:
        """Whatever is there; a tensor that is missing or does not fit leaves noise."""
        stored = load_file(folder / "model.safetensors")
        params: Any = jax.tree.map(lambda leaf: np.array(leaf), init(self.config, 99))
        for tensor in tensors(self.config):
            leaf = params
            for key in tensor.path:
                leaf = leaf[key]
            found = stored.get(tensor.name)
            if found is None or found.shape != tensor.shape or self.lie:
                found = np.random.default_rng(0).normal(0, 0.5, tensor.shape)
            leaf[tensor.at] = found.T if tensor.transposed else found
        self.params = params

    def _score(self, ids: list[int]) -> dict[str, Any]:
        table = all_logprobs(self.config, self.params, ids, 1.0)
        of_ids = [[None, ids[0], None]]
        of_ids += [[float(table[i - 1, t]), t, None] for i, t in enumerate(ids) if i]
        return {"output_ids": [0], "meta_info": {"input_token_logprobs": of_ids}}

    def _generate(self, handler: Any, body: dict[str, Any]) -> None:
        prompt, sampling, rid = body["input_ids"], body["sampling_params"], body["rid"]
        if max(prompt) >= self.config.vocab_size:
            self.kill()
            return
        self.prompts.append(prompt)
        fault = self.faults.popleft() if self.faults else ""
        if fault == "500":
            self._send(handler, {"error": "internal"}, 500)
            return
        if fault == "hang":
            time.sleep(30)
            return
        self.running += 1
        try:
            meta = self._sample(prompt, sampling, rid)
        finally:
            self.running -= 1
        entries = meta["output_token_logprobs"]
        if fault == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "Abort"}
        if fault == "stale":
            meta["weight_versions"] = [{"version": "default", "start": 0, "end": len(entries)}]
        if fault == "nan":
            entries[-1][0] = None
        if fault == "alien":
            entries[-1][1] = self.config.vocab_size
        if fault == "short":
            entries.pop()
        data = {"text": "", "output_ids": [e[1] for e in entries], "meta_info": meta}
        self._send(handler, data, cut=fault == "cut")

    def _sample(self, prompt: list[int], sampling: dict[str, Any], rid: str) -> dict[str, Any]:
        ids, entries, spans = list(prompt), [], []  # type: ignore[var-annotated]
        draw = np.random.default_rng(sampling["sampling_seed"])
        finish: dict[str, Any] = {"type": "length", "length": sampling["max_new_tokens"]}
        for number in range(sampling["max_new_tokens"]):
            time.sleep(self.token_s)
            self._going.wait()
            with self._weights:
                label = self.label
                logprobs = all_logprobs(self.config, self.params, ids, sampling["temperature"])[-1]
            token = int(draw.choice(len(logprobs), p=np.exp(logprobs)))
            ids.append(token)
            entries.append([float(logprobs[token]), token, None])
            if spans and spans[-1]["version"] == label:
                spans[-1]["end"] = number + 1
            else:
                spans.append({"version": label, "start": number, "end": number + 1})
            if rid in self.aborted or "all" in self.aborted:
                self.aborted.discard("all")
                finish = {"type": "abort"}
                break
            if token in sampling["stop_token_ids"]:
                finish = {"type": "stop", "matched": token}
                break
        meta = {
            "finish_reason": finish,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(entries),
            "cached_tokens": 0,
            "output_token_logprobs": entries,
        }
        if self.versions:
            meta |= {"weight_version": self.label, "weight_versions": spans}
        return meta

    def _send(self, handler: Any, data: Any, status: int = 200, *, cut: bool = False) -> None:
        text = b"" if data is None else json.dumps(data).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text[: len(text) // 2] if cut else text)
        if cut:
            handler.close_connection = True
