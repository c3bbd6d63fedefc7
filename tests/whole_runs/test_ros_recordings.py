"""ROS recordings from end to end: images, calibrations and positions give a map on the globe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

pytest.importorskip("rosbags", reason="rosbags is not installed: tools/setup ros")

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from adapters import cli
from adapters.evaluate import read_tum
from adapters.launch import count_frame_ids
from adapters.town.source import SyntheticTown, TownOptions
from engine.config import SourcesConfig
from engine.geometry import camera_center
from engine.types import Float64Array
from tests.support.fake_runs import Written

ROS = get_typestore(Stores.ROS2_HUMBLE)
PERIOD_NS = 200_000_000
METRES_PER_DEGREE = 111_320.0
LATITUDE_DEG, LONGITUDE_DEG = 47.0, 8.0
POSITION_SIGMA_M = 0.1
NUM_FRAMES = 24

pytestmark = pytest.mark.slow


def livesfm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def written(
    path: Path,
    images: Sequence[bytes],
    *,
    size: tuple[int, int],
    matrix: NDArray[np.float64],
    distortion: Sequence[float],
    centers_enu_m: Float64Array,
) -> Path:
    """An MCAP file with a CameraInfo, and an image and a position every 0.2 s.

    Args:
        path: the folder for it.
        images: JPEG files.
        size: of images, width and height in px.
        matrix: (3, 3) of the camera, where the first pixel's centre is (0, 0).
        distortion: plumb_bob.
        centers_enu_m: (N, 3) where the images were taken: metres east, north and up.
    """
    rng = np.random.default_rng(0)
    info = camera_info(size, matrix=matrix, distortion=distortion)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:

        def add(topic: str, number: int, message: Any) -> None:
            name = message.__msgtype__
            if topic not in topics:
                topics[topic] = bag.add_connection(topic, name, typestore=ROS)
            data = ROS.serialize_cdr(message, name)
            bag.write(topics[topic], number * PERIOD_NS, data)

        topics: dict[str, Any] = {}
        add("/camera/camera_info", 1, info)
        for number, (image, center_m) in enumerate(zip(images, centers_enu_m, strict=True), 1):
            measured_m = center_m + rng.normal(0.0, POSITION_SIGMA_M, 3)
            add("/fix", number, position(number, measured_m))
            compressed = ROS.types["sensor_msgs/msg/CompressedImage"](
                header=header(number), format="jpeg", data=np.frombuffer(image, np.uint8)
            )
            add("/camera/image_raw/compressed", number, compressed)
    return path


def header(number: int) -> Any:
    seconds, nanoseconds = divmod(number * PERIOD_NS, 1_000_000_000)
    stamp = ROS.types["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)
    return ROS.types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def camera_info(
    size: tuple[int, int], *, matrix: NDArray[np.float64], distortion: Sequence[float]
) -> Any:
    roi = ROS.types["sensor_msgs/msg/RegionOfInterest"](
        x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return ROS.types["sensor_msgs/msg/CameraInfo"](
        header=header(1),
        width=size[0],
        height=size[1],
        distortion_model="plumb_bob",
        d=np.array(distortion, float),
        k=matrix.reshape(-1),
        r=np.eye(3).reshape(-1),
        p=np.hstack([matrix, np.zeros((3, 1))]).reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )


def position(number: int, enu_m: Float64Array) -> Any:
    per_longitude = METRES_PER_DEGREE * np.cos(np.radians(LATITUDE_DEG))
    return ROS.types["sensor_msgs/msg/NavSatFix"](
        header=header(number),
        status=ROS.types["sensor_msgs/msg/NavSatStatus"](status=0, service=1),
        latitude=LATITUDE_DEG + enu_m[1] / METRES_PER_DEGREE,
        longitude=LONGITUDE_DEG + enu_m[0] / per_longitude,
        altitude=400.0 + enu_m[2],
        position_covariance=np.diag([POSITION_SIGMA_M**2] * 3).reshape(-1),
        position_covariance_type=2,
    )


def upright(cam_from_world: Float64Array) -> Float64Array:
    """Centres (N, 3) of cameras (N, 3, 4), turned so that the mean camera stands upright."""
    up = -cam_from_world[:, 1, :3].mean(axis=0)
    up /= np.linalg.norm(up)
    east = np.cross([0.0, 1.0, 0.0] if abs(up[1]) < 0.9 else [1.0, 0.0, 0.0], up)
    east /= np.linalg.norm(east)
    rotation = np.stack([east, np.cross(up, east), up])
    centers = camera_center(cam_from_world) @ rotation.T
    return np.asarray(centers - centers.mean(axis=0))


def assert_mapped(recording: Path, out: Path, *, num: int, max_rmse_m: float) -> Written:
    result = livesfm(
        *("run", recording, "--out", out, "--view", "none", "--quiet"),
        *("--set", "dense.enabled=false"),
    )
    assert result.exit_code == 0, result.output
    run = Written.read(out)
    summary = run.summary
    assert summary["frames_received"] == num
    assert summary["registered_keyframes"] == summary["keyframes"] > 5
    assert summary["georeferenced"]
    assert summary["unit"] == "metres"
    assert 0.3 * POSITION_SIGMA_M < summary["gps_rmse_m"] < max_rmse_m
    return run


@pytest.mark.usefixtures("towns_painted_once")
def test_a_recording_of_the_town_gives_its_map_on_the_globe(tmp_path: Path) -> None:
    options = TownOptions(path="lawnmower", width=320, height=240, num_frames=120)
    town = SyntheticTown(options, next_frame_id=count_frame_ids(), config=SourcesConfig())
    rendered = [town.render(index) for index in range(NUM_FRAMES)]
    jpegs = [cv2.imencode(".jpg", image.pixels[:, :, ::-1])[1].tobytes() for image in rendered]
    fx, fy, cx, cy = town.intrinsics
    recording = written(
        tmp_path / "walk",
        jpegs,
        size=(options.width, options.height),
        matrix=np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1.0]]),
        distortion=[0.0] * 5,
        centers_enu_m=camera_center(np.array([one.cam_from_world for one in rendered])),
    )
    run = assert_mapped(recording, tmp_path / "run", num=NUM_FRAMES, max_rmse_m=0.3)
    (camera,) = run.summary["cameras"]
    assert camera["focal_px"] == pytest.approx(fx), "a calibration that was given stays as it is"


def test_a_recording_of_the_fox_gives_the_map_that_its_photos_give(
    real_set: Callable[[str], Path], tmp_path: Path
) -> None:
    fox, out = real_set("fox"), tmp_path / "run"
    known = json.loads((fox / "intrinsics.json").read_text())
    photos = sorted((fox / "images").glob("*.jpg"))
    truth = read_tum(fox / "groundtruth.txt")
    recording = written(
        tmp_path / "fox",
        [photo.read_bytes() for photo in photos],
        size=(known["width"], known["height"]),
        matrix=np.array(
            [
                [known["fx"], 0.0, known["cx"] - 0.5],
                [0.0, known["fy"], known["cy"] - 0.5],
                [0.0, 0.0, 1.0],
            ]
        ),
        distortion=[*(known[name] for name in ("k1", "k2", "p1", "p2")), 0.0],
        centers_enu_m=3.0 * upright(truth.cam_from_world),
    )
    assert_mapped(recording, out, num=len(photos), max_rmse_m=0.3)
    result = livesfm("evaluate", out, "--reference", fox / "groundtruth.txt", "--json")
    figures: dict[str, Any] = json.loads(result.stdout)
    assert figures["final"]["num_compared"] >= 45  # of a video, which a jolt may lose for a moment
    assert 0.0 < figures["final"]["absolute"]["rmse_percent_of_extent"] <= 0.13
