"""What runs on the device in a decode step, from torch.profiler: how many kernels, and for how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .timing import synchronize


@dataclass(frozen=True)
class StepProfile:
    """Per step: kernels in every layer and elsewhere (copies and fills count), and seconds the device was busy."""

    per_layer: int
    elsewhere: float
    busy_seconds: float
    names: dict[str, int]


def profile_steps(run: Callable[[], object], steps: int, num_layers: int, device: torch.device) -> StepProfile:
    """Profile `run`, which makes `steps` steps and leaves the device idle. On a CPU operators stand for kernels."""
    cuda = device.type == "cuda"
    synchronize(device)  # a step that runs already belongs to nobody's count
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = (event for event in profiler.events() if event.device_type == kind)
    return summarize(((event.name, event.time_range.elapsed_us() * 1e-6) for event in events), steps, num_layers)


def summarize(events: Iterable[tuple[str, float]], steps: int, num_layers: int) -> StepProfile:
    """`events`: (name, seconds) of everything that ran. A kernel is in every layer if it ran once a layer or more."""
    counts: Counter[str] = Counter()
    busy = 0.0
    for name, seconds in events:
        counts[name] += 1
        busy += seconds
    in_layers = {name: count // steps // num_layers for name, count in counts.items()}
    in_layers = {name: count for name, count in in_layers.items() if count}
    per_layer = sum(in_layers.values())
    elsewhere = sum(counts.values()) / steps - per_layer * num_layers
    return StepProfile(per_layer, elsewhere, busy / steps, in_layers)
