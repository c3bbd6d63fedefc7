"""Image files as photos: which they are, in what order, under what names, and what is in them."""

from __future__ import annotations

import errno
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from adapters.images.decoding import DecodedImage, RefusedImage, decode_image
from adapters.images.exif import Exif
from adapters.images.heif import HEIF_SUFFIXES
from adapters.images.intrinsics import IntrinsicsReader, is_spherical_prior
from adapters.images.raw_photos import RAW_SUFFIXES, decode_raw
from adapters.sources.files.hemispheres import Hemispheres
from adapters.sources.files.mask_files import MaskFiles
from engine.config import SourcesConfig
from engine.ports import FrameIds
from engine.regular_files import read_regular_file
from engine.types import (
    Arrival,
    BoolArray,
    DropReason,
    Frame,
    GpsFix,
    IntrinsicsPrior,
    RejectedFrame,
)

_SAME_ZOOM = 0.01  # between logarithms of focal lengths

_SPHERICAL = "spherical"  # ends the keys of cameras that see all around
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})
IMAGE_SUFFIXES = JPEG_SUFFIXES | HEIF_SUFFIXES | {".png", ".tif", ".tiff", ".bmp", ".webp"}

_NOT_JPEG = (IMAGE_SUFFIXES | RAW_SUFFIXES) - JPEG_SUFFIXES
_CARD_FOLDER = re.compile(r"\d{3}[A-Z0-9_]{5}", re.IGNORECASE)  # DCF 2.0, section 3.2.2


class PhotoReader:
    """Reads the image files of one source; its photos are decoded one after the other, in order."""

    def __init__(
        self,
        root: Path,
        *,
        label: str,
        config: SourcesConfig,
        next_frame_id: FrameIds,
        single_camera_per_size: bool,
        masks: MaskFiles | None = None,
        files: Sequence[PurePosixPath] = (),
        positions: Mapping[PurePosixPath, GpsFix] | None = None,
    ) -> None:
        """Takes what all files share.

        Args:
            root: the folder that the files lie in.
            label: the source as the user named it.
            config: limits on what is taken.
            next_frame_id: gives out frame ids; called on the thread that decodes.
            single_camera_per_size: images of one subfolder, camera, lens, zoom and size share a
                camera; False: each image has its own.
            masks: of the photos that have one; None: of none.
            files: all of them, where they are known; they give each other their hemispheres.
            positions: of photos by their paths in the folder, which win over EXIF; None: they are
                not given.
        """
        self._root = root
        self._label = label
        self._config = config
        self._next_frame_id = next_frame_id
        self._single_camera_per_size = single_camera_per_size
        self._masks = masks
        self._positions = positions
        self._intrinsics = IntrinsicsReader()
        self._zooms: dict[str, list[float]] = {}  # values of tags met so far, by unit
        self._hemispheres = Hemispheres(root, files, label=label, config=config)
        self._previous = b""  # of the readable image before

    def read(self, file: PurePosixPath, *, index: int, frame_name: str) -> Arrival | RejectedFrame:
        """The photo in a file, given by its path in the folder, before it is decoded.

        Its capture time is ``index``. A file with the same bytes as the readable image before is
        refused when it is decoded.
        """
        try:
            data = read_regular_file(self._root / file, max_bytes=self._config.max_image_bytes)
        except OSError as error:
            is_large = error.errno == errno.EFBIG
            refused = RefusedImage(
                reason=DropReason.TOO_LARGE if is_large else DropReason.UNREADABLE,
                detail=error.strerror or str(error),
            )
            return self._rejected(file, refused, index=index)
        received_at_s = time.monotonic()
        self._hemispheres.read(data)

        def decode() -> Frame | RejectedFrame:
            image = self._decoded(file, data)
            if isinstance(image, RefusedImage):
                return self._rejected(file, image, index=index)
            mask = self._mask_of(file, image)
            if isinstance(mask, RefusedImage):
                return self._rejected(file, mask, index=index)
            return self._frame(
                file,
                image,
                mask,
                index=index,
                frame_name=frame_name,
                received_at_s=received_at_s,
            )

        return Arrival(
            source=self._label,
            index=index,
            name=str(printable(file)),
            captured_at_s=float(index),
            num_bytes=len(data),
            decode=decode,
        )

    def new_words(self) -> str:
        """What there is to report of the photos that were read, once; empty: nothing new."""
        return printable_text(self._hemispheres.new_words())

    def _frame(
        self,
        file: PurePosixPath,
        image: DecodedImage,
        mask: BoolArray | None,
        *,
        index: int,
        frame_name: str,
        received_at_s: float,
    ) -> Frame:
        prior = self._intrinsics.of_image(image)
        gps, gps_problem = self._hemispheres.position_of(image.exif)
        if self._positions is not None:
            if (named := self._positions.get(file)) is not None:
                gps, gps_problem = named, ""
            elif gps is None and not gps_problem:
                gps_problem = "the files of positions do not name it"
        return Frame(
            frame_id=self._next_frame_id(),
            camera_key=self._camera_key(file, image, prior) or frame_name,
            source=self._label,
            index=index,
            name=frame_name,
            captured_at_s=float(index),
            received_at_s=received_at_s,
            pixels=image.pixels,
            jpeg=image.jpeg,
            gps=gps,
            gps_problem=gps_problem,
            mask=mask,
            quarter_turns=image.exif.quarter_turns,
            intrinsics_prior=prior,
        )

    def _mask_of(self, file: PurePosixPath, image: DecodedImage) -> BoolArray | None | RefusedImage:
        if self._masks is None:
            return None
        return self._masks.mask_of(file, image, config=self._config)

    def _rejected(self, file: PurePosixPath, refused: RefusedImage, *, index: int) -> RejectedFrame:
        return RejectedFrame(
            source=self._label,
            index=index,
            name=str(printable(file)),
            captured_at_s=float(index),
            reason=refused.reason,
            detail=refused.detail,
        )

    def _decoded(self, file: PurePosixPath, data: bytes) -> DecodedImage | RefusedImage:
        if data and data == self._previous:
            detail = "the same bytes as the image before"
            return RefusedImage(reason=DropReason.DUPLICATE, detail=detail)
        decode = decode_raw if file.suffix.lower() in RAW_SUFFIXES else decode_image
        image = decode(data, config=self._config)
        if isinstance(image, DecodedImage):
            self._previous = data
        return image

    def _camera_key(
        self, file: PurePosixPath, image: DecodedImage, prior: IntrinsicsPrior | None
    ) -> str:
        """The key of the camera that images share; empty where each has its own."""
        if not self._single_camera_per_size:
            return ""
        height, width = image.pixels.shape[:2]
        exif = image.exif
        folders = printable(file).parts[:-1]
        subfolder = "/".join(part for part in folders if not _CARD_FOLDER.fullmatch(part))
        camera = f"{exif.make} {exif.model}".strip()
        size = f"{width}x{height}"
        # A dark first photo must not make a flat camera of all the spherical ones behind it.
        kind = _SPHERICAL if is_spherical_prior(prior) else ""
        parts = (subfolder, camera, exif.serial, exif.lens, self._zoom(exif), size, kind)
        return "|".join(printable_text(part) for part in parts if part)

    def _zoom(self, exif: Exif) -> str:
        """The tags that say how far an image is zoomed.

        A zoom lens takes any focal length: one close to that of an earlier image counts as the
        same.
        """
        said = (
            (exif.focal_length_mm, "mm"),
            (exif.focal_length_35mm, "mm in 35mm"),
            (exif.digital_zoom_ratio, "x"),
        )
        return " ".join(f"{self._seen(value, unit):g}{unit}" for value, unit in said if value)

    def _seen(self, value: float, unit: str) -> float:
        """The value of an earlier image that is close to this one, or this one."""
        seen = self._zooms.setdefault(unit, [])
        close = [one for one in seen if abs(math.log(value / one)) < _SAME_ZOOM]
        if close:
            return min(close, key=lambda one: abs(math.log(value / one)))
        seen.append(value)
        return value


