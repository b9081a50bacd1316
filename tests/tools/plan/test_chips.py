"""Names of slices, and what they stand for."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from tools.plan.chips import CHIPS, parse


@pytest.mark.parametrize(
    ("name", "canonical", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),  # 128 TensorCores
        ("v5p-256", "v5p:4x4x8", 128),
        ("v4-8", "v4:2x2x1", 4),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-256", "v5e:16x16", 256),
        ("2xv6e-256", "2xv6e:16x16", 512),
        ("TPU7x:4x4x4", "v7x:4x4x4", 128),  # two devices a chip
    ],
)
def test_names(name, canonical, devices):
    found = parse(name)
    assert (found.name, found.devices) == (canonical, devices)
    assert parse(found.name) == found


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5p-127", "v5p-128"),
        ("v5q:4x4x4", "v5p:4x4x4"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("2xv6e-265", "v6e-256"),
        ("v5e:2x4x2", "v5e:4x4"),
        ("h100-8", "v"),
        ("", "v"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(InputError, match=f"did you mean {near}"):
        parse(name)


def test_a_pod_has_an_end():
    with pytest.raises(InputError, match="16x16"):
        parse("v5e:32x16")


def test_which_dimensions_close():
    assert [parse("v5e:8x16").wraps(dim) for dim in (0, 1)] == [False, True]
    assert all(parse("v5p:4x4x8").wraps(dim) for dim in range(3))
    assert not any(parse("v5p:2x4x4").wraps(dim) for dim in range(3))


def test_devices_are_known_by_their_kind():
    assert len({chip.kind for chip in CHIPS.values()}) == len(CHIPS)
