"""Windows solved by upstream's VGGSfM: what it is asked, what is made of its answers, and refusals.

Upstream is not part of this project: a small package with its documented interface stands in.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pdb
import pickle
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from adapters.launch import LaunchOptions, _window_solver
from adapters.views.view_mode import ViewMode
from adapters.windows import vggsfm_package
from adapters.windows.vggsfm import VggsfmWindowSolver, cameras_of, open_vggsfm
from adapters.windows.vggsfm_colmap import FormerPycolmap, NoStandInError
from adapters.windows.vggsfm_package import load_vggsfm
from adapters.windows.vggsfm_predictor import FolderImages, PredictedCameras, load_predictor
from adapters.windows.vggsfm_window import Refusal
from engine.config import Config, WindowConfig
from engine.errors import ConfigError
from engine.geometry import camera_center, compose_poses
from engine.ports import WindowSolver
from engine.types import BoolArray, Float64Array
from engine.window_types import WindowEstimate, WindowProblem, WindowStatus
from engine.windows.model import WindowSolverConfig
from engine.windows.solver import solve_window
from tests.support.paths import ROOT
from tests.support.synthetic import FakeMatcher, SyntheticWorld, straight_path
from tests.support.vggsfm_fake import BACKBONE, FILES, write_files
from tests.support.window_scenes import (
    FOCAL_PX,
    HEIGHT,
    WIDTH,
    WindowScene,
    arc_scene,
    turning_scene,
)

OWN_PACKAGES = {"vggsfm", "minipytorch3d"}
KNOWN = np.array([FOCAL_PX])
CALIBRATED = np.array([True])
SCALE = 1024.0 / WIDTH  # of the square upstream sees, to px

native = functools.partial(solve_window, config=WindowSolverConfig())


def loaded_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in OWN_PACKAGES]


@pytest.fixture(autouse=True)
def nothing_loaded_before() -> Iterator[None]:
    """Every test begins and ends without upstream's modules."""
    search_path = list(sys.path)
    for name in loaded_modules():
        del sys.modules[name]
    yield
    for name in loaded_modules():
        del sys.modules[name]
    sys.path[:] = search_path
    importlib.invalidate_caches()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_files(tmp_path / "checkout", FILES)


@pytest.fixture
def solver(checkout: Path) -> WindowSolver:
    return open_vggsfm(config_of(checkout), first_solver=native)


def config_of(root: Path, **changes: Any) -> WindowConfig:
    return WindowConfig(solver="vggsfm", vggsfm_root=str(root), **changes)


def question() -> dict[str, Any]:
    """What upstream was asked last."""
    asked: dict[str, Any] = sys.modules["vggsfm.models.triangulator"].QUESTIONS[-1]
    return asked


def fail_with(failure: object) -> None:
    sys.modules["vggsfm.models.triangulator"].FAILURES.append(failure)


def held(*frames: int, num_frames: int = 8) -> BoolArray:
    is_held = np.zeros(num_frames, np.bool_)
    is_held[list(frames)] = True
    return is_held


def rough(scene: WindowScene) -> Float64Array:
    return scene.rough_poses(angle_deg=2.0, shift_ratio=0.02)


def assert_solved(estimate: WindowEstimate, scene: WindowScene, *, tolerance: float = 1e-4) -> None:
    assert estimate.status is WindowStatus.SOLVED, estimate.reason
    assert estimate.is_valid.all()
    assert scene.centre_errors(estimate).max() < tolerance


def assert_refused(estimate: WindowEstimate, status: WindowStatus, *words: str) -> None:
    assert estimate.status is status, estimate.reason
    for word in words:
        assert word in estimate.reason
    assert not estimate.is_valid.any()
    assert not estimate.is_inlier.any()
    assert not estimate.cam_from_world.any()
    assert estimate.num_points == 0


# -- what upstream is asked -----------------------------------------------------------------------