def natural_key(file: PurePosixPath) -> tuple[tuple[tuple[str | int, ...], ...], str]:
    """Orders img2 before img10; text and numbers alternate, so like is compared with like."""
    parts = (re.split("([0-9]+)", part.casefold()) for part in file.parts)
    keys = tuple(
        tuple(int(piece) if place % 2 else piece for place, piece in enumerate(part))
        for part in parts
    )
    return keys, str(file)


def possible_frame_names(file: PurePosixPath) -> Iterator[str]:
    """Names for a file's keyframe image, best first; the first that is free is the one to take.

    Keyframe images are JPEG files: a JPEG keeps its name, any other image gets an extension behind
    its own (a.HEIC -> a.HEIC.jpg). A name is free if no other is the same but for the case of its
    letters: some file systems have one file for both.
    """
    name = printable(file)
    if is_jpeg(file):
        yield str(name)
    yield f"{name}.jpg"
    yield from (f"{name}.{number}.jpg" for number in itertools.count(2))


def known_frame_names(file: PurePosixPath) -> tuple[str, ...]:
    """Names that a run may have a file under, surest first.

    Its own, if it could not be read; those of its keyframe image; and for an image other than a
    JPEG also the one with its extension changed (a.png -> a.jpg), which older runs have.
    """
    name = printable(file)
    changed = str(name.with_suffix(".jpg"))
    names = (str(name), *itertools.islice(possible_frame_names(file), 2))
    return names if is_jpeg(file) else (*names, changed)


def without_image_endings(photo: PurePosixPath) -> PurePosixPath:
    """A photo's path without its ending; of a keyframe image without that of its file, too."""
    bare = photo.with_suffix("")
    is_reencoded = photo.suffix.lower() in JPEG_SUFFIXES and bare.suffix.lower() in _NOT_JPEG
    return bare.with_suffix("") if is_reencoded else bare


def is_jpeg(file: PurePosixPath) -> bool:
    """Whether its name says so."""
    return file.suffix.lower() in JPEG_SUFFIXES


def printable(file: PurePosixPath) -> PurePosixPath:
    """The path with what no text file or other system can carry replaced by an underscore."""
    return PurePosixPath(printable_text(str(file)))


def printable_text(text: str) -> str:
    """The text with what no text file or other system can carry replaced by an underscore."""
    return "".join(char if char.isprintable() and char != "\\" else "_" for char in text)
