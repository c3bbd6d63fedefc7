"""Keyframe images and masks read back from the run folder, small where they are wanted small."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from engine.dense_types import DenseImage, DenseView
from engine.errors import InferenceError
from engine.output.journal import mask_name
from engine.output.run_folder import MASKS_FOLDER
from engine.types import BoolArray, FrameId

logger = logging.getLogger(__name__)

_MAX_KEPT = 8  # images in memory: neighbours of a keyframe are those of the next one, too
_REDUCTIONS = (8, 4, 2)  # by which JPEGs can be decoded smaller


class KeyframeImages:
    """Reads keyframe images of a run, and keeps the few that were read last. One thread at a time.

    Args:
        run_path: where the run folder is at present.
        edge_px: the longer edge that images need; larger ones are decoded smaller, but not below.
    """

    def __init__(self, run_path: Callable[[], Path], *, edge_px: int) -> None:
        self._run_path = run_path
        self._edge_px = edge_px
        self._kept: dict[FrameId, DenseImage] = {}  # the newest at the end

    def of(
        self, names: Mapping[FrameId, str], views: Mapping[FrameId, DenseView]
    ) -> Mapping[FrameId, DenseImage]:
        """Images by keyframe, each read when it is asked for; those without a file are missing.

        One that cannot be read raises an ``InferenceError`` then, and so does one whose mask cannot
        be read: what that hides must not enter the dense map.

        Args:
            names: of the images.
            views: of the same keyframes.
        """
        return _Images(self, names, views)

    def read(self, frame_id: FrameId, name: str, view: DenseView) -> DenseImage | None:
        """One image, perhaps smaller than its calibration says.

        Returns:
            None where the image, or the mask that it has, cannot be read.
        """
        image = self._kept.pop(frame_id, None) or self._read(name, view)
        if image is None:
            return None
        self._kept[frame_id] = image
        while len(self._kept) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return image

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self._run_path() / "images" / name).is_file()

    def _read(self, name: str, view: DenseView) -> DenseImage | None:
        import cv2

        edge = max(view.intrinsics.width, view.intrinsics.height)
        reduction = next((one for one in _REDUCTIONS if edge >= one * self._edge_px), 1)
        flags = {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[reduction]
        path = self._run_path() / "images" / name
        bgr = cv2.imread(str(path), flags | cv2.IMREAD_IGNORE_ORIENTATION)
        if bgr is None:
            return None
        pixels = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        mask_path = self._run_path() / MASKS_FOLDER / mask_name(name)
        if not mask_path.exists():
            return DenseImage(pixels=pixels)
        mask = self._read_mask(mask_path, pixels.shape[:2])
        return None if mask is None else DenseImage(pixels=pixels, mask=mask)

    def _read_mask(self, path: Path, shape: tuple[int, ...]) -> BoolArray | None:
        """A mask in the size of its image; None where it cannot be read."""
        import cv2

        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            logger.warning("%s: the mask cannot be read, so the image gives no depth", path)
            return None
        if mask.shape != shape:
            mask = cv2.resize(mask, (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST)
        return np.asarray(np.asarray(mask) > 0)


class _Images(Mapping[FrameId, DenseImage]):
    """Images that are read when they are asked for."""

    def __init__(
        self,
        images: KeyframeImages,
        names: Mapping[FrameId, str],
        views: Mapping[FrameId, DenseView],
    ) -> None:
        self._images = images
        self._names = {one: name for one, name in names.items() if images.exists(name)}
        self._views = views

    def __getitem__(self, frame_id: FrameId) -> DenseImage:
        name = self._names[frame_id]
        image = self._images.read(frame_id, name, self._views[frame_id])
        if image is None:
            raise InferenceError(f"{name}: the image cannot be read, or its mask")
        return image

    def __contains__(self, frame_id: object) -> bool:
        return frame_id in self._names

    def __iter__(self) -> Iterator[FrameId]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
