"""Sampling on the device: the kernels against their references, and against the CPU sampler token for token."""

from __future__ import annotations

import gc
import math
import random

import pytest
import torch

from hf_paged.base.errors import InvalidArgument
from hf_paged.base.sampling_params import SamplingParams
from hf_paged.runtime.draw import uniform
from hf_paged.runtime.penalties import apply_rules
from hf_paged.runtime.rule_states import RuleStates
from hf_paged.runtime.sampler import Sampler, SampleRow
from hf_paged_kernels import sampling

EOS = 7
BACKENDS = ["triton", "reference"]


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype).to(device)


def make_row(token_ids=(1, 2, 3), num_prompt=2, seed=11, **options):
    names = ("processors", "use_torch_rng", "capture", "bad_words_ids", "pending")
    own = {name: options.pop(name) for name in names if name in options}
    params = SamplingParams(**options)
    return SampleRow(params, list(token_ids), num_prompt, seed, frozenset({EOS}), **own)


class Options:
    """The columns of `sampling.sample` for `count` equal rows."""

    def __init__(self, count, device, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        def column(value, dtype):
            return torch.full((count,), value, dtype=dtype, device=device)

        self.columns = (
            column(temperature, torch.float64),
            column(top_k, torch.int64),
            column(top_p, torch.float64),
            column(min_p, torch.float64),
        )


# Argmax


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 9001), (40, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_argmax_is_the_first_maximum(device, shape, dtype):
    logits = normal(*shape, dtype=dtype, device=device)
    logits = (logits * 2).round() / 2  # ties
    tokens, peaks = sampling.argmax(logits, backend="triton")
    top = logits.amax(-1, keepdim=True)
    assert torch.equal(tokens, (logits == top).int().argmax(-1))
    assert tokens.dtype == torch.int64 and torch.equal(peaks, top[:, 0].float())


def test_argmax_of_nan_and_infinities(device):
    logits = normal(6, 5000, device=device)
    logits[0, 4321] = math.nan
    logits[0, 17] = math.inf
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3] = 0.0
    logits[3, :9] = -0.0
    logits[4] = -math.inf
    logits[4, 4999] = -3e38
    wide = torch.empty(6, 5003, device=device)
    wide[:, :5000] = logits
    for x in (logits, wide[:, :5000]):
        tokens, peaks = sampling.argmax(x, backend="triton")
        assert tokens[:5].tolist() == [4321, 3, 0, 0, 4999]
        assert peaks[0].isnan() and torch.equal(peaks[1:], logits.amax(-1)[1:])


# Draws


