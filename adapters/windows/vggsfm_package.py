"""VGGSfM package: upstream's code where a user has it, found and imported with a pycolmap it fits.

Its code is licensed CC BY-NC 4.0, for non-commercial use, is no package of an index, and is not
part of this project. It is used as installed, or from a checkout.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import pdb
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final, NoReturn

import numpy as np

from adapters.install_advice import how_to_install_packages
from adapters.windows.vggsfm_colmap import FormerPycolmap
from adapters.windows.vggsfm_window import SQUARE_PX, SquareWindow
from engine.errors import ConfigError
from engine.types import Float64Array

logger = logging.getLogger(__name__)

VGGSFM_LICENCE: Final = "its licence, CC BY-NC 4.0, allows non-commercial use only"
_HOW_TO_GET: Final = (
    "get it with 'git clone https://github.com/facebookresearch/vggsfm' and name that folder in"
    f" window.vggsfm_root ({VGGSFM_LICENCE})"
)
# By what is imported. Newer versions of kornia lack names that upstream imports.
_DEPENDENCIES: Final = {
    "einops": "einops",
    "hydra": "hydra-core",
    "kornia": "kornia==0.7.3",
    "PIL": "pillow",
    "poselib": "poselib",
    "pyceres": "pyceres",
}
_OWN_PACKAGES: Final = {"vggsfm", "minipytorch3d"}
_FILE_OF_CHECKOUT: Final = "vggsfm/models/triangulator.py"
_QUIET_MODULES: Final = r"(vggsfm|minipytorch3d|kornia)(\.|$)"
_MAX_ERROR_PX: Final = 4.0  # of every gate, in px of the square, as in upstream's demo
_MIN_SHARED: Final = 8  # tracks, of two frames: fewer do not determine their relative pose
_SEED: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquareSolution:
    """Upstream's solution of a window, in a gauge of its own."""

    cam_from_world: Float64Array  # (F, 3, 4)
    focal: Float64Array  # (F,) px of the square
    points3D_in_world: Float64Array  # (T, 3) NaN: none


class VggsfmPackage:
    """Upstream's code, loaded. One thread at a time."""

    def __init__(self, modules: dict[str, ModuleType], colmap: FormerPycolmap) -> None:
        self._triangulator = modules["models.triangulator"].Triangulator(cfg=None)
        self._two_view = modules["two_view_geo.estimate_preliminary"]
        self._colmap = colmap
        self.camera_predictor: Callable[[], Any] = modules[
            "models.camera_predictor"
        ].CameraPredictor

    def solve(self, window: SquareWindow) -> SquareSolution:
        """Runs all of upstream's stages after the tracks.

        Raises:
            RuntimeError, ValueError, LookupError, ...: upstream's own errors on bad data.
        """
        import torch

        tracks = torch.tensor(window.tracks_xy, dtype=torch.float32)[None]
        is_seen = torch.tensor(window.is_seen)[None]
        images = torch.zeros(1, 1, 3, 1, 1).expand(1, len(window.frames), 3, *2 * [int(SQUARE_PX)])
        self._colmap.keeps_intrinsics = window.keeps_focal
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _without_debugger():
            torch.manual_seed(_SEED)
            output = self._triangulator(
                _cameras(window),
                tracks,
                is_seen.float(),
                images,
                {"fmat_inlier_mask": self._inliers_with_hub(tracks, is_seen)},
                pred_score=torch.ones_like(is_seen, dtype=torch.float32),
                init_max_reproj_error=_MAX_ERROR_PX,
                max_reproj_error=_MAX_ERROR_PX,
                BA_iters=1,
                robust_refine=2,
                shared_camera=False,  # see vggsfm_final_adjustment
                extract_color=False,
            )
        poses, intrinsics, points, is_point = (output[idx] for idx in (0, 1, 3, 8))
        points3D = np.full((len(window.tracks), 3), np.nan)
        points3D[is_point.numpy()] = points.numpy()
        return SquareSolution(
            cam_from_world=poses.numpy().astype(np.float64),
            focal=intrinsics[:, 0, 0].numpy().astype(np.float64),
            points3D_in_world=points3D,
        )

    def _inliers_with_hub(self, tracks: Any, is_seen: Any) -> Any:
        """(1, F - 1, T) whether both the hub and a frame see a track and agree on it.

        Upstream assumes every track to be seen in the hub, so visibility in the hub is put into the
        other frames. It fails on frames that share too few tracks with the hub to relate them.
        """
        import torch

        is_shared = is_seen & is_seen[:, :1]
        asked = torch.nonzero(is_shared[0].sum(dim=1) >= _MIN_SHARED)[:, 0]  # the hub among them
        is_inlier = torch.zeros_like(is_shared[0])
        if len(asked) > 1:
            _, found = self._two_view.estimate_preliminary_cameras_poselib(
                tracks[:, asked],
                is_shared[:, asked].float(),
                int(SQUARE_PX),
                int(SQUARE_PX),
                max_error=_MAX_ERROR_PX,
            )
            mask = found["fmat_inlier_mask"].reshape(len(asked) - 1, -1)
            is_inlier[asked[1:]] = mask & is_shared[0, asked[1:]]
        return is_inlier[None, 1:]


