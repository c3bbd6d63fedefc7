"""Reads what the journal of a run holds, for a run that goes on."""

from __future__ import annotations

import json
import math
import stat
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycolmap

from engine.camera_models import CAMERA_MODELS
from engine.errors import JournalError
from engine.geo.usable_fixes import usable_fix
from engine.mapping.model.camera_priors import CameraPrior
from engine.mapping.stored_state import (
    Fact,
    StoredCalibration,
    StoredFrame,
    StoredKeyframe,
    StoredRelativePose,
    StoredRun,
)
from engine.output.colmap_tables import descriptors_of_row
from engine.output.database_reader import Columns, DatabaseReader, array_of, json_object
from engine.output.own_tables import OWN_TABLES
from engine.output.run_format import read_format_version, refuse_newer, refuse_older
from engine.output.snapshots import snapshots_of
from engine.types import (
    CalibrationOrigin,
    DescriptorKind,
    Features,
    FrameId,
    GpsFix,
    GpsReading,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    PackedMask,
    PairReason,
    Uint8Array,
    VerifiedPair,
)

_COLMAP_TABLES = ("cameras", "images", "descriptors", "two_view_geometries")
_MAX_EDGE = 1_000_000  # px of an image
_MAX_PIXELS = 1 << 30
_MAX_ID = 2**31 - 2  # COLMAP's, of images
_NUMBER = (int, float)
_TEXT_OR_NONE = (str, type(None))
_BYTES_OR_NONE = (bytes, type(None))

Made = TypeVar("Made")


def read_stored_run(path: Path) -> StoredRun:
    """Reads the journal of a run that no live run holds; nothing is changed.

    Keyframes and pairs that only one half of the tables has are left out: other programs may have
    added images to the database, or deleted some.

    Raises:
        JournalError: it is not a run, was written by another version of LiveSfM, or cannot be read.
    """
    refuse_newer(path, read_format_version(path))
    database_path = path / "database.db"
    with DatabaseReader.reading(database_path) as reader:
        _check_version(reader, database_path)
        reader.require([*_COLMAP_TABLES, *OWN_TABLES])
        cameras = dict(_cameras(reader))
        keyframes = tuple(_keyframes(reader, path))
        keyframe_ids = {one.keyframe.frame_id for one in keyframes}
        pairs = tuple(_pairs(reader, keyframe_ids))
        frames = tuple(_frames(reader))
        return StoredRun(
            path=path,
            keyframes=keyframes,
            pairs=pairs,
            tried=(*(one.pair for one in pairs), *_rejected(reader, keyframe_ids, pairs)),
            cameras=cameras,
            calibrations=dict(_calibrations(reader, cameras)),
            relative_poses=tuple(_relative_poses(reader, keyframe_ids)),
            snapshots=snapshots_of(path),
            frames=frames,
            gps_readings=tuple(_gps_readings(reader)),
            facts=dict(_facts(reader)),
            next_frame_id=FrameId(
                1 + max((*keyframe_ids, *(one.frame_id or 0 for one in frames)), default=0)
            ),
        )


def _check_version(reader: DatabaseReader, path: Path) -> None:
    reader.require(["images"])
    if not reader.has_table("livesfm_format"):
        refuse_older(path, 1)
    versions = [row[0] for row in reader.rows("livesfm_format", {"version": int}, order="version")]
    if len(versions) != 1:
        raise JournalError(f"{path}: names {len(versions)} format versions")
    refuse_newer(path, versions[0])
    refuse_older(path, versions[0])


# -- keyframes ------------------------------------------------------------------------------------


