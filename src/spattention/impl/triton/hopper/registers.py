# mypy: allow-untyped-defs
"""Ways to keep values out of registers, of which `fused_backward.py` has none to spare."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def packing(dtype):
    """The instruction that rounds two numbers to half precision."""
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.constexpr_function
def unpacking(dtype):
    """The instructions that widen two numbers in half precision."""
    if dtype == gl.bfloat16:
        return "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return "{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}"


@gluon.jit
def packed(b_tile, s_like):
    """A tile in the half precision of `s_like`, two numbers in a register."""
    return gl.inline_asm_elementwise(
        packing(s_like.dtype), "=r,r,r", [b_tile], dtype=s_like.dtype, is_pure=True, pack=2
    )


@gluon.jit
def unpacked(b_tile):
    """A packed tile in float32. With Triton's own cast each half would take a register until
    then.
    """
    return gl.inline_asm_elementwise(
        unpacking(b_tile.dtype), "=&r,=r,r", [b_tile], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def hidden_zero(step):
    """0 in a step of a loop, unknown to the compiler, which would otherwise keep all that follows
    from a constant in registers through the loop.
    """
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 31;", "=r,r", [step], dtype=gl.int32, is_pure=True, pack=1
    )
