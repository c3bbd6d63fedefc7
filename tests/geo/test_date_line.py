from __future__ import annotations

import numpy as np
import pytest

from engine.date_line import cut_line


def line(*longitudes: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.column_stack([longitudes, np.arange(len(longitudes), dtype=np.float64)])


@pytest.mark.parametrize(
    ("longitudes", "expected"),
    [
        ((179.8, 179.9, -179.9), [[179.8, 179.9, 180.0], [-180.0, -179.9]]),
        ((179.9, 180.0, -179.9), [[179.9, 180.0], [-180.0, -179.9]]),
        ((179.9, -180.0, -179.9), [[179.9, 180.0], [-180.0, -179.9]]),
        ((-179.9, 180.0, 179.9), [[-179.9, -180.0], [180.0, 179.9]]),
        ((179.8, 179.9, 180.0), [[179.8, 179.9, 180.0]]),
        ((180.0, 179.9), [[180.0, 179.9]]),
        ((180.0, -179.9), [[-180.0, -179.9]]),
        ((179.9, 180.0, 179.9), [[179.9, 180.0], [180.0, 179.9]]),
        ((10.0, 10.0), [[10.0, 10.0]]),
    ],
)
def test_a_line_is_cut_at_the_date_line_also_where_it_has_a_place_on_it(
    longitudes: tuple[float, ...], expected: list[list[float]]
) -> None:
    parts = cut_line(line(*longitudes))
    assert len(parts) == len(expected)
    for part, longitudes_deg in zip(parts, expected, strict=True):
        np.testing.assert_allclose(part[:, 0], longitudes_deg, atol=1e-9)
