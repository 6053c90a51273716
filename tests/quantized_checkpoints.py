"""Quantized checkpoints made by hand: random tensors in a format's layout, packed bit by bit here and not by the
library, with the weights they stand for; and models saved with such tensors in place of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_paged  # noqa: F401  (puts its quantizers in transformers' mapping)
from hf_paged.quant.linear import QuantLinear


def bit_stream(values: Tensor, bits: int) -> Tensor:
    """Values [rows, n] -> int32 [rows, bits n / 32]: the bits of a row one after the other, lowest first."""
    every = (values.numpy().astype(np.uint32)[..., None] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    packed = np.packbits(every.reshape(len(values), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").copy())


def random_scales(*shape: int, of: int, dtype=torch.float16) -> Tensor:
    """Scales that give weights of K = `of` features a size at which a tiny model has clear winners, at 4 bits."""
    return ((torch.rand(shape) + 0.5) * 0.25 / of**0.5).to(dtype)


def gptq_layer(
    N: int,
    K: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    sym: bool = False,
    act_order: bool = False,
    version: str = "gptq",
    dtype=torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, W [N, K]). Zero points run from 1 on, from 0 in version 2."""
    size = K if group_size == -1 else group_size
    groups = K // size
    q = torch.randint(1 << bits, (K, N))
    first = 0 if version == "gptq_v2" else 1
    z = torch.full((groups, N), 1 << bits - 1) if sym else torch.randint(first, 1 << bits, (groups, N))
    scales = (random_scales(groups, N, of=K, dtype=torch.float32) * 2.0 ** (4 - bits)).to(dtype)
    g_idx = torch.arange(K) // size
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
    tensors = {
        "qweight": bit_stream(q.T, bits).T.contiguous(),
        "qzeros": bit_stream(z - first, bits),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, (scales.float()[g_idx] * (q - z[g_idx])).T


def awq_layer(
    N: int, K: int, *, group_size: int = 16, sym: bool = False, version: str = "gemm", dtype=torch.float16
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, W [N, K])"""
    size = K if group_size == -1 else group_size
    groups = K // size
    q = torch.randint(16, (K, N))
    z = torch.full((groups, N), 8) if sym else torch.randint(16, (groups, N))
    scales = random_scales(groups, N, of=K, dtype=dtype)
    weight = (scales.float().repeat_interleave(size, 0) * (q - z.repeat_interleave(size, 0))).T
    if version == "gemm":
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column in each field

        def along_columns(values: Tensor) -> Tensor:
            return bit_stream(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape), 4)

        return {"qweight": along_columns(q), "qzeros": along_columns(z), "scales": scales}, weight
    multiple = {32: 32, 64: 16}.get(size, 8)
    padding = (0, -groups % multiple)
    zeros, scales = (torch.nn.functional.pad(tensor.T, padding) for tensor in (z, scales))
    return {"qweight": bit_stream(q.T, 4), "qzeros": bit_stream(zeros, 4), "scales": scales}, weight


def fields(values: Tensor, bits: int, offset: int) -> Tensor:
    """Values [rows, n] plus `offset` -> int32 [rows, words], as many whole fields in a word as there is room for."""
    count = 32 // bits
    padded = torch.nn.functional.pad(values + offset, (0, -values.shape[1] % count)).reshape(len(values), -1, count)
    words = (padded.long() << bits * torch.arange(count)).sum(-1)
    return (words - (words >> 31) * 2**32).to(torch.int32)


def packed_layer_of_ct(
    N: int,
    K: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    sym: bool = True,
    act_order: bool = False,
    dtype=torch.bfloat16,
) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' pack-quantized: (tensors, W [N, K])"""
    size = K if group_size == -1 else group_size
    half = 1 << bits - 1
    q, scale = (
        torch.randint(-half, half, (N, K)),
        random_scales(N, K // size, of=K, dtype=torch.float32) * 2.0 ** (4 - bits),
    )
    scale = scale.to(dtype)
    z = torch.zeros(N, K // size, dtype=torch.long) if sym else torch.randint(-half, half, (N, K // size))
    g_idx = torch.arange(K) // size
    tensors = {"weight_packed": fields(q, bits, half), "weight_scale": scale, "weight_shape": torch.tensor([N, K])}
    if act_order:
        g_idx = g_idx[torch.randperm(K)]
        tensors["weight_g_idx"] = g_idx.to(torch.int32)
    if not sym:
        tensors["weight_zero_point"] = fields(z.T, bits, half).T.contiguous()
    return tensors, scale.float()[:, g_idx] * (q - z[:, g_idx])


def eight_bit_layer(
    N: int,
    K: int,
    *,
    kind: str = "fp8",
    block: tuple[int | None, int | None] = (1, None),
    name: str = "weight_scale",
    shape: tuple[int, ...] | None = None,
    asym: bool = False,
    dtype=torch.float32,
) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, W [N, K]) with a scale for each `block`, stored in `shape` (None: [blocks of rows, blocks of columns])."""
    rows, columns = block[0] or N, block[1] or K
    grid = -(-N // rows), -(-K // columns)

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]

    q = torch.randint(-127, 128, (N, K)) if kind == "int8" else torch.randn(N, K) * 60
    q = q.to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    scale = (random_scales(*grid, of=K, dtype=torch.float32) / 16).to(dtype)
    weight = q.float()
    tensors = {"weight": q, name: scale.reshape(grid if shape is None else shape)}
    if asym:
        z = torch.randint(-20, 20, grid)
        tensors["weight_zero_point"] = z.to(torch.int8)
        weight = weight - spread(z)
    return tensors, spread(scale.float()) * weight


Maker = Callable[[str, int, int], "tuple[dict[str, Tensor], Tensor] | None"]


# What a checkpoint calls the parts of an expert (gate, up, down), and the layer of experts.
EXPERTS = {
    "mixtral": ("w1", "w3", "w2", "block_sparse_moe"),
    "": ("gate_proj", "up_proj", "down_proj", "mlp"),
}


def save_quantized(
    model,
    folder: Path,
    config: dict | None,
    make: Maker,
    *,
    shards: int = 1,
    biases: bool = False,
    head: bool = False,
) -> None:
    """Save a model with the tensors of `make(name, N, K)` in place of its linear layers' weights (None: as it is).

    The model gets the weights they stand for, so it is what the checkpoint's logits are compared with.

    Args:
        shards: number of files.
        biases: give every quantized layer without a bias one of zeros, as auto-gptq does.
        head: quantize the head too.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.")}
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.data
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "lm_head" and not head:
            continue
        own = module.weight.T if isinstance(module, Conv1D) else module.weight
        made = make(name, *own.shape)
        if made is not None:
            tensors, weight = made
            own.data.copy_(weight)
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
            if biases and module.bias is None:
                state[f"{name}.bias"] = torch.zeros(len(weight))
    state = _with_experts_apart(model, state, make)
    folder.mkdir(exist_ok=True)
    save_files(state, folder, shards)
    model.config.architectures = [type(model).__name__]
    settings = model.config.to_dict() | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(settings))
    model.generation_config.save_pretrained(folder)


def _with_experts_apart(model, state: dict[str, Tensor], make: Maker) -> dict[str, Tensor]:
    """Stacked experts as checkpoints have them, one by one."""
    *parts, layer = EXPERTS.get(model.config.model_type, EXPERTS[""])
    stacks = {name: module for name, module in model.named_modules() if hasattr(module, "gate_up_proj")}
    for name, module in stacks.items():
        if not isinstance(module.gate_up_proj, nn.Parameter):
            continue
        half = module.gate_up_proj.shape[1] // 2
        for expert in range(len(module.gate_up_proj)):
            gate_up, down = module.gate_up_proj.data[expert], module.down_proj.data[expert]
            for part, own in zip(parts, (gate_up[:half], gate_up[half:], down)):
                made = make(f"{name}.{expert}.{part}", *own.shape)
                tensors = {"weight": own.clone()} if made is None else made[0]
                state |= {f"{name}.{expert}.{part}.{key}": tensor for key, tensor in tensors.items()}
                if made is not None:
                    own.copy_(made[1])
        del state[f"{name}.gate_up_proj"], state[f"{name}.down_proj"]
    return {name.replace(".mlp.", f".{layer}."): tensor for name, tensor in state.items()}


def save_files(state: dict[str, Tensor], folder: Path, shards: int = 1, stem: str = "model") -> None:
    if shards == 1:
        return save_file(state, folder / f"{stem}.safetensors", {"format": "pt"})
    names, weight_map = sorted(state), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]  # the tensors of a layer lie in different files
        save_file({name: state[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def packed_layer(format, tensors: dict[str, Tensor], N: int, K: int) -> QuantLinear:
    """A layer that these tensors were loaded into."""
    layer = QuantLinear(K, N, False, format, like=tensors)
    layer.load_state_dict(tensors, assign=True)
    layer.pack_()
    return layer


def assert_layer(format, tensors: dict[str, Tensor], weight: Tensor) -> QuantLinear:
    """The layer of these tensors stands for `weight`, multiplies by it, and gives the same tensors back."""
    N, K = weight.shape
    layer = packed_layer(format, tensors, N, K)
    assert torch.equal(layer.dequantize(), weight)
    state = layer.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(state[name], tensor), name
    if layer.quantized.activations is None:
        x = torch.randn(3, K)
        torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)
    return layer


def same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first, second)


PROMPT = torch.tensor([[5, 9, 11, 40, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 3, 4, 5, 6, 7, 8]])


def source(label: str = "llama", **overrides):
    """A tiny model to be quantized."""
    return tiny_model(label, **dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2) | overrides)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def assert_same_model(loaded, expected):
    torch.testing.assert_close(logits(loaded), logits(expected), atol=1e-4, rtol=1e-4)


def quantized_names(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
