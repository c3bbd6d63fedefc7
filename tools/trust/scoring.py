"""How far a run's map is from the truth of its input."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters.evaluate import absolute_error, read_tum
from engine.geometry import camera_center
from engine.types import Float64Array
from trust.inputs import Input

if TYPE_CHECKING:
    import pycolmap

_OF_SOURCE = re.compile(r"source(\d+)/")
_STAYS_PX = 3.0  # between images: what moves less is fixed to the picture
TIMELY_KEYFRAMES = 5  # arrivals after which a keyframe counts as registered late
LEAST_REGISTERED_RATIO = 0.6  # of the keyframes; below, no error figure counts


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCamera:
    """A camera of the largest map."""

    model: str
    width: int
    height: int
    focal_px: float | None  # mean of both axes; None: a model without one
    distortion: tuple[float, ...]
    num_images: int

    def __str__(self) -> str:
        """Model, size, focal length and distortion in a few characters."""
        focal = "" if self.focal_px is None else f" f {self.focal_px:.1f}"
        distortion = " ".join(f"{value:.3g}" for value in self.distortion)
        return f"{self.num_images} x {self.model}{focal}" + (
            f" k {distortion}" if distortion else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MapScore:
    """The largest map of a run against what is known of its input."""

    num_keyframes: int
    num_registered: int  # in the largest map
    num_maps: int
    num_points3D: int
    cameras: tuple[MapCamera, ...]
    ate_percent: float | None  # RMSE of registered keyframes' centres, of the truth's extent
    focal_error_percent: float | None  # the worst camera's
    num_overlay_observations: int | None  # of points of the map inside the overlay's box
    num_overlay_points: int | None  # points of the map that stay there
    num_masked_observations: int | None  # of points of the map where the image is masked
    timely_percent: float  # of keyframes, registered within `TIMELY_KEYFRAMES` of their arrival

    @property
    def is_enough(self) -> bool:
        """Whether so many keyframes are registered that errors mean something."""
        return self.num_registered >= LEAST_REGISTERED_RATIO * max(self.num_keyframes, 1)

    def as_record(self) -> dict[str, Any]:
        """The figures as a JSON-able mapping."""
        return asdict(self)


def score_run(known: Input, folder: Path, run: Path) -> MapScore | None:
    """Scores a run; None where it has no map.

    Args:
        known: the input.
        folder: of the input.
        run: the run's folder.
    """
    reconstruction = largest_map(run)
    if reconstruction is None:
        return None
    cameras = map_cameras(reconstruction)
    box = known.overlay_box_px
    return MapScore(
        num_keyframes=len(keyframe_rows(run)),
        num_registered=reconstruction.num_reg_images(),
        num_maps=len(map_folders(run)),
        num_points3D=reconstruction.num_points3D(),
        cameras=cameras,
        ate_percent=ate_percent(
            registered_centers(reconstruction), true_centers(known, folder, run)
        ),
        focal_error_percent=focal_error_percent(cameras, known.focal_px),
        num_overlay_observations=None
        if box is None
        else count_observations(reconstruction, lambda _, xy: is_in_box(xy, box)),
        num_overlay_points=None if box is None else count_points_of_overlay(reconstruction, box),
        num_masked_observations=None
        if known.masks is None
        else masked_observations(reconstruction, folder / known.masks),
        timely_percent=timely_percent(run),
    )


def map_folders(run: Path) -> list[Path]:
    """The maps of the newest snapshot."""
    sparse = run / "latest" / "sparse"
    return sorted(sparse.iterdir()) if sparse.is_dir() else []


def largest_map(run: Path) -> pycolmap.Reconstruction | None:
    """The map with most registered images; None where the run has none."""
    import pycolmap

    maps = [pycolmap.Reconstruction(folder) for folder in map_folders(run)]
    return max(maps, key=lambda each: int(each.num_reg_images()), default=None)


def registered_names(folder: Path) -> set[str]:
    """The images that have a pose in a map's folder."""
    import pycolmap

    return set(registered_centers(pycolmap.Reconstruction(folder)))


