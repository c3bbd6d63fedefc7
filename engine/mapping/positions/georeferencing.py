"""The georeference of a run's map: when it is estimated, and what leaves the run in metres."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pycolmap

from engine.config import GeoreferenceConfig, RuntimeConfig
from engine.events import Georeferenced, Warned
from engine.geo.georeference import (
    Georeference,
    GeoreferenceRefused,
    RefusalReason,
    better_order,
    estimate_georeference,
    gps_rmse_m,
    median_fix,
    positions_in_enu,
    swapped,
    to_enu,
)
from engine.geo.usable_fixes import is_usable_fix
from engine.geometry import camera_center, pose_in_other_world, transform_points
from engine.mapping.model.bundle_adjustment import merge_global_adjustment, start_global_adjustment
from engine.mapping.model.sparse_map import SparseMap
from engine.mapping.positions.position_adjustment import PositionAdjustment, adjust_with_positions
from engine.ports import EventSink
from engine.types import Float64Array, FrameId, FramePose, GpsFix, Keyframe

logger = logging.getLogger(__name__)

_MAX_BEND_RATIO = 0.05  # of a map, by its extent
_MOVED_M = 1.0  # a camera that moved farther is worth another event
_MAX_NAMED = 8  # keyframes with wrong positions, in a message

FixAt = Callable[[str, float], GpsFix | None]


def no_fix(camera_key: str, captured_at_s: float) -> GpsFix | None:
    """The position of a camera beside whose frames no readings came."""
    del camera_key, captured_at_s
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where a map lies on the globe, and the keyframes whose positions say so."""

    georeference: Georeference
    frame_ids: tuple[FrameId, ...]  # with a position, in the order of the georeference's arrays
    names: tuple[str, ...]

    @property
    def rejected_ids(self) -> tuple[FrameId, ...]:
        """Keyframes whose position disagrees with the map."""
        agrees = self.georeference.is_inlier
        return tuple(i for i, is_good in zip(self.frame_ids, agrees, strict=True) if not is_good)

    @property
    def rejected_names(self) -> tuple[str, ...]:
        """Their names."""
        agrees = self.georeference.is_inlier
        return tuple(n for n, is_good in zip(self.names, agrees, strict=True) if not is_good)

    def as_record(self, *, with_residuals: bool = False) -> dict[str, object]:
        """The record in JSON files; lengths in metres."""
        found = self.georeference
        record: dict[str, object] = {
            "origin": {
                "latitude_deg": found.origin.latitude_deg,
                "longitude_deg": found.origin.longitude_deg,
                "altitude_m": found.origin.altitude_m,
            },
            "axes": "east, north, up in metres from the origin",
            "metres_per_map_unit": found.metres_per_map_unit,
            "num_positions": found.num_inliers,
            "rmse_m": found.rmse_m,
            "rejected": list(self.rejected_names),
        }
        if with_residuals:
            rounded = np.round(np.nan_to_num(found.residuals_m, posinf=-1.0), 3).tolist()
            record["residuals_m"] = dict(zip(self.names, rounded, strict=True))
            record["offsets_enu_m"] = {
                name: [None if np.isnan(one) else round(one, 3) for one in offset]
                for name, offset in zip(self.names, found.offsets_enu_m.tolist(), strict=True)
            }
        return record


