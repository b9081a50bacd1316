"""One Docker Engine as a place for sandboxes: its image, its containers, what it can hold.

Everything here blocks, and raises `SandboxBroken` when the engine does not do as asked. The engine
may be anywhere: nothing is shared with it but the API.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from configs.errors import InputError
from sandbox import image
from sandbox.base import Limits, SandboxBroken
from sandbox.isolation import FLAGS, HOME_INSIDE, environment_inside, interpreter, runner_setup

DEFAULT_SOCKET = "/var/run/docker.sock"
LABEL, OWNER, POOL = "remend.sandbox", "remend.owner", "remend.pool"
KERNEL_THREADS = 128  # of a runtime that has a kernel of its own
RUNNER_MIB = 128  # for the runner itself, beside what it runs
MARGIN_MIB = 16  # what the workspace holds beyond its limit, so that this is seen to be broken
PER_CPU = 32  # sandboxes that share one: they wait for a policy most of the time
CALL_S = 20.0
BUILD_S = 900.0
STALE_S = 3600.0  # a container that never ran, of whomever


@dataclass(frozen=True)
class DockerHost:
    """One engine.

    url: unix:///PATH, tcp://HOST:PORT, or ssh://[USER@]HOST[:PORT][/SOCKET] (by the `ssh` command
      and its keys); "" takes DOCKER_HOST, or the usual socket.
    tls: for tcp, a folder with ca.pem, cert.pem and key.pem.
    slots: at most so many sandboxes; 0: as memory and CPUs allow.
    """

    url: str = ""
    tls: str = ""
    slots: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("unix", "tcp", "ssh") or not (parts.path or parts.hostname):
            raise ValueError(f"{self.address!r} is no unix://, tcp:// or ssh:// address")
        if parts.scheme == "tcp" and not parts.port:
            raise ValueError(f"{self.address!r} has no port")
        if self.slots < 0:
            raise ValueError(f"slots must not be negative, and is {self.slots}")
        if self.tls and parts.scheme != "tcp":
            raise ValueError(f"tls is for tcp:// addresses, and this is {self.address!r}")

    @property
    def address(self) -> str:
        return self.url or os.environ.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"


@dataclass(frozen=True)
class ContainerConfig:
    """How containers are made.

    image: "" builds one of this machine's parts; else the name of an image, or a folder with a
      Dockerfile, that has python3 (3.11 or later).
    runtime: an OCI runtime that the engines know, such as runsc; "" for theirs.
    cpus: of each sandbox.
    """

    image: str = ""
    runtime: str = ""
    cpus: float = 1.0


class Engine:
    """A connection to the engine of `host`. `pool` marks what it makes as ours."""

    def __init__(
        self, host: DockerHost, limits: Limits, container: ContainerConfig, pool: str
    ) -> None:
        self.host, self.limits, self.container, self.pool = host, limits, container, pool
        self.capacity = 0
        self.environment = ""  # hash of the image, once connected
        self._image = ""
        self._client: Any = None
        self._tunnel: Tunnel | None = None
        self._uids = random.sample(range(image.FIRST_UID, image.FIRST_UID + image.UIDS), image.UIDS)
        self._next = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.host.address

    # -- the engine

    def connect(self) -> None:
        """Reach the engine, have the image there, find out what fits. Again after a failure."""
        with self._lock, trouble(self.name):
            self.disconnect()
            docker = _docker()
            self._client = docker.DockerClient(self._base_url(), tls=self._tls(), timeout=CALL_S)
            facts = self._client.info()
            self._have_image()
            by_memory = facts["MemTotal"] * 9 // 10 // self._memory()
            fits = max(1, min(by_memory, facts["NCPU"] * PER_CPU, image.UIDS))
            self.capacity = min(self.host.slots, fits) if self.host.slots else fits
            self._cpus = min(self.container.cpus, facts["NCPU"])

    def disconnect(self) -> None:
        with contextlib.suppress(Exception):
            if self._client is not None:
                self._client.close()
        self._client = None
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None

    def ping(self) -> bool:
        """Whether the engine answers."""
        try:
            return bool(self._client is not None and self._client.ping())
        except Exception:
            return False

    def endpoint(self) -> tuple[str, int, ssl.SSLContext | None]:
        """Where to connect for a raw stream: (path, 0, None) or (host, port, TLS or None)."""
        parts = urlsplit(self.host.address)
        if self._tunnel is not None:
            return self._tunnel.path, 0, None
        if parts.scheme == "unix":
            return parts.path, 0, None
        context = None
        if self.host.tls:
            folder = Path(self.host.tls)
            context = ssl.create_default_context(cafile=folder / "ca.pem")
            context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        return str(parts.hostname), int(parts.port or 0), context

    def _base_url(self) -> str:
        parts = urlsplit(self.host.address)
        if parts.scheme != "ssh":
            return self.host.address
        self._tunnel = Tunnel(self.host.address)
        return f"unix://{self._tunnel.path}"

    def _tls(self) -> Any:
        if not self.host.tls:
            return False
        folder = Path(self.host.tls)
        missing = [n for n in ("ca.pem", "cert.pem", "key.pem") if not (folder / n).is_file()]
        if missing:
            raise InputError(f"sandbox.hosts: tls: no {missing[0]} in {folder}")
        pair = (str(folder / "cert.pem"), str(folder / "key.pem"))
        config = _docker().tls.TLSConfig(
            client_cert=pair, ca_cert=str(folder / "ca.pem"), verify=True
        )
        configure = config.configure_client

        def by_these_alone(client: Any) -> None:
            configure(client)
            client.trust_env = False  # or REQUESTS_CA_BUNDLE would take the place of ca.pem

        config.configure_client = by_these_alone
        return config

    # -- the image

    def _have_image(self) -> None:
        """Have the image on the engine: made there, or sent, unless it is there already."""
        if not self.container.image:
            root = image.machine_rootfs()
            self.environment = root.digest()
            self._image = f"remend/sandbox:{self.environment[:16]}"
            if not self._client.images.list(name=self._image):
                self._send(root)
            return
        base = self.container.image
        slow = _docker().DockerClient(self._base_url(), tls=self._tls(), timeout=BUILD_S)
        with contextlib.closing(slow):
            if os.path.isdir(base):
                built, _ = slow.images.build(path=base, rm=True, labels={LABEL: "base"})
                slow.images.get(built.id).tag(base := f"remend/base:{built.id.split(':')[1][:16]}")
            made, _ = slow.images.build(
                fileobj=image.context(base), custom_context=True, rm=True, labels={LABEL: "image"}
            )
        self._image = made.id
        self.environment = made.id.removeprefix("sha256:")

    @property
    def base(self) -> str:
        """What containers are made of, once connected."""
        return self._image

    def build(self, context: BinaryIO) -> str:
        """An image of a build context (a tar), as `docker build` makes it: its id."""
        with trouble(self.name):
            made, _ = self._client.images.build(
                fileobj=context, custom_context=True, rm=True, labels={LABEL: "image"}
            )
            return str(made.id)

    def _send(self, root: image.RootFS) -> None:
        repository, tag = self._image.split(":")
        with tempfile.TemporaryFile() as file:
            root.write(file)
            file.seek(0)
            # urllib3 would send it in chunks of 16 KiB; the size tells it otherwise
            self._client.api.timeout = BUILD_S
            self._client.api.import_image_from_data(
                file, repository=repository, tag=tag, changes=[f"LABEL {LABEL}=image"]
            )
            self._client.api.timeout = CALL_S

    # -- containers

    def create(self, command: Sequence[str] | None = None) -> str:
        """A new container, not started: its id. `command`: instead of the runner."""
        with trouble(self.name):
            api, limits = self._client.api, self.limits
            uid = self._uids[self._next % len(self._uids)]
            self._next += 1
            spare, memory = limits.memory_mib // 4, self._memory()
            own = f"uid={uid},gid={uid}"
            room = f"size={limits.memory_mib + MARGIN_MIB}m"
            config = api.create_host_config(
                network_mode="none",
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                read_only=True,
                tmpfs={
                    "/work": f"rw,exec,nosuid,nodev,{room},{own},mode=0755",
                    "/tmp": f"rw,exec,nosuid,nodev,size={spare}m,{own},mode=1777",
                },
                shm_size=MARGIN_MIB << 20,
                mem_limit=memory,
                memswap_limit=memory,
                nano_cpus=int(self._cpus * 1e9),
                pids_limit=self._pids(),
                oom_score_adj=500,
                ipc_mode="private",
                auto_remove=True,
                # what it writes is our channel, and no log
                log_config=_docker().types.LogConfig(type="none"),
                runtime=self.container.runtime or None,
            )
            python = "python3" if self.container.image else interpreter()
            made = api.create_container(
                self._image,
                list(command or [python, *FLAGS, f"{HOME_INSIDE}/runner.py"]),
                entrypoint=[],
                user=f"{uid}:{uid}",
                hostname="sandbox",
                working_dir="/work",
                stdin_open=True,  # and closed with us: then the runner ends, and its container
                # what it runs gets the path too, itself it finds its parts without
                environment={**self.setup()["environment"], "PYTHONPATH": ""},
                host_config=config,
                labels={LABEL: "container", OWNER: owner(), POOL: self.pool},
            )
            return str(made["Id"])

    def _memory(self) -> int:
        """Bytes of a container: all its file systems full, memory is left for the runner."""
        return (self.limits.memory_mib * 5 // 4 + RUNNER_MIB) << 20

    def _pids(self) -> int:
        """What the cgroup lets there be: processes and threads, the runner's with them. A runtime
        with a kernel of its own, such as runsc, has threads for that, and two for each of ours."""
        ours = self.limits.processes + 8
        return 2 * ours + KERNEL_THREADS if self.container.runtime else ours

    def start(self, container: str) -> None:
        with trouble(self.name):
            self._client.api.start(container)

    def exec(self, container: str, command: Sequence[str], stdin: bytes = b"") -> None:
        """Run a command in a container as `docker exec` does, whatever comes of it."""
        with trouble(self.name):
            api = self._client.api
            made = api.exec_create(container, list(command), stdin=bool(stdin), workdir="/work")
            if not stdin:
                api.exec_start(made["Id"])
                return
            stream = api.exec_start(made["Id"], socket=True)
            raw = getattr(stream, "_sock", stream)
            raw.sendall(stdin)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
            stream.close()

    def setup(self) -> dict[str, Any]:
        """The runner's first message."""
        environment = environment_inside("/tmp/home", "/tmp", HOME_INSIDE)
        if self.container.image:
            environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"
        return runner_setup(self.limits, None, environment) | {
            "workspace": "/work",
            "temporary": ["/tmp", "/dev/shm"],
            "library": HOME_INSIDE,
            "enter_namespaces": False,
            "reads_all": False,
            "own_network": True,
        }

    def out_of_memory(self, container: str) -> bool:
        """Whether the kernel killed the container's first process for its memory."""
        try:
            return bool(self._client.api.inspect_container(container)["State"]["OOMKilled"])
        except Exception:
            return False  # gone already

    def remove(self, container: str) -> None:
        """Kill a container and remove it, if it is there; returns when it is gone."""
        docker = _docker()
        with trouble(self.name):
            for _ in range(100):
                try:
                    self._client.api.remove_container(container, force=True, v=True)
                except docker.errors.NotFound:
                    return
                except docker.errors.APIError as error:
                    if error.status_code != 409:  # its removal is under way
                        raise
                time.sleep(0.05)
            raise SandboxBroken(f"{self.name}: container {container[:12]} does not go away")

    def sweep(self, keep: Callable[[], set[str]]) -> list[str]:
        """Remove what nobody will ever ask for again: containers of processes of this machine that
        have died, and those of our own pool that are not in `keep`."""
        with trouble(self.name):
            found = self._client.api.containers(all=True, filters={"label": f"{LABEL}=container"})
            wanted = keep()
            orphans = [
                entry["Id"]
                for entry in found
                if (
                    entry["Id"] not in wanted
                    if entry["Labels"].get(POOL) == self.pool
                    else is_dead(entry["Labels"].get(OWNER, ""))
                    or (entry["State"] != "running" and time.time() - entry["Created"] > STALE_S)
                )
            ]
        for container in orphans:
            self.remove(container)
        return orphans


