"""Clocks and memory of a GPU or a CPU, and what its arithmetic gives."""

from __future__ import annotations

import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.matchers.mast3r.matcher import Device
from mast3r_bench.figures import Memory, Timing


class Probe:
    """Adds up how long named parts took: by events on a GPU, in CPU seconds on a CPU."""

    def __init__(self, device: Device) -> None:
        self._is_cuda = device.is_cuda
        self._begun: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    def synchronise(self) -> None:
        """Waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()

    def watch(self, module: nn.Module, part: str) -> None:
        """Times each call of a module from now on."""
        module.register_forward_pre_hook(lambda *_: self._begin(part))
        module.register_forward_hook(lambda *_: self._end(part))

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Times what is done within."""
        self._begin(part)
        yield
        self._end(part)

    def reset(self) -> None:
        """Forgets what was timed."""
        self._spans.clear()

    def seconds(self) -> defaultdict[str, float]:
        """The sum of each part."""
        self.synchronise()
        sums: defaultdict[str, float] = defaultdict(float)
        for part, begun, ended in self._spans:
            sums[part] += begun.elapsed_time(ended) / 1e3 if self._is_cuda else ended - begun
        return sums

    def _begin(self, part: str) -> None:
        self._begun[part] = self._now()

    def _end(self, part: str) -> None:
        self._spans.append((part, self._begun.pop(part), self._now()))

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.process_time()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What all measurements share."""

    device: Device
    probe: Probe
    seconds: float  # least time of a measurement
    repeats: int  # least runs of a measurement

    def measure(self, work: Callable[[], object], *, items: int = 1) -> Timing:
        """Times a piece of work, that is for some items; the probe has the timed runs alone."""
        for _ in range(2 if self.device.is_cuda else 1):
            work()
        self.probe.reset()
        wall_s: list[float] = []
        cpu_s: list[float] = []
        while len(wall_s) < self.repeats or sum(wall_s) < self.seconds:
            self.probe.synchronise()
            began_s, cpu_began_s = time.perf_counter(), time.process_time()
            work()
            self.probe.synchronise()
            wall_s.append(time.perf_counter() - began_s)
            cpu_s.append(time.process_time() - cpu_began_s)
        return Timing(
            median_s=float(np.median(wall_s)) / items,
            least_s=min(wall_s) / items,
            most_s=max(wall_s) / items,
            cpu_s=float(np.median(cpu_s)) / items,
            num_runs=len(wall_s),
        )

    def busy_s(self, timing: Timing) -> float:
        """How long the hardware worked on an item: on a CPU what others took is left out."""
        if self.device.is_cuda:
            return timing.median_s
        return timing.cpu_s / self.device.num_threads

    def forget_peak(self) -> None:
        """Begins a new peak of the GPU's memory."""
        if self.device.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> Memory:
        """The peak since then, and that of the process."""
        is_cuda = self.device.is_cuda
        return Memory(
            allocated_mb=torch.cuda.max_memory_allocated() / 1e6 if is_cuda else 0.0,
            reserved_mb=torch.cuda.max_memory_reserved() / 1e6 if is_cuda else 0.0,
            peak_rss_mb=peak_rss_mb(),
        )


def peak_rss_mb() -> float:
    """The most main memory this process held."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage it does not count the process that started this one
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def matrix_rate_tflops(stage: Stage, *, tiny: bool) -> float:
    """The best rate of large square matrix products in the network's precision."""
    sizes = (4096, 8192) if stage.device.is_cuda else (1024, 2048)
    rates = []
    for size in (256,) if tiny else sizes:
        left, right = (
            torch.randn(size, size, device=stage.device.name).to(stage.device.dtype)
            for _ in range(2)
        )
        out = torch.empty_like(left)

        def multiply(left: Tensor = left, right: Tensor = right, out: Tensor = out) -> None:
            for _ in range(5):
                torch.mm(left, right, out=out)

        timing = stage.measure(multiply, items=5)
        least_s = timing.least_s if stage.device.is_cuda else stage.busy_s(timing)
        rates.append(2 * size**3 / least_s / 1e12)
    return max(rates)


def device_name(device: Device) -> str:
    """The hardware's own name, where it is known."""
    if device.is_cuda:
        return torch.cuda.get_device_name(device.name)
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()
