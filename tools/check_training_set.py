"""Checks the frames of an export against the map, independently of how they were posed.

    .venv/bin/python tools/check_training_set.py EXPORT [--every N]

EXPORT is what ``livesfm export RUN --to EXPORT --undistort --frames ...`` wrote. SIFT keypoints are
found anew in its images and matched to those of map points in other keyframes; frames between
keyframes are then compared with keyframes that are treated alike: reprojection errors of map
points, and colours of map points beside those of places 4 px away.
"""

from __future__ import annotations

import argparse
import csv
import sys
import zlib  # noqa: F401 - before pycolmap, which brings its own
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pycolmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.types import Float64Array, Int64Array, Uint8Array

_NUM_NEAR = 4  # keyframes whose points are looked for in a frame
_SAME_PX = 1.5  # a keypoint found anew is that of a map point
_RATIO = 0.8  # of descriptor distances (Lowe, 2004)
_MAX_ERROR_PX = 8.0  # farther away a match is wrong
_BESIDE_PX = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Keyframe:
    """Map points of a keyframe with descriptors and colours."""

    center: Float64Array
    axis: Float64Array
    ids: Int64Array  # (N,) with a descriptor
    descriptors: np.ndarray  # (N, 128)
    picture: Uint8Array


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--every", type=int, default=1, help="check every Nth frame")
    arguments = parser.parse_args()
    folder: Path = arguments.export
    model = pycolmap.Reconstruction(folder / "sparse" / "0")
    with (folder / "image_names.csv").open() as file:
        kinds = {row["image"]: row["kind"] for row in csv.DictReader(file)}
    images = sorted(model.images.values(), key=lambda image: image.name)
    keyframes = {
        image.name: described(folder, model, image)
        for image in images
        if kinds[image.name] == "keyframe"
    }
    figures: dict[str, list[tuple[float, float, float]]] = {"keyframe": [], "tracked": []}
    for image in images[:: arguments.every]:
        checked = check(folder, model, image, keyframes)
        if checked is not None:
            kind = "keyframe" if kinds[image.name] == "keyframe" else "tracked"
            figures[kind].append(checked)
    for kind, rows in figures.items():
        if rows:
            error_px, color, beside = np.median(np.array(rows), axis=0)
            print(
                f"{kind:9} {len(rows):4} images: map points {error_px:.3f} px from their keypoints,"
                f" {np.percentile([row[0] for row in rows], 95):.3f} in 95 %; colours differ by"
                f" {color:.1f} levels, {beside:.1f} at {_BESIDE_PX} px beside (medians of images)"
            )


def sift(picture: Uint8Array) -> tuple[Float64Array, np.ndarray]:
    """Keypoints (N, 2) px, COLMAP's convention, and descriptors (N, 128)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    keypoints, descriptors = cv2.SIFT_create(3000).detectAndCompute(grey, None)
    xy = np.array([keypoint.pt for keypoint in keypoints]).reshape(-1, 2) + 0.5
    return xy, descriptors


def described(folder: Path, model: pycolmap.Reconstruction, image: pycolmap.Image) -> Keyframe:
    """A keyframe's map points that are found anew."""
    picture = cv2.imread(str(folder / "images" / image.name))
    xy, descriptors = sift(picture)
    seen = [point for point in image.points2D if point.has_point3D()]
    rows, ids = [], []
    for point in seen:
        distances = np.linalg.norm(xy - point.xy, axis=1)
        if distances.min(initial=np.inf) < _SAME_PX:
            rows.append(int(distances.argmin()))
            ids.append(point.point3D_id)
    return Keyframe(
        center=image.projection_center(),
        axis=image.viewing_direction(),
        ids=np.array(ids, np.int64),
        descriptors=descriptors[rows],
        picture=picture,
    )


def check(
    folder: Path,
    model: pycolmap.Reconstruction,
    image: pycolmap.Image,
    keyframes: dict[str, Keyframe],
) -> tuple[float, float, float] | None:
    """Mean reprojection error, and colour differences at map points and beside; None: too few."""
    others = {name: one for name, one in keyframes.items() if name != image.name}
    center, axis = image.projection_center(), image.viewing_direction()
    spread = np.median([np.linalg.norm(one.center - center) for one in others.values()])
    near = sorted(
        others.items(),
        key=lambda one: np.linalg.norm(one[1].center - center) / spread - one[1].axis @ axis,
    )[:_NUM_NEAR]
    picture = cv2.imread(str(folder / "images" / image.name))
    xy, descriptors = sift(picture)
    errors, colors, beside = [], [], []
    by_name = {one.name: one for one in model.images.values()}
    for name, keyframe in near:
        if len(keyframe.ids) < 2 or len(xy) < 2:
            continue
        for first, second in cv2.BFMatcher().knnMatch(keyframe.descriptors, descriptors, k=2):
            point = model.point3D(int(keyframe.ids[first.queryIdx])).xyz
            projected = image.project_point(point)
            if first.distance > _RATIO * second.distance or projected is None:
                continue
            error_px = float(np.linalg.norm(projected - xy[first.trainIdx]))
            if error_px < _MAX_ERROR_PX:
                errors.append(error_px)
                there = by_name[name].project_point(point)
                other = None if there is None else color_at(keyframe.picture, there)
                own, off = color_at(picture, projected), color_at(picture, projected + _BESIDE_PX)
                if other is not None and own is not None and off is not None:
                    colors.append(float(np.abs(own - other).mean()))
                    beside.append(float(np.abs(off - other).mean()))
    if len(errors) < 20 or not colors:
        return None
    return float(np.mean(errors)), float(np.mean(colors)), float(np.mean(beside))


def color_at(picture: Uint8Array, xy: Float64Array) -> Float64Array | None:
    """The mean colour (3,) of 3 x 3 pixels."""
    x, y = np.floor(xy).astype(int)
    height, width = picture.shape[:2]
    if not (1 <= x < width - 1 and 1 <= y < height - 1):
        return None
    return np.asarray(picture[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1)), np.float64)


if __name__ == "__main__":
    main()
