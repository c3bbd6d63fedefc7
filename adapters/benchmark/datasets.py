"""What is benchmarked: a folder of images or a video, and the images that peers get of it."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.benchmark.references import Reference, find_reference
from adapters.images.decoding import read_image_header
from adapters.images.exif import Exif, read_exif
from adapters.run_files import FrameRow
from adapters.sources.files.photo_search import PHOTOS_FOLDER, FoundImages, find_images
from adapters.sources.files.video_file import VideoFile
from adapters.sources.files.video_frames import open_container, picture_stream
from engine.config import SourcesConfig
from engine.errors import ConfigError, SourceError
from engine.types import Arrival, Frame, FrameId

PEER_RATE_HZ = 3.0  # of the frames of a video that peers get unless another step is asked for

_VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mts", ".mpg"})
_FRAME_FOLDERS = frozenset({PHOTOS_FOLDER, "frames", "photos", "input"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Images or a video, with what is known of where they were taken from."""

    name: str
    source: Path  # as LiveSfM gets it
    names: tuple[str, ...]  # of the images by their index in the source; of a video: none
    reference: Reference | None

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return not self.names

    @property
    def frames(self) -> tuple[FrameRow, ...]:
        """The images of a folder; of a video: none."""
        return tuple(
            _row(name, index=index, captured_at_s=float(index), source=self.source)
            for index, name in enumerate(self.names)
        )

    def named(self, frames: Sequence[FrameRow]) -> list[FrameRow]:
        """Frames of a run under the names that their files have here.

        A run calls its images by other names where those would not do, such as a PNG's.
        """
        if self.is_video:
            return list(frames)
        return [replace(frame, name=self.names[frame.index]) for frame in frames]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerImages:
    """The images that peers get."""

    root: Path
    frames: tuple[FrameRow, ...]  # their names are paths in root, their index that in the source
    camera_mode: str  # of COLMAP: which of them share a camera
    step: int  # 1: all frames of the source

    @property
    def names(self) -> list[str]:
        """Their paths in root."""
        return [frame.name for frame in self.frames]

    def in_words(self) -> str:
        """Which frames they are, and which share a camera."""
        which = "all frames" if self.step == 1 else f"every {self.step}th frame"
        return f"{which}, {len(self.frames)}, cameras {self.camera_mode}"


def find_dataset(path: Path, *, reference: Path | None = None) -> Dataset:
    """The dataset that a path stands for.

    A folder that holds ``images`` stands for those; one without any image, for the only video in
    it. A reference is looked for in the folder; beside it, where it is named as folders of frames
    are; and beside a video.

    Args:
        path: a folder or a video.
        reference: the reference to use; None: the one that lies there, if any.

    Raises:
        ConfigError: there is nothing of the kind, or ``reference`` is not one.
    """
    path = path.resolve()
    source = _source_in(path)
    home = source.parent if source.name in _FRAME_FOLDERS or source.is_file() else source
    name = home.name if source.is_dir() or home == path else source.stem
    folders = [path] if path.is_dir() and path != home else []
    return Dataset(
        name=name,
        source=source,
        names=() if source.is_file() else tuple(map(str, _images_of(source).files)),
        reference=find_reference([*folders, home], asked=reference),
    )


def images_for_peers(dataset: Dataset, *, step: int | None, folder: Path) -> PeerImages:
    """The images of a dataset for programs that read no videos.

    Args:
        dataset: of a folder, all its images where they are.
        step: every so many frames of a video; None: about `PEER_RATE_HZ`.
        folder: where the frames of a video are written as PNG.

    Raises:
        ConfigError: there is no image, or the video cannot be read.
    """
    if dataset.is_video:
        return _decoded(dataset.source, step=step, folder=folder)
    found = _images_of(dataset.source)
    return PeerImages(
        root=found.root, frames=dataset.frames, camera_mode=_camera_mode(found), step=1
    )


def _source_in(path: Path) -> Path:
    """What LiveSfM gets: a folder of images or a video."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")
    if (path / PHOTOS_FOLDER).is_dir():
        return path / PHOTOS_FOLDER
    videos = sorted(each for each in path.iterdir() if each.suffix.lower() in _VIDEO_SUFFIXES)
    try:
        find_images(path)
    except SourceError as error:
        if len(videos) != 1:
            raise ConfigError(f"{path}: holds neither images nor a single video") from error
        return videos[0]
    return path


def _images_of(source: Path) -> FoundImages:
    try:
        return find_images(source)
    except SourceError as error:
        raise ConfigError(str(error)) from error


def _row(name: str, *, index: int, captured_at_s: float, source: Path) -> FrameRow:
    return FrameRow(
        source=str(source),
        index=index,
        name=name,
        captured_at_s=captured_at_s,
        status="keyframe",
        pose="",
        map_number="",
    )


def _camera_mode(found: FoundImages) -> str:
    """COLMAP's mode that makes as few cameras as the images' sizes and EXIF allow.

    AUTO shares a camera by EXIF alone, and gives each image without EXIF one of its own.
    """
    cameras: dict[Path, set[tuple[object, ...]]] = defaultdict(set)
    for file in found.files:
        path = found.root / file
        header = read_image_header(path.read_bytes())
        exif = Exif() if header is None else read_exif(header.exif_block)
        size = () if header is None else (header.width, header.height)
        key = (exif.make, exif.model, exif.serial, exif.lens, exif.focal_length_mm, *size)
        cameras[path.parent].add(key)
    if any(len(each) > 1 for each in cameras.values()):
        return "AUTO"
    return "SINGLE" if len(cameras) == 1 else "PER_FOLDER"


def _decoded(video: Path, *, step: int | None, folder: Path) -> PeerImages:
    """Every so many frames of a video, written as PNG, as LiveSfM decodes them."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        step = step or max(1, round(_rate_hz(video) / PEER_RATE_HZ))
        frames = asyncio.run(_write_frames(video, step=step, folder=folder))
    except SourceError as error:
        raise ConfigError(str(error)) from error
    return PeerImages(root=folder, frames=tuple(frames), camera_mode="SINGLE", step=step)


async def _write_frames(video: Path, *, step: int, folder: Path) -> list[FrameRow]:
    import cv2

    ids = itertools.count(1)
    source = VideoFile(
        video,
        config=SourcesConfig(every_nth_frame=step),
        next_frame_id=lambda: FrameId(next(ids)),
    )
    written = []
    async with aclosing(source.frames()) as arrivals:
        async for arrival in arrivals:
            frame = arrival.decode() if isinstance(arrival, Arrival) else None
            if not isinstance(frame, Frame):
                continue
            name = f"{frame.index:06d}.png"
            cv2.imwrite(str(folder / name), cv2.cvtColor(frame.pixels, cv2.COLOR_RGB2BGR))
            written.append(
                _row(name, index=frame.index, captured_at_s=frame.captured_at_s, source=video)
            )
    return written


def _rate_hz(video: Path) -> float:
    """The average rate of a video's frames; `PEER_RATE_HZ` where it has none."""
    import av

    try:
        with open_container(str(video.absolute())) as container:
            stream = picture_stream(container)
            return float(stream.average_rate or PEER_RATE_HZ) if stream else PEER_RATE_HZ
    except (av.error.FFmpegError, OSError) as error:
        raise SourceError(f"{video}: not a readable video: {error.strerror or error}") from error