def keyframe_rows(run: Path) -> dict[str, int]:
    """Positions in the source of a run's keyframes, by name."""
    return {row["name"]: int(row["index"]) for row in frames(run) if row["status"] == "keyframe"}


def frames(run: Path) -> list[dict[str, str]]:
    """The rows of a run's ``frames.csv``; none where there is no such file."""
    path = run / "frames.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def map_cameras(reconstruction: pycolmap.Reconstruction) -> tuple[MapCamera, ...]:
    """The cameras that registered images have."""
    cameras = []
    for camera_id, camera in sorted(reconstruction.cameras.items()):
        users = [
            image
            for image in reconstruction.images.values()
            if image.has_pose and image.camera_id == camera_id
        ]
        if not users:
            continue
        focal_idxs = list(camera.focal_length_idxs())
        cameras.append(
            MapCamera(
                model=camera.model.name,
                width=camera.width,
                height=camera.height,
                focal_px=float(np.mean([camera.params[i] for i in focal_idxs]))
                if focal_idxs
                else None,
                distortion=tuple(float(camera.params[i]) for i in camera.extra_params_idxs())
                if focal_idxs
                else (),
                num_images=len(users),
            )
        )
    return tuple(cameras)


def focal_error_percent(cameras: Iterable[MapCamera], true_px: float | None) -> float | None:
    """How far the worst focal length is from the true one."""
    errors = [
        100 * abs(camera.focal_px / true_px - 1)
        for camera in cameras
        if true_px is not None and camera.focal_px is not None
    ]
    return max(errors, default=None)


def registered_centers(reconstruction: pycolmap.Reconstruction) -> dict[str, Float64Array]:
    """Camera centres (3,) in the map, by image name."""
    return {
        image.name: np.asarray(image.projection_center())
        for image in reconstruction.images.values()
        if image.has_pose
    }


def difference_percent(run: Path, reference_run: Path) -> tuple[float, int] | None:
    """RMSE between the camera centres of two runs after the best similarity, and of how many.

    In percent of the extent that the shared centres have in ``reference_run``; None where a run
    has no map or fewer than three images are in both.
    """
    maps = largest_map(run), largest_map(reference_run)
    if maps[0] is None or maps[1] is None:
        return None
    centers = [registered_centers(each) for each in maps if each is not None]
    names = sorted(centers[0].keys() & centers[1].keys())
    found = _error_percent(*(np.array([each[name] for name in names]) for each in centers))
    return None if found is None else (found, len(names))


def count_observations(
    reconstruction: pycolmap.Reconstruction,
    is_counted: Callable[[str, Float64Array], NDArray[np.bool_]],
) -> int:
    """Observations of the map's points; ``is_counted`` gets an image's name and (N, 2) px."""
    total = 0
    for image in reconstruction.images.values():
        seen = [point.xy for point in image.points2D if point.has_point3D()]
        if image.has_pose and seen:
            total += int(is_counted(image.name, np.array(seen)).sum())
    return total


def count_points_of_overlay(
    reconstruction: pycolmap.Reconstruction, box_px: tuple[float, float, float, float]
) -> int:
    """Points of the map that stay in a box where several images see them.

    The world behind the box shines through and past it, but moves.
    """

    def stays(point: pycolmap.Point3D) -> bool:
        seen = np.array(
            [
                reconstruction.image(element.image_id).points2D[element.point2D_idx].xy
                for element in point.track.elements
            ]
        )
        inside = seen[is_in_box(seen, box_px)]
        if len(inside) < 2:
            return False
        moved_px = np.linalg.norm(inside - np.median(inside, axis=0), axis=1)
        return bool(moved_px.max() < _STAYS_PX)

    return sum(stays(point) for point in reconstruction.points3D.values())


