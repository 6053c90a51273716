"""Engine configuration: frozen, keyword-only, every field checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .errors import InvalidArgument
from .images import ImageLimits
from .offload import Offload, offload_of
from .sizes import parse_bytes

KV_DTYPES = ("float32", "bfloat16", "float16", "fp8", "int8")
POLICIES = ("fcfs", "priority", "fair")
ATTENTION_BACKENDS = ("auto", "cpu", "triton", "reference")
SPECULATION = ("ngram", "draft")
MAX_SPECULATIVE_TOKENS = 64


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed ahead; those that would have been sampled anyway are kept: the same output in fewer steps.

    Attributes:
        method: "ngram" repeats what prompt and output said before; "draft" asks the `draft_model` that `patch` or `Engine`
            was given.
        num_tokens: most tokens to guess for a sequence in one step, at most 64; fewer while its guesses are wrong.
        ngram_range: of "ngram", fewest latest tokens that must have occurred before for it to guess, and how many more of
            them are compared to choose among several such places.

    Raises InvalidArgument for a value that is none of these.
    """

    method: Literal["ngram", "draft"]
    num_tokens: int = 7
    ngram_range: tuple[int, int] = (2, 5)

    def __post_init__(self):
        if self.method not in SPECULATION:
            raise InvalidArgument(f"speculation must be None, 'ngram', 'draft' or a Speculation, got {self.method!r}")
        count = self.num_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_SPECULATIVE_TOKENS:
            raise InvalidArgument(
                f"speculation: num_tokens must be between 1 and {MAX_SPECULATIVE_TOKENS}, got {count!r}"
            )
        lengths = self.ngram_range
        if (
            not isinstance(lengths, (tuple, list))
            or len(lengths) != 2
            or not all(isinstance(length, int) and not isinstance(length, bool) for length in lengths)
            or not 1 <= lengths[0] <= lengths[1]
        ):
            raise InvalidArgument(
                f"speculation: ngram_range must be two integers (shortest, longest) from 1 on, got {lengths!r}"
            )
        object.__setattr__(self, "ngram_range", tuple(lengths))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs. `None` means: chosen from the model and the device.

    Attributes:
        block_size: tokens per KV block. Default 16 on CPU, 64 on CUDA.
        kv_cache_memory: most memory the KV cache may take, states of layers that keep one included: bytes as an int, a
            string such as "2GiB", or a share in (0, 1). On CPU a share of the memory that is free, by default 0.4; the
            cache starts small and grows on demand. On CUDA a share of all the device's memory that may be in use, by
            default 0.9: the cache gets what the model, everybody else and the largest step, which is measured, leave of it.
        kv_dtype: "float32", "bfloat16" or "float16"; default the model's own dtype. "fp8" (e4m3) and "int8" take about
            half of the 16-bit types' memory, at a small loss: every key and value of a head is rounded to 8 bits with a scale
            of its own.
        max_batch_tokens: token budget of one step, decodes and prefill chunks together. Exceeded by prompts that the model
            cannot compute in chunks (`explain` tells).
        max_num_seqs: most sequences running at once.
        max_model_len: most tokens (prompt and output) of one sequence; default what the model's config allows.
        prefix_cache: reuse KV blocks of equal prefixes; not done for models with layers that keep a state.
        policy: who runs first. "fcfs": who came first. "priority": lower numbers, every 30 seconds of waiting being worth
            one level, so that nobody waits for ever. "fair": whose `user` was served fewest tokens. With `prefix_cache`,
            each lets a request overtake some of its own priority or user, of whose prompt less is cached.
        max_queue: most requests waiting; more raise `QueueFull`. None: unbounded.
        attention_backend: "auto", "cpu" (the C++ kernels), "triton" (CUDA and ROCm) or "reference" (plain torch).
        fuse: run merged projections and fused norm/activation kernels where they are proven equal.
        strict: turn every fallback to a slower path into an error: of the model when it is patched and when requests come
            (`explain` names them), and of a call of `generate`.
        seed: seed of requests that name none.
        overlap: schedule a step while the one before it runs; its tokens stay on the device, and `step` returns them one
            call later. The same output. Requests whose tokens somebody must see one by one (their own processors or
            hooks; on CPU also penalties) make the steps they are in wait. Default on CUDA only. With speculation, never.
        speculation: guess tokens ahead: "ngram", "draft", or a `Speculation` that says more. With a `draft_model`,
            "draft" goes without saying. None: off.
        cuda_graphs: record the forward of decode steps and replay it, so that the host need not launch its kernels one by
            one. None: on CUDA, but of a sharded model only if True. What cannot be recorded runs as ever; `explain` tells.
        exact: a token's logits have the same bits whatever is computed beside it, in whatever chunks, and whatever of its
            prompt was cached; and `model(input_ids)` of the patched model gives those bits, so that its log-probabilities
            are those of generated tokens. In float32 and bfloat16.
        parallel_timeout: of a model sharded over several processes, most seconds that one waits for another in the middle
            of a step. Then all of them end, with the reason.
        images: limits on images in prompts, what a step encodes of them and what is kept; see ImageLimits.
        offload: memory of the host for prefixes that the cache has no room for, and for what preempted requests had
            computed: bytes as an int, a string such as "4GiB", or an `Offload`. None: none.
    """

    block_size: int | None = None
    kv_cache_memory: int | float | str | None = None
    kv_dtype: str | None = None
    max_batch_tokens: int | None = None
    max_num_seqs: int = 64
    max_model_len: int | None = None
    prefix_cache: bool = True
    policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    max_queue: int | None = None
    attention_backend: str = "auto"
    fuse: bool = True
    strict: bool = False
    seed: int = 0
    overlap: bool | None = None
    speculation: Literal["ngram", "draft"] | Speculation | None = None
    cuda_graphs: bool | None = None
    exact: bool = False
    parallel_timeout: float = 120.0
    images: ImageLimits = ImageLimits()
    offload: Offload | int | str | None = None

    def __post_init__(self):
        for name in ("block_size", "max_batch_tokens", "max_num_seqs", "max_model_len", "max_queue"):
            value = getattr(self, name)
            if value is None and name != "max_num_seqs":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name} must be a positive integer, got {value!r}")
        if self.block_size is not None and self.block_size % 16:
            raise InvalidArgument(f"block_size must be a multiple of 16, got {self.block_size}")
        if self.kv_cache_memory is not None:
            object.__setattr__(self, "kv_cache_memory", _bytes_or_share("kv_cache_memory", self.kv_cache_memory))
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise InvalidArgument(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.attention_backend not in ATTENTION_BACKENDS:
            known = ", ".join(ATTENTION_BACKENDS)
            raise InvalidArgument(f"attention_backend must be one of {known}, got {self.attention_backend!r}")
        if self.policy not in POLICIES:
            raise InvalidArgument(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InvalidArgument(f"seed must be an integer, got {self.seed!r}")
        if self.overlap is not None and not isinstance(self.overlap, bool):
            raise InvalidArgument(f"overlap must be True, False or None, got {self.overlap!r}")
        if self.cuda_graphs not in (None, True, False):
            raise InvalidArgument(f"cuda_graphs must be True, False or None, got {self.cuda_graphs!r}")
        if not isinstance(self.exact, bool):
            raise InvalidArgument(f"exact must be True or False, got {self.exact!r}")
        if self.exact and (not self.fuse or self.attention_backend == "reference"):
            raise InvalidArgument("exact: it needs hf_paged's own kernels; leave out fuse and attention_backend")
        timeout = self.parallel_timeout
        if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout < 1e6:
            raise InvalidArgument(f"parallel_timeout must be a positive number of seconds, got {timeout!r}")
        if not isinstance(self.images, ImageLimits):
            raise InvalidArgument(f"images must be an ImageLimits, got {self.images!r}")
        if self.offload is not None:
            object.__setattr__(self, "offload", offload_of(self.offload))
        if self.speculation is not None and not isinstance(self.speculation, Speculation):
            object.__setattr__(self, "speculation", Speculation(self.speculation))

    @property
    def kv_cache_share(self) -> float | None:
        """`kv_cache_memory` where it is a share of memory in (0, 1)."""
        return self.kv_cache_memory if isinstance(self.kv_cache_memory, float) else None

    def replace(self, **changes) -> EngineConfig:
        """A copy with some fields changed. An unknown name raises InvalidArgument."""
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InvalidArgument(
                f"{unknown[0]} is not an EngineConfig field; the fields are {', '.join(sorted(known))}"
            )
        return dataclasses.replace(self, **changes)


def _bytes_or_share(name: str, value: int | float | str) -> int | float:
    """`value` as a number of bytes, or as a float in (0, 1) if it is one or a string that says one."""
    share = value
    if isinstance(value, str):
        try:
            share = float(value)
        except ValueError:
            return parse_bytes(name, value)
    if isinstance(share, float) and 0 < share < 1:
        return share
    if isinstance(value, float):
        raise InvalidArgument(f'{name} must be bytes, a size such as "2GiB" or a share between 0 and 1, got {value!r}')
    return parse_bytes(name, value)
