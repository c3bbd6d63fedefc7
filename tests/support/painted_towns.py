"""Synthetic towns that are painted once in a process, however many sources show them."""

from __future__ import annotations

from functools import lru_cache

import pytest

from adapters.town import renderer
from adapters.town.world import TownLayout, lay_out_town
from engine.types import Uint8Array

PAINT_TEXTURES = renderer._paint_textures  # as the town itself paints


@lru_cache(maxsize=8)  # one of the largest towns takes 80 MB
def _painted(seed: int, width: int) -> tuple[Uint8Array, ...]:
    textures = PAINT_TEXTURES(lay_out_town(seed), seed=seed, width=width)
    for texture in textures:
        texture.setflags(write=False)
    return tuple(textures)


def paint_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towns of one seed and image width share their textures, which takes seconds to paint."""

    def paint(layout: TownLayout, *, seed: int, width: int) -> list[Uint8Array]:
        assert layout == lay_out_town(seed)
        return list(_painted(seed, width))

    monkeypatch.setattr(renderer, "_paint_textures", paint)
