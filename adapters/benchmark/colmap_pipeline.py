"""A program: pycolmap's own pipeline on a folder of images, as its documentation has it.

    python colmap_pipeline.py REQUEST.json

Writes ``sparse/0``, ... and ``stages.json`` (CPU and wall seconds of each stage) into the work
folder of the request.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

STAGES_FILE = "stages.json"


class Pairs(StrEnum):
    """Which pairs COLMAP matches."""

    SEQUENTIAL = "sequential"
    EXHAUSTIVE = "exhaustive"


class Mapper(StrEnum):
    """How COLMAP makes a map of them."""

    INCREMENTAL = "incremental"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a process gets to do."""

    root: str  # of the images
    names: list[str]  # of the images, in root
    work: str  # an empty folder
    pairs: str
    mapper: str
    num_features: int | None  # an image, at most; None: COLMAP's default
    camera_mode: str
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """What a stage took."""

    cpu_s: float
    wall_s: float


def run_pipeline(request: Request) -> dict[str, StageSeconds]:
    """Extracts, matches and maps."""
    import pycolmap

    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.ERROR.value)
    database, root, work = Path(request.work) / "database.db", request.root, Path(request.work)
    extraction = pycolmap.FeatureExtractionOptions(num_threads=request.num_threads)
    if request.num_features is not None:
        extraction.sift.max_num_features = request.num_features
    matching = pycolmap.FeatureMatchingOptions(num_threads=request.num_threads)
    stages: dict[str, StageSeconds] = {}
    stages["extract"] = _timed(
        lambda: pycolmap.extract_features(
            database,
            root,
            request.names,
            camera_mode=getattr(pycolmap.CameraMode, request.camera_mode),
            extraction_options=extraction,
        )
    )
    match_pairs = (
        pycolmap.match_exhaustive
        if request.pairs == Pairs.EXHAUSTIVE
        else pycolmap.match_sequential
    )
    stages["match"] = _timed(lambda: match_pairs(database, matching_options=matching))
    sparse = work / "sparse"
    sparse.mkdir()
    if request.mapper == Mapper.INCREMENTAL:
        incremental = pycolmap.IncrementalPipelineOptions(num_threads=request.num_threads)
        stages["map"] = _timed(
            lambda: pycolmap.incremental_mapping(database, root, sparse, incremental)
        )
    else:
        glomap = pycolmap.GlobalPipelineOptions(num_threads=request.num_threads)
        stages["map"] = _timed(lambda: pycolmap.global_mapping(database, root, sparse, glomap))
    return stages


def _timed(work: Callable[[], object]) -> StageSeconds:
    began_cpu_s, began_s = time.process_time(), time.monotonic()
    work()
    return StageSeconds(
        cpu_s=round(time.process_time() - began_cpu_s, 3),
        wall_s=round(time.monotonic() - began_s, 3),
    )


def main() -> None:
    """Does what the request says."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    stages = run_pipeline(request)
    record = {name: asdict(seconds) for name, seconds in stages.items()}
    (Path(request.work) / STAGES_FILE).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
