"""The folder of a run over a video of a textured plane, of which every pose and pixel is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pycolmap

from engine.config import dump_config, load_config
from engine.events import SourceOpened
from engine.geometry import invert_pose, quat_xyzw_from_rotation, rotation_from_vector
from engine.types import Float64Array, Uint8Array
from tests.support.small_videos import write_video

WIDTH, HEIGHT, FOCAL_PX = 320, 240, 300.0
RATE_HZ = 30
_TEXELS = 100.0  # of the texture for one length of the map
_TEXTURE_EDGE = 900


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaneRun:
    """A run, and what is true of it."""

    path: Path
    video: Path
    poses: list[Float64Array]  # cam_from_world (3, 4) of each frame
    keyframes: list[int]
    texture: Uint8Array  # (E, E, 3) RGB, of the plane z = 0
    draw: Callable[[int], Uint8Array]  # a frame of the video by its number

    def colors_at(self, points: Float64Array) -> Uint8Array:
        """The texture's colours (N, 3) at points (N, 3) of the plane."""
        texels = np.floor(points[:, :2] * _TEXELS + _TEXTURE_EDGE / 2).astype(int)
        return np.asarray(self.texture[texels[:, 1], texels[:, 0]], np.uint8)


def make_plane_run(
    folder: Path,
    *,
    num_frames: int = 25,
    every: int = 8,
    noise_rad: float = 0.0,
    change: Callable[[int, Uint8Array], Uint8Array] = lambda number, image: image,
) -> PlaneRun:
    """Makes a run that has ended, and its video.

    Args:
        folder: gets ``run`` and ``walk.mp4``.
        num_frames: of the video.
        every: how far keyframes are apart.
        noise_rad: by which the trajectory's frames between keyframes are turned wrongly.
        change: changes a frame by its number.
    """
    texture = _texture()
    poses = [_pose(number) for number in range(num_frames)]
    keyframes = list(range(0, num_frames, every))

    def draw(number: int) -> Uint8Array:
        return change(number, _view(texture, poses[number]))

    folder.mkdir(parents=True, exist_ok=True)
    video = write_video(folder / "walk.mp4", num_frames, size=(WIDTH, HEIGHT), draw=draw)
    run = folder / "run"
    model = _model(poses, keyframes)
    _write_images(run, video, keyframes)
    sparse = run / "snapshots" / "000001" / "sparse" / "0"
    sparse.mkdir(parents=True)
    model.write_binary(sparse)
    (run / "latest").symlink_to("snapshots/000001")
    _write_tables(run, video, poses, keyframes, noise_rad=noise_rad)
    return PlaneRun(
        path=run, video=video, poses=poses, keyframes=keyframes, texture=texture, draw=draw
    )


def frame_name(number: int) -> str:
    return f"{number:06d}.jpg"


def _texture() -> Uint8Array:
    """Colours with structure of many sizes (E, E, 3)."""
    numbers = np.random.default_rng(3)
    size = (_TEXTURE_EDGE, _TEXTURE_EDGE)
    sum_ = np.zeros((*size, 3))
    for cells in (12, 40, 120, 300):
        coarse = numbers.normal(0.0, 24.0, (cells, cells, 3))
        sum_ += cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(sum_ + 128, 0, 255), np.uint8)


def _pose(number: int) -> Float64Array:
    """Along the plane, turning a little, 3 lengths above it, so that z looks at the plane."""
    center = np.array([-1.0 + 0.06 * number, 0.2 * np.sin(0.2 * number), -3.0])
    rotation = rotation_from_vector(np.array([0.1 * np.sin(0.1 * number), 0.0, 0.01 * number]))
    return np.column_stack([rotation, -rotation @ center])


def _intrinsics() -> Float64Array:
    return np.array([[FOCAL_PX, 0, WIDTH / 2], [0, FOCAL_PX, HEIGHT / 2], [0, 0, 1.0]])


