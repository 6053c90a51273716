"""The sampler against transformers' own processors, its draws against the distribution, its rows against each other."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as stock

from hf_paged.base.errors import InvalidArgument
from hf_paged.base.sampling_params import SamplingParams
from hf_paged.runtime import host_sampler
from hf_paged.runtime.draw import derive_seed, draw, uniform
from hf_paged.runtime.sampler import Sampler, SampleRow
from hf_paged.runtime.warpers import WIDTHS, WarpParams, narrow, row_argmax, row_topk, warp_dense

SAMPLER = Sampler()
EOS = 7


def make_row(token_ids=(1, 2, 3), num_prompt=2, seed=11, **options):
    names = ("processors", "use_torch_rng", "capture", "bad_words_ids")
    own = {name: options.pop(name) for name in names if name in options}
    return SampleRow(
        params=SamplingParams(**options),
        token_ids=list(token_ids),
        num_prompt=num_prompt,
        seed=seed,
        eos_token_ids=frozenset({EOS}),
        **own,
    )


def stock_processors(row, num_prompt):
    """What `generate` would build for these options, in its order."""
    p, chain = row.params, []
    if p.logit_bias:
        chain.append(stock.SequenceBiasLogitsProcessor({(token,): bias for token, bias in p.logit_bias.items()}))
    if p.repetition_penalty != 1.0:
        chain.append(stock.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if row.bad_words_ids:
        chain.append(stock.NoBadWordsLogitsProcessor(row.bad_words_ids, eos_token_id=EOS))
    if p.min_tokens:
        chain.append(stock.MinNewTokensLengthLogitsProcessor(num_prompt, p.min_tokens, [EOS, *p.stop_token_ids]))
    if not row.greedy:
        if p.temperature != 1.0:
            chain.append(stock.TemperatureLogitsWarper(p.temperature))
        if p.top_k:
            chain.append(stock.TopKLogitsWarper(p.top_k))
        if p.top_p < 1.0:
            chain.append(stock.TopPLogitsWarper(p.top_p))
        if p.min_p:
            chain.append(stock.MinPLogitsWarper(p.min_p))
    return chain


def stock_scores(row, logits_V):
    ids, scores = torch.tensor([list(row.token_ids)]), logits_V.float()[None].clone()
    for processor in stock_processors(row, row.num_prompt):
        scores = processor(ids, scores)
    return scores[0]


def random_logits(kind, count, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, vocab_size, generator=generator)
    if kind == "normal":
        return x * 3
    if kind == "peaked":
        return x * 15
    if kind == "flat":
        return x * 0.01
    if kind == "ties":
        return (x * 4).round() / 2
    if kind == "equal":
        return torch.zeros(count, vocab_size)
    if kind == "extreme":
        x = x * 1e4
        x[:, ::3] = -math.inf
        return x
    assert kind == "bfloat16"
    return (x * 3).bfloat16()


KINDS = ["normal", "peaked", "flat", "ties", "equal", "extreme", "bfloat16"]
OPTIONS = [
    {"temperature": 0.7},
    {"top_k": 50},
    {"top_k": 1},
    {"top_k": 63, "temperature": 1.3},
    {"top_k": 900},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.3, "temperature": 0.4},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.5, "min_p": 0.1},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3, "logit_bias": {5: 3.0, 9: -4.0}},
    {"temperature": 0.0, "repetition_penalty": 0.7, "min_tokens": 5, "stop_token_ids": [3, 4]},
    {"temperature": 0.0, "bad_words_ids": [[4], [EOS], [2, 3, 8], [3, 6], [1, 9]]},
]


@pytest.mark.parametrize("vocab_size", [50, 3000, 20_011])
@pytest.mark.parametrize("kind", KINDS)
def test_processed_logits_are_those_of_transformers(kind, vocab_size):
    logits = random_logits(kind, len(OPTIONS), vocab_size)
    rows = [make_row(capture=True, seed=i, **options) for i, options in enumerate(OPTIONS)]
    result = SAMPLER.sample(logits, rows)
    for i, row in enumerate(rows):
        assert result.errors[i] is None
        expected, got = stock_scores(row, logits[i]), result.processed_logits[i]
        assert torch.equal(torch.isneginf(expected), torch.isneginf(got)), OPTIONS[i]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert got[result.tokens[i]] > -math.inf
        assert torch.equal(result.raw_logits[i], logits[i].float())
        if row.greedy:
            assert result.tokens[i] == int(expected.argmax())


def test_candidates_keep_what_the_whole_vocabulary_keeps():
    """Where `narrow` is certain it must agree; and it must be certain often enough to be of use."""
    vocab_size, certain = 20_011, Counter()
    for seed in range(12):
        for options in OPTIONS:
            params = SamplingParams(**{name: options[name] for name in ("top_k", "top_p", "min_p") if name in options})
            x = random_logits(("peaked", "normal", "ties")[seed % 3], 1, vocab_size, seed)
            warp = WarpParams(
                torch.tensor([params.top_k]),
                torch.tensor([params.top_p], dtype=torch.float64),
                torch.tensor([params.min_p], dtype=torch.float64),
            )
            for width in WIDTHS:
                if not host_sampler._may_suffice(params, width):
                    continue
                found, dense = narrow(x, warp, width), x.clone()
                warp_dense(dense, warp, [params])
                kept = found.ids_RC[0][found.logits_RC[0] > -math.inf]
                certain[bool(found.certain_R)] += 1
                if found.certain_R:
                    assert kept.sort().values.tolist() == (dense[0] > -math.inf).nonzero()[:, 0].tolist()
    assert certain[True] > 150 and certain[False] > 20


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 0.7, "top_k": 20}, {"min_p": 0.25}, {"min_p": 0.5, "top_k": 20}]
)
def test_a_cut_too_close_to_tell_is_left_to_the_whole_vocabulary(options):
    """Probabilities 0.4, 0.3, 0.2, 0.1: these cuts fall on a token to the last bit, where only stock's rounding decides."""
    logits = torch.linspace(-60, -50, 3000)[None].clone()
    logits[0, 1000:1004] = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    row = make_row(capture=True, **options)
    params = row.params
    warp = WarpParams(
        torch.tensor([params.top_k]),
        torch.tensor([params.top_p], dtype=torch.float64),
        torch.tensor([params.min_p], dtype=torch.float64),
    )
    assert not narrow(logits, warp, 64).certain_R.any()
    nearby = WarpParams(warp.top_k, warp.top_p - 1e-4 * (warp.top_p < 1), warp.min_p * (1 - 1e-4))
    assert narrow(logits, nearby, 64).certain_R.all()
    assert torch.equal(SAMPLER.sample(logits, [row]).processed_logits[0], stock_scores(row, logits[0]))


