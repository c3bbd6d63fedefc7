"""VGGSfM's pycolmap: the part of pycolmap 3.10 that upstream uses, on top of the installed one.

Upstream was written against pycolmap 3.10. Names and arguments have changed since, and one call
silently: what set the extent of a reconstruction keeps its scale in later versions. So upstream's
modules get a `FormerPycolmap` under the name ``pycolmap``, and run unchanged. Written from COLMAP's
public interface.

Reconstructions are plain Python here, and become COLMAP's only while a bundle adjustment runs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from engine.geometry import camera_center, pose_in_other_world
from engine.types import Float64Array

_NO_POINT: Final = -1
_MIN_EXTENT: Final = 1e-12
_FEW: Final = 3  # camera centres: of no more, the outermost count, too


class NoStandInError(RuntimeError):
    """Upstream used a part of pycolmap 3.10 that is not here."""


class _Former:
    """Raises an error that names the missing part, in place of an AttributeError."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NoStandInError(f"there is no stand-in for {type(self).__name__}.{name}")


@dataclass(slots=True, eq=False)
class Point2D(_Former):
    """A keypoint."""

    xy: Float64Array  # (2,)
    point3D_id: int = _NO_POINT


@dataclass(slots=True, eq=False)
class TrackElement(_Former):
    """An observation of a point."""

    image_id: int
    point2D_idx: int


@dataclass(slots=True, eq=False)
class Track(_Former):
    """The observations of a point."""

    elements: list[TrackElement] = field(default_factory=list)

    def add_element(self, image_id: int, point2D_idx: int) -> None:
        """Adds an observation."""
        self.elements.append(TrackElement(int(image_id), int(point2D_idx)))


@dataclass(slots=True, eq=False)
class Point3D(_Former):
    """A point."""

    xyz: Float64Array  # (3,)
    track: Track
    color: Any


@dataclass(slots=True, eq=False)
class Image(_Former):
    """An image, posed where it is registered."""

    name: str = ""
    points2D: list[Point2D] = field(default_factory=list)
    cam_from_world: Any = None
    camera_id: int = 0
    id: int = 0
    registered: bool = True


class Reconstruction(_Former):
    """Cameras, images and points by their ids."""

    def __init__(self) -> None:
        self.cameras: dict[int, Any] = {}
        self.images: dict[int, Image] = {}
        self.points3D: dict[int, Point3D] = {}

    def add_camera(self, camera: Any) -> None:
        """Adds a camera."""
        self.cameras[camera.camera_id] = camera

    def add_image(self, image: Image) -> None:
        """Adds an image."""
        self.images[image.id] = image

    def add_point3D(self, xyz: Any, track: Track, color: Any = None, *, point3D_id: int = 0) -> int:
        """Adds a point; returns its id, the next one unless it is given."""
        point_id = point3D_id or len(self.points3D) + 1
        self.points3D[point_id] = Point3D(np.array(xyz, np.float64), track, color)
        return point_id

    def point3D_ids(self) -> set[int]:
        """The ids of all points."""
        return set(self.points3D)

    def deregister_image(self, image_id: int) -> None:
        """Leaves an image out of the reconstruction."""
        self.images[image_id].registered = False

    def normalize(
        self, extent: float = 10.0, p0: float = 0.1, p1: float = 0.9, use_images: bool = True
    ) -> None:
        """Gives the box around most camera centres a diagonal of ``extent`` around the origin."""
        if not use_images:
            raise NoStandInError("reconstructions are only normalized by their images here")
        images = [image for image in self.images.values() if image.registered]
        if not images:
            return
        poses = np.array([image.cam_from_world.matrix() for image in images])
        coordinates = np.sort(camera_center(poses), axis=0)
        last = len(coordinates) - 1
        first, final = (int(p0 * last), int(p1 * last)) if last >= _FEW else (0, last)
        inner = coordinates[first : final + 1]
        size = float(np.linalg.norm(inner[-1] - inner[0]))
        scale = extent / size if size > _MIN_EXTENT else 1.0
        self._move(np.column_stack([scale * np.eye(3), -scale * inner.mean(axis=0)]))

    def _move(self, new_from_old: Float64Array) -> None:
        """Moves everything by a similarity (3, 4)."""
        for image in self.images.values():
            pose = pose_in_other_world(image.cam_from_world.matrix(), new_from_old)
            image.cam_from_world = type(image.cam_from_world)(pose)
        for point in self.points3D.values():
            point.xyz = new_from_old[:, :3] @ point.xyz + new_from_old[:, 3]


