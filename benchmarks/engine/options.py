"""What `hf-paged bench` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_paged.benchmarks import schema
from hf_paged.hf.quantize.spot import check_kind

from ..peers.load import Peer
from . import workload
from .systems import PAGED, STOCK_BATCH, STOCK_CONTINUOUS, STOCK_ONE

SYSTEMS = {"paged": PAGED, "one": STOCK_ONE, "batch": STOCK_BATCH, "continuous": STOCK_CONTINUOUS}
PARTS = "throughput", "rates", "concurrency", "memory", "quantized"
BOTH = "mixed", "shared"  # what throughput runs by default


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run. `multiples` are rates, as multiples of what stock serves one at a time."""

    rounds: int
    requests: int | None
    stock_sample: int | None
    load_requests: int
    multiples: tuple[float, ...]


QUICK = Scale(rounds=1, requests=12, stock_sample=2, load_requests=6, multiples=(0.7, 2, 6))
FULL = Scale(rounds=3, requests=None, stock_sample=24, load_requests=32, multiples=(0.5, 1, 2, 4, 8))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run: see `hf-paged bench --help`, whose options these are. None leaves a number to the scale.

    `systems` are names of SYSTEMS, none of them if only `peers` are measured. `workloads` and `load_workload` are names of
    `workload.WORKLOADS` or paths of traces. `rank` is which of `num_ranks` processes this is; several run throughput only.
    """

    model: str | None = None
    parts: Sequence[str] | None = None
    workloads: Sequence[str] = BOTH
    load_workload: str = "short"
    systems: Sequence[str] | None = None
    peers: Sequence[Peer] = ()
    peer_headers: dict = field(default_factory=dict)
    rates: Sequence[float] = ()
    levels: Sequence[int] = (1, 2, 4, 8, 16, 32)
    scale: Scale = QUICK
    rounds: int | None = None
    stock_sample: int | None = None
    requests: int | None = None
    max_num_seqs: int = 64
    speculation: str | None = None
    quantization: str | None = None
    threads: int = 2
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    rank: int = 0
    num_ranks: int = 1
    expert_parallel: bool = False
    out: Path = field(default_factory=schema.results_folder)
    profile: Path | None = None
    readme: Path | None = None

    def __post_init__(self):
        def fill(name: str, value) -> None:
            object.__setattr__(self, name, value)  # of a frozen dataclass

        alone = self.num_ranks == 1
        if self.systems is None:
            fill("systems", tuple(SYSTEMS) if alone else ("paged", "one", "batch"))
        if self.parts is None:
            fill("parts", PARTS if alone else ("throughput",))
        for value in self.parts:
            if value not in PARTS:
                raise ValueError(f"parts has no {value!r}; there are {', '.join(PARTS)}")
        for value in (*self.workloads, self.load_workload):
            workload.check_name(value)
        for value in self.systems:
            if value not in SYSTEMS:
                raise ValueError(f"systems has no {value!r}; there are {', '.join(SYSTEMS)}")
        for peer in self.peers:
            if peer.name in SYSTEMS.values():
                raise ValueError(f"peers: {peer.name!r} is a system of this process; give it another name")
        if not self.systems and not self.peers:
            raise ValueError("systems is empty, and there are no peers: nothing would be measured")
        if not self.systems:
            fill("parts", tuple(part for part in self.parts if part in ("rates", "concurrency")))
        if not alone and (set(self.parts) != {"throughput"} or "continuous" in self.systems or self.peers):
            raise ValueError("on several ranks there is only the part throughput, of the systems paged, one and batch")
        if self.profile is not None and ("paged" not in self.systems or not alone):
            raise ValueError("profile is of the system paged, in one process")
        if self.readme is not None and not self.readme.is_file():
            raise ValueError(f"readme: there is no {self.readme}; --readme works in a checkout")
        if self.speculation not in (None, "ngram"):
            raise ValueError(f"speculation must be ngram or left out, got {self.speculation!r}")
        check_kind(self.quantization)
        for name in ("rounds", "threads", "max_num_seqs", "stock_sample", "requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("rounds", "stock_sample", "requests"):
            if getattr(self, name) is None:
                fill(name, getattr(self.scale, name))
        if any(not rate > 0 for rate in self.rates):
            raise ValueError(f"rates must be above 0, got {min(self.rates)}")

    def work(self, name: str, tokenizer, *, turn: int = 0, count: int | None = None) -> workload.Workload:
        return workload.make(name, tokenizer, seed=self.seed + turn, count=count or self.requests)
