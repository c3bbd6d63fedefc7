"""Frames between keyframes, beside these, as a map that all other writers take.

Tracked frames have poses in the run's trajectory; their pixels are read again from the source. Map
points are followed into each (`frame_tracks`), and its pose is refined by them. A frame whose error
is larger than 1.5 times that of the map and of the keyframes around it, into which points are
followed alike, is left out and counted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.exports.frame_choice import FrameChoice, FrameKind, choose_sharpest
from adapters.exports.frame_tracks import (
    FrameFit,
    FrameTracks,
    KeyframePoints,
    fit_of,
    flow_image,
    follow,
    keyframe_points,
)
from adapters.exports.images import IMAGES
from adapters.exports.job import ExportJob, Progress
from adapters.exports.masks import MASKS
from adapters.exports.posed_frames import PosedFrame, camera_of, read_posed_frames
from adapters.exports.sharpness import PatchDetail, patch_detail, sharpness_of
from adapters.exports.source_frames import (
    FrameSource,
    SourceFrame,
    config_of,
    find_sources,
    read_frames,
)
from adapters.run_files import read_frame_rows
from engine.config import Config
from engine.errors import ConfigError, JournalError, SnapshotError
from engine.geometry import transform_points
from engine.output.files import link_or_copy, write_atomically
from engine.output.flat_names import IMAGE_NAMES, FlatNames, table_of
from engine.types import Frame, PoseKind, Uint8Array

if TYPE_CHECKING:
    import pycolmap

STAGED = "staged"  # folder that stands in an export while it is written
_MAX_ERROR_RATIO = 1.5  # of a frame's reprojection error to that of keyframes
_MIN_INLIERS = 20
_MIN_INLIER_RATIO = 0.5
_MAX_DETAILS = 200  # points of a frame by which sharpness is compared
_MAX_KEPT = 4  # keyframes whose images are in memory
_COMPARED_EDGE_PX = 160  # at which a keyframe's image is compared with its source's picture
_SAME_LEVELS = 2.0  # mean difference of the same picture, whoever compressed it
_HEADER = ("image", "frame", "kind", "reprojection_error_px", "sharpness")


class LeftOut(StrEnum):
    """Why a frame between keyframes is not exported."""

    NOT_IN_SOURCE = "not_in_source"  # the source does not give it any more
    TOO_FEW_POINTS = "too_few_points"  # of the map were found in it
    INACCURATE = "inaccurate"  # its pose, beside those of keyframes
    IN_OTHER_MAP = "in_another_map"  # of the run
    WITHOUT_POSE = "without_a_pose"  # in any map


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFigures:
    """Which frames an export has."""

    num_keyframes: int
    num_tracked: int = 0
    num_refined: int = 0  # whose pose in the trajectory was less accurate than keyframes are
    left_out: Mapping[str, int] = field(default_factory=dict)  # by reason
    error_px: float = 0.0  # of map points in tracked frames, mean
    keyframe_error_px: float = 0.0  # of the map


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """A frame between keyframes, and what was found in it."""

    posed: PosedFrame
    camera_id: int
    near: str  # the nearest keyframe
    fit: FrameFit
    tracks: FrameTracks | None  # the inliers; None: not wanted any more
    was_inaccurate: bool  # before its pose was refined
    detail: PatchDetail


def stage_frames(
    job: ExportJob, choice: FrameChoice, *, instead: str | None = None
) -> tuple[ExportJob, FrameFigures]:
    """Prepares images, masks and the map of chosen frames, under flat names.

    Args:
        job: of the map's keyframes.
        choice: which frames.
        instead: where frames are read again; None: where the run had them.

    Returns:
        The job of the chosen frames, whose folder is to be deleted in the end, and figures.

    Raises:
        ConfigError: frames are wanted that the run has no poses of, or that cannot be read again.
        SourceError: a source cannot be opened.
        SnapshotError: an image cannot be read or written.
        ExportCancelledError: the export was cancelled.
    """
    staging = _Staging(job)
    if choice.kind is FrameKind.KEYFRAMES:
        return staging.finished(list(staging.keyframes), [], {})
    reading = _Reading(job, instead=instead)
    if choice.kind is FrameKind.ALL:
        measured = []
        for one, frame in reading.good(reading.tracked):
            staging.add(one, frame, config=reading.config)
            measured.append(one)
        left_out = reading.left_out + reading.elsewhere
        return staging.finished(list(staging.keyframes), measured, left_out)
    return _staged_sharpest(staging, reading, number=choice.number)


def _staged_sharpest(
    staging: _Staging, reading: _Reading, *, number: int
) -> tuple[ExportJob, FrameFigures]:
    tracked = [replace(one, tracks=None) for one, _ in reading.good(reading.tracked)]
    left_out = reading.left_out + reading.elsewhere
    keyframes = reading.keyframes
    names = [*(frame.name for frame in keyframes), *(one.posed.name for one in tracked)]
    poses = [*(f.cam_from_world for f in keyframes), *(one.fit.cam_from_world for one in tracked)]
    details = [*reading.keyframe_details(), *(one.detail for one in tracked)]
    sharpness = sharpness_of(details)
    rows = choose_sharpest(poses, sharpness, depth_map=reading.depth_map, number=number)
    chosen = {names[row] for row in rows}
    measured = []
    for one, frame in reading.good([t.posed for t in tracked if t.posed.name in chosen]):
        staging.add(one, frame, config=reading.config)
        measured.append(one)
    left_out.update(reading.left_out)  # what the source does not give a second time
    kept = [frame.name for frame in keyframes if frame.name in chosen]
    return staging.finished(
        kept, measured, left_out, sharpness=dict(zip(names, sharpness.tolist(), strict=True))
    )


# -- reading and measuring ------------------------------------------------------------------------


class _Reading:
    """Reads frames of a run again, and measures each.

    Args:
        job: of the map's keyframes.
        instead: where frames are read; None: where the run had them.
    """

    def __init__(self, job: ExportJob, *, instead: str | None) -> None:
        self._job = job
        self._model = job.reconstruction
        self.config: Config = config_of(job.run)
        self._images = {image.name: image for image in job.images()}
        self.elsewhere = _frames_elsewhere(job)
        posed = read_posed_frames(job)
        self.tracked = [frame for frame in posed if frame.name not in self._images]
        self.keyframes = [frame for frame in posed if frame.name in self._images]
        labels = {frame.source for frame in self.tracked}
        self._sources: list[FrameSource] = (
            find_sources(job.run, labels, instead=instead) if labels else []
        )
        self._by_camera: dict[tuple[str, str], list[PosedFrame]] = {}
        for keyframe in sorted(self.keyframes, key=lambda one: one.index):
            self._by_camera.setdefault(camera_of(keyframe), []).append(keyframe)
        self._points: OrderedDict[str, KeyframePoints] = OrderedDict()  # used last at the end
        self._map_error_px = self._model.compute_mean_reprojection_error()
        self._errors_px = {name: _error_px(self._model, i) for name, i in self._images.items()}
        self._keyframes_followed_px: dict[str, float] = {}  # by name
        self.left_out: Counter[str] = Counter()

    @property
    def depth_map(self) -> float:
        """How far away the map's points are from the keyframes that see them, in the median."""
        depths = [_median_depth(self._model, image) for image in self._images.values()]
        known = [depth for depth in depths if depth > 0.0]
        return float(np.median(known)) if known else 1.0

    def good(self, frames: Sequence[PosedFrame]) -> Iterator[tuple[_Measured, Frame]]:
        """Reads frames, and yields those whose pose is as good as those of keyframes.

        The others are counted anew. Keyframes that are passed on the way show that the source is
        the one that the run had.
        """
        self.left_out = Counter()
        posed = {frame.name: frame for frame in frames}
        sources = {frame.source for frame in frames}
        passed = {one.name for one in self.keyframes if one.source in sources}
        num_seen = 0
        for done, read in enumerate(self._read({*posed, *passed} if posed else set())):
            self._job.check()
            self._job.progress(
                Progress(what="frames read", done=done, total=len(posed) + len(passed))
            )
            frame = posed.get(read.name)
            if frame is None:
                self._refuse_another(read)
                continue
            num_seen += 1
            measured = self._measured(frame, read.frame)
            if isinstance(measured, LeftOut):
                self.left_out[measured.value] += 1
            else:
                yield measured, read.frame
        if num_seen < len(posed):
            self.left_out[LeftOut.NOT_IN_SOURCE.value] += len(posed) - num_seen

    def keyframe_details(self) -> list[PatchDetail]:
        """What each keyframe shows around its map points."""
        details = []
        for frame in self._job.each("keyframes compared", self.keyframes):
            points, pixels = self._points_of(frame.name), self._pixels_of(frame.name)
            rows = _some(len(points.point3D_ids))
            details.append(
                patch_detail(_grey(pixels), points.point3D_ids[rows], points.points_xy[rows])
            )
        return details

    def _read(self, names: Collection[str]) -> Iterator[SourceFrame]:
        return read_frames(self._sources, names, config=self.config)

    def _measured(self, posed: PosedFrame, frame: Frame) -> _Measured | LeftOut:
        near = self._around(posed)
        if not near:
            return LeftOut.TOO_FEW_POINTS
        camera_id = self._images[near[0].name].camera_id
        camera = self._model.camera(camera_id)
        if (frame.width, frame.height) != (camera.width, camera.height):
            raise ConfigError(
                f"{posed.name}: is {frame.width} x {frame.height} px, and the run's frames are"
                f" {camera.width} x {camera.height}: the source is another one than the run read"
            )
        tracks = follow(
            [self._points_of(one.name) for one in near],
            flow_image(frame.pixels),
            camera=camera,
            cam_from_world=posed.cam_from_world,
        )
        limit_px = _MAX_ERROR_RATIO * max(
            self._map_error_px,
            float(np.mean([self._errors_px[one.name] for one in near])),
            float(np.mean([self._followed_px(one) for one in near])),
        )
        before = fit_of(tracks, posed.cam_from_world, camera=camera)
        fit = self._refined(tracks, before, camera=camera)
        if fit.is_inlier.sum() < _MIN_INLIERS:
            return LeftOut.TOO_FEW_POINTS
        if fit.inlier_ratio < _MIN_INLIER_RATIO or fit.error_px > limit_px:
            return LeftOut.INACCURATE
        inliers = np.flatnonzero(fit.is_inlier)
        rows = inliers[_some(len(inliers))]
        return _Measured(
            posed=posed,
            camera_id=camera_id,
            near=near[0].name,
            fit=fit,
            tracks=FrameTracks(
                point3D_ids=tracks.point3D_ids[inliers],
                points_xy=tracks.points_xy[inliers],
                points3D_in_world=tracks.points3D_in_world[inliers],
            ),
            was_inaccurate=before.error_px > limit_px or before.inlier_ratio < _MIN_INLIER_RATIO,
            detail=patch_detail(
                _grey(frame.pixels), tracks.point3D_ids[rows], tracks.points_xy[rows]
            ),
        )

    def _refined(
        self, tracks: FrameTracks, before: FrameFit, *, camera: pycolmap.Camera
    ) -> FrameFit:
        """The pose that fits the points best, near that of the trajectory."""
        from engine.mapping.frame_posing import estimate_frame_pose

        pose = estimate_frame_pose(
            tracks.points_xy,
            tracks.points3D_in_world,
            camera=camera,
            start=before.cam_from_world,
            registration=self.config.registration,
            seed=self.config.runtime.seed,
        )
        if pose is None:
            return before
        after = fit_of(tracks, pose.cam_from_world, camera=camera)
        return after if after.is_inlier.sum() >= before.is_inlier.sum() * 0.9 else before

    def _followed_px(self, keyframe: PosedFrame) -> float:
        """A keyframe's error by the same measure as that of frames; 0: it cannot be measured.

        Flow has an error of its own, the larger the farther a view is from that of its keyframe.
        """
        if keyframe.name not in self._keyframes_followed_px:
            image = self._images[keyframe.name]
            pose = np.asarray(image.cam_from_world().matrix())
            camera, near = self._model.camera(image.camera_id), self._around(keyframe)
            error_px = 0.0
            if near:
                points = [self._points_of(one.name) for one in near]
                grey = self._points_of(keyframe.name).grey
                tracks = follow(points, grey, camera=camera, cam_from_world=pose)
                fit = fit_of(tracks, pose, camera=camera)
                error_px = fit.error_px if fit.is_inlier.sum() >= _MIN_INLIERS else 0.0
            self._keyframes_followed_px[keyframe.name] = error_px
        return self._keyframes_followed_px[keyframe.name]

    def _around(self, posed: PosedFrame) -> list[PosedFrame]:
        """The keyframes before and after a frame of its camera, the nearest first."""
        keyframes = self._by_camera.get(camera_of(posed), [])
        before = [one for one in keyframes if one.index < posed.index][-1:]
        after = [one for one in keyframes if one.index > posed.index][:1]
        return sorted(before + after, key=lambda one: abs(one.index - posed.index))

    def _points_of(self, name: str) -> KeyframePoints:
        points = self._points.pop(name, None)
        if points is None:
            points = keyframe_points(self._model, self._images[name], self._pixels_of(name))
        self._points[name] = points
        if len(self._points) > _MAX_KEPT:
            self._points.popitem(last=False)
        return points

    def _pixels_of(self, name: str) -> Uint8Array:
        return _read_image(self._job.run / IMAGES / name)

    def _refuse_another(self, read: SourceFrame) -> None:
        """Raises ConfigError unless a frame is the picture that the run has as its keyframe."""
        from engine.output.journal import encode_keyframe_image

        path = self._job.run / IMAGES / read.name
        quality = self.config.runtime.keyframe_jpeg_quality
        try:
            if encode_keyframe_image(read.frame, quality=quality) == path.read_bytes():
                return
        except JournalError as error:
            raise SnapshotError(str(error)) from error
        kept, pixels = _read_image(path), read.frame.pixels
        if kept.shape != pixels.shape or _difference(kept, pixels) > _SAME_LEVELS:
            raise ConfigError(
                f"{read.name}: the source has another picture there than the run: it is another"
                " file than the run read; --source names the right one"
            )


