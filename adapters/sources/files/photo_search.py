"""Which files below a folder are its photos, and what is left out of it and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapters.images.heif import HEIF_SUFFIXES, is_heif_available
from adapters.images.heif import PACKAGE as HEIF_PACKAGE
from adapters.images.raw_photos import EXTRA as RAW_EXTRA
from adapters.images.raw_photos import PACKAGE as RAW_PACKAGE
from adapters.images.raw_photos import RAW_SUFFIXES, is_raw_available
from adapters.install_advice import how_to_install, how_to_install_packages
from adapters.sources.files.mask_files import MASKS_FOLDER
from adapters.sources.files.photo_files import IMAGE_SUFFIXES, natural_key, printable
from adapters.sources.files.photo_list import PhotoList
from engine.errors import SourceError
from engine.regular_files import regular_file_size
from engine.types import LeftOut

PHOTOS_FOLDER = "images"

_REDUCED = re.compile(r"images_\d+")  # the same photos with so many times shorter edges
_COPIES = frozenset(  # folders that cameras, disks and trainers make, in lower case
    {"masks", "mask", "thumbnails", "thumbs", "thumb", "previews", "@eadir", "__macosx"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".m4v", ".mts", ".webm", ".lrv"})
_OTHER_IMAGES = frozenset(
    {".gif", ".jp2", ".jxl", ".psd", ".exr", ".hdr", ".insp", ".gpr", ".x3f", ".3fr", ".iiq"}
)
_BESIDE_PHOTOS = frozenset({".aae", ".thm", ".xmp"})  # edits, thumbnails and figures of a photo
_NO_PHOTO = "no photo"
_COPY = "copies or masks in "  # and the folder's name
_MASK = "a mask"
_RUN = "in the folder of a run"
_HERE = PurePosixPath()
_BESIDE = f"beside {PHOTOS_FOLDER}/ of a data set"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImages:
    """The images that a path stands for."""

    root: Path
    files: Sequence[PurePosixPath]  # in root, in natural order
    left_out: tuple[LeftOut, ...] = ()

    @property
    def words(self) -> str:
        """How many files were taken and left out, in a line; empty where all were taken."""
        if not self.left_out:
            return ""
        num_left_out = sum(one.num_files for one in self.left_out)
        total = len(self.files) + num_left_out
        return f"{total} files: {len(self.files)} taken; left out: {words_of(self.left_out)}"


def words_of(left_out: Sequence[LeftOut]) -> str:
    """What was left out, for people; what is no photo anyway comes last, in one."""
    said = [f"{one.num_files} {one.kind} ({one.reason})" for one in left_out if one.is_missed]
    for reason in sorted({one.reason for one in left_out if not one.is_missed}):
        of_it = [one for one in left_out if one.reason == reason]
        kinds = ", ".join(one.kind for one in of_it)
        said.append(f"{sum(one.num_files for one in of_it)} {kinds} ({reason})")
    return "; ".join(said)


def _of_recordings(folder: Path) -> str:
    """What to do with files of a ROS 2 recording that lie in a folder without its metadata."""
    files = sorted(file for kind in ("mcap", "db3") for file in folder.glob(f"*.{kind}"))
    if not files:
        return ""
    return (
        f"; a recording of ROS 2 that was closed has a metadata.yaml: name {files[0].name} itself,"
        f" or make one: ros2 bag reindex {folder}"
    )


def find_images(path: Path) -> FoundImages:
    """The images of a folder and its subfolders, or one image, as the source takes them.

    Raises:
        SourceError: there are none, or the path cannot be read.
    """
    try:
        if path.is_dir():
            found = _find_in_folder(path)
            if not found.files:
                there = words_of(found.left_out)
                said = f"it holds {there}" if there else f"photos are {_suffixes()}"
                raise SourceError(f"{path}: no image in this folder; {said}{_of_recordings(path)}")
            return found
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
        regular_file_size(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES | RAW_SUFFIXES:
        raise SourceError(f"{path}: neither a folder nor an image ({_suffixes()})")
    if reason := _unreadable_kinds().get(suffix):
        raise SourceError(f"{path}: {reason}")
    return FoundImages(root=path.parent, files=[PurePosixPath(path.name)])


def find_listed(photos: PhotoList) -> FoundImages:
    """The images among files that are named one by one, in their order.

    Raises:
        SourceError: there are none.
    """
    reasons = _reasons(photos.files)
    files = [file for file in photos.files if file not in reasons]
    left_out = counted(reasons)
    if photos.num_repeated:
        repeated = LeftOut(
            kind="files",
            reason="named once more",
            num_files=photos.num_repeated,
            example="",
            is_missed=False,
        )
        left_out = (*left_out, repeated)
    if not files:
        raise SourceError(f"{photos.folder}: no image is named there: {words_of(left_out)}")
    return FoundImages(root=photos.folder, files=files, left_out=left_out)


def is_photo_name(name: str) -> bool:
    """Whether a file is a photo, as far as its name says."""
    return _is_photo(PurePosixPath(name))


def is_beside_photos(name: str) -> bool:
    """Whether cameras write such files beside photos, or it is an image that nothing here reads."""
    return PurePosixPath(name).suffix.lower() in _OTHER_IMAGES | _BESIDE_PHOTOS


def _find_in_folder(folder: Path) -> FoundImages:
    """The photos below a folder.

    Raises:
        OSError: the folder cannot be read.
    """
    found = dict(_walked(folder))
    if not any(_is_photo(file) and not reason for file, reason in found.items()):
        found = {  # copies are better than nothing
            file: "" if _is_photo(file) and (reason == _MASK or _COPY in reason) else reason
            for file, reason in found.items()
        }
    root = folder
    if _is_dataset(found, has_masks=(folder / MASKS_FOLDER).is_dir()):
        # Of COLMAP or a trainer: what lies beside its images are no other cameras.
        root = folder / PHOTOS_FOLDER
        found = {
            file: reason
            or ("" if file.parts[0] == PHOTOS_FOLDER or not _is_photo(file) else _BESIDE)
            for file, reason in found.items()
        }
    found |= _reasons([file for file, reason in found.items() if not reason])
    files = [(folder / file).relative_to(root) for file, reason in found.items() if not reason]
    return FoundImages(
        root=root,
        files=sorted((PurePosixPath(file) for file in files), key=natural_key),
        left_out=counted(found),
    )


def _is_dataset(found: Mapping[PurePosixPath, str], *, has_masks: bool) -> bool:
    """Whether a folder's photos are those of ``images`` in it, and nothing beside that."""
    tops = {file.parts[0] for file in found if len(file.parts) > 1}
    photos = [file for file, reason in found.items() if _is_photo(file) and not reason]
    has_own = any(len(file.parts) == 1 for file in photos)
    has_images = any(file.parts[0] == PHOTOS_FOLDER for file in photos)
    return has_images and not has_own and (has_masks or any(map(_REDUCED.fullmatch, tops)))


