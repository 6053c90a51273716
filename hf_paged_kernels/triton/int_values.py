"""Whole numbers of 2 to 8 bits as bf16 or fp16, without a conversion: GPUs do few of those at a time.

A value q among the low bits of 2^7 (bf16) or 2^10 (fp16) is 128 + q or 1024 + q, exactly, and so is the difference to
the zero point: `|q - zero|` up to 256 fits either type. Two neighbours, 16 bits each, are handled by every instruction.
That takes PTX, which says what is to happen to a pair; elsewhere the same is written in plain operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..quantized import BITS, FIELDS
from .dequantize import small_float

# What values are added to, as bits and as a number, and the type of pairs.
_MAGIC = {torch.bfloat16: (0x4300, 128, "bf16x2"), torch.float16: (0x6400, 1024, "f16x2")}


def extraction(kind: str, dtype: torch.dtype) -> tuple[str, int]:
    """(PTX that takes a register of values apart into pairs of floats, what must be subtracted from these).

    Of a packed kind a register is half a word and half its neighbour; there is a pair of floats for each field in it.
    Of int8 it is four values, and there are two pairs: two neighbours each.
    """
    bits, number, pair = _MAGIC[dtype]
    magic = f"0x{bits:04x}{bits:04x}"
    if kind == "int8":
        return (_int8_to_bf16(), 0) if dtype == torch.bfloat16 else (_int8_to_fp16(), number + 128)
    count, width = FIELDS[kind] // 2, BITS[kind]
    mask = (1 << width) - 1
    lines = []
    for field in range(count):
        source = f"${count}"
        if field:
            lines.append(f"shr.b32 t, ${count}, {field * width};")
            source = "t"
        lines.append(f"lop3.b32 ${field}, {source}, 0x{mask:04x}{mask:04x}, {magic}, 0xea;")
    return "{\n.reg .b32 t;\n" + "\n".join(lines) + "\n}", number


def subtraction(dtype: torch.dtype) -> str:
    """PTX for pairs $1 + $2: a product with 1 and a sum, for what sm_80 has."""
    one = "0x3f803f80" if dtype == torch.bfloat16 else "0x3c003c00"
    return "{\n.reg .b32 one;\nmov.b32 one, " + one + f";\nfma.rn.{_MAGIC[dtype][2]} $0, $1, one, $2;\n" + "}"


def _int8_to_bf16() -> str:
    """Beside 0x43 the sign bit is the exponent's last: 128 + m, or set 256 + 2 m; the value is 128 + m less 128 or 256."""
    lines = ["{", ".reg .b32 a, b, one;", "mov.b32 one, 0x3f803f80;"]
    for index, (low, high) in enumerate(((0, 1), (2, 3))):
        lines += [
            f"prmt.b32 ${index}, $2, 0x43, 0x4{high}4{low};",
            f"and.b32 a, ${index}, 0xff7fff7f;",
            f"lop3.b32 b, ${index}, 0xff80ff80, 0x80008000, 0x6a;",
            f"fma.rn.bf16x2 ${index}, a, one, b;",
        ]
    return "\n".join([*lines, "}"])


def _int8_to_fp16() -> str:
    """With the sign bit turned over a byte is q + 128."""
    lines = ["{", ".reg .b32 t;", "xor.b32 t, $2, 0x80808080;"]
    lines += [f"prmt.b32 ${index}, t, 0x64, 0x4{high}4{low};" for index, (low, high) in enumerate(((0, 1), (2, 3)))]
    return "\n".join([*lines, "}"])


@triton.jit
def less(values, minus, DTYPE: tl.constexpr, SUBTRACT: tl.constexpr):
    """values + minus, which is exact. SUBTRACT: see `subtraction`; "" for plain operations, here as below."""
    if SUBTRACT == "":
        return (values.to(tl.float32) + minus.to(tl.float32)).to(DTYPE)
    minus = tl.broadcast_to(minus, values.shape)
    bits = tl.inline_asm_elementwise(SUBTRACT, "=r,r,r", [values, minus], dtype=tl.int16, is_pure=True, pack=2)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def fields_of_half(half, BITS: tl.constexpr, EXTRACT: tl.constexpr):
    """The fields of half words (int16), lowest first, plus what `extraction` says: a tuple of the floats' bits."""
    if BITS == 4:
        return tl.inline_asm_elementwise(
            EXTRACT, "=r,=r,=r,=r,r", [half], (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
        )
    elif BITS == 3:
        return tl.inline_asm_elementwise(
            EXTRACT, "=r,=r,=r,=r,=r,r", [half], (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            EXTRACT, "=r,=r,=r,=r,=r,=r,=r,=r,r", [half],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def field_of_word(words, field: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """A field of words (int32) in plain operations."""
    return small_float((words >> field * BITS) & (1 << BITS) - 1).to(DTYPE)


@triton.jit
def from_int8(values, DTYPE: tl.constexpr, EXTRACT: tl.constexpr):
    """int8 plus what `extraction` says."""
    if EXTRACT == "":
        return small_float(values.to(tl.int32)).to(DTYPE)
    bits = tl.inline_asm_elementwise(EXTRACT, "=r,=r,r", [values], dtype=tl.int16, is_pure=True, pack=4)
    return bits.to(DTYPE, bitcast=True)
