"""Values of a few bits in int32 words, as checkpoints store them: one stream of bits, from the lowest of each word."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 [..., 32 W / bits]. W is a multiple of the words after which values and words meet again:
    3 of 3 bits (two of their 32 values lie in two words), else 1."""
    blocks = words.unflatten(-1, (-1, _period(bits)))
    mask = (1 << bits) - 1
    values = []
    for word, shift in _places(bits):
        value = blocks[..., word] >> shift
        if shift + bits > 32:
            low = 32 - shift
            value = value & (1 << low) - 1 | blocks[..., word + 1] << low
        values.append((value & mask).to(torch.uint8))
    return torch.stack(values, dim=-1).flatten(-2)


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers [..., n] in [0, 2^bits) -> int32 [..., bits n / 32]; undoes `unpack`."""
    places = _places(bits)
    blocks = values.unflatten(-1, (-1, len(places)))
    words = torch.zeros(*blocks.shape[:-1], _period(bits), dtype=torch.int32, device=values.device)
    for index, (word, shift) in enumerate(places):
        value = blocks[..., index].to(torch.int32)
        words[..., word] |= value << shift
        if shift + bits > 32:
            words[..., word + 1] |= value >> 32 - shift
    return words.flatten(-2)


def _period(bits: int) -> int:
    """Number of words after which a value begins with a word again."""
    return bits // math.gcd(bits, 32)


def _places(bits: int) -> list[tuple[int, int]]:
    """(word, shift) of every value of a period."""
    return [divmod(bits * index, 32) for index in range(_period(bits) * 32 // bits)]
