"""The products of a run's maps: trajectories, copies, figures and views, for any thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.cpu_time import Stage, charged_to
from engine.estimators.lenses import camera_focal_px, corner_rays
from engine.geo.georeference import Georeference
from engine.geometry import pose_in_other_world
from engine.mapping.cameras.cameras import CameraCalibration
from engine.mapping.depth_problems import poses_of
from engine.mapping.frame_posing import FramePoser
from engine.mapping.model.map_record import camera_records
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.georeferencing import Georeferencing
from engine.mapping.steps import MapCopy, MapFigures, MapSnapshot, OneMapFigures
from engine.matching.scene_graph import SceneGraph
from engine.types import FramePose, MapCounts, MapView, PoseKind, Verdict


class MapProducts:
    """Makes frozen values and private copies of maps; the main map is always the first of them.

    Args:
        graph: all keyframes and pairs.
        cameras: what is known of their cameras.
        poser: has the poses of frames between keyframes.
        georeferencing: knows where maps lie on the globe.
    """

    def __init__(
        self,
        *,
        graph: SceneGraph,
        cameras: CameraCalibration,
        poser: FramePoser,
        georeferencing: Georeferencing,
    ) -> None:
        self._graph = graph
        self._cameras = cameras
        self._poser = poser
        self._georeferencing = georeferencing

    def trajectories(self, maps: Sequence[SparseMap]) -> list[list[FramePose]]:
        """The present poses of the frames in each map, in order of arrival.

        Each in metres east, north, up once its map is georeferenced.
        """
        return [
            self._georeferencing.poses_in_metres(own, self._place_of(sparse_map, main=maps[0]))
            for own, sparse_map in zip(self._poser.trajectories(maps), maps, strict=True)
        ]

    @charged_to(Stage.SNAPSHOTS)
    def snapshot(
        self,
        maps: Sequence[SparseMap],
        *,
        numbers: Sequence[int],
        counts: MapCounts,
        verdict: Verdict,
    ) -> MapSnapshot:
        """Copies of maps, each in metres if it is georeferenced.

        Args:
            maps: the main map, and those beside it, which are placed by the same origin, if at all.
            numbers: of the maps.
            counts: of the run.
            verdict: on the main map.
        """
        placement = self._georeferencing.update(maps[0])
        copies = tuple(
            self._copy(one, main=maps[0], number=number)
            for one, number in zip(maps, numbers, strict=True)
        )
        poses = poses_of(maps[0])
        if placement is not None and copies[0].is_in_metres:
            moved = pose_in_other_world(poses.cam_from_world, placement.georeference.enu_from_map)
            poses = replace(poses, cam_from_world=moved)
        return MapSnapshot(
            copies=copies, placement=placement, counts=counts, poses=poses, verdict=verdict
        )

    def figures(
        self,
        main: SparseMap,
        beside: Sequence[SparseMap],
        *,
        counts: MapCounts,
        metres_per_map_unit: float | None,
    ) -> MapFigures:
        """What can be measured in the main map and in those beside it.

        Args:
            main: the main map; may be empty, and then is no map.
            beside: the others.
            counts: of the run.
            metres_per_map_unit: the length of the main map's unit by the matcher's depths.
        """
        maps = [main, *beside] if main.num_registered else []
        poses = self._poser.trajectories(maps)
        kinds = Counter(pose.kind for own in poses for pose in own)
        return MapFigures(
            counts=counts,
            num_points3D=main.num_points3D,
            num_observations=main.reconstruction.compute_num_observations(),
            mean_track_length=main.reconstruction.compute_mean_track_length(),
            mean_reprojection_error_px=main.mean_reprojection_error_px(),
            num_interpolated_frames=kinds[PoseKind.INTERPOLATED],
            num_frames_without_pose=self._poser.num_frames - kinds.total(),
            placement=self._georeferencing.placement,
            gps_rmse_m=self._georeferencing.rmse_m(main),
            not_georeferenced=self._georeferencing.refusal,
            metres_per_map_unit=metres_per_map_unit,
            cameras=self._cameras.figures(main),
            maps=tuple(
                self._figures_of(sparse_map, main=main, num_posed_frames=len(own))
                for sparse_map, own in zip(maps, poses, strict=True)
            ),
        )

    @charged_to(Stage.VIEWS)
    def view(self, main: SparseMap, *, version: int) -> MapView:
        """A frozen picture of the main map and the scene graph, for viewers.

        Args:
            main: the main map.
            version: which state of it this is.
        """
        began_s = time.thread_time()
        ids = main.registered_ids
        cameras = [main.camera(main.keyframe(i).calibration_key) for i in ids]
        cloud = main.point_cloud()
        edges = self._graph.all_edges()
        poses = [main.cam_from_world(i) for i in ids]
        return MapView(
            version=version,
            keyframe_ids=np.array(ids, np.int64),
            cam_from_world=np.array(poses).reshape(-1, 3, 4),
            focal_px=np.array([camera_focal_px(camera) for camera in cameras]),
            image_sizes=np.array([(c.width, c.height) for c in cameras], np.int64).reshape(-1, 2),
            corner_rays=np.array([corner_rays(camera) for camera in cameras]).reshape(-1, 4, 3),
            points3D_in_world=cloud.points3D_in_world,
            colors=cloud.colors,
            chunk_ids=cloud.first_keyframe_ids,
            edges=np.array([(e.pair.first, e.pair.second) for e in edges], np.int64).reshape(-1, 2),
            edge_reasons=tuple(edge.reason for edge in edges),
            cameras=self._cameras.figures(main),
            elapsed_s=time.thread_time() - began_s,
        )

    def _copy(self, sparse_map: SparseMap, *, main: SparseMap, number: int) -> MapCopy:
        reconstruction = sparse_map.copy_reconstruction()
        place = self._place_of(sparse_map, main=main)
        is_in_metres = place is not None and self._georeferencing.to_metres(reconstruction, place)
        moved = place.enu_from_map.tolist() if place is not None and is_in_metres else None
        return MapCopy(
            reconstruction=reconstruction,
            is_in_metres=is_in_metres,
            record={
                "number": number,
                "cameras": camera_records(sparse_map),
                "enu_from_map": moved,
            },
        )

    def _figures_of(
        self, sparse_map: SparseMap, *, main: SparseMap, num_posed_frames: int
    ) -> OneMapFigures:
        names = [sparse_map.keyframe(i).name for i in sparse_map.registered_ids]
        return OneMapFigures(
            num_registered=sparse_map.num_registered,
            num_points3D=sparse_map.num_points3D,
            mean_reprojection_error_px=sparse_map.mean_reprojection_error_px(),
            first_name=names[0],
            last_name=names[-1],
            num_posed_frames=num_posed_frames,
            is_georeferenced=self._place_of(sparse_map, main=main) is not None,
        )

    def _place_of(self, sparse_map: SparseMap, *, main: SparseMap) -> Georeference | None:
        """Where one of the maps lies; None: nowhere yet."""
        if sparse_map is not main:
            return self._georeferencing.place_separate(sparse_map)
        placement = self._georeferencing.placement
        return None if placement is None else placement.georeference
