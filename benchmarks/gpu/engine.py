"""The engine on models of real shape, beside stock transformers on the same model in the same run.

    python -m hf_paged.benchmarks.gpu.engine [--minutes 6] [--models llama-8b,qwen3-0.6b]

Of each model: decode steps against the time their bytes take, kernels per layer, time to first token of 32 requests,
the workload of nano-vllm in output tokens per second; and that workload through stock's `generate` one at a time and 32
at a time (on a sample, see `stock.run_generate`) and its continuous batching, between two runs of the engine.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import hf_paged
from hf_paged import EngineConfig, SamplingParams
from hf_paged.quant.linear import QuantLinear

from ..engine import systems
from ..engine.workload import Request, Workload, slices
from . import stock, workload
from .kernels import measure_copy_bandwidth
from .models import ModelShape, random_model
from .profile import StepProfile, profile_steps
from .report import Clock, Target, release_memory
from .session import Session, add_models, open_session, option_parser
from .timing import synchronize

MINUTES = 6
INT4 = "hf_paged, int4"
QUANTIZED = {"int4": INT4, "fp8": "hf_paged, fp8"}
PAGED, ONE, BATCH, CONTINUOUS = "hf_paged", "stock generate", "stock generate, 32", "stock continuous batching"
STEP_TARGETS = {"Llama-3.1-8B": Target(1.25, at_most=True), "Qwen3-0.6B": Target(2.0, at_most=True)}  # at batch 1
KERNEL_TARGET = Target(8, at_most=True)  # a decode layer
SPEEDUP_TARGETS = {ONE: Target(24), CONTINUOUS: Target(3)}
QUANTIZED_TARGETS = {("Llama-3.1-8B", INT4): Target(2.3)}  # a decode step of one sequence, times the speed in bf16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything to run."""

    batches: Sequence[int] = (1, 8, 64, 256)
    prompt: int = 512  # of the decode steps
    quantized: Sequence[int] = (1, 8)  # the same, of quantized models
    steps: int = 64
    first_token: tuple[int, int] = (32, 1024)  # requests, prompt tokens
    requests: int = 256
    lengths: tuple[int, int] = workload.LENGTHS
    one_requests: int = 6  # stock's sample, one at a time
    one_steps: int = 96
    batch: int = 32
    batch_steps: int = 128


SIZES = Sizes()
TINY_SIZES = Sizes(batches=(1, 3), quantized=(1,), prompt=20, steps=4, first_token=(3, 24), requests=5, lengths=(3, 12),
                   one_requests=2, one_steps=6, batch=3, batch_steps=6)  # fmt: skip
MIN_CONTINUOUS, AFTER_CONTINUOUS = 20, 40  # seconds it needs at least, and that the engine's second run takes
CONTINUOUS_REQUESTS = {"Llama-3.1-8B": 96}  # of 256: stock would take minutes for all of them


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser(__doc__, MINUTES)
    add_models(parser)
    options = parser.parse_args(arguments)
    session = open_session(options)
    measure_copy_bandwidth(session)
    run(session, options.models)
    return session.report.close()


def run(session: Session, names: Sequence[str]) -> None:
    """All parts of all models, within the session's time; the smaller models first."""
    shapes = sorted((session.shapes[name] for name in names), key=ModelShape.weight_bytes)
    for done, shape in enumerate(shapes):
        clock = session.clock.part(session.clock.left / (len(shapes) - done))
        print(f"{shape.name}, {session.dtype_name}, random weights:", flush=True)
        session.report.attempt(shape.name, lambda: ModelBench(session, shape, clock).run())  # noqa: B023
        release_memory(session.device)


