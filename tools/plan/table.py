"""A plan for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(plan: dict[str, Any], console: Console) -> None:
    """Print what ``tools.plan.summary.summary`` gives."""
    if "search" in plan:
        console.print(_ranking(plan["search"]))
        console.print(f"the best: {' '.join(plan['choice'])}", soft_wrap=True)
    console.print(_programs(plan))
    console.print(_collectives(plan))
    hbm = plan["hbm_gib"]
    share = 100 * hbm["total"] / hbm["capacity"]
    verdict = "[green]fits[/]" if plan["fits"] else "[red]does not fit[/]"
    console.print(
        f"{verdict}: {hbm['total']:.2f} GiB of {hbm['capacity']:.2f}, {share:.0f} % "
        f"(at most 90 %; by formula {hbm['estimate']['total']:.2f} GiB)"
    )
    if near := plan.get("nearest"):
        how = "compiled" if near["compiled"] else "by formula"
        console.print(
            f"it would with {' '.join(near['changes'])}: {near['hbm_gib']:.2f} GiB, {how}",
            soft_wrap=True,
        )
    elif not plan["fits"]:
        console.print("no other rows at a time, remat or mesh makes it fit: take more chips")
    ratio = plan["flops_per_chip"] / plan["flops_expected"]
    console.print(
        f"FLOPs a chip: {_si(plan['flops_per_chip'])} compiled, {_si(plan['flops_expected'])} by "
        f"formula ({ratio:.3f}), {_si(plan['flops_model'])} of them the model's"
    )
    console.print(
        f"an update takes at least {plan['least_s']:.2f} s, bound by {plan['step_s']['bound']}: "
        f"at most {100 * plan['mfu_ceiling']:.0f} % MFU, {plan['tokens_per_s']:,.0f} tokens/s"
    )
    export = plan["export"]
    console.print(
        f"a snapshot sends {export['bytes'] / 1e9:.1f} GB a chip, largest: {export['largest']}, "
        f"{export['hbm_gib']:.2f} GiB with what lies there"
    )
    for note in plan["notes"]:
        console.print(f"note: {note}", style="dim")
    kept = "from the cache" if plan["cached"] else f"compiled in {plan['compile_s']:.0f} s"
    console.print(kept, style="dim")


def _programs(plan: dict[str, Any]) -> Table:
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
    table = Table(
        title=f"{plan['stage']} on {plan['topology']}, {mesh or 'one device'}: "
        f"{plan['rows']} rows of {plan['row_tokens']} tokens, {plan['microbatch_rows']} at a time",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    columns = ("program", "runs", "args", "temps", "GiB", "TFLOP", "compute", "hbm", "ici", "dcn s")
    for column in columns:
        table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
    for row in plan["programs"]:
        hbm, seconds = row["hbm_gib"], row["step_s"]
        table.add_row(
            row["name"],
            str(row["runs"]),
            *(f"{hbm[name]:.2f}" for name in ("arguments", "temporaries", "total")),
            f"{row['flops_per_chip'] / 1e12:.1f}",
            *(f"{seconds[name]:.3f}" for name in ("compute", "hbm", "ici", "dcn")),
        )
    return table


def _ranking(rows: list[dict[str, Any]]) -> Table:
    """The choices of a search, by formula and as compiled."""
    table = Table(
        title="choices (slice, data, fsdp, context, tensor), the fastest by formula first",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in ("mesh", "remat", "attention", "rows", "GiB", "s", "MFU", "GiB ", "s ", "MFU "):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        values = [choice.partition("=")[2] for choice in row["choice"]]
        cells = [" ".join(values[:-3]), *values[-3:]]
        for found in (row["estimate"], row["compiled"]):
            if found is None:
                cells += ["", "", ""]
                continue
            fits = "" if found["fits"] else "[red]"
            seconds, share = found["least_s"], 100 * found["mfu_ceiling"]
            cells += [f"{fits}{found['hbm_gib']:.1f}", f"{seconds:.2f}", f"{share:.0f} %"]
        table.add_row(*cells)
    return table


def _collectives(plan: dict[str, Any]) -> Table:
    table = Table(title="collectives of an update, one chip", box=box.SIMPLE)
    for column in ("kind", "axes", "link", "count", "GB sent", "s"):
        table.add_column(column, justify="right" if column in ("count", "GB sent", "s") else "left")
    for row in plan["collectives"]:
        if row["bytes"] < 1e6:  # sums of scalars and the like
            continue
        table.add_row(
            row["kind"],
            " x ".join(row["axes"]),
            row["link"],
            f"{row['count']:.0f}",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['seconds']:.3f}",
        )
    return table


def _si(value: float) -> str:
    return f"{value / 1e12:,.1f} T" if value >= 1e11 else f"{value / 1e9:,.1f} G"
