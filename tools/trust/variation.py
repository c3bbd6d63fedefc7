"""Parameters of the inputs: those of the bench's table, or others drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES = ("right", "left", "top", "bottom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """What can be different about the inputs; the defaults are the bench's table."""

    pinhole_deg: float = 84.0  # horizontal fields of view of the room's cameras
    wide_pinhole_deg: float = 110.0
    fisheye_deg: float = 110.0  # its photos name an action camera
    wide_fisheye_deg: float = 150.0
    fisheye_distortion: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # COLMAP's OPENCV_FISHEYE
    texture_seed: int = 0  # of the room
    turn: float = 0.9  # rad that the walk through the room turns
    first_photo: int = 0  # of the fox photos that the zoom inputs take
    photo_zoom: float = 1.5
    video_zoom: float = 1.6  # of the second half of the clip
    crop_side: str = "right"
    crop_ratio: float = 0.2  # of that edge
    size_ratio: float = 2 / 3  # of the second half of the clip
    overlay_seed: int = 0
    masked_side: str = "right"
    ground_seed: int = 0
    ground_focal_ratio: float = 0.75  # of the image's width
    ground_jitter_deg: float = 1.0
    town_seed: int = 0
    turning_place: tuple[float, float, float, float, float] = (0.0, -40.0, 24.0, 5.0, -22.0)
    turn_after_walk_rad: float = 0.9
    room_turn_deg: float = 8.0  # between photos of a camera that turns in the room
    jump_deg: float = 90.0
    cut_from: int = 80  # frame
    nth_offset: int = 0  # of the photos that are every so manyth of a set
    order_seed: int = 0  # of shuffled photos

    @staticmethod
    def drawn(seed: int) -> Variation:
        """Other parameters of the same kinds."""
        rng = np.random.default_rng(seed)

        def one_of(*values: float) -> float:
            return float(rng.choice(values))

        return Variation(
            pinhole_deg=one_of(60, 70, 95),
            wide_pinhole_deg=one_of(100, 105, 115),
            fisheye_deg=one_of(95, 120, 130),
            wide_fisheye_deg=one_of(140, 160, 165),
            fisheye_distortion=(one_of(-0.02, 0.0, 0.03), one_of(-0.002, 0.0, 0.004), 0.0, 0.0),
            texture_seed=int(rng.integers(1, 1000)),
            turn=one_of(0.6, 0.75, 1.1),
            first_photo=int(rng.integers(1, 30)),
            photo_zoom=one_of(1.3, 1.4, 1.75, 2.0),
            video_zoom=one_of(1.3, 1.45, 1.8, 2.0),
            crop_side=str(rng.choice(SIDES)),
            crop_ratio=one_of(0.12, 0.16, 0.25, 0.3),
            size_ratio=one_of(0.5, 0.6, 0.75, 0.8),
            overlay_seed=int(rng.integers(1, 1000)),
            masked_side=str(rng.choice(SIDES)),
            ground_seed=int(rng.integers(1, 1000)),
            ground_focal_ratio=one_of(0.6, 0.9, 1.2),
            ground_jitter_deg=one_of(0.5, 1.5, 2.0),
            town_seed=int(rng.integers(1, 100)),
            turning_place=(
                one_of(-30, -5, 20, 37),
                one_of(-60, -37, 0),
                one_of(6, 15, 40),
                float(rng.uniform(0, 360)),
                one_of(-8, -20, -40),
            ),
            turn_after_walk_rad=one_of(-0.9, -0.5, 0.5, 1.4),
            room_turn_deg=one_of(5, 6.5, 10),
            jump_deg=one_of(70, 80, 100, 110),
            cut_from=int(rng.integers(50, 110)),
            nth_offset=int(rng.integers(1, 3)),
            order_seed=int(rng.integers(1, 1000)),
        )
