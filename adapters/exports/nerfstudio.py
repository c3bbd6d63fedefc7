"""``transforms.json``, by the page "Data conventions" of nerfstudio's documentation."""

from __future__ import annotations

import json

from adapters.exports.job import ExportJob
from adapters.exports.masks import MASKS
from adapters.exports.ply import POINTS_NAME
from engine.output.nerfstudio import TRANSFORMS_NAME, transforms_record


def write_nerfstudio(job: ExportJob, *, points_name: str = POINTS_NAME) -> None:
    """Writes ``transforms.json``; its images, masks and points are there already.

    Args:
        job: of the export.
        points_name: the PLY file that trainers begin with.

    Raises:
        ConfigError: nerfstudio has no such camera.
        OSError: it cannot be written.
    """
    masks_folder = MASKS if (job.to / MASKS).is_dir() else ""
    record = transforms_record(
        job.reconstruction, points_name=points_name, masks_folder=masks_folder
    )
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (job.to / TRANSFORMS_NAME).write_text(text, encoding="utf-8")
