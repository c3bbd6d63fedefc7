"""Maps to be adjusted as plain arrays, and what an adjustment changes in them.

A solver adds the keyframes of a map in the order in which they were registered, and sums in that
order. So that is the order of the arrays, and a map made of them is adjusted to the same bits.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.remote.messages import Arrays

if TYPE_CHECKING:
    import pycolmap

    from engine.mapping.model.calibration_control import CalibrationControl, CalibrationState


def map_to_plain(
    reconstruction: pycolmap.Reconstruction, calibration: CalibrationControl
) -> dict[str, Any]:
    """What adjusting a map takes: its K keyframes and N points, with their M observations.

    Args:
        reconstruction: the map; only read.
        calibration: the priors of its cameras, and what was found out about them.

    Returns:
        ``cameras``: JSON; ``keyframe_ids`` and ``camera_ids`` (K,), in order of registration;
        ``poses`` (K, 7), quaternion x y z w and translation of cam_from_world; ``num_observed``
        (K,) and ``points_xy`` (M, 2) px, of each keyframe in turn; ``point3D_ids`` (N,),
        ``points3D`` (N, 3), ``track_lengths`` (N,), and ``tracks`` (M, 2), of each point in turn
        the ids of keyframes and the place among what the keyframe observes.
    """
    ids = list(reconstruction.reg_image_ids())
    images = [reconstruction.image(i) for i in ids]
    observed = [image.get_observation_points2D() for image in images]
    rows = {
        image_id: {idx: row for row, idx in enumerate(image.get_observation_point2D_idxs())}
        for image_id, image in zip(ids, images, strict=True)
    }
    points = dict(reconstruction.points3D.items())
    tracks = [point.track.elements for point in points.values()]
    return {
        "cameras": _json(_camera_records(reconstruction, calibration)),
        "keyframe_ids": np.array(ids, np.int64),
        "camera_ids": np.array([image.camera_id for image in images], np.int64),
        "poses": _poses(reconstruction, ids),
        "num_observed": np.array([len(some) for some in observed], np.int64),
        "points_xy": np.array([one.xy for some in observed for one in some]).reshape(-1, 2),
        "point3D_ids": np.array(list(points), np.int64),
        "points3D": np.array([point.xyz for point in points.values()]).reshape(-1, 3),
        "track_lengths": np.array([len(track) for track in tracks], np.int64),
        "tracks": np.array(
            [(one.image_id, rows[one.image_id][one.point2D_idx]) for t in tracks for one in t],
            np.int64,
        ).reshape(-1, 2),
    }


def map_from_plain(arrays: Arrays) -> tuple[pycolmap.Reconstruction, CalibrationControl]:
    """A map from what `map_to_plain` made of one, and its calibration."""
    import pycolmap

    from engine.mapping.model.calibration_control import CalibrationControl
    from engine.mapping.model.map_record import prior_of, state_of

    described = json.loads(arrays["cameras"].tobytes())
    reconstruction = pycolmap.Reconstruction()
    calibration = CalibrationControl(is_bounded=described["is_bounded"])
    for record in described["cameras"]:
        if record["camera"] is not None:
            camera = pycolmap.Camera(**record["camera"])
            reconstruction.add_camera_with_trivial_rig(camera)
        if record["prior"] is not None:
            calibration.set_prior(record["camera_id"], prior_of(record))
        if (state := state_of(record)) is not None:
            calibration.set_state(record["camera_id"], state)
    ends = np.cumsum(arrays["num_observed"])[:-1]
    for image_id, camera_id, pose, points_xy in zip(
        arrays["keyframe_ids"].tolist(),
        arrays["camera_ids"].tolist(),
        arrays["poses"],
        np.split(arrays["points_xy"], ends),
        strict=True,
    ):
        image = pycolmap.Image(keypoints=points_xy, camera_id=camera_id, image_id=image_id)
        reconstruction.add_image_with_trivial_frame(image, _rigid(pose))
    tracks = np.split(arrays["tracks"], np.cumsum(arrays["track_lengths"])[:-1])
    for point3D_id, xyz, track in zip(
        arrays["point3D_ids"].tolist(), arrays["points3D"], tracks, strict=True
    ):
        point = pycolmap.Point3D()
        point.xyz = xyz
        point.track = pycolmap.Track([pycolmap.TrackElement(*one) for one in track.tolist()])
        reconstruction.add_point3D_with_id(point3D_id, point)
    return reconstruction, calibration


def changes_to_plain(
    reconstruction: pycolmap.Reconstruction, calibration: CalibrationControl, arrays: Arrays
) -> dict[str, Any]:
    """What an adjustment changed in a map that was made of arrays, in their order."""
    ids = arrays["keyframe_ids"].tolist()
    points = (reconstruction.point3D(i) for i in arrays["point3D_ids"].tolist())
    return {
        "cameras": _json(_camera_records(reconstruction, calibration)),
        "poses": _poses(reconstruction, ids),
        "points3D": np.array([point.xyz for point in points]).reshape(-1, 3),
    }


def take_changes(
    reconstruction: pycolmap.Reconstruction,
    calibration: CalibrationControl,
    *,
    arrays: Arrays,
    changes: Arrays,
) -> None:
    """Makes a map what an adjustment elsewhere made of it.

    Args:
        reconstruction: the map.
        calibration: of it.
        arrays: what `map_to_plain` made of both.
        changes: what came back.

    Raises:
        KeyError, TypeError, ValueError: that is not of this map, which stays as it is.
    """
    from engine.mapping.model.map_record import state_of

    records = json.loads(changes["cameras"].tobytes())["cameras"]
    states = {int(one["camera_id"]): state_of(one) for one in records}
    params = {int(one["camera_id"]): one["camera"]["params"] for one in records if one["camera"]}
    is_same = all(changes[name].shape == arrays[name].shape for name in ("poses", "points3D"))
    if not is_same or params.keys() != set(arrays["camera_ids"].tolist()):
        raise ValueError("the adjustment of another map")
    poses = [_rigid(pose) for pose in changes["poses"]]
    for camera_id, own in params.items():
        reconstruction.camera(camera_id).params = own
    for image_id, pose in zip(arrays["keyframe_ids"].tolist(), poses, strict=True):
        image = reconstruction.image(image_id)
        reconstruction.frame(image.frame_id).set_cam_from_world(image.camera_id, pose)
    for point3D_id, xyz in zip(arrays["point3D_ids"].tolist(), changes["points3D"], strict=True):
        reconstruction.point3D(point3D_id).xyz = xyz
    for camera_id, state in states.items():
        if state is not None:
            calibration.set_state(camera_id, state)


def _camera_records(
    reconstruction: pycolmap.Reconstruction, calibration: CalibrationControl
) -> dict[str, Any]:
    """Cameras of registered keyframes, and all that have priors, as JSON holds them."""
    used = {int(reconstruction.image(i).camera_id) for i in reconstruction.reg_image_ids()}
    records = []
    for camera_id in sorted(used.union(calibration.priors)):
        prior = calibration.priors.get(camera_id)
        records.append(
            {
                "camera_id": camera_id,
                "camera": _camera(reconstruction, camera_id) if camera_id in used else None,
                "prior": None if prior is None else asdict(prior),
                "state": _state(calibration.states.get(camera_id)),
            }
        )
    return {"is_bounded": calibration.is_bounded, "cameras": records}


def _camera(reconstruction: pycolmap.Reconstruction, camera_id: int) -> dict[str, Any]:
    camera = reconstruction.camera(camera_id)
    return {
        "camera_id": camera_id,
        "model": camera.model_name,
        "width": int(camera.width),
        "height": int(camera.height),
        "params": [float(value) for value in camera.params],
        "has_prior_focal_length": bool(camera.has_prior_focal_length),
    }


def _state(state: CalibrationState | None) -> dict[str, Any] | None:
    if state is None:
        return None
    sigma = state.focal_sigma_ratio
    return asdict(state) | {"focal_sigma_ratio": sigma if math.isfinite(sigma) else None}


def _poses(reconstruction: pycolmap.Reconstruction, image_ids: list[int]) -> Any:
    """(K, 7) quaternions x y z w and translations."""
    poses = [reconstruction.image(i).cam_from_world() for i in image_ids]
    return np.array([[*pose.rotation.quat, *pose.translation] for pose in poses]).reshape(-1, 7)


def _rigid(pose: Any) -> pycolmap.Rigid3d:
    import pycolmap

    return pycolmap.Rigid3d(pycolmap.Rotation3d(np.array(pose[:4])), np.array(pose[4:]))


def _json(value: Any) -> Any:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