def stock_probabilities(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """float64 [V] after transformers' own warpers."""
    from transformers.generation import logits_process as stock

    scores = logits_V.cpu()[None] / temperature
    chain = [stock.TopKLogitsWarper(top_k)] if top_k else []
    chain += [stock.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [stock.MinPLogitsWarper(min_p)] if min_p else []
    for warper in chain:
        scores = warper(None, scores)
    return scores[0].double().softmax(-1)


WARPERS = [
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("options", WARPERS, ids=str)
def test_every_kept_token_is_drawn_where_the_distribution_says(device, options):
    """The inverse CDF at the middle of each token's share gives that token: nothing else is kept, nothing is missing."""
    logits_V = normal(16, seed=3)
    expected = stock_probabilities(logits_V, **options)
    kept = (expected > 1e-9).nonzero()[:, 0]
    middles = (expected.cumsum(0) - expected / 2)[kept].to(device)
    logits = logits_V.to(device).expand(len(kept), -1).contiguous()
    columns = Options(len(kept), device, **options).columns
    for backend in BACKENDS:
        tokens, peaks = sampling.sample(logits, *columns, uniforms=middles, backend=backend)
        assert tokens.tolist() == kept.tolist()
        assert torch.equal(peaks, logits.amax(-1) / torch.tensor(options.get("temperature", 1.0), device=device))


def test_thresholds_with_ties(device):
    """All ties of the k-th stay; of ties at the edge of top-p those with the lowest ids go first."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 3.0, 2.0, 1.0, 2.0]], device=device)
    reached = {}
    for name, options in {"top_k": {"top_k": 3}, "top_p": {"top_p": 0.7}, "least": {"top_p": 0.0}}.items():
        count = 12
        uniforms = (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
        columns = Options(count, device, **options).columns
        answers = [
            sampling.sample(logits.expand(count, -1), *columns, uniforms=uniforms, backend=backend)[0].tolist()
            for backend in BACKENDS
        ]
        assert answers[0] == answers[1]
        reached[name] = sorted(set(answers[0]))
    # e^0 = 1 twice, e^-1 = 0.368 four times, e^-2 = 0.135 twice: 0.3 * 3.742 = 1.12 are cut, 0.27 + 2 * 0.368 < 1.12
    assert reached == {"top_k": [1, 2, 3, 4, 5, 7], "top_p": [1, 4, 5, 7], "least": [4]}


LONG = [  # spread of the logits, temperature, top_k, top_p, min_p, uniform: few candidates of a wide spread, many of a narrow one
    (3.0, 1.0, 0, 0.9, 0.0, 0.999),
    (3.0, 0.8, 300, 1.0, 0.0, 0.7),
    (3.0, 1.5, 2**40, 0.95, 0.02, 0.31),
    (3.0, 1.0, 0, 1.0, 0.0, 0.52),
    (0.2, 1.0, 0, 0.9, 0.0, 0.999),
    (0.2, 1.0, 6000, 1.0, 0.0, 0.25),
    (0.2, 0.5, 7000, 0.7, 0.5, 0.6),
    (0.2, 1.0, 0, 1.0, 0.4, 0.4),
    (0.2, 1.0, 0, 1.0, 0.0, 1 - 2**-53),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_tile_match_the_reference(device, dtype):
    spread, temperature, top_k, top_p, min_p, uniforms = zip(*LONG)
    logits = normal(len(LONG), 9001, seed=5) * torch.tensor(spread)[:, None] / 3
    logits = logits.to(device, dtype)  # bf16 has ties everywhere
    real = dict(dtype=torch.float64, device=device)
    columns = (
        torch.tensor(temperature, **real),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, **real),
        torch.tensor(min_p, **real),
    )
    uniforms = torch.tensor(uniforms, **real)
    expected = sampling.sample(logits, *columns, uniforms=uniforms, backend="reference")
    tokens, peaks = sampling.sample(logits, *columns, uniforms=uniforms, backend="triton")
    assert torch.equal(tokens, expected[0]) and torch.equal(peaks, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_counter_is_the_hosts(device, backend):
    """With 2^10 equal logits the token is the first ten bits of the uniform number."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    positions = [0, 1, 5, 2**40, 17, 3]
    logits = torch.zeros(len(seeds), 1024, dtype=torch.bfloat16, device=device)
    columns = Options(len(seeds), device).columns
    place = dict(dtype=torch.int64, device=device)
    tokens, _ = sampling.sample(
        logits, *columns, seeds=torch.tensor(seeds, **place), positions=torch.tensor(positions, **place), backend=backend
    )
    assert tokens.tolist() == [int(uniform(seed, p) * 1024) for seed, p in zip(seeds, positions, strict=True)]


def test_draws_follow_the_distribution(device):
    draws = 4000 if device.type == "cuda" else 80  # the interpreter needs a tenth of a second for each
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5], device=device)
    columns = Options(draws, device, temperature=1.4).columns
    positions = torch.arange(draws, device=device)
    seeds = torch.full_like(positions, 99)
    tokens, _ = sampling.sample(logits_V.expand(draws, -1), *columns, seeds=seeds, positions=positions, backend="triton")
    counts = tokens.cpu().bincount(minlength=5).double()

    def chi_square(temperature):
        expected = stock_probabilities(logits_V, temperature) * draws
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_square(1.4) < 13.3  # the 99th percentile with 4 degrees of freedom
    assert chi_square(0.7) > 13.3  # the test can tell


def test_arguments_are_checked(device):
    logits = normal(2, 30, device=device)
    columns, uniforms = Options(2, device).columns, torch.zeros(2, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="logits"):
        sampling.argmax(logits.double())
    with pytest.raises(ValueError, match="top_k"):
        sampling.sample(logits, columns[0], columns[0], *columns[2:], uniforms=uniforms)
    with pytest.raises(ValueError, match="uniforms, or seeds and positions"):
        sampling.sample(logits, *columns)
    with pytest.raises(ValueError, match="uniforms"):
        sampling.sample(logits, *columns, uniforms=uniforms[:1])
    assert sampling.sample(logits[:0], *Options(0, device).columns, uniforms=uniforms[:0])[0].shape == (0,)


# The sampler


def random_options(generator: random.Random) -> dict:
    """A mixture as servers see it: most rows with two or three options."""
    options = {"temperature": generator.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.8])}
    options |= {"top_k": generator.choice([1, 5, 50, 700])} if generator.random() < 0.4 else {}
    options |= {"top_p": generator.choice([0.1, 0.5, 0.9, 0.99])} if generator.random() < 0.5 else {}
    options |= {"min_p": generator.choice([0.01, 0.2])} if generator.random() < 0.3 else {}
    options |= {"repetition_penalty": 1.3} if generator.random() < 0.2 else {}
    options |= {"presence_penalty": 0.7, "frequency_penalty": -0.4} if generator.random() < 0.2 else {}
    options |= {"logit_bias": {5: 4.0, 90: -3.0}} if generator.random() < 0.1 else {}
    options |= {"logprobs": 2} if generator.random() < 0.2 else {}
    return options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_cpu_sampler(device, dtype):
    """Equal, without exception: a draw between two roundings of exp has odds of one in a million here.

    Ties at the edge of top-p are another matter: torch's sort on CPU orders them as it likes. So bf16 has none here.
    """
    generator, vocab_size = random.Random(2), 2000
    rows = []
    for i in range(40):
        tokens = [generator.randrange(vocab_size) for _ in range(20)]
        rows.append(make_row(tokens, 8, seed=generator.getrandbits(64), **random_options(generator)))
        if dtype == torch.bfloat16 and rows[-1].params.top_p < 1:
            rows.pop()
    logits = normal(len(rows), vocab_size, seed=8, dtype=dtype)
    expected = Sampler().sample(logits, rows)
    result = Sampler(device, "triton").sample(logits.to(device), rows)
    assert result.tokens == expected.tokens and result.errors == expected.errors
    for got, wanted in zip(result.logprobs, expected.logprobs):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert list(got) == list(wanted)
            assert [entry.rank for entry in got.values()] == [entry.rank for entry in wanted.values()]
            assert [entry.logprob for entry in got.values()] == pytest.approx([e.logprob for e in wanted.values()], 1e-5)