def _walked(
    folder: Path,
    inside: PurePosixPath = _HERE,
    *,
    reason: str = "",
    seen: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[PurePosixPath, str]]:
    """Files below a folder, each with why it is left out; "": it is not, as far as folders say.

    Hidden folders are not entered, nor are those that a link leads back to.
    """
    status = (folder / inside).stat()
    seen |= {(status.st_dev, status.st_ino)}
    entries = sorted((folder / inside).iterdir())
    names = {entry.name for entry in entries}
    for entry in entries:
        file = inside / entry.name
        is_link_like_a_photo = entry.is_symlink() and _is_photo(file)  # counted as unreadable
        if entry.is_dir() and not is_link_like_a_photo:
            status = entry.stat()
            if entry.name.startswith(".") or (status.st_dev, status.st_ino) in seen:
                continue
            why = reason or _reason_of_folder(folder, file, beside=names)
            try:
                yield from _walked(folder, file, reason=why, seen=seen)
            except OSError as error:
                yield file, f"a folder that cannot be read: {error.strerror or error}"
        elif not entry.name.startswith(".") and (entry.is_file() or entry.is_symlink()):
            yield file, reason
        elif _is_photo(file) and entry.is_file():
            yield file, "hidden"


def _reason_of_folder(root: Path, folder: PurePosixPath, *, beside: Collection[str]) -> str:
    """Why the files of a folder are left out; "": they are not."""
    if folder == PurePosixPath(MASKS_FOLDER):
        return _MASK
    if (root / folder / "frames.csv").is_file() and (root / folder / "snapshots").is_dir():
        return _RUN
    is_reduced = _REDUCED.fullmatch(folder.name) is not None and PHOTOS_FOLDER in beside
    return f"{_COPY}{folder.name}/" if is_reduced or folder.name.lower() in _COPIES else ""


def reason_by_name(name: str, *, unreadable: Mapping[str, str] | None = None) -> str:
    """Why a file of this name is no photo that is read; "": it is one, as far as its name says.

    Args:
        name: of the file.
        unreadable: reasons by suffix, of kinds for which a package is missing; None: look.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "a video is a source of its own"
    if suffix in _OTHER_IMAGES:
        return "cannot be read: save it as JPEG"
    if suffix not in IMAGE_SUFFIXES | RAW_SUFFIXES:
        return _NO_PHOTO
    return (_unreadable_kinds() if unreadable is None else unreadable).get(suffix, "")


def counted(reasons: Mapping[PurePosixPath, str]) -> tuple[LeftOut, ...]:
    """Files that have a reason, by kind and reason; masks are reported with their photos."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], PurePosixPath] = {}
    for file, reason in reasons.items():
        if reason not in {"", _MASK}:
            kind = (file.suffix.lower() or "files", reason)
            counts[kind] += 1
            first.setdefault(kind, file)
    return tuple(
        LeftOut(
            kind=kind,
            reason=reason,
            num_files=number,
            example=str(printable(first[kind, reason])),
            is_missed=reason not in {_NO_PHOTO, _RUN} and _COPY not in reason,
        )
        for (kind, reason), number in sorted(counts.items())
    )


def _reasons(files: Sequence[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Why some files are not taken."""
    unreadable = _unreadable_kinds()
    by_name = {file: reason_by_name(file.name, unreadable=unreadable) for file in files}
    stems = {
        file.with_suffix("")
        for file, reason in by_name.items()
        if not reason and file.suffix.lower() not in RAW_SUFFIXES
    }
    twins = {
        file: "the raw of a photo that is taken"
        for file in files
        if file.suffix.lower() in RAW_SUFFIXES and file.with_suffix("") in stems
    }
    return {file: reason for file, reason in by_name.items() if reason} | twins


def _unreadable_kinds() -> dict[str, str]:
    """Suffixes of photos for which a package is missing, and how to install it."""
    found: dict[str, str] = {}
    if not is_heif_available():
        command = how_to_install_packages(HEIF_PACKAGE)
        found |= dict.fromkeys(HEIF_SUFFIXES, f"needs {HEIF_PACKAGE}: {command}")
    if not is_raw_available():
        command = how_to_install(RAW_EXTRA)
        found |= dict.fromkeys(RAW_SUFFIXES, f"needs {RAW_PACKAGE}: {command}")
    return found


def _is_photo(file: PurePosixPath) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES | RAW_SUFFIXES


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES | RAW_SUFFIXES))