# -- staging --------------------------------------------------------------------------------------


class _Staging:
    """A folder of images and masks under flat names, and their map.

    Args:
        job: of the map's keyframes.
    """

    def __init__(self, job: ExportJob) -> None:
        self._job = job
        self._model = job.reconstruction
        self._folder = job.to / STAGED
        self.keyframes = {image.name: image for image in job.images()}
        self._names = FlatNames()
        for name in self.keyframes:  # they choose first, whichever frames follow
            self._names.of(name)

    def add(self, measured: _Measured, frame: Frame, *, config: Config) -> None:
        """Writes the image of a frame between keyframes, and its mask."""
        from engine.output.journal import encode_keyframe_image, encode_mask

        name = self._names.of(measured.posed.name)
        image = replace(frame, name=name)
        if name.endswith(".png"):  # what is to be without loss was not received as JPEG
            image = replace(image, jpeg=None)
        try:
            data = encode_keyframe_image(image, quality=config.runtime.keyframe_jpeg_quality)
            mask = None if frame.mask is None else encode_mask(frame.mask)
        except JournalError as error:
            raise SnapshotError(str(error)) from error
        _write(self._folder / IMAGES / name, data)
        if mask is not None:
            _write(self._folder / MASKS / f"{name}.png", mask)
        else:  # masks of whole cameras are those of the keyframes
            self._link(MASKS, f"{measured.near}.png", f"{name}.png")

    def finished(
        self,
        keyframes: Sequence[str],
        tracked: Sequence[_Measured],
        left_out: Mapping[str, int],
        *,
        sharpness: Mapping[str, float] | None = None,
    ) -> tuple[ExportJob, FrameFigures]:
        """Links the keyframes, and makes the map of all frames that were added."""
        for name in keyframes:
            self._link(IMAGES, name, self._names.of(name))
            self._link(MASKS, f"{name}.png", f"{self._names.of(name)}.png")
        self._write_table(keyframes, tracked, sharpness or {})
        model = _model_of(self._model, keyframes, tracked, names=self._names)
        errors_px = [one.fit.error_px for one in tracked]
        figures = FrameFigures(
            num_keyframes=len(keyframes),
            num_tracked=len(tracked),
            num_refined=sum(one.was_inaccurate for one in tracked),
            left_out=dict(left_out),
            error_px=float(np.mean(errors_px)) if errors_px else 0.0,
            keyframe_error_px=self._model.compute_mean_reprojection_error(),
        )
        return replace(self._job, reconstruction=model, run=self._folder), figures

    def _link(self, folder: str, name: str, flat: str) -> None:
        """Gives a file of the run a flat name, without copying it where that can be."""
        source, target = self._job.run / folder / name, self._folder / folder / flat
        if not source.is_file():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source.resolve(), target)

    def _write_table(
        self,
        keyframes: Sequence[str],
        tracked: Sequence[_Measured],
        sharpness: Mapping[str, float],
    ) -> None:
        rows = [
            (name, PoseKind.KEYFRAME, _error_px(self._model, self.keyframes[name]))
            for name in keyframes
        ]
        rows += [(one.posed.name, one.posed.kind, one.fit.error_px) for one in tracked]
        table = [
            (
                self._names.of(name),
                name,
                kind.value,
                f"{error_px:.4f}",
                _figure(sharpness, name),
            )
            for name, kind, error_px in rows
        ]
        write_atomically(self._job.to / IMAGE_NAMES, table_of(_HEADER, table))


