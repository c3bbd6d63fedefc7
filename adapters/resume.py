"""What a run goes on from: its folder or a copy of another one, its configuration and sources."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.sources.files.photo_list import photo_list_of
from engine.config import Config, load_config
from engine.errors import ConfigError, JournalError
from engine.ports import ResumableSource, Source
from engine.types import Received, SourceInfo

if TYPE_CHECKING:
    from engine.output.recovery import FormerRun, FormerSource
    from engine.output.run_lock import RunLock
    from engine.run.ingestion import SourceRole

logger = logging.getLogger(__name__)

_REPLAY = "replay:"  # before the folder of a recording

# Settings that the stored keyframes were made by: others would contradict them.
_FIXED = (
    "matching.matcher",
    "mast3r.checkpoint",
    "mast3r.retrieval_checkpoint",
    "mast3r.implementation",
    "cameras.single_camera_per_size",
    "sources.topics",  # by which the images of a recording are counted
)
_RESUMABLE_MATCHERS = frozenset({"sift"})  # others keep of a keyframe what no file holds


@dataclass(slots=True, kw_only=True, eq=False)
class GoingOn:
    """A run folder that is locked and read, for a run that goes on in it."""

    path: Path
    config: Config
    former: FormerRun | None  # None: the run has begun; its keyframes are large
    lock: RunLock
    onto: str = ""  # the run of which the folder is a copy; "": it is that run's own

    def give_up(self) -> None:
        """Lets go of the folder, and deletes the copy of a run that has not begun."""
        if self.onto and self.former is not None:
            from engine.output.run_copy import delete_copy

            delete_copy(self.path, self.lock)
        else:
            self.lock.let_go()


def go_on(path: Path, *, overlays: Sequence[str], settings: Sequence[str]) -> GoingOn:
    """Locks and reads the folder of a run that ended, was stopped or was killed.

    Args:
        path: the folder.
        overlays: presets or YAML files over the run's own configuration.
        settings: ``section.key=value``, over these.

    Raises:
        ConfigError: it is no run, a live run holds it, or a setting contradicts its keyframes.
        JournalError: its journal cannot be read.
    """
    from engine.output.run_lock import RunLock

    _refuse_other_folders(path)
    config = _config_of(path, overlays=overlays, settings=settings)
    lock = RunLock.acquire(path)
    try:
        return GoingOn(path=path, config=config, former=_read(path), lock=lock)
    except BaseException:
        lock.let_go()
        raise


def begin_from(
    former: Path, path: Path, *, overwrite: bool, overlays: Sequence[str], settings: Sequence[str]
) -> GoingOn:
    """Makes the folder of a run that begins with the map of another, which stays as it is.

    Args:
        former: the other run's folder.
        path: the new one; see ``RunFolder.create``.
        overwrite: a former run may be in the new folder.
        overlays: presets or YAML files over the other run's configuration.
        settings: ``section.key=value``, over these.

    Raises:
        ConfigError: there is no other run or a live one holds it, the folder cannot be used or is
            the other run's own, or a setting contradicts the keyframes.
        JournalError: the other run cannot be read or copied.
    """
    from engine.output.run_copy import copy_run, delete_copy

    _refuse_other_folders(former)
    if former.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"{path}: is or holds the run to begin with; choose another folder, or go on with that"
            f" run: livesfm resume {former}"
        )
    config = _config_of(former, overlays=overlays, settings=settings)
    lock = copy_run(former, path, overwrite=overwrite)
    try:
        return GoingOn(path=path, config=config, former=_read(path), lock=lock, onto=str(former))
    except BaseException:
        delete_copy(path, lock)
        raise


def refuse_replays(specs: Sequence[str]) -> None:
    """Refuses recordings as sources of a run that goes on: they bring frame ids that it may have.

    Raises:
        ConfigError: one is among them.
    """
    from adapters.recordings.replay import replayed_folder

    for spec in specs:
        if replayed_folder(spec) is not None:
            raise ConfigError(f"{spec}: repeats a whole run, so it cannot be added to another one")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedProgram:
    """The source of a program that added frames to a former part of a run: it gives no more."""

    info: SourceInfo

    async def frames(self) -> AsyncGenerator[Received, None]:
        """Yields nothing."""
        return
        yield  # makes it a generator


def ended_programs(former: FormerRun) -> list[EndedProgram]:
    """The sources of a run by which programs added frames."""
    return [
        EndedProgram(
            info=SourceInfo(
                label=source.label,
                is_live=source.is_live,
                is_sequence=True,
                num_frames=0,
                has_many_cameras=True,
            )
        )
        for source in former.sources
        if source.is_of_program
    ]


def addresses_of(former: FormerRun) -> list[str]:
    """What opens the sources of a run again; those of programs are not among them.

    Raises:
        ConfigError: none of them can be opened by what is kept: it held a secret, or was a replay;
            and no program added frames.
    """
    addresses = []
    for source in former.sources:
        if source.is_of_program:
            logger.info(
                "%s: a program added its frames, and they do not come again; the run finishes what"
                " it has of them",
                source.label,
            )
        elif source.address.startswith(_REPLAY):
            logger.warning(
                "%s: came from a recording, %s, which repeats a whole run and cannot go on",
                source.label,
                source.address.removeprefix(_REPLAY),
            )
        elif source.address:
            addresses.append(_address_of(source))
        else:
            logger.warning(
                "%s: its address held a secret, which no file keeps; to go on with it, name it"
                " again: livesfm resume %s ADDRESS",
                source.label,
                former.stored.path,
            )
    if not addresses and not any(source.is_of_program for source in former.sources):
        raise ConfigError(
            f"{former.stored.path}: none of its sources can be opened by what the run keeps of"
            f" them; name one: livesfm resume {former.stored.path} SOURCE"
        )
    return addresses


def roles_of(
    specs: Sequence[str], sources: Sequence[Source], former: FormerRun | None
) -> list[SourceRole]:
    """What each source is called in the run; those that the run had before go on as they were.

    Args:
        specs: as the user named the sources; "" where nothing opens one.
        sources: opened; what was taken of them before is left out from here on.
        former: the run that goes on; None: a new one begins.
    """
    from engine.run.ingestion import SourceRole

    if former is None:
        new = SourceRole.of_all(sources)
        return [
            role.with_address(_kept(spec, role.label))
            for spec, role in zip(specs, new, strict=True)
        ]
    known = list(former.sources)
    number = former.next_source_number
    roles = []
    for spec, source in zip(specs, sources, strict=True):
        same = next((one for one in known if _is_same(one, spec, source)), None)
        if same is not None:
            known.remove(same)
            roles.append(
                SourceRole(
                    label=same.label,
                    prefix=same.prefix,
                    address=_kept(spec, source.info.label),
                    taken=same.taken,
                    part=former.part,
                )
            )
            _leave_out(source, same)
        else:
            label = source.info.label
            address = _kept(spec, label)
            roles.append(SourceRole(label=label, prefix=f"source{number}", address=address))
            number += 1
    return roles


def _leave_out(source: Source, same: FormerSource) -> None:
    if isinstance(source, ResumableSource) and not same.is_live:
        for oddity in source.leave_out(same.taken):
            logger.warning("%s", oddity)


def _refuse_other_folders(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder")
    from engine.output.run_folder import is_run
    from engine.output.run_format import check_resumable

    if not is_run(path):
        raise ConfigError(f"{path}: is not the folder of a run")
    check_resumable(path)


def _config_of(path: Path, *, overlays: Sequence[str], settings: Sequence[str]) -> Config:
    own = path / "config.yaml"
    if not own.is_file():
        raise ConfigError(f"{path}: the run ended before it wrote its configuration; begin it anew")
    former = load_config(former=own)
    config = load_config(overlays, settings, former=own)
    for name in _FIXED:
        section, key = name.split(".")
        before, now = (getattr(getattr(one, section), key) for one in (former, config))
        if before != now:
            raise ConfigError(
                f"{name}={now}: the keyframes of {path} were made with {before}; it cannot change"
            )
    if config.matching.matcher not in _RESUMABLE_MATCHERS:
        raise ConfigError(
            f"{path}: runs with matching.matcher={config.matching.matcher} cannot go on: what it"
            " knows of a keyframe is in no file"
        )
    return config


def _read(path: Path) -> FormerRun:
    from engine.output.recovery import recover_run
    from engine.output.stored_run import read_stored_run

    former = recover_run(read_stored_run(path))
    if not former.stored.keyframes and not former.sources:
        raise JournalError(f"{path}: the run ended before its first frame; begin it anew")
    return former


def _address_of(source: FormerSource) -> str:
    """The path by which the user named a file, as long as it leads to it; else its address."""
    if os.path.realpath(source.label) == source.address and os.path.exists(source.label):
        return source.label
    return source.address


def _kept(spec: str, label: str) -> str:
    """What opens a source again and may be kept: no secret stands in it."""
    if (photos := photo_list_of(spec)) is not None:
        return photos.resolved().address
    if os.path.exists(spec):
        return os.path.realpath(spec)
    if spec.lower().startswith(_REPLAY):
        return f"{_REPLAY}{os.path.realpath(spec[len(_REPLAY) :])}"
    if spec.startswith("watch:"):
        return f"watch:{os.path.realpath(spec.removeprefix('watch:'))}"
    return label if spec == label or label.startswith("synthetic:") else ""


def _is_same(former: FormerSource, spec: str, source: Source) -> bool:
    if source.info.is_live != former.is_live:
        return False
    return source.info.label == former.label or bool(
        former.address and _kept(spec, source.info.label) == former.address
    )