def test_a_row_draws_the_same_in_any_batch(device):
    logits = normal(4, 700, device=device)
    options = [{"top_p": 0.8}, {"temperature": 0.0}, {"top_k": 9}, {"repetition_penalty": 1.5}]
    rows = [make_row(seed=i, **one) for i, one in enumerate(options)]
    sampler = Sampler(device, "triton")
    together = sampler.sample(logits, rows).tokens
    order = [2, 0, 3, 1]
    assert sampler.sample(logits[order], [rows[i] for i in order]).tokens == [together[i] for i in order]
    assert [sampler.sample(logits[i : i + 1], [rows[i]]).tokens[0] for i in range(4)] == together


def test_bad_rows_get_their_own_error_and_harm_nobody(device):
    logits = normal(8, 600, device=device)
    rows = [make_row(seed=i, top_p=0.9) for i in range(7)]
    rows += [make_row(temperature=0.0)]
    sampler = Sampler(device, "triton")
    good = sampler.sample(logits, rows).tokens
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[3, 8] = math.inf
    logits[7, 8] = math.inf
    rows[4] = make_row(logit_bias={600: 1.0})
    rows[5] = make_row(allowed_token_ids=[601])
    rows[6] = make_row(processors=(lambda ids, x: 1 / 0,))
    launched = sampler.launch(logits, rows)
    assert all(0 <= token < 600 for token in launched.tokens.tolist())
    result = launched.result()
    kinds = [FloatingPointError, ValueError, FloatingPointError, InvalidArgument, InvalidArgument, ZeroDivisionError]
    assert [type(error) for error in result.errors[1:7]] == kinds
    assert result.tokens == [good[0], -1, -1, -1, -1, -1, -1, 8]


