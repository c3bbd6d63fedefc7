"""SIFT keypoints on the CPU: the matcher that runs anywhere, without weights.

Detection is OpenCV's SIFT (Lowe, 2004). Descriptors become RootSIFT (Arandjelovic and Zisserman,
2012) in bytes. Matching is brute force in whole numbers: byte products summed in int32 are exact,
so every machine and every number of threads finds the same matches, with or without int8 units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.matchers.byte_products import ByteProducts
from adapters.matchers.epipolar_blocks import epipolar_blocks
from engine.config import SiftConfig
from engine.errors import InferenceError
from engine.geometry import usable_at
from engine.types import (
    BoolArray,
    DescriptorKind,
    EpipolarGuide,
    Features,
    Float32Array,
    Float64Array,
    Frame,
    Int64Array,
    MatchRequest,
    PairMatches,
    Uint8Array,
)

# RootSIFT components rarely exceed 127 / 256; at this scale they fit signed bytes.
_DESCRIPTOR_SCALE = 256.0
_MAX_COMPONENT = 127
_UPSCALING_OF_OPENCV = 2.0
_LEAST_UPSCALED_EDGE_PX = 1280.0
# Of an image: what its mask leaves, if less, is described in full. With half of each image masked,
# the cameras of a walk are 0.19 % of its extent off so, and 0.21 to 0.37 % by lean keypoints.
_LEAST_USABLE = 0.75
_GUIDED_BLOCK_ROWS = 1024  # keypoints that are matched together among those near their planes


class SiftMatcher:
    """``PairMatcher`` over OpenCV SIFT and an exact brute-force search.

    Keyframes that overlap widely with the one before need fewer keypoints, of a smaller image: with
    ``lean_features`` they get no more, unless a mask leaves little of them. Each camera's keyframes
    are described in their order.
    """

    def __init__(self, config: SiftConfig) -> None:
        self._config = config
        self._full = _Describer(config)
        lean = {
            "max_features": config.lean_features,
            "working_edge_px": config.lean_edge_px,
            "upscaling": 2.0,
        }
        self._lean = _Describer(config.model_copy(update=lean), is_half=True)
        self._lean_before: dict[str, Uint8Array] = {}  # descriptors, by camera
        self._products = ByteProducts()  # of the thread that matches
        self._describing_products = ByteProducts()  # of the thread that describes

    @property
    def name(self) -> str:
        """Short name for logs and summaries."""
        return "sift"

    @property
    def peak_gpu_mb(self) -> float:
        """0: everything runs on the processor."""
        return 0.0

    @property
    def matches_everything(self) -> bool:
        """Whether images that share nothing match, too: they do not."""
        return False

    def describe(self, frame: Frame) -> Features:
        """Detects keypoints, strongest first, none under the frame's mask.

        Raises:
            InferenceError: OpenCV could not work on the image.
        """
        features, lean = self.describe_after(frame, self._lean_before.get(frame.camera_key))
        if lean is not None:
            self._lean_before[frame.camera_key] = lean
        return features

    def describe_after(
        self, frame: Frame, before: Uint8Array | None
    ) -> tuple[Features, Uint8Array | None]:
        """As `describe`, by what the camera's keyframe before gave.

        Args:
            frame: the keyframe.
            before: lean descriptors (N, D) of the last one that has some; None: there is none.

        Returns:
            Its table, and its own lean descriptors; None: keyframes, or ones of which a mask leaves
            so little, are not described so.

        Raises:
            InferenceError: OpenCV could not work on the image.
        """
        if not self._config.lean_features:
            return self._full.describe(frame), None
        if frame.mask is not None and _usable_ratio(frame.mask) < _LEAST_USABLE:
            return self._full.describe(frame), None
        lean = self._lean.describe(frame)
        if before is not None and self._overlaps_widely(before, lean.descriptors):
            return lean, lean.descriptors
        return self._full.describe(frame), lean.descriptors

    def _overlaps_widely(self, before: Uint8Array, now: Uint8Array) -> bool:
        """Whether lean descriptors (N, D), (M, D) of two keyframes match well enough."""
        if min(len(before), len(now)) < max(2, self._config.min_lean_matches):
            return False
        found = self._search(now, before, products=self._describing_products)
        return len(found.one_per_target().rows) >= self._config.min_lean_matches

    def match(self, requests: Sequence[MatchRequest]) -> list[PairMatches]:
        """Matches all keypoints of each pair by ratio test and, when configured, mutual best."""
        return [self._match_pair(request) for request in requests]

    def _match_pair(self, request: MatchRequest) -> PairMatches:
        if len(request.first) == 0 or len(request.second) < 2:
            return PairMatches.of_rows(
                request,
                matches_idx=np.empty((0, 2), np.int64),
                confidence=np.empty((0,), np.float32),
            )
        first, second = request.first.descriptors, request.second.descriptors
        if request.guide is None:
            found = self._search(first, second, products=self._products)
        else:
            found = self._search_near(request.guide, first, second)
        found = found.one_per_target()
        ratio = np.sqrt(found.distance / np.maximum(found.second_distance, 1e-6))
        return PairMatches.of_rows(
            request,
            matches_idx=np.column_stack([found.rows, found.nearest]),
            confidence=np.clip(1.0 - ratio, 0.0, 1.0).astype(np.float32),
        )

    def _search(self, first: Uint8Array, second: Uint8Array, *, products: ByteProducts) -> _Found:
        """Matches of descriptors (N, D) among all of (M, D), M at least 2."""
        found = _two_nearest(products, first, second)
        found = found.take(found.distance < self._config.max_ratio**2 * found.second_distance)
        if not (self._config.mutual and len(found.rows)):
            return found
        back = _nearest(products, second[found.nearest], among=first)
        return found.take(back == found.rows)

    def _search_near(self, guide: EpipolarGuide, first: Uint8Array, second: Uint8Array) -> _Found:
        """Matches among descriptors of keypoints near each other's epipolar planes."""
        parts = []
        for rows, columns in epipolar_blocks(guide, num_rows=_GUIDED_BLOCK_ROWS):
            if len(columns) >= 2:
                part = self._search(first[rows], second[columns], products=self._products)
                parts.append(replace(part, rows=rows[part.rows], nearest=columns[part.nearest]))
        return _Found.joined(parts)


