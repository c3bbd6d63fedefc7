"""Cameras known by their names: whose lens is a fisheye, and which see all around.

Names come from EXIF (make and model) and from what cameras write into videos. They are hints: most
action cameras can also be set to a perspective image ("linear", "narrow"), and none of them says
so in EXIF.
"""

from __future__ import annotations

import re

# Makes whose every camera is one, else models; found anywhere in the name, in lower case.
_ACTION_CAMERAS = re.compile(
    r"\bgopro\b|\bhero\s?\d{1,2}\b"
    r"|\bdji\b.*\b(osmo\s?)?action|\bosmo\s?action"
    r"|\binsta360\b|\barashi vision\b"
    r"|\bsjcam\b|\bakaso\b|\bruncam\b|\bcaddx\b|\beken\b|\bapeman\b|\bdrift ghost\b"
    r"|\bvirb\b|\bxiaoyi\b|\byi (4k|lite|discovery)\b"
    r"|\b(hdr-as|hdr-az|fdr-x)\d{2,4}"  # Sony's
)
_SPHERICAL_CAMERAS = re.compile(
    r"\btheta\b|\binsta360 (one|x\d|rs|evo|pro|titan|nano|air)\b|\bgopro max\b"
    r"|\bgear ?360\b|\bsm-(c200|r210)\b|\bvirb 360\b|\bvuze\b|\bqoocam\b|\bmadv\b"
    r"|\bkeymission 360\b|\b360fly\b|\bxphase\b|\bkandao\b"
)


def is_action_camera(name: str) -> bool:
    """Whether a camera of this name has a fisheye lens, unless it is set to correct it."""
    return _ACTION_CAMERAS.search(name.lower()) is not None


def is_spherical_camera(name: str) -> bool:
    """Whether a camera of this name makes images of everything around it."""
    return _SPHERICAL_CAMERAS.search(name.lower()) is not None
