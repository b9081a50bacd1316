"""`remend bench plan`: a train step of ours beside MaxText's, both compiled for the same TPU slice.

Neither is run: memory of a chip and bytes that it sends are read from the compiled programs. Same
model, mesh, batch, sequence, float32 state and bfloat16 compute, everything recomputed but a
layer's input; and the same compiler, the libtpu that MaxText is installed with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from tools.bench.install import install
from tools.bench.peer import SCRIPTS

OURS, MAXTEXT = "remend", "maxtext"
_SMALL = 1e6  # bytes: sums of scalars, left out of the table


def main(argv: list[str]) -> int:
    """Compile both and print. 0 if both could be, else 1."""
    options = _parse(argv)
    python = _python(options)
    try:
        theirs = {MAXTEXT: _maxtext(python, options)}
        os.environ["TPU_LIBRARY_PATH"] = theirs[MAXTEXT]["library"]
    except _Failed as error:
        theirs = {}
        _say(f"maxtext could not be compiled: {error}")
    rows = {OURS: _ours(options), **theirs}
    found = {
        "rows": _rows(rows),
        "ratio": "remend's over the row's",
        "topology": options.topology,
        "rows_of_batch": options.rows,
        "tokens": options.tokens,
        "mesh": {"fsdp": options.fsdp, "tensor": options.tensor},
        "versions": {name: row["versions"] for name, row in rows.items()},
    }
    if options.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0 if MAXTEXT in rows else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="remend bench plan", description=__doc__)
    add = parser.add_argument
    add("--maxtext-python", type=Path, metavar="PYTHON", help="an interpreter that has MaxText")
    add("--install", type=Path, metavar="DIR", help="its environment, made where it is missing")
    add("--python312", type=Path, metavar="PYTHON", help="to make that environment with")
    add("--model", default="qwen3-32b", help="a preset that MaxText has by the same name")
    add("--topology", default="v5p-128", help="as the cloud calls it")
    add("--rows", type=int, default=16, help="of a batch, over all chips")
    add("--tokens", type=int, default=4096, help="of a row")
    add("--fsdp", type=int, default=16)
    add("--tensor", type=int, default=4)
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


def _python(options: argparse.Namespace) -> Path:
    if options.maxtext_python is not None:
        path = Path(options.maxtext_python).expanduser().absolute()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise InputError(f"--maxtext-python {path} is not an executable file")
        return path
    if options.install is None:
        raise InputError(
            "MaxText is compiled by its own interpreter: --maxtext-python or --install"
        )
    made = install(options.install, [MAXTEXT], options.python312, _say)
    if MAXTEXT not in made:
        raise InputError("MaxText needs Python 3.12 or newer: --python312 PATH")
    return made[MAXTEXT]


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    from model.config import preset
    from model.sharding import MeshConfig
    from sft.learner import OptimizerConfig
    from tools.plan.cache import versions
    from tools.plan.costs import compiled
    from tools.plan.job import Job

    model = preset(
        options.model,
        param_dtype="float32",
        dtype="bfloat16",
        remat="full",
        attention="splash",
    )
    mesh = MeshConfig(fsdp=options.fsdp, tensor=options.tensor, topology=options.topology)
    job = Job(model, mesh, options.rows, options.rows, options.tokens, 0, OptimizerConfig())
    step = compiled(job, _say).parts[0].figures
    return {"figures": step, "versions": {name: versions()[name] for name in ("jax", "libtpu")}}


class _Failed(Exception):
    """MaxText did not compile; the message is the last line that it wrote."""


def _maxtext(python: Path, options: argparse.Namespace) -> dict[str, Any]:
    from tools.plan.chips import parse
    from tools.plan.compiling import text_in
    from tools.plan.figures import figures
    from tools.plan.hlo import analyse
    from tools.plan.memory import Memory
    from tools.plan.placement import Placement

    on = parse(options.topology)
    with tempfile.TemporaryDirectory(prefix="remend-bench-") as temporary:
        folder = Path(temporary)
        _say(f"maxtext compiles its own for {on.name}: a few minutes")
        _run(python, folder, _settings(options, on.devices, on.slices, folder))
        found = json.loads((folder / "found.json").read_text())
        text = text_in(folder / "hlo")
    # axes of one device say nothing; with coordinates as tools/plan/topology.py has them
    kept = [i for i, size in enumerate(found["sizes"]) if size > 1]
    place = Placement(
        names=tuple(found["names"][i] for i in kept),
        sizes=tuple(found["sizes"][i] for i in kept),
        ids=found["ids"],
        slices=found["slices"],
        coords=[(*at[: on.chip.torus], at[-1]) for at in found["coords"]],
    )
    memory = Memory(
        found["argument_size"],
        found["output_size"],
        found["alias_size"],
        found["temp_size"],
        host=0.0,
        parts={},
    )
    return {
        "figures": figures(memory, analyse(text, place), place, on),
        "versions": found["versions"],
        "library": found["library"],
    }


def _settings(options: argparse.Namespace, devices: int, slices: int, out: Path) -> list[str]:
    """MaxText's keys for the same job."""
    flags: dict[str, Any] = {
        "compile_topology": options.topology,
        "compile_topology_num_slices": slices,
        "model_name": options.model,
        "per_device_batch_size": options.rows / devices,
        "max_target_length": options.tokens,
        "ici_fsdp_parallelism": options.fsdp,
        "ici_tensor_parallelism": options.tensor,
        "remat_policy": "full",
        "weight_dtype": "float32",
        # nothing is read or written
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "base_output_directory": out,
        "run_name": "aot",
        "tokenizer_path": out,
    }
    return [f"{key}={value}" for key, value in flags.items()]