def _keyframes(reader: DatabaseReader, path: Path) -> Iterable[StoredKeyframe]:
    images = {
        image_id: (name, camera_id)
        for image_id, name, camera_id in reader.rows(
            "images", {"image_id": int, "name": str, "camera_id": int}, order="image_id"
        )
    }
    masks = dict(_masks(reader))
    tables = dict(_features(reader))
    columns: Columns = {
        "image_id": int,
        "source": str,
        "idx": int,
        "camera_key": str,
        "calibration_key": str,
        "width": int,
        "height": int,
        "captured_at_s": _NUMBER,
        "is_photo": int,
        "gps": _TEXT_OR_NONE,
        "intrinsics_prior": _TEXT_OR_NONE,
        "mask_key": _TEXT_OR_NONE,
    }
    for row in reader.rows("livesfm_keyframes", columns, order="position"):
        (image_id, source, index, camera_key, calibration_key) = row[:5]
        (width, height, captured_at_s, is_photo, gps, prior, mask_key) = row[5:]
        if image_id not in images or image_id not in tables:
            continue
        name, camera_id = images[image_id]
        _check_size(width, height)
        keyframe = Keyframe(
            frame_id=_frame_id(image_id),
            camera_key=camera_key,
            index=index,
            name=name,
            width=width,
            height=height,
            captured_at_s=_finite(captured_at_s),
            received_at_s=0.0,
            features=tables[image_id],
            gps=None if gps is None else usable_fix(_gps_fix(json_object(gps))),
            intrinsics_prior=None if prior is None else _intrinsics_prior(json_object(prior)),
            mask=None if mask_key is None else masks[mask_key],
            is_photo=bool(is_photo),
            calibration_key=calibration_key,
        )
        if keyframe.mask and (keyframe.mask.width, keyframe.mask.height) != (width, height):
            raise ValueError(f"the mask of keyframe {image_id} is not of its size")
        yield StoredKeyframe(
            keyframe=keyframe,
            camera_id=camera_id,
            source=source,
            has_image=_has_image(path, name),
        )


def _features(reader: DatabaseReader) -> Iterable[tuple[int, Features]]:
    descriptors = dict(_descriptors(reader))
    columns: Columns = {
        "image_id": int,
        "rows": int,
        "keypoints_xy": bytes,
        "scales": bytes,
        "colors": bytes,
        "is_free": _BYTES_OR_NONE,
        "descriptor_kind": str,
    }
    for row in reader.rows("livesfm_features", columns, order="image_id"):
        image_id, num, keypoints_xy, scales, colors, is_free, kind = row
        if image_id not in descriptors:
            continue
        yield (
            image_id,
            Features(
                frame_id=_frame_id(image_id),
                keypoints_xy=array_of(keypoints_xy, np.float64, (num, 2), name="keypoints_xy"),
                descriptors=descriptors[image_id],
                scales=array_of(scales, np.float32, (num,), name="scales"),
                colors=array_of(colors, np.uint8, (num, 3), name="colors"),
                is_free=np.zeros(num, np.bool_)
                if is_free is None
                else array_of(is_free, np.uint8, (num,), name="is_free") != 0,
                descriptor_kind=DescriptorKind(kind),
            ),
        )


def _descriptors(reader: DatabaseReader) -> Iterable[tuple[int, Uint8Array]]:
    columns: Columns = {
        "image_id": int,
        "type": int,
        "rows": int,
        "cols": int,
        "data": _BYTES_OR_NONE,
    }
    for image_id, kind, num, dimensions, data in reader.rows(
        "descriptors", columns, order="image_id"
    ):
        values = array_of(data or b"", np.uint8, (num, dimensions), name="descriptors")
        yield image_id, descriptors_of_row(kind, values)


def _masks(reader: DatabaseReader) -> Iterable[tuple[str, PackedMask]]:
    columns: Columns = {"mask_key": str, "width": int, "height": int, "data": bytes}
    for mask_key, width, height, data in reader.rows("livesfm_masks", columns, order="mask_key"):
        _check_size(width, height)
        num_bytes = math.ceil(width * height / 8)
        inflating = zlib.decompressobj()
        try:
            inflated = inflating.decompress(data, num_bytes + 1)
        except zlib.error as error:
            raise ValueError(f"a mask that cannot be inflated: {error}") from error
        if len(inflated) != num_bytes:
            raise ValueError(f"a mask of {len(inflated)} bytes for {width} x {height} px")
        yield mask_key, PackedMask(width=width, height=height, data=data)


def _has_image(path: Path, name: str) -> bool:
    try:
        found = (path / "images" / name).stat()
        return stat.S_ISREG(found.st_mode) and found.st_size > 0
    except (OSError, ValueError):  # not the name of any file
        return False


# -- pairs ----------------------------------------------------------------------------------------


