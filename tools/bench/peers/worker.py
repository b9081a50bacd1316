"""The inside of a worker of `remend bench model`, a process that measures one thing of one peer.

A worker runs under its peer's own interpreter, so this folder imports nothing of remend and nothing
but NumPy beside the peer. A peer's script, `with_NAME.py`, has one function a measure. It takes the
`Job`, loads the checkpoint, and returns a function without arguments that does the work once and
returns its result on the host:

    train     one AdamW update on `Job.batch()`; the loss before it
    logprobs  log-probability of every token but the first; float [rows, tokens - 1]
    sample    `Job.new` greedy tokens behind each of `Job.prompts()`; int [slots, new]

`serve` is the loop around them: a JSON line when ready, then one for every line that it reads.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]  # does the work once; its result as an array or a number


@dataclass(frozen=True)
class Job:
    """What a worker is told: the JSON object in its first argument.

    checkpoint: Hugging Face folder, in float32. inputs: .npz of `batch` and `prompts`.
    slots, prompt, new: prompts sampled from at a time, tokens in each, tokens behind each.
    device: "cpu" or "gpu". answers: file descriptor to write answers to, because libraries print.
    """

    measure: str
    checkpoint: str
    inputs: str
    rows: int
    tokens: int
    slots: int
    prompt: int
    new: int
    learning_rate: float
    weight_decay: float
    threads: int
    device: str
    answers: int

    def batch(self) -> np.ndarray:
        """Token ids to train on and to score, int32 [rows, tokens]."""
        return np.load(self.inputs)["batch"]

    def prompts(self) -> np.ndarray:
        """Token ids to sample behind, int32 [slots, prompt]."""
        return np.load(self.inputs)["prompts"]

    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return json.loads((Path(self.checkpoint) / "config.json").read_text())

    def tensors(self) -> dict[str, np.ndarray]:
        """The checkpoint's arrays by transformers' names, float32."""
        raw = (Path(self.checkpoint) / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(raw, "<f4", (end - begin) // 4, start + begin)
            arrays[name] = flat.reshape(entry["shape"])
        return arrays


def serve(measures: Mapping[str, Callable[[Job], Run]], packages: Sequence[str]) -> None:
    """Prepare the measure that the job names, then run it once for every line on stdin.

    packages: distributions whose versions the first answer names.
    """
    job = Job(**json.loads(sys.argv[1]))
    with os.fdopen(job.answers, "w", buffering=1) as answers:

        def answer(**fields: Any) -> None:
            answers.write(json.dumps(fields) + "\n")

        run = measures[job.measure](job)
        answer(versions={name: importlib.metadata.version(name) for name in packages})
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            result = run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            answer(
                seconds=wall,
                cpu_seconds=cpu,
                peak_mib=peak_mib(),
                result=np.asarray(result).tolist(),
            )
    os._exit(0)  # threads of some libraries outlive the interpreter's wish to end


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB.

    From /proc, since getrusage's number starts at what the parent had when it forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")