class _Describer:
    """Detects and describes keypoints.

    Args:
        config: how many, in which image, and thresholds.
        is_half: whether descriptors are read at half the resolution of their keypoints.
    """

    def __init__(self, config: SiftConfig, *, is_half: bool = False) -> None:
        self._config = config
        self._is_half = is_half
        self._detectors: dict[bool, Any] = {}  # by whether they limit the number of keypoints
        self._half_sift: Any = None

    def describe(self, frame: Frame) -> Features:
        """As `SiftMatcher.describe`, up to ``max_features`` keypoints."""
        import cv2

        try:
            working, scale = self._working_image(frame.pixels)
            area = None if frame.mask is None else _working_mask(frame.mask, working)
            keypoints, raw = self._detect_and_compute(working, area)
        except cv2.error as error:
            raise InferenceError(f"SIFT failed on {frame.name}: {error}") from error
        if not keypoints:
            return _no_features(frame)
        table = np.array([(k.response, *k.pt, k.size, k.angle) for k in keypoints])
        keep = _strongest_first(table)
        points_xy, sizes = table[keep, 1:3], table[:, 3]
        # cv2 puts (0, 0) at the centre of the first pixel, COLMAP at its corner.
        keypoints_xy = (points_xy + 0.5) * scale
        if frame.mask is not None:
            is_usable = usable_at(frame.mask, keypoints_xy)
            keep, keypoints_xy = keep[is_usable], keypoints_xy[is_usable]
        keep = keep[: self._config.max_features]
        keypoints_xy = keypoints_xy[: len(keep)].copy()  # a view would keep all of them
        return Features(
            frame_id=frame.frame_id,
            keypoints_xy=keypoints_xy,
            descriptors=_root_sift_bytes(raw[keep]),
            descriptor_kind=DescriptorKind.ROOT_SIFT,
            scales=(sizes[keep] * scale.max()).astype(np.float32),
            colors=_colors_at(frame.pixels, keypoints_xy),
        )

    def _detect_and_compute(
        self, working: Uint8Array, area: Uint8Array | None
    ) -> tuple[Sequence[Any], Float32Array]:
        """OpenCV's keypoints, in no order, and their descriptors (N, 128)."""
        detector = self._detector(has_limit=area is None)
        if not self._is_half:
            keypoints, raw = detector.detectAndCompute(working, area)
            return keypoints, raw
        keypoints = detector.detect(working, area)
        for keypoint in keypoints:
            # The lowest byte is the octave, from -1; the one above is read at its first layer.
            keypoint.octave = (keypoint.octave + 1) & 0xFF
        _, raw = self._half_describer().compute(working, keypoints)
        return keypoints, raw

    def _half_describer(self) -> Any:
        """Describes keypoints in the first layer of the octave above their own.

        The area around a keypoint has a quarter of the pixels there. The layer is as blurred as the
        finest one that keypoints are found in: 1.6 px times 2 ** (1 / 3), over 2.
        """
        if self._half_sift is None:
            import cv2

            self._half_sift = cv2.SIFT.create(nOctaveLayers=1, sigma=1.0)
        return self._half_sift

    def _working_image(self, pixels: Uint8Array) -> tuple[Uint8Array, Float64Array]:
        """The grey image that OpenCV gets, and original px per px of it in x and y, (2,).

        OpenCV doubles it: where it is to be upscaled by less, it is reduced before. Small images
        have few keypoints and cost little, so that they are upscaled further.
        """
        import cv2

        grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)
        edge_px = min(max(grey.shape), self._config.working_edge_px)
        upscaled_px = max(self._config.upscaling * edge_px, _LEAST_UPSCALED_EDGE_PX)
        reduced_px = min(edge_px, round(upscaled_px / _UPSCALING_OF_OPENCV))
        return _reduced(grey, max_edge_px=reduced_px)

    def _detector(self, *, has_limit: bool) -> Any:
        """The detector; OpenCV keeps the strongest keypoints before it applies a mask."""
        if has_limit not in self._detectors:
            import cv2

            self._detectors[has_limit] = cv2.SIFT.create(
                nfeatures=self._config.max_features if has_limit else 0,
                contrastThreshold=self._config.contrast_threshold,
                edgeThreshold=self._config.edge_threshold,
                # Else OpenCV doubles the image with a shift: every keypoint is 0.25 px off.
                enable_precise_upscale=True,
            )
        return self._detectors[has_limit]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """Descriptors and their nearest ones in the other image."""

    rows: Int64Array  # (K,) of the first image
    nearest: Int64Array  # (K,) of the second
    distance: Float32Array  # (K,) squared
    second_distance: Float32Array  # (K,) squared, to the runner-up

    def take(self, which: NDArray[Any]) -> _Found:
        """Some of them, by positions or a mask."""
        return _Found(
            rows=self.rows[which],
            nearest=self.nearest[which],
            distance=self.distance[which],
            second_distance=self.second_distance[which],
        )

    def one_per_target(self) -> _Found:
        """In order of rows; of those with one nearest descriptor the closest."""
        by_distance = np.lexsort((self.rows, self.distance))
        _, first_of_target = np.unique(self.nearest[by_distance], return_index=True)
        kept = by_distance[first_of_target]
        return self.take(kept[np.argsort(self.rows[kept])])

    @classmethod
    def joined(cls, parts: Sequence[_Found]) -> _Found:
        """All of several parts."""
        return cls(
            rows=np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)]),
            nearest=np.concatenate([np.empty(0, np.int64), *(part.nearest for part in parts)]),
            distance=np.concatenate([np.empty(0, np.float32), *(part.distance for part in parts)]),
            second_distance=np.concatenate(
                [np.empty(0, np.float32), *(part.second_distance for part in parts)]
            ),
        )


