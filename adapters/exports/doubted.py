"""Keyframes whose places a run's verdict doubts, left out of an export: ``--without-doubted``."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import networkx

from adapters.exports.job import ExportJob
from adapters.run_files import read_model, read_text
from engine.errors import ConfigError
from engine.types import FrameId, Verdict, VerdictLevel

if TYPE_CHECKING:
    import pycolmap

_OPTION = "--without-doubted"
_LEAST_IMAGES = 2  # that are an export


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubts:
    """What the verdict on a run's main map says of where its keyframes are."""

    doubted_ids: frozenset[FrameId]  # keyframes to leave out
    remaining: tuple[str, ...]  # sentences on doubts that leaving keyframes out does not remove

    @classmethod
    def of(cls, verdict: Verdict) -> Doubts:
        """Reads a verdict; remarks are no doubts."""
        doubts = [one for one in verdict.reasons if one.level is not VerdictLevel.GOOD]
        return cls(
            doubted_ids=frozenset(i for one in doubts if one.is_of_places for i in one.frame_ids),
            remaining=tuple(one.sentence for one in doubts if not one.is_of_places),
        )


def without_doubted(job: ExportJob) -> ExportJob:
    """The job of a map without the keyframes whose places the run's verdict doubts.

    Points that fewer than two of the others observe go with them. The job notes what was left out,
    and what the rest is still doubted for.

    Raises:
        ConfigError: nothing judged the map, the verdict is of another one, or what is left is no
            map: hardly a keyframe, no points, or parts that share none.
        SnapshotError: the rest of the map cannot be read.
        OSError: it cannot be written.
    """
    if job.map_number:
        raise ConfigError(f"{_OPTION}: the verdict of a run is on map 0 alone")
    doubts = _doubts_of(job.run)
    doubted = [image for image in job.images() if image.image_id in doubts.doubted_ids]
    names = frozenset(image.name for image in doubted)
    if doubts.doubted_ids and not names:
        raise ConfigError(f"{_OPTION}: the verdict is of another map: it has none of its keyframes")
    num_left = len(job.images()) - len(names)
    if num_left < _LEAST_IMAGES:
        raise ConfigError(f"{_OPTION}: the verdict leaves {_keyframes(num_left)}: no map")
    if names:
        listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        are = "is" if len(names) == 1 else "are"
        job.notes.append(f"{_OPTION}: {_keyframes(len(names))} {are} not in it: {listed}")
    else:
        job.notes.append(f"{_OPTION}: the verdict names no keyframe to leave out, so all are in it")
    job.notes.extend(f"the map is doubted all the same: {why}" for why in doubts.remaining)
    if not names:
        return job
    for frame_id in sorted({image.frame_id for image in doubted}):
        job.reconstruction.deregister_frame(frame_id)
    rest = _registered(job)
    num_parts = _num_parts(rest)
    if num_parts != 1:
        what = f"falls into {num_parts} parts" if num_parts else "has no points"
        raise ConfigError(f"{_OPTION}: what the verdict leaves {what}: no map")
    return replace(job, reconstruction=rest, doubted=names)


def near_doubted(doubted: Collection[str], keyframes: Sequence[str | None]) -> list[bool]:
    """Which frames of a source hang on a doubted keyframe: those up to the next on each side.

    Args:
        doubted: names of keyframes.
        keyframes: of each frame of a source, in order, its name if it is a keyframe, else None.
    """
    is_near = [False] * len(keyframes)
    for frames in (range(len(keyframes)), reversed(range(len(keyframes)))):
        hangs_on_doubted = False
        for i in frames:
            name = keyframes[i]
            if name is not None:
                hangs_on_doubted = name in doubted
            is_near[i] |= hangs_on_doubted
    return is_near


def _keyframes(number: int) -> str:
    return "1 keyframe" if number == 1 else f"{number} keyframes"


def _doubts_of(run: Path) -> Doubts:
    path = run / "summary.json"
    try:
        record = json.loads(read_text(path))["verdict"]
        verdict = Verdict.from_record({**record, "level": record["level"]})
        doubts = Doubts.of(verdict)
    except FileNotFoundError as error:
        raise ConfigError(f"{_OPTION}: {run} has no verdict yet: the run did not end") from error
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: has no verdict") from error
    if not all(isinstance(i, int) for i in doubts.doubted_ids):
        raise ConfigError(f"{path}: has no verdict")
    if verdict.level is not VerdictLevel.GOOD and not verdict.reasons:
        raise ConfigError(f"{_OPTION}: the verdict does not say what it doubts")
    return doubts


def _num_parts(reconstruction: pycolmap.Reconstruction) -> int:
    """How many parts images fall into that no points join; 0: there are no points."""
    if not reconstruction.num_points3D():
        return 0
    joined: networkx.Graph[int] = networkx.Graph()
    joined.add_nodes_from(reconstruction.reg_image_ids())
    for point in reconstruction.points3D.values():
        joined.add_edges_from(itertools.pairwise(one.image_id for one in point.track.elements))
    return int(networkx.number_connected_components(joined))


def _registered(job: ExportJob) -> pycolmap.Reconstruction:
    """A map of the registered images alone: COLMAP writes no others."""
    with tempfile.TemporaryDirectory(prefix="livesfm-export-") as folder:
        job.reconstruction.write_binary(folder)
        return read_model(Path(folder))
