"""Run folders for tests of reports, made of COLMAP's synthetic models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap

from engine.config import Config, dump_config
from engine.dense.surface import GroundGrid
from engine.geo.utm import UtmGrid
from engine.output.rasters import RasterPlace, write_heights, write_orthophoto

WIDTH, HEIGHT = 320, 240
ORIGIN = {"latitude_deg": 46.84, "longitude_deg": -91.99, "altitude_m": 198.5}
NOISE_PX = 0.5


def noisy_model(num_frames: int = 12, num_points3D: int = 150) -> pycolmap.Reconstruction:
    """Cameras around points, whose observations scatter."""
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs = 1
    options.num_frames_per_rig = num_frames
    options.num_points3D = num_points3D
    options.num_points2D_without_point3D = 3
    options.camera_width, options.camera_height = WIDTH, HEIGHT
    options.camera_model_id = pycolmap.CameraModelId.SIMPLE_RADIAL
    options.camera_params = [300.0, WIDTH / 2, HEIGHT / 2, 0.05]
    pycolmap.set_random_seed(3)
    model = pycolmap.synthesize_dataset(options)
    noise = pycolmap.SyntheticNoiseOptions()
    noise.point2D_stddev = NOISE_PX
    pycolmap.synthesize_noise(noise, model)
    model.update_point_3d_errors()
    return model


class ReportedRun:
    """A run folder as the engine leaves it, and what is in its files.

    Args:
        path: of the folder.
        model: of its newest snapshot; its images get names.
        name: of a keyframe's image, by its number from 0.
    """

    def __init__(
        self,
        path: Path,
        model: pycolmap.Reconstruction,
        *,
        name: Callable[[int], str] = "{:06d}.jpg".format,
    ) -> None:
        self.path = path
        self.names = {
            image_id: name(number) for number, image_id in enumerate(sorted(model.images))
        }
        for image_id, image in model.images.items():
            image.name = self.names[image_id]
        sparse = path / "snapshots" / "000001" / "sparse" / "0"
        sparse.mkdir(parents=True)
        model.write_binary(sparse)
        (path / "latest").symlink_to("snapshots/000001")
        (path / "products").mkdir()
        (path / "config.yaml").write_text(dump_config(Config()))
        self.summary = _summary(model)
        self.events = list(_events(model, self.names))
        self.frames = [
            [i, "photos", number, one, f"{number}.5", "keyframe", "keyframe", "0"]
            for number, (i, one) in enumerate(self.names.items())
        ]
        self.write()

    def write(self) -> None:
        """Writes the tables and figures as they are by now."""
        with (self.path / "frames.csv").open("w", newline="") as file:
            head = ["frame_id", "source", "index", "name", "captured_at_s", "status", "pose", "map"]
            csv.writer(file).writerows([head, *self.frames])
        lines = (json.dumps(event, ensure_ascii=False) for event in self.events)
        (self.path / "events.jsonl").write_text("\n".join(lines) + "\n")
        (self.path / "summary.json").write_text(json.dumps(self.summary, ensure_ascii=False))

    def judge(self, level: str, *reasons: Mapping[str, Any]) -> None:
        """Gives the map a verdict."""
        self.summary["verdict"] = {"level": level, "reasons": list(reasons)}
        self.write()

    def georeference(self, *, rejected: Sequence[str] = ()) -> None:
        """Lays the map onto positions that scatter by 0.3 m, up by 0.6 m."""
        offsets = np.random.default_rng(0).normal(0.0, [0.3, 0.3, 0.6], (len(self.names), 3))
        names = list(self.names.values())
        self.summary["georeferenced"] = True
        self.summary["georeference"] = {
            "origin": ORIGIN,
            "metres_per_map_unit": 2.0,
            "num_positions": len(names) - len(rejected),
            "rmse_m": 0.734,
            "rejected": list(rejected),
            "residuals_m": {
                name: float(np.linalg.norm(offset))
                for name, offset in zip(names, offsets, strict=True)
            },
            "offsets_enu_m": dict(zip(names, offsets.round(3).tolist(), strict=True)),
        }
        self.write()

    def add_products(self, *, utm: UtmGrid | None = None) -> None:
        """An orthophoto, a surface model and the coverage of the ground around the cameras.

        Args:
            utm: the grid that the rasters lie in; None: they are PNGs.
        """
        grid = GroundGrid(cell=0.25, west=-40, north=30, num_columns=80, num_lines=60)
        place = RasterPlace(grid=grid, utm=utm)
        rgba = np.full((60, 80, 4), 255, np.uint8)
        rgba[:20, :, 3] = 0
        write_orthophoto(self.path / "products" / "orthophoto", rgba, place)
        heights = np.fromfunction(lambda row, column: 0.1 * row + 0.05 * column, (60, 80))
        heights[0, 0] = np.nan
        write_heights(self.path / "products" / "dsm", heights.astype(np.float32), place)
        ring = [[-91.9901, 46.8399], [-91.9899, 46.8399], [-91.9899, 46.8401], [-91.9901, 46.8399]]
        features = [
            {
                "type": "Feature",
                "properties": {"status": status, "share": share},
                "geometry": {"type": "MultiPolygon", "coordinates": [[ring]]},
            }
            for status, share in (("hole", 0.031), ("thin", 0.269), ("good", 0.7))
        ]
        collection = {"type": "FeatureCollection", "features": features}
        (self.path / "products" / "coverage.geojson").write_text(json.dumps(collection))

    def add_images(self) -> None:
        """The keyframes' images."""
        for name in self.names.values():
            image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
            (self.path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.path / "images" / name), image)


