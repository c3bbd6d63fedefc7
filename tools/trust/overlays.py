"""What a camera or a player burns into the picture: lines of text, a clock, a logo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.types import Uint8Array
from trust.inputs import Input, Kit, Maker, read_rgb, write_jpeg, write_video

SET = "fox"
TOWN = "synthetic:town?frames=300&fps=10"
TOWN_RATE_HZ = 10
NUM_LINES = 3
_LINE_PX = 34  # between lines, at scale 1
_LINE_RATIO = (0.5, 0.85)  # of the width that a line fills
_MARGIN_RATIO = 0.03  # of the edge
_COLORS = ((255, 255, 255), (120, 255, 120), (255, 235, 90), (255, 90, 80))
_WORDS = ("REC", "GPS 14", "BAT 78%", "15.2V", "H 42.1m", "D 310m", "ISO 100", "1/640", "EV -0.3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A line of 1 px strokes."""

    text: str
    left_bottom_xy: tuple[int, int]  # px
    scale: float
    color: tuple[int, int, int]  # RGB


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What is drawn at the same place into every frame."""

    lines: tuple[Text, ...]
    clock: Text  # its text is the time of the first frame, in seconds
    logo_center_xy: tuple[int, int]
    logo_radius_px: int
    logo_color: tuple[int, int, int]


def draw_overlay(size: tuple[int, int], *, seed: int) -> Overlay:
    """Draws places, words and colours for images of (width, height) from a seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    corners = rng.permutation(4)  # of the logo, the clock and the block of lines
    scale = max(0.5, min(width, height) / 1000)

    def color() -> tuple[int, int, int]:
        return _COLORS[int(rng.integers(len(_COLORS)))]

    def at(corner: int, text_width: int, row: int) -> tuple[int, int]:
        margin_x, margin_y = round(_MARGIN_RATIO * width), round(_MARGIN_RATIO * height)
        x = margin_x if corner % 2 == 0 else width - margin_x - text_width
        y = margin_y + round(_LINE_PX * scale * (row + 1))
        return int(x), int(y if corner < 2 else height - y + round(_LINE_PX * scale))

    lines = []
    for row in range(NUM_LINES):
        text = _words_filling(float(rng.uniform(*_LINE_RATIO)) * width, scale, rng)
        place = at(corners[0], _text_width(text, scale), row + 1)
        lines.append(Text(text=text, left_bottom_xy=place, scale=scale, color=color()))
    clock = f"{int(rng.integers(0, 86400))}"
    clock_place = at(corners[1], _text_width("2024-05-17 00:00:00.00", scale), 0)
    radius = round(min(width, height) * float(rng.uniform(0.04, 0.07)))
    left, top = at(corners[2], 2 * radius, 0)
    return Overlay(
        lines=tuple(lines),
        clock=Text(text=clock, left_bottom_xy=clock_place, scale=scale, color=color()),
        logo_center_xy=(left + radius, top + (radius if corners[2] < 2 else -radius)),
        logo_radius_px=radius,
        logo_color=color(),
    )


def burned_in(pixels: Uint8Array, overlay: Overlay, *, time_s: float) -> Uint8Array:
    """A copy of an image (H, W, 3) with the overlay in it."""
    image = np.ascontiguousarray(pixels).copy()
    for line in (*overlay.lines, _clock_at(overlay.clock, time_s)):
        _put_text(image, line)
    _put_logo(image, overlay)
    return image


def fox_photos(seed: int | None) -> Maker:
    """A maker of all fox photos with an overlay; no overlay for None."""
    return partial(_make_fox, seed=seed)


def town_clip(seed: int | None) -> Maker:
    """A maker of a clip of the town's flight with an overlay; no overlay for None."""
    return partial(_make_town, seed=seed)