class ModelBench:
    """One model through all systems, in turn on the same weights: patched and unpatched again."""

    def __init__(self, session: Session, shape: ModelShape, clock: Clock):
        self.session, self.shape, self.clock, self.report = session, shape, clock, session.report
        self.sizes = TINY_SIZES if session.tiny else SIZES
        self.work = workload.nano_vllm(
            count=self.sizes.requests, lengths=self.sizes.lengths, vocab_size=shape.vocab_size
        )
        count = CONTINUOUS_REQUESTS.get(shape.name, len(self.work.requests))
        self.part = Workload(f"{self.work.name}, first {count}", self.work.requests[:count])
        if count == len(self.work.requests):
            self.part = self.work
        self.paged: dict[int, list[float]] = defaultdict(list)  # requests of the workload -> the engine's rates
        self.stock: dict[str, stock.StockRun] = {}
        self.steps: dict[tuple[str, int], float] = {}  # system, batch -> milliseconds
        self._make_model()

    def _make_model(self) -> None:
        """The same weights every time; those there were make room first."""
        self.model = None
        release_memory(self.session.device)
        self.model = random_model(self.shape.config(), self.session.device, self.session.dtype)

    def run(self) -> None:
        with self._engine() as engine:
            self._part("warm-up", lambda: self._warm_up(engine))
            for batch in self.sizes.batches:
                self._part(f"decode steps of {batch}", lambda: self._decode(engine, batch))  # noqa: B023
            self._part("first tokens", lambda: self._first_tokens(engine))
            self._part("the workload", lambda: self._paged(engine, self.work))
        for kind in QUANTIZED:
            self._part(f"quantized to {kind}", lambda: self._quantized(kind))  # noqa: B023
        self._make_model()
        self._part(ONE, self._stock_one)
        self._part(BATCH, self._stock_batch)
        self._part(CONTINUOUS, self._stock_continuous)
        release_memory(self.session.device)
        with self._engine() as engine:
            self._part("warm-up", lambda: self._warm_up(engine))
            for work in {self.work.fingerprint(): self.work, self.part.fingerprint(): self.part}.values():
                self._part("the workload again", lambda: self._paged(engine, work))  # noqa: B023
            self._part("the workload, sampled", lambda: self._sampled(engine))
        self._compare()

    def _part(self, name: str, work: Callable[[], object]) -> None:
        if self.clock.left < 0:
            return self.report.skip(f"{self.shape.name}: {name}", "out of time")
        self.report.attempt(f"{self.shape.name}: {name}", work)

    @contextmanager
    def _engine(self, most: int | None = None) -> Iterator[hf_paged.Engine]:
        start = time.perf_counter()
        most = most or max(*self.sizes.batches, self.sizes.first_token[0], 64)
        config = EngineConfig(max_num_seqs=most, attention_backend=self.session.backend, prefix_cache=False)
        with hf_paged.Engine(self.model, config=config) as engine:
            self._add("start", PAGED, "time", "s", [time.perf_counter() - start])
            yield engine
        release_memory(self.session.device)

    def _add(self, name: str, system: str, metric: str, unit: str, samples: Sequence[float], **options) -> float:
        return self.report.add("engine", name, system, metric, unit, samples, model=self.shape.name,
                               dtype=self.session.dtype_name, **options)  # fmt: skip

    def _warm_up(self, engine: hf_paged.Engine) -> None:
        """Compile kernels and capture graphs outside the measured time: steps of every size from the largest down."""
        systems.run_paged(engine, self._warm_up_requests())
        explanation = hf_paged.explain(self.model)
        for name, reason in {**explanation.fallbacks, **explanation.off}.items():
            print(f"  slower: {name}: {reason}", flush=True)

    def _warm_up_requests(self) -> Sequence[Request]:
        return workload.dwindling(self.shape.vocab_size, count=max(self.sizes.batches)).requests

    # Decode steps

    def _decode(self, engine: hf_paged.Engine, batch: int, system: str = PAGED, weight_bytes: int | None = None) -> None:
        """Steps in which `batch` sequences decode one token each, by the wall clock, and a profile of some more."""
        sizes = self.sizes
        work = workload.uniform(self.shape.vocab_size, count=batch, prompt=sizes.prompt, output=4 * sizes.steps)
        params = SamplingParams(temperature=0.0, max_tokens=4 * sizes.steps)
        for request in work.requests:
            engine.add(list(request.prompt), params)
        outputs = {}
        while len(outputs) < batch:
            outputs |= {one.request_id: one for one in engine.step() if one.error or one.outputs[0].token_ids}
        if failed := next((one.error for one in outputs.values() if one.error), None):
            raise failed
        for _ in range(3):
            engine.step()
        seconds, context = [], 0.0
        for _ in range(sizes.steps):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
            context += sum(sizes.prompt + len(one.outputs[0].token_ids) for one in outputs.values()) / sizes.steps
        profiled = max(2, sizes.steps // 8)

        def some_steps():
            for _ in range(profiled):
                engine.step()
            synchronize(self.session.device)

        profile = profile_steps(some_steps, profiled, self.shape.num_layers, self.session.device)
        for request_id in outputs:
            engine.abort(request_id)
        weight_bytes = weight_bytes or self.shape.weight_bytes(self.session.dtype.itemsize)
        self._report_steps(batch, system, weight_bytes, seconds, context, profile, engine.stats()["cuda_graphs"])

    def _report_steps(
        self, batch: int, system: str, weight_bytes: int, seconds: list[float], context: float, profile: StepProfile,
        graphs: int,
    ) -> None:  # fmt: skip
        """`context` is how many tokens the keys and values of all sequences together were, on average."""
        name, own = f"decode of {batch}", system == PAGED
        num_bytes = weight_bytes + context * self.shape.kv_bytes_per_token(self.session.dtype.itemsize)
        floor = num_bytes / self.session.copy_bandwidth
        median = self._add(name, system, "step", "ms", [s * 1e3 for s in seconds], floor_ms=floor * 1e3, context=context,
                           cuda_graphs=graphs)  # fmt: skip
        self.steps.setdefault((system, batch), median)
        self._add(name, system, "step by its floor", "x", [s / floor for s in seconds],
                  target=STEP_TARGETS.get(self.shape.name) if own and batch == 1 else None)  # fmt: skip
        self._add(name, system, "kernels per layer", "", [profile.per_layer], target=KERNEL_TARGET if own else None,
                  elsewhere=profile.elsewhere, names=profile.names)  # fmt: skip
        self._add(name, system, "device idle", "share", [max(0.0, 1 - profile.busy_seconds * 1e3 / median)])

    # The same weights, rounded

    def _quantized(self, kind: str) -> None:
        """Decode steps of the model quantized on the spot, by those of the model as it was."""
        self._make_model()
        system, batches = QUANTIZED[kind], self.sizes.quantized
        start = time.perf_counter()
        hf_paged.patch(self.model, quantization=kind)
        self._add("quantize", system, "time", "s", [time.perf_counter() - start])
        hf_paged.unpatch(self.model)
        weight_bytes = self._linear_bytes()
        self._add("linear layers", system, "memory", "GiB", [weight_bytes / 2**30])
        with self._engine(most=max(batches)) as engine:
            systems.run_paged(engine, workload.dwindling(self.shape.vocab_size, count=max(batches)).requests)
            for batch in batches:
                self._decode(engine, batch, system, weight_bytes)
        for batch in batches:
            if (PAGED, batch) in self.steps:
                self._add(f"decode of {batch}", system, "speed-up", "x", [self.steps[PAGED, batch] / self.steps[system, batch]],
                          target=QUANTIZED_TARGETS.get((self.shape.name, system)) if batch == 1 else None,
                          baseline=PAGED)  # fmt: skip

    def _linear_bytes(self) -> int:
        """Of all weights that one step reads, as they are now."""
        layers = [module for module in self.model.modules() if isinstance(module, QuantLinear)]
        return sum(layer.quantized.nbytes for layer in layers) + self.model.lm_head.weight.nbytes

    # First tokens

    def _first_workload(self) -> Workload:
        count, length = self.sizes.first_token
        return workload.uniform(self.shape.vocab_size, count=count, prompt=length, output=2, seed=3)

    def _first_tokens(self, engine: hf_paged.Engine) -> None:
        work = self._first_workload()
        outputs = engine.generate([list(request.prompt) for request in work.requests], systems.greedy(2))
        waited = [output.metrics.first_token - output.metrics.arrival for output in outputs]
        self._add(work.name, PAGED, "time to first token", "ms", [seconds * 1e3 for seconds in waited])

    # The workload

    def _paged(self, engine: hf_paged.Engine, work: Workload) -> None:
        run = systems.run_paged(engine, work.requests)
        self.paged[len(work.requests)].append(run.rate)
        self._add_rate(work, PAGED, run.rate, kv_bytes_peak=run.kv_bytes)

    def _add_rate(self, work: Workload, system: str, rate: float, **detail) -> None:
        detail |= {"fingerprint": work.fingerprint(), "workload_requests": len(work.requests)}
        self._add(work.name, system, "output tokens", "1/s", [rate], **detail)

    def _sampled(self, engine: hf_paged.Engine) -> None:
        """The same at temperature 0.6, as nano-vllm runs it."""
        requests = self.work.requests
        params = [SamplingParams(temperature=0.6, seed=i, max_tokens=r.max_new_tokens) for i, r in enumerate(requests)]
        start = time.perf_counter()
        outputs = engine.generate([list(request.prompt) for request in requests], params)
        seconds = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        self._add("nano-vllm, temperature 0.6", PAGED, "output tokens", "1/s", [made / seconds])

    # Stock, on the same weights

    def _stock_one(self) -> None:
        chosen = [[self.work.requests[i]] for i in slices(self.work, 1, self.sizes.one_requests)[0]]
        stock.run_generate(self.model, chosen[:1], stock.SHORT + 2)  # the first call is slower
        self._add_stock(self.work, ONE, stock.run_generate(self.model, chosen, self.sizes.one_steps))

    def _stock_batch(self) -> None:
        first = self._first_workload()
        stock.time_to_first_token(self.model, first.requests)
        waited = stock.time_to_first_token(self.model, first.requests)
        self._add(first.name, BATCH, "time to first token", "ms", [waited * 1e3])
        chosen = [self.work.requests[i] for i in slices(self.work, 1, self.sizes.batch)[0]]
        self._add_stock(self.work, BATCH, stock.run_generate(self.model, [chosen], self.sizes.batch_steps))

    def _stock_continuous(self) -> None:
        limit = self.clock.left - AFTER_CONTINUOUS
        if limit < MIN_CONTINUOUS:
            return self.report.skip(f"{self.shape.name}: {CONTINUOUS}", "out of time")
        run = stock.run_continuous(self.model, self.part.requests, self._warm_up_requests(), limit)
        self._add_stock(self.part, CONTINUOUS, run)

    def _add_stock(self, work: Workload, system: str, run: stock.StockRun) -> None:
        self.stock[system] = run
        self._add_rate(work, system, run.rate, **run.detail())

    def _compare(self) -> None:
        """The engine's runs, before and after stock's, by stock's: continuous batching on the same requests only."""
        for system, run in self.stock.items():
            work = self.part if system == CONTINUOUS else self.work
            speedups = [rate / run.rate for rate in self.paged[len(work.requests)]]
            if speedups:
                self._add(work.name, PAGED, "speed-up", "x", speedups, target=SPEEDUP_TARGETS.get(system),
                          baseline=system, **run.detail())  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
