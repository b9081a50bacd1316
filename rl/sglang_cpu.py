"""Starts SGLang 0.5.23, or its router, where there is neither CUDA nor SGLang's own CPU kernels.

    PYTHON -P sglang_cpu.py server --model-path DIR --device cpu …
    PYTHON -P sglang_cpu.py router --worker-urls URL …

PYTHON has what ``sglang-cpu.txt`` lists, and nothing of remend. The wheels from PyPI expect an
NVIDIA card; three things are missing without one, and nothing else is touched:

* ``torchvision``'s compiled operators are for CUDA builds of torch. Its Python part registers
  shapes for two of them at import, which fails unless they are declared.
* Rotary embedding: with neither CUDA nor ``sgl-kernel`` SGLang imports vLLM's kernel of that name.
  The same function follows in torch.
* A model hub is not asked for anything: snapshots are folders.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def rotary_embedding(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, neox: bool
) -> None:
    """Rotate query and key [tokens, heads * head_size] in place, as vLLM's kernel does.

    cos_sin_cache [length, rotary]: cosines, then sines. `neox` pairs entry i with i + rotary/2,
    else 2i with 2i + 1 (Su et al. 2021, arXiv 2104.09864, eq. 34).
    """
    rows = cos_sin_cache[positions.flatten()].float()
    half = rows.shape[-1] // 2
    cos, sin = rows[:, None, :half], rows[:, None, half:]
    if neox:
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(rows.shape[0], -1, head_size)
        x, y = heads[..., first].float(), heads[..., second].float()
        heads[..., first] = (x * cos - y * sin).to(tensor.dtype)
        heads[..., second] = (y * cos + x * sin).to(tensor.dtype)


def prepare() -> Any:
    """Put the missing parts in place; what is returned must stay alive."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import torch

    vllm: Any = types.ModuleType("vllm")
    vllm.__path__ = []
    vllm._custom_ops = types.ModuleType("vllm._custom_ops")
    vllm._custom_ops.rotary_embedding = rotary_embedding
    sys.modules |= {"vllm": vllm, "vllm._custom_ops": vllm._custom_ops}
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def main(argv: list[str]) -> None:
    """Run the server or the router until it ends."""
    what, *flags = argv
    sys.argv = [what, *flags]
    if what == "router":
        runpy.run_module("sglang_router.launch_router", run_name="__main__")
        return
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(flags))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# a sibling of this file must not be taken for a package of the same name
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != HERE]
# SGLang's workers are spawned and import this file anew: they need the parts as well
_kept = prepare() if __name__ in ("__main__", "__mp_main__") else None

if __name__ == "__main__":
    main(sys.argv[1:])
