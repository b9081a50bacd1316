"""Notations of groups, and the mesh axes they are."""

from __future__ import annotations

import pytest

from tools.plan.groups import megascale_target, pairs, replica_groups
from tools.plan.placement import Placement

MESH = Placement(("data", "fsdp", "tensor"), (2, 4, 2))


def test_listed_groups():
    assert replica_groups("{{0,1},{2,3}}", 4) == ((0, 1), (2, 3))
    assert replica_groups("{{0}}", 1) == ((0,),)
    assert replica_groups("{}", 3) == ((0, 1, 2),)


def test_iota_groups():
    assert replica_groups("[2,4]<=[8]", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert replica_groups("[4,2]<=[2,4]T(1,0)", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert replica_groups("[2,4]<=[2,2,2]T(1,0,2)", 8) == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_an_unknown_notation_is_no_guess():
    with pytest.raises(ValueError, match="not known here"):
        replica_groups("@mesh<a=2,b=4>{a}", 8)
    with pytest.raises(ValueError, match="not known here"):
        replica_groups("mesh['a'=2,'b'=2, device_ids=([2,2]T(1,0))] {'a'}", 4)


def test_groups_by_axes_of_a_mesh():
    assert replica_groups("mesh['x'=2,'y'=4] {'y'}", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    order = ", device_ids=([4,2]T(1,0))"
    assert replica_groups(f"mesh['x'=2,'y'=4]{order} {{'y'}}", 8) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert replica_groups("mesh['x'=2,'y'=4] {'x'}", 8) == ((0, 4), (1, 5), (2, 6), (3, 7))
    (everyone,) = replica_groups("mesh['x'=2,'y'=4] {'y','x'}", 8)
    assert sorted(everyone) == list(range(8))
    assert replica_groups("mesh['x'=2,'y'=4] {'y':(2)2}", 8) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert replica_groups("mesh['x'=2,'y'=4] {y:(1)2}", 8) == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_pairs_leave_out_those_who_talk_to_themselves():
    assert pairs("{{0,1},{1,0},{2,2}}") == ((0, 1), (1, 0))


def test_groups_between_slices():
    assert megascale_target('"{1,2}x{0:1}"') == ((100000, 200000), (100001, 200001))
    assert megascale_target("{{100000,300000},{200000,400000}}") == (
        (100000, 300000),
        (200000, 400000),
    )
    assert megascale_target("{{100000->200000},{200000->100000}}") == (
        (100000, 200000),
        (200000, 100000),
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[2,8]<=[2,4,2]T(2,0,1)", ("data", "fsdp")),
        ("[1,16]<=[16]", ("data", "fsdp", "tensor")),
        ("[8,2]<=[2,2,2,2]T(0,1,3,2)", ("fsdp",)),  # half of the axis
        ("[16,1]<=[16]", ()),
    ],
)
def test_axes_of_groups(groups, axes):
    assert MESH.axes(replica_groups(groups, 16)) == axes


def test_axes_of_pairs():
    ring = "".join(f"{{{2 * i},{2 * ((i + 1) % 4)}}}," for i in range(4))
    assert MESH.axes(pairs(ring)) == ("fsdp",)


def test_several_slices():
    """A program for one slice of two: its numbers count that slice's devices, in mesh order."""
    place = Placement(
        ("fsdp", "slice"), (2, 2), ids=(100000, 200000, 100001, 200001), slices=(0, 1, 0, 1)
    )
    assert place.across_slices == ("slice",)
    inside = place.of_locals(((0, 1),), 2)
    assert (inside, place.axes(inside)) == (((0, 2),), ("fsdp",))
    between = place.of_ids(megascale_target('"{1,2}x{0:1}"'))
    assert (between, place.axes(between)) == (((0, 1), (2, 3)), ("slice",))
