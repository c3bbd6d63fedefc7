"""What all tests share: quiet, single-threaded libraries, the way to real data, and --fast."""

from __future__ import annotations

import linecache
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.get_closest_marker("slow")]
    if config.getoption("--fast"):
        for item in slow:
            item.add_marker(pytest.mark.skip(reason="slow, left out by --fast"))
    # Files with most slow tests first: several processes then end at about the same time.
    num_slow = Counter(item.path for item in slow)
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _signals_of_a_terminal() -> None:
    """A process that nohup or a script started in the background ignores them, and tests send them.

    Processes that tests start inherit that.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _source_lines_read_once() -> Iterator[None]:
    """Sources do not change while tests run.

    In asyncio's debug mode every handle keeps a stack, and looking for changes of all its files is
    most of what that costs.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(linecache, "checkcache", lambda filename=None: None)
        yield


@pytest.fixture(scope="session")
def painted_towns_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes of a test session keep the textures of towns."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # beside the folders of the others
        folder = folder.parent
    folder /= "painted_towns"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def towns_painted_once(painted_towns_folder: Path) -> Iterator[None]:
    """Towns of one seed and image width share their textures, which take seconds to paint."""
    from tests.support import painted_towns

    with pytest.MonkeyPatch.context() as patched:
        painted_towns.paint_once(patched, painted_towns_folder)
        yield


@pytest.fixture(scope="session")
def real_set() -> Callable[[str], Path]:
    """Gives the folder of a real data set by its name; skips the test where there is none."""

    def find(name: str) -> Path:
        folder = REAL_SETS / name
        if not folder.is_dir():
            pytest.skip(f"the real data set {name} is not here: {folder}")
        return folder

    return find
