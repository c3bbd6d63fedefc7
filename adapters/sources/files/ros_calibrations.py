"""Which calibration of a ROS recording is that of which images.

A CameraInfo belongs to the images of its namespace: /front/camera_info to /front/image_raw.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.sources.files.ros_messages import prior_of_camera_info, prior_of_rectified
from engine.types import IntrinsicsPrior

# What image_pipeline calls the images of one camera.
_SAME_CAMERA = frozenset(
    {"image", "image_raw", "image_mono", "image_color", "image_rect", "image_rect_color"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicCalibration:
    """What a topic of CameraInfo says."""

    topic: str
    raw: IntrinsicsPrior | str  # of images as they are; or why there is none
    rectified: IntrinsicsPrior | str  # of images without distortion; or why there is none
    size: tuple[int, int] | None  # of the images that this is for, px; None: it does not say


def calibration_of_message(topic: str, message: Any) -> TopicCalibration:
    """The calibration of a CameraInfo, or in words why it cannot be read."""
    if isinstance(message, str):
        return TopicCalibration(topic=topic, raw=message, rectified=message, size=None)
    size = int(message.width), int(message.height)
    return TopicCalibration(
        topic=topic,
        raw=prior_of_camera_info(message),
        rectified=prior_of_rectified(message),
        size=size if min(size) > 0 else None,
    )


def calibrations_of_cameras(
    names: Iterable[str],
    *,
    all_names: Sequence[str],
    calibrations: Sequence[TopicCalibration],
) -> tuple[Mapping[str, TopicCalibration], list[str]]:
    """The calibration of each camera that has one of its own, with ``raw`` that of its images.

    Args:
        names: of the cameras: topics without what says how the images are encoded.
        all_names: of all topics with images in the recording.
        calibrations: of the recording.

    Returns:
        Calibrations by name; and in sentences why others are not used.
    """
    found: dict[str, TopicCalibration] = {}
    doubts: list[str] = []
    for name in names:
        beside = [one for one in calibrations if _namespace(one.topic) == _namespace(name)]
        if not beside:
            continue
        cameras = {_camera(one): one for one in all_names if _namespace(one) == _namespace(name)}
        problem = ""
        prior = beside[0].rectified if is_rectified(name) else beside[0].raw
        if len(beside) > 1 or len(cameras) > 1:
            several = beside[1].topic if len(beside) > 1 else " and ".join(sorted(cameras.values()))
            problem = f"whose it is is not clear beside {several}"
        elif isinstance(prior, str):
            problem = prior
        if problem:
            doubts.append(f"{beside[0].topic} is not used: {problem}")
        else:
            found[name] = TopicCalibration(
                topic=beside[0].topic, raw=prior, rectified=prior, size=beside[0].size
            )
    return found, list(dict.fromkeys(doubts))


def is_rectified(name: str) -> bool:
    """Whether the images of a topic are without distortion, by its name."""
    words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
    return any(word in {"rect", "rectified"} for word in words)


def _camera(name: str) -> str:
    """What is the same for the topics of one camera in its namespace."""
    last = name.rpartition("/")[2]
    return "image" if last in _SAME_CAMERA else last


def _namespace(topic: str) -> str:
    return topic.rpartition("/")[0]
