"""The figures of a run, by hand from its events."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.events import (
    BundleAdjusted,
    FaultKind,
    FaultOccurred,
    FrameDropped,
    FramePosed,
    FrameReceived,
    KeyframeAdded,
    LoopClosed,
    MapInitialized,
    OverlayFound,
    PairsRejected,
    PairVerified,
    RunPart,
    SnapshotWritten,
    SourceChanged,
    SourceOpened,
    Warned,
    WeakPairsMatched,
    WindowPurpose,
    WindowSolved,
    WindowVerdict,
)
from engine.mapping.steps import MapFigures, OneMapFigures
from engine.output.load import LoadStatistics
from engine.output.statistics import RunStatistics, summary_figures
from engine.types import (
    DropReason,
    FrameId,
    LeftOut,
    LostStretch,
    MapCounts,
    PairReason,
    SourceState,
    Verdict,
    VerdictLevel,
    VerdictReason,
)


def received(number: int) -> FrameReceived:
    return FrameReceived(
        at_s=0.1 * number, frame_id=FrameId(number), index=number - 1, captured_at_s=0.0
    )


def dropped(reason: DropReason, *, frame_id: FrameId | None = None) -> FrameDropped:
    return FrameDropped(
        at_s=1.0,
        frame_id=frame_id,
        source="s",
        index=0,
        name="n",
        captured_at_s=0.0,
        reason=reason,
        detail="",
    )


def opened(*, is_live: bool) -> SourceOpened:
    return SourceOpened(source="a", address="a", prefix="", is_live=is_live, fingerprint="")


def posed(number: int, *, latency_s: float, is_keyframe: bool) -> FramePosed:
    return FramePosed(
        camera_key="camera",
        at_s=1.0,
        frame_id=FrameId(number),
        captured_at_s=0.0,
        cam_center_in_world=(0.0, 0.0, 0.0),
        world_from_cam_quat_xyzw=(0.0, 0.0, 0.0, 1.0),
        is_first=True,
        is_keyframe=is_keyframe,
        latency_s=latency_s,
    )


def initialized(at_s: float) -> MapInitialized:
    return MapInitialized(
        at_s=at_s, first=FrameId(1), second=FrameId(2), num_points3D=100, attempt=1
    )


def test_frames_dropped_for_overload_have_their_times_by_the_prefix_of_their_cameras() -> None:
    statistics = RunStatistics()
    statistics(replace(opened(is_live=True), source="s", prefix="source2"))
    dropped_then = replace(dropped(DropReason.OVERLOAD), captured_at_s=4.0, num_frames=2)
    statistics(dropped_then)
    statistics(replace(dropped_then, source="other"))
    statistics(dropped(DropReason.TOO_SMALL))
    times_s = statistics.overload_at_s()
    assert {prefix: list(each) for prefix, each in times_s.items()} == {
        "source2": [4.0, 4.0],
        "": [4.0, 4.0],
    }


def test_a_run_without_events_has_every_figure() -> None:
    figures = RunStatistics().figures()
    assert figures == {
        "frames_received": 0,
        "frames_dropped": {},
        "left_out": [],
        "keyframes": 0,
        "time_to_first_map_s": None,
        "latency_ms": {
            "keyframes": {"p50": None, "p95": None, "max": None},
            "frames": {"p50": None, "p95": None, "max": None},
        },
        "pairs": {"verified": 0, "rejected": 0, "of_these_given_up_early": 0},
        "window_solves": 0,
        "windows_merged": 0,
        "window_cpu_s": 0.0,
        "global_ba_runs": 0,
        "overlays": {},
        "loops_closed": 0,
        "second_matcher": {"pairs": 0, "pairs_verified": 0, "pairs_left_out": 0},
        "snapshots_written": 0,
        "faults": {},
    }


def test_pairs_are_counted_by_what_became_of_them() -> None:
    statistics = RunStatistics()
    for num_pairs, num_given_up_early in ((5, 3), (2, 0)):
        statistics(
            PairsRejected(
                at_s=1.0,
                frame_id=FrameId(2),
                num_pairs=num_pairs,
                num_given_up_early=num_given_up_early,
            )
        )
    assert statistics.figures()["pairs"] == {
        "verified": 0,
        "rejected": 7,
        "of_these_given_up_early": 3,
    }


@pytest.mark.parametrize("reason", DropReason)
def test_a_frame_dropped_after_it_arrived_is_received_once(reason: DropReason) -> None:
    statistics = RunStatistics()
    for number in (1, 2, 3):
        statistics(received(number))
    statistics(dropped(reason, frame_id=FrameId(3)))

    assert statistics.figures()["frames_received"] == 3
    assert statistics.figures()["frames_dropped"] == {reason.value: 1}


@pytest.mark.parametrize("reason", DropReason)
def test_a_frame_that_its_source_rejected_is_received_too(reason: DropReason) -> None:
    statistics = RunStatistics()
    statistics(received(1))
    statistics(dropped(reason))
    statistics(dropped(reason))

    assert statistics.figures()["frames_received"] == 3
    assert statistics.figures()["frames_dropped"] == {reason.value: 2}


def test_drops_are_counted_by_reason_in_a_fixed_order() -> None:
    statistics = RunStatistics()
    for reason in (DropReason.UNREADABLE, DropReason.DUPLICATE, DropReason.UNREADABLE):
        statistics(dropped(reason))
    counts = statistics.figures()["frames_dropped"]
    assert list(counts.items()) == [("duplicate", 1), ("unreadable", 2)]


def test_files_left_out_are_named_by_source_kind_and_reason_as_reported_last() -> None:
    statistics = RunStatistics()
    for number in (3, 4):  # a run that is resumed reports them again
        left_out = LeftOut(kind=".mov", reason="a video", num_files=number, example="a.mov")
        statistics(
            SourceChanged(
                at_s=0.0,
                source="photos",
                state=SourceState.CONNECTED,
                detail="",
                left_out=(left_out,),
            )
        )
    assert statistics.figures()["left_out"] == [
        {
            "source": "photos",
            "kind": ".mov",
            "reason": "a video",
            "num_files": 4,
            "example": "a.mov",
            "is_missed": True,
        }
    ]


def test_facts_are_counted_by_their_kind() -> None:
    statistics = RunStatistics()
    for number in (1, 2):
        statistics(
            KeyframeAdded(
                camera_key="camera",
                at_s=0.0,
                frame_id=FrameId(number),
                index=0,
                is_photo=False,
                name="n",
                captured_at_s=0.0,
                num_keypoints=9,
            )
        )
    statistics(LoopClosed(at_s=0.0, first=FrameId(1), second=FrameId(2), num_inliers=50))
    statistics(
        BundleAdjusted(
            at_s=0.0,
            num_keyframes=2,
            num_points3D=9,
            reprojection_error_before_px=1.0,
            reprojection_error_after_px=0.5,
            keyframes_added_meanwhile=0,
            elapsed_s=0.1,
        )
    )
    for sequence in (1, 2, 3):
        statistics(
            SnapshotWritten(
                at_s=0.0,
                sequence=sequence,
                path="runs/x",
                num_keyframes=2,
                num_points3D=9,
                elapsed_s=0.1,
            )
        )
    statistics(Warned(at_s=0.0, message="counted nowhere"))
    figures = statistics.figures()

    assert figures["keyframes"] == 2
    assert figures["loops_closed"] == 1
    assert figures["global_ba_runs"] == 1
    assert figures["snapshots_written"] == 3


def test_the_time_to_the_first_map_is_not_that_of_a_better_one_later() -> None:
    statistics = RunStatistics()
    statistics(initialized(2.5))
    statistics(initialized(9.0))
    assert statistics.figures()["time_to_first_map_s"] == 2.5


def test_latencies_are_percentiles_between_the_nearest_two() -> None:
    statistics = RunStatistics()
    statistics(opened(is_live=True))
    for number in range(1, 22):  # 10, 20, ..., 210 ms: 20 gaps
        statistics(posed(number, latency_s=0.01 * number, is_keyframe=number in (1, 3)))
    latency_ms = statistics.figures()["latency_ms"]

    # Of 21 frames the median is the 11th, and 95 % lie 19 gaps above the least.
    assert latency_ms["frames"] == {"p50": 110.0, "p95": 200.0, "max": 210.0}
    # Of the keyframes' 10 and 30 ms, the median is half way and 95 % at 19 of 20 parts.
    assert latency_ms["keyframes"] == {"p50": 20.0, "p95": 29.0, "max": 30.0}


def test_the_figures_are_json_with_a_decimal_at_most_in_latencies() -> None:
    statistics = RunStatistics()
    statistics(opened(is_live=True))
    statistics(posed(1, latency_s=1.0 / 3.0, is_keyframe=True))
    figures = json.loads(json.dumps(statistics.figures(), allow_nan=False))
    assert figures["latency_ms"]["frames"] == {"p50": 333.3, "p95": 333.3, "max": 333.3}


def test_files_wait_so_their_latency_is_no_figure() -> None:
    statistics = RunStatistics()
    statistics(opened(is_live=False))
    statistics(posed(1, latency_s=32.5, is_keyframe=True))
    nothing = {"p50": None, "p95": None, "max": None}
    assert statistics.figures()["latency_ms"] == {"keyframes": nothing, "frames": nothing}


def window(verdict: WindowVerdict, *, cpu_s: float) -> WindowSolved:
    return WindowSolved(
        at_s=1.0,
        purpose=WindowPurpose.RESOLVE,
        verdict=verdict,
        reason="",
        keyframe_ids=(FrameId(1), FrameId(2)),
        num_registered=0,
        num_observations_before=1,
        num_observations_after=2,
        error_before_px=0.5,
        error_after_px=0.4,
        moved_map=0.0,
        elapsed_s=1.0,
        cpu_s=cpu_s,
    )


def test_windows_are_counted_with_what_they_took() -> None:
    statistics = RunStatistics()
    statistics(window(WindowVerdict.MERGED, cpu_s=0.25))
    statistics(window(WindowVerdict.NOT_BETTER, cpu_s=0.5))
    figures = statistics.figures()
    assert figures["window_solves"] == 2
    assert figures["windows_merged"] == 1
    assert figures["window_cpu_s"] == 0.75


def one_map(num_registered: int, *, name: str) -> OneMapFigures:
    return OneMapFigures(
        num_registered=num_registered,
        num_points3D=70,
        mean_reprojection_error_px=0.5,
        first_name=f"first {name}.jpg",
        last_name=f"last {name}.jpg",
        num_posed_frames=20,
        is_georeferenced=False,
    )


def test_the_summary_holds_the_figures_of_the_run_and_of_its_map() -> None:
    statistics = RunStatistics()
    statistics(received(1))
    figures = MapFigures(
        counts=MapCounts(num_keyframes=9, num_registered=8),
        num_points3D=700,
        num_observations=2800,
        mean_track_length=4.0,
        mean_reprojection_error_px=0.5,
        num_interpolated_frames=3,
        num_frames_without_pose=4,
        placement=None,
        gps_rmse_m=1.5,
        metres_per_map_unit=None,
        maps=(one_map(8, name="a"), one_map(5, name="b")),
        lost=(
            LostStretch(
                camera_key="camera",
                frame_ids=(FrameId(4), FrameId(5)),
                begins_at_s=0.3,
                ends_at_s=None,
                num_missing=1,
                num_apart=1,
            ),
        ),
        verdict=Verdict(
            level=VerdictLevel.DOUBTFUL,
            reasons=(
                VerdictReason(
                    kind="components",
                    level=VerdictLevel.DOUBTFUL,
                    sentence="nothing joins two parts of the scene",
                    frame_ids=(FrameId(3),),
                ),
            ),
        ),
    )
    summary = summary_figures(
        statistics,
        figures,
        LoadStatistics(),
        wall_s=12.0,
        stopped_by="signal",
        is_metric=False,
    )
    assert statistics.figures().items() <= summary.items()
    of_map = {
        "registered_keyframes": 8,
        "num_points3D": 700,
        "num_observations": 2800,
        "mean_track_length": 4.0,
        "mean_reprojection_error_px": 0.5,
        "frames_interpolated": 3,
        "frames_without_pose": 4,
        "components": 2,
        "georeferenced": False,
        "georeference": None,
        "not_georeferenced": "",
        "gps_rmse_m": 1.5,
        "unit": "map units",
        "metres_per_map_unit": None,
    }
    assert of_map.items() <= summary.items()
    assert (summary["wall_s"], summary["stopped_by"]) == (12.0, "signal")
    assert [one["registered_keyframes"] for one in summary["maps"]] == [8, 5]
    assert summary["maps"][1]["first_keyframe"] == "first b.jpg"
    assert summary["verdict"]["level"] == "doubtful"
    (reason,) = summary["verdict"]["reasons"]
    assert (reason["kind"], reason["frame_ids"]) == ("components", [3])
    (lost,) = summary["lost"]
    assert (lost["frame_ids"], lost["num_missing"], lost["ends_at_s"]) == ([4, 5], 1, None)
    assert summary["cpu_s"] > 0.0
    json.dumps(summary, allow_nan=False)


def test_the_overlays_of_each_camera_are_those_found_last() -> None:
    statistics = RunStatistics()
    assert statistics.figures()["overlays"] == {}
    for camera_key, share in (("front", 0.01), ("back", 0.02), ("front", 0.03)):
        statistics(
            OverlayFound(
                at_s=1.0,
                camera_key=camera_key,
                share=share,
                boxes=((1, 2, 3, 4),),
                num_keyframes=5,
            )
        )
    assert statistics.figures()["overlays"] == {
        "back": {"share": 0.02, "boxes_px": [[1, 2, 3, 4]]},
        "front": {"share": 0.03, "boxes_px": [[1, 2, 3, 4]]},
    }


def test_faults_are_counted_by_part_and_kind() -> None:
    statistics = RunStatistics()
    for part, kind in [
        (RunPart.MATCHING, FaultKind.RAISED),
        (RunPart.MATCHING, FaultKind.RAISED),
        (RunPart.VIEW, FaultKind.HUNG),
    ]:
        statistics(FaultOccurred(part=part, kind=kind, detail="", consequence="", num_faults=1))
    assert statistics.figures()["faults"] == {"a view: hung": 1, "matching: raised": 2}


def test_pairs_of_a_second_matcher_are_counted_apart() -> None:
    statistics = RunStatistics()
    for reason in (PairReason.TEMPORAL, PairReason.SECOND, PairReason.SECOND):
        statistics(
            PairVerified(
                at_s=1.0,
                first=FrameId(1),
                second=FrameId(2),
                reason=reason,
                num_matches=9,
                num_inliers=8,
            )
        )
    for num_pairs, num_left_out in ((4, 1), (2, 0)):
        statistics(
            WeakPairsMatched(
                at_s=1.0, matcher="mast3r", num_pairs=num_pairs, num_left_out=num_left_out
            )
        )
    counted = statistics.figures()["second_matcher"]
    assert counted == {"pairs": 6, "pairs_verified": 2, "pairs_left_out": 1}
