"""What all tests share: quiet, single-threaded libraries and the way to real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import REAL_SETS

# Read by the libraries when they are loaded, so no test pays for one it does not use, and inherited
# by the processes tests start. One thread each: figures do not depend on the machine's cores, and
# sums are always added in the same order.
os.environ.update(
    GLOG_minloglevel="2",  # pycolmap: errors only; tests provoke its warnings on purpose
    OPENCV_FOR_THREADS_NUM="1",
    OMP_NUM_THREADS="1",  # torch and every BLAS
    OPENBLAS_NUM_THREADS="1",  # NumPy's own build
)


@pytest.fixture(scope="session")
def real_set() -> Callable[[str], Path]:
    """Gives the folder of a real data set by its name; skips the test where there is none."""

    def find(name: str) -> Path:
        folder = REAL_SETS / name
        if not folder.is_dir():
            pytest.skip(f"the real data set {name} is not here: {folder}")
        return folder

    return find
