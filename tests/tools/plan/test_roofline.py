"""Seconds of collectives on a torus, and which term of a step binds."""

from __future__ import annotations

import itertools
import math

import pytest

from tools.plan.chips import CHIPS, parse
from tools.plan.hlo import Collective, Program
from tools.plan.placement import Placement
from tools.plan.roofline import collective_s, roofline


def place(shape: tuple[int, ...], slices: int = 1, **axes: int) -> Placement:
    """A mesh whose devices lie in the order of their coordinates, the last one fastest."""
    coords = [(*at, 0) for at in itertools.product(*map(range, shape))]
    return Placement(
        names=tuple(axes),
        sizes=tuple(axes.values()),
        slices=[s for s in range(slices) for _ in coords],
        coords=coords * slices,
    )


def collective(kind: str, where: Placement, axis: str, size: float, sent: float) -> Collective:
    """One execution over an axis, all groups alike."""
    index = where.names.index(axis)
    stride = math.prod(where.sizes[index + 1 :])
    group = tuple(i * stride for i in range(where.sizes[index]))
    groups: tuple[tuple[int, ...], ...] = (group,)
    if kind == "collective-permute":
        groups = tuple(zip(group, (*group[1:], group[0]), strict=True))
    return Collective(kind, "bf16", (axis,), len(group), "", False, 1, size, sent, groups)


@pytest.mark.parametrize(
    ("name", "axes", "axis", "links"),
    [
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, "tensor", 2),  # a whole ring
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, "tensor", 1),  # a line
        ("v5e:16x16", {"fsdp": 64, "tensor": 4}, "tensor", 1),  # a part of a ring
        ("v5e:16x16", {"data": 16, "fsdp": 8, "tensor": 2}, "fsdp", 1),  # every second of a ring
        ("v5e:16x16", {"all": 256}, "all", 4),  # both dimensions
        ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, "fsdp", 4),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}, "fsdp", 2 + 2 + 1),
        ("v5p:2x2x4", {"fsdp": 4, "tensor": 4}, "tensor", 1),  # no whole cube, no optical switch
    ],
)
def test_bandwidth_of_an_axis(name, axes, axis, links):
    on = parse(name)
    where = place(on.shape, **axes)
    row = collective("all-gather", where, axis, 2e9, 1e9)
    assert collective_s(row, where, on) == pytest.approx(1 / (links * on.chip.ici_gbs))


def test_a_group_that_fills_no_box_has_one_link():
    on = parse("v5e:4x4")
    where = place((4, 4), a=16)
    row = Collective("all-gather", "bf16", ("a",), 3, "", False, 1, 3e9, 2e9, ((0, 1, 5),))
    assert collective_s(row, where, on) == pytest.approx(2 / 45)


def test_all_to_all_takes_several_links():
    on = parse("v5e:16x16")
    where = place(on.shape, a=16, b=16)
    row = collective("all-to-all", where, "b", 16e9, 15e9)
    # ring: 16 devices send 1 GB to each of 8 on either side, over 1..8 links; both ways: 16 * 4 / 2
    assert collective_s(row, where, on) == pytest.approx(16 * 16 / 4 / 2 / 45)


@pytest.mark.parametrize(("name", "axis", "busiest"), [("v5e:16x16", "b", 1), ("v5e:4x4", "b", 1)])
def test_a_permute_to_the_neighbour_has_a_link_to_itself(name, axis, busiest):
    on = parse(name)
    where = place(on.shape, a=on.shape[0], b=on.shape[1])
    row = collective("collective-permute", where, axis, 1e9, 1e9)
    assert collective_s(row, where, on) == pytest.approx(busiest / 45)


def test_a_permute_past_others_shares_links():
    on = parse("v5e:16x16")
    where = place(on.shape, a=16, b=8, c=2)
    pairs = tuple((i, (i + 4) % 16) for i in range(16))
    row = Collective("collective-permute", "bf16", ("b",), 8, "", False, 1, 1e9, 1e9, pairs)
    assert collective_s(row, where, on) == pytest.approx(4 / 45)


def test_between_slices_a_host_is_shared():
    on = parse("2xv6e-256")
    where = place(on.shape, 2, slice=2, fsdp=256)
    row = Collective("all-reduce", "f32", ("slice",), 2, "", True, 1, 1e9, 1e9, ((0, 256),))
    assert collective_s(row, where, on) == pytest.approx(8 / 100)


def test_terms_of_a_step():
    on = parse("v5e:16x16")
    where = place(on.shape, fsdp=16, tensor=16)
    rows = (
        collective("all-gather", where, "tensor", 2e9, 9e9),
        collective("reduce-scatter", where, "fsdp", 2e9, 18e9),
    )
    program = Program(190e12, 7e12, 81.9e9, rows, (), ())
    found = roofline(program, 98.5e12, where, on)
    assert found.compute_s == pytest.approx(1.0)
    assert found.hbm_s == pytest.approx(0.1)
    assert found.axes_s == pytest.approx({"tensor": 0.1, "fsdp": 0.2})
    assert (found.ici_s, found.dcn_s) == pytest.approx((0.3, 0.0))
    assert (found.bound, found.step_s) == ("compute", pytest.approx(1.0))
    assert found.mfu_ceiling == pytest.approx(0.5)


def test_gpus_hang_on_a_switch():
    where = Placement(("fsdp",), (8,))
    row = Collective("all-gather", "bf16", ("fsdp",), 8, "", False, 1, 1e9, 9e9, ((0, 1),))
    assert collective_s(row, where, CHIPS["h100"]) == pytest.approx(9 / 450)
