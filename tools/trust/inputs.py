"""An input of a run: its files, its truth, and the folder that holds them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from engine.types import Uint8Array
from trust.variation import Variation

INPUT_FOLDER = "{input}"  # stands for the folder in arguments
_DESCRIPTION = "input.json"
_ADDRESS = re.compile(r"[a-z]{2,}:")
_JPEG_QUALITY = 93
_CRF = "18"  # of H.264


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What ``livesfm run`` is given, and what is known about it.

    Paths are absolute, or relative to the input's folder.
    """

    source: str  # or an address, such as synthetic:town
    arguments: tuple[str, ...] = ()
    more_sources: tuple[str, ...] = ()
    truth: str | None = None  # TUM format, timestamps are positions in the source
    more_truths: tuple[str, ...] = ()  # of the other sources
    views: str | None = None  # what each frame of the source truly sees, see `places.TrueViews`
    matcher: str | None = None  # of `run_matcher.py`; None: one of the product
    focal_px: float | None = None  # true focal length
    overlay_box_px: tuple[float, float, float, float] | None = None  # x, y from, x, y to
    masks: str | None = None  # folder of NAME.png, black where the image is ignored

    def save(self, folder: Path) -> None:
        """Writes the description, last of all: a folder with one is complete."""
        (folder / _DESCRIPTION).write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Input:
        """Reads the description that `save` wrote.

        Raises:
            FileNotFoundError: the folder is not that of an input.
        """
        record: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return Input(**(record | lists))

    def with_arguments(self, *arguments: str) -> Input:
        """The same input with more arguments."""
        return replace(self, arguments=(*self.arguments, *arguments))

    def command(self, folder: Path) -> list[str]:
        """Sources and arguments of ``livesfm run``, with absolute paths."""
        sources = (
            each if _ADDRESS.match(each) else str(folder / each)
            for each in (self.source, *self.more_sources)
        )
        given = (part.replace(INPUT_FOLDER, str(folder)) for part in self.arguments)
        return [*sources, *given]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What inputs are made from."""

    data: Path  # the image sets
    cases: Path  # holds room.py
    variation: Variation

    def images(self, name: str) -> list[Path]:
        """The images of a set, in order."""
        return sorted((self.data / name / "images").glob("*.jpg"))

    def room(self) -> ModuleType:
        """The module that renders the textured room."""
        return _import_from(self.cases / "room.py")


Maker = Callable[[Kit, Path], Input]  # writes the files into an empty folder


def make_once(maker: Maker, kit: Kit, folder: Path) -> Input:
    """Makes an input unless the folder already holds it whole."""
    if not (folder / _DESCRIPTION).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        maker(kit, folder).save(folder)
    return Input.load(folder)


def read_rgb(path: Path) -> Uint8Array:
    """An image, (H, W, 3)."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_jpeg(path: Path, pixels: Uint8Array, *, exif: ExifTags | None = None) -> None:
    """Writes RGB pixels (H, W, 3), with EXIF tags."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(path, quality=_JPEG_QUALITY, exif=(exif or ExifTags()).block())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExifTags:
    """The EXIF tags that inputs have; None or "" is not written."""

    make: str = ""
    model: str = ""
    focal_length_mm: float | None = None
    focal_length_35mm: int | None = None
    digital_zoom_ratio: float | None = None
    focal_plane_px_per_cm: float | None = None

    def block(self) -> bytes:
        """The EXIF block."""
        from PIL import Image

        exif = Image.Exif()
        details = exif.get_ifd(0x8769)
        for directory, tag, value in (
            (exif, 0x010F, self.make or None),
            (exif, 0x0110, self.model or None),
            (details, 0x920A, self.focal_length_mm),
            (details, 0xA404, self.digital_zoom_ratio),
            (details, 0xA405, self.focal_length_35mm),
            (details, 0xA20E, self.focal_plane_px_per_cm),
            (details, 0xA210, self.focal_plane_px_per_cm and 3),
        ):
            if value is not None:
                directory[tag] = value
        return exif.tobytes()


def write_video(path: Path, frames: Sequence[Uint8Array], *, rate_hz: int) -> None:
    """Writes H.264 frames (H, W, 3), all of one size; the suffix says which container."""
    import av

    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate_hz, options={"crf": _CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_reference(path: Path, source: Path, rows: Sequence[int]) -> None:
    """Writes the given rows of a TUM file, by their timestamps, as 0, 1, 2, ...

    A row that the file does not have is left out.
    """
    lines = source.read_text(encoding="utf-8").splitlines()
    poses = {
        int(float(words[0])): words[1:]
        for words in (line.split() for line in lines if line and not line.startswith("#"))
    }
    text = "".join(
        f"{new} {' '.join(poses[old])}\n" for new, old in enumerate(rows) if old in poses
    )
    path.write_text(text, encoding="utf-8")


def _import_from(path: Path) -> ModuleType:
    name = f"trust_cases_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
