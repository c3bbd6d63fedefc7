"""Products of a run made again from its stored depth, once its map lies elsewhere."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

from engine.config import DenseConfig
from engine.dense.dense_map import DenseMap
from engine.dense_types import KeyframePoses, first_param
from engine.errors import EngineError
from engine.estimators.lenses import border_rays
from engine.output.dense_products import DenseWorld, WrittenPoints, write_ground, write_points_of
from engine.output.depth_store import DepthStore
from engine.output.files import temporary_sibling, write_atomically
from engine.output.ground_products import GroundProducts
from engine.output.run_folder import PRODUCTS_FOLDER
from engine.types import FrameId, GpsFix, Verdict

logger = logging.getLogger(__name__)

FORMER_FRAME = "products_in_former_frame"  # of `dense` in summary.json: where the map was before
_NO_FRAME = FrameId(2**62)  # later than any


def has_products(run: Path) -> bool:
    """Whether a run has products of a dense map."""
    return any((run / PRODUCTS_FOLDER).glob("*"))


def make_products_again(
    run: Path,
    reconstruction: pycolmap.Reconstruction,
    *,
    origin: GpsFix | None,
    config: DenseConfig,
) -> str:
    """Makes the products of a run, if it has any, where its map lies now.

    They take the place of the former ones all at once; these stay where anything fails, and
    so does ``dense.products_in_former_frame`` in ``summary.json``, which is true before.

    Args:
        run: its folder, which nobody else writes to.
        reconstruction: the map that the products are of.
        origin: of its east, north, up in metres; None: it has no place.
        config: how products are made.

    Returns:
        In words what came of it; "" where there are no products.
    """
    if not has_products(run):
        return ""
    try:
        summary = _summary_of(run)
        world = DenseWorld(
            poses=_poses_of(reconstruction),
            origin=origin,
            verdict=Verdict.from_record(summary.get("verdict") or {}),
        )
        written, epsg = _made(run, world, config)
        _write_dense_figures(run, written, epsg)
    except (EngineError, OSError) as error:
        return _stay(str(error))
    except KeyboardInterrupt:
        return _stay("it was interrupted")
    except Exception as error:  # a task boundary: the map lies where it is to, and is saved
        logger.exception("%s: its products could not be made again", run)
        return _stay(str(error) or type(error).__name__)
    return f"{PRODUCTS_FOLDER}/ made again there, of the depth of {written.num_keyframes} keyframes"


def _stay(why: str) -> str:
    return (
        f"{PRODUCTS_FOLDER}/ stay in the former frame, where the map is no more: they could not be"
        f" made again: {why}"
    )


def _made(run: Path, world: DenseWorld, config: DenseConfig) -> tuple[WrittenPoints, int | None]:
    """Makes the products beside the former ones, and puts them in their place.

    Returns:
        The points, and the EPSG code of orthophoto and surface model; None: they are in no CRS.

    Raises:
        JournalError, OSError: they cannot be written; the former ones are as they were.
        EngineError: no depth of a keyframe lies in the map.
    """
    dense_map = DenseMap(DepthStore(lambda: run))
    dense_map.restore(before=_NO_FRAME)
    ground = GroundProducts(dense_map.depth_map) if config.orthophoto else None
    products = run / PRODUCTS_FOLDER
    beside, former = temporary_sibling(products), temporary_sibling(run / "former")
    try:
        beside.mkdir()
        points = write_points_of(dense_map, beside, world, config, ground=ground)
        if not points.num_points:
            raise EngineError("no stored depth of its keyframes can be read")
        if ground is not None:
            write_ground(beside, world, ground, points.versions)
        products.rename(former)
        try:
            (beside / PRODUCTS_FOLDER).rename(products)
        except BaseException:
            former.rename(products)
            raise
    finally:
        for path in (beside, former):
            shutil.rmtree(path, ignore_errors=True)
    return points, None if ground is None else ground.epsg


def _poses_of(reconstruction: pycolmap.Reconstruction) -> KeyframePoses:
    images = [reconstruction.image(i) for i in sorted(reconstruction.reg_image_ids())]
    cameras = {image.camera_id: reconstruction.camera(image.camera_id) for image in images}
    rays = {camera_id: border_rays(camera) for camera_id, camera in cameras.items()}
    return KeyframePoses(
        frame_ids=np.array([image.image_id for image in images], np.int64),
        cam_from_world=np.array([image.cam_from_world().matrix() for image in images]),
        focal_px=np.array([first_param(cameras[image.camera_id].params) for image in images]),
        border_rays=np.array([rays[image.camera_id] for image in images]),
    )


def _summary_of(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_dense_figures(run: Path, written: WrittenPoints, epsg: int | None) -> None:
    summary = _summary_of(run)
    if not summary:
        return
    dense = {key: one for key, one in summary.get("dense", {}).items() if key != FORMER_FRAME}
    former = dense.get("written") or {}
    dense["written"] = {**former, "points": written.num_points, "epsg": epsg}
    record = {**summary, "dense": dense}
    write_atomically(run / "summary.json", f"{json.dumps(record, indent=2)}\n".encode())
