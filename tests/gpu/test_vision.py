"""Images in the engine on the Triton kernels: stock's own tokens, where an image's tokens see each other, too."""

from __future__ import annotations

import pytest
from tiny_models import tiny_model
from vision_inputs import batch

import hf_paged

ROWS = [[*range(20, 41), [1], 50, [2], 60], [*range(70, 75)], [[4], 80]]


@pytest.mark.parametrize("label", ["llava", "gemma3"])
def test_images_have_stocks_tokens(device, label):
    """In chunks, beside text, and again from cached prefixes."""
    text = dict(num_hidden_layers=2)
    if label == "gemma3":
        text |= dict(query_pre_attn_scalar=12, sliding_window=17, layer_types=["sliding_attention", "full_attention"])
    else:
        text |= dict(model_type="llama")
    model = tiny_model(label, text_config=text).to(device)
    options = dict(max_new_tokens=3, do_sample=False)
    inputs = lambda: {name: value.to(device) for name, value in batch(model, label, ROWS).items()}  # noqa: E731
    expected = model.generate(**inputs(), **options)
    hf_paged.patch(model, block_size=16, max_batch_tokens=24, attention_backend="triton", fuse=False)
    try:
        for _ in range(2):
            assert model.generate(**inputs(), **options).tolist() == expected.tolist()
        assert hf_paged.engine_of(model).stats()["prefix_hit_tokens"] > 0
    finally:
        hf_paged.unpatch(model)