def test_hosted_rows_beside_others(device):
    """Rows with processors, kept logits or torch's generator get what the CPU sampler gives them; so do their neighbours."""
    logits = normal(6, 600, seed=4)
    rows = [
        make_row(seed=1, top_p=0.9),
        make_row(seed=2, top_k=30, processors=(lambda ids, x: x.index_fill(0, torch.arange(300, device=x.device), -5.0),)),
        make_row(seed=3, capture=True, top_p=0.8, repetition_penalty=1.4),
        make_row(seed=4, use_torch_rng=True, top_k=20),
        make_row(temperature=0.0, capture=True),
        make_row(temperature=0.0, repetition_penalty=3.0),
    ]
    torch.manual_seed(0)
    expected = Sampler().sample(logits, rows)
    torch.manual_seed(0)
    result = Sampler(device, "triton").sample(logits.to(device), rows)
    chosen = [0, 1, 2, 4, 5] if device.type == "cuda" else range(6)  # torch's generators differ by device
    assert [result.tokens[i] for i in chosen] == [expected.tokens[i] for i in chosen]
    for i in (2, 4):
        assert torch.equal(result.raw_logits[i].cpu(), logits[i])
        torch.testing.assert_close(result.processed_logits[i].cpu(), expected.processed_logits[i])


# Rules


RULED = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"presence_penalty": -1.1},
    {"frequency_penalty": 2.0, "logit_bias": {1: 2.5, 30: -70.0}},
    {"logit_bias": {2: -1.0}},
    {"allowed_token_ids": [1, 2, 5, EOS, 5], "min_tokens": 3},
    {"min_tokens": 2, "stop_token_ids": [9]},
    {"min_tokens": 50, "max_tokens": None, "ignore_eos": True, "stop_token_ids": [9]},
    {"bad_words_ids": [[4], [EOS], [2, 3], [6, 2, 8], [11, 12]]},
    {"bad_words_ids": [[3, 1]], "repetition_penalty": 2.0},
    {},
]


def cpu_scores(logits, rows):
    scores, errors = logits.to(torch.float32, copy=True), [None] * len(rows)
    apply_rules(scores, rows, errors)
    return scores, errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_are_those_of_the_cpu_step_by_step(device, backend, dtype):
    """Bit for bit, while outputs grow by tokens the host knows, and by one that is still on the device."""
    generator, vocab_size = random.Random(4), 40
    histories = [[generator.randrange(45) for _ in range(12)] for _ in RULED]  # some tokens are outside the vocabulary
    rows = [make_row(tokens, 8, **options) for tokens, options in zip(histories, RULED, strict=True)]
    rules, sampler = RuleStates(backend), Sampler(device, backend)
    previous = None
    for step in range(6):
        logits = normal(len(rows), vocab_size, seed=step, dtype=dtype)
        known = [make_row(row.token_ids, 8, **options) for row, options in zip(rows, RULED, strict=True)]
        if previous is not None:  # what they sampled is pending
            for i, (row, reference) in enumerate(zip(rows, known, strict=True)):
                row.pending = i
                reference.token_ids.append(int(previous.tokens[i]))
        errors = [None] * len(rows)
        scores = rules.apply(logits.to(device), rows, errors, previous)
        expected, _ = cpu_scores(logits, known)
        assert torch.equal(scores.cpu().float(), expected) and not any(errors)
        if previous is not None:
            result = previous.result()
            for i, row in enumerate(rows):
                row.token_ids.append(result.tokens[i])
                row.pending = None
        previous = None
        if step % 2 == 0:  # every other step runs ahead of the host
            previous = sampler.launch(logits.to(device), [make_row(temperature=0.0) for _ in rows])
        for row in rows:
            row.token_ids += [generator.randrange(vocab_size) for _ in range(step % 3 if previous is None else 0)]


