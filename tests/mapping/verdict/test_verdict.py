"""Verdicts: good maps are good, evidence against a map is said in sentences that name places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.frame_names import clock, named, stretches
from engine.mapping.model.calibration_control import WantedFocal
from engine.mapping.verdict.map_evidence import MapEvidence, PairsEvidence, PlaceEvidence
from engine.mapping.verdict.part_evidence import ContestedPart, PartsEvidence, ThinJoint, TornPart
from engine.mapping.verdict.patch_evidence import HeldByPatch
from engine.mapping.verdict.placed_later import with_advice_of_place
from engine.mapping.verdict.verdict import judge
from engine.types import (
    CalibrationOrigin,
    CameraFigures,
    Contradiction,
    Features,
    FrameId,
    ImagePair,
    IntrinsicsPrior,
    Keyframe,
    PackedMask,
    PoseGap,
    TurningStretch,
    VerdictLevel,
    VerdictReason,
)

NUM = 20
GOOD, DOUBTFUL, WRONG = VerdictLevel.GOOD, VerdictLevel.DOUBTFUL, VerdictLevel.WRONG


def keyframe(
    number: int, *, is_photo: bool = False, num_keypoints: int = 400, **options: Any
) -> Keyframe:
    """Keyframe ``number``, frame ``10 * number`` of its source, a second after the one before."""
    frame_id = FrameId(number)
    return Keyframe(
        frame_id=frame_id,
        camera_key=options.pop("camera_key", "camera"),
        index=10 * number,
        name=f"{number:03d}.jpg",
        width=640,
        height=480,
        captured_at_s=float(number),
        received_at_s=0.0,
        features=Features(
            frame_id=frame_id,
            keypoints_xy=np.ones((num_keypoints, 2)),
            descriptors=np.zeros((num_keypoints, 0), np.uint8),
            scales=np.ones(num_keypoints, np.float32),
            colors=np.zeros((num_keypoints, 3), np.uint8),
        ),
        is_photo=is_photo,
        **options,
    )


def place(one: Keyframe, **options: Any) -> PlaceEvidence:
    """An undisputed place."""
    known: dict[str, Any] = {
        "num_points": 200,
        "num_pairs": 6,
        "disputed_ratio": 0.05,
        "parallax_px": 40.0,
    }
    known |= options
    contradict = known["disputed_ratio"]
    return PlaceEvidence(
        keyframe=one,
        **(
            {
                "num_confirming": known["num_pairs"] * (1.0 - contradict),
                "proven_disputed_ratio": contradict,
            }
            | known
        ),
    )


def evidence(
    *,
    num: int = NUM,
    is_photo: bool = False,
    missing: Sequence[int] = (),
    places: dict[int, dict[str, Any]] | None = None,
    **options: Any,
) -> MapEvidence:
    """What is known of a good map, but for what is given: ``places`` by number."""
    keyframes = tuple(keyframe(number, is_photo=is_photo) for number in range(1, num + 1))
    given = places or {}
    known: dict[str, Any] = {"pairs": PairsEvidence(num_pairs=60, disputed_ratio=0.05)}
    return MapEvidence(
        keyframes=keyframes,
        places=tuple(
            place(one, **given.get(one.frame_id, {}))
            for one in keyframes
            if one.frame_id not in missing
        ),
        num_verified_pairs=100,
        **(known | options),
    )


def camera(**options: Any) -> CameraFigures:
    """A camera that nobody calibrated, of which the images say enough."""
    known: dict[str, Any] = {
        "camera_key": "camera",
        "model": "SIMPLE_RADIAL",
        "width": 640,
        "height": 480,
        "params": (500.0, 320.0, 240.0, 0.0),
        "focal_px": 500.0,
        "fov_deg": 65.0,
        "num_registered": NUM,
        "origin": CalibrationOrigin.ASSUMED,
        "prior_focal_px": 544.0,
        "prior_sigma_ratio": 0.7,
        "observed_sigma_ratio": 0.02,
        "is_constant": False,
        "is_held": False,
        "doubts": (),
        "doubt_kinds": (),
    }
    return CameraFigures(**(known | options))


def only_reason(given: MapEvidence) -> VerdictReason:
    (reason,) = judge(given).reasons
    return reason


def test_a_camera_of_few_images_is_doubted_with_their_names() -> None:
    given = evidence(
        is_photo=True,
        cameras=(camera(), camera(camera_key="phone", num_registered=2)),
    )
    places = tuple(
        replace(one, keyframe=replace(one.keyframe, calibration_key="phone"))
        if one.keyframe.frame_id in (3, 7)
        else one
        for one in given.places
    )
    (reason,) = judge(replace(given, places=places)).reasons
    assert reason.kind == "camera_few_images"
    assert (
        "rests on 2 of its images (photo 003.jpg and photo 007.jpg); take more" in reason.sentence
    )
    assert reason.frame_ids == (3, 7)


def test_a_map_that_nothing_speaks_against_is_good() -> None:
    verdict = judge(evidence(cameras=(camera(),), num_positions=18, num_rejected_positions=2))
    assert verdict.level is GOOD
    assert verdict.reasons == ()


@pytest.mark.parametrize(
    ("ratio", "level"), [(0.15, GOOD), (0.25, DOUBTFUL), (0.39, DOUBTFUL), (0.45, WRONG)]
)
def test_the_more_pairs_contradict_a_map_the_worse_it_is(ratio: float, level: VerdictLevel) -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=ratio)
    assert judge(evidence(pairs=pairs)).level is level


def test_contradicting_pairs_name_the_place_and_the_lens_that_nobody_knows() -> None:
    places = {number: {"disputed_ratio": 0.7} for number in (5, 6, 7)}
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.3, disputed_inlying_ratio=0.8)
    reason = only_reason(evidence(pairs=pairs, places=places, cameras=(camera(),)))
    assert reason.kind == "pairs_contradict"
    assert "frames 50 to 70" in reason.sentence
    assert "zoomed" in reason.sentence
    assert "500 px" in reason.sentence
    assert reason.frame_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("sigma_ratio", "words"),
    [(0.09, "(500 px, give or take 9%)"), (None, "(500 px)")],
)
def test_a_short_motion_is_suspected_before_a_zoom_where_the_focal_length_is_badly_known(
    sigma_ratio: float | None, words: str
) -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.2, disputed_inlying_ratio=0.8)
    unsure = camera(observed_sigma_ratio=sigma_ratio)
    reason = only_reason(evidence(pairs=pairs, cameras=(unsure,)))
    assert reason.level is DOUBTFUL
    assert f"too little motion to know the focal length {words}: film longer" in reason.sentence


def test_a_given_calibration_is_suspected_as_such() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.3, disputed_inlying_ratio=0.8)
    known = camera(origin=CalibrationOrigin.CONFIGURED)
    assert (
        "calibration that was given"
        in only_reason(evidence(pairs=pairs, cameras=(known,))).sentence
    )


def test_pairs_that_fit_nowhere_near_are_of_things_that_look_alike_or_move() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.3, disputed_inlying_ratio=0.2)
    sentence = only_reason(evidence(pairs=pairs, cameras=(camera(),))).sentence
    assert "look alike" in sentence
    assert "zoomed" not in sentence


def test_contradicting_pairs_that_nothing_proves_do_not_make_a_map_wrong() -> None:
    places = {
        number: {"disputed_ratio": 0.55, "proven_disputed_ratio": 0.0} for number in range(1, 8)
    }
    assert judge(evidence(places=places)).level is DOUBTFUL


def test_where_pairs_contradict_each_place_must_be_proven() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.1, is_contested=True)
    assert judge(evidence(pairs=pairs)).level is GOOD
    reason = only_reason(evidence(pairs=pairs, places={9: {"num_confirming": 1.0}}))
    assert (reason.kind, reason.level) == ("unconfirmed", DOUBTFUL)
    assert "frame 90" in reason.sentence


@pytest.mark.parametrize(
    ("change", "sigma", "level"), [(0.09, 0.03, DOUBTFUL), (0.09, 0.08, GOOD), (0.02, 0.005, GOOD)]
)
def test_a_given_focal_length_that_the_images_contradict_is_doubted(
    change: float, sigma: float, level: VerdictLevel
) -> None:
    known = camera(origin=CalibrationOrigin.CONFIGURED, is_constant=True)
    wanted = {"camera": WantedFocal(change=change, sigma=sigma)}
    verdict = judge(evidence(cameras=(known,), wanted_focals=wanted))
    assert verdict.level is level
    if level is DOUBTFUL:
        words = "a focal length at least 9% longer than the 500 px that was given"
        assert words in verdict.reasons[0].sentence


def test_pairs_that_nothing_had_to_confirm_are_suspected_first() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.3)
    given = evidence(pairs=pairs, cameras=(camera(),), confirms_pairs=False)
    assert "agreement.mode" in only_reason(given).sentence


@pytest.mark.parametrize(("ratio", "level"), [(0.35, GOOD), (0.45, DOUBTFUL)])
def test_pairs_that_contradict_a_place_by_a_little_are_no_doubt(
    ratio: float, level: VerdictLevel
) -> None:
    assert judge(evidence(places={9: {"disputed_ratio": ratio}})).level is level


def test_one_keyframe_against_its_pairs_makes_a_map_doubtful() -> None:
    reason = only_reason(evidence(places={9: {"disputed_ratio": 0.9}}))
    assert (reason.kind, reason.level) == ("misplaced", DOUBTFUL)
    assert "frame 90" in reason.sentence


@pytest.mark.parametrize(
    ("last", "contradicting_ratio", "level"),
    [(7, 0.9, WRONG), (3, 0.9, DOUBTFUL), (7, 0.6, DOUBTFUL)],
)
def test_a_part_that_the_pairs_across_contradict_is_named(
    last: int, contradicting_ratio: float, level: VerdictLevel
) -> None:
    part = ContestedPart(
        frame_ids=tuple(FrameId(number) for number in range(1, last + 1)),
        num_pairs=9,
        num_contradicting=8,
        contradicting_ratio=contradicting_ratio,
    )
    reason = only_reason(evidence(parts=PartsEvidence(contested=part)))
    assert (reason.kind, reason.level) == ("misplaced_part", level)
    assert f"8 of the 9 pairs between frames 10 to {10 * last}" in reason.sentence


def test_a_contested_part_is_not_said_where_pairs_contradict_the_map_everywhere() -> None:
    part = ContestedPart(
        frame_ids=(FrameId(1),), num_pairs=3, num_contradicting=3, contradicting_ratio=1.0
    )
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.3)
    kinds = [
        one.kind
        for one in judge(evidence(pairs=pairs, parts=PartsEvidence(contested=part))).reasons
    ]
    assert kinds == ["pairs_contradict"]


@pytest.mark.parametrize(("num", "words"), [(4, "only 4 weak pairs join"), (0, "no pair joins")])
def test_a_part_that_little_joins_to_the_rest_is_doubted(num: int, words: str) -> None:
    thin = ThinJoint(
        frame_ids=tuple(map(FrameId, (1, 2, 3))), num_pairs=num, strength_ratio=0.2 * num
    )
    reason = only_reason(evidence(parts=PartsEvidence(thin=thin)))
    assert (reason.kind, reason.level) == ("weakly_joined", DOUBTFUL)
    assert f"{words} frames 10 to 30 to the rest of the map" in reason.sentence


def test_a_part_that_shares_few_points_with_the_rest_is_doubted() -> None:
    torn = TornPart(frame_ids=(FrameId(9),), common_ratio=0.11)
    reason = only_reason(evidence(parts=PartsEvidence(torn=torn)))
    assert (reason.kind, reason.level) == ("misplaced_part", DOUBTFUL)
    assert "only 11% of what both frame 90 and the rest of the map show" in reason.sentence


def test_a_keyframe_of_two_pairs_is_not_misplaced_by_them() -> None:
    reason = only_reason(evidence(places={9: {"disputed_ratio": 0.9, "num_pairs": 2}}))
    assert reason.kind == "unconfirmed"


def test_disputed_places_everywhere_make_a_map_wrong() -> None:
    places = {number: {"disputed_ratio": 0.55} for number in range(1, 8)}
    assert judge(evidence(places=places)).level is WRONG


@pytest.mark.parametrize(("num", "level"), [(2, GOOD), (4, DOUBTFUL), (12, WRONG)])
def test_places_that_a_map_has_twice_are_named(num: int, level: VerdictLevel) -> None:
    found = tuple(
        Contradiction(
            pair=ImagePair(FrameId(1 + number % 8), FrameId(20 - number % 8)),
            num_matches=30 + number,
            error_px=90.0,
        )
        for number in range(num)
    )
    verdict = judge(evidence(contradictions=found))
    assert verdict.level is level
    if level is not GOOD:
        (reason,) = verdict.reasons
        assert reason.kind == "bent"
        assert "show the same place" in reason.sentence
        assert "frame" in reason.sentence


def test_what_stays_in_the_picture_is_an_overlay_where_the_map_cannot_have_it() -> None:
    pairs = PairsEvidence(
        num_pairs=60, disputed_ratio=0.1, stays_ratio=0.05, stays_unexplained_ratio=0.04
    )
    reason = only_reason(evidence(pairs=pairs))
    assert (reason.kind, reason.level) == ("overlay", DOUBTFUL)
    assert "fixed to the picture" in reason.sentence


def test_an_overlay_that_holds_the_map_makes_it_wrong() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.8, stays_ratio=0.3)
    reason = only_reason(evidence(pairs=pairs))
    assert (reason.kind, reason.level) == ("overlay", WRONG)


def test_what_stays_and_agrees_is_no_overlay() -> None:
    pairs = PairsEvidence(num_pairs=60, disputed_ratio=0.05, stays_ratio=0.2)
    assert judge(evidence(pairs=pairs)).level is GOOD


def test_a_map_without_parallax_is_a_camera_that_turns() -> None:
    places = {number: {"parallax_px": 0.6} for number in range(1, 15)}
    reason = only_reason(evidence(places=places))
    assert (reason.kind, reason.level) == ("turning", WRONG)
    assert "turns without moving" in reason.sentence
    assert "while walking" in reason.sentence


def test_keyframes_that_turn_on_the_spot_are_named() -> None:
    places = {number: {"parallax_px": 0.6} for number in (17, 18, 19, 20)}
    reason = only_reason(evidence(places=places))
    assert (reason.kind, reason.level) == ("turning", DOUBTFUL)
    assert "frames 170 to 200 turn on the spot" in reason.sentence


def test_a_turn_at_the_end_of_a_walk_is_a_remark() -> None:
    turn = TurningStretch(
        camera_key="camera",
        frame_ids=(FrameId(18), FrameId(19), FrameId(20)),
        turned_rad=1.0,
        is_whole=False,
    )
    reason = only_reason(evidence(turning=(turn,)))
    assert (reason.kind, reason.level) == ("turning", GOOD)
    assert "frames 180 to 200 turn on the spot" in reason.sentence


def test_keyframes_that_a_turn_left_without_a_place_are_to_be_filmed_while_walking() -> None:
    turned = (FrameId(18), FrameId(19), FrameId(20))
    turn = TurningStretch(camera_key="camera", frame_ids=turned, turned_rad=1.0, is_whole=False)
    verdict = judge(evidence(missing=turned, turning=(turn,)))
    (missing,) = (reason for reason in verdict.reasons if reason.kind == "missing_keyframes")
    assert "while walking" in missing.sentence
    assert "overlap" not in missing.sentence


def test_keyframes_held_by_few_points_are_named() -> None:
    places = {number: {"num_points": 12} for number in (3, 4)}
    reason = only_reason(evidence(places=places))
    assert (reason.kind, reason.level) == ("few_points", DOUBTFUL)
    assert "frames 30 to 40" in reason.sentence
    most = {number: {"num_points": 12} for number in range(1, 12)}
    assert judge(evidence(places=most)).level is WRONG


@pytest.mark.parametrize(("missing", "level"), [((3,), GOOD), ((3, 9, 12, 15, 18), DOUBTFUL)])
def test_photos_without_a_place_are_a_remark_until_they_are_many(
    missing: tuple[int, ...], level: VerdictLevel
) -> None:
    reason = only_reason(evidence(missing=missing, is_photo=True))
    assert reason.level is level
    assert reason.kind == "missing_keyframes"
    assert "photo 003.jpg" in reason.sentence
    assert reason.frame_ids == missing


FEW_PAIRS = {n: {"num_pairs": 1, "num_confirming": 1.0} for n in (3, 9)}
TURNED = tuple(map(FrameId, (18, 19, 20)))
ADVICE: list[tuple[dict[str, Any], str, str]] = [
    ({"missing": (3,)}, "film this part again, more slowly and with", "more photos there, with"),
    (
        {
            "missing": TURNED,
            "turning": (
                TurningStretch(
                    camera_key="camera", frame_ids=TURNED, turned_rad=1.0, is_whole=False
                ),
            ),
        },
        "film this part again while walking",
        "take more photos there, walking between them",
    ),
    (
        {"places": {n: {"num_points": 12} for n in (3, 4)}},
        "film there again, closer",
        "take more photos there, closer",
    ),
    ({"places": FEW_PAIRS}, "film around there again", "take more photos around there"),
    (
        {"missing": (19, 20), "other_maps": (TURNED[1:],)},
        "film the way from one to the other in one go",
        "take more photos on the way from one to the other",
    ),
    ({"num": 2}, "film more of the place", "take more photos of the place"),
    (
        {"cameras": (camera(doubts=("it zooms",), doubt_kinds=("missing",)),)},
        "keep the zoom while filming",
        "take all photos with the same zoom",
    ),
]


@pytest.mark.parametrize(("known", "of_video", "of_photos"), ADVICE)
def test_photos_are_to_be_taken_and_videos_to_be_filmed_again(
    known: dict[str, Any], of_video: str, of_photos: str
) -> None:
    filmed = [one.sentence for one in judge(evidence(**known)).reasons]
    assert any(of_video in sentence for sentence in filmed)
    photographed = [one.sentence for one in judge(evidence(is_photo=True, **known)).reasons]
    assert any(of_photos in sentence for sentence in photographed)
    assert not any("film" in sentence for sentence in photographed)


def test_what_is_named_of_photos_and_a_video_is_to_be_filmed_again() -> None:
    given = evidence(missing=(3, 9))
    mixed = tuple(replace(one, is_photo=one.frame_id == 3) for one in given.keyframes)
    assert "film this part again" in only_reason(replace(given, keyframes=mixed)).sentence
    of_photo = replace(given, keyframes=mixed, places=(*given.places, place(mixed[8])))
    assert "take more photos there" in only_reason(of_photo).sentence


@pytest.mark.parametrize("num_keypoints", [20, 400])
@pytest.mark.parametrize("num_pairs", [1, 6])
@pytest.mark.parametrize("num", [1, 3])
def test_nobody_is_to_film_for_a_map_of_photos(
    num_keypoints: int, num_pairs: int, num: int
) -> None:
    photos = tuple(
        keyframe(n, is_photo=True, num_keypoints=num_keypoints) for n in range(1, num + 1)
    )
    reason = only_reason(MapEvidence(keyframes=photos, places=(), num_verified_pairs=num_pairs))
    assert reason.kind == "no_map"
    assert "film" not in reason.sentence


def test_a_time_of_a_video_without_a_pose_is_stated_though_the_map_is_whole() -> None:
    gap = PoseGap(
        camera_key="camera", before=FrameId(8), after=FrameId(9), begins_at_s=67.0, ends_at_s=77.1
    )
    short = replace(gap, begins_at_s=2.0, ends_at_s=2.4)
    verdict = judge(evidence(gaps=(gap, short)))
    (reason,) = verdict.reasons
    assert verdict.level is GOOD
    assert reason.kind == "time_lost"
    assert "10 s of the video, from 1:07 to 1:17" in reason.sentence
    assert "0 s of the video, from 0:02" not in reason.sentence


def lost(begins_at_s: float, ends_at_s: float, *, before: int) -> PoseGap:
    return PoseGap(
        camera_key="camera",
        before=FrameId(before),
        after=FrameId(before + 1),
        begins_at_s=begins_at_s,
        ends_at_s=ends_at_s,
    )


def test_several_times_without_a_pose_are_added_up_and_their_ends_named_once() -> None:
    start_s = 1_700_000_000.0
    gaps = [lost(start_s + 10.0 * n, start_s + 10.0 * n + 2.0 + n, before=n) for n in (5, 6, 9)]
    (reason,) = judge(evidence(gaps=gaps)).reasons
    assert (
        "no frame has a pose for 26 s of the video: 11 s from 22:14:50 to 22:15:01 UTC,"
        " 8 s from 22:14:20 to 22:14:28 UTC and 7 s from 22:14:10 to 22:14:17 UTC: nothing was seen"
    ) in reason.sentence
    assert reason.frame_ids == (5, 6, 7, 9, 10)


def test_frames_that_the_computer_dropped_are_not_blamed_on_what_was_filmed() -> None:
    gaps = [lost(10.0, 14.0, before=5), replace(lost(20.0, 23.0, before=8), is_overload=True)]
    seen, dropped = judge(evidence(gaps=gaps)).reasons
    assert "4 s of the video, from 0:10 to 0:14: nothing was seen then" in seen.sentence
    assert "3 s of the video, from 0:20 to 0:23: the computer was too slow" in dropped.sentence
    assert "film" not in dropped.sentence


def test_a_time_without_a_pose_is_stated_once() -> None:
    """Keyframes of it have no place: that says it already."""
    gap = PoseGap(
        camera_key="camera", before=FrameId(7), after=FrameId(11), begins_at_s=7.0, ends_at_s=11.0
    )
    assert only_reason(evidence(missing=(8, 9, 10), gaps=(gap,))).kind == "missing_keyframes"


def test_time_without_a_place_is_stated() -> None:
    reason = only_reason(evidence(missing=(8, 9, 10)))
    assert reason.level is DOUBTFUL
    assert "4 s of the video from 0:07 to 0:11" in reason.sentence
    assert "frames 80 to 100" in reason.sentence


def test_maps_that_nothing_joins_are_named() -> None:
    ids = (FrameId(15), FrameId(16), FrameId(17))
    reason = only_reason(evidence(missing=ids, other_maps=(ids,)))
    assert (reason.kind, reason.level) == ("several_maps", DOUBTFUL)
    assert "there are 2 maps" in reason.sentence
    assert "sparse/1 has 3 (frames 150 to 170)" in reason.sentence


@pytest.mark.parametrize(
    ("origin", "sigma_ratio", "level"),
    [
        (CalibrationOrigin.ASSUMED, 0.12, GOOD),
        (CalibrationOrigin.ASSUMED, 0.9, DOUBTFUL),
        (CalibrationOrigin.ASSUMED, None, DOUBTFUL),
        (CalibrationOrigin.EXIF, 0.9, GOOD),
    ],
)
def test_focal_lengths_that_nothing_tells_make_a_map_doubtful(
    origin: CalibrationOrigin, sigma_ratio: float | None, level: VerdictLevel
) -> None:
    doubted = camera(
        origin=origin,
        observed_sigma_ratio=sigma_ratio,
        doubts=("the images leave doubt about the focal length",),
        doubt_kinds=("unsure",),
    )
    reason = only_reason(evidence(cameras=(doubted,)))
    assert reason.level is level
    assert "focal length" in reason.sentence


@pytest.mark.parametrize(
    ("sigma_ratio", "words"),
    [
        (0.12, "leaves heights in the map unsure by about 4.2 m"),
        (None, "unsure by about 24 m"),
    ],
)
def test_an_unsure_focal_length_of_a_flight_over_flat_ground_is_said_in_heights(
    sigma_ratio: float | None, words: str
) -> None:
    doubted = camera(
        observed_sigma_ratio=sigma_ratio,
        doubts=("the images leave doubt about the focal length",),
        doubt_kinds=("unsure",),
    )
    reason = only_reason(evidence(cameras=(doubted,), flying_height_m=35.0))
    assert words in reason.sentence
    assert "ground control with heights" in reason.sentence
    assert "sideways" not in reason.sentence


def test_advice_on_an_unsure_focal_length_follows_a_map_that_is_laid_out_later() -> None:
    doubted = camera(
        observed_sigma_ratio=0.12,
        doubts=("the images leave doubt about the focal length",),
        doubt_kinds=("unsure",),
    )
    before = judge(evidence(cameras=(doubted,)))
    records = [doubted.as_record()]

    def sentence(height_m: float | None, *, has_control: bool) -> str:
        (reason,) = with_advice_of_place(
            before, records, flying_height_m=height_m, has_control=has_control
        ).reasons
        return reason.sentence

    assert "sideways" in sentence(None, has_control=False)
    by_positions = sentence(35.0, has_control=False)
    assert by_positions == only_reason(evidence(cameras=(doubted,), flying_height_m=35.0)).sentence
    by_control = sentence(35.0, has_control=True)
    assert "control points settle the heights of the ground" in by_control
    assert "--gcp" not in by_control
    assert "unsure by about 4.2 m" in by_control
    other = [{**records[0], "doubts": ["it is odd"]}]
    assert with_advice_of_place(before, other, flying_height_m=35.0, has_control=False) == before


@pytest.mark.parametrize(
    ("kind", "level"), [("flaw", WRONG), ("missing", DOUBTFUL), ("contradiction", DOUBTFUL)]
)
def test_doubts_about_cameras_are_reasons(kind: str, level: VerdictLevel) -> None:
    doubted = camera(doubts=("it is odd",), doubt_kinds=(kind,))
    reason = only_reason(evidence(cameras=(doubted,)))
    assert (reason.kind, reason.level) == (f"camera_{kind}", level)


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, GOOD),
        ({"missing": (7,)}, DOUBTFUL),
        ({"pairs": PairsEvidence(num_pairs=60, disputed_ratio=0.3)}, DOUBTFUL),
        ({"pairs": PairsEvidence()}, DOUBTFUL),
    ],
    ids=["the map holds all", "one has no place", "pairs contradict the map", "nothing is known"],
)
def test_a_zoom_that_no_map_confirms_is_no_doubt_where_the_map_explains_all_keyframes(
    options: dict[str, Any], level: VerdictLevel
) -> None:
    doubted = camera(doubts=("some seem to be zoomed",), doubt_kinds=("zoom",))
    verdict = judge(evidence(cameras=(doubted,), **options))
    (zoom,) = (reason for reason in verdict.reasons if reason.kind == "camera_zoom")
    assert zoom.level is level


def test_a_lens_that_nothing_examined_is_doubted_by_its_name() -> None:
    prior = IntrinsicsPrior(focal_px=0.0, is_fisheye=True)
    given = evidence(cameras=(camera(),), searches_lenses=False)
    first = replace(given.keyframes[0], intrinsics_prior=prior)
    given = replace(given, keyframes=(first, *given.keyframes[1:]))
    assert "fisheye" in only_reason(given).sentence
    assert judge(replace(given, searches_lenses=True)).level is GOOD


def test_positions_that_contradict_the_map_make_it_doubtful() -> None:
    assert judge(evidence(gps_contradiction="40 m off")).level is DOUBTFUL
    assert judge(evidence(num_positions=18, num_rejected_positions=9)).level is DOUBTFUL


def test_a_flight_that_looks_at_the_sky_is_wrong() -> None:
    reason = only_reason(evidence(looks_up_ratio=1.0))
    assert (reason.kind, reason.level) == ("looks_up", WRONG)
    assert "sky" in reason.sentence
    assert judge(evidence(looks_up_ratio=0.4)).level is GOOD


def test_keyframes_that_one_pair_holds_are_named() -> None:
    reason = only_reason(evidence(places={4: {"num_pairs": 1}, 5: {"num_pairs": 1}}))
    assert (reason.kind, reason.level) == ("unconfirmed", DOUBTFUL)
    assert "frames 40 to 50" in reason.sentence
    assert only_reason(evidence(places={4: {"num_pairs": 1}})).level is GOOD


def test_a_map_within_one_turn_is_wrong() -> None:
    turn = TurningStretch(
        camera_key="camera",
        frame_ids=tuple(FrameId(number) for number in range(1, NUM + 1)),
        turned_rad=1.0,
        is_whole=False,
    )
    assert judge(evidence(turning=(turn,))).level is WRONG


@pytest.mark.parametrize(
    ("numbers", "is_photo", "words"),
    [
        (
            (4,),
            True,
            "a small patch, 3% of the image, holds photo 004.jpg in place, and what looks the same"
            " may be elsewhere, too: take more photos around there, with more overlap in the rest"
            " of the image, or leave it out (export --without-doubted)",
        ),
        (
            (4, 5),
            False,
            "small patches, at most 4% of the image, holds frames 40 to 50 in place, and what looks"
            " the same may be elsewhere, too: film around there again, with more overlap in the"
            " rest of the image, or leave them out (export --without-doubted)",
        ),
    ],
)
def test_keyframes_that_small_patches_hold_are_doubted_by_name(
    numbers: Sequence[int], is_photo: bool, words: str
) -> None:
    held = tuple(
        HeldByPatch(frame_ids=(FrameId(number),), patch_ratio=0.01 * number - 0.01)
        for number in numbers
    )
    reason = only_reason(evidence(is_photo=is_photo, held_by_patch=held))
    assert (reason.kind, reason.level) == ("small_patch", DOUBTFUL)
    assert reason.sentence == f"nothing but {words}"
    assert reason.frame_ids == numbers


def test_two_keyframes_confirm_nothing() -> None:
    assert judge(evidence(num=2)).level is DOUBTFUL


def test_the_gravest_reason_comes_first() -> None:
    places = {number: {"parallax_px": 0.6} for number in range(1, 17)}
    verdict = judge(evidence(places=places, missing=(18, 19, 20)))
    assert verdict.level is WRONG
    assert [reason.level for reason in verdict.reasons] == [WRONG, DOUBTFUL]


@pytest.mark.parametrize(
    ("num_keypoints", "num_pairs", "words"),
    [(60, 3, "keypoints"), (400, 3, "more overlap"), (400, 60, "walk sideways")],
)
def test_no_map_is_explained(num_keypoints: int, num_pairs: int, words: str) -> None:
    frames = tuple(keyframe(number, num_keypoints=num_keypoints) for number in range(1, 13))
    reason = only_reason(MapEvidence(keyframes=frames, places=(), num_verified_pairs=num_pairs))
    assert (reason.kind, reason.level) == ("no_map", WRONG)
    assert words in reason.sentence


def test_no_map_of_a_camera_that_turns_is_said_to_turn() -> None:
    turn = TurningStretch(
        camera_key="camera", frame_ids=(FrameId(1), FrameId(2)), turned_rad=1.0, is_whole=True
    )
    frames = tuple(keyframe(number) for number in range(1, 3))
    reason = only_reason(MapEvidence(keyframes=frames, places=(), turning=(turn,)))
    assert (reason.kind, reason.level) == ("turning", WRONG)


@pytest.mark.parametrize(("left", "is_blamed"), [(0, True), (19, True), (40, False)])
def test_masks_that_leave_next_to_nothing_are_named_and_not_the_light(
    left: int, is_blamed: bool
) -> None:
    area = np.zeros((480, 640), np.bool_)
    area[:, :left] = True
    mask = PackedMask.of(area)
    frames = tuple(keyframe(number, num_keypoints=0, mask=mask) for number in range(1, 9))
    reason = only_reason(MapEvidence(keyframes=frames, places=()))
    assert ("the masks leave next to nothing of the images" in reason.sentence) == is_blamed
    assert ("more light" in reason.sentence) != is_blamed
    some = evidence(num=NUM)
    hidden = tuple(
        replace(one, mask=mask, features=frames[0].features) if one.frame_id <= 8 else one
        for one in some.keyframes
    )
    whole = replace(some, keyframes=hidden, places=some.places[8:])
    (missing,) = (one for one in judge(whole).reasons if one.kind == "missing_keyframes")
    assert ("masks leave next to nothing" in missing.sentence) == is_blamed


def test_a_run_to_which_nothing_came_has_no_map() -> None:
    reason = only_reason(MapEvidence(keyframes=(), places=()))
    assert (reason.kind, reason.level) == ("no_map", WRONG)
    assert reason.sentence == "no map: no frame came that could be used"


def test_keyframes_are_named_by_runs() -> None:
    frames = [keyframe(number) for number in range(1, 13)]
    assert named([FrameId(2)], frames) == "frame 20"
    assert named([FrameId(2), FrameId(3), FrameId(7)], frames) == "frames 20 to 30, frame 70"
    apart = [FrameId(number) for number in (1, 3, 5, 7, 9, 10)]
    assert named(apart, frames).endswith("and 2 more")
    assert len(stretches(apart, frames)) == 5


def test_the_camera_is_named_where_there_are_several() -> None:
    frames = [keyframe(1), keyframe(2, camera_key="other"), keyframe(3)]
    assert named([FrameId(1), FrameId(3)], frames) == "frames 10 to 30 of camera"


def test_a_time_in_a_video_is_in_minutes_and_seconds() -> None:
    assert clock(75.4) == "1:15"
    assert clock(-0.2) == "0:00"
