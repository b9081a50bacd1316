"""Programs written by hand: what the compiler's text says, and what is made of it."""

from __future__ import annotations

import pytest

from configs.errors import InputError
from tools.plan.hlo import analyse, stem
from tools.plan.hlo_text import read
from tools.plan.placement import Placement

LOOP = """HloModule loop, is_scheduled=true, num_partitions=4

%body (s: (s32[], f32[8,16], f32[16,16])) -> (s32[], f32[8,16], f32[16,16]) {
  %s = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} get-tuple-element(%s), index=2
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %z = f32[8,16]{1,0:T(8,128)} all-reduce(%y), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/f32[16,16]{1,0:T(8,128)S(1)}) tuple(%next, %z, %w)
}

%condition (s.1: (s32[], f32[8,16], f32[16,16])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8,16], b: f32[16,16], n: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = f32[16,16]{1,0:T(8,128)S(1)} parameter(1)
  %n = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(START)
  %state = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)S(1)}) tuple(%start, %a, %b)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[16,16]{1,0:T(8,128)S(1)}) while(%state), condition=%condition, body=%body, metadata={op_name="jit(f)/while" stack_frame_id=3}
  ROOT %out = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
COUNTED = LOOP.replace("LIMIT", "8").replace("START", "%zero")
BY_DATA = LOOP.replace("LIMIT", "8").replace("START", "%n")


def test_a_counted_loop():
    found = analyse(COUNTED, Placement(("a", "b"), (2, 2)))
    assert found.loops == (("jit(f)/while", 4),)  # 1, 3, 5, 7
    assert found.matmul_flops == 4 * 2 * 8 * 16 * 16
    # the product and the sum each read and write x in HBM; w is on the chip
    assert found.hbm_bytes == 4 * 4 * (8 * 16 * 4)
    (row,) = found.collectives
    assert (row.kind, row.axes, row.devices, row.op, row.dtype) == (
        "all-reduce",
        ("a",),
        2,
        "while",
        "f32",
    )
    assert (row.count, row.sent) == (4, 4 * 2 * (1 / 2) * 8 * 16 * 4)


def test_a_loop_that_depends_on_data_needs_a_number():
    with pytest.raises(InputError, match=r"loop loop \(jit\(f\)/while\).*loops=\{'loop': N\}"):
        analyse(BY_DATA)
    assert analyse(BY_DATA, loops={"while": 3}).loops == (("jit(f)/while", 3),)


def test_a_count_that_the_compiler_wrote_is_believed():
    told = ', backend_config={"known_trip_count":{"n":"5"}}'
    text = BY_DATA.replace(" stack_frame_id=3}", "}" + told)
    assert analyse(text).loops == (("jit(f)/while", 5),)


def test_a_convolution():
    """Strides, padding, holes and groups of features: places of the kernel that meet an input."""
    text = """HloModule m

ENTRY %main (x: f32[3,32,48,64], w: f32[3,5,16,128]) -> f32[3,16,44,128] {
  %x = f32[3,32,48,64]{3,2,1,0} parameter(0)
  %w = f32[3,5,16,128]{3,2,1,0} parameter(1)
  ROOT %y = f32[3,16,44,128]{3,2,1,0} convolution(%x, %w), window={size=3x5 stride=2x1 pad=0_1x2_2 rhs_dilate=1x2}, dim_labels=b01f_01io->b01f, feature_group_count=4
}
"""  # noqa: E501
    rows = sum(2 * out + k < 32 for out in range(16) for k in range(3))
    columns = sum(0 <= out + 2 * k - 2 < 48 for out in range(44) for k in range(5))
    assert rows < 16 * 3 and columns < 44 * 5
    assert analyse(text).matmul_flops == 2 * (3 * 128) * 16 * rows * columns


def test_an_instruction_may_span_lines():
    module = read(
        """HloModule m

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/pallas_call"}, backend_config={"custom_call_config":{"body":"%x = ("}}
}
"""  # noqa: E501
    )
    kernel = module["main"]["k"]
    assert kernel.op_name == "jit(f)/pallas_call"
    assert kernel.operands == ("a",)
    assert "block_q" in (kernel.attribute("frontend_attributes") or "")


def test_a_gather_on_the_sparsecores():
    """Another thread's computation ends otherwise, and rows looked up are not the whole table."""
    text = """HloModule m

%rows (t: f32[50000,128], i: s32[64]) -> f32[64,128] {
  %t = f32[50000,128]{1,0:T(8,128)} parameter(0)
  %i = s32[64]{0:T(128)} parameter(1)
  ROOT %g = f32[64,128]{1,0:T(8,128)} custom-call(%t, %i), custom_call_target="TODO(b/1)"
}, execution_thread="sparsecore"

ENTRY %main (table: f32[50000,128], ids: s32[64]) -> f32[64,128] {
  %table = f32[50000,128]{1,0:T(8,128)} parameter(0)
  %ids = s32[64]{0:T(128)} parameter(1)
  %start = ((), (), (s32[8]{0:S(2)})) async-start(), async_execution_thread="sparsecore", calls=%rows
  %update = ((f32[50000,128]{1,0:T(8,128)}, s32[64]{0:T(128)}), f32[64,128]{1,0:T(8,128)}, (s32[8]{0:S(2)})) async-update(%start, %table, %ids)
  ROOT %done = f32[64,128]{1,0:T(8,128)} async-done(%update)
}
"""  # noqa: E501
    assert analyse(text).hbm_bytes == 2 * 64 * 128 * 4


def test_members_of_tuples_in_short():
    """As jaxlib 0.12 has them printed."""
    short = LOOP.replace("LIMIT", "9").replace("START", "%zero")
    long = analyse(short)
    for tuple_, name, index in (("s", "i", 0), ("s", "x", 1), ("s", "w", 2), ("s.1", "i.1", 0)):
        lines = short.splitlines()
        lines = [line for line in lines if f"%{name} = " not in line or "element" not in line]
        short = "\n".join(lines).replace(f"%{name}, ", f"%{tuple_}#{index}, ")
        short = short.replace(f", %{name})", f", %{tuple_}#{index})")
    assert "%s#1, %s#2" in short and "%s.1#0" in short
    assert analyse(short) == long


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("hello")


def test_a_stem_has_no_wrappers():
    path = "jit(step)/shard_map/transpose(jvp())/while/body/closed_call/checkpoint/all_gather"
    assert stem(path) == "transpose(jvp())/while/checkpoint/all_gather"
