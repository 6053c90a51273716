"""Repairs of Triton's interpreter, found wrong in 3.6.0 and, but for the first, in 3.9.0. Importing applies them.

1. With numpy 2.4 a loop bound that is only known at run time raises "only 0-dimensional arrays can be converted".
2. tl.dot on bfloat16 multiplies the raw 16-bit integers.
3. Casts to fp8 lose the carry when rounding up.
4. Casts from float32 to bfloat16 cut off instead of rounding.
5. Infinities and NaN that a GPU computes without a word come with numpy's warnings.
6. tl.fma rounds its product.
7. A comparison of scalars, spread over a block, becomes numbers, which 3.9.0 does not take as a mask.
8. Casts from e4m3, in tl.dot too, take NaN for 480.
9. There is no inline assembly: see `ptx_interpreter`.
"""

from __future__ import annotations

import numpy as np
import ptx_interpreter
import torch
import triton.language as tl
from triton.runtime import interpreter

ROUNDED = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
    tl.float8e4b8: (torch.float8_e4m3fnuz, torch.uint8),
}
WIDER = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float16: (torch.float16, torch.uint16),
    tl.float32: (torch.float32, torch.uint32),
}

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot
_create_fma = interpreter.InterpreterBuilder.create_fma
_convert_float = interpreter._convert_float
_create_splat = interpreter.InterpreterBuilder.create_splat
_run_grid = interpreter.GridExecutor.__call__


def patch_lang_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def convert_float(input, input_dtype, output_dtype, rounding_mode):
    if input_dtype == tl.float8e4nv and output_dtype in WIDER:
        values = torch.from_numpy(np.array(input).view(np.uint8)).view(torch.float8_e4m3fn)
        dtype, bits = WIDER[output_dtype]
        return values.to(dtype).view(bits).numpy()
    if output_dtype not in ROUNDED or input_dtype not in (tl.float32, tl.float16, tl.bfloat16):
        return _convert_float(input, input_dtype, output_dtype, rounding_mode)
    values = np.ascontiguousarray(input)
    if input_dtype == tl.bfloat16:
        values = _bf16_to_fp32(values.view(np.uint16))
    else:
        values = values.view(np.float32 if input_dtype == tl.float32 else np.float16)
    dtype, bits = ROUNDED[output_dtype]
    return torch.from_numpy(values.astype(np.float32)).to(dtype).view(bits).numpy()


def run_grid(self, *args, **kwargs):
    with np.errstate(all="ignore"):
        return _run_grid(self, *args, **kwargs)


def create_splat(self, type, scalar):
    block = _create_splat(self, type, scalar)
    if scalar.data.dtype == bool:
        return interpreter.TensorHandle(block.data.astype(bool), tl.int1)
    return block


def create_fma(self, x, y, z):
    if z.dtype.scalar != tl.float32:
        return _create_fma(self, x, y, z)
    exact = x.data.astype(np.float64) * y.data + z.data  # the product is exact, the sum all but
    return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(_bf16_to_fp32(handle.data), tl.float32)


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


interpreter._patch_lang_tensor = patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = create_dot
interpreter.InterpreterBuilder.create_fma = create_fma
interpreter.InterpreterBuilder.create_inline_asm = ptx_interpreter.create_inline_asm
interpreter.InterpreterBuilder.create_splat = create_splat
interpreter._convert_float = convert_float
interpreter.GridExecutor.__call__ = run_grid
