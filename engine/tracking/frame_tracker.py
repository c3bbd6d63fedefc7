"""Frame tracker: follows a keyframe's keypoints by optical flow and decides on keyframes.

Decisions depend on image motion only, not on how far mapping got, but for whether a live run has a
map already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import cv2
import numpy as np

from engine.config import FrameTrackingConfig, TwoViewConfig
from engine.estimators.stationary_matches import verify_by_motion
from engine.estimators.two_view_geometry import PairVerifier
from engine.geometry import spread_over_image, usable_at
from engine.tracking.overlay_grid import OverlayGrid
from engine.types import (
    BoolArray,
    Features,
    Float32Array,
    Float64Array,
    Frame,
    ImagePair,
    Int64Array,
    Keyframe,
    PackedMask,
    PairMatches,
    TrackedFrame,
    Uint8Array,
)

_FLOW_WINDOW_PX = 11
_FLOW_LEVELS = 4
_FLOW_STOP = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 10, 0.03)  # iterations, px
_BORDER_PX = 2.0


class KeyframeReason(StrEnum):
    """Why a frame became a keyframe."""

    FIRST = "first"
    PHOTO = "photo"
    PARALLAX = "parallax"
    OVERLAP = "overlap"
    TIME = "time"
    CAMERA = "camera"  # another camera, or another image size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewKeyframe:
    """A keyframe and why it is one."""

    keyframe: Keyframe
    reason: KeyframeReason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrackingResult:
    """The keypoints of its camera's last keyframe in a frame, and whether a keyframe is due."""

    tracked: TrackedFrame | None  # None: there is nothing to follow
    fallback: TrackedFrame | None  # the same, followed from the keyframe before the last one
    due: KeyframeReason | None  # why it should become a keyframe; None: it need not


@dataclass(slots=True, kw_only=True, eq=False)
class _Following:
    """The keyframe being followed and where its keypoints are in the last frame."""

    keyframe: Keyframe
    grey: Uint8Array  # (h, w) of the last frame, working size
    mask: BoolArray | None  # (H, W) of the last frame, True where it is usable
    scale: Float64Array  # (2,) original px per working px
    keypoint_idx: Int64Array  # (M,)
    start_xy: Float32Array  # (M, 2) working px, in the keyframe, cv2 convention
    points_xy: Float32Array  # (M, 2) working px, in the last frame
    num_started: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BegunKeyframe:
    """A frame that is to become a keyframe, and what was followed in it."""

    frame: Frame
    reason: KeyframeReason
    former: _Following | None
    keeps_fallback: bool


