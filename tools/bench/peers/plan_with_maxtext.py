"""MaxText's own ahead-of-time compilation of a train step: its memory, its mesh, its HLO.

    python plan_with_maxtext.py FOLDER key=value ...       (MaxText's own keys)

Writes FOLDER/found.json and FOLDER/hlo/. Runs in MaxText's interpreter: imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import libtpu
import maxtext
from maxtext.trainers.pre_train import train_compile

folder = Path(sys.argv[1])
found: dict[str, Any] = {}


def options(flags: str) -> dict[str, Any]:
    """In place of its parser of compiler flags, which knows strings only."""
    return {"xla_dump_to": str(folder / "hlo"), "xla_dump_hlo_as_text": True}


def compile_and_keep(*arguments: Any) -> Any:
    compiled = original(*arguments)
    mesh, memory = arguments[3], compiled.memory_analysis()
    devices = mesh.devices.flatten().tolist()
    names = ("argument_size", "output_size", "alias_size", "temp_size")
    found.update(
        {name: getattr(memory, f"{name}_in_bytes") for name in names},
        names=list(mesh.axis_names),
        sizes=list(mesh.devices.shape),
        ids=[d.id for d in devices],
        slices=[getattr(d, "slice_index", None) or 0 for d in devices],
        coords=[[*d.coords, d.core_on_chip] for d in devices],
    )
    return compiled


train_compile.max_utils.parse_libtpu_flags_to_dict = options
original, train_compile.jit_and_compile = train_compile.jit_and_compile, compile_and_keep

base = Path(maxtext.__file__).parent / "configs" / "base.yml"
train_compile.main(["", str(base), *sys.argv[2:]])
found["library"] = libtpu.get_library_path()
found["versions"] = {name: metadata.version(name) for name in ("maxtext", "jax", "libtpu")}
(folder / "found.json").write_text(json.dumps(found))
