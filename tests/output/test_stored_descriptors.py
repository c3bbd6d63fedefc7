"""Descriptors come back from the database of a run that is being written."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pycolmap

from engine.output.journal import Journal, NewKeyframe
from engine.output.stored_descriptors import StoredDescriptors
from engine.types import DescriptorKind, FrameId, Uint8Array
from tests.support.synthetic import SyntheticWorld, straight_path


def database(folder: Path) -> sqlite3.Connection:
    """A database in COLMAP's layout with the descriptors of keyframes 1 and 2."""
    folder.mkdir()
    connection = sqlite3.connect(folder / "database.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(
        "CREATE TABLE descriptors (image_id INTEGER PRIMARY KEY, type INTEGER, rows INTEGER,"
        " cols INTEGER, data BLOB)"
    )
    for frame_id, num_bytes in ((1, 6), (2, 5)):
        connection.execute(
            "INSERT INTO descriptors VALUES (?, -1, 2, 3, ?)", (frame_id, bytes(range(num_bytes)))
        )
    return connection


def read_first(stored: StoredDescriptors) -> Uint8Array:
    descriptors = stored.read(FrameId(1))
    assert descriptors is not None
    return descriptors


def test_descriptors_are_read_while_the_run_writes_and_after_its_folder_moved(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "run"]
    writing = database(folders[0])
    stored = StoredDescriptors(lambda: folders[-1])
    writing.execute("BEGIN IMMEDIATE")
    (expected,) = (np.arange(6, dtype=np.uint8).reshape(2, 3),)
    assert np.array_equal(read_first(stored), expected)
    writing.execute("ROLLBACK")
    folders.append(folders[0].rename(tmp_path / "moved"))
    assert np.array_equal(read_first(stored), expected)
    stored.close()
    writing.close()


def test_what_is_missing_or_damaged_is_nothing(tmp_path: Path) -> None:
    database(tmp_path / "run").close()
    stored = StoredDescriptors(lambda: tmp_path / "run")
    assert stored.read(FrameId(2)) is None  # its bytes are not as many as it says
    assert stored.read(FrameId(3)) is None
    stored.close()
    nowhere = StoredDescriptors(lambda: tmp_path / "gone")
    assert nowhere.read(FrameId(1)) is None


def test_what_the_journal_wrote_comes_back_to_the_bit(tmp_path: Path) -> None:
    world = SyntheticWorld(straight_path(2))
    for kind in DescriptorKind:
        path = tmp_path / kind.value
        path.mkdir()
        keyframe = world.keyframe(FrameId(1))
        table = np.random.default_rng(1).integers(0, 128, (len(keyframe.features), 128), np.uint8)
        features = replace(keyframe.features, descriptors=table, descriptor_kind=kind)
        journal = Journal.open(path)
        journal.add_keyframe(
            NewKeyframe(
                keyframe=replace(keyframe, features=features),
                camera=pycolmap.Camera(
                    camera_id=1, model="PINHOLE", width=10, height=10, params=[9.0, 9.0, 5.0, 5.0]
                ),
                source="fake",
                image_bytes=b"",
            )
        )
        journal.close()
        stored = StoredDescriptors(partial(Path, path))
        read = stored.read(FrameId(1))
        stored.close()
        assert read is not None
        assert np.array_equal(read, table)