def _summary(model: pycolmap.Reconstruction) -> dict[str, Any]:
    num = model.num_reg_images()
    camera = next(iter(model.cameras.values()))
    return {
        "verdict": {"level": "good", "reasons": []},
        "frames_received": num,
        "frames_dropped": {},
        "left_out": [],
        "keyframes": num,
        "registered_keyframes": num,
        "num_points3D": model.num_points3D(),
        "num_observations": model.compute_num_observations(),
        "mean_track_length": model.compute_mean_track_length(),
        "mean_reprojection_error_px": model.compute_mean_reprojection_error(),
        "latency_ms": {
            "keyframes": {"p50": 347.4, "p95": 632.1, "max": 828.0},
            "frames": {"p50": 149.5, "p95": 441.2, "max": 761.0},
        },
        "pairs": {"verified": num - 1, "rejected": 17},
        "cameras": [
            {
                "key": "camera",
                "model": "SIMPLE_RADIAL",
                "width": WIDTH,
                "height": HEIGHT,
                "params": list(camera.params),
                "focal_px": 300.0,
                "fov_deg": 56.1,
                "registered_keyframes": num,
                "origin": "exif",
                "prior_focal_px": 280.0,
                "prior_sigma_ratio": 0.1,
                "observed_sigma_ratio": 0.02,
                "moved_ratio": 0.0714,
            }
        ],
        "wall_s": 61.0,
        "cpu_s": 40.5,
        "cpu_by_stage_s": {"describe": 20.25, "local_ba": 9.5},
        "peak_rss_mb": 512.0,
        "stopped_by": "end_of_sources",
    }


def _events(model: pycolmap.Reconstruction, names: Mapping[int, str]) -> Sequence[dict[str, Any]]:
    ids = sorted(names)
    keyframes = [
        {
            "event": "KeyframeAdded",
            "at_s": float(number),
            "frame_id": i,
            "camera_key": "camera",
            "index": number,
            "name": names[i],
            "is_photo": True,
            "captured_at_s": number + 0.5,
            "num_keypoints": model.image(i).num_points2D(),
        }
        for number, i in enumerate(ids)
    ]
    pairs = [
        {
            "event": "PairVerified",
            "at_s": 1.0,
            "first": first,
            "second": second,
            "reason": "sequential",
            "num_matches": 90,
            "num_inliers": 60 + first % 20,
        }
        for first, second in zip(ids[:-1], ids[1:], strict=True)
    ]
    started = {"event": "RunStarted", "at_s": 0.0, "sources": ["photos"], "matcher": "sift"}
    opened = {"event": "SourceOpened", "at_s": 0.1, "source": "photos", "is_live": False}
    posed = [
        {"event": "FramePosed", "at_s": float(n), "is_first": True, "latency_s": 0.1 + 0.01 * n}
        for n in range(len(ids))
    ]
    return [started, opened, *keyframes, *pairs, *posed, {"event": "RunFinished", "at_s": 99.0}]