def _pairs(reader: DatabaseReader, keyframe_ids: set[FrameId]) -> Iterable[VerifiedPair]:
    columns: Columns = {"pair_id": int, "rows": int, "cols": int, "data": _BYTES_OR_NONE}
    inliers = {
        pair_id: array_of(data or b"", np.uint32, (num, 2), name="matches")
        for pair_id, num, num_columns, data in reader.rows(
            "two_view_geometries", columns, order="pair_id"
        )
        if num_columns == 2 and num > 0
    }
    own_columns: Columns = {
        "pair_id": int,
        "reason": str,
        "num_matches": int,
        "fundamental": bytes,
        "cam2_from_cam1": _BYTES_OR_NONE,
        "homography_inlier_ratio": _NUMBER,
    }
    for row in reader.rows("livesfm_pairs", own_columns, order="position"):
        pair_id, reason, num_matches, fundamental, pose, ratio = row
        pair = _pair(pair_id)
        if not keyframe_ids.issuperset((pair.first, pair.second)) or pair_id not in inliers:
            continue
        yield VerifiedPair(
            pair=pair,
            reason=PairReason(reason),
            inlier_matches_idx=inliers[pair_id],
            num_matches=num_matches,
            fundamental=array_of(fundamental, np.float64, (3, 3), name="fundamental"),
            homography_inlier_ratio=_finite(ratio),
            cam2_from_cam1=None
            if pose is None
            else array_of(pose, np.float64, (3, 4), name="cam2_from_cam1"),
        )


def _rejected(
    reader: DatabaseReader, keyframe_ids: set[FrameId], pairs: tuple[VerifiedPair, ...]
) -> Iterable[ImagePair]:
    verified = {one.pair for one in pairs}
    for (pair_id,) in reader.rows("livesfm_tried_pairs", {"pair_id": int}, order="position"):
        pair = _pair(pair_id)
        if pair not in verified and keyframe_ids.issuperset((pair.first, pair.second)):
            yield pair


def _pair(pair_id: int) -> ImagePair:
    """COLMAP's pair of that id."""
    first, second = pycolmap.pair_id_to_image_pair(pair_id)
    return ImagePair(_frame_id(first), _frame_id(second))


# -- cameras --------------------------------------------------------------------------------------


def _cameras(reader: DatabaseReader) -> Iterable[tuple[int, pycolmap.Camera]]:
    columns: Columns = {
        "camera_id": int,
        "model": int,
        "width": int,
        "height": int,
        "params": bytes,
        "prior_focal_length": int,
    }
    for row in reader.rows("cameras", columns, order="camera_id"):
        camera_id, model, width, height, params, has_prior = row
        name = pycolmap.CameraModelId(model).name
        yield (
            camera_id,
            _camera(
                camera_id,
                name,
                width,
                height,
                params=np.frombuffer(params, np.float64).tolist(),
                has_prior=bool(has_prior),
            ),
        )


def _calibrations(
    reader: DatabaseReader, cameras: Mapping[int, pycolmap.Camera]
) -> Iterable[tuple[str, StoredCalibration]]:
    columns: Columns = {"calibration_key": str, "camera_id": int, "initial": str, "prior": str}
    for row in reader.rows("livesfm_calibrations", columns, order="position"):
        calibration_key, camera_id, initial_text, prior_text = row
        initial = json_object(initial_text)
        prior = json_object(prior_text)
        yield (
            calibration_key,
            StoredCalibration(
                camera=cameras[camera_id],
                initial=_camera(
                    int(initial["camera_id"]),
                    str(initial["model"]),
                    int(initial["width"]),
                    int(initial["height"]),
                    params=[float(value) for value in initial["params"]],
                    has_prior=bool(initial["has_prior_focal_length"]),
                ),
                prior=_made(
                    CameraPrior,
                    prior,
                    origin=CalibrationOrigin(prior["origin"]),
                    distortion=tuple(float(value) for value in prior["distortion"]),
                ),
            ),
        )


def _camera(
    camera_id: int,
    model: str,
    width: int,
    height: int,
    *,
    params: list[float],
    has_prior: bool,
) -> pycolmap.Camera:
    _check_size(width, height)
    if model not in CAMERA_MODELS:
        raise ValueError(f"the camera model {model}")
    camera = pycolmap.Camera(
        camera_id=camera_id, model=model, width=width, height=height, params=params
    )
    camera.has_prior_focal_length = has_prior
    if not camera.verify_params() or not all(map(math.isfinite, params)):
        raise ValueError(f"{len(params)} parameters of a camera of the model {model}")
    return camera


def _intrinsics_prior(record: dict[str, Any]) -> IntrinsicsPrior:
    params = record["params"]
    return _made(
        IntrinsicsPrior,
        record,
        params=None if params is None else tuple(float(value) for value in params),
        origin=CalibrationOrigin(record["origin"]),
    )


# -- frames, sources, positions -------------------------------------------------------------------


