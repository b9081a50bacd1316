"""The stages of a run, each resumable, over one run folder: what the verbs call and nothing else.

    teach -> sft -> rl, and evaluations of any policy in between

A stage that is done has its result in the run folder and is not done again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from configs.errors import InputError
from configs.files import append_jsonl, write_atomic
from configs.schema import dump, load
from model.config import Qwen3Config
from model.decode import Engine, check_room
from model.folder import load_policy
from model.hf import load_hf, save_hf
from model.host import keep_freed_memory
from model.hosts import barrier, exists, host_count, host_index
from model.lora import merged
from model.peft import save_peft
from model.qwen3 import Params, abstract
from model.sharding import make_mesh, param_shardings, simulate_devices
from model.share import whole
from rl.agent import NoopPolicy, Policy, TeacherPolicy
from rl.endpoint import EndpointPolicy
from rl.inprocess import InProcessServer
from rl.rollout import Episode, run_episodes, run_to_file
from rl.train import episode_seed
from sandbox.agent_tools import tools_of
from sandbox.backends import make_pool
from sandbox.environments import Setting
from sandbox.image_task import ImageTask
from sandbox.memo import TestMemo
from sandbox.task import Task, load_tasks
from sft.chat import Renderer
from sft.dataset import Published
from sft.endpoint import Endpoint, endpoint_key
from sft.spending import Spending
from sft.tracking import open_trackers
from sft.trajectory import Trajectory
from tools.fine_tune import fine_tune
from tools.progress import progress
from tools.reinforce import reinforce
from tools.run_config import RunConfig, TaskConfig, check, policy_folder, same_run
from tools.suites import judged_in_full


class Pipeline:
    """A run folder and everything needed to work in it.

    Everything that a run reads is checked here, before anything is written. Use as an async context
    manager: leaving it ends every sandbox. On several hosts each has a pipeline over the same run
    folder; they share the episodes and the updates, and host 0 writes what there is one of. Where
    there is a mesh, parameters are only ever read into their places on it.

    rl: whether it will come to that stage. serves: whether a policy will be sampled from by this
    process, and so must fit on one device.
    """

    def __init__(
        self, config: RunConfig, run: Path, seed: int, *, rl: bool = True, serves: bool = True
    ) -> None:
        check(config, rl)
        if config.teach.teacher == "endpoint" and not exists(run / "trajectories/teacher.jsonl"):
            endpoint_key(config.teach.endpoint)
        keep_freed_memory()
        simulate_devices(_devices_here(config.mesh.devices))
        self.config, self.run, self.seed = config, run, seed
        self.start = load_policy(
            policy_folder(config.policy),
            shardings=self._shardings,
            **asdict(config.network),
        )
        if serves:
            check_room(self.start.config, config.server.slots, config.agent.max_tokens)
        self.train_tasks = _tasks(config.tasks, "train", config.tasks.train)
        self.heldout_tasks = _tasks(config.tasks, "heldout", config.tasks.heldout)
        self._published = self._dataset() if config.teach.dataset else None
        self.trackers = open_trackers(config.tracking, run) if host_index() == 0 else []
        self._usable: dict[str, list[Task]] = {}
        self._keep_config()
        sandbox = config.sandbox
        self.pool = make_pool(
            sandbox.backend,
            sandbox.slots,
            sandbox.limits,
            sandbox.hosts,
            sandbox.container,
            TestMemo() if sandbox.remember else None,
            shell=self.setting.shell,
        )

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()
        for tracker in self.trackers:
            tracker.close()
        if "endpoint" in self.__dict__:
            await self.endpoint.close()

    @functools.cached_property
    def renderer(self) -> Renderer:
        agent = self.config.agent
        tools = tools_of(self.config.environment) if agent.declare_tools else ()
        return Renderer(self.start.tokenizer, tools, thinking=agent.thinking)

    @functools.cached_property
    def setting(self) -> Setting:
        """Of training episodes; evaluations may judge in both environments."""
        config = self.config
        return Setting(
            config.environment,
            hide_tests=config.hide_tests,
            shell_without_isolation=config.sandbox.shell_without_isolation,
        )

    async def tasks(self, split: Literal["train", "heldout"]) -> list[Task]:
        """The tasks of a split; those that can be judged in the run's environment.

        What `full` needs to know of their releases is measured where that was not done yet.
        """
        if split not in self._usable:
            tasks = self.train_tasks if split == "train" else self.heldout_tasks
            full = self.setting.environment == "full"
            if full:  # which sandbox it is, is known when there is one
                async with self.pool.lease(tasks[0].tree()):
                    self.setting.refuse_bare_shell(self.pool.backend)
            if full or (self.config.judge_both and split == "heldout"):
                judged = await judged_in_full(tasks, self.pool, self.config.sandbox.slots)
                tasks = judged if full else tasks
            self._usable[split] = tasks
        return self._usable[split]

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        return make_mesh(self.config.mesh) if self.config.mesh.devices > 1 else None

    @property
    def _shardings(self) -> Callable[[Qwen3Config], Params] | None:
        """Where parameters go when they are read; None: the first device."""
        mesh = self.mesh
        return None if mesh is None else lambda config: param_shardings(config, mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        """The decode engine, still without weights; one for the whole run, since compiling it
        takes a while."""
        server = self.config.server
        return Engine(
            None,
            self.start.config,
            slots=server.slots,
            max_len=self.config.agent.max_tokens,
            prefill_chunk=server.prefill_chunk,
            prefill_rows=server.prefill_rows,
        )

    def served(self, name: str) -> InProcessServer:
        """The engine as a policy called `name`; its weights are whatever was last published."""
        return InProcessServer(self.engine, name, self.stop_ids, self.config.agent.temperature)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a policy's turn."""
        return (self.start.tokenizer.id("<|im_end|>"),)

    @functools.cached_property
    def endpoint(self) -> Endpoint:
        """The teacher's, where it has one; what it has cost is in the run folder."""
        config = self.config.teach.endpoint
        return Endpoint(config, Spending(self.run, config.prices, config.budget))

    @functools.cached_property
    def teacher(self) -> Policy:
        if self.config.teach.teacher == "endpoint":
            tools = tools_of(self.config.environment)
            return EndpointPolicy(self.endpoint, self.renderer, tools)
        if self.config.teach.teacher == "dataset":
            raise InputError("with teach.teacher=dataset there is no teacher that could play")
        return TeacherPolicy(self.renderer)

    # stages

    async def teach(self) -> Sequence[Trajectory]:
        """The teacher's episodes on the training tasks."""
        if self._published is not None:
            return self._published
        tries = range(self.config.teach.tries)
        episodes = [
            Episode(task, episode_seed(self.seed, 1, i, j))
            for i, task in enumerate(await self.tasks("train"))
            for j in tries
        ]
        return await self.record("teacher", episodes, self.teacher, "teacher", self.setting)

    async def sft(self, taught: Sequence[Trajectory]) -> Params:
        """Fine-tune the starting policy on the teacher's episodes; its parameters."""
        folder = self.run / "snapshots" / "sft"
        if not exists(folder):
            with progress(_label("SFT")) as report:
                params = await fine_tune(self, taught, report)
            self._keep(folder, params, self.start.folder)
        else:
            self.take_start()  # nobody wants them any more
        return self.load(folder)

    async def rl(self, start: Params, taught: Sequence[Trajectory]) -> Params:
        """GRPO from the SFT policy; the final parameters. `taught`: the teacher's episodes."""
        tasks = await self.tasks("train")
        if self.config.rl.only_solved:
            tasks = solved_tasks(tasks, taught)
        folder = self.run / "snapshots" / "rl"
        if not exists(folder):
            with progress(_label("RL")) as report:
                params = await reinforce(self, start, tasks, report)
            self._keep(folder, params, self.run / "snapshots" / "sft")
        return self.load(folder)

    async def evaluate(self, name: str, params: Params | None = None) -> Sequence[Trajectory]:
        """Episodes of a policy on the held-out tasks: "noop", "teacher", or a name for `params`."""
        if params is not None:
            self.engine.set_params(whole(params), 0)
            policy: Policy = self.served(name)
        else:
            policy = NoopPolicy(self.renderer) if name == "noop" else self.teacher
        episodes = [
            Episode(task, episode_seed(self.seed, 2, i, j))
            for i, task in enumerate(await self.tasks("heldout"))
            for j in range(1 if name == "noop" else self.config.eval.tries)
        ]
        setting = replace(self.setting, judge_both=self.config.judge_both)
        return await self.record(f"eval-{name}", episodes, policy, f"evaluate {name}", setting)

    async def record(
        self, stem: str, episodes: Sequence[Episode], policy: Policy, label: str, setting: Setting
    ) -> Sequence[Trajectory]:
        """Run episodes into `trajectories/STEM.jsonl`, with progress."""
        solved: list[bool] = []
        endpoint = self.config.teach.endpoint if isinstance(policy, EndpointPolicy) else None
        with progress(_label(label)) as report:

            def on_done(trajectory: Trajectory) -> None:
                solved.append(trajectory.success)
                report(len(solved), len(episodes), f"success {sum(solved) / len(solved):.2f}")

            done = await run_to_file(
                self.run / "trajectories" / f"{stem}.jsonl",
                episodes,
                policy,
                self.pool,
                self.renderer,
                self.config.agent,
                concurrency=endpoint.concurrency if endpoint else self.config.server.slots,
                setting=setting,
                on_done=on_done,
                # an evaluation of some of the episodes would be of the easy ones
                partly=stem == "teacher"
                and endpoint is not None
                and endpoint.when_spent == "train",
            )
        self._note_pool(stem)
        return done

    async def run_episodes(self, episodes: Sequence[Episode], policy: Policy) -> list[Trajectory]:
        """Run episodes, as many at a time as the server has slots."""
        done = await run_episodes(
            episodes,
            policy,
            self.pool,
            self.renderer,
            self.config.agent,
            concurrency=self.config.server.slots,
            setting=self.setting,
        )
        self._note_pool("rl")
        return done

    def _dataset(self) -> Sequence[Trajectory]:
        """The episodes that another run's teacher left, if this run would render them so too."""
        found = Published(Path(self.config.teach.dataset))
        prompt = self.renderer.prompt(found[0].prompt)
        if found[0].ids[: len(prompt)] != prompt:
            raise InputError(
                f"{self.config.teach.dataset} was written for another tokenizer, or with other "
                "agent.thinking or agent.declare_tools"
            )
        return found

    def _note_pool(self, stage: str) -> None:
        """How the pool of sandboxes did so far, in `sandbox.jsonl`: queue, leases, failures."""
        if found := self.pool.metrics():
            name = f"sandbox.host-{host_index()}" if host_count() > 1 else "sandbox"
            append_jsonl(self.run / f"{name}.jsonl", {"stage": stage, **found})

    @functools.cached_property
    def trained(self) -> Qwen3Config:
        """The config of what is trained: the starting policy's, with adapters if asked for."""
        return replace(self.start.config, lora=self.config.lora)

    def _keep(self, folder: Path, params: Params, base: Path) -> None:
        """Write a stage's result: its adapters, if any, then the whole policy."""
        if self.config.lora is not None:
            adapters = folder.with_name(f"{folder.name}-adapter")
            save_peft(adapters, params, self.trained, str(base.absolute()))
        whole = merged(params, self.config.lora)
        save_hf(folder, whole, self.start.config, self.start.tokenizer)

    def load(self, folder: Path) -> Params:
        """The weights of a snapshot, in their places on the mesh where there is one."""
        return load_hf(folder, shardings=self._shardings).params

    def take_start(self) -> Params:
        """The starting weights, of which only the shapes remain here: beside what is trained they
        would fill a pod's devices for nothing."""
        params = self.start.params
        self.start = replace(self.start, params=abstract(self.start.config))
        return params

    def _keep_config(self) -> None:
        """Write `config.yaml`; a resumed run may differ in how its endpoint is dealt with alone."""
        path, text = self.run / "config.yaml", f"# seed: {self.seed}\n{dump(self.config)}"
        renew = not exists(path) or self._resumes(path, text.partition("\n")[0])
        barrier(f"{path} compared")
        if renew and host_index() == 0:
            write_atomic(path, text)
        barrier(f"{path} written")
        if path.read_text() != text:
            raise InputError(
                f"{self.run} holds a run with another config or seed: choose another --out, "
                "or delete that folder"
            )

    def _resumes(self, path: Path, seed: str) -> bool:
        """Whether this run may go on with the one of that config."""
        try:
            before = load(RunConfig, path)
        except InputError:  # of another version
            return False
        return path.read_text().startswith(f"{seed}\n") and same_run(before, self.config)


