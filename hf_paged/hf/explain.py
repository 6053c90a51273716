"""What runs where in a patched model, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hf_paged_kernels import fused, ops
from hf_paged_kernels.quantized import QuantizedWeight

from ..base.config import EngineConfig
from ..base.errors import KernelUnavailable
from ..base.types import AdapterInfo
from ..engine.build import wants_graphs
from ..quant.packed import Packed
from .attention import drops_softcap
from .quantize.targets import left_plain
from .sharding import describe_shards
from .spec import NO_LIMIT, text_config
from .watch import hooked_modules


@dataclass(frozen=True)
class LayerExplanation:
    """One layer that keeps something: its kind, its sizes, the kernel in use and, for a slower path, the reason.

    `heads` is query/key-value heads x head dim of an attention layer, bytes of one sequence's state of other layers.
    """

    layer: int
    kind: str
    heads: str
    kernel: str
    reason: str | None = None


@dataclass(frozen=True)
class WeightsExplanation:
    """Quantized linear layers of one format: what they are stored as, what they are in memory, and what multiplies.

    `input` is the type to which inputs are rounded, None if they are not.
    """

    format: str
    kind: str
    input: str | None
    layers: int
    num_bytes: int
    kernel: str
    reason: str | None = None

    def __str__(self) -> str:
        rounded = f" x {self.input}" if self.input else ""
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        return f"{self.layers} layers {self.format}: {self.kind}{rounded} in {size}, {self.kernel}"


@dataclass(frozen=True)
class Explanation:
    """`str()` is a table.

    Attributes:
        adapters: those that the engine has loaded.
        weights: the quantized linear layers, by format, shape of their scales and kernel.
        fused: kernel -> modules it stands in for.
        plain: linear layers of a quantized model's decoder layers that are not quantized -> why.
        fallbacks: every slower path that this model takes on this machine, with its reason.
        calls: options of `generate` that sent a call so far to transformers' own path, with the reason.
        guesses: what speculation does; None if it is off.
        exact: whether a token's logits are the same bits in any batch (`EngineConfig.exact`).
        second_forward: why an exact forward that trains has its gradient from a second one; None if it is one forward.
        images: how images get their embeddings; None if the model takes none on pages.
        offload: what host memory is used for; None if for nothing.
        graphs: which steps run as CUDA graphs; None if none do.
        off: what rests for the time being because of hooks or replaced modules, with the reason.
        alone: class of attention modules or decoder layers that run their own code, part by part -> why.
        launches: the kernels of Triton and torch that a decoder layer launched for one token when the model was patched,
            by name, of the layer with the most of them; None without Triton, or with `verify`.
        largest_difference: that `patch(verify=True)` found between a row of a layer's output, or of the logits, and
            the unpatched model's, as a share of the row's size (in 16-bit types: of the median row, where that is
            largest); None if it was not asked to.
        limits: what holds on a patched model and would not hold on an unpatched one.
        shards: how a sharded model's layers are dealt out to its ranks.
    """

    model: str
    dtype: str
    device: str
    layers: list[LayerExplanation]
    fused: dict[str, int]
    plain: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    launches: list[str] | None = None
    largest_difference: float | None = None
    limits: list[str] = field(default_factory=list)
    guesses: str | None = None
    exact: bool = False
    second_forward: str | None = None
    offload: str | None = None
    images: str | None = None
    graphs: str | None = None
    weights: list[WeightsExplanation] = field(default_factory=list)
    adapters: list[AdapterInfo] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)

    def raise_on_fallback(self) -> None:
        """Raise KernelUnavailable if anything takes a slower path now, whatever calls did (`EngineConfig(strict=True)`)."""
        for name, reason in self.fallbacks.items():
            raise KernelUnavailable(f"strict: {name} takes a slower path: {reason}")
        for name, reason in self.off.items():
            raise KernelUnavailable(f"strict: {name} is off: {reason}")

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.dtype} on {self.device})", "", "layers  kind                   heads           kernel"]
        for first, last, layer in sorted(_runs(self.layers), key=lambda run: run[0]):
            number = str(first) if first == last else f"{first}-{last}"
            lines.append(f"{number:<7} {layer.kind:<22} {layer.heads:<15} {layer.kernel}")
        fused = ", ".join(f"{count} {kind}" for kind, count in self.fused.items())
        lines += ["", f"fused   {fused or 'nothing'}"]
        lines += [f"shards  {shards}" for shards in self.shards]
        lines += [f"weights {weights}" for weights in self.weights]
        lines += [f"adapter {_adapter(info)}" for info in self.adapters]
        lines += [f"plain   {name}: {reason}" for name, reason in self.plain.items()]
        lines += [f"alone   {name}: {reason}" for name, reason in self.alone.items()]
        if self.launches is not None:
            lines.append(f"kernels {len(self.launches)} a layer for a token: {', '.join(self.launches)}")
        if self.exact:
            lines.append("exact   a token's logits have the same bits in any batch, and in model(input_ids)")
        if self.second_forward:
            lines.append(f"exact   forwards that train run twice: {self.second_forward}")
        if self.guesses:
            lines.append(f"guesses {self.guesses}")
        if self.images:
            lines.append(f"images  {self.images}")
        if self.offload:
            lines.append(f"offload {self.offload}")
        if self.graphs:
            lines.append(f"graphs  {self.graphs}")
        lines += [f"slower  {name}: {reason}" for name, reason in {**self.fallbacks, **self.calls}.items()]
        lines += [f"off     {name}: {reason}" for name, reason in self.off.items()]
        if self.largest_difference is not None:
            differ = f"rows differ by at most {self.largest_difference:.1e} of their size"
            lines.append(f"checked against the unpatched model: {differ}")
        lines += [f"limit   {limit}" for limit in self.limits]
        return "\n".join(lines)


def _runs(layers: list[LayerExplanation]):
    """Consecutive layers that say the same, as (first, last, layer)."""
    start = 0
    for index, layer in enumerate(layers):
        following = layers[index + 1] if index + 1 < len(layers) else None
        if following is None or following != replace(layer, layer=layer.layer + 1):
            yield layers[start].layer, layer.layer, layer
            start = index + 1


def explain_patch(model, patch, config) -> Explanation:
    """What a Patch did to `model` and what an engine of `config` would run."""
    adapter = patch.adapter
    kernel = ops.resolve_backend(config.attention_backend, adapter.device)
    reason = None
    if kernel == "reference":
        own = ops.OWN_BACKEND.get(adapter.device.type)
        reason = f"no kernels for {adapter.device.type}" if own is None else ops.why_unsupported(own, adapter.device)
        if config.attention_backend == kernel:
            reason = "it was asked for"
    layers = [
        LayerExplanation(
            layer=spec.layer_idx,
            kind=_kind(spec, patch.adaptations),
            heads=f"{spec.num_heads}/{spec.num_kv_heads} x {spec.head_dim}",
            kernel=kernel,
            reason=reason,
        )
        for spec in adapter.layers
    ]
    layers += [
        LayerExplanation(spec.layer_idx, spec.kind, f"{spec.num_bytes} B", "stock's own, by sequence")
        for spec in adapter.states
    ]
    fallbacks = {"attention": reason} if reason else {}
    fallbacks |= patch.adaptations.notes | patch.fusions.notes
    multiplies = patch.fusions.backend  # what is not fused runs by itself, on what the device has
    multiplies = ops.resolve_backend("auto", adapter.device) if multiplies == "reference" else multiplies
    weights = _weights(model, multiplies)
    fallbacks |= {f"{entry.layers} linear layers ({entry.format})": entry.reason for entry in weights if entry.reason}
    adapters = list(adapter.adapters.infos.values())
    fallbacks |= {f"adapter {info.name}": f"forwards of its own: {info.apart}" for info in adapters if info.apart}
    limits = [f"at most {adapter.max_model_len} tokens a sequence"] if adapter.max_model_len < NO_LIMIT else []
    if adapter.length_note:
        limits.append(adapter.length_note)
    if adapter.states:
        limits.append("no prefix cache: a prefix is of no use without the states at its end")
    if adapter.team is not None:
        limits.append(f"sharded: heads, sizes and memory are those of one of {adapter.team.size} ranks")
        if adapter.device.type == "cuda" and config.cuda_graphs is None:
            limits.append("steps of a sharded model are not recorded as CUDA graphs unless cuda_graphs=True")
    if patch.scatter is not None:
        limits.append(
            "its own layers round what they are given to few bits, so tokens may differ where choices are close: its own "
            f"logits scatter by {patch.scatter:.1g} of the largest"
        )
    whole = dict.fromkeys(spec.kind for spec in adapter.states if not spec.takes_chunks)
    if whole:
        limits.append(f"{', '.join(whole)} needs a prompt in one step, even one longer than max_batch_tokens")
    rounding = [layer.quantized for layer in _quantized(model) if layer.quantized.activations is not None]
    if any(fused.rounds_to(weight, backend=multiplies) is None for weight in rounding):
        limits.append("inputs of fp8 layers are not rounded to fp8: this device does not multiply in it")
    dtype = str(adapter.dtype).removeprefix("torch.")
    if config.kv_dtype not in (None, "float32", dtype):
        limits.append(f"keys and values are rounded to {config.kv_dtype}: tokens may differ from the unpatched model's")
    implementation = model.config._attn_implementation
    if getattr(text_config(model), "attn_logit_softcapping", None) and drops_softcap(implementation):
        limits.append(f"softcap is ignored, as this transformers' {implementation!r} attention does; load with 'eager'")
    return Explanation(
        model=type(model).__name__,
        dtype=dtype,
        device=str(adapter.device),
        layers=layers,
        fused=dict(patch.fusions.counts),
        plain=left_plain(model),
        fallbacks=fallbacks,
        calls=dict(patch.calls),
        off=_resting(model, patch, config),
        alone=dict(patch.fusions.alone),
        launches=patch.launches,
        largest_difference=patch.largest_difference,
        limits=limits,
        guesses=_guesses(config),
        exact=config.exact,
        second_forward=patch.second_forward,
        offload=_offload(adapter, config),
        images=_images(adapter, config),
        graphs=_graphs(patch, config),
        weights=weights,
        adapters=adapters,
        shards=[] if adapter.team is None else describe_shards(model, adapter.team, multiplies),
    )


def _adapter(info: AdapterInfo) -> str:
    rank = "" if info.rank is None else f" of rank {info.rank}"
    return f"{info.name}: {info.kind}{rank} from {info.source}, {info.num_bytes / 2**20:.1f} MiB"


def _quantized(model) -> list[Packed]:
    return [module for module in model.modules() if isinstance(module, Packed)]


def _weights(model, backend: str) -> list[WeightsExplanation]:
    """The quantized layers of `model`, those that say the same together."""
    groups: dict[tuple, list[QuantizedWeight]] = {}
    for layer in _quantized(model):
        weight = layer.quantized
        reason = None
        if backend != "reference" and not fused.supports_linear(weight, backend=backend):
            reason = f"no {backend} kernel multiplies {weight.kind} weights with a scale for {_block(weight)}"
        rounded = fused.rounds_to(weight, backend="reference" if reason else backend)
        key = str(layer.format), weight.kind, rounded, "reference" if reason else backend, reason
        groups.setdefault(key, []).append(weight)
    return [
        WeightsExplanation(*key[:3], len(weights), sum(weight.nbytes for weight in weights), *key[3:])
        for key, weights in groups.items()
    ]


def _block(weight: QuantizedWeight) -> str:
    sizes = zip(weight.block, weight.shape, ("rows", "columns"))
    return " x ".join(f"all {name}" if size >= whole else f"{size} {name}" for size, whole, name in sizes)


def _resting(model, patch, config) -> dict[str, str]:
    off = {}
    hooked = hooked_modules(model)
    if hooked and config.prefix_cache:
        off["prefix sharing"] = f"forward hooks, on {_some(hooked)}, may treat requests differently"
    if hooked and config.speculation:
        off["guesses"] = f"forward hooks, on {_some(hooked)}, would see tokens that never come to be"
    paths = {id(module): name for name, module in model.named_modules()}
    for kind, modules in patch.fusions.stepping_aside().items():
        names = [paths[id(module)] for module in modules if id(module) in paths]
        if names:
            off[f"fused {kind}"] = f"parts of {_some(names)} are hooked or replaced"
    if reason := _why_no_graphs(patch, config):
        off["cuda graphs"] = reason
    elif wants_graphs(config, patch.adapter):
        off |= {f"cuda graphs with {name}": why for name, why in patch.adapter.adapters.unrecordable.items()}
        adapted = patch.live_engine and patch.live_engine.adapted_graphs
        if adapted and adapted.problem:
            off["cuda graphs with adapters"] = adapted.problem
    return off


def _why_no_graphs(patch, config) -> str | None:
    """Why no step runs as a CUDA graph, though they were to; None if some do, or none were to."""
    if not wants_graphs(config, patch.adapter):
        return None
    graphs = patch.live_engine and patch.live_engine.graphs
    return patch.adapter.why_unrecordable or (graphs and graphs.problem)


def _graphs(patch, config) -> str | None:
    if not wants_graphs(config, patch.adapter) or _why_no_graphs(patch, config):
        return None
    engine = patch.live_engine
    parts = [f"steps of one token for each of up to {config.max_num_seqs} sequences"]
    parts.append(_recorded(engine and engine.graphs) or "none so far")
    if with_adapters := _recorded(engine and engine.adapted_graphs):
        parts.append(f"with adapters {with_adapters}")
    return "; ".join(parts)


def _recorded(graphs) -> str | None:
    if not graphs or not graphs.recorded:
        return None
    return f"so far for {', '.join(map(str, graphs.recorded))} ({graphs.num_bytes / 2**20:.0f} MiB)"


def _some(names: list[str]) -> str:
    shown = names[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _kind(spec, adaptations) -> str:
    kind = "full" if spec.window is None else f"sliding window {spec.window}"
    if spec.chunk is not None:
        kind = f"chunks of {spec.chunk}"
    return ", ".join(filter(None, (kind, adaptations.kinds.get(spec.layer_idx))))


def _images(adapter, config: EngineConfig) -> str | None:
    if adapter.media is None:
        return None
    limits, encoder = config.images, type(adapter.module.base_model).__name__
    sight = ", which see each other and are computed in one step" if adapter.media.family.bidirectional else ""
    return (
        f"encoded by {encoder}.get_image_features, up to {limits.tokens_per_step} tokens a step, {limits.cache_memory / 2**20:.0f} "
        f"MiB kept; on pages they are tokens{sight}"
    )


def _offload(adapter, config: EngineConfig) -> str | None:
    if config.offload is None:
        return None
    keeps = "" if adapter.states or not config.prefix_cache else "evicted prefixes and "
    disk = "" if config.offload.disk is None else f", {config.offload.disk_memory / 2**20:.1f} MiB of files in {config.offload.disk} behind"
    return f"up to {config.offload.memory / 2**20:.1f} MiB of host memory for {keeps}preempted sequences{disk}"


def _guesses(config: EngineConfig) -> str | None:
    speculation = config.speculation
    if speculation is None:
        return None
    shortest, longest = speculation.ngram_range
    source = {
        "ngram": f"repeat what followed the same {shortest} to {longest} tokens before",
        "draft": "are a draft model's",
    }
    return f"{source[speculation.method]}, at most {speculation.num_tokens} tokens ahead"