def _model_of(
    model: pycolmap.Reconstruction,
    keyframes: Sequence[str],
    tracked: Sequence[_Measured],
    *,
    names: FlatNames,
) -> pycolmap.Reconstruction:
    """A map of some keyframes and other frames; it keeps all points, whoever saw them."""
    import pycolmap

    made = pycolmap.Reconstruction()
    for camera in model.cameras.values():
        made.add_camera_with_trivial_rig(camera)
    tracks: dict[int, pycolmap.Track] = {}
    for name in keyframes:
        image = model.find_image_with_name(name)
        points_xy = np.array([point.xy for point in image.points2D], np.float64).reshape(-1, 2)
        copy = pycolmap.Image(names.of(name), points_xy, image.camera_id, image.image_id)
        made.add_image_with_trivial_frame(copy, image.cam_from_world())
        for row, point in enumerate(image.points2D):
            if point.has_point3D():
                _track_of(tracks, point.point3D_id).add_element(image.image_id, row)
    for image_id, one in enumerate(tracked, start=max(model.images, default=0) + 1):
        assert one.tracks is not None
        copy = pycolmap.Image(
            names.of(one.posed.name), one.tracks.points_xy, one.camera_id, image_id
        )
        made.add_image_with_trivial_frame(copy, pycolmap.Rigid3d(one.fit.cam_from_world))
        for row, point3D_id in enumerate(one.tracks.point3D_ids.tolist()):
            _track_of(tracks, point3D_id).add_element(image_id, row)
    for point3D_id, point3D in model.points3D.items():
        copied = pycolmap.Point3D(
            xyz=point3D.xyz,
            color=point3D.color,
            error=point3D.error,
            track=_track_of(tracks, point3D_id),
        )
        made.add_point3D_with_id(point3D_id, copied)
    return made


