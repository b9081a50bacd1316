"""From a run's config to its fleet of servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import InputError
from model.config import Qwen3Config
from rl.engines import Engine, SGLang, SGLangJax, Update
from rl.fleet import Fleet, Patience
from rl.launch import (
    Chip,
    Kind,
    Launch,
    Launcher,
    LocalProcess,
    RestartCommand,
    free_port,
    interpreter,
)
from rl.replica import Replica
from rl.sglang import Sampling, SGLangServer

_DRAIN_S = 120.0


@dataclass(frozen=True)
class SGLangConfig:
    """Servers of SGLang or sglang-jax.

    Attributes:
      urls: of the servers; empty: `replicas` of them are started here, and end with the run.
      router: URL of a router in front of `urls`, which turns are then sent to. Weights are
        published to the servers themselves, for no router passes that on.
      python: interpreter of the environment with the server, for those started here.
      chip, flags: what they are started for, and further flags of theirs.
      restart: command that restarts one of `urls` with a snapshot (sglang-jax); {url}, {snapshot}
        and {label} are replaced in its words.
      update: what becomes of turns that are under way when new weights come: drain, retract, or
        in_place (``rl/engines.py``).
      snapshot_dtype: bfloat16 halves the bytes that servers read; null keeps the learner's bits.
      snapshot_gib: most that all snapshots may hold; 0 for no limit. A run in turn has three for a
        moment, one that runs ahead four; with less room older ones go sooner, and a server that
        comes back then has to wait for the next.
      tolerance: mean difference, in nats, between log-probabilities of server and learner on the
        probe of each snapshot, above which a server is not used. 1e-3 is for float32; bfloat16
        wants about 0.05.
      request_s: for one turn. start_s: until some server serves, its start included.
    """

    urls: tuple[str, ...] = ()
    router: str = ""
    python: str = ""
    replicas: int = 1
    chip: Chip = "cpu"
    flags: tuple[str, ...] = ()
    restart: str = ""
    update: Update = "drain"
    snapshot_dtype: Literal["bfloat16"] | None = None
    snapshot_gib: float = 0.0
    tolerance: float = 1e-3
    request_s: float = 300.0
    start_s: float = 900.0


def check_serving(kind: Kind, config: SGLangConfig) -> None:
    """Raises InputError for what does not go together, before anything is started."""
    if config.router and not config.urls:
        raise InputError("server.sglang.router: give the urls of the servers behind it as well")
    if kind == "sglang-jax" and config.urls and not config.restart:
        raise InputError(
            "server.kind sglang-jax takes new weights by a restart only: set server.sglang.restart "
            "to the command that restarts one of server.sglang.urls"
        )
    if kind == "sglang-jax" and config.router:
        raise InputError(
            "server.sglang.router: sglang-jax does not say which weights it has, so that answers "
            "through a router cannot be told apart: give its urls alone"
        )
    if not config.urls:
        if config.replicas < 1:
            raise InputError("server.sglang.replicas must be at least 1")
        interpreter(config.python, kind)


def open_server(
    kind: Kind,
    config: SGLangConfig,
    model: Qwen3Config,
    name: str,
    *,
    stop_ids: tuple[int, ...],
    temperature: float,
    lag: int,
    slots: int,
    max_tokens: int,
    logs: Path,
    say: Callable[[str], None],
) -> SGLangServer:
    """A policy server over the fleet that `config` describes; nothing is started before the first
    snapshot is published.

    Args:
      slots, max_tokens: episodes at one time, and tokens of each: what the servers make room for.
      logs: folder for the output of servers started here.
    """
    import httpx2

    check_serving(kind, config)
    engine: Engine
    if kind == "sglang":
        engine = SGLang(config.update, _DRAIN_S, config.start_s)
    else:
        engine = SGLangJax(_DRAIN_S)
    # no limit on connections: the pool of sandboxes is the limit; no proxy between us and loopback
    http = httpx2.AsyncClient(
        timeout=None,
        trust_env=False,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
    )
    places: list[tuple[str, Launcher | None]] = [
        (url, RestartCommand(config.restart, url) if config.restart else None)
        for url in config.urls
    ]
    if not config.urls:
        for number in range(config.replicas):
            launch = Launch(
                kind,
                config.chip,
                interpreter(config.python, kind),
                snapshot=Path(),  # that of the first publication
                label="",
                port=free_port(),
                dtype=model.dtype,
                requests=slots,
                tokens=slots * max_tokens if config.chip == "cpu" else 0,
                flags=config.flags,
            )
            url = f"http://127.0.0.1:{launch.port}"
            places.append((url, LocalProcess(launch, logs / f"server-{number}.log")))
    replicas = [Replica(url, http, launcher) for url, launcher in places]
    patience = Patience(start_s=config.start_s, tolerance=config.tolerance)
    fleet = Fleet(replicas, engine, model, patience, say)
    sampling = Sampling(
        stop_ids, temperature, lag=lag, request_s=config.request_s, router=config.router
    )
    return SGLangServer(name, fleet, http, model.vocab_size, sampling)
