"""A plan for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(plan: dict[str, Any], console: Console) -> None:
    """Print what ``tools.plan.summary.summary`` gives."""
    console.print(_programs(plan))
    console.print(_collectives(plan))
    hbm = plan["hbm_gib"]
    share = 100 * hbm["total"] / hbm["capacity"]
    verdict = "[green]fits[/]" if plan["fits"] else "[red]does not fit[/]"
    console.print(
        f"{verdict}: {hbm['total']:.2f} GiB of {hbm['capacity']:.2f}, {share:.0f} % "
        f"(at most 90 %; by formula {hbm['estimate']['total']:.2f} GiB)"
    )
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
