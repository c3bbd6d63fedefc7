"""Masks of whole cameras, from files that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adapters.images.masks import MaskImage, decode_mask, fit_mask
from adapters.images.name_patterns import is_named, names_of
from engine.config import SourcesConfig
from engine.errors import ConfigError, SourceError
from engine.regular_files import read_regular_file
from engine.types import BoolArray, Frame

_ORIENTATION_OF_TURNS = (1, 6, 3, 8)  # as EXIF counts it, by quarter turns clockwise


class MaskedCameras:
    """``CameraMasks`` of mask files by patterns of camera names, see ``names_of``.

    Of several patterns that match a camera, the last one counts. A mask is one of the pixels as
    stored where these have its shape, and turns with them; else one of upright pixels.
    """

    def __init__(self, files: Mapping[str, str], *, config: SourcesConfig) -> None:
        """Reads the files.

        Args:
            files: the mask file of each pattern.
            config: limits on what is read.

        Raises:
            ConfigError: a file cannot be read, or is no image.
        """
        self._files = dict(files)
        self._masks = {pattern: _read(file, config) for pattern, file in files.items()}
        self._patterns: dict[tuple[str, ...], list[str]] = {}  # that match a camera's names
        self._fitted: dict[tuple[str, tuple[int, int], int], BoolArray] = {}

    def mask_of(self, frame: Frame) -> BoolArray | None:
        """The mask (H, W) of a frame's camera; the same object for frames of one size and turn.

        Raises:
            SourceError: the camera's mask has another aspect ratio.
        """
        patterns = self._matching(frame)
        if not patterns:
            return None
        pattern, size = patterns[-1], (frame.width, frame.height)
        key = (pattern, size, frame.quarter_turns)
        if key not in self._fitted:
            orientation = _ORIENTATION_OF_TURNS[frame.quarter_turns]
            mask = fit_mask(self._masks[pattern], size=size, orientation=orientation)
            if isinstance(mask, str):
                raise SourceError(
                    f"mask {self._files[pattern]} of camera {frame.camera_key} {mask}"
                )
            self._fitted[key] = mask
        return self._fitted[key]

    def unused(self) -> list[str]:
        """Which masks were for no camera so far, in words."""
        used = {pattern for patterns in self._patterns.values() for pattern in patterns}
        return [
            f"the mask {file} is for no camera of the run: none is called {pattern}"
            for pattern, file in self._files.items()
            if pattern not in used
        ]

    def _matching(self, frame: Frame) -> list[str]:
        names = tuple(names_of(frame))
        if names not in self._patterns:
            self._patterns[names] = [p for p in self._files if is_named(p, names)]
        return self._patterns[names]


def _read(file: str, config: SourcesConfig) -> MaskImage:
    try:
        path = Path(file).expanduser()
        data = read_regular_file(path, max_bytes=config.max_image_bytes)
    except OSError as error:
        raise ConfigError(f"mask {file}: cannot be read: {error.strerror or error}") from error
    mask = decode_mask(data, config=config)
    if isinstance(mask, str):
        raise ConfigError(f"mask {file} {mask}")
    return mask
