"""Town source: ``synthetic:town``, a rendered drone flight with exact ground truth.

The same options give the same pixels, bit for bit.
"""

from __future__ import annotations

import asyncio
import difflib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from adapters.town.flight import PathName, fly
from adapters.town.world import TownLayout, lay_out_town
from engine.config import SourcesConfig
from engine.errors import SourceError
from engine.types import (
    Arrival,
    Float32Array,
    Float64Array,
    Frame,
    IntrinsicsPrior,
    SourceInfo,
    TakenFrames,
    Uint8Array,
    frozen_array,
)

if TYPE_CHECKING:
    from adapters.town.renderer import TownRenderer
    from engine.ports import FrameIds

_FOCAL_PER_WIDTH = 0.58  # a horizontal field of view of 82 degrees, as small drones have
_SCHEME, _WORLD = "synthetic", "town"
_WALL_LEVEL = 170.0  # grey level of a blank wall


@dataclass(frozen=True, slots=True, kw_only=True)
class TownOptions:
    """Options of a flight over the town and of its camera.

    The whole path is flown whatever ``num_frames``; fewer frames move faster.

    Raises:
        ValueError: a value is out of range; the message names the key of the spec.
    """

    seed: int = 0  # of the town's layout, its textures and the sensor noise
    num_frames: int = 300
    width: int = 640  # px
    height: int = 480  # px
    fps: float = 30.0  # sets capture times only
    path: PathName = "flight"
    noise_sigma: float = 1.5  # of the sensor noise, in grey levels of 255
    blank_from: int = 0  # the first frame that shows a blank wall; the flight goes on behind it
    num_blank: int = 0  # how many show it

    def __post_init__(self) -> None:
        for key, value, low, high in (
            ("seed", self.seed, 0, 2**32 - 1),
            ("frames", self.num_frames, 2, 1_000_000),
            ("width", self.width, 64, 4096),
            ("height", self.height, 64, 4096),
            ("fps", self.fps, 0.01, 1000.0),
            ("noise", self.noise_sigma, 0.0, 50.0),
            ("blank_from", self.blank_from, 0, 1_000_000),
            ("blank", self.num_blank, 0, 1_000_000),
        ):
            if not low <= value <= high:
                raise ValueError(f"{key}={value}: expected {low} to {high}")
        if self.path not in get_args(PathName):
            nearest = _nearest(self.path, get_args(PathName))
            raise ValueError(f"path={self.path}: no such path; did you mean {nearest}?")

    @property
    def spec(self) -> str:
        """The options as the user would write them, without the defaults."""
        given = [
            f"{key}={getattr(self, field)}"
            for key, (field, _) in _KEYS.items()
            if getattr(self, field) != getattr(_DEFAULTS, field)
        ]
        return f"{_SCHEME}:{_WORLD}" + ("?" + "&".join(given) if given else "")


_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "seed": ("seed", int),
    "frames": ("num_frames", int),
    "width": ("width", int),
    "height": ("height", int),
    "fps": ("fps", float),
    "path": ("path", str),
    "noise": ("noise_sigma", float),
    "blank_from": ("blank_from", int),
    "blank": ("num_blank", int),
}
_DEFAULTS = TownOptions()