def is_in_box(xy: Float64Array, box_px: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """Which of (N, 2) px lie in a box of x, y from and x, y to."""
    low, high = np.array(box_px[:2]), np.array(box_px[2:])
    return np.asarray(((xy >= low) & (xy <= high)).all(axis=1))


def masked_observations(reconstruction: pycolmap.Reconstruction, masks: Path) -> int:
    """Observations of the map's points on black pixels of ``NAME.png``."""
    from PIL import Image

    def is_black(name: str, xy: Float64Array) -> NDArray[np.bool_]:
        with Image.open(masks / f"{name}.png") as image:
            mask = np.asarray(image.convert("L"))
        column, row = np.floor(xy).astype(np.intp).T
        height, width = mask.shape
        return np.asarray(mask[row.clip(0, height - 1), column.clip(0, width - 1)] == 0)

    return count_observations(reconstruction, is_black)


def num_masks(folder: Path) -> int:
    """How many masks a run's or an export's folder holds."""
    return sum(1 for _ in (folder / "masks").rglob("*.png"))


def held_cameras(run: Path) -> bool:
    """Whether ``summary.json`` says of every camera that adjustment left its calibration alone."""
    path = run / "summary.json"
    if not path.is_file():
        return False
    cameras = json.loads(path.read_text(encoding="utf-8")).get("cameras") or []
    return bool(cameras) and all(each["is_held"] or each["is_constant"] for each in cameras)


def timely_percent(run: Path) -> float:
    """Share of keyframes in the map at most `TIMELY_KEYFRAMES` arrivals after their own.

    A keyframe is in the map from its last registration on: one that an abandoned map held counts
    when it comes back. What a first map brings has no registration but a first pose.
    """
    with (run / "events.jsonl").open(encoding="utf-8") as file:
        return timely_percent_of(json.loads(line) for line in file)


def timely_percent_of(events: Iterable[Mapping[str, Any]]) -> float:
    """`timely_percent` of the events of a run, in order."""
    arrivals: dict[int, int] = {}
    first_posed: dict[int, int] = {}
    registered: dict[int, int] = {}
    for event in events:
        frame_id, num_arrived = event.get("frame_id"), len(arrivals)
        match event["event"]:
            case "KeyframeAdded" if frame_id is not None:
                arrivals[frame_id] = num_arrived + 1
            case "FramePosed" if frame_id is not None and event["is_keyframe"]:
                first_posed.setdefault(frame_id, num_arrived)
            case "FrameRegistered" if frame_id is not None:
                registered[frame_id] = num_arrived
    in_map = first_posed | registered
    waits = [
        in_map[frame_id] - arrival for frame_id, arrival in arrivals.items() if frame_id in in_map
    ]
    return 100 * sum(wait <= TIMELY_KEYFRAMES for wait in waits) / max(len(arrivals), 1)


def ate_percent(
    centers: Mapping[str, Float64Array], reference_centers: Mapping[str, Float64Array]
) -> float | None:
    """RMSE of camera centres by name after the best similarity, of the reference's extent there."""
    names = sorted(centers.keys() & reference_centers.keys())
    if not names:
        return None
    return _error_percent(
        *(np.array([each[name] for name in names]) for each in (centers, reference_centers))
    )


def true_centers(known: Input, folder: Path, run: Path) -> dict[str, Float64Array]:
    """True camera centres (3,) of a run's frames, keyframes or not, by name.

    Frames of several sources have the source's number in their name.
    """
    truths = [path for path in (known.truth, *known.more_truths) if path]
    by_source = [_centers_by_position(folder / path) for path in truths]
    centers = {}
    for row in frames(run):
        name, index = row["name"], int(row["index"])
        found = _OF_SOURCE.match(name) if len(by_source) > 1 else None
        source_idx = int(found[1]) - 1 if found else 0
        if source_idx < len(by_source) and index in by_source[source_idx]:
            centers[name] = by_source[source_idx][index]
    return centers


def _centers_by_position(truth: Path) -> dict[int, Float64Array]:
    poses = read_tum(truth)
    centers = camera_center(poses.cam_from_world)
    return {round(time): center for time, center in zip(poses.timestamps_s, centers, strict=True)}


def _error_percent(centers: Float64Array, reference_centers: Float64Array) -> float | None:
    error = absolute_error(centers, reference_centers)
    return None if error is None else error.rmse_percent_of_extent