class FormerPycolmap(_Former):
    """Stands in for the module ``pycolmap`` of version 3.10.

    Attributes:
        keeps_intrinsics: cameras stay as they are, whatever upstream's options are.
    """

    def __init__(self) -> None:
        import pycolmap

        class BundleAdjustmentOptions(pycolmap.BundleAdjustmentOptions):
            def __init__(self) -> None:
                super().__init__(print_summary=False)
                self.ceres.solver_options.num_threads = 1

            @property
            def solver_options(self) -> Any:
                return self.ceres.solver_options

        self.keeps_intrinsics = False
        self._pycolmap = pycolmap
        self.Camera = pycolmap.Camera
        self.Rigid3d = pycolmap.Rigid3d
        self.Rotation3d = pycolmap.Rotation3d
        self.AbsolutePoseEstimationOptions = pycolmap.AbsolutePoseEstimationOptions
        self.AbsolutePoseRefinementOptions = pycolmap.AbsolutePoseRefinementOptions
        self.BundleAdjustmentOptions = BundleAdjustmentOptions
        self.Point2D, self.ListPoint2D = Point2D, list
        self.Track, self.TrackElement = Track, TrackElement
        self.Image, self.Reconstruction = Image, Reconstruction

    def bundle_adjustment(self, reconstruction: Reconstruction, options: Any) -> None:
        """Refines poses, points and cameras in place."""
        options.print_summary = False
        if self.keeps_intrinsics:
            options.refine_focal_length = options.refine_extra_params = False
        current = as_colmap(reconstruction)
        self._pycolmap.bundle_adjustment(current, options)
        copy_values_back(reconstruction, current)

    def pose_refinement(  # noqa: PLR0917 - COLMAP's order
        self,
        cam_from_world: Any,
        points2D: Any,
        points3D: Any,
        inlier_mask: Any,
        camera: Any,
        refinement_options: Any,
    ) -> Any:
        """Refines a pose, and the camera in place; None where that fails."""
        self._restrain(refinement_options)
        return self._pycolmap.refine_absolute_pose(
            cam_from_world, points2D, points3D, inlier_mask, camera, refinement_options
        )

    def absolute_pose_estimation(
        self,
        points2D: Any,
        points3D: Any,
        camera: Any,
        estimation_options: Any,
        refinement_options: Any,
    ) -> Any:
        """Finds a pose, and refines the camera in place; None where that fails."""
        self._restrain(refinement_options)
        if self.keeps_intrinsics:
            estimation_options.estimate_focal_length = False
        return self._pycolmap.estimate_and_refine_absolute_pose(
            points2D, points3D, camera, estimation_options, refinement_options
        )

    def _restrain(self, refinement_options: Any) -> None:
        if self.keeps_intrinsics:
            refinement_options.refine_focal_length = refinement_options.refine_extra_params = False


def adjust_held(
    reconstruction: Reconstruction,
    options: Any,
    *,
    held_images: Collection[int],
    constant_cameras: Collection[int],
) -> None:
    """Refines what may change of a reconstruction, in place.

    Args:
        reconstruction: is changed.
        options: pycolmap's ``BundleAdjustmentOptions``.
        held_images: ids of images whose poses stay; with fewer than two, the gauge is fixed.
        constant_cameras: ids of cameras that stay.
    """
    import pycolmap

    current = as_colmap(reconstruction)
    if not (held_images or constant_cameras):
        pycolmap.bundle_adjustment(current, options)
        copy_values_back(reconstruction, current)
        return
    problem = pycolmap.BundleAdjustmentConfig()
    for image_id in sorted(current.reg_image_ids()):
        problem.add_image(image_id)
        if image_id - 1 in held_images:
            problem.set_constant_rig_from_world_pose(current.image(image_id).frame_id)
    for camera_id in constant_cameras:
        problem.set_constant_cam_intrinsics(camera_id + 1)
    if len(held_images) < 2:
        problem.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    pycolmap.create_default_bundle_adjuster(options, problem, current).solve()
    copy_values_back(reconstruction, current)


def as_colmap(reconstruction: Reconstruction) -> Any:
    """COLMAP's own reconstruction of the registered images and their observations.

    Ids of cameras and images are one more than here, where they may begin at 0.
    """
    import pycolmap

    current = pycolmap.Reconstruction()
    for camera_id, camera in reconstruction.cameras.items():
        current.add_camera_with_trivial_rig(
            pycolmap.Camera(camera.todict() | {"camera_id": camera_id + 1})
        )
    posed = {key: image for key, image in reconstruction.images.items() if image.registered}
    for image_id, image in posed.items():
        keypoints_xy = np.array([point.xy for point in image.points2D]).reshape(-1, 2)
        own = pycolmap.Image(
            name=str(image_id),
            keypoints=keypoints_xy,
            camera_id=image.camera_id + 1,
            image_id=image_id + 1,
        )
        current.add_image_with_trivial_frame(own, image.cam_from_world)
    for point_id, point in reconstruction.points3D.items():
        elements = [
            pycolmap.TrackElement(element.image_id + 1, element.point2D_idx)
            for element in point.track.elements
            if element.image_id in posed
        ]
        current.add_point3D_with_id(
            point_id, pycolmap.Point3D(xyz=point.xyz, track=pycolmap.Track(elements))
        )
    return current


def copy_values_back(reconstruction: Reconstruction, current: Any) -> None:
    """Copies the values of a reconstruction made by `as_colmap` back."""
    for image_id, image in current.images.items():
        reconstruction.images[image_id - 1].cam_from_world = image.cam_from_world()
    for camera_id, camera in current.cameras.items():
        reconstruction.cameras[camera_id - 1].params = camera.params
    for point_id, point in current.points3D.items():
        reconstruction.points3D[point_id].xyz = point.xyz