def test_tracks_reach_upstream_as_pixels_of_its_square_and_nothing_is_infinite(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    solver(scene.problem(cam_from_world=scene.poses, focal_px=KNOWN))
    asked = question()
    assert np.isfinite(asked["tracks"]).all()
    assert asked["image_shape"] == (1, 8, 3, 1024, 1024)
    assert not asked["extract_color"]
    long = scene.is_visible.sum(axis=0) >= 3
    order = frame_order(scene)
    is_visible = scene.is_visible[order][:, long]
    assert np.array_equal(asked["vis"][0] > 0.5, is_visible)
    from_center_xy = scene.tracks_xy[order][:, long] - (WIDTH / 2, HEIGHT / 2)
    expected = SCALE * from_center_xy + 512.0
    assert np.abs(asked["tracks"][0] - expected)[is_visible].max() < 1e-3
    assert asked["tracks"][0][~is_visible].max() < -1000.0
    assert asked["focal_length"] == pytest.approx(SCALE * FOCAL_PX / 512.0)


def frame_order(scene: WindowScene) -> list[int]:
    """Frames with the one first that shares most."""
    shared = scene.is_visible * (scene.is_visible.sum(axis=0) - 1)
    hub = int(shared.sum(axis=1).argmax())
    return [hub, *(frame for frame in range(len(scene.poses)) if frame != hub)]


def test_the_frame_that_shares_most_is_the_hub_that_poses_are_relative_to(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    is_visible = scene.is_visible.copy()
    is_visible[:, ::2] &= np.arange(8)[:, None] == 5  # half of the tracks are seen once
    is_visible[5] = scene.is_visible[5]
    problem = scene.problem(cam_from_world=scene.poses, focal_px=KNOWN, is_visible=is_visible)
    solver(problem)
    shared = is_visible * (is_visible.sum(axis=0) - 1)
    hub = int(shared.sum(axis=1).argmax())
    asked = question()
    assert np.allclose(asked["R"][0], np.eye(3))
    assert np.allclose(asked["T"][0], 0.0)
    assert np.linalg.norm(asked["T"][1:], axis=1).mean() == pytest.approx(1.0)
    others = [frame for frame in range(8) if frame != hub]
    for idx, frame in enumerate(others, start=1):
        assert np.allclose(asked["R"][idx], scene.poses[frame, :, :3] @ scene.poses[hub, :, :3].T)


def test_frames_are_related_by_what_they_and_the_hub_both_see(solver: WindowSolver) -> None:
    scene = arc_scene()
    solver(scene.problem(cam_from_world=scene.poses, focal_px=KNOWN))
    two_view = sys.modules["vggsfm.two_view_geo.estimate_preliminary"]
    asked = two_view.QUESTIONS[-1]
    seen = question()["vis"][0] > 0.5
    assert np.array_equal(asked["vis"][0, 1:] > 0.5, seen[1:] & seen[0])
    assert (asked["width"], asked["max_error"]) == (1024, 4.0)
    assert np.array_equal(question()["fmat_inlier_mask"], seen[1:] & seen[0])


def test_a_frame_that_shares_next_to_nothing_with_the_hub_is_not_related_to_it(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    is_visible = scene.is_visible.copy()
    is_last = np.arange(is_visible.shape[1]) % 10 == 0  # tracks of the last frame
    is_visible[0] &= ~is_last
    is_visible[1:7] &= is_last | (np.random.default_rng(0).random((6, len(is_last))) < 0.6)
    is_visible[7] &= is_last
    problem = scene.problem(cam_from_world=scene.poses, focal_px=KNOWN, is_visible=is_visible)
    assert solver(problem).status is WindowStatus.SOLVED
    seen = question()["vis"][0] > 0.5
    num_shared = (seen & seen[0]).sum(axis=1)
    assert num_shared.min() == 0
    two_view = sys.modules["vggsfm.two_view_geo.estimate_preliminary"]
    assert two_view.QUESTIONS[-1]["vis"].shape[1] == (num_shared >= 8).sum()
    is_related = question()["fmat_inlier_mask"].any(axis=1)
    assert np.array_equal(is_related, num_shared[1:] >= 8)


def test_observations_that_are_not_finite_or_not_trusted_are_not_passed_on(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    tracks_xy, score = scene.tracks_xy.copy(), np.ones(scene.is_visible.shape, np.float32)
    tracks_xy[0, :40], score[1, :40] = np.nan, 0.1
    estimate = solver(
        scene.problem(cam_from_world=scene.poses, focal_px=KNOWN, tracks_xy=tracks_xy, score=score)
    )
    assert_solved(estimate, scene)
    assert estimate.num_unusable == scene.is_visible[:2, :40].sum()
    assert not estimate.is_inlier[:2, :40].any()


def test_a_frame_that_sees_nothing_is_left_out(solver: WindowSolver) -> None:
    scene = arc_scene()
    is_visible = scene.is_visible.copy()
    is_visible[2] = False
    estimate = solver(
        scene.problem(cam_from_world=scene.poses, focal_px=KNOWN, is_visible=is_visible)
    )
    assert estimate.status is WindowStatus.SOLVED
    assert question()["vis"].shape[1] == 7
    assert np.flatnonzero(~estimate.is_valid).tolist() == [2]
    assert not estimate.cam_from_world[2].any()


# -- what comes back ------------------------------------------------------------------------------


def test_rough_cameras_come_back_right_in_their_own_frame_of_reference(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    turn = np.column_stack([np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), [40.0, 2.0, 3.0]])
    elsewhere = compose_poses(rough(scene), turn)
    estimate = solver(scene.problem(cam_from_world=elsewhere, focal_px=1.05 * KNOWN))
    assert_solved(estimate, scene)
    assert not estimate.is_bootstrapped
    assert estimate.mean_reprojection_px < 0.01
    assert estimate.focal_px == pytest.approx(KNOWN, rel=1e-4)
    offsets = camera_center(estimate.cam_from_world) - camera_center(elsewhere)
    assert np.linalg.norm(offsets, axis=1).max() < 0.3  # 2 % of the extent, and 2 degrees
    assert estimate.is_inlier[:, estimate.is_point_valid].sum() == estimate.num_observations
    assert not estimate.is_inlier[~scene.is_visible].any()


def test_held_poses_come_back_to_the_bit_and_all_others_around_them(solver: WindowSolver) -> None:
    scene = arc_scene()
    is_held = held(1, 4)
    poses = np.where(is_held[:, None, None], scene.poses, rough(scene))
    estimate = solver(
        scene.problem(
            cam_from_world=poses, is_held=is_held, focal_px=KNOWN, is_calibrated=CALIBRATED
        )
    )
    assert_solved(estimate, scene)
    assert np.array_equal(estimate.cam_from_world[is_held], poses[is_held])
    assert np.abs(estimate.cam_from_world - scene.poses).max() < 1e-3
    assert estimate.focal_px.tolist() == KNOWN.tolist()


def test_a_window_that_hangs_on_one_held_frame_is_where_that_frame_is(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    is_held = held(3)
    poses = np.where(is_held[:, None, None], scene.poses, np.nan)
    estimate = solver(scene.problem(cam_from_world=poses, is_held=is_held, focal_px=KNOWN))
    assert_solved(estimate, scene)
    assert np.array_equal(estimate.cam_from_world[3], scene.poses[3])


@pytest.mark.slow
def test_missing_poses_come_from_the_first_solver_and_given_ones_stay_the_reference(
    solver: WindowSolver,
) -> None:
    scene = arc_scene()
    poses = scene.poses.copy()
    poses[5:] = np.nan
    estimate = solver(scene.problem(cam_from_world=poses, focal_px=KNOWN))
    assert_solved(estimate, scene)
    assert not estimate.is_bootstrapped
    assert np.abs(estimate.cam_from_world - scene.poses).max() < 1e-2
    alone = solver(scene.problem())
    assert_solved(alone, scene, tolerance=1e-3)
    assert alone.is_bootstrapped


def test_what_the_first_solver_cannot_begin_is_not_solved(solver: WindowSolver) -> None:
    scene = turning_scene()
    estimate = solver(scene.problem(focal_px=KNOWN))
    assert_refused(estimate, native(scene.problem(focal_px=KNOWN)).status, "no initial cameras")


def test_frames_of_one_camera_share_its_focal_length_and_calibrated_cameras_keep_theirs(
    solver: WindowSolver,
) -> None:
    scene = arc_scene(noise_px=0.5)
    problem = scene.problem(
        cam_from_world=rough(scene),
        image_sizes=np.array([[WIDTH, HEIGHT]] * 2),
        camera_idx=np.arange(8) % 2,
        focal_px=np.array([FOCAL_PX, 1.1 * FOCAL_PX]),
        is_calibrated=np.array([True, False]),
    )
    estimate = solver(problem)
    assert_solved(estimate, scene, tolerance=5e-3)
    assert estimate.focal_px[0] == FOCAL_PX
    assert estimate.focal_px[1] == pytest.approx(FOCAL_PX, rel=0.01)
    assert 0.4 < estimate.mean_reprojection_px < 0.8


def test_images_of_other_sizes_and_principal_points_are_solved_alike(solver: WindowSolver) -> None:
    scene = arc_scene()
    is_double = np.arange(8) % 2 == 1
    middle_xy, other_xy = np.array([WIDTH / 2, HEIGHT / 2]), np.array([950.0, 800.0])
    doubled_xy = 2.0 * (scene.tracks_xy - middle_xy) + other_xy
    problem = scene.problem(
        tracks_xy=np.where(is_double[:, None, None], doubled_xy, scene.tracks_xy),
        cam_from_world=scene.poses,
        image_sizes=np.array([[WIDTH, HEIGHT], [2 * WIDTH, 2 * HEIGHT]]),
        principal_points_xy=np.array([middle_xy, other_xy]),
        camera_idx=is_double.astype(np.int64),
        focal_px=np.array([FOCAL_PX, 2.0 * FOCAL_PX]),
        is_calibrated=np.array([True, True]),
    )
    assert_solved(solver(problem), scene)


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_distortion_is_taken_out_and_returned_as_it_was(
    solver: WindowSolver, is_calibrated: bool
) -> None:
    scene = arc_scene(distortion=-0.08)
    estimate = solver(
        scene.problem(
            cam_from_world=rough(scene),
            focal_px=KNOWN,
            distortion=np.array([-0.08]),
            is_calibrated=np.array([is_calibrated]),
        )
    )
    assert_solved(estimate, scene)
    assert estimate.mean_reprojection_px < 0.01
    assert estimate.distortion == pytest.approx([-0.08], rel=1e-3)


def test_frames_are_valid_by_what_agrees_whatever_upstream_says(solver: WindowSolver) -> None:
    scene = arc_scene()
    fail_with("one frame lost")
    estimate = solver(scene.problem(cam_from_world=scene.poses, focal_px=KNOWN))
    assert estimate.status is WindowStatus.SOLVED
    assert np.flatnonzero(~estimate.is_valid).tolist() == [7]
    assert estimate.num_observations < scene.is_visible[:7].sum() + 15
    assert np.abs(estimate.cam_from_world - scene.poses)[:7].max() < 1e-3


def test_the_same_window_twice_gives_the_same_and_leaves_the_generator_alone(
    solver: WindowSolver,
) -> None:
    problem = arc_scene(noise_px=0.5).problem(cam_from_world=arc_scene().poses, focal_px=KNOWN)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = solver(problem), solver(problem)
    assert np.array_equal(first.cam_from_world, second.cam_from_world)
    assert np.array_equal(torch.get_rng_state(), before)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("no convergence\nand more"), ("RuntimeError", "no convergence")),
        (ValueError("max() of nothing"), ("ValueError",)),
        (IndexError("out of range"), ("IndexError",)),
        ("debugger", ("debugger",)),
        ("missing", ("FormerPycolmap.no_such_thing",)),
    ],
)
def test_upstream_that_does_not_get_through_is_a_status_with_its_reason(
    solver: WindowSolver, failure: object, words: tuple[str, ...]
) -> None:
    scene = arc_scene()
    problem = scene.problem(cam_from_world=scene.poses, focal_px=KNOWN)
    set_trace = pdb.set_trace
    fail_with(failure)
    estimate = solver(problem)
    assert_refused(estimate, WindowStatus.SOLVER_FAILED, *words)
    assert "\n" not in estimate.reason
    assert pdb.set_trace is set_trace
    assert_solved(solver(problem), scene)  # and the next window is


def test_an_answer_that_the_tracks_contradict_is_not_believed(solver: WindowSolver) -> None:
    scene = arc_scene()
    fail_with("nonsense")
    estimate = solver(scene.problem(cam_from_world=scene.poses, focal_px=KNOWN))
    assert_refused(estimate, WindowStatus.INCONSISTENT)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"focal_px": np.array([np.nan])}, WindowStatus.BAD_INTRINSICS),
        ({"focal_px": np.array([0.1 * WIDTH])}, WindowStatus.BAD_INTRINSICS),
        ({"focal_px": np.zeros(1), "is_calibrated": CALIBRATED}, WindowStatus.BAD_INTRINSICS),
        ({"focal_px": np.zeros(1), "distortion": np.ones(1)}, WindowStatus.BAD_INTRINSICS),
        ({"image_sizes": np.array([[0, 10]])}, WindowStatus.BAD_INTRINSICS),
        ({"cam_from_world": None, "is_held": held(1)}, WindowStatus.BAD_POSES),
        ({"cam_from_world": np.zeros((8, 3, 4)), "is_held": held(1)}, WindowStatus.BAD_POSES),
        ({"is_visible": np.zeros((8, 1000), np.bool_)}, WindowStatus.TOO_FEW_FRAMES),
        ({"tracks_xy": np.full((8, 1000, 2), np.nan)}, WindowStatus.TOO_FEW_FRAMES),
        ({"cam_from_world": np.tile(np.eye(3, 4), (8, 1, 1))}, WindowStatus.NO_PARALLAX),
    ],
)
def test_what_cannot_be_solved_is_refused_before_upstream_is_asked(
    solver: WindowSolver, changes: dict[str, Any], status: WindowStatus
) -> None:
    scene = arc_scene()
    num_tracks = len(scene.points)
    fitting = {
        name: value[:, :num_tracks] if name in ("is_visible", "tracks_xy") else value
        for name, value in changes.items()
    }
    given = {"cam_from_world": scene.poses, "focal_px": KNOWN} | fitting
    assert_refused(solver(scene.problem(**given)), status)
    assert not sys.modules["vggsfm.models.triangulator"].QUESTIONS


