"""Folder check: the files that are open are still those in the run folder.

A folder that was renamed is followed. Files that were deleted or replaced are made again: what is
open can still be read. A run whose folder was deleted, or whose disk cannot be written any more,
goes on in a folder ``RUN.rescued``, with all that can still be read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import ConfigError, JournalError
from engine.events import ALSO_AN_EVENT, RunFolderMoved, Warned
from engine.output.disk import rescue_folders
from engine.output.journal import Journal, mask_name
from engine.output.run_folder import MASKS_FOLDER, RunFolder
from engine.ports import EventSink

logger = logging.getLogger(__name__)

DELETED = "was deleted, or its disk is not there any more"


class FolderCheck:
    """Keeps a run in a folder that exists and can be written.

    Args:
        folder: of the run.
        journal: in it.
        emit: gets what happened.
        reserve: how many bytes another disk must have free.
    """

    def __init__(
        self, folder: RunFolder, journal: Journal, *, emit: EventSink, reserve: Callable[[], int]
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._emit = emit
        self._reserve = reserve
        self._is_stranded = False  # no other folder can take the run
        self._is_elsewhere = False  # since a folder could not be written

    def check(self) -> bool:
        """Whether something was moved or made again, so that documents may be missing."""
        if self._folder.is_in_place and self._journal.is_in_place:
            return False
        path = self._folder.find()
        if path is None:
            return self.rescue(DELETED)
        former, missing = self._folder.path, self._missing()
        try:
            self._move(path)
        except (JournalError, ConfigError) as error:
            return self.rescue(f"cannot be used any more ({error})")
        if path != former:
            self._moved(former, reason="was renamed", num_images_lost=0)
        else:
            self._warn(
                f"{path}: {', '.join(missing)} had been deleted or replaced and"
                f" {'is' if len(missing) == 1 else 'are'} made again"
            )
        return True

    def rescue(self, reason: str, *, is_last_try: bool = False) -> bool:
        """Goes on in another folder; whether there is one.

        Where a folder cannot be written and then the other one cannot either, a third would not
        help: it is not the disk, as where files may not be large.

        Args:
            reason: what is wrong with the folder, as the end of a sentence.
            is_last_try: also where there was none before.
        """
        if self._is_stranded and not is_last_try:
            return False
        former = self._folder.path
        if self._is_elsewhere and reason != DELETED:
            self._strand(f"{former} {reason}, as the folder before it")
            return False
        for path in rescue_folders(
            former, device=self._folder.device, min_free_bytes=self._reserve()
        ):
            if not self._try_to_move(path):
                continue
            self._bring_live_trajectories(former)
            self._moved(former, reason=reason, num_images_lost=self._bring_images(former))
            self._is_stranded = False
            self._is_elsewhere |= reason != DELETED
            return True
        self._strand(f"{former} {reason}, and no other folder can take the run")
        return False

    def _strand(self, why: str) -> None:
        if not self._is_stranded:
            self._is_stranded = True
            self._warn(f"{why}: what is mapped from now on may be in memory only")

    def _try_to_move(self, path: Path) -> bool:
        """Makes a folder and goes on in it; False, with no folder left, where that cannot be done.

        One that another run made or took meanwhile stays as it is.
        """
        try:
            path.mkdir()
        except OSError as error:
            logger.debug("%s: %s", path, error)
            return False
        try:
            self._move(path)
        except ConfigError as error:
            logger.debug("%s", error)
            with suppress(OSError):  # a lock that is held is in it
                path.rmdir()
        except (JournalError, OSError) as error:
            logger.debug("%s: %s", path, error)
            shutil.rmtree(path, ignore_errors=True)
        else:
            return True
        return False

    def _missing(self) -> list[str]:
        missing = self._folder.missing()
        return missing if self._journal.is_in_place else [*missing, "database.db"]

    def _move(self, path: Path) -> None:
        self._folder.move(path)
        self._journal.move(path)

    def _bring_images(self, former: Path) -> int:
        """Copies keyframe images and masks that can still be read; returns how many cannot."""
        num_lost = 0
        for name in self._journal.image_names():
            num_lost += not _copied(former, self._folder.path, Path("images") / name)
            _copied(former, self._folder.path, Path(MASKS_FOLDER) / mask_name(name))
        return num_lost

    def _bring_live_trajectories(self, former: Path) -> None:
        """Copies the poses as first reported that can still be read; the first file is open."""
        try:
            names = [path.name for path in former.glob("trajectory_live_*.txt")]
        except OSError:
            return
        for name in names:
            _copied(former, self._folder.path, Path(name))

    def _moved(self, former: Path, *, reason: str, num_images_lost: int) -> None:
        path = self._folder.path
        self._emit(
            RunFolderMoved(
                former_path=str(former),
                path=str(path),
                reason=reason,
                num_images_lost=num_images_lost,
            )
        )
        lost = f"; {num_images_lost} keyframe images are lost" if num_images_lost else ""
        self._warn(f"{former} {reason}: the run goes on in {path}{lost}")

    def _warn(self, message: str) -> None:
        logger.error("%s", message, extra=ALSO_AN_EVENT)
        self._emit(Warned(message=message))


def _copied(former: Path, path: Path, name: Path) -> bool:
    """Whether a file is in the new folder, after it was copied from the former one if need be."""
    source, target = former / name, path / name
    try:
        if target.exists():
            return True
        if not source.exists():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True
