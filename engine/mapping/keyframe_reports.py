"""Keyframe reports: what is emitted of keyframes as they come, match and register."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.events import (
    FrameRegistered,
    KeyframeAdded,
    PairsRejected,
    PairVerified,
    RegistrationFailed,
    Warned,
)
from engine.mapping.model.sparse_map import Registration, SparseMap
from engine.ports import EventSink
from engine.types import FrameId, Keyframe, RegistrationStatus, VerifiedPair

_MAX_NAMED = 3  # keyframes that one line names
_BLANK = "nothing to match: no keypoints, as in images that are black, blurred or all of one colour"


class KeyframeReports:
    """Emits what becomes of keyframes.

    Args:
        emit: takes the events.
    """

    def __init__(self, *, emit: EventSink) -> None:
        self._emit = emit
        self._blank_names: list[str] = []  # of keyframes without keypoints

    def report_added(self, keyframe: Keyframe) -> None:
        """Reports a keyframe that came, and warns of the first one without keypoints."""
        self._emit(
            KeyframeAdded(
                frame_id=keyframe.frame_id,
                camera_key=keyframe.camera_key,
                index=keyframe.index,
                name=keyframe.name,
                is_photo=keyframe.is_photo,
                captured_at_s=keyframe.captured_at_s,
                num_keypoints=len(keyframe.features),
            )
        )
        if not len(keyframe.features):
            self._blank_names.append(keyframe.name)
            if len(self._blank_names) == 1:
                self._emit(Warned(message=f"{keyframe.name}: {_BLANK}"))

    def report_pairs(self, pairs: Sequence[VerifiedPair]) -> None:
        """Reports pairs that were verified."""
        for pair in pairs:
            self._emit(
                PairVerified(
                    first=pair.pair.first,
                    second=pair.pair.second,
                    reason=pair.reason,
                    num_matches=pair.num_matches,
                    num_inliers=pair.num_inliers,
                )
            )

    def report_rejected(
        self, frame_id: FrameId, *, num_pairs: int, num_given_up_early: int
    ) -> None:
        """Reports how many pairs were matched for a keyframe and do not hold."""
        if num_pairs:
            self._emit(
                PairsRejected(
                    frame_id=frame_id,
                    num_pairs=num_pairs,
                    num_given_up_early=num_given_up_early,
                )
            )

    def report_registration(
        self,
        frame_id: FrameId,
        registration: Registration,
        *,
        sparse_map: SparseMap,
        started_s: float,
        is_retry: bool = False,
    ) -> None:
        """Reports that a keyframe was registered in the main map, or why not.

        Args:
            frame_id: the keyframe.
            registration: how it went.
            sparse_map: the main map, after it.
            started_s: when it began; monotonic.
            is_retry: whether the keyframe had been tried before.
        """
        if registration.status is not RegistrationStatus.REGISTERED:
            self._emit(
                RegistrationFailed(
                    frame_id=frame_id,
                    status=registration.status,
                    num_inliers=registration.num_inliers,
                    num_correspondences=registration.num_correspondences,
                )
            )
            return
        self._emit(
            FrameRegistered(
                frame_id=frame_id,
                num_inliers=registration.num_inliers,
                num_correspondences=registration.num_correspondences,
                num_registered=sparse_map.num_registered,
                num_points3D=sparse_map.num_points3D,
                is_retry=is_retry,
                elapsed_s=time.monotonic() - started_s,
            )
        )

    def report_blank(self) -> None:
        """Warns of all keyframes without keypoints, at the end, where there are several."""
        names = self._blank_names
        if len(names) > 1:
            listed = ", ".join(names[:_MAX_NAMED] + (["..."] if len(names) > _MAX_NAMED else []))
            self._emit(Warned(message=f"{len(names)} keyframes ({listed}): {_BLANK}"))