def test_tracks_seen_only_twice_are_too_few(solver: WindowSolver) -> None:
    scene = arc_scene(4)
    is_visible = scene.is_visible & (np.cumsum(scene.is_visible, axis=0) <= 2)
    estimate = solver(
        scene.problem(cam_from_world=scene.poses, focal_px=KNOWN, is_visible=is_visible)
    )
    assert_refused(estimate, WindowStatus.TOO_FEW_TRACKS, "three times")


# -- the package ----------------------------------------------------------------------------------


def test_an_absent_package_is_one_clear_error_with_its_licence() -> None:
    config = WindowConfig(solver="vggsfm")
    with pytest.raises(ConfigError) as error:
        open_vggsfm(config, first_solver=native)
    said = str(error.value)
    for words in ("facebookresearch/vggsfm", "kornia==0.7.3", "poselib", "non-commercial"):
        assert words in said


def test_the_extra_brings_torch_and_all_that_upstream_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    brought = {
        name if "==" in name else name.partition(">=")[0]
        for name in project["optional-dependencies"]["vggsfm"]
    }
    assert brought == {"torch", *vggsfm_package._DEPENDENCIES.values()}


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkout of VGGSfM"):
        load_vggsfm(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import kornia_that_is_not_there", "pip install .*kornia_that_is_not_there"),
        ("raise ImportError('cannot import name Tensor', name='kornia')", "kornia==0.7.3"),
    ],
)
def test_a_package_that_upstream_misses_is_named(checkout: Path, line: str, words: str) -> None:
    (checkout / "vggsfm/models/__init__.py").write_text(line)
    with pytest.raises(ConfigError, match=words):
        load_vggsfm(checkout)
    assert not loaded_modules()
    assert str(checkout) not in sys.path