def _make_fox(kit: Kit, folder: Path, *, seed: int | None) -> Input:
    paths = kit.images(SET)
    images = [read_rgb(path) for path in paths]
    for path, pixels in zip(paths, _burn(kit, images, seed=seed, rate_hz=3.0), strict=True):
        write_jpeg(folder / "images" / path.name, pixels)
    truth = str(kit.data / SET / "groundtruth.txt")
    return Input(source="images", arguments=("--config", "phone"), truth=truth)


def _make_town(kit: Kit, folder: Path, *, seed: int | None) -> Input:
    from adapters.town.source import SyntheticTown, parse_town_spec
    from engine.config import SourcesConfig
    from engine.geometry import invert_pose, quat_xyzw_from_rotation
    from engine.types import FrameId

    town = SyntheticTown(
        parse_town_spec(TOWN), next_frame_id=lambda: FrameId(1), config=SourcesConfig()
    )
    images = [town.render(index).pixels for index in range(town.options.num_frames)]
    frames = list(_burn(kit, images, seed=seed, rate_hz=TOWN_RATE_HZ))
    write_video(folder / "clip.mp4", frames, rate_hz=TOWN_RATE_HZ)
    with (folder / "truth.txt").open("w", encoding="utf-8") as file:
        for index, (_, cam_from_world) in enumerate(town.ground_truth()):
            world_from_cam = invert_pose(cam_from_world)
            quat_xyzw = quat_xyzw_from_rotation(world_from_cam[:, :3])
            values = (*world_from_cam[:, 3], *quat_xyzw)
            file.write(f"{index} {' '.join(f'{value:.9g}' for value in values)}\n")
    return Input(
        source="clip.mp4",
        arguments=("--config", "drone_video"),
        truth="truth.txt",
        focal_px=town.intrinsics[0],
    )


def _burn(
    kit: Kit, images: Iterable[Uint8Array], *, seed: int | None, rate_hz: float
) -> Iterable[Uint8Array]:
    overlay = None
    for index, pixels in enumerate(images):
        if seed is None:
            yield pixels
            continue
        if overlay is None:
            height, width = pixels.shape[:2]
            overlay = draw_overlay((width, height), seed=1000 * kit.variation.overlay_seed + seed)
        yield burned_in(pixels, overlay, time_s=index / rate_hz)


def _clock_at(clock: Text, time_s: float) -> Text:
    total_s = float(clock.text) + time_s
    hours, minutes = int(total_s // 3600) % 24, int(total_s // 60) % 60
    text = f"2024-05-17 {hours:02d}:{minutes:02d}:{total_s % 60:05.2f}"
    return Text(
        text=text, left_bottom_xy=clock.left_bottom_xy, scale=clock.scale, color=clock.color
    )


def _words_filling(width_px: float, scale: float, rng: np.random.Generator) -> str:
    """Words in a line of at least this width, as long as they fit."""
    text = str(rng.choice(_WORDS))
    while _text_width(text, scale) < width_px:
        text += f"  {rng.choice(_WORDS)}"
    return text


def _text_width(text: str, scale: float) -> int:
    import cv2

    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    return int(width)


def _put_text(image: Uint8Array, line: Text) -> None:
    import cv2

    cv2.putText(
        image,
        line.text,
        line.left_bottom_xy,
        cv2.FONT_HERSHEY_SIMPLEX,
        line.scale,
        line.color,
        thickness=1,
        lineType=cv2.LINE_AA,
    )


def _put_logo(image: Uint8Array, overlay: Overlay) -> None:
    """A disc with a ring and the letter of a station."""
    import cv2

    radius, center = overlay.logo_radius_px, overlay.logo_center_xy
    cv2.circle(image, center, radius, overlay.logo_color, thickness=-1, lineType=cv2.LINE_AA)
    cv2.circle(image, center, round(0.8 * radius), (30, 30, 60), thickness=2, lineType=cv2.LINE_AA)
    scale = radius / 26
    width = _text_width("TV", scale)
    place = center[0] - width // 2, center[1] + round(0.35 * radius)
    cv2.putText(image, "TV", place, cv2.FONT_HERSHEY_SIMPLEX, scale, (20, 20, 40), thickness=2)