def _label(text: str) -> str:
    """The label of a progress bar, with whose it is where there are several hosts."""
    return f"{text} (host {host_index()})" if host_count() > 1 else text


def _devices_here(devices: int) -> int:
    """How many of a run's devices are this host's; a CPU pretends to have them."""
    hosts = host_count()
    if devices % hosts:
        raise InputError(f"mesh: {devices} devices are no multiple of the {hosts} hosts")
    return devices // hosts


def solved_tasks(tasks: Sequence[Task], episodes: Sequence[Trajectory]) -> list[Task]:
    """The tasks, in order, that some episode solved."""
    solved = {trajectory.task for trajectory in episodes if trajectory.success}
    return [task for task in tasks if task.name in solved]


def _tasks(config: TaskConfig, split: str, limit: int) -> list[Task]:
    tasks = load_tasks(config.index, split=split, limit=limit or None, packages=config.packages)
    if not tasks:
        raise InputError(f"no {split} tasks in {config.index}")
    elsewhere = [task for task in tasks if isinstance(task, ImageTask)]
    if elsewhere:
        raise InputError(
            f"{config.index}: {len(elsewhere)} {split} tasks need container images, "
            f"which sandboxes cannot run (as {elsewhere[0].name}: {elsewhere[0].image})"
        )
    return tasks
