"""Whose word counts for a camera's first calibration, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycolmap
import pytest
from engine.mapping.initial_camera import (
    CalibrationOrigin,
    InitialCamera,
    initial_camera,
    with_focal_length,
)

from engine.config import CamerasConfig
from engine.errors import MapError
from engine.types import Features, FrameId, IntrinsicsPrior, Keyframe

WIDTH, HEIGHT = 640, 480
KNOWN = IntrinsicsPrior(focal_px=500.0, camera_model="PINHOLE", params=(500.0, 501.0, 322.0, 239.0))
EXIF = IntrinsicsPrior(focal_px=600.0)


def keyframe(prior: IntrinsicsPrior | None, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Keyframe:
    features = Features(
        frame_id=FrameId(1),
        keypoints_xy=np.empty((0, 2)),
        descriptors=np.empty((0, 128), np.uint8),
        scales=np.empty(0, np.float32),
        colors=np.empty((0, 3), np.uint8),
    )
    return Keyframe(
        frame_id=FrameId(1),
        camera_key="camera",
        index=0,
        name="000001.jpg",
        width=size[0],
        height=size[1],
        captured_at_s=0.0,
        received_at_s=0.0,
        features=features,
        intrinsics_prior=prior,
    )


def initial(prior: IntrinsicsPrior | None, **settings: Any) -> InitialCamera:
    return initial_camera(keyframe(prior), CamerasConfig(**settings))


def test_without_any_word_the_focal_length_is_assumed_from_the_longer_edge() -> None:
    for size in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
        assumed = initial_camera(
            keyframe(None, size=size), CamerasConfig(model="SIMPLE_RADIAL", default_focal_ratio=0.9)
        )
        assert assumed.origin is CalibrationOrigin.ASSUMED
        assert not assumed.camera.has_prior_focal_length
        assert assumed.camera.model_name == "SIMPLE_RADIAL"
        assert assumed.camera.params.tolist() == [576.0, size[0] / 2, size[1] / 2, 0.0]
        assert (assumed.camera.width, assumed.camera.height) == size


def test_exif_gives_the_focal_length_of_the_configured_model() -> None:
    from_exif = initial(EXIF, model="OPENCV")
    assert from_exif.origin is CalibrationOrigin.EXIF
    assert from_exif.camera.has_prior_focal_length
    assert from_exif.camera.params.tolist() == [600.0, 600.0, 320.0, 240.0, 0.0, 0.0, 0.0, 0.0]
    assert not from_exif.is_constant


def test_a_configured_focal_length_wins_over_exif_but_not_over_a_whole_calibration() -> None:
    assert initial(EXIF, focal_px=700.0).camera.mean_focal_length() == 700.0
    assert initial(EXIF, focal_px=700.0).origin is CalibrationOrigin.CONFIGURED
    assert initial(KNOWN, focal_px=700.0).camera.params.tolist() == list(KNOWN.params or ())


def test_a_source_that_knows_everything_is_believed_and_left_alone() -> None:
    known = initial(KNOWN, model="SIMPLE_RADIAL")
    assert known.origin is CalibrationOrigin.KNOWN
    assert known.is_constant
    assert known.camera.has_prior_focal_length
    assert known.camera.model_name == "PINHOLE"
    assert known.camera.params.tolist() == [500.0, 501.0, 322.0, 239.0]


def test_a_configured_calibration_wins_over_everything() -> None:
    params = (510.0, 511.0, 320.0, 240.0)
    configured = initial(KNOWN, model="PINHOLE", params=params)
    assert configured.origin is CalibrationOrigin.CONFIGURED
    assert configured.camera.params.tolist() == list(params)
    assert configured.camera.has_prior_focal_length
    assert not configured.is_constant


@pytest.mark.parametrize("prior", [None, EXIF, KNOWN])
def test_fixed_intrinsics_are_fixed_whoever_gave_them(prior: IntrinsicsPrior | None) -> None:
    assert initial(prior, intrinsics="fixed").is_constant
    assert not initial(prior, refine_known_intrinsics=True).is_constant


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("PINHOLE", (500.0, 320.0, 240.0)),
        ("PINHOLE", ()),
        ("SIMPLE_RADIAL", (500.0, 320.0, 240.0, 0.0, 0.0)),
        ("FISHY", (500.0, 320.0, 240.0)),
        ("INVALID", (500.0,)),
    ],
)
def test_a_calibration_that_does_not_fit_its_model_is_refused(
    model: str, params: tuple[float, ...]
) -> None:
    prior = IntrinsicsPrior(focal_px=500.0, camera_model=model, params=params)
    with pytest.raises(MapError, match=f"000001.jpg: .*{model}"):
        initial(prior)


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "OPENCV"])
def test_another_focal_length_leaves_a_centred_camera_without_distortion(model: str) -> None:
    camera = pycolmap.Camera.create_from_model_name(1, model, 500.0, WIDTH, HEIGHT)
    camera.params = [value + 0.1 for value in camera.params]
    before = camera.params.tolist()
    params = with_focal_length(camera, 800.0)

    assert camera.params.tolist() == before
    camera.params = params
    assert camera.mean_focal_length() == 800.0
    pixels_xy = np.array([[WIDTH / 2, HEIGHT / 2], [WIDTH / 2 + 400.0, HEIGHT / 2]])
    assert np.allclose(camera.cam_from_img(pixels_xy), [[0.0, 0.0], [0.5, 0.0]])