def _run(python: Path, folder: Path, settings: list[str]) -> None:
    # a library named here is not MaxText's: it has its own
    ours = ("PYTHONPATH", "PYTHONHOME", "TPU_LIBRARY_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "DECOUPLE_GCLOUD": "TRUE",
    }
    command = [str(python), str(SCRIPTS / "plan_with_maxtext.py"), str(folder), *settings]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise _Failed(f"{python} does not run: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "it ended").splitlines()
        raise _Failed(f"{lines[-1]} (exit code {done.returncode})")


def _rows(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each peer and measure, with remend's value over it."""
    measures = {name: _measures(row["figures"]) for name, row in found.items()}
    names = dict.fromkeys(what for row in measures.values() for what in row)
    rows = []
    for what in names:
        ours = measures[OURS].get(what, 0.0)
        for name, row in measures.items():
            value = row.get(what, 0.0)
            ratio = ours / value if value else None
            rows.append({"name": name, "measure": what, "value": value, "ratio": ratio})
    return rows


def _measures(figures: Any) -> dict[str, float]:
    """Bytes and FLOPs of one chip, by name."""
    out = {
        "HBM, arguments": figures.arguments,
        "HBM, temporaries": figures.temporaries,
        "HBM, all": figures.hbm,
        "FLOPs": figures.flops,
        "bytes to and from HBM": figures.hbm_bytes,
        "sent, all": figures.sent,
        "seconds of links": figures.ici_s + figures.dcn_s,
    }
    for row in figures.collectives:
        name = f"sent, {row.kind} over {' x '.join(row.axes)}"
        out[name] = out.get(name, 0.0) + row.sent
    return {name: value for name, value in out.items() if value > _SMALL or "," not in name}


def _print(found: dict[str, Any]) -> None:
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1)
    table = Table(
        title=f"a train step on {found['topology']}, {mesh}: {found['rows_of_batch']} rows of "
        f"{found['tokens']} tokens, one chip",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in ("", OURS, MAXTEXT, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    by_measure: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        by_measure.setdefault(row["measure"], {})[row["name"]] = row
    for what, names in by_measure.items():
        ratio = names.get(MAXTEXT, {}).get("ratio")
        values = (
            _value(what, names[name]["value"]) if name in names else "" for name in (OURS, MAXTEXT)
        )
        table.add_row(what, *values, f"{ratio:.2f}" if ratio is not None else "")
    console = Console()
    console.print(table)
    console.print("remend over maxtext: below 1 where remend needs less", style="dim")
    for name, packages in found["versions"].items():
        console.print(f"{name}: {', '.join(f'{p} {v}' for p, v in packages.items())}", style="dim")


def _value(what: str, value: float) -> str:
    if what.startswith("HBM"):
        return f"{value / 2**30:.2f} GiB"
    if what == "FLOPs":
        return f"{value / 1e12:.1f} T"
    if what.startswith("seconds"):
        return f"{value:.3f} s"
    return f"{value / 1e9:.2f} GB"


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)
