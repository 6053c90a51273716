"""Inline assembly for Triton's interpreter, which has none: the PTX instructions that kernels use, on numpy arrays."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
from triton.runtime.interpreter import TensorHandle

FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
    """Takes the place of a method of `InterpreterBuilder`; registers are of 32 bits."""
    shape = values[0].data.shape
    inputs = [register for value in values for register in _registers(value.data, pack)]
    results = _run(asm, constraints.count("="), inputs)
    handles = []
    for type_ in types:
        bits = type_.scalar.primitive_bitwidth
        taken, results = results[: pack * bits // 32], results[pack * bits // 32 :]
        elements = np.stack(taken, -1).reshape(-1).view(f"uint{bits}").view(f"int{bits}")
        handles.append(TensorHandle(elements.reshape(shape), type_.scalar))
    assert not results, "more registers are written than the types of the results have"
    return SimpleNamespace(get_result=lambda index: handles[index])


def _registers(data: np.ndarray, pack: int) -> list[np.ndarray]:
    """Each element's group of `pack` as registers, uint32 [groups] each."""
    words = np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32)
    return list(words.T)


def _run(asm: str, num_outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    registers = {f"${num_outputs + index}": value for index, value in enumerate(inputs)}

    def operand(text: str):
        return registers[text] if text in registers else np.full_like(inputs[0], int(text, 0))

    for statement in filter(None, (part.strip() for part in re.sub(r"[{}\n]", " ", asm).split(";"))):
        name, _, arguments = statement.partition(" ")
        if name != ".reg":
            target, *sources = (part.strip() for part in arguments.split(","))
            registers[target] = _instruction(name, [operand(source) for source in sources])
    return [registers[f"${index}"] for index in range(num_outputs)]


def _instruction(name: str, of: list[np.ndarray]) -> np.ndarray:
    operation, kind = name.split(".")[0], name.split(".")[-1]
    if operation == "mov":
        return of[0]
    if operation == "shr":
        return of[0] >> of[1]
    if operation == "and":
        return of[0] & of[1]
    if operation == "xor":
        return of[0] ^ of[1]
    if operation == "lop3":
        return _lop3(*of[:3], int(of[3][0]))
    if operation == "prmt":
        return _prmt(of[0], of[1], int(of[2][0]))
    if name.startswith("fma.rn."):
        a, b, c = (_pairs(value, FLOATS[kind]) for value in of)
        rounded = torch.from_numpy(a * b + c).to(FLOATS[kind])
        return rounded.view(torch.int16).numpy().view(np.uint32)[:, 0]
    raise NotImplementedError(f"PTX instruction {name}")


def _pairs(register: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 [groups, 2]"""
    halves = np.ascontiguousarray(register).view(np.int16).reshape(-1, 2)
    return torch.from_numpy(halves).view(dtype).double().numpy()


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Bit i of the table is the result where the bits of a, b, c make up the number i."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """Byte i of the result is the byte of (a, b) that the selector's digit i names."""
    result = np.zeros_like(a)
    for place in range(4):
        digit = selector >> 4 * place & 15
        assert digit < 8, "the replication of signs is not here"
        result |= ((a if digit < 4 else b) >> np.uint32(8 * (digit & 3)) & np.uint32(255)) << np.uint32(8 * place)
    return result
