"""The machine and the versions that figures were measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from adapters.benchmark.measuring import usable_processors
from adapters.install_advice import installed_version

_PACKAGES = ("pycolmap", "numpy", "opencv-python-headless", "onnxruntime", "av")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a benchmark ran."""

    processor: str
    num_processors: int  # usable by this process
    memory_gb: float | None
    system: str
    python: str
    versions: dict[str, str]  # of LiveSfM and the packages that do the work
    environment: dict[str, str]  # variables that decide how many threads libraries take


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        processor=_processor(),
        num_processors=usable_processors(),
        memory_gb=_memory_gb(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={
            "livesfm": installed_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        environment={key: value for key, value in os.environ.items() if key.startswith("OMP_")},
    )


def load_average() -> float:
    """Processes that ran or waited to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_gb() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
