# mypy: allow-untyped-defs
"""Counters in global memory, which programs read and add to. For single warps."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def by_one_lane(instruction, result):
    """Assembly: an instruction on `[$1]` by lane 0, then one by which all lanes get `$0`."""
    return f"""{{
        .reg .b32 lane;
        .reg .pred first;
        mov.u32 lane, %laneid;
        setp.eq.u32 first, lane, 0;
        @first {instruction}
        {result}
        }}"""


@gluon.jit
def assembly(TEXT: gl.constexpr, p_counter):
    """Run inline assembly on a counter `[$1]`; returns `$0`."""
    return gl.inline_asm_elementwise(
        TEXT, "=r,l", [p_counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def count(p_counter):
    """Add 1; returns the number before. Orders nothing else."""
    TEXT: gl.constexpr = by_one_lane(
        "atom.global.gpu.relaxed.add.s32 $0, [$1], 1;", "shfl.sync.idx.b32 $0, $0, 0, 31, -1;"
    )
    return assembly(TEXT, p_counter)


@gluon.jit
def release(p_counter):
    """Add 1 once all programs see what was written before."""
    TEXT: gl.constexpr = by_one_lane("red.release.gpu.global.add.s32 [$1], 1;", "mov.b32 $0, 0;")
    assembly(TEXT, p_counter)


@gluon.jit
def acquire(p_counter):
    """Load the number in acquire order: what was written before its release is seen."""
    return assembly("ld.acquire.gpu.global.s32 $0, [$1];", p_counter)
