"""The verdict on a map: how far it can be trusted, and why it is not simply good.

Counts prove nothing: a map may hold every keyframe, with small errors, and be wrong. What is asked
is whether the evidence agrees: pairs with the places of their keyframes, motion with parallax,
calibrations with what is known of cameras, positions with the shape of the map. Where strong
evidence says that cameras are not where the map puts them, it is wrong; where little speaks for
it, or something is missing, it is doubtful. Each reason is a sentence for whoever filmed: where it
is, and what to do. Reasons of a good map are remarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.frame_names import clock_span, frame_in_words, named, stretches
from engine.mapping.verdict.map_evidence import (
    DISPUTED_RATIO,
    FOCAL_UNSURE,
    MapEvidence,
    PlaceEvidence,
)
from engine.types import (
    CameraFigures,
    FrameId,
    Keyframe,
    PoseGap,
    Verdict,
    VerdictLevel,
    VerdictReason,
)

_LEVELS = (VerdictLevel.GOOD, VerdictLevel.DOUBTFUL, VerdictLevel.WRONG)

_WRONG_DISPUTED_RATIO = 0.4
_MIN_PAIRS = 3  # of a keyframe whose place they dispute
# Of the weight of a keyframe's pairs, that contradict its place. The most in right maps of 25
# inputs is 0.32. Keyframes of finished maps that were moved along their motion or across it, by 8 %
# of the extent, are found in 610 of 620 cases by this and the other rules; by 3 %, in 557.
_DISPUTED_PLACE_RATIO = 0.4
_LEAST_PROVEN = 2  # keyframes in places that proven pairs contradict, of a wrong map
_WRONG_PLACES_RATIO = 0.25  # of all keyframes
_WRONG_PART = (0.75, 0.25)  # of the evidence across that contradicts, and of all keyframes
_CONFIRMING_PAIRS = 1.9  # whose weight must not contradict a place: two, or it rests on one
_MANY_UNCONFIRMED = (2, 0.05)  # keyframes at least, and of all: the map is doubtful
_BENT_FAR_RATIO = 0.3  # of the weight of pairs far apart in time, that contradict the map
_MIN_FAR_PAIRS = 6
_TWICE_PAIRS = (3, 0.01)  # pairs at least whose points the map has twice, and of those examined
_WRONG_TWICE_RATIO = 0.1  # of the pairs examined
_NEARLY_RATIO = 0.5  # of the matches of pairs that contradict the map, that it still explains
_FEW_IMAGES = 2  # that cannot calibrate a camera of their own
_STAYS_RATIO = 0.02  # of matches, that stay in the image while the others move
_NO_PARALLAX_PX = 3.0  # what turning leaves: as little as matches are inexact
_TURNING_RATIO = 0.5  # of a map's keyframes without parallax, from which it is wrong
_HELD_POINTS = 20  # that hold a keyframe in its place
_FEW_POINTS_RATIO = 0.1  # of a map's keyframes held by fewer
_MISSING_RATIO = 0.2  # of the keyframes, without a place
_MISSING_STRETCH_RATIO = 0.1  # likewise, in one run of a video
_MIN_STRETCH = 3  # keyframes
_LEAST_MAP = 3  # keyframes that can confirm each other
_UNSURE_SIGMA_RATIO = 0.25  # of a focal length that nobody vouches for
_WANTED_SIGMAS = 1.2  # from which the images ask for another focal length
_WANTED_RATIO = 0.04  # and from which it matters
_REJECTED_RATIO = 0.3  # of the positions
_SKYWARD_RATIO = 0.8  # of the cameras
_FEW_KEYPOINTS = 150  # median of keyframes that show little to match
_LITTLE_LEFT = 0.05  # of an image, by its mask
_LEAST_GAP_S = 1.0  # of a video without a pose; shorter ones go unnoticed
_GAPS_NAMED = 3  # times of a video without a pose
_ALL_SENTENCES = 12

_IMPOSSIBLE = ("flaw",)  # kinds of doubt about a camera: what no lens can have
_ZOOM = "zoom"  # that pairs show, and no map confirms

_CHECK_MASKS = "check them, black in a mask is left out"

Reasons = Iterator[VerdictReason]


@dataclass(frozen=True, slots=True)
class _Advice:
    """What to do, in words for who films and for who takes photos."""

    to_who_films: str
    to_photographers: str


_PART_AGAIN = _Advice("film this part again", "take more photos there")
_PART_MORE_SLOWLY = _Advice("film this part again more slowly", "take more photos there")
_THERE_AGAIN = _Advice("film there again", "take more photos there")
_AROUND_AGAIN = _Advice("film around there again", "take more photos around there")
_WHILE_WALKING = _Advice(
    "film this part again while walking", "take more photos there, walking between them"
)
_WAY_AGAIN = _Advice("film the way again more slowly", "take more photos along the way")
_WAY_BETWEEN = _Advice(
    "film the way between them again more slowly", "take more photos on the way between them"
)
_WAY_ACROSS = _Advice(
    "film the way from one to the other in one go",
    "take more photos on the way from one to the other",
)
_MOVE_SIDEWAYS = _Advice(
    "film longer and walk sideways past what is filmed",
    "take more photos while walking sideways past what they show",
)


def judge(evidence: MapEvidence) -> Verdict:
    """Judges a map: the worst of its reasons is the level of the verdict."""
    rules = _RULES if evidence.places else (_without_map,)
    return _verdict_for(reason for rule in rules for reason in rule(evidence))


def broken_off(verdict: Verdict) -> Verdict:
    """The verdict on a map that nothing finished, by the one that it had while it grew."""
    reason = VerdictReason(
        kind="broke_off",
        level=VerdictLevel.DOUBTFUL,
        sentence="the run broke off before its map was finished and adjusted: run it again",
    )
    return _verdict_for([*verdict.reasons, reason])


def _verdict_for(found: Iterable[VerdictReason]) -> Verdict:
    reasons = sorted(found, key=lambda reason: -_LEVELS.index(reason.level))
    level = reasons[0].level if reasons else VerdictLevel.GOOD
    # Exports leave out the keyframes that reasons about places name: none of these is cut.
    kept = [one for n, one in enumerate(reasons) if n < _ALL_SENTENCES or one.is_of_places]
    return Verdict(level=level, reasons=tuple(kept))


# -- without a map ------------------------------------------------------------------------------


def _without_map(evidence: MapEvidence) -> Reasons:
    if not evidence.keyframes:
        yield VerdictReason(
            kind="no_map",
            level=VerdictLevel.WRONG,
            sentence="no map: no frame came that could be used",
        )
        return
    if evidence.turning:
        yield from _turning_stretches(evidence, level=VerdictLevel.WRONG)
        return
    is_photos = _are_photos((), evidence)
    num_keypoints = float(np.median([len(one.features) for one in evidence.keyframes]))
    if num_keypoints < _FEW_KEYPOINTS and _are_masked(evidence.keyframes):
        cause = f"the masks leave next to nothing of the images: {_CHECK_MASKS}"
    elif num_keypoints < _FEW_KEYPOINTS:
        cause = (
            f"the images show little that can be matched, {num_keypoints:.0f} keypoints in the"
            f" middle one: {'take photos' if is_photos else 'film'} with more light and less blur,"
            " things with texture, and come closer"
        )
    elif len(evidence.keyframes) == 1:
        cause = (
            "there is one keyframe only, and a map needs several from different places:"
            f" {'' if is_photos else 'film longer, while walking past what is filmed, or '}give"
            " more photos"
        )
    elif evidence.num_verified_pairs < len(evidence.keyframes):
        cause = (
            f"{_pairs_match(evidence)}: {'take more photos' if is_photos else 'film more slowly'},"
            " with more overlap, so that each place is in three images or more"
        )
    else:
        cause = (
            f"{_pairs_match(evidence)}, but no two show the same things from clearly different"
            f" places: walk sideways past what is {'photographed' if is_photos else 'filmed'}"
            " instead of turning or zooming"
        )
    yield VerdictReason(kind="no_map", level=VerdictLevel.WRONG, sentence=f"no map: {cause}")


def _are_masked(keyframes: Sequence[Keyframe]) -> bool:
    """Whether masks leave little of most of some images."""
    masked = [
        one
        for one in keyframes
        if one.mask is not None and one.mask.num_usable() < _LITTLE_LEFT * one.width * one.height
    ]
    return 2 * len(masked) > len(keyframes)


def _pairs_match(evidence: MapEvidence) -> str:
    num, num_keyframes = evidence.num_verified_pairs, len(evidence.keyframes)
    pairs = {0: "no pair", 1: "one pair"}.get(num, f"{num} pairs")
    return f"{pairs} of {num_keyframes} keyframes {'match' if num > 1 else 'matches'}"


# -- pairs and places ---------------------------------------------------------------------------


def _disputed(evidence: MapEvidence) -> Reasons:
    """Pairs that contradict the map, by what the contradiction looks like."""
    ratio, places = evidence.pairs.disputed_ratio, _disputed_places(evidence)
    is_overlay = _has_overlay(evidence)
    proven = [one for one in places if one.proven_disputed_ratio >= _DISPUTED_PLACE_RATIO]
    is_proven = len(proven) >= max(_LEAST_PROVEN, _WRONG_PLACES_RATIO * len(evidence.places))
    if ratio < DISPUTED_RATIO and not places:
        return
    if is_overlay or next(_twice(evidence), None) is not None:
        return  # that says why
    is_wrong = ratio >= _WRONG_DISPUTED_RATIO or is_proven
    level = VerdictLevel.WRONG if is_wrong else VerdictLevel.DOUBTFUL
    shown = places or sorted(evidence.places, key=lambda place: -place.disputed_ratio)[:1]
    ids = _ids(shown)
    where = named(ids, evidence.keyframes)
    pairs = evidence.pairs
    is_bent = pairs.num_far >= _MIN_FAR_PAIRS and pairs.far_disputed_ratio >= _BENT_FAR_RATIO
    if is_bent and pairs.far_disputed_ratio > ratio:
        yield VerdictReason(
            kind="bent",
            level=level,
            sentence=(
                f"the map is bent: {pairs.far_disputed_ratio:.0%} of the pairs that show the same"
                f" place at different times contradict it, most of all at {where}: it has drifted,"
                " or took places that look alike for one;"
                f" {_advice(_WAY_AGAIN, ids, evidence)}, with"
                " more than the repeating surface in view"
            ),
            frame_ids=ids,
        )
        return
    if ratio < DISPUTED_RATIO and not is_proven:
        yield VerdictReason(
            kind="misplaced",
            level=level,
            sentence=(
                f"the pairs of {where} contradict their places in the map: leave them out of what"
                " you make of it (export --without-doubted), or"
                f" {_advice(_PART_AGAIN, ids, evidence)} with"
                " more overlap"
            ),
            frame_ids=ids,
        )
        return
    yield VerdictReason(
        kind="pairs_contradict",
        level=level,
        sentence=(
            f"{ratio:.0%} of the matches between keyframes contradict the map, most of all at"
            f" {where}: {_likely_cause(ids, evidence)}"
        ),
        frame_ids=ids,
    )


def _parts(evidence: MapEvidence) -> Reasons:
    """Parts that pairs across contradict, or hardly join, however well each agrees inside."""
    contested, torn, thin = evidence.parts.contested, evidence.parts.torn, evidence.parts.thin
    if contested is not None and not _is_explained(evidence):
        of_evidence, of_all = _WRONG_PART
        is_wrong = contested.contradicting_ratio >= of_evidence and len(
            contested.frame_ids
        ) >= of_all * len(evidence.places)
        yield VerdictReason(
            kind="misplaced_part",
            level=VerdictLevel.WRONG if is_wrong else VerdictLevel.DOUBTFUL,
            sentence=(
                f"{contested.num_contradicting} of the {contested.num_pairs} pairs between"
                f" {named(contested.frame_ids, evidence.keyframes)} and the rest of the map"
                " contradict how it has them to each other: one of the two is in the wrong place,"
                " or of the wrong size;"
                f" {_advice(_WAY_BETWEEN, contested.frame_ids, evidence)}, with more"
                " overlap"
            ),
            frame_ids=contested.frame_ids,
        )
    elif torn is not None and not _is_explained(evidence):
        yield VerdictReason(
            kind="misplaced_part",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"only {torn.common_ratio:.0%} of what both"
                f" {named(torn.frame_ids, evidence.keyframes)} and the rest of the map show are the"
                " same points in it: it has them in two places, or of two sizes;"
                f" {_advice(_WAY_BETWEEN, torn.frame_ids, evidence)}, with more overlap"
            ),
            frame_ids=torn.frame_ids,
        )
    if thin is not None:
        joins = f"only {thin.num_pairs} weak pairs join" if thin.num_pairs else "no pair joins"
        yield VerdictReason(
            kind="weakly_joined",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"{joins} {named(thin.frame_ids, evidence.keyframes)} to the rest of the map, and"
                " places that look alike would do so, too:"
                f" {_advice(_WAY_ACROSS, thin.frame_ids, evidence)}"
            ),
            frame_ids=thin.frame_ids,
        )


def _is_explained(evidence: MapEvidence) -> bool:
    """Whether another rule says why pairs contradict the map."""
    return _has_overlay(evidence) or any(
        next(rule(evidence), None) is not None for rule in (_twice, _disputed)
    )


def _unconfirmed(evidence: MapEvidence) -> Reasons:
    """Keyframes that a single pair holds: whatever that pair says, they fit.

    Where many pairs contradict the map, only proven ones count: a false pair confirms as well.
    """
    is_contested = evidence.pairs.is_contested
    disputed = set() if is_contested else set(_ids(_disputed_places(evidence)))
    weak = [
        place
        for place in evidence.places
        if place.num_confirming < _CONFIRMING_PAIRS and place.keyframe.frame_id not in disputed
    ]
    num = len(evidence.places)
    if not weak or num < _LEAST_MAP:
        return
    if is_contested and (_has_overlay(evidence) or next(_disputed(evidence), None) is not None):
        return  # that says why
    least, of_all = _MANY_UNCONFIRMED
    is_much = is_contested or len(weak) >= max(least, of_all * num)
    where = named(_ids(weak), evidence.keyframes)
    found = (
        f"many pairs of keyframes contradict the map, and fewer than two that a third keyframe"
        f" confirms speak for where it has {where}"
        if is_contested
        else f"fewer than two pairs of keyframes confirm where the map has {where}"
    )
    yield VerdictReason(
        kind="unconfirmed",
        level=VerdictLevel.DOUBTFUL if is_much else VerdictLevel.GOOD,
        sentence=f"{found}: {_advice(_AROUND_AGAIN, _ids(weak), evidence)} with more overlap",
        frame_ids=_ids(weak),
    )


def _twice(evidence: MapEvidence) -> Reasons:
    """Pairs whose matches the map has as points in two places."""
    least, of_all = _TWICE_PAIRS
    found, num_pairs = evidence.contradictions, max(1, evidence.pairs.num_pairs)
    if len(found) < max(least, of_all * num_pairs):
        return
    strongest = max(found, key=lambda one: one.num_matches).pair
    ids = tuple(sorted({i for one in found for i in (one.pair.first, one.pair.second)}))
    first, second = (named([i], evidence.keyframes) for i in (strongest.first, strongest.second))
    is_wrong = len(found) >= _WRONG_TWICE_RATIO * num_pairs
    yield VerdictReason(
        kind="bent",
        level=VerdictLevel.WRONG if is_wrong else VerdictLevel.DOUBTFUL,
        sentence=(
            f"the map is bent: {first} and {second} show the same place, and the map has it twice"
            f" ({len(found)} such pairs contradict it): it has drifted, or took places that look"
            " alike for one; leave loops.correct on, or"
            f" {_advice(_WAY_AGAIN, ids, evidence)}, with more"
            " than a repeating surface in view"
        ),
        frame_ids=ids,
    )


def _likely_cause(ids: Iterable[FrameId], evidence: MapEvidence) -> str:
    is_photos = _are_photos((), evidence)
    keep_zoom = _keep_zoom(is_photos=is_photos)
    if not evidence.confirms_pairs:
        return (
            "pairs that no third view confirms were trusted: let them agree with each other"
            " (agreement.mode)"
        )
    cameras = [camera for camera in evidence.cameras if camera.num_registered]
    if not cameras or evidence.pairs.disputed_inlying_ratio < _NEARLY_RATIO:
        # A wrong lens bends a map a little everywhere; most matches still nearly fit.
        return (
            "places look alike or things move there, and the map may have joined the wrong ones:"
            f" {_advice(_PART_MORE_SLOWLY, ids, evidence)}, with more overlap, and with what"
            " differs around it in view"
        )
    unvouched = [camera for camera in cameras if camera.is_unvouched]
    if not unvouched:
        return (
            f"the calibration that was given is wrong (focal length {_lengths(cameras)}), or the"
            f" camera zoomed: check it, or let the images tell it, and {keep_zoom}"
        )
    unsure = [
        camera
        for camera in unvouched
        if camera.observed_sigma_ratio is None or camera.observed_sigma_ratio > _WANTED_RATIO
    ]
    if unsure:
        return (
            f"too little motion to know the focal length ({_unsure_lengths(unsure)}):"
            f" {_advice(_MOVE_SIDEWAYS, (), evidence)}, or give the calibration (cameras.focal_px,"
            f" --calibration); if the camera zoomed, {keep_zoom}"
        )
    return (
        "the camera zoomed, or its lens is not as the map has it (focal length"
        f" {_lengths(unvouched)}): {keep_zoom}, or give the calibration"
        " (cameras.focal_px, --calibration)"
    )


def _lengths(cameras: Sequence[CameraFigures]) -> str:
    return " and ".join(f"{camera.focal_px:.0f} px" for camera in cameras[:3])


def _unsure_lengths(cameras: Sequence[CameraFigures]) -> str:
    return " and ".join(
        f"{camera.focal_px:.0f} px"
        if camera.observed_sigma_ratio is None
        else f"{camera.focal_px:.0f} px, give or take {camera.observed_sigma_ratio:.0%}"
        for camera in cameras[:3]
    )


def _disputed_places(evidence: MapEvidence) -> list[PlaceEvidence]:
    return [
        place
        for place in evidence.places
        if place.num_pairs >= _MIN_PAIRS and place.disputed_ratio >= _DISPUTED_PLACE_RATIO
    ]


def _has_overlay(evidence: MapEvidence) -> bool:
    """Whether matches stay in the image while the others move, and the map cannot have both."""
    pairs = evidence.pairs
    if pairs.stays_unexplained_ratio >= _STAYS_RATIO:
        return True
    return pairs.stays_ratio >= _STAYS_RATIO and pairs.disputed_ratio >= DISPUTED_RATIO


def _overlays(evidence: MapEvidence) -> Reasons:
    if not _has_overlay(evidence):
        return
    is_wrong = evidence.pairs.disputed_ratio >= _WRONG_DISPUTED_RATIO
    yield VerdictReason(
        kind="overlay",
        level=VerdictLevel.WRONG if is_wrong else VerdictLevel.DOUBTFUL,
        sentence=(
            f"{evidence.pairs.stays_ratio:.0%} of the matches stay at the same place in the image"
            " while the rest moves: a logo, text or dirt on the lens is fixed to the picture and"
            " misleads the map; switch it off, mask it, or leave two_view.find_overlays on"
        ),
    )


def _turning(evidence: MapEvidence) -> Reasons:
    """A map of a camera that only turned has no depth."""
    still = [
        place
        for place in evidence.places
        if place.num_pairs and place.parallax_px < _NO_PARALLAX_PX
    ]
    if len(still) >= _TURNING_RATIO * len(evidence.places):
        yield VerdictReason(
            kind="turning",
            level=VerdictLevel.WRONG,
            sentence=(
                f"the camera turns without moving at {named(_ids(still), evidence.keyframes)}, so"
                f" the map has no depth: {_advice(_WHILE_WALKING, _ids(still), evidence)}"
            ),
            frame_ids=_ids(still),
        )
        return
    if len(still) >= _MIN_STRETCH:
        yield VerdictReason(
            kind="turning",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"{named(_ids(still), evidence.keyframes)} turn on the spot, so their places are"
                f" uncertain: {_advice(_WHILE_WALKING, _ids(still), evidence)}"
            ),
            frame_ids=_ids(still),
        )
    yield from _turning_stretches(evidence, level=VerdictLevel.GOOD)


def _turning_stretches(evidence: MapEvidence, *, level: VerdictLevel) -> Reasons:
    registered = {place.keyframe.frame_id for place in evidence.places}
    for stretch in evidence.turning:
        where = named(stretch.frame_ids, evidence.keyframes)
        yield VerdictReason(
            kind="turning",
            level=VerdictLevel.WRONG if registered.issubset(stretch.frame_ids) else level,
            sentence=(
                f"{where} turn on the spot: the camera turns without moving, which shows no depth;"
                f" {_advice(_WHILE_WALKING, stretch.frame_ids, evidence)}"
            ),
            frame_ids=stretch.frame_ids,
        )


def _few_points(evidence: MapEvidence) -> Reasons:
    weak = [place for place in evidence.places if place.num_points < _HELD_POINTS]
    num = len(evidence.places)
    if len(weak) >= num / 2:
        level = VerdictLevel.WRONG
    elif len(weak) >= max(2, _FEW_POINTS_RATIO * num):
        level = VerdictLevel.DOUBTFUL
    else:
        return
    yield VerdictReason(
        kind="few_points",
        level=level,
        sentence=(
            f"few points hold {named(_ids(weak), evidence.keyframes)} in place, fewer than"
            f" {_HELD_POINTS} each:"
            f" {_advice(_THERE_AGAIN, _ids(weak), evidence)}, closer, with more"
            " texture and overlap"
        ),
        frame_ids=_ids(weak),
    )


def _held_by_patch(evidence: MapEvidence) -> Reasons:
    """Keyframes whose pairs and points are all of a patch that may look like one elsewhere."""
    held = evidence.held_by_patch
    if not held:
        return
    ids = tuple(sorted({i for one in held for i in one.frame_ids}))
    size = f"{max(one.patch_ratio for one in held):.0%} of the image"
    patch = f"a small patch, {size}," if len(held) == 1 else f"small patches, at most {size},"
    them = "it" if len(ids) == 1 else "them"
    yield VerdictReason(
        kind="small_patch",
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            f"nothing but {patch} holds {named(ids, evidence.keyframes)} in place, and what looks"
            " the same may be elsewhere, too:"
            f" {_advice(_AROUND_AGAIN, ids, evidence)}, with more overlap"
            f" in the rest of the image, or leave {them} out (export --without-doubted)"
        ),
        frame_ids=ids,
    )


# -- coverage -----------------------------------------------------------------------------------


def _few_keyframes(evidence: MapEvidence) -> Reasons:
    num = len(evidence.places)
    if num < _LEAST_MAP:
        yield VerdictReason(
            kind="few_keyframes",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"the map has {num} keyframes, and no third confirms it:"
                f" {'take more photos' if _are_photos((), evidence) else 'film more'} of the place,"
                " with more overlap"
            ),
        )


def _missing(evidence: MapEvidence) -> Reasons:
    missing = evidence.unplaced
    if not missing:
        return
    num = len(evidence.keyframes)
    ids = tuple(one.frame_id for one in missing)
    runs = [run for run in stretches(ids, evidence.keyframes) if not run[0].is_photo]
    longest = max(runs, key=len, default=[])
    is_long = len(longest) >= max(_MIN_STRETCH, _MISSING_STRETCH_RATIO * num)
    is_much = is_long or len(missing) > _MISSING_RATIO * num
    blank = [one for one in missing if not len(one.features)]
    turning = {i for stretch in evidence.turning for i in stretch.frame_ids}
    lost = _time_lost(evidence, longest) if is_long else ""
    is_photos = _are_photos(ids, evidence)
    if len(blank) > len(missing) / 2 and _are_masked(blank):
        help_words = f"masks leave next to nothing of the images there: {_CHECK_MASKS}"
    elif len(blank) > len(missing) / 2:
        help_words = (
            "the images there are black, blurred or of one colour;"
            f" {_advice(_PART_AGAIN, ids, evidence)}"
        )
    elif len(turning.intersection(ids)) > len(missing) / 2:
        help_words = (
            f"the camera turns without moving there; {_advice(_WHILE_WALKING, ids, evidence)}"
        )
    else:
        help_words = (
            f"{_advice(_PART_AGAIN, ids, evidence)},"
            f" {'' if is_photos else 'more slowly and '}with more overlap with what is in the map"
        )
    yield VerdictReason(
        kind="missing_keyframes",
        level=VerdictLevel.DOUBTFUL if is_much else VerdictLevel.GOOD,
        sentence=(
            f"{len(missing)} of {num} keyframes have no place in a map{lost}"
            f" ({named(ids, evidence.keyframes)}): {help_words}"
        ),
        frame_ids=ids,
    )


def _time_lost(evidence: MapEvidence, run: Sequence[Keyframe]) -> str:
    """How long a run of a video without a place is, in words."""
    placed = {place.keyframe.frame_id for place in evidence.places}.union(*evidence.other_maps)
    times = [
        one.captured_at_s
        for one in evidence.keyframes
        if one.camera_key == run[0].camera_key and one.frame_id in placed
    ]
    begin_s = max((t for t in times if t <= run[0].captured_at_s), default=run[0].captured_at_s)
    end_s = min((t for t in times if t >= run[-1].captured_at_s), default=run[-1].captured_at_s)
    if end_s - begin_s < _LEAST_GAP_S:
        return ""
    return f", {end_s - begin_s:.0f} s of the video {clock_span(begin_s, end_s)}"


def _gaps(evidence: MapEvidence) -> Reasons:
    """Times of a video without a pose, however the map went on; those in `_missing` left out."""
    gaps = [
        gap
        for gap in evidence.gaps
        if gap.ends_at_s - gap.begins_at_s >= _LEAST_GAP_S
        and not any(
            gap.before < one.frame_id < gap.after and one.camera_key == gap.camera_key
            for one in evidence.unplaced
        )
    ]
    yield from _time_lost_reasons(
        evidence,
        [gap for gap in gaps if not gap.is_overload],
        why="nothing was seen then that the map holds; film this part again if it matters",
    )
    yield from _time_lost_reasons(
        evidence,
        [gap for gap in gaps if gap.is_overload],
        why=(
            "the computer was too slow and dropped most frames then; send fewer or smaller ones, or"
            " map a video file of it afterwards, for which the computer takes its time"
        ),
    )


def _time_lost_reasons(evidence: MapEvidence, gaps: Sequence[PoseGap], *, why: str) -> Reasons:
    if not gaps:
        return
    yield VerdictReason(
        kind="time_lost",
        level=VerdictLevel.GOOD,
        sentence=f"no frame has a pose for {_times_in_words(evidence, gaps)}: {why}",
        frame_ids=tuple(dict.fromkeys(i for gap in gaps for i in (gap.before, gap.after))),
    )


def _times_in_words(evidence: MapEvidence, gaps: Sequence[PoseGap]) -> str:
    """Times of videos, the longest ones first."""
    has_cameras = len({one.camera_key for one in evidence.keyframes}) > 1
    longest = sorted(gaps, key=lambda gap: gap.begins_at_s - gap.ends_at_s)
    times = [
        f"{clock_span(gap.begins_at_s, gap.ends_at_s)}"
        f"{f' of {gap.camera_key}' if has_cameras else ''}"
        for gap in longest
    ]
    lengths = [f"{gap.ends_at_s - gap.begins_at_s:.0f} s" for gap in longest]
    if len(gaps) == 1:
        return f"{lengths[0]} of the video, {times[0]}"
    total_s = sum(gap.ends_at_s - gap.begins_at_s for gap in gaps)
    each = [f"{length} {when}" for length, when in zip(lengths, times, strict=True)]
    named_ones = each[:_GAPS_NAMED]
    if len(each) > _GAPS_NAMED:
        named_ones.append(f"{len(each) - _GAPS_NAMED} times more")
    return f"{total_s:.0f} s of the video: {', '.join(named_ones[:-1])} and {named_ones[-1]}"


def _several_maps(evidence: MapEvidence) -> Reasons:
    if not evidence.other_maps:
        return
    others = [
        f"sparse/{number} has {len(ids)} ({named(ids, evidence.keyframes)})"
        for number, ids in enumerate(evidence.other_maps, start=1)
    ]
    ids_apart = tuple(frame_id for ids in evidence.other_maps for frame_id in ids)
    yield VerdictReason(
        kind="several_maps",
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            f"there are {1 + len(others)} maps, and nothing shows how they lie to each other: the"
            f" main one has {len(evidence.places)} keyframes, {' and '.join(others)};"
            f" {_advice(_WAY_ACROSS, ids_apart, evidence)}"
        ),
        frame_ids=ids_apart,
    )


# -- cameras and positions ----------------------------------------------------------------------


def _cameras(evidence: MapEvidence) -> Reasons:
    several = len(evidence.cameras) > 1
    for camera in evidence.cameras:
        if not camera.num_registered:
            continue
        name = f"camera {camera.camera_key}" if several else "the camera"
        if several and camera.is_unvouched and camera.num_registered <= _FEW_IMAGES:
            yield _few_images(evidence, camera, name)
        yield from _other_focal(evidence, camera, name)
        for kind, doubt in zip(camera.doubt_kinds, camera.doubts, strict=True):
            yield VerdictReason(
                kind=f"camera_{kind}",
                level=_level_of(camera, kind, evidence),
                sentence=f"{name}: {doubt}; {_help_with(kind, camera, evidence)}",
            )


def _few_images(evidence: MapEvidence, camera: CameraFigures, name: str) -> VerdictReason:
    """The images of a camera that are too few to calibrate it, by their names."""
    key = camera.camera_key
    own = [one.keyframe for one in evidence.places if one.keyframe.calibration_key == key]
    images = [frame_in_words(index=k.index, name=k.name, is_photo=k.is_photo) for k in own]
    which = f" ({' and '.join(images)})" if images else ""
    is_photos = bool(own) and all(k.is_photo for k in own)
    more = (
        "take more photos with it at the same zoom"
        if is_photos
        else "keep the zoom while filming, film more with it"
    )
    return VerdictReason(
        kind="camera_few_images",
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            f"{name}: its calibration rests on {camera.num_registered} of its images{which};"
            f" {more}, or give its calibration"
        ),
        frame_ids=tuple(one.frame_id for one in own),
    )


def _other_focal(evidence: MapEvidence, camera: CameraFigures, name: str) -> Reasons:
    """A focal length that is held, and that the images contradict."""
    wanted = evidence.wanted_focals.get(camera.camera_key)
    if wanted is None or wanted.num_sigmas < _WANTED_SIGMAS or abs(wanted.change) < _WANTED_RATIO:
        return
    how = "the map has" if camera.is_unvouched else "was given"
    length = "longer" if wanted.change > 0.0 else "shorter"
    yield VerdictReason(
        kind="camera_focal",
        level=VerdictLevel.DOUBTFUL,
        sentence=(
            f"{name}: the images ask for a focal length at least {abs(wanted.change):.0%} {length}"
            f" than the {camera.focal_px:.0f} px that {how}: check the calibration"
            " (cameras.focal_px, --calibration), or let the images tell it"
        ),
    )


def _help_with(kind: str, camera: CameraFigures, evidence: MapEvidence) -> str:
    own = [one for one in evidence.keyframes if one.calibration_key == camera.camera_key]
    is_photos = bool(own) and all(one.is_photo for one in own)
    if kind in ("zoom", "missing"):
        return f"{_keep_zoom(is_photos=is_photos)}, or photograph each zoom on its own"
    if kind in FOCAL_UNSURE:
        return help_with_focal(
            observed_sigma_ratio=camera.observed_sigma_ratio,
            prior_sigma_ratio=camera.prior_sigma_ratio,
            flying_height_m=evidence.flying_height_m,
            is_photos=is_photos,
        )
    return "give its calibration (cameras.focal_px, --calibration) to be sure"


def help_with_focal(
    *,
    observed_sigma_ratio: float | None,
    prior_sigma_ratio: float,
    flying_height_m: float | None,
    is_photos: bool | None,
    has_control: bool = False,
) -> str:
    """What an unsure focal length is to a map, and what helps.

    Args:
        observed_sigma_ratio: one standard deviation by the images; None: they say none.
        prior_sigma_ratio: likewise, by what was known beforehand.
        flying_height_m: of cameras that looked down on nearly flat ground; None: others.
        is_photos: whether the camera took photos, and no video; None: that is not known.
        has_control: the map lies on control points with heights.
    """
    give = (
        "give the focal length of a good map by this camera (cameras.focal_px) or the calibration"
        " by a target (--calibration)"
    )
    if flying_height_m is None:
        more = {
            True: "take more photos",
            False: "film longer",
            None: "film longer or take more photos",
        }[is_photos]
        return f"to be sure, {more} and move sideways or around something, or {give}"
    observed, prior = observed_sigma_ratio, prior_sigma_ratio
    known = min(prior if observed is None else min(observed, prior), 1.0)
    seen = f"seen from {flying_height_m:.0f} m above nearly flat ground"
    if has_control:
        return (
            f"{seen}, it leaves the cameras' own heights unsure by about"
            f" {known * flying_height_m:.2g} m, and that by which things stand out of the ground by"
            f" about {known:.0%} of it; the control points settle the heights of the ground; to be"
            f" sure, {give}"
        )
    return (
        f"{seen}, it leaves heights in the map unsure by about {known * flying_height_m:.2g} m:"
        f" ground control with heights settles them (--gcp), or {give}"
    )


def _level_of(camera: CameraFigures, kind: str, evidence: MapEvidence) -> VerdictLevel:
    if kind in _IMPOSSIBLE:
        return VerdictLevel.WRONG
    if kind == _ZOOM and _holds_all(evidence, camera):
        return VerdictLevel.GOOD
    if kind not in FOCAL_UNSURE:
        return VerdictLevel.DOUBTFUL
    sigma_ratio = camera.observed_sigma_ratio
    is_known = sigma_ratio is not None and sigma_ratio <= _UNSURE_SIGMA_RATIO
    return VerdictLevel.DOUBTFUL if camera.is_unvouched and not is_known else VerdictLevel.GOOD


def _holds_all(evidence: MapEvidence, camera: CameraFigures) -> bool:
    """Whether a map has all keyframes of a camera in places that their pairs agree with.

    Zooms that it does not know of would bend it.
    """
    placed = {place.keyframe.frame_id for place in evidence.places}
    return (
        evidence.pairs.num_pairs > 0
        and evidence.pairs.disputed_ratio < DISPUTED_RATIO
        and all(
            one.frame_id in placed
            for one in evidence.keyframes
            if one.calibration_key == camera.camera_key
        )
    )


def _unsearched_lenses(evidence: MapEvidence) -> Reasons:
    """Cameras whose name says that they may have a fisheye lens, which nothing examined."""
    if evidence.searches_lenses:
        return
    named_keys = {
        one.calibration_key
        for one in evidence.keyframes
        if one.intrinsics_prior is not None and one.intrinsics_prior.is_fisheye
    }
    for camera in evidence.cameras:
        if camera.camera_key in named_keys and camera.num_registered and camera.is_unvouched:
            yield VerdictReason(
                kind="camera_lens",
                level=VerdictLevel.DOUBTFUL,
                sentence=(
                    f"the lens of camera {camera.camera_key} may be a fisheye or not, by its name,"
                    " and nothing examined which: switch cameras.recognise_lenses on, or give its"
                    " calibration"
                ),
            )


def _positions(evidence: MapEvidence) -> Reasons:
    if evidence.gps_contradiction:
        yield VerdictReason(
            kind="gps_contradicts",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"the GPS positions contradict the map ({evidence.gps_contradiction}), so it is not"
                " laid onto them: the map or the positions are wrong"
            ),
        )
    num, num_rejected = evidence.num_positions, evidence.num_rejected_positions
    if num and num_rejected > _REJECTED_RATIO * num:
        yield VerdictReason(
            kind="gps_rejected",
            level=VerdictLevel.DOUBTFUL,
            sentence=(
                f"{num_rejected} of {num} GPS positions disagree with the map: the map or the"
                " positions are wrong"
            ),
        )
    if evidence.looks_up_ratio >= _SKYWARD_RATIO:
        yield VerdictReason(
            kind="looks_up",
            level=VerdictLevel.WRONG,
            sentence=(
                f"{evidence.looks_up_ratio:.0%} of the cameras look at the sky: the map lies upside"
                " down on its GPS positions; fly a path that is not straight"
            ),
        )


def _ids(places: Iterable[PlaceEvidence]) -> tuple[FrameId, ...]:
    return tuple(sorted(place.keyframe.frame_id for place in places))


# -- what to do ----------------------------------------------------------------------------------


def _are_photos(frame_ids: Iterable[FrameId], evidence: MapEvidence) -> bool:
    """Whether all keyframes that are named are photos; without names, all keyframes."""
    wanted = set(frame_ids)
    return all(one.is_photo for one in evidence.keyframes if not wanted or one.frame_id in wanted)


def _advice(words: _Advice, frame_ids: Iterable[FrameId], evidence: MapEvidence) -> str:
    """The words for the keyframes that are named, see `_are_photos`."""
    return words.to_photographers if _are_photos(frame_ids, evidence) else words.to_who_films


def _keep_zoom(*, is_photos: bool) -> str:
    return "take all photos with the same zoom" if is_photos else "keep the zoom while filming"


_RULES: tuple[Callable[[MapEvidence], Reasons], ...] = (
    _turning,
    _overlays,
    _twice,
    _disputed,
    _parts,
    _unconfirmed,
    _positions,
    _cameras,
    _unsearched_lenses,
    _few_points,
    _held_by_patch,
    _few_keyframes,
    _several_maps,
    _missing,
    _gaps,
)