class FrameTracker:
    """Turns the frames of one camera into keyframes and tracked frames, in order.

    A frame is followed first, which takes milliseconds and is enough to pose it; only then is it
    made a keyframe, if one is due.

    Args:
        config: thresholds.
        describe: detects and describes a keyframe's keypoints.
        is_sequence: False: every frame is a photo and becomes a keyframe.
        two_view: thresholds of what tells overlays from the world.
    """

    def __init__(
        self,
        config: FrameTrackingConfig,
        *,
        describe: Callable[[Frame], Features],
        is_sequence: bool,
        two_view: TwoViewConfig,
    ) -> None:
        self._config = config
        self._two_view = two_view
        self._overlays: OverlayGrid | None = None  # of the camera being followed
        self._describe = describe
        self._previous: _Following | None = None  # of the keyframe before
        self._photos = config.mode == "photos" or (config.mode == "auto" and not is_sequence)
        self._following: _Following | None = None
        self._mask: tuple[BoolArray, PackedMask] | None = None  # of the last keyframe with one

    def follow(
        self, frame: Frame, *, wants_fallback: bool = False, motion_share: float = 1.0
    ) -> TrackingResult:
        """Follows the keypoints into the next frame and decides whether a keyframe is due.

        Args:
            frame: the next frame.
            wants_fallback: also follow those of the keyframe before the last one. Frames can be
                posed by it while the last one is still being mapped.
            motion_share: of the motion, and of the time, after which a keyframe is due.
        """
        if self._photos:
            return TrackingResult(tracked=None, fallback=None, due=KeyframeReason.PHOTO)
        following = self._following
        if following is None:
            return TrackingResult(tracked=None, fallback=None, due=KeyframeReason.FIRST)
        if not _same_camera(following.keyframe, frame):
            return TrackingResult(tracked=None, fallback=None, due=KeyframeReason.CAMERA)
        grey, _ = self._working_image(frame)
        self._follow(following, grey, mask=frame.mask)
        return TrackingResult(
            tracked=_tracked(frame, following),
            fallback=self._fallback(frame, grey, is_wanted=wants_fallback),
            due=self._keyframe_due(following, frame, share=motion_share),
        )

    def make_keyframe(self, frame: Frame, reason: KeyframeReason) -> NewKeyframe | None:
        """Makes the frame followed last a keyframe, whose keypoints are followed from now on.

        A frame without texture could not be followed itself: it never replaces another keyframe of
        its camera, and stays tracked with what is left of that one's points.

        Returns:
            None for such a frame.

        Raises:
            InferenceError: the frame cannot be described.
        """
        return self.end_keyframe(self.begin_keyframe(frame, reason), self.describe_keyframe(frame))

    def begin_keyframe(
        self, frame: Frame, reason: KeyframeReason, *, keeps_fallback: bool = False
    ) -> BegunKeyframe:
        """Keeps what is followed in the frame followed last, which is to become a keyframe.

        Frames may be followed until `end_keyframe`, from the keyframe before.

        Args:
            frame: the frame.
            reason: why it becomes one.
            keeps_fallback: the keyframe before it is still being mapped: an earlier one, where it
                is followed, stays the fallback.
        """
        former = None if self._following is None else replace(self._following)
        return BegunKeyframe(
            frame=frame, reason=reason, former=former, keeps_fallback=keeps_fallback
        )

    def describe_keyframe(self, frame: Frame) -> Keyframe:
        """Describes a frame; on any thread, beside frames that are followed.

        Raises:
            InferenceError: the frame cannot be described.
        """
        return self._keyframe(frame)

    def end_keyframe(self, begun: BegunKeyframe, keyframe: Keyframe) -> NewKeyframe | None:
        """Follows a keyframe from now on, caught up to the frame followed last.

        Returns:
            None for a frame without texture, as `make_keyframe`.
        """
        frame, reason, former = begun.frame, begun.reason, begun.former
        if self._photos:
            return NewKeyframe(keyframe=keyframe, reason=reason)
        replaces = former is not None and _same_camera(former.keyframe, frame)
        has_texture = len(keyframe.features.fixed_rows) >= self._config.min_tracked_points
        if replaces and not has_texture:
            return None
        latest = self._following
        if former is not None and (latest is None or latest.keyframe is not former.keyframe):
            return NewKeyframe(keyframe=keyframe, reason=reason)  # another one is followed by now
        earlier = self._previous
        self._start(frame, keyframe, reason=reason, former=former)
        if begun.keeps_fallback and earlier is not None and self._previous is not None:
            self._previous = earlier
        if former is not None and latest is not None and latest.grey is not former.grey:
            assert self._following is not None
            self._follow(self._following, latest.grey, mask=latest.mask)
        return NewKeyframe(keyframe=keyframe, reason=reason)

    def _fallback(self, frame: Frame, grey: Uint8Array, *, is_wanted: bool) -> TrackedFrame | None:
        """Follows the keyframe before the last one until it is not wanted for the first time."""
        if self._previous is None or not is_wanted:
            self._previous = None
            return None
        self._follow(self._previous, grey, mask=frame.mask)
        return _tracked(frame, self._previous)

    def _follow(self, following: _Following, grey: Uint8Array, *, mask: BoolArray | None) -> None:
        """Moves the followed keypoints on to the next image; drops those that got lost.

        Those that come under the image's mask are lost, too.
        """
        if len(following.points_xy):
            moved, found, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]
                following.grey,
                grey,
                following.points_xy.reshape(-1, 1, 2),
                None,  # no first guess; the stub asks for one
                winSize=(_FLOW_WINDOW_PX, _FLOW_WINDOW_PX),
                maxLevel=_FLOW_LEVELS,
                criteria=_FLOW_STOP,
            )
            points_xy = moved.reshape(-1, 2)
            height, width = grey.shape
            inside = (points_xy >= _BORDER_PX).all(axis=1) & (
                points_xy < np.array([width, height]) - _BORDER_PX
            ).all(axis=1)
            kept = np.flatnonzero(inside & (found.ravel() == 1))
            if mask is not None:
                kept = kept[usable_at(mask, _original_xy(points_xy[kept], following.scale))]
            following.keypoint_idx = following.keypoint_idx[kept]
            following.start_xy = following.start_xy[kept]
            following.points_xy = points_xy[kept]
        following.grey, following.mask = grey, mask

    def _keyframe_due(
        self, following: _Following, frame: Frame, *, share: float
    ) -> KeyframeReason | None:
        num_left = len(following.points_xy)
        config = self._config
        overlap = num_left / max(1, following.num_started)
        if num_left < config.min_tracked_points or overlap < config.min_overlap_ratio:
            return KeyframeReason.OVERLAP
        diagonal_px = float(np.hypot(*following.grey.shape))
        moved_px = np.linalg.norm(following.points_xy - following.start_xy, axis=1)
        flow_ratio = float(np.median(moved_px)) / diagonal_px
        if flow_ratio > share * config.max_flow_ratio:
            return KeyframeReason.PARALLAX
        gap_s = frame.captured_at_s - following.keyframe.captured_at_s
        if 0 < share * config.max_gap_s < gap_s and flow_ratio > config.min_flow_ratio:
            return KeyframeReason.TIME
        return None

    def _start(
        self, frame: Frame, keyframe: Keyframe, *, reason: KeyframeReason, former: _Following | None
    ) -> None:
        """Starts to follow a keyframe; ``former`` is the one before, as it was in its frame."""
        grey, scale = self._working_image(frame)
        is_new_camera = reason in (KeyframeReason.FIRST, KeyframeReason.CAMERA)
        if is_new_camera or self._overlays is None:
            self._overlays = OverlayGrid((frame.width, frame.height))
        elif former is not None and self._two_view.find_overlays:
            self._find_overlays(former, frame, grid=self._overlays)
        fixed = keyframe.features.fixed_rows  # others may move, or show nothing to follow
        in_world = fixed[~self._overlays.covers(keyframe.features.keypoints_xy[fixed])]
        if len(in_world) >= self._config.min_tracked_points:
            fixed = in_world
        chosen = fixed[
            spread_over_image(
                keyframe.features.keypoints_xy[fixed],
                size=(frame.width, frame.height),
                limit=self._config.max_tracked_points,
            )
        ]
        start_xy = (keyframe.features.keypoints_xy[chosen] / scale - 0.5).astype(np.float32)
        self._previous = None if reason is KeyframeReason.CAMERA else self._following
        self._following = _Following(
            keyframe=keyframe,
            grey=grey,
            mask=frame.mask,
            scale=scale,
            keypoint_idx=chosen,
            start_xy=start_xy,
            points_xy=start_xy,
            num_started=len(chosen),
        )

    def _find_overlays(self, following: _Following, frame: Frame, *, grid: OverlayGrid) -> None:
        """Learns which points stayed in the image since the last keyframe while others moved.

        They are not followed from the next keyframe: they would hide that the camera moves.
        """
        rows = following.keypoint_idx
        matches = PairMatches(
            pair=ImagePair.of(following.keyframe.frame_id, frame.frame_id),
            matches_idx=np.column_stack([rows, rows]),
            points1_xy=_original_xy(following.start_xy, following.scale),
            points2_xy=_original_xy(following.points_xy, following.scale),
            confidence=np.ones(len(rows), np.float32),
        )
        verifier = PairVerifier(image_size=(frame.width, frame.height), config=self._two_view)
        found = verify_by_motion(matches, verifier=verifier)
        if found is not None:
            grid.add(matches.pair, matches, found[1])
            grid.update_cover()

    def _keyframe(self, frame: Frame) -> Keyframe:
        return Keyframe(
            frame_id=frame.frame_id,
            camera_key=frame.camera_key,
            index=frame.index,
            name=frame.name,
            width=frame.width,
            height=frame.height,
            captured_at_s=frame.captured_at_s,
            received_at_s=frame.received_at_s,
            features=self._describe(frame),
            gps=frame.gps,
            gps_problem=frame.gps_problem,
            intrinsics_prior=frame.intrinsics_prior,
            mask=self._packed(frame.mask),
            is_photo=self._photos,
        )

    def _packed(self, mask: BoolArray | None) -> PackedMask | None:
        """A frame's mask as its keyframe keeps it; frames that share one share that, too."""
        if mask is None:
            return None
        known = self._mask  # another thread may replace it
        if known is None or known[0] is not mask:
            self._mask = known = mask, PackedMask.of(mask)
        return known[1]

    def _working_image(self, frame: Frame) -> tuple[Uint8Array, Float64Array]:
        """The grey image flow runs on, and original px per working px (2,)."""
        grey = np.asarray(cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2GRAY), np.uint8)
        ratio = self._config.working_edge_px / max(frame.width, frame.height)
        if ratio >= 1.0:
            return grey, np.ones(2)
        size = (max(1, round(frame.width * ratio)), max(1, round(frame.height * ratio)))
        small = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
        return small, np.array([frame.width / size[0], frame.height / size[1]])


def _tracked(frame: Frame, following: _Following) -> TrackedFrame:
    return TrackedFrame(
        frame_id=frame.frame_id,
        keyframe_id=following.keyframe.frame_id,
        index=frame.index,
        captured_at_s=frame.captured_at_s,
        received_at_s=frame.received_at_s,
        keypoint_idx=following.keypoint_idx,
        points_xy=_original_xy(following.points_xy, following.scale),
    )


def _original_xy(working_xy: Float32Array, scale: Float64Array) -> Float64Array:
    """Points (M, 2) of the image that flow runs on, as cv2 counts, in px of the original one."""
    # cv2 puts (0, 0) at the centre of the first pixel, COLMAP at its corner.
    return (working_xy.astype(np.float64) + 0.5) * scale


def _same_camera(keyframe: Keyframe, frame: Frame) -> bool:
    size = (keyframe.width, keyframe.height)
    return keyframe.camera_key == frame.camera_key and size == (frame.width, frame.height)