def test_a_step_that_was_taken_back_leaves_no_trace(device):
    """The pending token turns out to be another than what was recorded, or never comes, or tokens are cut."""
    options = {"repetition_penalty": 1.7, "frequency_penalty": 0.9}
    sampler, rules = Sampler(device, "triton"), RuleStates("triton")
    logits = normal(1, 30, seed=1)
    row = make_row([1, 2, 3, 4], 2, **options)
    for name in ("as it came", "another", "never read", "cut"):
        previous = sampler.launch(normal(1, 30, seed=len(name), device=device), [make_row(temperature=0.0)])
        sampled = int(previous.tokens[0])
        row.pending = 0
        rules.apply(logits.to(device), [row], [None], previous)
        row.pending = None
        if name != "never read":
            previous.result()
        if name == "cut":
            row.token_ids.pop()
        else:
            row.token_ids.append((sampled + (name == "another")) % 30)
        scores = rules.apply(logits.to(device), [row], [None], None)
        assert torch.equal(scores.cpu(), cpu_scores(logits, [row])[0]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_guesses_count_for_their_own_row_only(device, backend):
    row = make_row([1, 2, 3, 4], 2, repetition_penalty=1.7, frequency_penalty=0.9, bad_words_ids=[[5, 9]])
    rows = [row, row.extended([5]), row.extended([5, 5, 44]), make_row(temperature=0.0)]
    logits = normal(4, 30, seed=1)
    rules = RuleStates(backend)
    for _ in range(2):
        scores = rules.apply(logits.to(device), rows, [None] * 4, None)
        assert torch.equal(scores.cpu(), cpu_scores(logits, rows)[0])
        row.token_ids += [5, 6]
        rows = [row, row.extended([6]), row.extended([6, 1]), rows[3]]


def test_memory_of_ended_sequences_is_used_again_and_given_back(device):
    sampler = Sampler(device, "triton")
    logits = normal(1, 64, device=device)
    rows = [make_row([1, 2, 3], 1, repetition_penalty=1.2, logit_bias={4: 2.0}) for _ in range(20)]
    planes = sampler._device_sampler._rules._states
    for row in rows[:8]:
        sampler.sample(logits, [row])
    before = planes.tensor.shape
    for row in rows[:8]:
        sampler.forget(row)
        sampler.forget(row)  # again is no harm
    assert planes.tensor is None
    for old, row in zip(rows[7:], rows[8:]):
        sampler.sample(logits, [row])
        sampler.forget(old)
    assert planes.tensor.shape == before
    del rows, row, old
    gc.collect()
    sampler.sample(logits, [make_row()])
    assert planes.tensor is None


def test_a_head_that_was_resized(device):
    """Sequences go on with what the host knows of them."""
    sampler = Sampler(device, "triton")
    row = make_row([1, 2, 3, 4], 2, temperature=0.0, repetition_penalty=5.0, logit_bias={4: 2.0})
    for vocab_size in (40, 64, 40):
        logits = normal(1, vocab_size, seed=vocab_size)
        row.token_ids += [5, 6]
        assert sampler.sample(logits.to(device), [row]).tokens == Sampler().sample(logits, [row]).tokens