def test_upstream_without_poselib_is_refused_since_its_own_search_is_too_slow(
    checkout: Path,
) -> None:
    path = checkout / "vggsfm/two_view_geo/estimate_preliminary.py"
    path.write_text(path.read_text().replace("poselib = ", "other = "))
    with pytest.raises(ConfigError, match="pip install poselib"):
        load_vggsfm(checkout)


def test_another_package_of_that_name_is_not_mistaken_for_the_checkout(
    checkout: Path, tmp_path: Path
) -> None:
    other = write_files(tmp_path / "other", FILES)
    load_vggsfm(checkout)
    with pytest.raises(ConfigError, match="another package vggsfm"):
        load_vggsfm(other)


def test_what_upstream_prints_goes_to_the_log(
    checkout: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    search_path = list(sys.path)
    solver = open_vggsfm(config_of(checkout), first_solver=native)
    scene = arc_scene()
    solver(scene.problem(cam_from_world=scene.poses, focal_px=KNOWN))
    assert capfd.readouterr().out == ""
    assert "hello from upstream" in caplog.text
    assert "VGGSfM says: solving" in caplog.text
    assert "non-commercial" in caplog.text
    assert sys.path == search_path


def window_solver_of(config: Config, options: LaunchOptions) -> WindowSolver | None:
    return _window_solver(config, options, FakeMatcher(world=SyntheticWorld(straight_path(2))))


def test_a_run_has_the_solver_that_is_configured(checkout: Path, tmp_path: Path) -> None:
    options = LaunchOptions(
        sources=(),
        path=tmp_path / "run",
        overwrite=False,
        view_mode=ViewMode.NONE,
        show_progress=False,
    )
    assert window_solver_of(Config(), options) is None
    off = config_of(tmp_path, enabled=False)
    assert window_solver_of(Config(window=off), options) is None
    with pytest.raises(ConfigError, match="no checkout"):
        window_solver_of(Config(window=config_of(tmp_path)), options)
    solver = window_solver_of(Config(window=config_of(checkout)), options)
    assert isinstance(solver, VggsfmWindowSolver)


# -- the pycolmap it was written for --------------------------------------------------------------


def test_normalizing_sets_the_extent_as_it_used_to() -> None:
    former = FormerPycolmap()
    reconstruction = former.Reconstruction()
    for frame, x in enumerate([0.0, 1.0, 2.0, 3.0, 50.0]):  # the last lies outside of the middle
        rigid = former.Rigid3d(np.column_stack([np.eye(3), [-x, 0.0, 0.0]]))
        reconstruction.add_image(former.Image(id=frame, cam_from_world=rigid))
    reconstruction.add_point3D([1.0, 2.0, 0.0], former.Track())
    reconstruction.normalize(5.0, 0.1, 0.9, True)
    poses = np.array([image.cam_from_world.matrix() for image in reconstruction.images.values()])
    centers_x = camera_center(poses)[:, 0]
    assert centers_x[3] - centers_x[0] == pytest.approx(5.0)
    assert centers_x[:4].mean() == pytest.approx(0.0, abs=1e-12)
    assert reconstruction.points3D[1].xyz[1] == pytest.approx(2.0 * 5.0 / 3.0)


@pytest.mark.parametrize("ask", ["thing", "Reconstruction().thing", "Image().thing"])
def test_a_part_without_stand_in_is_named(ask: str) -> None:
    parts = ask.removesuffix("thing").removesuffix(".").removesuffix("()")
    former = FormerPycolmap()
    asked = getattr(former, parts)() if parts else former
    with pytest.raises(NoStandInError, match="thing"):
        asked.thing  # noqa: B018
    assert not hasattr(asked, "__thing__")


# -- the camera predictor -------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch.hub, with the backbone's code in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "facebookresearch_dinov2_main"
    write_files(folder, {"hubconf.py": BACKBONE})
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "vggsfm.bin"
    torch.save(predictor_weights(), path)
    return path


def predictor_weights() -> dict[str, torch.Tensor]:
    return {
        "camera_predictor.scale": torch.tensor([10.0]),
        "camera_predictor.backbone.weight": torch.zeros(1, 1),
        "camera_predictor.backbone.bias": torch.zeros(1),
        "track_predictor.other": torch.zeros(3),
    }


def write_images(folder: Path, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> tuple[str, ...]:
    """Eight grey images, each brighter than the last."""
    folder.mkdir()
    names = tuple(f"{number:02d}.png" for number in range(8))
    for number, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((size[1], size[0]), 20 * number, np.uint8))
    return names


@pytest.mark.usefixtures("hub")
def test_the_predictor_gives_initial_cameras_by_looking_at_the_images(
    checkout: Path, weights: Path, tmp_path: Path
) -> None:
    names = write_images(tmp_path / "images")
    network = load_predictor(weights, make_network=load_vggsfm(checkout).camera_predictor)
    assert not network.training
    scene = arc_scene()
    problem = scene.problem(image_names=names)
    guess = PredictedCameras(network, read_image=FolderImages(tmp_path / "images"))(problem)
    assert not isinstance(guess, Refusal)
    assert guess.has_own_gauge
    steps = np.diff(guess.cam_from_world[:, 0, 3])
    assert steps == pytest.approx(10.0 * 20.0 / 255.0 * np.ones(7), rel=1e-4)
    assert guess.focal_px == pytest.approx([1.6 * 512.0 / SCALE])


@pytest.mark.usefixtures("hub")
def test_predicted_cameras_start_a_window_that_comes_without(
    checkout: Path, weights: Path, tmp_path: Path
) -> None:
    names = write_images(tmp_path / "images")
    solver = open_vggsfm(
        config_of(checkout, camera_predictor=str(weights)),
        first_solver=not_to_be_asked,
        read_image=FolderImages(tmp_path / "images"),
    )
    scene = arc_scene()
    solver(scene.problem(image_names=names))
    asked = question()
    assert np.allclose(asked["R"], np.eye(3))
    assert asked["focal_length"] == pytest.approx(1.6)
    for changes, word in (
        ({}, "does not name"),
        ({"image_names": ("none.png", *names[1:])}, "none.png cannot be read"),
        ({"image_names": names, "image_sizes": np.array([[WIDTH, HEIGHT + 1]])}, "has the shape"),
    ):
        assert_refused(solver(scene.problem(**changes)), WindowStatus.NO_IMAGES, word)


def test_a_network_that_does_not_get_through_is_a_status(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images")

    def network(images: torch.Tensor, *, batch_size: int) -> None:
        raise RuntimeError("out of memory\nand more")

    predict = PredictedCameras(network, read_image=FolderImages(tmp_path / "images"))
    refusal = predict(arc_scene().problem(image_names=names))
    assert isinstance(refusal, Refusal)
    assert refusal.status is WindowStatus.SOLVER_FAILED
    assert refusal.reason == "camera predictor: out of memory"


def not_to_be_asked(problem: WindowProblem) -> WindowEstimate:
    raise AssertionError("the predictor was there")


def test_a_predicted_gauge_is_brought_to_the_poses_that_are_known(checkout: Path) -> None:
    scene = arc_scene()
    turn = np.column_stack([np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), [4.0, 2.0, 3.0]])
    elsewhere = compose_poses(rough(scene), turn)
    elsewhere[:, :, 3] *= 3.0

    def guess(problem: WindowProblem) -> WindowEstimate:
        estimate = native(problem)
        return replace(estimate, cam_from_world=elsewhere, is_bootstrapped=True)

    solver = VggsfmWindowSolver(load_vggsfm(checkout), initialize=cameras_of(guess))
    poses = scene.poses.copy()
    poses[4:] = np.nan
    estimate = solver(scene.problem(cam_from_world=poses, focal_px=KNOWN, is_held=held(0, 3)))
    assert_solved(estimate, scene)
    assert np.abs(estimate.cam_from_world - scene.poses).max() < 1e-2


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"camera_predictor.scale": None}, "lacks weights: scale"),
        ({"camera_predictor.more": torch.zeros(1)}, "has foreign weights: more"),
        ({"camera_predictor.scale": torch.zeros(2)}, "has differing weights: scale"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_difference(
    checkout: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    path = tmp_path / "weights.bin"
    merged: dict[str, torch.Tensor | None] = {**predictor_weights(), **changes}
    torch.save({name: value for name, value in merged.items() if value is not None}, path)
    with pytest.raises(ConfigError, match=words):
        load_predictor(path, make_network=load_vggsfm(checkout).camera_predictor)


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MALICIOUS_FOLDER"],)


def test_files_are_never_unpickled_freely(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALICIOUS_FOLDER", str(tmp_path / "made"))
    package = load_vggsfm(checkout)
    path = tmp_path / "weights.bin"
    torch.save({"camera_predictor.scale": Malicious()}, path)
    with pytest.raises(ConfigError, match="is no file of weights"):
        load_predictor(path, make_network=package.camera_predictor)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ConfigError, match="is no file of weights"):
        load_predictor(path, make_network=package.camera_predictor)
    assert not (tmp_path / "made").exists()
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="no weights of upstream's camera predictor"):
        load_predictor(path, make_network=package.camera_predictor)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_predictor(tmp_path / "none.bin", make_network=package.camera_predictor)


def test_a_backbone_that_is_not_there_is_not_fetched(
    checkout: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    load = torch.hub.load
    with pytest.raises(ConfigError, match="needs the code of DINOv2"):
        load_predictor(weights, make_network=load_vggsfm(checkout).camera_predictor)
    assert torch.hub.load is load


def test_the_predictor_needs_images(checkout: Path, weights: Path) -> None:
    config = config_of(checkout, camera_predictor=str(weights))
    with pytest.raises(ConfigError, match="looks at images"):
        open_vggsfm(config, first_solver=native)


def test_a_window_names_all_of_its_images_or_none() -> None:
    with pytest.raises(ValueError, match="image_names: 2 for 8 frames"):
        arc_scene().problem(image_names=("one.jpg", "two.jpg"))
