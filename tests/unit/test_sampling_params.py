"""SamplingParams: defaults, normal forms, and every wrong value refused by name."""

import dataclasses
import math
import pickle
import subprocess
import sys

import pytest

from hf_paged.base.errors import InvalidArgument
from hf_paged.base.sampling_params import SamplingParams

NAN, INF = math.nan, math.inf
WRONG = {
    "n": [0, -1, 10_001, 1.0, True, None, "2"],
    "temperature": [-0.1, NAN, INF, -INF, 1e-30, 10**400, True, "1", None],
    "top_p": [-0.1, 1.1, NAN, INF, True, None],
    "top_k": [-2, 1.5, True, None],
    "min_p": [-0.1, 1.1, NAN, False],
    "repetition_penalty": [0, -1, 1e9, NAN, INF, True, "x"],
    "presence_penalty": [-2.1, 2.1, NAN, INF, True],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF, True],
    "seed": [2**64, -(2**63) - 1, 1.5, True, "7"],
    "stop": ["", [""], [1], ["a"] * 65, 5, {"a": 1}, b"a"],
    "stop_token_ids": [[-1], [1.5], [True], "12", 5, {1: 2}],
    "ignore_eos": [1, None, "yes"],
    "max_tokens": [0, -1, 1.5, True],
    "min_tokens": [-1, 1.0, True, None],
    "logprobs": [-1, 4097, 1.0, True],
    "prompt_logprobs": [-1, 4097, 1.0, True],
    "logit_bias": [[1], {-1: 0.0}, {1.5: 0.0}, {"1": 0.0}, {True: 0.0}, {1: NAN}, {1: INF}, {1: "x"},
                   {token: 0.0 for token in range(4097)}],
    "bad_words": ["word", [""], [3], ["a"] * 1025],
    "allowed_token_ids": [[], [-1], [1.5], [True], "12", 3],
    "structured_outputs": ["json", {}, {"regex": ""}, {"choice": [1]}, {"form": "json"}, [("regex", "a")]],
    "skip_special_tokens": [1, None],
    "keep_special_token_ids": [[-1], [1.5], [True], "12", 3],
    "spaces_between_special_tokens": [0, "x"],
    "include_stop_str_in_output": [1, None],
    "detokenize": [1, None],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(name)


def test_every_field_has_wrong_values_above():
    assert set(WRONG) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.detokenize and params.skip_special_tokens and not params.ignore_eos


def test_normal_forms():
    params = SamplingParams(
        stop="x", stop_token_ids=[2, 3], top_k=-1, temperature=0, bad_words=["a"], logit_bias={5: 1}
    )
    assert params.stop == ("x",) and params.stop_token_ids == (2, 3) and params.bad_words == ("a",)
    assert params.top_k == 0 and params.greedy and isinstance(params.temperature, float)
    assert params.logit_bias == {5: 1.0}
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(allowed_token_ids=range(3)).allowed_token_ids == (0, 1, 2)


def test_limits_are_inclusive():
    SamplingParams(
        n=10_000, stop=["a"] * 64, bad_words=["a"] * 1024, logprobs=4096, prompt_logprobs=4096, max_tokens=None,
        logit_bias={token: -1.0 for token in range(4096)}, top_p=0, min_p=1, seed=2**64 - 1, repetition_penalty=2,
    )  # fmt: skip
    SamplingParams(seed=-(2**63), presence_penalty=-2, frequency_penalty=2, logprobs=0)


def test_fields_that_contradict_each_other():
    with pytest.raises(InvalidArgument, match="^min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=500, max_tokens=None)
    with pytest.raises(InvalidArgument, match="^stop"):
        SamplingParams(stop="x", detokenize=False)


def test_frozen_and_picklable():
    params = SamplingParams(stop="x", logit_bias={1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=3).stop == ("x",)
    with pytest.raises(TypeError):
        SamplingParams(3)


def test_needs_no_torch():
    code = "import sys, hf_paged.base.sampling_params as m; m.SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
