"""`remend convert|score|generate`: checkpoints between formats, and what one of them says."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from configs.errors import InputError


def convert(argv: list[str]) -> int:
    """Rewrite a checkpoint in another format; the weights keep their bits unless cast."""
    parser = argparse.ArgumentParser(prog="remend convert", description=convert.__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face, Orbax or MaxText folder")
    parser.add_argument("target", help="folder to write; a URL (gs://…) for --to hf")
    parser.add_argument("--to", required=True, choices=("hf", "orbax", "maxtext"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="cast the weights")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="size of a safetensors file")
    _json(parser)
    args = parser.parse_args(argv)
    if args.shard_gb <= 0:
        raise InputError(f"--shard-gb must be positive, got {args.shard_gb}")
    if "://" in args.target and args.to != "hf":
        raise InputError(f"{args.target}: only --to hf writes to an object store")
    if Path(args.target).absolute() == args.source.absolute():
        raise InputError(f"{args.target} is the source: choose another folder")
    began = time.monotonic()

    import jax

    from model.folder import format_of, load_policy
    from tools.progress import byte_progress

    kind = format_of(args.source)
    with byte_progress(f"read {kind}") as report:
        policy = load_policy(args.source, progress=report)
    count, size = len(jax.tree.leaves(policy.params)), 0
    if args.to == "hf":
        from model.hf import save_hf
        from model.hf_names import tensors

        count = sum(1 for _ in tensors(policy.config))
        with byte_progress("write hf") as report:
            save_hf(
                args.target,
                policy.params,
                policy.config,
                dtype=args.dtype,
                assets=args.source,
                shard_bytes=int(args.shard_gb * 1e9),
                resume=_fingerprint(args.source),
                progress=report,
            )
    elif args.to == "orbax":
        from model.orbax_folder import save_orbax

        save_orbax(
            Path(args.target), policy.params, policy.config, dtype=args.dtype, assets=args.source
        )
    else:
        from model.maxtext import save_maxtext

        save_maxtext(
            Path(args.target), policy.params, policy.config, dtype=args.dtype, assets=args.source
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.params))
    return _finish(args, {"tensors": count, "bytes": size, "target": args.target}, began)


def score(argv: list[str]) -> int:
    """Log-probabilities of given token ids under a checkpoint."""
    parser = argparse.ArgumentParser(prog="remend score", description=score.__doc__)
    _reads(parser, "logprobs [n, t-1] float32, argmax [n, t] int32")
    _json(parser)
    args = parser.parse_args(argv)
    ids = _ids(args.ids)
    began = time.monotonic()

    import numpy as np

    from model import scoring
    from tools.progress import progress

    policy = _policy(args, ids)
    with progress("score") as report:
        logprobs, argmax = scoring.score(
            policy.params, policy.config, ids, progress=lambda done, of: report(done, of, "rows")
        )
    _write_npz(args.out, logprobs=logprobs, argmax=argmax)
    mean = float(np.mean(logprobs)) if logprobs.size else None
    return _finish(args, {"rows": len(ids), "mean_logprob": mean, "out": str(args.out)}, began)


def generate(argv: list[str]) -> int:
    """Continue given token ids, greedily or by sampling."""
    parser = argparse.ArgumentParser(prog="remend generate", description=generate.__doc__)
    _reads(parser, "ids [n, N] int32: the new tokens, -1 behind a stop; logprobs [n, N] float32")
    parser.add_argument("--max-new", type=int, required=True, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", type=int, nargs="*", default=[], help="token ids that end a row")
    parser.add_argument("--seed", type=int, default=0)
    _json(parser)
    args = parser.parse_args(argv)
    if args.max_new < 1 or args.temperature < 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        raise InputError("--max-new must be positive, --temperature and --top-k not negative, "
                         "--top-p in (0, 1]")  # fmt: skip
    ids = _ids(args.ids)
    began = time.monotonic()

    import numpy as np

    from model import sampling
    from model.decode import MAX_STOPS
    from tools.progress import progress

    if len(args.stop) > MAX_STOPS:
        raise InputError(f"--stop takes at most {MAX_STOPS} ids")
    policy = _policy(args, ids)
    engine = sampling.engine_for(
        policy.params,
        policy.config,
        rows=len(ids),
        prompt=ids.shape[1],
        max_new=args.max_new,
        truncation=bool(args.top_k) or args.top_p < 1,
    )
    with progress("generate") as report:
        new, logprobs = sampling.generate(
            engine,
            ids.tolist(),
            max_new=args.max_new,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_ids=args.stop,
            seed=args.seed,
            progress=lambda done, of: report(done, of, "rows"),
        )
    out = np.full((len(ids), args.max_new), -1, np.int32)
    scores = np.zeros((len(ids), args.max_new), np.float32)
    for i, (row, values) in enumerate(zip(new, logprobs, strict=True)):
        out[i, : len(row)], scores[i, : len(row)] = row, values
    _write_npz(args.out, ids=out, logprobs=scores)
    outcome = {"rows": len(ids), "tokens": sum(map(len, new)), "out": str(args.out)}
    return _finish(args, outcome, began)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _reads(parser: argparse.ArgumentParser, writes: str) -> None:
    parser.add_argument("checkpoint", type=Path, help="Hugging Face, Orbax or MaxText folder")
    parser.add_argument("--ids", type=Path, required=True, help="IDS.npy: [n, t] token ids")
    parser.add_argument("--out", type=Path, required=True, help=f"OUT.npz: {writes}")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute in; default: that of the weights"
    )


def _ids(path: Path) -> Any:
    """The ids of an .npy file, [n, t] integers, n and t positive."""
    import numpy as np

    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not an .npy file of numbers: {error}") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        kind = f"{ids.dtype}{list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise InputError(f"{path} must hold integer ids [n, t], it holds {kind}")
    if 0 in ids.shape:
        raise InputError(f"{path} holds no ids: its shape is {list(ids.shape)}")
    return ids


def _policy(args: argparse.Namespace, ids: Any) -> Any:
    """The checkpoint, after its config has been compared with the ids."""
    from model.folder import format_of, load_policy
    from model.hf import read_config
    from tools.progress import byte_progress

    kind = format_of(args.checkpoint)
    config = read_config(args.checkpoint)
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.size:
        raise InputError(
            f"{args.ids}: token id {wrong[0]} is not in the vocabulary of {config.vocab_size}"
        )
    with byte_progress(f"read {kind}") as report:
        policy = load_policy(
            args.checkpoint, dtype=args.dtype or config.param_dtype, progress=report
        )
    return policy


def _write_npz(path: Path, **arrays: Any) -> None:
    import io

    import numpy as np

    from configs.files import write_atomic

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _fingerprint(folder: Path) -> str:
    """Names, sizes and times of a source's files: another source is another write."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    import hashlib

    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _finish(args: argparse.Namespace, outcome: dict[str, Any], began: float) -> int:
    outcome["seconds"] = round(time.monotonic() - began, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome["peak_rss_gib"] = round(peak / 2**20 / (1024 if sys.platform == "darwin" else 1), 3)
    if args.json:
        print(json.dumps(outcome))
    else:
        print("\n".join(f"{name}: {value}" for name, value in outcome.items()))
    return 0
