"""Writing COLMAP models beside a run that goes on.

pycolmap holds the interpreter lock while it writes, about 0.1 s for a million keypoints; the event
loop stands still meanwhile. Here it writes a model in slices. The files are those that it writes at
once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pycolmap

from engine.output.files import flush_to_disk

MODEL_FILES = ("cameras.bin", "images.bin", "points3D.bin", "rigs.bin", "frames.bin")

_SLICED_FILES = ("images.bin", "frames.bin")  # a count, and records that follow each other
_COUNT_BYTES = 8
_SLICE_KEYPOINTS = 100_000  # 10 ms


def write_model(reconstruction: pycolmap.Reconstruction, folder: Path) -> None:
    """Writes the five files; only registered images and their frames are among them.

    Args:
        reconstruction: of which each image is the only one of its frame. No other thread may use
            it until the call returns; then it is as before. One that was read from files is written
            at once: its frames are final.
        folder: to be made.

    Raises:
        OSError: a file cannot be written in full.
    """
    folder.mkdir(parents=True)
    try:
        if _was_read(reconstruction):
            reconstruction.write_binary(folder)
        else:
            with _without_images(reconstruction):
                reconstruction.write_binary(folder)
            _write_images(reconstruction, folder)
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error)) from error
    # pycolmap does not notice a full disk: what it could not write is missing, without a word.
    for name, size in _sizes(reconstruction).items():
        written = (folder / name).stat().st_size
        if written < size:
            raise OSError(f"{name} is cut short, {written} of {size} bytes; the disk may be full")
        flush_to_disk(folder / name)
    flush_to_disk(folder)


def _was_read(reconstruction: pycolmap.Reconstruction) -> bool:
    return any(
        reconstruction.frame(i).has_final_data_ids() for i in reconstruction.reg_frame_ids()[:1]
    )


@contextmanager
def _without_images(reconstruction: pycolmap.Reconstruction) -> Iterator[None]:
    """Takes the images out of their frames, so that only cameras, rigs and points are written."""
    frames = [reconstruction.frame(frame_id) for frame_id in reconstruction.reg_frame_ids()]
    images = [frame.data_ids for frame in frames]
    for frame in frames:
        frame.clear_data_ids()
    try:
        yield
    finally:
        for frame, data_ids in zip(frames, images, strict=True):
            for data_id in data_ids:
                frame.add_data_id(data_id)


def _write_images(reconstruction: pycolmap.Reconstruction, folder: Path) -> None:
    """Writes the registered images and their frames, a slice at a time."""
    image_ids = reconstruction.reg_image_ids()
    scratch = folder / "slice"
    scratch.mkdir()
    with (folder / "images.bin").open("wb") as images, (folder / "frames.bin").open("wb") as frames:
        for file in (images, frames):
            file.write(len(image_ids).to_bytes(_COUNT_BYTES, "little"))
        for slice_ids in _slices(reconstruction, image_ids):
            _model_of(reconstruction, slice_ids).write_binary(scratch)
            for name, file in zip(_SLICED_FILES, (images, frames), strict=True):
                file.write((scratch / name).read_bytes()[_COUNT_BYTES:])
    shutil.rmtree(scratch)


def _slices(
    reconstruction: pycolmap.Reconstruction, image_ids: Sequence[int]
) -> Iterator[list[int]]:
    """Images in their order, at least one a slice."""
    slice_ids: list[int] = []
    num_keypoints = 0
    for image_id in image_ids:
        slice_ids.append(image_id)
        num_keypoints += reconstruction.image(image_id).num_points2D()
        if num_keypoints >= _SLICE_KEYPOINTS:
            yield slice_ids
            slice_ids, num_keypoints = [], 0
    if slice_ids:
        yield slice_ids


def _model_of(
    reconstruction: pycolmap.Reconstruction, image_ids: Sequence[int]
) -> pycolmap.Reconstruction:
    """A model of some registered images, whose keypoints name points that are not in it."""
    model = pycolmap.Reconstruction()
    for camera in reconstruction.cameras.values():
        model.add_camera(camera)
    for rig in reconstruction.rigs.values():
        model.add_rig(rig)
    for image_id in image_ids:
        image = reconstruction.image(image_id)
        posed = reconstruction.frame(image.frame_id)
        frame = pycolmap.Frame(frame_id=posed.frame_id, rig_id=posed.rig_id)
        frame.add_data_id(image.data_id)
        frame.rig_from_world = posed.rig_from_world
        model.add_frame(frame)
        copy = pycolmap.Image(name=image.name, camera_id=image.camera_id, image_id=image_id)
        copy.frame_id = image.frame_id
        copy.points2D = image.points2D
        model.add_image(copy)
        model.register_frame(frame.frame_id)
    return model


def _sizes(reconstruction: pycolmap.Reconstruction) -> dict[str, int]:
    """Bytes of each file of a model in COLMAP's binary format, at least.

    Records have fixed sizes but for parameters, names, keypoints and tracks; rigs of more than one
    camera are larger than counted here.
    """
    images = [reconstruction.image(image_id) for image_id in reconstruction.reg_image_ids()]
    return {
        "cameras.bin": 8
        + sum(24 + 8 * len(camera.params) for camera in reconstruction.cameras.values()),
        "images.bin": 8
        + sum(73 + len(image.name.encode()) + 24 * image.num_points2D() for image in images),
        "points3D.bin": 8
        + 51 * reconstruction.num_points3D()
        + 8 * reconstruction.compute_num_observations(),
        "rigs.bin": 8 + 16 * reconstruction.num_rigs(),
        "frames.bin": 8 + 84 * reconstruction.num_reg_frames(),
    }
