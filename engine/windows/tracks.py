"""Window tracks: tracks through a window of keyframes, from the verified pairs among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.types import NO_ROW, FrameId, Int64Array, VerifiedPair


def tracks_through(
    frame_ids: Sequence[FrameId],
    pairs: Sequence[VerifiedPair],
    *,
    min_length: int = 2,
) -> Int64Array:
    """Connected components of matched keypoints, as a row of each keyframe's table.

    Where a track has two keypoints of one keyframe, one of them is wrong and it is unknown which:
    the track leaves that keyframe out.

    Args:
        frame_ids: the S keyframes of the window.
        pairs: verified pairs; those with another keyframe are ignored.
        min_length: keyframes that a track must have.

    Returns:
        (N, S) rows, NO_ROW where a track lacks a keyframe; in a fixed order.
    """
    place = {frame_id: idx for idx, frame_id in enumerate(frame_ids)}
    inside = [p for p in pairs if p.pair.first in place and p.pair.second in place]
    if not inside:
        return np.empty((0, len(frame_ids)), np.int64)
    links = np.concatenate(
        [
            np.column_stack(
                [
                    np.full(verified.num_inliers, place[verified.pair.first]),
                    verified.inlier_matches_idx[:, 0],
                    np.full(verified.num_inliers, place[verified.pair.second]),
                    verified.inlier_matches_idx[:, 1],
                ]
            )
            for verified in inside
        ]
    ).astype(np.int64)
    num_rows = int(links[:, 1::2].max()) + 1
    keypoints, ends = np.unique(links[:, ::2] * num_rows + links[:, 1::2], return_inverse=True)
    component = _components(ends.reshape(-1, 2), num=len(keypoints))
    return _tracks(
        component, keypoints // num_rows, keypoints % num_rows, len(frame_ids), min_length
    )


def _components(links: Int64Array, *, num: int) -> Int64Array:
    """The smallest member of each of ``num`` nodes' connected component, (num,)."""
    label = np.arange(num)
    while True:
        smallest = np.minimum(label[links[:, 0]], label[links[:, 1]])
        before = label.copy()
        for side in range(2):
            np.minimum.at(label, links[:, side], smallest)
        label = np.minimum(label, label[label])
        if np.array_equal(label, before):
            return label


def _tracks(
    component: Int64Array, frame_idx: Int64Array, row: Int64Array, num_frames: int, min_length: int
) -> Int64Array:
    """Components of nodes as (N, S) rows; nodes that share component and frame are left out."""
    _, track = np.unique(component, return_inverse=True)
    num_keypoints = np.zeros((int(track.max()) + 1, num_frames), np.int64)
    np.add.at(num_keypoints, (track, frame_idx), 1)
    rows = np.full(num_keypoints.shape, NO_ROW)
    rows[track, frame_idx] = row
    rows[num_keypoints > 1] = NO_ROW
    return np.asarray(rows[(rows != NO_ROW).sum(axis=1) >= min_length])