def load_vggsfm(root: Path | None) -> VggsfmPackage:
    """Imports upstream's package.

    Its modules get a stand-in for the pycolmap they were written for, and log what they print.

    Args:
        root: the folder of a checkout; None for an installed package ``vggsfm``.

    Raises:
        ConfigError: the package, or one that it needs, is missing, or of another version; says what
            to install, and the licence.
    """
    if root is not None:
        root = root.expanduser().resolve()
        if not (root / _FILE_OF_CHECKOUT).is_file():
            raise ConfigError(f"{root} is no checkout of VGGSfM: it has no {_FILE_OF_CHECKOUT}")
    _refuse_absent(root)
    warnings.filterwarnings("ignore", module=_QUIET_MODULES)
    warnings.filterwarnings(
        "ignore", message="CUDA is not available or torch_xla", category=UserWarning
    )
    names = ("models.triangulator", "models.camera_predictor", "two_view_geo.estimate_preliminary")
    search_path = list(sys.path)
    try:
        if root is not None:
            sys.path.insert(0, str(root))
        with contextlib.redirect_stdout(_Log()):
            modules = {name: importlib.import_module(f"vggsfm.{name}") for name in names}
    except ImportError as error:
        for name in [name for name in sys.modules if name.partition(".")[0] in _OWN_PACKAGES]:
            del sys.modules[name]
        raise _not_importable(error) from error
    finally:
        sys.path[:] = search_path
    if not hasattr(modules["two_view_geo.estimate_preliminary"], "poselib"):  # it can do without
        command = how_to_install_packages("poselib")
        raise ConfigError(f"VGGSfM needs packages that are not installed: {command}")
    colmap = FormerPycolmap()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "vggsfm":
            vars(module)["print"] = _log_line
            if "pycolmap" in vars(module):
                vars(module)["pycolmap"] = colmap
    return VggsfmPackage(modules, colmap)


def _refuse_absent(root: Path | None) -> None:
    loaded = sys.modules.get("vggsfm")
    if loaded is not None and root is not None:
        where = [Path(folder).resolve() for folder in loaded.__path__]
        if root / "vggsfm" not in where:
            raise ConfigError(f"another package vggsfm is loaded, from {where[0]}; not from {root}")
    if root is None and importlib.util.find_spec("vggsfm") is None:
        raise ConfigError(
            f"window.solver=vggsfm needs upstream's package vggsfm, and it is not installed;"
            f" {_HOW_TO_GET}; it needs: {how_to_install_packages(*_DEPENDENCIES.values())}"
        )


def _not_importable(error: ImportError) -> ConfigError:
    absent = [name for name in _DEPENDENCIES if importlib.util.find_spec(name) is None]
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in {*_OWN_PACKAGES, *_DEPENDENCIES}:
        absent.append(package)
    if absent:
        command = how_to_install_packages(*(_DEPENDENCIES.get(name, name) for name in absent))
        return ConfigError(f"VGGSfM needs packages that are not installed: {command}")
    if package == "kornia":
        return ConfigError(
            f"VGGSfM cannot be imported with this version of kornia:"
            f" {how_to_install_packages(_DEPENDENCIES['kornia'])} ({error})"
        )
    return ConfigError(f"VGGSfM cannot be imported: {error}")


def _cameras(window: SquareWindow) -> SimpleNamespace:
    """Cameras as upstream reads them; focal lengths in half edges of the square."""
    import torch

    focal = torch.tensor(window.focal / (SQUARE_PX / 2.0))
    return SimpleNamespace(
        R=torch.tensor(window.cam_from_hub[:, :, :3]),
        T=torch.tensor(window.cam_from_hub[:, :, 3]),
        focal_length=torch.stack([focal, focal], dim=1),
    )


class _Log:
    """A text stream that goes to the log."""

    def write(self, text: str) -> int:
        if text.strip():
            _log_line(text.rstrip())
        return len(text)

    def flush(self) -> None:
        """There is nothing to."""


def _log_line(*values: object, **_: object) -> None:
    """Stands for ``print`` in upstream's modules."""
    logger.debug("VGGSfM says: %s", " ".join(str(value) for value in values))


@contextlib.contextmanager
def _without_debugger() -> Iterator[None]:
    """Makes upstream's breakpoints raise, so that a run does not wait at a debugger."""
    set_trace = pdb.set_trace
    pdb.set_trace = _stopped
    try:
        yield
    finally:
        pdb.set_trace = set_trace


def _stopped(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("upstream stopped at a debugger")
