"""`hf-paged quantize`: GPTQ and AWQ on whole models, saved, loaded and measured."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged import InvalidArgument, UnsupportedModel, cli
from hf_paged.hf.quantize import calibrated
from hf_paged.hf.quantize.calibration import perplexity, read_texts, split, to_sequences
from hf_paged.hf.quantize.run import Recipe, quantize_model
from hf_paged.hf.quantize.spot import quantize_on_the_spot
from hf_paged.hf.quantize.stored import as_awq, as_gptq
from hf_paged.hf.quantize.stream import LayerStream
from hf_paged.hf.quantize.targets import find_targets
from hf_paged.quant.experts import ExpertLayers, QuantExperts
from hf_paged.quant.gptq import Gptq
from hf_paged.quant.linear import QuantLinear
from hf_paged.quant.rounding import Scheme, round_to_nearest

VOCABULARY = 199


def source(label="llama", **overrides):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    if label not in ("phi", "gpt2", "falcon", "opt"):
        sizes["head_dim"] = 16
    return tiny_model(label, **sizes | overrides)


def ids(count, length=32, seed=1):
    """Token ids that come again and again, as in text."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.linspace(1, 0.01, VOCABULARY) ** 3
    return torch.multinomial(chance.expand(count, -1), length, replacement=True, generator=generator)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def error(model, reference, tokens) -> float:
    expected = logits(reference, tokens)
    return ((logits(model, tokens) - expected).norm() / expected.norm()).item()


def quantized(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("label", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "falcon", "olmo2"])
def test_gptq_is_nearer_to_the_model_than_rounding(label, tmp_path):
    model, nearest, reference = source(label), source(label), source(label)
    recipe = Recipe(method="gptq", bits=4, group_size=32)
    report = quantize_model(model, recipe, ids(16), ids(2, seed=2))
    assert len(quantized(model)) == report.layers > 0
    quantize_on_the_spot(nearest, "int4")
    unseen = ids(4, seed=3)
    assert error(model, reference, unseen) < 0.95 * error(nearest, reference, unseen)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), unseen), logits(model, unseen))


@pytest.mark.parametrize("label", ["llama-mha-bias", "qwen2", "gemma2", "phi3", "opt"])
def test_awq_is_nearer_to_the_model_than_rounding_where_channels_have_outliers(label, tmp_path):
    models = [with_outliers(source(label)) for _ in range(3)]
    model, nearest, reference = models
    report = quantize_model(model, Recipe(method="awq", group_size=32), ids(16), ids(2, seed=2))
    assert len(quantized(model)) == report.layers > len(report.unscaled)
    for layer in find_targets(nearest).linears.values():
        round_plainly(layer, report.scheme)
    unseen = ids(4, seed=3)
    assert error(model, reference, unseen) < 0.9 * error(nearest, reference, unseen)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), unseen), logits(model, unseen))


