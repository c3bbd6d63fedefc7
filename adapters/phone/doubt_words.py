"""What is doubted of a map, for somebody who is filming it: what to do, and no frame numbers."""

from __future__ import annotations

from collections.abc import Mapping

from engine.types import VerdictReason

_AGAIN = "go back and film that part again, more slowly and with more overlap"
_BETWEEN = "film the way from one to the other in one go, slowly"
_CALIBRATION = (
    "the camera's focal length is not sure: walk sideways past things, and keep the zoom as it is"
)
_WORDS: Mapping[str, str] = {  # by the kind of reason
    "bent": f"the map has one place twice, or bends: {_AGAIN}, with what differs around it in view",
    "misplaced": f"a part may lie in the wrong place: {_AGAIN}",
    "pairs_contradict": f"pictures contradict the map: {_AGAIN}",
    "misplaced_part": f"a part does not fit the rest of the map: {_BETWEEN}",
    "weakly_joined": f"a part hardly hangs together with the rest of the map: {_BETWEEN}",
    "several_maps": f"the map is in several parts: {_BETWEEN}",
    "unconfirmed": f"a part was seen too little to be sure of it: {_AGAIN}",
    "turning": "the camera turned on the spot, which shows no depth: film that part again while"
    " walking",
    "few_points": "little texture was seen: film that part again, closer and with more around it",
    "small_patch": f"a picture hangs on one small patch that it shows: {_AGAIN}, with what is"
    " around the patch in view",
    "few_keyframes": "the map is still small: film more of the place, with more overlap",
    "missing_keyframes": f"some of what was filmed has no place on the map: {_AGAIN}",
    "overlay": "something in the picture stays where it is, a logo or dirt: wipe the lens",
    "camera_few_images": _CALIBRATION,
    "camera_focal": _CALIBRATION,
    "camera_uncertain": _CALIBRATION,
    "camera_unsure": _CALIBRATION,
    "camera_zoom": "the camera zoomed: keep the zoom as it is",
}


def doubt_in_words(reason: VerdictReason) -> str:
    """A reason to doubt a map and what to do about it, in a sentence.

    Kinds that filming cannot help with have the verdict's own.
    """
    return _WORDS.get(reason.kind, reason.sentence)