def _reduced(grey: Uint8Array, *, max_edge_px: int) -> tuple[Uint8Array, Float64Array]:
    """An image of at most that edge, and original px per px of it in x and y, (2,)."""
    import cv2

    height, width = grey.shape
    if max(height, width) <= max_edge_px:
        return grey, np.ones(2)
    ratio = max_edge_px / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    small = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    return small, np.array([width / size[0], height / size[1]])


def _working_mask(mask: BoolArray, working: Uint8Array) -> Uint8Array:
    """Where the working image shows anything that may be used, for OpenCV."""
    import cv2

    height, width = working.shape
    area = cv2.resize(mask.view(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA)
    return np.where(area > 0, np.uint8(255), np.uint8(0))


def _usable_ratio(mask: BoolArray) -> float:
    return np.count_nonzero(mask) / max(1, mask.size)


def _strongest_first(table: Float64Array) -> Int64Array:
    """Rows (N, 5) by the first column, the rest making the order the same on every run."""
    order: Int64Array = np.lexsort([*table.T[:0:-1], -table[:, 0]])
    return order


def _root_sift_bytes(raw: Float32Array) -> Uint8Array:
    total = np.maximum(raw.sum(axis=1, keepdims=True), 1e-6)
    scaled = np.sqrt(raw / total) * _DESCRIPTOR_SCALE
    clipped: Uint8Array = np.minimum(np.rint(scaled), _MAX_COMPONENT).astype(np.uint8)
    return clipped


def _colors_at(pixels: Uint8Array, keypoints_xy: Float64Array) -> Uint8Array:
    height, width = pixels.shape[:2]
    columns = np.clip(keypoints_xy[:, 0].astype(np.int64), 0, width - 1)
    rows = np.clip(keypoints_xy[:, 1].astype(np.int64), 0, height - 1)
    return np.asarray(pixels[rows, columns])


def _no_features(frame: Frame) -> Features:
    return Features(
        frame_id=frame.frame_id,
        keypoints_xy=np.empty((0, 2)),
        descriptors=np.empty((0, 128), np.uint8),
        descriptor_kind=DescriptorKind.ROOT_SIFT,
        scales=np.empty((0,), np.float32),
        colors=np.empty((0, 3), np.uint8),
    )


def _two_nearest(products: ByteProducts, first: Uint8Array, second: Uint8Array) -> _Found:
    """The nearest of descriptors (M, D) to each of (N, D), and how far the nearest two are."""
    target_square = _squared_norms(second)
    square = _squared_norms(first)
    nearest = np.empty(len(first), np.int64)
    distances = np.empty((2, len(first)), np.float32)
    for block, score in products.blocks(first, second):
        rows = np.arange(len(score))
        best = score.argmax(axis=1)
        nearest[block] = best
        distances[0, block] = square[block] + target_square[best] - 2.0 * score[rows, best]
        score[rows, best] = -1
        runner_up = score.argmax(axis=1)
        distances[1, block] = (
            square[block] + target_square[runner_up] - 2.0 * score[rows, runner_up]
        )
    return _Found(
        rows=np.arange(len(first)),
        nearest=nearest,
        distance=distances[0],
        second_distance=distances[1],
    )


def _nearest(products: ByteProducts, descriptors: Uint8Array, *, among: Uint8Array) -> Int64Array:
    """The row of ``among`` (M, D) with the largest product for each descriptor, (N,)."""
    nearest = np.empty(len(descriptors), np.int64)
    for block, score in products.blocks(descriptors, among):
        nearest[block] = score.argmax(axis=1)
    return nearest


def _squared_norms(descriptors: Uint8Array) -> Float32Array:
    """Squared norms of descriptors (N, D), (N,): whole numbers that float32 holds exactly."""
    wide = descriptors.astype(np.float32)
    norms: Float32Array = np.einsum("nd,nd->n", wide, wide)
    return norms