@pytest.mark.parametrize("kind", ["normal", "ties", "peaked"])
def test_draws_do_not_depend_on_the_path(kind, monkeypatch):
    logits = random_logits(kind, 64, 20_011)
    rows = [make_row(seed=i, **OPTIONS[i % 14]) for i in range(64)]
    fast = SAMPLER.sample(logits, rows).tokens
    monkeypatch.setattr(host_sampler, "WIDTHS", ())
    assert SAMPLER.sample(logits, rows).tokens == fast


def test_presence_and_frequency_penalties():
    logits = random_logits("normal", 3, 500)
    token_ids = [5, 5, 6, 9, 9, 9, 11, 6, 10_000, -1]  # ids the head cannot produce are passed over
    rows = [
        make_row(token_ids, 3, temperature=0, presence_penalty=0.5, frequency_penalty=-0.25, capture=True),
        make_row([1], 1, temperature=0, presence_penalty=1.0, capture=True),
        make_row(token_ids, 3, temperature=0, frequency_penalty=2.0, repetition_penalty=1.5, capture=True),
    ]
    result = SAMPLER.sample(logits, rows)
    counts = Counter(token_ids[3:-2])
    expected = logits.clone()
    for token in {5, 6, 9, 11}:
        score = expected[2, token]
        expected[2, token] = score * 1.5 if score < 0 else score / 1.5
    for token, count in counts.items():
        expected[0, token] -= -0.25 * count + 0.5
        expected[2, token] -= 2.0 * count
    torch.testing.assert_close(torch.stack(result.processed_logits), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(result.processed_logits[1], logits[1])


def test_allowed_tokens_and_minimum_length():
    logits = random_logits("normal", 4, 500)
    logits[:, EOS] = 100.0
    rows = [
        make_row(allowed_token_ids=[4, 400, 77], temperature=0),
        make_row(min_tokens=2, temperature=0),
        make_row(min_tokens=1, temperature=0),  # one output token is there already
        make_row(min_tokens=2, temperature=0, ignore_eos=True),  # EOS ends nothing, so it may come
    ]
    tokens = SAMPLER.sample(logits, rows).tokens
    assert tokens[0] == max((4, 400, 77), key=lambda token: logits[0, token])
    assert tokens[1] != EOS and tokens[2:] == [EOS, EOS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab_size", [3, 511, 512, 20_011])
def test_argmax_takes_the_first_maximum(dtype, vocab_size):
    x = random_logits("ties", 40, vocab_size, seed=vocab_size).to(dtype)
    for row in range(40):  # ties across blocks and into the last columns
        x[row, -1 - row % 3] = x[row].max()
    before = x.clone()
    result = SAMPLER.sample(x, [make_row(temperature=0) for _ in range(40)])
    assert result.tokens == x.argmax(-1).tolist() and torch.equal(x, before)
    x[3, -1], x[4, vocab_size // 2] = math.nan, math.nan
    index, value = row_argmax(x)
    assert value.isnan().nonzero()[:, 0].tolist() == [3, 4] and index[3] == vocab_size - 1


@pytest.mark.parametrize("vocab_size", [64 * 64, 20_011])
def test_topk_is_torchs(vocab_size):
    for kind in ("normal", "ties"):
        x = random_logits(kind, 16, vocab_size)
        x[:, -1] = 1e3
        values, ids = row_topk(x, 20)
        assert torch.equal(values, x.topk(20).values) and torch.equal(x.gather(1, ids), values)
        assert all(len(set(row)) == 20 for row in ids.tolist())


def _chi_square(counts, probabilities, draws):
    expected = probabilities.double() * draws
    assert float(counts[expected == 0].sum()) == 0
    big = expected >= 5
    pairs = [(counts[big], expected[big])]
    if expected[~big].sum() >= 5:
        pairs.append((counts[~big].sum()[None], expected[~big].sum()[None]))
    observed, expected = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    degrees = len(expected) - 1
    return float(((observed - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * max(degrees, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_distribution(options, over):
    draws, vocab_size = 20_000, 200
    logits = random_logits("normal", 1, vocab_size, seed=4) * 0.5
    row = make_row(**options)
    expected = stock_scores(row, logits[0]).softmax(-1)
    if over == "seeds":
        u = [uniform(derive_seed(3, index), 0) for index in range(draws)]
    else:
        u = [uniform(3, position) for position in range(draws)]
    x = stock_scores(row, logits[0])[None].expand(draws, -1)
    tokens = draw(x, torch.tensor(u, dtype=torch.float64), vocab_size)
    deviation = _chi_square(tokens.bincount(minlength=vocab_size).double(), expected, draws)
    assert abs(deviation) < 4
    wrong = (stock_scores(row, logits[0]) * 0.9).softmax(-1)  # the test can tell a temperature of 1.1
    assert _chi_square(tokens.bincount(minlength=vocab_size).double(), wrong, draws) > 4


def test_whole_sampler_follows_the_distribution():
    logits = random_logits("peaked", 1, 3000, seed=2) * 0.3
    rows = [make_row(seed=derive_seed(1, i), top_k=40, top_p=0.95) for i in range(500)]
    counts = torch.zeros(3000, dtype=torch.float64)
    for step in range(8):
        for row in rows:
            row.token_ids = [0] * (2 + step)
        counts += torch.tensor(SAMPLER.sample(logits.expand(500, -1), rows).tokens).bincount(minlength=3000)
    assert abs(_chi_square(counts, stock_scores(rows[0], logits[0]).softmax(-1), 4000)) < 4


def test_tail_of_the_distribution_is_reached():
    """A fp32 cumulative sum would round away a token of probability 2^-30; the draw just below 1 must find it."""
    x = torch.full((1, 4096), -math.inf)
    x[0, 10], x[0, 4000] = 0.0, -30 * math.log(2)
    for u, token in ((0.0, 10), (1 - 2.0**-29, 10), (1 - 2.0**-31, 4000), (1 - 2.0**-53, 4000)):
        assert draw(x, torch.tensor([u], dtype=torch.float64), 4096).tolist() == [token]


def test_seeds():
    assert len({derive_seed(5, index) for index in range(1000)} | {5}) == 1001
    assert derive_seed(-1, 0) == derive_seed(2**64 - 1, 0) and 0 <= derive_seed(-1, 3) < 2**64
    assert derive_seed(derive_seed(0, 1), 0) != derive_seed(derive_seed(0, 0), 1)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500
    assert [uniform(1, 0), uniform(1, 1)] == [uniform(1 + 2**64, 0), uniform(1 + 2**64, 1)]


def test_rows_do_not_depend_on_their_batch():
    vocab_size = 20_011
    options = [*OPTIONS, {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 3}, {"top_p": 0.9, "logprobs": 8}]
    logits = torch.cat([random_logits(kind, len(options), vocab_size, seed=9) for kind in ("normal", "ties")])
    tokens = [list(range(i, 40 + i)) for i in range(len(logits))]
    rows = [
        make_row(tokens[i], 20, seed=i, capture=i % 2 == 0, **options[i % len(options)]) for i in range(len(logits))
    ]
    together = SAMPLER.sample(logits, rows)
    assert not any(together.errors)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    for size in (1, 3, 11):
        for start in range(0, len(rows), size):
            some = order[start : start + size]
            result = SAMPLER.sample(logits[some], [rows[i] for i in some])
            for place, i in enumerate(some):
                assert result.tokens[place] == together.tokens[i]
                assert result.logprobs[place] == together.logprobs[i]
                if rows[i].capture:
                    assert torch.equal(result.processed_logits[place], together.processed_logits[i])


def test_draws_repeat_and_differ_by_seed_and_position():
    logits = random_logits("flat", 1, 3000).expand(40, -1)
    rows = [make_row(seed=i) for i in range(40)]
    first = SAMPLER.sample(logits, rows).tokens
    assert first == SAMPLER.sample(logits, rows).tokens and len(set(first)) > 30
    for row in rows:
        row.token_ids.append(0)
    assert sum(a == b for a, b in zip(first, SAMPLER.sample(logits, rows).tokens, strict=True)) < 5


def _raises(token_ids, logits):
    raise RuntimeError("mine")


BROKEN = {
    "raises": (_raises, RuntimeError),
    "shape": (lambda ids, logits: logits[:-1], InvalidArgument),
    "type": (lambda ids, logits: None, InvalidArgument),
    "integers": (lambda ids, logits: logits.long(), InvalidArgument),
    "nan": (lambda ids, logits: logits * math.nan, FloatingPointError),
    "empty": (lambda ids, logits: logits - math.inf, ValueError),
    "ruins then raises": (lambda ids, logits: _raises(ids.clear(), logits.fill_(0)), RuntimeError),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 50}, {"use_torch_rng": True}, {"top_p": 0.9, "logprobs": 2}]
)
def test_a_broken_processor_ends_its_own_row(name, options):
    processor, error = BROKEN[name]
    logits, before = random_logits("normal", 6, 3000), random_logits("normal", 6, 3000)
    rows = [make_row(seed=i, **({"temperature": 0.0} if i < 2 else {"top_p": 0.8})) for i in range(6)]
    expected = SAMPLER.sample(logits, rows).tokens
    rows[3] = make_row(processors=(processor,), **options)
    result = SAMPLER.sample(logits, rows)
    assert isinstance(result.errors[3], error) and result.tokens[3] == -1 and result.logprobs[3] is None
    assert rows[3].token_ids == [1, 2, 3] and torch.equal(logits, before)
    for i in (0, 1, 2, 4, 5):
        assert result.errors[i] is None and result.tokens[i] == expected[i]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}, {"use_torch_rng": True}])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_unusable_logits_end_their_own_row(options, bad):
    logits = random_logits("normal", 5, 3000)
    rows = [make_row(seed=i, **options) for i in range(5)]
    torch.manual_seed(0)
    expected = SAMPLER.sample(logits, rows).tokens
    logits[2] = bad
    torch.manual_seed(0)
    result = SAMPLER.sample(logits, rows)
    assert [error is None for error in result.errors] == [True, True, False, True, True]
    assert result.tokens == [*expected[:2], -1, *expected[3:]]
    logits[2, 5:] = 0.0
    assert (SAMPLER.sample(logits, rows).errors[2] is None) == (bad == -math.inf)  # one NaN is enough


def test_infinite_logits():
    logits = random_logits("normal", 2, 3000)
    logits[:, 9] = math.inf
    result = SAMPLER.sample(logits, [make_row(temperature=0.0), make_row()])
    assert result.tokens == [9, -1] and isinstance(result.errors[1], FloatingPointError)


@pytest.mark.parametrize(
    "options", [{"logit_bias": {500: 1.0}}, {"allowed_token_ids": [500]}, {"bad_words_ids": [[500]]}]
)
def test_ids_outside_the_vocabulary_end_their_own_row(options):
    result = SAMPLER.sample(random_logits("normal", 2, 500), [make_row(**options), make_row(temperature=0)])
    assert isinstance(result.errors[0], InvalidArgument) and "500" in str(result.errors[0])
    assert result.errors[1] is None


def test_processors_run_in_order_after_penalties_and_before_warpers():
    seen = []

    def first(token_ids, logits):
        seen.append((list(token_ids), logits.dtype, logits.clone()))
        logits[3] = 50.0
        return logits

    def second(token_ids, logits):
        return torch.where(logits == 50.0, logits, -math.inf)

    logits = random_logits("normal", 1, 3000).half()
    row = make_row([1, 2, 3], 2, processors=(first, second), logit_bias={8: 5.0}, temperature=0.5, capture=True)
    result = SAMPLER.sample(logits, [row])
    assert result.tokens == [3] and result.processed_logits[0][3] == 100.0
    token_ids, dtype, given = seen[0]
    assert token_ids == [1, 2, 3] and dtype == torch.float32
    assert given[8] == logits[0, 8].float() + 5.0 and given[3] == logits[0, 3].float()


def test_torch_draws_are_those_of_transformers():
    logits = random_logits("normal", 6, 3000)
    rows = [make_row(use_torch_rng=True, **OPTIONS[i]) for i in (0, 1, 6, 9, 11, 12)]
    torch.manual_seed(5)
    result = SAMPLER.sample(logits, rows)
    torch.manual_seed(5)
    expected = [
        int(torch.multinomial(stock_scores(row, logits[i])[None].softmax(-1), num_samples=1))
        for i, row in enumerate(rows)
    ]
    assert result.tokens == expected and result.processed_logits == [None] * 6


@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16"])
def test_logprobs_are_of_the_raw_logits(kind):
    logits = random_logits(kind, 4, 20_011)
    rows = [
        make_row(logprobs=0, temperature=0.5),
        make_row(logprobs=5, temperature=0, logit_bias={17: 100.0}),
        make_row(temperature=0),
        make_row(logprobs=2, temperature=0),
    ]
    result = SAMPLER.sample(logits, rows)
    expected = logits.float().log_softmax(-1)
    assert result.logprobs[2] is None and result.tokens[1] == 17
    for i in (0, 1, 3):
        entry, count = result.logprobs[i], rows[i].params.logprobs
        chosen = result.tokens[i]
        assert next(iter(entry)) == chosen and entry[chosen].decoded is None
        for token, found in entry.items():
            assert found.logprob == float(expected[i, token])
            assert found.rank == int((expected[i] > expected[i, token]).sum()) + 1
        top = sorted((found.logprob for found in entry.values()), reverse=True)[:count]
        assert top == expected[i].topk(count).values.tolist()
    assert len(result.logprobs[0]) == 1 and len(result.logprobs[1]) == 6 and len(result.logprobs[3]) == 2


def test_more_logprobs_than_the_vocabulary_has():
    result = SAMPLER.sample(random_logits("normal", 1, 20), [make_row(logprobs=100)])
    assert sorted(result.logprobs[0]) == list(range(20))


def test_prompt_logprobs():
    logits, ids = random_logits("bfloat16", 70, 3000), [(i * 37) % 3000 for i in range(70)]
    expected = logits.float().log_softmax(-1)
    for count in (0, 4):
        entries = SAMPLER.prompt_logprobs(logits, ids, count).result()
        assert len(entries) == 70
        for i, entry in enumerate(entries):
            assert next(iter(entry)) == ids[i] and entry[ids[i]].logprob == float(expected[i, ids[i]])
            assert count <= len(entry) <= count + 1
            assert entry[ids[i]].rank == int((expected[i] > expected[i, ids[i]]).sum()) + 1
    assert SAMPLER.prompt_logprobs(logits[:0], [], 3).result() == []


PENDING_OPTIONS = [
    dict(temperature=0),
    dict(seed=3),
    dict(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02, logprobs=2),
    dict(temperature=0, min_tokens=2, logprobs=0),  # the pending token is the second
    dict(temperature=0, min_tokens=3),
    dict(logit_bias={5: 9.0}, allowed_token_ids=[5, EOS, 80, 81], bad_words_ids=[[80]]),
]


def test_a_row_with_a_pending_token_samples_as_if_the_token_were_known():
    logits = random_logits("normal", len(PENDING_OPTIONS), 500)
    logits[:, EOS] = 20.0
    known = [make_row(token_ids=(1, 2, 3, 4), **options) for options in PENDING_OPTIONS]
    pending = [make_row(token_ids=(1, 2, 3), **options) for options in PENDING_OPTIONS]
    for row in pending:
        assert not SAMPLER.reads_tokens(row)
        row.pending = 7
    assert SAMPLER.sample(logits, pending) == SAMPLER.sample(logits, known)


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.2),
        dict(presence_penalty=0.5),
        dict(frequency_penalty=-0.5),
        dict(bad_words_ids=[[4], [5, 6]]),
        dict(processors=(lambda ids, logits: logits,)),
    ],
)
def test_rows_that_depend_on_every_token_say_so(options):
    assert SAMPLER.reads_tokens(make_row(**options))


