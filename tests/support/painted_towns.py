"""Synthetic towns that are painted once in a test session, however many sources show them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapters.town import renderer
from adapters.town.world import TownLayout, lay_out_town
from engine.types import Uint8Array

if TYPE_CHECKING:
    import pytest

PAINT_TEXTURES = renderer._paint_textures  # as the town itself paints


class TownPainter:
    """Paints as the town does, but what a process has painted is read by the others.

    Args:
        folder: where textures are kept, 20 MB for a seed and an image width of 320 px.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._textures = lru_cache(maxsize=8)(self._read_or_paint)

    def paint(self, layout: TownLayout, *, seed: int, width: int) -> list[Uint8Array]:
        """Textures that may not be written; those of a seed and an image width are the same."""
        assert layout == lay_out_town(seed)
        return list(self._textures(seed, width))

    def _read_or_paint(self, seed: int, width: int) -> tuple[Uint8Array, ...]:
        path = self._folder / f"town_{seed}_{width}.npz"
        if path.exists():
            with np.load(path) as stored:
                textures = [stored[f"arr_{number}"] for number in range(len(stored.files))]
        else:
            textures = PAINT_TEXTURES(lay_out_town(seed), seed=seed, width=width)
            unfinished = path.with_name(f"{os.getpid()}_{path.name}")
            np.savez(unfinished, *textures)
            unfinished.replace(path)
        for texture in textures:
            texture.setflags(write=False)
        return tuple(textures)


def paint_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Towns of one seed and image width share their textures, which take seconds to paint."""
    monkeypatch.setattr(renderer, "_paint_textures", TownPainter(folder).paint)


def paint_once_in_this_process(folder: Path) -> None:
    """The same in a process that a test started, to its end."""
    renderer._paint_textures = TownPainter(folder).paint
