"""A map as OpenSfM keeps it: ``reconstruction.json``, ``reference_lla.json`` and ``tracks.csv``.

By the pages "Geometric models" and "Dataset structure" of OpenSfM's documentation. Places in images
are normalised: from the middle of the image, in units of its longer edge. Cameras look along z, y
down, as COLMAP's do; the world is east, north, up of the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from adapters.exports.job import ExportJob
from adapters.exports.lenses import brown_distortion, fisheye_distortion
from adapters.exports.place import MapPlace
from engine.errors import ConfigError
from engine.geometry import rotation_vector_from

if TYPE_CHECKING:
    import pycolmap

_TRACKS_HEADER = "OPENSFM_TRACKS_VERSION_v1"
_SCALE = 0.004  # of every keypoint, normalised: OpenSfM's own default for the error of one
_GPS_DOP_M = 1.0  # of positions that come from the map
_UPRIGHT = 1  # EXIF orientation
_AT_ONCE = 10_000  # points


def opensfm_camera(camera: pycolmap.Camera) -> dict[str, Any]:
    """A camera in OpenSfM's words.

    Raises:
        ConfigError: OpenSfM has no such camera.
    """
    size = {"width": camera.width, "height": camera.height}
    if camera.is_spherical():
        if camera.width != 2 * camera.height:
            raise ConfigError(
                "OpenSfM's spherical images are twice as wide as high, not"
                f" {camera.width} x {camera.height} px"
            )
        return {"projection_type": "spherical", **size}
    kinds = {"brown": brown_distortion(camera), "fisheye_opencv": fisheye_distortion(camera)}
    for kind, distortion in kinds.items():
        if distortion is not None:
            edge_px = max(camera.width, camera.height)
            return {
                "projection_type": kind,
                **size,
                "focal_x": camera.focal_length_x / edge_px,
                "focal_y": camera.focal_length_y / edge_px,
                "c_x": (camera.principal_point_x - camera.width / 2.0) / edge_px,
                "c_y": (camera.principal_point_y - camera.height / 2.0) / edge_px,
                **distortion,
            }
    raise ConfigError(
        f"OpenSfM has no camera like {camera.model_name} with these parameters:"
        f" --set cameras.model=OPENCV, or OPENCV_FISHEYE, makes a map that it can read"
    )


def write_opensfm(
    job: ExportJob,
    to: Path,
    *,
    place: MapPlace,
    names: Mapping[str, str],
    times_s: Mapping[str, float],
) -> None:
    """Writes the files of a map.

    Args:
        job: whose reconstruction lies east, north, up of the place.
        to: a folder that is there.
        place: the reference.
        names: what images are called there, by their names.
        times_s: when they were captured, by their names.

    Raises:
        ConfigError: OpenSfM has no such camera.
        OSError: a file cannot be written.
        ExportCancelledError: the export was cancelled.
    """
    reference = {
        "latitude": place.latitude_deg,
        "longitude": place.longitude_deg,
        "altitude": place.height_m,
    }
    cameras = {
        camera_key(camera): opensfm_camera(camera) for camera in job.reconstruction.cameras.values()
    }
    shots = {
        names[image.name]: _shot(image, job, captured_at_s=times_s.get(image.name))
        for image in job.images()
    }
    head = {"cameras": cameras, "shots": shots, "reference_lla": reference}
    with (to / "reconstruction.json").open("w", encoding="utf-8", newline="\n") as file:
        _write_reconstruction(file, head, job)
    _write_json(to / "reference_lla.json", reference)
    # OpenSfM takes cameras from here instead of deriving them from the images' EXIF.
    _write_json(to / "camera_models_overrides.json", cameras)
    with (to / "tracks.csv").open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{_TRACKS_HEADER}\n")
        for image in job.each("tracks of images", job.images()):
            _write_tracks(file, image, job, name=names[image.name])


def camera_key(camera: pycolmap.Camera) -> str:
    """What a camera is called; six words and more, as OpenSfM and OpenDroneMap have them."""
    kind = opensfm_camera(camera)["projection_type"]
    return f"v2 livesfm camera-{camera.camera_id} {camera.width} {camera.height} {kind} 0.85"


def _shot(image: pycolmap.Image, job: ExportJob, *, captured_at_s: float | None) -> dict[str, Any]:
    cam_from_world = image.cam_from_world().matrix()
    return {
        "camera": camera_key(job.reconstruction.camera(image.camera_id)),
        "rotation": rotation_vector_from(cam_from_world[:, :3]).tolist(),
        "translation": cam_from_world[:, 3].tolist(),
        "gps_position": image.projection_center().tolist(),
        "gps_dop": _GPS_DOP_M,
        "orientation": _UPRIGHT,
        "capture_time": 0.0 if captured_at_s is None else captured_at_s,
    }


def _write_reconstruction(file: TextIO, head: Mapping[str, Any], job: ExportJob) -> None:
    """Writes the list of the one reconstruction, its points a line each."""
    opened = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    file.write(f'[{opened},\n "points": {{')
    points = sorted(job.reconstruction.points3D.items())
    separator = "\n"
    for rows in job.each_slice("points for OpenSfM", len(points), size=_AT_ONCE):
        for point3D_id, point in points[rows]:
            color = [float(value) for value in point.color]
            record = {"coordinates": point.xyz.tolist(), "color": color}
            file.write(f'{separator}  "{point3D_id}": {json.dumps(record, allow_nan=False)}')
            separator = ",\n"
    file.write("\n }\n}]\n")


def _write_tracks(file: TextIO, image: pycolmap.Image, job: ExportJob, *, name: str) -> None:
    camera = job.reconstruction.camera(image.camera_id)
    edge_px = max(camera.width, camera.height)
    for point2D_idx, point in enumerate(image.points2D):
        if not point.has_point3D():
            continue
        x = (float(point.xy[0]) - camera.width / 2.0) / edge_px
        y = (float(point.xy[1]) - camera.height / 2.0) / edge_px
        color = job.reconstruction.point3D(point.point3D_id).color
        cells = [name, point.point3D_id, point2D_idx, f"{x:.9f}", f"{y:.9f}", _SCALE, *color]
        file.write("\t".join(str(cell) for cell in cells) + "\n")


def _write_json(path: Path, record: object) -> None:
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