def test_launched_samples_are_tokens_before_anybody_reads_the_result():
    logits = random_logits("normal", 6, 500)
    logits[2] = math.nan
    logits[3, 9] = math.inf
    rows = [make_row(temperature=0), make_row(), make_row(), make_row(), make_row(top_k=5), make_row()]
    rows[5].processors = (lambda ids, logits: 1 / 0,)
    pending = SAMPLER.launch(logits, rows)
    tokens = pending.tokens.tolist()
    assert pending.tokens.dtype == torch.int64 and all(0 <= token < 500 for token in tokens)
    result = pending.result()
    assert [error is None for error in result.errors] == [True, True, False, False, True, False]
    assert [a for a, error in zip(tokens, result.errors) if error is None] == [a for a in result.tokens if a >= 0]


def test_no_rows_and_logits_of_odd_layout():
    assert SAMPLER.sample(torch.empty(0, 100), []).tokens == []
    wide = random_logits("normal", 4, 6000)
    rows = [make_row(temperature=0), make_row(seed=1), make_row(top_k=9), make_row(repetition_penalty=1.2)]
    plain = SAMPLER.sample(wide[:, :3000].contiguous(), rows).tokens
    assert SAMPLER.sample(wide[:, :3000], rows).tokens == plain
    assert SAMPLER.sample(wide[:, :3000].T.contiguous().T, rows).tokens == plain
    with torch.inference_mode():
        inference = wide[:, :3000].clone()
    assert SAMPLER.sample(inference, rows).tokens == plain
