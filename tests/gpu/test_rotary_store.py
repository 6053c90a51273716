"""rotary_store: the Triton kernel against the separate references, and on every backend the same cache."""

from __future__ import annotations

import pytest
import torch

from hf_paged_kernels import ops
from hf_paged_kernels.norm import Norm

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place, relative: the sum of squares in another order may move a rounding by one.
STEP = {torch.float32: 2.4e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Call:
    """Arguments of one call: query, key and value are views of one merged projection; two tokens are not written."""

    def __init__(
        self, device, *, tokens=5, heads=(6, 2), dims=(32, 32), rotated=32, block_size=16, dtype=torch.bfloat16,
        cache_dtype=None, norm=None,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(tokens + sum(dims))

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        (q_heads, kv_heads), (k_dim, v_dim) = heads, dims
        sizes = [q_heads * k_dim, kv_heads * k_dim, kv_heads * v_dim]
        qkv = normal(tokens, sum(sizes)) * torch.logspace(-3, 2, tokens)[:, None].to(device, dtype)
        self.query, self.key, self.value = (
            part.unflatten(1, (-1, dim)) for part, dim in zip(qkv.split(sizes, 1), (k_dim, k_dim, v_dim))
        )
        self.slots = torch.randperm(4 * block_size, generator=generator)[:tokens].to(device)
        self.slots[1:3] = -1
        self.cos = self.sin = None
        if rotated:
            angles = torch.randn(tokens, rotated // 2, generator=generator) * 3
            angles = torch.cat((angles, angles), 1)
            self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        self.norms = {}
        if norm is not None:
            for name in ("q_norm", "k_norm"):
                self.norms[name] = norm._replace(weight=normal(k_dim) if norm.weight is None else None)
        self.cache = dict(num_blocks=4, num_kv_heads=kv_heads, k_head_dim=k_dim, v_head_dim=v_dim,
                          block_size=block_size, dtype=cache_dtype or dtype, device=device)  # fmt: skip

    def run(self, backend, layout=None):
        """(queries, keys [N, Hkv, Dk, block_size], values); slots that were not written hold 7."""
        k_cache, v_cache = ops.allocate_kv(**self.cache, backend=layout or backend)
        k_cache.fill_(7)
        v_cache.fill_(7)
        query = ops.rotary_store(self.query, self.key, self.value, k_cache, v_cache, self.slots, self.cos, self.sin,
                                 **self.norms, backend=backend)  # fmt: skip
        assert query.is_contiguous()
        return query, k_cache, v_cache


def assert_equal(call, actual, expected, exact=False):
    for a, e in zip(actual, expected):
        assert a.dtype == e.dtype and a.shape == e.shape
        if exact:
            assert torch.equal(a, e)
        else:
            scale = STEP[call.query.dtype]
            torch.testing.assert_close(a.float(), e.float(), rtol=2 * scale, atol=2 * scale)
            assert (a == e).float().mean() > 0.98 or call.query.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(heads=(6, 2)),  # heads that are no power of two
        dict(heads=(20, 1), dims=(16, 16), rotated=16, tokens=3),  # several programs of query heads
        dict(heads=(2, 2), dims=(48, 24), rotated=48),  # sizes that are no power of two, values of another size
        dict(heads=(4, 2), dims=(80, 80), rotated=32),  # partial rotary
        dict(heads=(4, 2), rotated=0),
        dict(heads=(3, 1), dims=(33, 5), rotated=0),
    ],
    ids=str,
)
def test_rotary_and_write(device, sizes, dtype):
    call = Call(device, dtype=dtype, **sizes)
    assert_equal(call, call.run("triton"), call.run("reference"), exact=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cast", ["weight_after", "weight_before"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_round_where_the_modules_round(device, dtype, cast, offset):
    call = Call(device, dtype=dtype, norm=Norm(None, 1e-6, offset, cast), heads=(4, 2), dims=(40, 40), rotated=24)
    expected = call.run("reference")
    assert_equal(call, call.run("triton"), expected)
    if dtype == torch.bfloat16:  # and the other rounding is another result
        for name, norm in call.norms.items():
            call.norms[name] = norm._replace(cast="weight_before" if cast == "weight_after" else "weight_after")
        assert (call.run("triton")[0] == expected[0]).float().mean() < 0.95


@pytest.mark.parametrize("rotated", [0, 32])
def test_norms_without_a_weight_and_of_keys_alone(device, rotated):
    call = Call(device, norm=Norm(torch.empty(0), 1e-5), rotated=rotated)
    assert call.norms["k_norm"].weight is None
    assert_equal(call, call.run("triton"), call.run("reference"))
    del call.norms["q_norm"]
    assert_equal(call, call.run("triton"), call.run("reference"))


def test_slots_of_minus_one_are_not_written(device):
    call = Call(device)
    _, k_cache, v_cache = call.run("triton")
    written = torch.zeros(4 * 16, dtype=torch.bool, device=device)
    written[call.slots[call.slots >= 0]] = True
    assert torch.equal((k_cache != 7).any(2).any(1).flatten(), written)
    assert torch.equal((v_cache != 7).any(3).any(1).flatten(), written)


@pytest.mark.parametrize("layout", ["triton", "cpu"])
def test_any_layout_and_dtype_of_the_cache(device, layout):
    call = Call(device, dtype=torch.bfloat16, cache_dtype=torch.float32)
    if device.type == "cuda" and layout == "cpu":
        layout = "reference"
    assert_equal(call, call.run("triton", layout), call.run("reference", layout), exact=True)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("sizes", [dict(), dict(dims=(48, 24), rotated=24), dict(norm=Norm(None, 1e-6))], ids=str)
def test_quantized_caches(device, sizes, cache_dtype):
    call = Call(device, cache_dtype=cache_dtype, **sizes)
    results = []
    for backend in ("triton", "reference"):
        caches = ops.allocate_kv(**call.cache, backend="triton")
        scales = dict(zip(("k_scale", "v_scale"), ops.allocate_scales(caches[1])))
        ops.rotary_store(call.query, call.key, call.value, *caches, call.slots, call.cos, call.sin, **call.norms,
                         **scales, backend=backend)  # fmt: skip
        blocks = call.slots[call.slots >= 0]
        block, offset = blocks // 16, blocks % 16
        key, value = caches[0].mT[block, :, offset].float(), caches[1][block, :, offset].float()
        results.append((key, value, scales["k_scale"][block, :, offset], scales["v_scale"][block, :, offset]))
    (key, value, *scales), expected = results
    for scale, want in zip(scales, expected[2:]):  # a norm may round differently by a step of bf16
        torch.testing.assert_close(scale, want, rtol=2**-6 if call.norms else 1e-6, atol=0)
    for x, want, scale, want_scale in zip((key, value), expected, scales, expected[2:]):
        x, want = x * scale[..., None], want * want_scale[..., None]
        torch.testing.assert_close(x, want, rtol=2**-3 if call.norms else 1e-6, atol=want.abs().max().item() * 1e-2)
    if not call.norms:
        assert all(torch.equal(x, want) for x, want in zip((key, value), expected))


def test_no_tokens_are_no_work(device):
    call = Call(device, tokens=4)
    call.query, call.key, call.value = call.query[:0], call.key[:0], call.value[:0]
    call.slots, call.cos, call.sin = call.slots[:0], call.cos[:0], call.sin[:0]
    query, k_cache, _ = call.run("triton")
    assert query.shape == (0, 6, 32) and (k_cache == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cos=torch.ones(5, 34, dtype=torch.bfloat16)), "cos must be .* R even and at most 32"),
        (dict(sin=torch.ones(4, 32, dtype=torch.bfloat16)), "sin must be"),
        (dict(sin=None), "both be given"),
        (dict(cos=torch.ones(5, 32)), "cos must be torch.bfloat16"),
        (dict(slots=torch.zeros(3, dtype=torch.int64)), "slot_mapping has 3 rows"),
        (dict(query=torch.ones(5, 6, 16, dtype=torch.bfloat16)), "query is"),
        (dict(query=torch.ones(5, 32, 6, dtype=torch.bfloat16).mT), "query must be contiguous in its last"),
        (dict(norms=dict(q_norm=Norm(torch.ones(16, dtype=torch.bfloat16), 1e-5))), "q_norm.weight must be"),
        (dict(norms=dict(k_norm=Norm(None, 1e-5, 0.0, "never"))), "k_norm.cast 'never'"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    call = Call(torch.device("cpu"))
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        call.run("reference")
