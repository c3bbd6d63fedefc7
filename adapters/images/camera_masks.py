"""Masks of whole cameras, from files that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from adapters.images.masks import MaskImage, decode_mask, fit_mask
from engine.config import SourcesConfig
from engine.errors import ConfigError, SourceError
from engine.types import BoolArray


class MaskedCameras:
    """``CameraMasks`` of mask files by patterns of camera keys, as ``fnmatch`` has them.

    Of several patterns that fit a camera, the last one counts.
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
        self._fitted: dict[tuple[str, tuple[int, int]], BoolArray] = {}
        self._unused = set(files)

    def mask_of(self, camera_key: str, *, size: tuple[int, int]) -> BoolArray | None:
        """The mask (H, W) of a camera's frames of a size; the same object at every call.

        Raises:
            SourceError: the camera's mask has another aspect ratio.
        """
        patterns = [pattern for pattern in self._files if fnmatchcase(camera_key, pattern)]
        if not patterns:
            return None
        pattern = patterns[-1]
        self._unused.difference_update(patterns)
        if (pattern, size) not in self._fitted:
            mask = fit_mask(self._masks[pattern], size=size)
            if isinstance(mask, str):
                raise SourceError(f"mask {self._files[pattern]} of camera {camera_key} {mask}")
            self._fitted[pattern, size] = mask
        return self._fitted[pattern, size]

    def unused(self) -> list[str]:
        """Patterns that no camera fitted so far."""
        return [pattern for pattern in self._files if pattern in self._unused]


def _read(file: str, config: SourcesConfig) -> MaskImage:
    try:
        mask = decode_mask(Path(file).expanduser().read_bytes(), config=config)
    except OSError as error:
        raise ConfigError(f"mask {file}: cannot be read: {error.strerror or error}") from error
    if isinstance(mask, str):
        raise ConfigError(f"mask {file} {mask}")
    return mask
