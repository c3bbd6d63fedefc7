"""Which calibration goes to which camera of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapters.calibrations.by_camera import CalibrationsByCamera
from engine.errors import ConfigError
from engine.types import CalibrationOrigin, Frame, FrameId, IntrinsicsPrior

LANDSCAPE = (960, 720)
PINHOLE = "1 PINHOLE 960 720 500 510 470 366\n"
OTHER = "1 PINHOLE 960 720 600 610 470 366\n"
CENTRED = "1 SIMPLE_RADIAL 960 720 500 480 360 -0.1\n"


def frame_of(
    camera_key: str = "960x720",
    *,
    source: str = "flights/north",
    size: tuple[int, int] = LANDSCAPE,
    quarter_turns: int = 0,
    prior: IntrinsicsPrior | None = None,
) -> Frame:
    return Frame(
        frame_id=FrameId(1),
        camera_key=camera_key,
        source=source,
        index=0,
        name="a.jpg",
        captured_at_s=0.0,
        received_at_s=0.0,
        pixels=np.zeros((size[1], size[0], 3), np.uint8),
        intrinsics_prior=prior,
        quarter_turns=quarter_turns,
    )


def file_of(tmp_path: Path, text: str = PINHOLE, *, name: str = "camera.txt") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def params_of(calibrations: CalibrationsByCamera, frame: Frame) -> tuple[float, ...]:
    prior = calibrations.calibrated(frame).intrinsics_prior
    assert prior is not None
    assert prior.params is not None
    return prior.params


def focal_px_of(calibrations: CalibrationsByCamera, frame: Frame) -> float:
    prior = calibrations.calibrated(frame).intrinsics_prior
    return 0.0 if prior is None else prior.focal_px


# -- which camera ---------------------------------------------------------------------------------


def test_a_file_without_a_pattern_is_for_every_camera_of_its_shape(tmp_path: Path) -> None:
    calibrations = CalibrationsByCamera.read([str(file_of(tmp_path))])
    prior = calibrations.calibrated(frame_of(prior=IntrinsicsPrior(focal_px=9.0))).intrinsics_prior
    assert prior is not None
    assert (prior.camera_model, prior.origin) == ("PINHOLE", CalibrationOrigin.FILE)
    assert prior.params == (500.0, 510.0, 470.0, 366.0)
    assert prior.focal_px == 505.0
    assert params_of(calibrations, frame_of("b", size=(480, 360))) == (250.0, 255.0, 235.0, 183.0)
    wide = frame_of("c", size=(1280, 720))
    assert calibrations.calibrated(wide) is wide
    assert calibrations.take_warnings() == []
    assert calibrations.unused() == []


@pytest.mark.parametrize(
    "pattern",
    ["960x720", "*HERO11*", "*hero11*", "left", "left|*", "flights/north", "north", "*north*"],
)
def test_a_pattern_names_a_camera_by_its_key_or_its_source(pattern: str, tmp_path: Path) -> None:
    calibrations = CalibrationsByCamera.read([f"{pattern}={file_of(tmp_path)}"])
    named = frame_of("left|GoPro HERO11 Black|960x720")
    assert focal_px_of(calibrations, named) == 505.0
    assert calibrations.unused() == []


@pytest.mark.parametrize("pattern", ["HERO11", "right", "flights", "nort"])
def test_a_pattern_must_match_a_whole_name(pattern: str, tmp_path: Path) -> None:
    spec = f"{pattern}={file_of(tmp_path)}"
    calibrations = CalibrationsByCamera.read([spec])
    other = frame_of("left|GoPro HERO11 Black|960x720")
    assert calibrations.calibrated(other) is other
    assert calibrations.take_warnings() == []
    (words,) = calibrations.unused()
    assert spec in words
    assert f"none is called {pattern}" in words
    assert "left|GoPro HERO11 Black|960x720 (960 x 720)" in words


def test_patterns_win_over_shapes_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first, second = file_of(tmp_path), file_of(tmp_path, OTHER, name="other.txt")
    both = CalibrationsByCamera.read([f"left={first}", str(second)])
    assert focal_px_of(both, frame_of("left|960x720")) == 505.0
    assert focal_px_of(both, frame_of("right|960x720")) == 605.0
    later = CalibrationsByCamera.read([f"*={first}", f"left*={second}"])
    assert focal_px_of(later, frame_of("left|960x720")) == 605.0
    assert focal_px_of(later, frame_of("right|960x720")) == 505.0


def test_files_and_patterns_may_hold_equals_signs_and_hashes(tmp_path: Path) -> None:
    odd = file_of(tmp_path, name="f=1#2.txt")
    for spec in (str(odd), f"*={odd}", f"*?a=1*={odd}"):
        calibrations = CalibrationsByCamera.read([spec])
        assert focal_px_of(calibrations, frame_of(source="rtsp://host?a=1&b=2")) == 505.0


# -- several cameras in a file --------------------------------------------------------------------


def test_of_several_cameras_the_one_named_the_exact_one_or_the_fitting_one_is_taken(
    tmp_path: Path,
) -> None:
    several = file_of(
        tmp_path,
        "1 PINHOLE 1920 1440 1 1 1 1\n2 PINHOLE 960 720 2 2 2 2\n3 PINHOLE 640 360 3 3 3 3\n",
    )
    by_shape = CalibrationsByCamera.read([str(several)])
    assert focal_px_of(by_shape, frame_of()) == 2.0
    assert focal_px_of(by_shape, frame_of("wide", size=(1280, 720))) == 6.0
    named = CalibrationsByCamera.read([f"*={several}#1"])
    assert focal_px_of(named, frame_of()) == 0.5
    with pytest.raises(ConfigError, match="holds no camera 4, but 1, 2, 3"):
        CalibrationsByCamera.read([f"{several}#4"])


def test_of_equal_sizes_the_one_named_as_the_camera_is_taken_or_none(tmp_path: Path) -> None:
    chain = file_of(
        tmp_path,
        "".join(
            f"cam{i}:\n  camera_model: pinhole\n  intrinsics: [{500 + i}, {500 + i}, 480, 360]\n"
            "  distortion_model: none\n  resolution: [960, 720]\n"
            for i in range(2)
        ),
    )
    calibrations = CalibrationsByCamera.read([str(chain)])
    assert focal_px_of(calibrations, frame_of("cam1|960x720")) == 501.0
    other = frame_of("left|960x720")
    assert calibrations.calibrated(other) is other
    assert calibrations.calibrated(other) is other
    (words,) = calibrations.take_warnings()
    assert "left|960x720" in words
    assert "cam0, cam1" in words
    assert calibrations.take_warnings() == []


# -- other sizes and turned photos ----------------------------------------------------------------


def test_a_named_camera_of_another_shape_is_not_calibrated_and_both_sizes_are_said(
    tmp_path: Path,
) -> None:
    calibrations = CalibrationsByCamera.read([f"*={file_of(tmp_path)}"])
    wide = frame_of("wide", size=(1280, 720))
    assert calibrations.calibrated(wide) is wide
    (words,) = calibrations.take_warnings()
    assert "960 x 720" in words
    assert "1280 x 720" in words
    assert calibrations.unused() == []


def test_calibrations_that_no_image_can_be_of_are_known_before_the_run(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    calibrations = CalibrationsByCamera.read([str(path)])
    assert calibrations.misfits([(1280, 720), (480, 360)]) == []
    assert calibrations.misfits([(720, 960)]) == []
    assert calibrations.misfits([]) == []
    (words,) = calibrations.misfits([(1280, 720)])
    assert all(part in words for part in (str(path), "960 x 720", "1280 x 720"))


@pytest.mark.parametrize(
    ("quarter_turns", "params"),
    [
        (1, (510.0, 500.0, 720 - 366.0, 470.0)),
        (2, (500.0, 510.0, 960 - 470.0, 720 - 366.0)),
        (3, (510.0, 500.0, 366.0, 960 - 470.0)),
    ],
)
def test_photos_turned_upright_have_the_calibration_turned_and_a_camera_of_their_own(
    quarter_turns: int, params: tuple[float, ...], tmp_path: Path
) -> None:
    calibrations = CalibrationsByCamera.read([str(file_of(tmp_path))])
    size = (720, 960) if quarter_turns % 2 else LANDSCAPE
    frame = calibrations.calibrated(frame_of(size=size, quarter_turns=quarter_turns))
    assert frame.intrinsics_prior is not None
    assert frame.intrinsics_prior.params == params
    assert frame.camera_key == f"960x720|turned {90 * quarter_turns}"


def test_a_calibration_of_upright_images_is_not_turned(tmp_path: Path) -> None:
    upright = file_of(tmp_path, "1 PINHOLE 720 960 500 510 366 470\n")
    calibrations = CalibrationsByCamera.read([str(upright)])
    turned = frame_of(size=(720, 960), quarter_turns=1)
    assert params_of(calibrations, turned) == (500.0, 510.0, 366.0, 470.0)
    assert calibrations.calibrated(turned).camera_key == turned.camera_key


def test_images_that_lie_on_their_side_are_calibrated_only_where_the_side_does_not_matter(
    tmp_path: Path,
) -> None:
    lying = frame_of("lying", size=(720, 960))
    centred = CalibrationsByCamera.read([str(file_of(tmp_path, CENTRED))])
    assert params_of(centred, lying) == (500.0, 360.0, 480.0, -0.1)
    for pattern in ("", "lying="):
        off_centre = CalibrationsByCamera.read([f"{pattern}{file_of(tmp_path)}"])
        assert off_centre.calibrated(lying) is lying
        words = off_centre.take_warnings() + off_centre.unused()
        assert len(words) == 1
        assert "960 x 720" in words[0]
        assert "720 x 960" in words[0]


def test_files_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    for spec in (f"{tmp_path}/no.yml", f"left={tmp_path}/no.yml", f"left={tmp_path}/no.yml#1"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/no.yml: cannot be read"):
            CalibrationsByCamera.read([spec])