def with_outliers(model):
    """Some channels of every norm's output are much larger than the rest."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.data[::13] = parameter.data[::13].abs() * 20 + 5
    return model


def round_plainly(layer, scheme):
    layer.weight.data.copy_(round_to_nearest(layer.weight.data, scheme).dequantize())


@pytest.mark.parametrize(("label", "groups"), [("llama", 4), ("opt", 4), ("phi", 3)])
def test_layers_see_what_quantized_layers_before_them_give(label, groups):
    """The moments that each layer was rounded with are those of its inputs in the finished model."""
    model, tokens = source(label), ids(6)
    targets = find_targets(model)
    scheme = Scheme(2, 16, zero_from=1)
    seen = {}

    class Spy(LayerStream):
        def moments(self, heads):
            found = super().moments(heads)
            seen.update({name: moments.second for name, moments in found.items()})
            return found

    calibrated.calibrate_gptq(model, Spy(model, tokens), targets, scheme, Gptq(), as_gptq(scheme, []).format, lambda name: None)
    inputs = {}
    for name in seen:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
    logits(model, tokens)
    assert len(seen) == 2 * groups  # llama's: q with k and v, o, gate with up, down; phi's first MLP layer is beside q
    for name, x in inputs.items():
        torch.testing.assert_close(seen[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_awq_scales_change_nothing_but_the_rounding(monkeypatch):
    """With scales folded in and no layer replaced, the model is the model."""
    monkeypatch.setattr(calibrated, "replace", lambda *args: None)
    model, reference = with_outliers(source("llama-mha-bias")), with_outliers(source("llama-mha-bias"))
    norm = model.model.layers[0].input_layernorm.weight.clone()
    scheme, targets = Scheme(4, 16, symmetric=False), find_targets(model)
    format = as_awq(scheme, [], []).format
    unscaled = calibrated.calibrate_awq(model, LayerStream(model, ids(8)), targets, scheme, format, lambda name: None)
    assert not unscaled and not torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert error(model, reference, ids(4, seed=3)) < 1e-4


def test_experts_that_few_tokens_reach_are_scaled_by_what_comes_before_them(monkeypatch):
    """Of 4 experts with 2 tokens a sequence, the first sequence reaches only some."""
    monkeypatch.setattr(calibrated, "replace", lambda *args: None)
    monkeypatch.setattr(calibrated, "stack_experts", lambda *args: None)
    # an expert's gate is as wide as what it reads, so that it could be taken for what comes before another's
    options = dict(hidden_size=32, intermediate_size=64, num_local_experts=8)
    model, reference = source("mixtral", **options), source("mixtral", **options)
    scheme, targets = Scheme(4, 16, symmetric=False), find_targets(model)
    sequences = ids(24, length=2)
    calibrated.calibrate_awq(model, LayerStream(model, sequences), targets, scheme, as_awq(scheme, [], []).format, lambda name: None)
    assert error(model, reference, sequences) < 1e-4


def test_value_heads_shared_by_query_heads_are_scaled_together():
    model = with_outliers(source())
    report = quantize_model(model, Recipe(method="awq", group_size=32), ids(8), ids(2, seed=2))
    assert report.unscaled == []


def test_inputs_that_nothing_can_scale_are_named():
    """An activation that is not linear stands between phi's two MLP layers."""
    report = quantize_model(source("phi"), Recipe(method="awq", group_size=32), ids(8), ids(2, seed=2))
    assert sorted(report.unscaled) == [f"model.layers.{index}.mlp.fc2" for index in range(2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_16_bit_models(method, dtype, tmp_path):
    model, reference = (with_outliers(source(dtype=dtype)) for _ in range(2))
    report = quantize_model(model, Recipe(method=method, group_size=32), ids(8), ids(2, seed=2))
    unseen = ids(2, seed=3)
    assert report.layers == 14 and not report.unscaled and error(model, reference, unseen) < 0.6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), unseen), logits(model, unseen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=270, hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=2)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(folder)
    tiny_tokenizer(270).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return file


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as exited:
        cli.main(["quantize", *map(str, arguments)])
    return exited.value.code or 0


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}),
        (["--bits", 3, "--asym", "--group-size", 16, "--no-act-order"], {"bits": 3, "group_size": 16, "sym": False, "desc_act": False}),
        (["--bits", 8, "--group-size", -1, "--act-order", "--no-static-groups"], {"bits": 8, "group_size": -1, "desc_act": True}),
        (["--format", "fp8"], {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}),
        (["--format", "awq"], {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    ],
)  # fmt: skip
def test_command(folder, text, tmp_path, capsys, options, config):
    out = tmp_path / "out"
    assert run(folder, out, "--calibration", text, "--length", 32, "--sequences", 8, "-q", *options) == 0
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {name: stored[name] for name in config} == config
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert len(quantized(model)) == 14 and tokenizer("fox").input_ids == AutoTokenizer.from_pretrained(folder)("fox").input_ids
    assert model.generation_config.temperature == 0.5
    printed = capsys.readouterr().out
    sequences = to_sequences([text.read_text()], tokenizer, 32)
    after = perplexity(model, split(sequences, 8)[1])
    assert f"{after:.3f} after" in printed and "14 linear layers" in printed
    groups = "rows" if stored.get("group_size", -1) == -1 else f"groups of {stored['group_size']}"
    assert groups in printed
    assert ("groups of 128 do not divide" in printed) == (options in ([], ["--format", "awq"]))


