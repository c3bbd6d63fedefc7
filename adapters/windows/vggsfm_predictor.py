"""VGGSfM camera predictor: initial cameras of a window from its images, by upstream's network."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from adapters.windows.vggsfm_window import (
    SQUARE_PX,
    InitialCameras,
    Refusal,
    hub_first,
    square_scale,
    usable_observations,
)
from engine.errors import ConfigError
from engine.types import Float64Array, Uint8Array
from engine.window_types import WindowProblem, WindowStatus

ImageReader = Callable[[str], Uint8Array | None]  # (H, W, 3) RGB by name; None: there is none

_INPUT_EDGE_PX: Final = 336  # that the network sees
_PREFIX: Final = "camera_predictor."  # of its weights in upstream's checkpoint
_BACKBONE: Final = "facebookresearch_dinov2_main"  # in the folder of torch.hub
_HOW_TO_GET_BACKBONE: Final = (
    "python -c \"import torch; torch.hub.load('facebookresearch/dinov2', 'dinov2_vitb14_reg')\""
)


class FolderImages:
    """Reads images of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Uint8Array | None:
        """The image (H, W, 3), RGB, of a name; None where there is none that can be read."""
        import cv2

        path = self._folder / name
        if not path.is_file():
            return None
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        return None if image is None else np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


class PredictedCameras:
    """Initial cameras predicted by the network in one pass over all images of a window.

    Args:
        network: upstream's camera predictor with its weights.
        read_image: reads the image of a name in ``WindowProblem.image_names``.
    """

    def __init__(self, network: Any, *, read_image: ImageReader) -> None:
        self._network = network
        self._read_image = read_image

    def __call__(self, problem: WindowProblem) -> InitialCameras | Refusal:
        """Cameras of all frames, in a gauge of their own.

        A refusal where an image is missing or of another size than the tracks are in.
        """
        import torch

        if not problem.image_names:
            return _no_images("the window does not name its images")
        inputs = []
        order = hub_first(usable_observations(problem))  # all cameras are relative to the first
        for frame in order.tolist():
            image = self._read(problem, frame)
            if isinstance(image, Refusal):
                return image
            inputs.append(_in_square(image))
        images = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).float() / 255.0
        try:
            with torch.no_grad():
                cameras = self._network(images, batch_size=1)["pred_cameras"]
        except RuntimeError as error:  # by PyTorch, out of memory above all
            reason = f"camera predictor: {error}".partition("\n")[0]
            return Refusal(status=WindowStatus.SOLVER_FAILED, reason=reason)
        poses = torch.cat([cameras.R, cameras.T[:, :, None]], dim=2).double().cpu().numpy()
        in_square = cameras.focal_length.double().cpu().numpy().mean(axis=1) * SQUARE_PX / 2.0
        if not (np.isfinite(poses).all() and np.isfinite(in_square).all() and min(in_square) > 0.0):
            reason = "predicted cameras are no cameras"
            return Refusal(status=WindowStatus.SOLVER_FAILED, reason=reason)
        back = np.argsort(order)
        focal_px = in_square[back] / square_scale(problem)[problem.camera_idx]
        return InitialCameras(
            cam_from_world=poses[back],
            focal_px=_median_by_camera(problem, focal_px),
            has_own_gauge=True,
        )

    def _read(self, problem: WindowProblem, frame: int) -> Uint8Array | Refusal:
        """The image of a frame, if it is as large as the problem states."""
        name = problem.image_names[frame]
        width, height = problem.image_sizes[problem.camera_idx[frame]].tolist()
        image = self._read_image(name)
        if image is None:
            return _no_images(f"{name} cannot be read")
        if image.shape != (height, width, 3):
            return _no_images(f"{name} has the shape {image.shape}, not {(height, width, 3)}")
        return image


def _no_images(reason: str) -> Refusal:
    return Refusal(status=WindowStatus.NO_IMAGES, reason=reason)


def _in_square(image: Uint8Array) -> Uint8Array:
    """An image in the middle of a black square of the network's size."""
    import cv2

    height, width = image.shape[:2]
    scale = _INPUT_EDGE_PX / max(height, width)
    size = [max(1, round(scale * edge)) for edge in (width, height)]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    left, top = ((_INPUT_EDGE_PX - edge) // 2 for edge in size)
    square = np.zeros((_INPUT_EDGE_PX, _INPUT_EDGE_PX, 3), np.uint8)
    square[top : top + size[1], left : left + size[0]] = small
    return square


def _median_by_camera(problem: WindowProblem, focal_px: Float64Array) -> Float64Array:
    """(C,) focal lengths of frames (S,) by camera; 0 for a camera without frames."""
    medians = np.zeros(len(problem.image_sizes))
    for idx in np.unique(problem.camera_idx).tolist():
        medians[idx] = np.median(focal_px[problem.camera_idx == idx])
    return medians


def load_predictor(path: Path, *, make_network: Callable[[], Any]) -> Any:
    """The camera predictor with weights of upstream's public checkpoint.

    The checkpoint is read without unpickling anything but tensors. The code of its backbone,
    DINOv2, comes from the folder where torch.hub keeps it; nothing is fetched.

    Args:
        path: a file with the weights of all of upstream's networks.
        make_network: makes the network, without weights.

    Raises:
        ConfigError: the file cannot be read, has other weights, or the backbone's code is missing.
    """
    state = _weights(path)
    network = _without_weights(make_network)
    wanted = network.state_dict()
    absent, foreign = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = sorted(name for name in set(wanted) & set(state) if _differs(wanted[name], state[name]))
    for names, what in ((absent, "lacks"), (foreign, "has foreign"), (other, "has differing")):
        if names:
            raise ConfigError(
                f"{path}: does not fit upstream's camera predictor, {what} weights:"
                f" {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            )
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _differs(wanted: Any, found: Any) -> bool:
    return bool(wanted.shape != found.shape)


def _weights(path: Path) -> dict[str, Any]:
    """The predictor's tensors by their names in the network."""
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: is no file of weights: {reason}") from error
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in items
        if isinstance(name, str) and name.startswith(_PREFIX) and isinstance(value, torch.Tensor)
    }
    if not weights:
        raise ConfigError(f"{path}: has no weights of upstream's camera predictor ({_PREFIX}...)")
    return weights


def _without_weights(make_network: Callable[[], Any]) -> Any:
    """The network, its backbone's code from where torch.hub keeps it instead of the internet."""
    import torch

    folder = Path(torch.hub.get_dir()) / _BACKBONE
    if not (folder / "hubconf.py").is_file():
        raise ConfigError(
            f"upstream's camera predictor needs the code of DINOv2 in {folder}:"
            f" {_HOW_TO_GET_BACKBONE}"
        )
    hub: Any = torch.hub
    load = hub.load

    def load_kept(_: str, model: str, **__: object) -> Any:
        return load(str(folder), model, source="local", pretrained=False)

    try:
        hub.load = load_kept
        return make_network()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"DINOv2 in {folder} cannot be loaded: {error}") from error
    finally:
        hub.load = load