def _track_of(tracks: dict[int, pycolmap.Track], point3D_id: int) -> pycolmap.Track:
    import pycolmap

    if point3D_id not in tracks:
        tracks[point3D_id] = pycolmap.Track()
    return tracks[point3D_id]


# -- figures --------------------------------------------------------------------------------------


def _frames_elsewhere(job: ExportJob) -> Counter[str]:
    """How many frames that the run used have no pose in the map."""
    reasons: Counter[str] = Counter()
    for row in read_frame_rows(job.run):
        if row.is_dropped or row.pose == PoseKind.KEYFRAME or row.map_number == str(job.map_number):
            continue
        why = LeftOut.IN_OTHER_MAP if row.map_number else LeftOut.WITHOUT_POSE
        reasons[why.value] += 1
    return reasons


def _error_px(model: pycolmap.Reconstruction, image: pycolmap.Image) -> float:
    """The mean reprojection error of a keyframe's keypoints; 0: it has none."""
    seen = [point for point in image.points2D if point.has_point3D()]
    if not seen:
        return 0.0
    xyz = np.array([model.point3D(point.point3D_id).xyz for point in seen])
    in_cam = transform_points(np.asarray(image.cam_from_world().matrix()), xyz)
    projected_xy = np.asarray(model.camera(image.camera_id).img_from_cam(in_cam))
    errors_px = np.linalg.norm(projected_xy - np.array([point.xy for point in seen]), axis=1)
    return float(np.nanmean(errors_px))