class Tunnel:
    """A local socket that leads to an engine's by `ssh`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if shutil.which("ssh") is None:
            raise InputError(f"{url}: the ssh command is not installed")
        self._folder = tempfile.mkdtemp(prefix="remend-ssh-")
        self.path = f"{self._folder}/docker.sock"
        host = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
        command = ["ssh", "-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
        command += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        command += ["-p", str(parts.port)] if parts.port else []
        command += ["-L", f"{self.path}:{parts.path or DEFAULT_SOCKET}", "--", host]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        until = time.monotonic() + CALL_S
        while not os.path.exists(self.path):
            if self._process.poll() is not None or time.monotonic() > until:
                assert self._process.stderr is not None
                self._process.kill()
                said = self._process.stderr.read().decode(errors="replace").strip()
                self.close()
                raise SandboxBroken(f"{url}: ssh: {said[-300:] or 'no connection'}")
            time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def trouble(name: str) -> Iterator[None]:
    """Whatever the engine, or the way there, does wrong, as SandboxBroken."""
    docker = _docker()
    import requests
    import urllib3

    try:
        yield
    except AttributeError as error:  # disconnected meanwhile
        raise SandboxBroken(f"{name}: not connected ({error})") from None
    except (
        docker.errors.DockerException,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        OSError,
    ) as error:
        raise SandboxBroken(f"{name}: {str(error)[:300]}") from None


def owner() -> str:
    """This process, as told apart from any other of this machine's past and future."""
    return f"{_boot()} {os.getpid()} {_started(os.getpid())}"


def is_dead(name: str) -> bool:
    """Whether `owner()` of a process that ran on this machine, and runs no more."""
    boot, _, rest = name.partition(" ")
    pid, _, started = rest.partition(" ")
    return boot == _boot() and pid.isdigit() and _started(int(pid)) != started


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _docker() -> Any:
    import docker
    import docker.errors
    import docker.tls
    import docker.types

    return docker
