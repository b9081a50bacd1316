"""The kinds of sandbox there are, and a pool of any of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from sandbox.base import Limits, SandboxPool
from sandbox.docker import ContainerConfig, DockerHost
from sandbox.local import BACKENDS as LOCAL_BACKENDS
from sandbox.local import LocalPool
from sandbox.memo import TestMemo
from sandbox.pool import DockerPool

BACKENDS = (*LOCAL_BACKENDS, "docker")


def make_pool(
    backend: str,
    size: int,
    limits: Limits | None = None,
    hosts: Sequence[DockerHost] = (),
    container: ContainerConfig | None = None,
    memo: TestMemo | None = None,
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    shell: bool = False,
) -> SandboxPool:
    """A pool of `size` sandboxes; `hosts` and `container` are for "docker" alone. `shell`: agents
    will have one inside."""
    if backend == "docker":
        return DockerPool(hosts, size, limits, container, memo, warn)
    return LocalPool(size, limits, backend, memo, warn, shell)