def _frames(reader: DatabaseReader) -> Iterable[StoredFrame]:
    columns: Columns = {
        "frame_id": (int, type(None)),
        "camera_key": _TEXT_OR_NONE,
        "source": str,
        "idx": int,
        "name": str,
        "captured_at_s": _NUMBER,
        "status": _TEXT_OR_NONE,
    }
    for row in reader.rows("livesfm_frames", columns, order="position"):
        frame_id, camera_key, source, index, name, captured_at_s, status = row
        yield StoredFrame(
            frame_id=None if frame_id is None else _frame_id(frame_id),
            camera_key=camera_key,
            source=source,
            index=index,
            name=name,
            captured_at_s=_finite(captured_at_s),
            status=status,
        )


def _relative_poses(
    reader: DatabaseReader, keyframe_ids: set[FrameId]
) -> Iterable[StoredRelativePose]:
    columns: Columns = {
        "frame_id": int,
        "keyframe_id": int,
        "idx": int,
        "captured_at_s": _NUMBER,
        "cam_from_keyframe": _BYTES_OR_NONE,
    }
    for row in reader.rows("livesfm_relative_poses", columns, order="position"):
        frame_id, keyframe_id, index, captured_at_s, pose = row
        if keyframe_id not in keyframe_ids:
            continue
        yield StoredRelativePose(
            frame_id=_frame_id(frame_id),
            keyframe_id=_frame_id(keyframe_id),
            index=index,
            captured_at_s=_finite(captured_at_s),
            cam_from_keyframe=None
            if pose is None
            else array_of(pose, np.float64, (3, 4), name="cam_from_keyframe"),
        )


def _gps_readings(reader: DatabaseReader) -> Iterable[GpsReading]:
    columns: Columns = {
        "source": str,
        "camera_key": _TEXT_OR_NONE,
        "captured_at_s": _NUMBER,
        "fix": str,
    }
    for row in reader.rows("livesfm_gps_readings", columns, order="position"):
        source, camera_key, captured_at_s, fix = row
        yield GpsReading(
            source=source,
            camera_key=camera_key,
            captured_at_s=_finite(captured_at_s),
            fix=_gps_fix(json_object(fix)),
        )


def _gps_fix(record: dict[str, Any]) -> GpsFix:
    return _made(GpsFix, record)


# -- facts ----------------------------------------------------------------------------------------


def _facts(reader: DatabaseReader) -> Iterable[tuple[str, Fact]]:
    columns: Columns = {"name": str, "json": str, "array": _BYTES_OR_NONE}
    for name, text, array in reader.rows("livesfm_facts", columns, order="name"):
        value = _json(text)
        if array is None:
            yield name, value
            continue
        if not isinstance(value, dict) or np.dtype(str(value["dtype"])).kind not in "biuf":
            raise ValueError(f"the state {name[:50]}")
        yield name, array_of(array, value["dtype"], tuple(map(int, value["shape"])), name=name)


def _json(text: str) -> Fact:
    try:
        value: Fact = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    return value


# -- single values --------------------------------------------------------------------------------


def _made(kind: type[Made], record: dict[str, Any], **converted: Any) -> Made:
    """A product from its record, whose values have the types that the product is declared with."""
    values = {**record, **converted}
    names = {one.name: str(one.type) for one in fields(kind)}  # type: ignore[arg-type]
    if values.keys() != names.keys():
        raise ValueError(f"not the fields of a {kind.__name__}: {', '.join(values)[:100]}")
    for name, value in values.items():
        if name not in converted and not _is_of(value, names[name]):
            raise ValueError(f"{kind.__name__}.{name}")
    return kind(**values)


def _is_of(value: object, annotation: str) -> bool:
    """Whether a value of JSON suits a field that is declared so."""
    kinds = annotation.split(" | ")
    if value is None:
        return "None" in kinds
    if isinstance(value, bool):
        return "bool" in kinds
    if isinstance(value, (int, float)):
        return "float" in kinds or ("int" in kinds and isinstance(value, int))
    return isinstance(value, str) and "str" in kinds


def _frame_id(value: int) -> FrameId:
    if not 0 < value <= _MAX_ID:
        raise ValueError(f"the frame id {value}")
    return FrameId(value)


def _check_size(width: int, height: int) -> None:
    if not (0 < width <= _MAX_EDGE and 0 < height <= _MAX_EDGE and width * height <= _MAX_PIXELS):
        raise ValueError(f"an image of {width} x {height} px")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return float(value)
