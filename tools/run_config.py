"""The config of a run, and what of it cannot work together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from configs.errors import InputError
from model.lora import Lora
from model.sharding import MeshConfig
from rl.agent import AgentConfig
from rl.learning import RLConfig
from rl.reward import RewardConfig
from rl.serving import SGLangConfig, check_serving
from sandbox.base import Limits
from sandbox.docker import ContainerConfig, DockerHost
from sandbox.environments import Environment, Hide, Setting
from sft.endpoint import EndpointConfig, check_endpoint
from sft.filters import FilterConfig
from sft.tracking import TrackingConfig
from sft.train import SFTConfig

POLICIES = Path(__file__).resolve().parent.parent / "model" / "policies"
SHIPPED = {"shipped": "tiny", "shipped-small": "small"}  # what a config calls them: folder


@dataclass(frozen=True)
class TaskConfig:
    """`index`: "shipped", or a folder of Harbor tasks. Limits of 0 take every task. `packages`:
    only tasks of these; none named: of all."""

    index: str = "shipped"
    packages: tuple[str, ...] = ()
    train: int = 0
    heldout: int = 0


@dataclass(frozen=True)
class SandboxConfig:
    """Where repairs happen.

    slots: sandboxes that run at one time, and so episodes, for each holds one until its end.
    remember: give the report of an earlier test run when the very same tree is tested again.
    backend: auto, bwrap or plain on this machine; docker on `hosts` (none: this machine's engine).
    container: how Docker makes them.
    shell_without_isolation: let the policy of environment=full have its shell in the plain backend
      too, which hides no file of this machine from it.
    """

    slots: int = 4
    remember: bool = True
    backend: Literal["auto", "bwrap", "plain", "docker"] = "auto"
    hosts: tuple[DockerHost, ...] = ()
    container: ContainerConfig = field(default_factory=ContainerConfig)
    limits: Limits = field(default_factory=Limits)
    shell_without_isolation: bool = False


@dataclass(frozen=True)
class ServerConfig:
    """What samples in rollouts. `kind`: "inprocess", this process's own engine (evaluations always
    use it), or servers of "sglang" or "sglang-jax".

    `slots`: episodes that hold a KV cache at one time. A decode step of the own engine computes all
    of them: more than there are sandboxes stay empty, and cost as much.
    """

    kind: Literal["inprocess", "sglang", "sglang-jax"] = "inprocess"
    slots: int = 4
    prefill_chunk: int = 64
    prefill_rows: int = 8
    sglang: SGLangConfig = field(default_factory=SGLangConfig)


@dataclass(frozen=True)
class TeachConfig:
    """Attributes:
    tries: the teacher's episodes per training task.
    teacher: the search that comes with the project; an OpenAI-compatible `endpoint`; or nobody, the
      episodes are those of a `dataset`, the folder that `remend teach --dataset` wrote.
    keep: which verified episodes SFT learns from.
    """

    tries: int = 2
    teacher: Literal["search", "endpoint", "dataset"] = "search"
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    dataset: str = ""
    keep: FilterConfig = field(default_factory=FilterConfig)


@dataclass(frozen=True)
class EvalConfig:
    """`tries`: episodes per held-out task, each with its own seed."""

    tries: int = 2


@dataclass(frozen=True)
class NetworkConfig:
    """How the policy is computed, whatever its size: fields of the same names in Qwen3Config.

    `param_dtype`: of the weights that are trained; None leaves them as they are stored.
    """

    dtype: str = "float32"
    param_dtype: str | None = None
    remat: str = "none"
    attention: str = "xla"
    scan_layers: bool = True


@dataclass(frozen=True)
class RunConfig:
    """One run: model × data × algorithm × environment.

    policy: "shipped" (2.2M parameters), "shipped-small" (7.7M, stored in bfloat16: to train it set
      network.param_dtype=float32), or a folder (Hugging Face, Orbax or MaxText) with the weights to
      start from and their tokenizer.
    mesh: how the devices of all hosts share the work of training.
    lora: train adapters instead of the weights. Each of SFT and RL folds its own into what it hands
      on, and leaves them beside its snapshot in the PEFT format, for the weights it began with.
    environment: what the policy has in its episodes, and whose verdict is the reward
      (`sandbox.environments`).
    hide_tests: tests of a task that the verdict wants and that are taken out of the agent's copy of
      the repository: a share of those that its instructions do not name, or "failing", those that
      have to be repaired. Not that for the search teacher, which goes by failures.
    judge_both: in evaluations, find the other environment's verdict on each diff as well.
    """

    policy: str = "shipped"
    environment: Environment = "simplified"
    hide_tests: Hide = 0.0
    judge_both: bool = False
    network: NetworkConfig = field(default_factory=NetworkConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    lora: Lora | None = None
    tasks: TaskConfig = field(default_factory=TaskConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def policy_folder(policy: str) -> Path:
    """Where the policy of a config lies."""
    return POLICIES / SHIPPED[policy] if policy in SHIPPED else Path(policy)


def check(config: RunConfig, rl: bool) -> None:
    """Refuse shapes that some episode would not fit, before it is rolled out."""
    if config.server.kind != "inprocess":
        check_serving(config.server.kind, config.server.sglang)
    if config.teach.teacher == "endpoint":
        check_endpoint(config.teach.endpoint)
    if (config.teach.teacher == "dataset") != bool(config.teach.dataset):
        raise InputError("teach.dataset, a folder, goes with teach.teacher=dataset")
    validation = config.sft.validation
    if not 0 <= validation.share < 1:
        raise InputError(f"sft.validation.share must lie in 0..1, below 1: {validation.share}")
    if (validation.patience or validation.best) and not (validation.share and validation.every):
        raise InputError(
            "sft.validation.patience and best go by losses on what is held back: set "
            "sft.validation.share, 0.1 say, and every"
        )
    for name in ("every", "patience", "min_gain", "best", "success_every"):
        if not getattr(validation, name) >= 0:
            raise InputError(f"sft.validation.{name} may not be below 0")
    if validation.success_tasks < 1:
        raise InputError("sft.validation.success_tasks must be at least 1")
    spikes = config.sft.spikes
    if spikes.factor and not (spikes.factor > 1 and spikes.window >= 1 and spikes.stop >= 1):
        raise InputError(
            "sft.spikes: factor must be above 1, or 0 for no guard, window and stop at least 1"
        )
    sandbox = config.sandbox
    if sandbox.backend != "docker" and (sandbox.hosts or sandbox.container != ContainerConfig()):
        raise InputError("sandbox.hosts and sandbox.container are for sandbox.backend=docker alone")
    bare = sandbox.shell_without_isolation
    setting = Setting(
        config.environment, hide_tests=config.hide_tests, shell_without_isolation=bare
    )
    setting.refuse_bare_shell(sandbox.backend)
    agent = config.agent
    targets = min(agent.max_turns * agent.max_new_tokens, agent.max_tokens)
    stages: dict[str, SFTConfig | RLConfig] = {"sft": config.sft}
    if rl:
        stages["rl"] = config.rl
    for name, rows in stages.items():
        if rows.row_tokens < agent.max_tokens:
            raise InputError(f"{name}.row_tokens must be at least agent.max_tokens")
        if rows.row_targets and rows.row_targets < targets:  # 0: a slot for every token
            raise InputError(
                f"{name}.row_targets must be at least {targets}: an episode of {agent.max_turns} "
                f"turns of {agent.max_new_tokens} tokens may hold so many"
            )


def same_run(one: RunConfig, other: RunConfig) -> bool:
    """Whether a run of one config may go on with the other: they differ at most in how the
    teacher's endpoint is dealt with, in what decides only when, and whether, a request is sent."""

    def less(config: RunConfig) -> RunConfig:
        endpoint, default = config.teach.endpoint, EndpointConfig()
        names = [
            *("api_key_env", "concurrency", "request_s", "attempts", "pause_s", "longest_pause_s"),
            *("prices", "budget", "when_spent"),
        ]
        endpoint = replace(endpoint, **{name: getattr(default, name) for name in names})
        return replace(config, teach=replace(config.teach, endpoint=endpoint))

    return less(one) == less(other)