def test_command_shows_progress(folder, text, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--calibration", text, "--length", 32, "--sequences", 4) == 0
    assert "gptq: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "nf4"], "format must be one of"),
        (["--bits", 0], "bits must be one of 2, 3, 4, 8, got 0"),
        (["--bits", 5], "bits must be one of 2, 3, 4, 8, got 5"),
        (["--group-size", 100], "group_size must be -1 or one of"),
        (["--group-size", 0], "group_size must be -1 or one of"),
        (["--damping", 2], "damping must be above 0"),
        (["--format", "awq", "--bits", 3], "bits must be 4 for awq"),
        (["--format", "awq", "--sym"], "AWQ checkpoints have zero points"),
        (["--format", "fp8", "--bits", 4], "bits must be 8 for fp8"),
        (["--format", "fp8", "--group-size", 64], "group_size: fp8 has no such option"),
        (["--format", "awq", "--act-order"], "act_order: awq has no such option"),
        (["--static-groups", "--no-act-order"], "static_groups"),
    ],
)
def test_command_refuses_bad_options_before_it_loads_anything(text, tmp_path, capsys, options, message):
    assert run("no such model", tmp_path / "out", "--calibration", text, *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_command_refuses_bad_files(folder, text, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert run(folder, tmp_path / "full", "--calibration", text) == 2
    assert "full is not empty" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--calibration", tmp_path / "none.txt") == 2
    assert "none.txt: No such file" in capsys.readouterr().err
    text.write_text("too short")
    assert run(folder, tmp_path / "out", "--calibration", text, "-q") == 2
    assert "the text gives 0 sequences of 512 tokens" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe")
    assert run(folder, tmp_path / "out", "--calibration", text, "-q") == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_jsonl(tmp_path):
    tokenizer = tiny_tokenizer(270)
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one"}\n\n{"prompt": "two"}\n')
    assert read_texts(file, tokenizer) == ["one", "two"]
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(InvalidArgument, match="line 1: messages, but this model has no chat template"):
        read_texts(file, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert read_texts(file, tokenizer) == ["user: hi"]
    for line, message in (("{", "not JSON"), ("[]", "not an object"), ('{"other": 1}', 'expected "text"')):
        file.write_text(f'{{"text": "one"}}\n{line}\n')
        with pytest.raises(InvalidArgument, match=f"line 2: {message}"):
            read_texts(file, tokenizer)


def test_sequences():
    """Documents end with the end of text; every sequence begins with the beginning of text if the tokenizer puts it there."""
    tokenizer = tiny_tokenizer(270)
    plain = to_sequences(["ab", "cd"], tokenizer, 3)
    assert plain.shape == (2, 3) and plain[0, 2] == plain[1, 2] == tokenizer.eos_token_id
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun = to_sequences(["ab", "cd"], tokenizer, 4)
    assert begun[:, 0].tolist() == [1, 1] and torch.equal(begun[:, 1:], plain)


def test_split_holds_out_the_end():
    sequences = torch.arange(25)[:, None]
    chosen, held_out = split(sequences, 8)
    assert held_out.flatten().tolist() == [22, 23, 24]
    assert chosen.flatten().tolist() == sorted({*chosen.flatten().tolist()}) and len(chosen) == 8
    assert chosen.min() == 0 and chosen.max() == 21


def test_perplexity_is_that_of_the_models_own_loss():
    model, tokens = source(), ids(3)
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    assert perplexity(model, tokens) == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


def test_models_that_cannot_be_run_layer_by_layer():
    model = source()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM changes what comes before model.layers.1"):
        LayerStream(model, ids(2))
    model = source()
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"extra": args[0].sum()}), with_kwargs=True
    )
    with pytest.raises(UnsupportedModel, match="gives model.layers.0 an input 'extra' that depends on the tokens"):
        LayerStream(model, ids(2))


def test_a_quantized_model_is_refused():
    model = source()
    quantize_on_the_spot(model, "int8")
    with pytest.raises(InvalidArgument, match="is quantized already"):
        quantize_model(model, Recipe(method="gptq"), ids(4), ids(1))


def test_layers_that_nothing_reached_are_rounded_to_nearest():
    class Unreached(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

    model = source()
    model.model.layers[1].other = Unreached()
    quantize_model(model, Recipe(method="gptq", group_size=32), ids(4), ids(1))
    assert "model.layers.1.other.linear" in quantized(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("label", ["mixtral", "qwen3_moe"])
def test_experts_are_quantized_one_by_one_and_stacked(label, method, tmp_path):
    model, nearest, reference = source(label), source(label), source(label)
    quantize_model(model, Recipe(method=method, group_size=None if method == "fp8" else 16), ids(24), ids(1))
    experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
    assert len(experts) == 2 and not any(isinstance(module, ExpertLayers) for module in model.modules())
    unseen = ids(4, seed=3)
    if method == "gptq":
        quantize_on_the_spot(nearest, "int4")
        assert error(model, reference, unseen) < error(nearest, reference, unseen)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, unseen), logits(model, unseen))


def test_experts_with_orders_of_their_own_run_one_by_one(tmp_path):
    model = source("mixtral")
    quantize_model(model, Recipe(method="gptq", group_size=16, static_groups=False), ids(24), ids(1))
    assert sum(isinstance(module, ExpertLayers) for module in model.modules()) == 2
    model.save_pretrained(tmp_path)
    unseen = ids(4, seed=3)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), unseen), logits(model, unseen))