def _median_depth(model: pycolmap.Reconstruction, image: pycolmap.Image) -> float:
    """The median depth of a keyframe's points; 0: it has none."""
    xyz = [model.point3D(p.point3D_id).xyz for p in image.points2D if p.has_point3D()]
    if not xyz:
        return 0.0
    in_cam = transform_points(np.asarray(image.cam_from_world().matrix()), np.array(xyz))
    return float(np.median(np.linalg.norm(in_cam, axis=1)))


def _some(number: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Rows of at most so many points as sharpness is compared by, evenly taken."""
    step = max(1, -(-number // _MAX_DETAILS))
    return np.arange(0, number, step)


def _figure(sharpness: Mapping[str, float], name: str) -> str:
    figure = sharpness.get(name, -np.inf)
    return f"{figure:.4f}" if np.isfinite(figure) else ""


def _grey(pixels: Uint8Array) -> Uint8Array:
    import cv2

    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


def _read_image(path: Path) -> Uint8Array:
    """An image (H, W, 3) RGB of the run."""
    import cv2

    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise SnapshotError(f"the image {path.name} cannot be read")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def _difference(first: Uint8Array, second: Uint8Array) -> float:
    """The mean difference of two images in grey levels, but for what compression changes."""
    import cv2

    ratio = min(1.0, _COMPARED_EDGE_PX / max(first.shape))
    small = [
        cv2.resize(_grey(one), None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
        for one in (first, second)
    ]
    return float(cv2.absdiff(*small).mean())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
