"""`remend pretrain CONFIG --out DIR`: a tokenizer and a tiny policy from package sources.

Sources: the running Python's standard library, the training packages of the shipped index, and the
installed `libraries` that the config names, less every function that a held-out package holds too.
DIR/policy is a Hugging Face folder, DIR/metrics.jsonl the log.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from configs.errors import InputError
from configs.schema import load
from sandbox.generate import fingerprints, fingerprints_of
from sandbox.packages import Package, fetch, load_packages
from tools.progress import progress

# Not code that anyone repairs: tests, generated tables, and what is not part of every Python.
_SKIP = ("test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip")


def main(argv: list[str]) -> int:
    """Train, or continue a training that was cut off."""
    parser = argparse.ArgumentParser(prog="remend pretrain", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_intermixed_args(argv)

    from model.hf import load_hf, save_hf
    from model.host import keep_freed_memory
    from model.sharding import data_mesh, simulate_devices
    from model.tokenizer import Tokenizer, train
    from sft.chat import FRAGMENTS, Renderer
    from sft.pretrain import PretrainConfig, pretrain
    from sft.pretrain_rows import RowsAhead, StepRows
    from sft.synthetic import corpus_texts

    config = load(PretrainConfig, args.config, args.overrides)
    if config.model.vocab_size != config.vocab_size:
        raise InputError(f"{args.config}: vocab_size and model.vocab_size differ")
    keep_freed_memory()
    simulate_devices(config.devices)
    start = load_hf(Path(config.start)) if config.start else None
    if start and start.config.to_hf() != config.model.to_hf():
        raise InputError(f"{config.start} holds a model of another shape than {args.config}")
    read = args.out / "functions.jsonl.gz"
    functions = _functions_once(read, config.libraries)
    saved = args.out / "tokenizer"
    if start:
        start.tokenizer.save(saved)
    elif not saved.exists():
        drawn = random.Random(args.seed).sample(functions, config.tokenizer_functions)
        train(corpus_texts(drawn), config.vocab_size, FRAGMENTS).save(saved)
    tokenizer = Tokenizer.load(saved)
    source: StepRows | RowsAhead
    if config.workers:
        source = RowsAhead(config, config.mix, read, saved, args.seed)
    else:
        source = StepRows(config, config.mix, functions, Renderer(tokenizer), args.seed)
    with progress("pre-training") as report:
        params = pretrain(
            config,
            source,
            args.out,
            seed=args.seed,
            start=start.params if start else None,
            mesh=data_mesh(config.devices) if config.devices > 1 else None,
            on_step=lambda n, of, m: report(n, of, f"loss {m['pretrain/loss']:.3f}"),
        )
    save_hf(args.out / "policy", params, config.model, tokenizer)
    outcome = {"functions": len(functions), "policy": str(args.out / "policy")}
    print(json.dumps(outcome) if args.json else f"policy: {outcome['policy']}")
    return 0


def _functions_once(path: Path, libraries: Sequence[str]) -> list:
    """`_functions`, read from `path` by a run that goes on."""
    from sft.pretrain_rows import read_functions, write_functions

    if path.exists():
        return read_functions(path, libraries)
    found = _functions(libraries)
    write_functions(path, found, libraries)
    return found


def _functions(libraries: Sequence[str]) -> list:
    """Every usable function of the sources, in a fixed order."""
    from sft.synthetic import Function

    packages = list(load_packages().values())
    heldout = [package for package in packages if package.split == "heldout"]
    roots = _roots(libraries, {package.name.replace("-", "_") for package in heldout})
    fetch(packages)
    files = _files(roots, packages)
    read = functools.partial(_read, frozenset(fingerprints(heldout)))
    found: list[Function] = []
    # spawned: this process may hold threads, which a fork would not survive
    with (
        progress("reading sources") as report,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        for done, functions in enumerate(pool.map(read, files.items(), chunksize=16), 1):
            found += functions
            report(done, len(files), f"{len(found)} functions")
    return found


def _read(foreign: frozenset[str], file: tuple[str, Path]) -> list:
    """The usable functions of one file, (name shown to the policy, path), less `foreign` ones."""
    from sft.synthetic import extract

    module, path = file
    try:
        source = path.read_text(encoding="utf-8")
        functions = list(extract(module, source))
        known = fingerprints_of(source) if functions else {}
    except (OSError, UnicodeDecodeError, InputError):
        return []
    return [f for f in functions if known.get(f.name) not in foreign]


def _roots(libraries: Sequence[str], heldout: set[str]) -> dict[Path, str]:
    """Folders to read beside the shipped packages, each with what stands before its names."""
    roots = {Path(sysconfig.get_path("stdlib")): ""}
    for name in libraries:
        if name in heldout:
            raise InputError(f"libraries: {name} is held out")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"libraries: {name} is not installed here: pip install 'remend[dev]'")
        roots[Path(spec.submodule_search_locations[0])] = f"{name}/"
    return roots


def _files(roots: dict[Path, str], packages: Sequence[Package]) -> dict[str, Path]:
    """Source files by the name that the policy will see."""
    files = {
        prefix + str(path.relative_to(root)): path
        for root, prefix in roots.items()
        for path in sorted(root.rglob("*.py"))
        if not set(path.relative_to(root).parts) & set(_SKIP)
    }
    for package in (p for p in packages if p.split == "train"):
        for source in package.source:
            top = package.tree / source
            inside = sorted(top.rglob("*.py")) if top.is_dir() else [top]
            files |= {str(path.relative_to(package.tree)): path for path in inside}
    return files
