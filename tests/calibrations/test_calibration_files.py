"""Calibration files: what other programs write is read as the same camera; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest

from adapters.calibrations.calibration import Calibration
from adapters.calibrations.calibration_files import read_calibration_file
from engine.errors import ConfigError
from engine.types import Float64Array

WIDTH, HEIGHT = 960, 720
FX, FY, CX, CY = 512.3, 508.9, 471.2, 366.4  # in OpenCV's pixels
MATRIX = np.array([[FX, 0.0, CX], [0.0, FY, CY], [0.0, 0.0, 1.0]])
PINHOLE_TEXT = f"[{FX}, {FY}, {CX}, {CY}]"
HALF = 0.5  # from OpenCV's pixels to COLMAP's
SAME_PX = 1e-6


def rays() -> Float64Array:
    """Points (N, 3) in front of a camera, in all directions up to 50 degrees off its axis."""
    rng = np.random.default_rng(3)
    slopes = rng.uniform(-0.8, 0.8, (200, 2))
    return np.column_stack([slopes, np.ones(200)]) * rng.uniform(0.5, 3.0, (200, 1))


def projected(calibration: Calibration, points: Float64Array | None = None) -> Float64Array:
    return np.asarray(calibration.camera().img_from_cam(rays() if points is None else points))


def by_opencv(*coeffs: float) -> Float64Array:
    xy, _ = cv2.projectPoints(rays(), np.zeros(3), np.zeros(3), MATRIX, np.array(coeffs))
    return np.asarray(xy.reshape(-1, 2) + HALF, np.float64)


def by_opencv_fisheye(*coeffs: float) -> Float64Array:
    points = rays()[:, None]
    xy, _ = cv2.fisheye.projectPoints(points, np.zeros(3), np.zeros(3), MATRIX, np.array(coeffs))
    return np.asarray(xy.reshape(-1, 2) + HALF, np.float64)


def write_opencv(path: Path, /, **fields: Any) -> Path:
    storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    for name, value in fields.items():
        storage.write(name, value)
    storage.release()
    return path


def opencv_file(tmp_path: Path, *coeffs: float, **fields: Any) -> Path:
    whole = {
        "image_width": WIDTH,
        "image_height": HEIGHT,
        "camera_matrix": MATRIX,
        "distortion_coefficients": np.array([coeffs]),
        **fields,
    }
    return write_opencv(tmp_path / "camera.yml", **whole)


def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "camera.any"
    path.write_text(text, encoding="utf-8")
    return path


def read_one(path: Path) -> Calibration:
    (calibration,) = read_calibration_file(path)
    return calibration


def kalibr_text(**fields: str) -> str:
    whole = {
        "camera_model": "pinhole",
        "intrinsics": PINHOLE_TEXT,
        "distortion_model": "none",
        "distortion_coeffs": "[]",
        "resolution": f"[{WIDTH}, {HEIGHT}]",
        "rostopic": "/cam0/image_raw",
        **fields,
    }
    return "cam0:\n" + "".join(f"  {name}: {value}\n" for name, value in whole.items())


# -- the same camera ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coeffs", "model"),
    [
        ((-0.21, 0.05, 0.001, -0.002), "OPENCV"),
        ((-0.21, 0.05, 0.001, -0.002, 0.0), "OPENCV"),
        ((-0.21, 0.05, 0.001, -0.002, 0.013), "FULL_OPENCV"),
        ((0.4, 0.1, 0.001, -0.002, 0.01, 0.6, 0.2, 0.02), "FULL_OPENCV"),
        ((-0.2, 0.05, 0.001, -0.002, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), "FULL_OPENCV"),
    ],
)
def test_opencv_projects_as_the_camera_read_from_its_file(
    coeffs: tuple[float, ...], model: str, tmp_path: Path
) -> None:
    calibration = read_one(opencv_file(tmp_path, *coeffs))
    assert (calibration.model, calibration.width, calibration.height) == (model, WIDTH, HEIGHT)
    assert np.abs(projected(calibration) - by_opencv(*coeffs)).max() < SAME_PX


@pytest.mark.parametrize(
    "fields",
    [
        {"distortion_model": "fisheye"},
        {"distortion_model": "equidistant"},
        {"fisheye_model": 1},
        {"fisheye": "true"},
        {"camera_model": "OPENCV_FISHEYE"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_opencv_fisheye_projects_as_the_camera_read_from_its_file(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    coeffs = (-0.012, 0.004, -0.002, 0.0003)
    calibration = read_one(opencv_file(tmp_path, *coeffs, **fields))
    assert calibration.model == "OPENCV_FISHEYE"
    assert np.abs(projected(calibration) - by_opencv_fisheye(*coeffs)).max() < SAME_PX


def test_other_spellings_of_opencv_files_are_read(tmp_path: Path) -> None:
    coeffs = (-0.21, 0.05, 0.001, -0.002, 0.0)
    camel = write_opencv(
        tmp_path / "camel.yml",
        cameraMatrix=MATRIX,
        distCoeffs=np.array(coeffs),
        imageSize=np.array([WIDTH, HEIGHT]),
    )
    short = write_opencv(
        tmp_path / "short.yml",
        K=MATRIX,
        D=np.array([coeffs]).T,
        image_width=WIDTH,
        image_height=HEIGHT,
    )
    old = text_file(
        tmp_path,
        f"%YAML:1.0\n---\nimage_width: {WIDTH}\nimage_height: {HEIGHT}\n"
        "camera_matrix: !!opencv-matrix\n   rows: 3\n   cols: 3\n   dt: d\n"
        f"   data: [ {FX}, 0., {CX}, 0., {FY}, {CY}, 0., 0., 1. ]\n"
        f"dist_coeffs: !!opencv-matrix\n   rows: 1\n   cols: 5\n   dt: d\n"
        f"   data: {list(coeffs)}\n",
    )
    for path in (camel, short, old):
        assert np.abs(projected(read_one(path)) - by_opencv(*coeffs)).max() < SAME_PX


def test_camera_info_of_ros_is_read(tmp_path: Path) -> None:
    def camera_info(model: str, coeffs: list[float]) -> Path:
        return text_file(
            tmp_path,
            f"image_width: {WIDTH}\nimage_height: {HEIGHT}\ncamera_name: front\n"
            f"camera_matrix:\n  rows: 3\n  cols: 3\n  data: {MATRIX.ravel().tolist()}\n"
            f"distortion_model: {model}\n"
            f"distortion_coefficients:\n  rows: 1\n  cols: {len(coeffs)}\n  data: {coeffs}\n"
            "rectification_matrix:\n  rows: 3\n  cols: 3\n  data: [1, 0, 0, 0, 1, 0, 0, 0, 1]\n",
        )

    perspective = [-0.21, 0.05, 0.001, -0.002, 0.013]
    front = read_one(camera_info("plumb_bob", perspective))
    assert front.name == "front"
    assert np.abs(projected(front) - by_opencv(*perspective)).max() < SAME_PX
    fisheye = [-0.012, 0.004, -0.002, 0.0003]
    wide = read_one(camera_info("equidistant", fisheye))
    assert np.abs(projected(wide) - by_opencv_fisheye(*fisheye)).max() < SAME_PX


def test_a_calibration_without_distortion_is_a_pinhole(tmp_path: Path) -> None:
    text = f"width: {WIDTH}\nheight: {HEIGHT}\nK: {MATRIX.ravel().tolist()}\n"
    calibration = read_one(text_file(tmp_path, text))
    assert calibration.model == "PINHOLE"
    assert np.abs(projected(calibration) - by_opencv()).max() < SAME_PX


def test_kalibr_pinholes_project_as_opencv_does(tmp_path: Path) -> None:
    coeffs = (-0.21, 0.05, 0.001, -0.002)
    text = kalibr_text(distortion_model="radtan", distortion_coeffs=str(list(coeffs)))
    radtan = read_one(text_file(tmp_path, text))
    assert (radtan.model, radtan.name) == ("OPENCV", "cam0")
    assert np.abs(projected(radtan) - by_opencv(*coeffs)).max() < SAME_PX
    coeffs = (-0.012, 0.004, -0.002, 0.0003)
    text = kalibr_text(distortion_model="equidistant", distortion_coeffs=str(list(coeffs)))
    equidistant = read_one(text_file(tmp_path, text))
    assert equidistant.model == "OPENCV_FISHEYE"
    assert np.abs(projected(equidistant) - by_opencv_fisheye(*coeffs)).max() < SAME_PX
    none = read_one(text_file(tmp_path, kalibr_text()))
    assert np.abs(projected(none) - by_opencv()).max() < SAME_PX


def test_kalibr_fov_is_colmaps(tmp_path: Path) -> None:
    omega = 0.9
    text = kalibr_text(distortion_model="fov", distortion_coeffs=f"[{omega}]")
    x, y = (rays()[:, :2] / rays()[:, 2:]).T
    radius = np.hypot(x, y)
    factor = np.arctan(2.0 * radius * np.tan(omega / 2.0)) / (omega * radius)
    expected = np.column_stack([FX * factor * x + CX, FY * factor * y + CY]) + HALF
    assert np.abs(projected(read_one(text_file(tmp_path, text))) - expected).max() < SAME_PX


def unified(alpha: float, beta: float) -> Float64Array:
    """Khomutenko et al., 2016."""
    x, y, z = rays().T
    depth = alpha * np.sqrt(beta * (x * x + y * y) + z * z) + (1.0 - alpha) * z
    return np.column_stack([FX * x / depth + CX, FY * y / depth + CY]) + HALF


def mirrored(xi: float) -> Float64Array:
    """Mei and Rives, 2007."""
    x, y, z = rays().T
    depth = z + xi * np.sqrt(x * x + y * y + z * z)
    return np.column_stack([FX * x / depth + CX, FY * y / depth + CY]) + HALF


def test_kalibr_unified_cameras_are_colmaps_eucm(tmp_path: Path) -> None:
    def read(model: str, *params: float) -> Float64Array:
        text = kalibr_text(camera_model=model, intrinsics=str([*params, FX, FY, CX, CY]))
        return projected(read_one(text_file(tmp_path, text)))

    assert np.abs(read("eucm", 0.57, 1.1) - unified(0.57, 1.1)).max() < SAME_PX
    assert np.abs(read("omni", 1.3) - mirrored(1.3)).max() < SAME_PX
    assert np.abs(read("ds", 0.0, 0.57) - unified(0.57, 1.0)).max() < SAME_PX


@pytest.mark.parametrize("model", sorted(set(pycolmap.CameraModelId.__members__) - {"INVALID"}))
def test_every_camera_of_colmap_is_read_as_colmap_writes_it(model: str, tmp_path: Path) -> None:
    reconstruction = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(7, model, 500.25, WIDTH, HEIGHT)
    if model != "EQUIRECTANGULAR":
        camera.params = [param + 0.001 * i for i, param in enumerate(camera.params)]
    reconstruction.add_camera_with_trivial_rig(camera)
    reconstruction.write_text(tmp_path)
    calibration = read_one(tmp_path / "cameras.txt")
    assert (calibration.model, calibration.name) == (model, "7")
    expected = np.asarray(camera.img_from_cam(rays()))
    assert np.abs(projected(calibration) - expected).max() < SAME_PX


def test_several_cameras_of_a_file_are_named(tmp_path: Path) -> None:
    lines = "# ID MODEL ...\n1 PINHOLE 960 720 500 500 480 360\n\n2 SIMPLE_PINHOLE 80 60 40 40 30\n"
    first, second = read_calibration_file(text_file(tmp_path, lines))
    assert (first.name, second.name) == ("1", "2")
    assert second.origin.endswith("camera.any#2")
    chain = kalibr_text() + kalibr_text().replace("cam0:", "cam1:", 1)
    assert [c.name for c in read_calibration_file(text_file(tmp_path, chain))] == ["cam0", "cam1"]


# -- sizes and turns ------------------------------------------------------------------------------


def calibration_of(model: str, width: int = WIDTH, height: int = HEIGHT) -> Calibration:
    """A camera with all its parameters at work."""
    camera = pycolmap.Camera.create_from_model_name(1, model, 500.0, width, height)
    names = [name.strip() for name in camera.params_info.split(",")]
    rng = np.random.default_rng(len(names))
    params = dict(zip(names, camera.params.tolist(), strict=True))
    for name in set(names) - {"w", "h"}:
        scale = 20.0 if name[0] in "fc" else 0.01
        params[name] += rng.uniform(-scale, scale)
    return Calibration(
        origin="file",
        name="",
        model=model,
        width=width,
        height=height,
        params=tuple(params.values()),
    )


@pytest.mark.parametrize("model", sorted(set(pycolmap.CameraModelId.__members__) - {"INVALID"}))
def test_a_turned_calibration_sees_turned_rays_at_turned_pixels(model: str) -> None:
    calibration = calibration_of(model)
    if model == "EQUIRECTANGULAR":
        assert calibration.turned(2).params == calibration.params
        return
    turned_rays = rays() @ np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    x, y = projected(calibration).T
    turned = calibration.turned(1)
    assert (turned.width, turned.height) == (HEIGHT, WIDTH)
    expected = np.column_stack([HEIGHT - y, x])
    assert np.abs(projected(turned, turned_rays) - expected).max() < SAME_PX
    assert np.allclose(calibration.turned(4).params, calibration.params)
    assert np.allclose(calibration.turned(3).turned(1).params, calibration.params)


def test_a_resized_calibration_sees_the_same_rays_at_resized_pixels() -> None:
    calibration = calibration_of("FULL_OPENCV")
    half = calibration.scaled_to(480, 361)  # rounded up
    expected = projected(calibration) * (480 / WIDTH, 361 / HEIGHT)
    assert np.abs(projected(half) - expected).max() < SAME_PX


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((960, 720), True),
        ((480, 360), True),
        ((1000, 750), True),
        ((853, 640), True),  # 853.3
        ((4000, 3000), True),
        ((960, 721), True),
        ((960, 724), False),
        ((1280, 720), False),
        ((720, 960), False),
        ((4000, 2992), False),
    ],
)
def test_only_images_resized_as_a_whole_fit(size: tuple[int, int], fits: bool) -> None:
    assert calibration_of("PINHOLE").fits(*size) is fits


# -- what is refused ------------------------------------------------------------------------------


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcd", "bcde", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("some words", "no calibration"),
        ("answer: 42\n", "no calibration"),
        ("- 1\n- 2\n", "no calibration"),
        ("camera_matrix: [1, 2\n", "not readable YAML"),
        ("[" * 2_000, "not readable YAML"),
        (BOMB, "aliases are refused"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        (f"width: {'9' * 5000}\n", "not readable YAML"),
        ("1 OPENCV 960\n", "no width and height"),
        ("1 PINHOLE 960.5 720 1 1 1 1\n", "no width and height"),
        ("1 NOPE 960 720 500 480 360\n", "no camera model NOPE"),
        ("1 PINHOLE 960 720 500 480 360\n", "4 parameters (fx, fy, cx, cy), 3 given"),
        ("1 PINHOLE 960 720 500 nan 480 360\n", "fy is nan"),
        ("1 PINHOLE 960 720 inf 500 480 360\n", "fx is inf"),
        ("1 PINHOLE 960 720 500 -500 480 360\n", "focal length fy is -500"),
        ("1 PINHOLE 960 0 500 500 480 360\n", "960 x 0 px"),
        ("1 PINHOLE 960 720 500 500 480 x\n", "no number"),
        ("1 PINHOLE 960 720 500 500 480 360\nwords\n", "'words' is no camera"),
        (kalibr_text(camera_model="ds", intrinsics="[-0.2, 0.5, 1, 1, 1, 1]"), "double sphere"),
        (kalibr_text(camera_model="omni", intrinsics="[-1, 1, 1, 1, 1]"), "xi of 0 or more"),
        (kalibr_text(camera_model="eucm"), "eucm has 6 intrinsics, 4 given"),
        (kalibr_text(camera_model="cylinder"), "camera_model cylinder is not known"),
        (kalibr_text(distortion_model="swirl"), "distortion_model swirl is not known"),
        (kalibr_text(distortion_model="radtan"), "4 distortion_coeffs, 0 given"),
        (kalibr_text(resolution="[960]"), "resolution"),
        (kalibr_text(resolution="[960, wide]"), "'wide'"),
        (kalibr_text(intrinsics="[500, .nan, 480, 360]"), "fy is nan"),
        (
            kalibr_text(
                camera_model="omni",
                intrinsics="[1, 500, 500, 480, 360]",
                distortion_model="radtan",
                distortion_coeffs="[0.1, 0, 0, 0]",
            ),
            "no equal of omni with radtan",
        ),
    ],
)
def test_what_is_no_calibration_is_refused_with_the_file_and_the_reason(
    text: str, words: str, tmp_path: Path
) -> None:
    path = text_file(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)) as refused:
        read_calibration_file(path)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"camera_matrix": np.eye(3)[:2]}, "6 numbers, not 3 x 3"),
        ({"camera_matrix": np.full((3, 3), np.nan)}, "no finite number"),
        ({"camera_matrix": MATRIX + np.eye(3, k=1)}, "skew"),
        ({"camera_matrix": MATRIX.T}, "is not [fx 0 cx; 0 fy cy; 0 0 1]"),
        ({"camera_matrix": np.diag([0.0, 0.0, 1.0])}, "focal length fx is 0"),
        ({"distortion_coefficients": np.zeros(3)}, "3 distortion coefficients"),
        ({"distortion_coefficients": np.array([0.1, np.inf, 0, 0])}, "k2 is inf"),
        ({"distortion_coefficients": np.array([0.1] * 12)}, "thin prism"),
        ({"distortion_model": "fisheye", "distortion_coefficients": np.zeros(5)}, "has 4"),
        ({"distortion_model": "swirl"}, "lens model swirl is not known"),
        ({"image_width": 0}, "0 x 720 px"),
        ({"image_width": -960}, "-960 x 720 px"),
        ({"image_width": 960.5}, "no whole number"),
    ],
)
def test_opencv_files_that_hold_no_camera_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = opencv_file(tmp_path, 0.1, 0.0, 0.0, 0.0, **fields)
    with pytest.raises(ConfigError, match=str(path)) as refused:
        read_calibration_file(path)
    assert words in str(refused.value)


def test_opencv_files_must_say_their_size_and_their_lens(tmp_path: Path) -> None:
    sizeless = write_opencv(tmp_path / "a.yml", camera_matrix=MATRIX, dist_coeffs=np.zeros(5))
    with pytest.raises(ConfigError, match="add image_width and image_height"):
        read_calibration_file(sizeless)
    either = write_opencv(
        tmp_path / "b.yml", K=MATRIX, D=np.zeros(4), image_width=WIDTH, image_height=HEIGHT
    )
    with pytest.raises(ConfigError, match="add distortion_model"):
        read_calibration_file(either)


def test_a_matrix_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    whole = opencv_file(tmp_path, 0.1, 0.0, 0.0, 0.0).read_text(encoding="utf-8")
    for length in range(0, len(whole) - 30, 7):  # the last coefficients can be cut unnoticed
        with pytest.raises(ConfigError):
            read_calibration_file(text_file(tmp_path, whole[:length]))


def test_folders_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        read_calibration_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_calibration_file(tmp_path / "missing.yml")
    path = tmp_path / "file"
    for data, words in ((b"\xff\xd8\xff\xe0", "no text"), (b"fx\0", "no text")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=words):
            read_calibration_file(path)
    path.write_bytes(b"# " * 600_000)
    with pytest.raises(ConfigError, match="too large"):
        read_calibration_file(path)