def _view(texture: Uint8Array, cam_from_world: Float64Array) -> Uint8Array:
    """The plane as a camera sees it; pixel centres are at halves in both."""
    pixels_from_plane = _intrinsics() @ cam_from_world[:, [0, 1, 3]]
    plane_from_texels = np.array(
        [
            [1 / _TEXELS, 0, -_TEXTURE_EDGE / 2 / _TEXELS],
            [0, 1 / _TEXELS, -_TEXTURE_EDGE / 2 / _TEXELS],
            [0, 0, 1],
        ]
    )
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    homography = np.linalg.inv(half) @ pixels_from_plane @ plane_from_texels @ half
    seen = cv2.warpPerspective(texture, homography, (WIDTH, HEIGHT), flags=cv2.INTER_AREA)
    return np.asarray(seen, np.uint8)


def _model(poses: list[Float64Array], keyframes: list[int]) -> pycolmap.Reconstruction:
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_RADIAL", FOCAL_PX, WIDTH, HEIGHT)
    model.add_camera_with_trivial_rig(camera)
    numbers = np.random.default_rng(1)
    points = np.column_stack([numbers.uniform(-2.5, 2.5, (1500, 2)), np.zeros(1500)])
    tracks: dict[int, pycolmap.Track] = {}
    for image_id, number in enumerate(keyframes, start=1):
        in_cam = points @ poses[number][:, :3].T + poses[number][:, 3]
        xy = np.asarray(camera.img_from_cam(in_cam))
        seen = np.flatnonzero(((xy > 8) & (xy < [WIDTH - 8, HEIGHT - 8])).all(axis=1))
        noisy = xy[seen] + numbers.normal(0.0, 0.3, (len(seen), 2))
        image = pycolmap.Image(frame_name(number), noisy, 1, image_id)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(poses[number]))
        for row, point in enumerate(seen.tolist()):
            tracks.setdefault(point, pycolmap.Track()).add_element(image_id, row)
    for point, track in tracks.items():
        if track.length() > 1:
            model.add_point3D(points[point], track, np.array([9, 99, 199], np.uint8))
    model.update_point_3d_errors()
    return model


def _write_images(run: Path, video: Path, keyframes: list[int]) -> None:
    import av

    (run / "images").mkdir(parents=True)
    with av.open(str(video)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in keyframes:
                pixels = frame.to_ndarray(format="bgr24")
                path = run / "images" / frame_name(number)
                cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])


def _write_tables(
    run: Path,
    video: Path,
    poses: list[Float64Array],
    keyframes: list[int],
    *,
    noise_rad: float,
) -> None:
    numbers = np.random.default_rng(2)
    rows = ["frame_id,source,index,name,captured_at_s,status,pose,map"]
    trajectory = ["# timestamp tx ty tz qx qy qz qw (world_from_cam)"]
    for number, pose in enumerate(poses):
        kind = "keyframe" if number in keyframes else "tracked"
        time_s = f"{number / RATE_HZ:.9f}".rstrip("0").rstrip(".")
        name = frame_name(number)
        rows.append(f"{number + 1},{video},{number},{name},{time_s},{kind},{kind},0")
        turn = np.eye(3)
        if kind == "tracked" and noise_rad:
            turn = rotation_from_vector(numbers.normal(0.0, noise_rad, 3))
        world_from_cam = invert_pose(turn @ pose)
        quat = quat_xyzw_from_rotation(world_from_cam[:, :3])
        line = " ".join(f"{value:.12g}" for value in (*world_from_cam[:, 3], *quat))
        trajectory.append(f"{time_s} {line}")
    (run / "frames.csv").write_text("\n".join(rows) + "\n")
    (run / "trajectory.txt").write_text("\n".join(trajectory) + "\n")
    (run / "config.yaml").write_text(dump_config(load_config()))
    write_opened(run, video, address=str(video))


def write_opened(
    run: Path, video: Path, *, address: str, is_live: bool = False, recording: str = ""
) -> None:
    """What the run's events say of its source."""
    event = SourceOpened(
        source=str(video),
        address=address,
        prefix="",
        is_live=is_live,
        fingerprint="",
        recording=recording,
    )
    record = {**event.as_record(), "at_s": 0.0}
    (run / "events.jsonl").write_text(json.dumps(record) + "\n")