def parse_town_spec(spec: str) -> TownOptions:
    """Reads ``synthetic:town?frames=120&path=orbit``.

    Raises:
        SourceError: another world, an unknown or repeated key, or a value that does not fit.
    """
    address, _, query = spec.partition("?")
    scheme, _, world = address.partition(":")
    if scheme != _SCHEME or world != _WORLD:
        raise SourceError(f"{spec}: no such synthetic world; did you mean {_SCHEME}:{_WORLD}?")
    values: dict[str, Any] = {}
    for setting in query.split("&") if query else ():
        key, equals, text = setting.partition("=")
        if key not in _KEYS:
            nearest = _nearest(key, tuple(_KEYS))
            raise SourceError(f"{spec}: unknown key: {key}; did you mean {nearest}?")
        field, convert = _KEYS[key]
        if field in values:
            raise SourceError(f"{spec}: {key} is given twice")
        try:
            values[field] = convert(text)
        except ValueError as error:
            wanted = "a whole number" if convert is int else "a number"
            raise SourceError(f"{spec}: {key}{equals}{text}: expected {wanted}") from error
    try:
        return TownOptions(**values)
    except ValueError as error:
        raise SourceError(f"{spec}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedFrame:
    """One image with its ground truth."""

    pixels: Uint8Array  # (H, W, 3) RGB
    depth: Float32Array  # (H, W) metres along the optical axis at pixel centres, inf in the sky
    cam_from_world: Float64Array  # (3, 4) metres


class SyntheticTown:
    """A town and a flight over it, as a source of frames.

    ``render`` may be called from any thread; the first call paints the town, which takes seconds.
    """

    def __init__(
        self,
        options: TownOptions,
        *,
        next_frame_id: FrameIds,
        config: SourcesConfig = SourcesConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.options = options
        taken = range(0, options.num_frames, config.every_nth_frame)
        self._taken = taken[: config.max_frames] if config.max_frames else taken
        self._left_out: Collection[int] = ()  # of those, a former part of the run had them
        self.layout: TownLayout = lay_out_town(options.seed)
        self._next_frame_id = next_frame_id
        self._rendering = threading.Lock()
        focal_x, focal_y, center_x, center_y = self.intrinsics
        self._poses = frozen_array(
            "poses",
            fly(
                options.path,
                self.layout,
                num_frames=options.num_frames,
                tangents=(center_x / focal_x, center_y / focal_y),
            ),
            (options.num_frames, 3, 4),
            float,
        )

    @property
    def info(self) -> SourceInfo:
        """A video of as many frames as are left to be drawn."""
        num_left = len(self._taken) - len(self._left_out)
        return SourceInfo(
            label=self.options.spec, is_live=False, is_sequence=True, num_frames=num_left
        )

    @property
    def fingerprint(self) -> str:
        """Nothing: the same options give the same frames."""
        return ""

    def leave_out(self, taken: TakenFrames) -> list[str]:
        """Does not draw frames that were taken before."""
        self._left_out = frozenset(self._taken) & taken.names.keys()
        return []

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """``fx, fy, cx, cy`` in px, COLMAP's convention; no distortion."""
        focal = _FOCAL_PER_WIDTH * self.options.width
        return focal, focal, self.options.width / 2, self.options.height / 2

    def captured_at_s(self, index: int) -> float:
        """Capture time of a frame."""
        return index / self.options.fps

    def ground_truth(self) -> list[tuple[float, Float64Array]]:
        """Capture time and exact ``cam_from_world`` (3, 4), metres, of every frame taken."""
        return [(self.captured_at_s(index), self._poses[index]) for index in self._taken]

    def render(self, index: int) -> RenderedFrame:
        """Draws one frame, blocking; frames may be drawn in any order."""
        cam_from_world = self._poses[index]
        if 0 <= index - self.options.blank_from < self.options.num_blank:
            pixels, depth = self._blank_wall(index)
        else:
            with self._rendering:
                pixels, depth = self._renderer.draw(cam_from_world, index=index)
        return RenderedFrame(pixels=pixels, depth=depth, cam_from_world=cam_from_world)

    async def frames(self) -> AsyncGenerator[Arrival, None]:
        """Yields the flight's frames in order, each drawn in a thread when it is asked for."""
        for index in self._taken:
            if index in self._left_out:
                continue
            rendered = await asyncio.to_thread(self.render, index)
            yield Arrival.of(
                Frame(
                    frame_id=self._next_frame_id(),
                    camera_key=_WORLD,
                    source=self.info.label,
                    index=index,
                    name=f"{index:06d}.jpg",
                    captured_at_s=self.captured_at_s(index),
                    received_at_s=time.monotonic(),
                    pixels=rendered.pixels,
                    intrinsics_prior=self._intrinsics_prior(),
                )
            )

    def _blank_wall(self, index: int) -> tuple[Uint8Array, Float32Array]:
        """An image that shows nothing but the sensor's noise; it has no depth, as the sky."""
        size = self.options.height, self.options.width
        rng = np.random.default_rng((self.options.seed, index))
        noisy = _WALL_LEVEL + rng.normal(scale=self.options.noise_sigma, size=(*size, 3))
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8), np.full(size, np.inf, np.float32)

    def _intrinsics_prior(self) -> IntrinsicsPrior:
        return IntrinsicsPrior(
            focal_px=self.intrinsics[0], camera_model="PINHOLE", params=self.intrinsics
        )

    @cached_property
    def _renderer(self) -> TownRenderer:
        from adapters.town.renderer import TownRenderer

        return TownRenderer(
            self.layout,
            seed=self.options.seed,
            size=(self.options.width, self.options.height),
            intrinsics=self.intrinsics,
            noise_sigma=self.options.noise_sigma,
        )


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