class Georeferencing:
    """Places the map of a run on the globe.

    Args:
        config: thresholds, and what is wanted.
        final_iterations: of the bundle adjustment with positions.
        runtime: seed and threads.
        fix_at: the GPS position of a camera (by its key) at a capture time, from readings beside
            its frames.
        emit: takes the events.
    """

    def __init__(
        self,
        config: GeoreferenceConfig,
        *,
        final_iterations: int,
        runtime: RuntimeConfig,
        fix_at: FixAt,
        emit: EventSink,
    ) -> None:
        self._config = config
        self._final_iterations = final_iterations
        self._runtime = runtime
        self._fix_at = fix_at
        self._emit = emit
        self._placement: Placement | None = None
        self._origin: GpsFix | None = None  # for good
        self._first_fixes: list[GpsFix] = []  # of keyframes as they came, until there is an origin
        self._was_emitted = False
        self._emitted: Float64Array | None = None  # (3, 4) enu_from_map of the last event
        self._warned_of: tuple[FrameId, ...] = ()
        self._contradiction = ""
        self._refusal = ""
        self._is_swapped = False  # whether latitudes and longitudes of unsure order are each other
        self._is_order_known = False
        self._problems: Counter[str] = Counter()  # why positions of keyframes cannot be used

    def facts(self) -> dict[str, Any]:
        """The origin, and what was emitted."""
        return {
            "origin": None if self._origin is None else asdict(self._origin),
            "first_fixes": [asdict(fix) for fix in self._first_fixes],
            "was_emitted": self._was_emitted,
            "warned_of": list(self._warned_of),
            "problems": dict(self._problems),
            "is_swapped": self._is_swapped,
            "is_order_known": self._is_order_known,
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Goes on with `facts`; where the map lies is found out again, from the same origin."""
        self._origin = None if facts["origin"] is None else GpsFix(**facts["origin"])
        first_fixes = (GpsFix(**fix) for fix in facts["first_fixes"])
        self._first_fixes = [fix for fix in first_fixes if is_usable_fix(fix)]
        self._was_emitted = facts["was_emitted"]
        self._warned_of = tuple(FrameId(i) for i in facts["warned_of"])
        self._problems = Counter(facts.get("problems", {}))
        self._is_swapped = facts.get("is_swapped", False)
        self._is_order_known = facts.get("is_order_known", False)

    @property
    def placement(self) -> Placement | None:
        """Where the map was last found to lie; None: nowhere yet."""
        return self._placement

    @property
    def contradiction(self) -> str:
        """How the positions contradict the map, as last asked; "" where they do not."""
        return self._contradiction

    @property
    def refusal(self) -> str:
        """Why the map has no place although there are positions; "" where it has, or has none."""
        return self._refusal

    def add_keyframe(self, keyframe: Keyframe) -> None:
        """Learns where a new keyframe was; the first few different positions give the origin.

        They, and not the first placement: when that comes depends on when somebody wants to see
        the map.
        """
        fix = keyframe.gps
        if fix is None and keyframe.gps_problem:
            self._problems[keyframe.gps_problem] += 1
        if self._origin is not None or fix is None or not is_usable_fix(fix):
            return
        if all(_place_of(fix) != _place_of(other) for other in self._first_fixes):
            self._first_fixes.append(fix)
        if len(self._first_fixes) == self._config.min_fixes:
            origin = median_fix(self._first_fixes)
            self._origin = swapped(origin) if self._is_swapped else origin
            self._first_fixes.clear()

    def update(self, sparse_map: SparseMap, *, is_final: bool = False) -> Placement | None:
        """Places the map as it is now; emits the first placement, each that moves it, and the last.

        The origin stays as it is once there is one. In the end a map that has positions and no
        place is warned of, with the reason, and so is each kind of position that is not used.
        """
        placed = self._place(sparse_map)
        if isinstance(placed, str):
            self._placement, self._refusal = None, placed
            if is_final and placed:
                self._emit(Warned(message=f"the map is not georeferenced: {placed}"))
            return None
        self._placement, self._refusal = placed, ""
        self._origin = self._placement.georeference.origin
        if is_final or not self._was_emitted or self._has_moved(sparse_map, self._placement):
            self._emit_placement(self._placement)
        if is_final:
            self._warn_of_problems(sparse_map)
        return self._placement

    def adjust(self, sparse_map: SparseMap) -> None:
        """Adjusts the map with its positions, where the images agree.

        A long strip is bent by more than positions may be wrong: it is pulled straight by all of
        them before it is judged by each.
        """
        placement = self.update(sparse_map) or self._place(
            sparse_map, max_error_ratio=_MAX_BEND_RATIO
        )
        if isinstance(placement, str) or not self._config.adjust:
            return
        copy = start_global_adjustment(sparse_map).reduced()
        outcome = adjust_with_positions(
            copy.reconstruction,
            placement.frame_ids,
            self._placed_fixes(sparse_map, placement),
            placement.georeference,
            config=self._config,
            calibration=copy.calibration,
            max_iterations=self._final_iterations,
            num_threads=self._runtime.num_threads or os.cpu_count() or 1,
        )
        if outcome.is_accepted:
            copy.complete()
            merge = merge_global_adjustment(sparse_map, copy)
            sparse_map.filter_all()
            self._emit(replace(merge, num_points3D=sparse_map.num_points3D))
        _log(outcome)

    def place_separate(self, separate: SparseMap) -> Georeference | None:
        """Where a separate map lies, from the same origin; None: its positions do not say.

        None as well while the map has no place.
        """
        placement = self._place(separate) if self._placement is not None else ""
        return None if isinstance(placement, str) else placement.georeference

    def poses_in_metres(
        self, poses: Sequence[FramePose], found: Georeference | None
    ) -> list[FramePose]:
        """Poses as files hold them: in metres east, north, up once their map is placed."""
        if found is None or not self._config.metric_map or not poses:
            return list(poses)
        placed = pose_in_other_world(
            np.array([pose.cam_from_world for pose in poses]), found.enu_from_map
        )
        return [replace(pose, cam_from_world=own) for pose, own in zip(poses, placed, strict=True)]

    def to_metres(self, reconstruction: pycolmap.Reconstruction, found: Georeference) -> bool:
        """Moves a private copy of a map to metres east, north, up, unless that is not wanted."""
        if self._config.metric_map:
            to_enu(reconstruction, found)
        return self._config.metric_map

    def rmse_m(self, sparse_map: SparseMap) -> float | None:
        """How far registered keyframes are from their GPS positions, wrong ones left out.

        None without enough of them.
        """
        if self._placement is not None:
            return self._placement.georeference.rmse_m
        known = {
            i: fix
            for i in sparse_map.registered_ids
            if (fix := self._position_of(sparse_map.keyframe(i))) is not None
        }
        poses = np.array([sparse_map.cam_from_world(i) for i in known]).reshape(-1, 3, 4)
        return gps_rmse_m(camera_center(poses), list(known.values()))

    def _place(self, sparse_map: SparseMap, *, max_error_ratio: float = 0.0) -> Placement | str:
        """Where the map lies now, or why there is no saying; "" where nothing was to be said.

        Args:
            sparse_map: the map.
            max_error_ratio: share of the positions' extent that one may be off, where that is more
                than the configured distance.
        """
        settings = self._config
        self._contradiction = ""
        keyframes = [sparse_map.keyframe(i) for i in sparse_map.registered_ids]
        known = [k for k in keyframes if self._position_of(k) is not None]
        if not settings.enabled or not (known or self._problems):
            return ""
        if len(known) < settings.min_fixes:
            words = (
                f"{len(known)} of its {len(keyframes)} keyframes have a position,"
                f" {settings.min_fixes} are needed"
            )
            problems = [
                f"{number} cannot be used: {problem}"
                for problem, number in self._problems.most_common()
            ]
            return "; ".join((words, *problems))
        frame_ids = tuple(keyframe.frame_id for keyframe in known)
        if max_error_ratio:
            extent_m = _extent_m(self._fixes(sparse_map, frame_ids))
            max_error_m = max(settings.max_error_m, max_error_ratio * extent_m)
            settings = settings.model_copy(update={"max_error_m": max_error_m})
        found = self._estimated(sparse_map, frame_ids, config=settings)
        if not isinstance(found, Georeference):
            logger.info("the map cannot be laid onto GPS: %s, %s", found.reason, found.detail)
            if found.reason is RefusalReason.CONTRADICTION:
                self._contradiction = found.detail
            return found.detail
        return Placement(
            georeference=found,
            frame_ids=frame_ids,
            names=tuple(keyframe.name for keyframe in known),
        )

    def _estimated(
        self, sparse_map: SparseMap, frame_ids: Sequence[FrameId], *, config: GeoreferenceConfig
    ) -> Georeference | GeoreferenceRefused:
        """The georeference, in whichever order of latitude and longitude the map bears out.

        Where nothing else tells the order, the wrong one mirrors the path, so that cameras would
        look at the sky, and stretches it.
        """
        cam_from_map = np.array([sparse_map.cam_from_world(i) for i in frame_ids])

        def estimate() -> Georeference | GeoreferenceRefused:
            return estimate_georeference(
                cam_from_map,
                self._fixes(sparse_map, frame_ids),
                config=config,
                origin=self._origin,
                seed=self._runtime.seed,
            )

        found = estimate()
        is_unsure = any(fix.is_order_unsure for fix in self._fixes(sparse_map, frame_ids))
        if not is_unsure or (self._is_order_known and isinstance(found, Georeference)):
            return found
        self._swap()
        other = estimate()
        if better_order(found, other) is other:
            self._is_order_known = True
            return other
        self._swap()
        better = better_order(found, other)
        self._is_order_known = isinstance(better, Georeference)
        return better

    def _swap(self) -> None:
        """Takes latitudes and longitudes of unsure order for each other, and the origin's."""
        self._is_swapped = not self._is_swapped
        if self._origin is not None:
            self._origin = swapped(self._origin)

    def _position_of(self, keyframe: Keyframe) -> GpsFix | None:
        """Positions beside the frames are known better later, when those after them came, too."""
        fix = keyframe.gps
        if fix is None or fix.is_provisional:
            fix = self._fix_at(keyframe.camera_key, keyframe.captured_at_s) or fix
        return swapped(fix) if fix is not None and self._is_swapped else fix

    def _fixes(self, sparse_map: SparseMap, frame_ids: Sequence[FrameId]) -> list[GpsFix]:
        fixes = [self._position_of(sparse_map.keyframe(i)) for i in frame_ids]
        return [fix for fix in fixes if fix is not None]

    def _placed_fixes(self, sparse_map: SparseMap, placement: Placement) -> list[GpsFix]:
        """Positions of the placed keyframes, without altitudes where these do not count."""
        known = self._fixes(sparse_map, placement.frame_ids)
        if placement.georeference.has_heights:
            return known
        return [replace(fix, altitude_m=None) for fix in known]

    def _has_moved(self, sparse_map: SparseMap, placement: Placement) -> bool:
        """Whether who goes by the last event has cameras elsewhere now, or knows of none."""
        if self._emitted is None:
            return True
        poses = np.array([sparse_map.cam_from_world(i) for i in placement.frame_ids])
        centers = camera_center(poses)
        former_m, now_m = (
            transform_points(one, centers)
            for one in (self._emitted, placement.georeference.enu_from_map)
        )
        return float(np.linalg.norm(now_m - former_m, axis=1).max()) > _MOVED_M

    def _emit_placement(self, placement: Placement) -> None:
        self._was_emitted = True
        self._emitted = placement.georeference.enu_from_map
        found, rejected = placement.georeference, placement.rejected_ids
        self._emit(
            Georeferenced(
                origin_latitude_deg=found.origin.latitude_deg,
                origin_longitude_deg=found.origin.longitude_deg,
                origin_altitude_m=found.origin.altitude_m,
                metres_per_map_unit=found.metres_per_map_unit,
                num_fixes=found.num_inliers,
                rmse_m=found.rmse_m,
                rejected_ids=rejected,
                enu_from_map=tuple(found.enu_from_map.ravel().tolist()),
            )
        )
        if rejected and rejected != self._warned_of:
            self._warned_of = rejected
            self._warn(placement)

    def _warn_of_problems(self, sparse_map: SparseMap) -> None:
        """Names keyframes whose positions cannot be used although others place the map."""
        keyframes = [sparse_map.keyframe(i) for i in sparse_map.registered_ids]
        for problem, number in self._problems.most_common():
            names = [one.name for one in keyframes if one.gps_problem == problem]
            listed = f": {_listed(names)}" if names else ""
            whose = "1 keyframe has" if number == 1 else f"{number} keyframes have"
            words = f"{whose} no GPS position that can be used, {problem}{listed}"
            self._emit(Warned(message=words))

    def _warn(self, placement: Placement) -> None:
        names = placement.rejected_names
        farthest_m = float(np.max(placement.georeference.residuals_m, initial=0.0))
        self._emit(
            Warned(
                message=f"the GPS positions of {len(names)} keyframes disagree with the map, by up"
                f" to {farthest_m:.0f} m, and are left out: {_listed(names)}"
            )
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")


def _place_of(fix: GpsFix) -> tuple[float, float, float | None]:
    return fix.latitude_deg, fix.longitude_deg, fix.altitude_m


def _extent_m(fixes: Sequence[GpsFix]) -> float:
    return float(np.linalg.norm(np.ptp(positions_in_enu(fixes, origin=fixes[0]), axis=0)))


def _log(outcome: PositionAdjustment) -> None:
    logger.info(
        "adjusted by %d positions: %s, %.3f to %.3f px, %.2f to %.2f m",
        outcome.num_positions,
        "accepted" if outcome.is_accepted else f"not accepted, {outcome.reason}",
        outcome.error_before_px,
        outcome.error_after_px,
        outcome.rmse_before_m,
        outcome.rmse_after_m,
    )
