"""Flags and lifetime of a verb that runs on several hosts at once, one process on each.

    remend sft CONFIG --out RUN --coordinator HOST0:PORT --hosts N --host I

RUN is a folder that all hosts see. They begin together and end together: where one fails, the
others stop with its reason; where one is gone, with the fact.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import InputError, Preempted

START_S = 300  # between the first host's start and the last one's


@dataclass(frozen=True)
class HostSpec:
    """`coordinator`: address of host 0 that the others reach, HOST:PORT; "" where JAX finds it,
    the hosts and this host's number by itself, as it does on a TPU pod or under Slurm."""

    coordinator: str = ""
    count: int = 0
    index: int = 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--coordinator`, `--hosts` and `--host`."""
    group = parser.add_argument_group("several hosts, each running this command")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on host 0")
    group.add_argument("--hosts", metavar="N", help="how many; auto: as the TPU pod or Slurm says")
    group.add_argument("--host", metavar="I", help="which one this is, from 0")


def spec(args: argparse.Namespace) -> HostSpec | None:
    """The flags' meaning; None without them. Raises InputError for a part of them, or nonsense."""
    given = args.coordinator, args.hosts, args.host
    if given == (None, None, None):
        return None
    if given == (None, "auto", None):
        return HostSpec()
    if given in ((None, "1", None), (None, "1", "0")):
        return HostSpec(count=1)
    if None in given or args.hosts == "auto":
        raise InputError("give all of --coordinator, --hosts and --host, or --hosts auto alone")
    name, _, port = args.coordinator.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator must be HOST:PORT, got {args.coordinator}")
    if not args.hosts.isdecimal() or int(args.hosts) < 1:
        raise InputError(f"--hosts must be a positive number or auto, got {args.hosts}")
    if not args.host.isdecimal() or int(args.host) >= int(args.hosts):
        last = int(args.hosts) - 1
        raise InputError(f"--host must be 0 to {last}, got {args.host}")
    return HostSpec(args.coordinator, int(args.hosts), int(args.host))


def together(hosts: HostSpec, work: Callable[[], int]) -> int:
    """Run `work` on this host, as one of `hosts`; its exit code.

    Does not return, but ends the process, where this or another host fails: what JAX does at a
    normal exit would wait for hosts that never come.
    """
    from model.hosts import barrier, host_count, host_index, store
    from model.preempt import NOTICE, listen
    from model.watch import LOST, Watch, catch_abort, on_abort
    from tools.cli import explain

    if hosts.count == 1:
        listen()
        return work()
    _keep_stdout()
    on_abort(f"the hosts have not all come within {START_S} s: start one on each", LOST)
    _start(hosts)
    catch_abort(host_index())
    listen()
    watch = Watch(store(), host_index(), host_count(), NOTICE)
    watch.start()
    try:
        try:
            code = work()
        except Preempted as stopped:  # on all hosts, at the same place
            code = explain(stopped) or 0
        barrier("the end")
    except BaseException as error:
        if _from_jax(error):
            watch.await_verdict()
        known = explain(error)
        if known is None:
            traceback.print_exc()
        watch.fail(_reason(error), 1 if known is None else known)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if known is None else known)
    watch.close()
    import jax

    jax.distributed.shutdown()
    return code


def _start(hosts: HostSpec) -> None:
    import jax

    from model.watch import JAX_LOST_S

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not hosts.coordinator:
        try:
            jax.distributed.initialize(
                initialization_timeout=START_S, heartbeat_timeout_seconds=JAX_LOST_S
            )
        except ValueError as error:
            raise InputError(f"--hosts auto: JAX found no cluster here: {error}") from None
        return
    if hosts.index == 0:
        _check_port(int(hosts.coordinator.rpartition(":")[2]))
    jax.distributed.initialize(
        hosts.coordinator,
        hosts.count,
        hosts.index,
        cluster_detection_method="deactivate",
        initialization_timeout=START_S,
        heartbeat_timeout_seconds=JAX_LOST_S,
    )


def _check_port(port: int) -> None:
    """Refuse a port that is taken: JAX crashes on it."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(f"--coordinator: port {port} on this host: {reason}") from None


def _keep_stdout() -> None:
    """Send what libraries print on file descriptor 1 to stderr: Gloo greets there, and stdout is
    the verb's."""
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w")


def _from_jax(error: BaseException) -> bool:
    """Whether it began in JAX: a broken collective is what a host sees of another one's end."""
    import jax

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in causes)


def _reason(error: BaseException) -> str:
    """One line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
