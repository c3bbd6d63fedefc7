"""Token store: encoder tokens of keyframes on the device, in host memory or on disk.

A keyframe is encoded once and matched many times, also long afterwards when a loop closes. The
tokens used last stay on the device; older ones wait in host memory, the oldest in files.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import InferenceError
from engine.types import FrameId

logger = logging.getLogger(__name__)

_FRAME_ID_BITS = 40  # more than any run has frames


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenFile:
    """Where the bytes of one keyframe's tokens lie, in C order."""

    path: Path
    shape: torch.Size
    num_bytes: int


class _Tier:
    """Tensors in order of use, the one used longest ago first, and their size."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._tensors: OrderedDict[FrameId, Tensor] = OrderedDict()

    def __contains__(self, frame_id: FrameId) -> bool:
        return frame_id in self._tensors

    def __getitem__(self, frame_id: FrameId) -> Tensor:
        return self._tensors[frame_id]

    def set_newest(self, frame_id: FrameId, tensor: Tensor) -> None:
        self.remove(frame_id)
        self._tensors[frame_id] = tensor
        self.num_bytes += tensor.nbytes

    def remove(self, frame_id: FrameId) -> None:
        tensor = self._tensors.pop(frame_id, None)
        if tensor is not None:
            self.num_bytes -= tensor.nbytes

    def clear(self) -> None:
        self._tensors.clear()
        self.num_bytes = 0

    def oldest_first(self) -> list[FrameId]:
        return list(self._tensors)

    @property
    def is_over_limit(self) -> bool:
        return self.num_bytes > self.limit_bytes


class TokenStore:
    """Tokens by keyframe in three tiers, the least recently used moving down.

    A tensor is in device or host memory, not both; one that was ever spilled keeps its file, so it
    is written once. On a CPU there is no device tier. Both limits hold after every call, but what
    ``get`` returned stays alive as long as the caller holds it. Safe to use from several threads;
    a thread waits while another reads or writes a file.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        device_limit_bytes: int,
        host_limit_bytes: int,
        folder: Path | None = None,
    ) -> None:
        """Makes an empty store.

        Args:
            device: where ``get`` delivers.
            dtype: what tokens are kept and delivered in.
            device_limit_bytes: room on the device; nothing on a CPU.
            host_limit_bytes: room in host memory, page-locked for CUDA.
            folder: where the private folder for files is made; by default the system's place for
                temporary files.
        """
        self._to_device = torch.device(device)
        self._dtype = dtype
        self._is_on_cpu = self._to_device.type == "cpu"
        self._device = _Tier(0 if self._is_on_cpu else device_limit_bytes)
        self._host = _Tier(host_limit_bytes)
        self._files: dict[FrameId, _TokenFile] = {}
        self._parent = folder
        self._folder: Path | None = None
        self._remove_folder: Callable[[], object] = _nothing
        self._file_numbers = count(1)
        self._lock = threading.Lock()
        self._warned_of_full_disk = False

    def put(self, frame_id: FrameId, tokens: Tensor) -> None:
        """Keeps a copy of (N, E) tokens as the most recently used ones; replaces earlier ones.

        Raises:
            InferenceError: older tokens could not be written to disk to make room. They stay in
                memory, and these are not kept.
            ValueError: ``tokens`` are not (N, E).
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}, expected (N, E)")
        # A copy: the tokens of one image may be a view that keeps its whole batch alive.
        kept = tokens.detach().to(self._to_device, self._dtype, copy=True).contiguous()
        with self._lock:
            self._discard(frame_id)
            self._upper_tier.set_newest(frame_id, kept)
            error = self._make_room()
            if error is not None:
                self._discard(frame_id)
                raise InferenceError(
                    f"no room for the tokens of frame {frame_id}: {_in_words(error)}"
                ) from error

    def get(self, frame_ids: Sequence[FrameId]) -> list[Tensor]:
        """The (N, E) tokens of each keyframe on the device; they become the last used.

        A disk too full to make room is no failure here: what had to be written stays in memory,
        and that is logged once.

        Raises:
            InferenceError: a file of tokens cannot be read back.
            KeyError: a keyframe has no tokens.
        """
        with self._lock:
            for frame_id in frame_ids:
                if not self._is_known(frame_id):
                    raise KeyError(frame_id)
            try:
                delivered = [self._fetch(frame_id) for frame_id in frame_ids]
            finally:  # the device may have run out of memory half way
                error = self._make_room()
            if error is not None and not self._warned_of_full_disk:
                self._warned_of_full_disk = True
                logger.warning("Tokens exceed their limit in host memory: %s", _in_words(error))
        return delivered

    def discard(self, frame_id: FrameId) -> None:
        """Removes the tokens of a keyframe, if there are any."""
        with self._lock:
            self._discard(frame_id)

    def close(self) -> None:
        """Removes all tokens and files; also done when the store is garbage-collected."""
        with self._lock:
            self._device.clear()
            self._host.clear()
            self._files.clear()
            self._remove_folder()
            self._folder = None

    def __contains__(self, frame_id: FrameId) -> bool:
        with self._lock:
            return self._is_known(frame_id)

    # -- with the lock held ---------------------------------------------------------------------

    @property
    def _upper_tier(self) -> _Tier:
        return self._host if self._is_on_cpu else self._device

    def _is_known(self, frame_id: FrameId) -> bool:
        return frame_id in self._device or frame_id in self._host or frame_id in self._files

    def _fetch(self, frame_id: FrameId) -> Tensor:
        """Moves tokens to the upper tier; nothing has changed when that fails."""
        if frame_id in self._upper_tier:
            tokens = self._upper_tier[frame_id]
        elif frame_id in self._host:
            # Ordered before the work that follows on this thread's stream, so no need to wait.
            tokens = self._host[frame_id].to(self._to_device, non_blocking=True)
        else:
            tokens = self._read(frame_id).to(self._to_device)
        self._host.remove(frame_id)
        self._upper_tier.set_newest(frame_id, tokens)
        return tokens

    def _make_room(self) -> OSError | None:
        """Moves tokens down until both limits hold; what went wrong when they do not."""
        for frame_id in _until_it_fits(self._device):
            self._host.set_newest(frame_id, self._in_host_memory(self._device[frame_id]))
            self._device.remove(frame_id)
        error = None
        for frame_id in _until_it_fits(self._host):
            try:
                self._write(frame_id, self._host[frame_id])
            except OSError as full:
                error = full  # younger ones may have a file already
            else:
                self._host.remove(frame_id)
        return error if self._host.is_over_limit else None

    def _in_host_memory(self, tokens: Tensor) -> Tensor:
        is_pinned = self._to_device.type == "cuda"
        copied = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=is_pinned)
        return copied.copy_(tokens)

    def _write(self, frame_id: FrameId, tokens: Tensor) -> None:
        if frame_id in self._files:
            return
        if self._folder is None:
            self._make_folder()
        assert self._folder is not None
        path = self._folder / f"{next(self._file_numbers):08d}.tokens"
        try:
            path.write_bytes(_bytes_of(tokens))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self._files[frame_id] = _TokenFile(path=path, shape=tokens.shape, num_bytes=tokens.nbytes)

    def _make_folder(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="livesfm-tokens-", dir=self._parent))
        self._folder = folder
        self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def _read(self, frame_id: FrameId) -> Tensor:
        file = self._files[frame_id]
        tokens = torch.empty(file.shape, dtype=self._dtype)
        try:
            with file.path.open("rb") as stream:
                num_read = stream.readinto(_bytes_of(tokens))
        except OSError as error:
            raise InferenceError(
                f"the tokens of frame {frame_id} cannot be read back: {_in_words(error)}"
            ) from error
        if num_read != file.num_bytes:
            raise InferenceError(
                f"the tokens of frame {frame_id} cannot be read back: {file.path} holds "
                f"{num_read} bytes, expected {file.num_bytes}"
            )
        return tokens

    def _discard(self, frame_id: FrameId) -> None:
        self._device.remove(frame_id)
        self._host.remove(frame_id)
        file = self._files.pop(frame_id, None)
        if file is not None:
            file.path.unlink(missing_ok=True)


class TokensOfRun:
    """The tokens of one run in a store that several runs share, whose frame ids may be the same.

    They are discarded some time after this is garbage-collected: when another run puts tokens.

    Args:
        store: of all runs; its limits hold for them together.
        number: of the run, another one for each.
        gone: the frame ids in the store of runs that are gone; one for a store.
    """

    def __init__(self, store: TokenStore, *, number: int, gone: deque[set[FrameId]]) -> None:
        self._store = store
        self._first = number << _FRAME_ID_BITS
        self._gone = gone
        self._ids: set[FrameId] = set()
        # Discarding takes a lock, which may be held where garbage is collected.
        weakref.finalize(self, gone.append, self._ids)

    def put(self, frame_id: FrameId, tokens: Tensor) -> None:
        """As `TokenStore.put`."""
        while self._gone:
            for old_id in self._gone.popleft():
                self._store.discard(old_id)
        own_id = self._own(frame_id)
        self._ids.add(own_id)
        self._store.put(own_id, tokens)

    def get(self, frame_ids: Sequence[FrameId]) -> list[Tensor]:
        """As `TokenStore.get`."""
        return self._store.get([self._own(frame_id) for frame_id in frame_ids])

    def discard(self, frame_id: FrameId) -> None:
        """As `TokenStore.discard`."""
        self._store.discard(self._own(frame_id))
        self._ids.discard(self._own(frame_id))

    def _own(self, frame_id: FrameId) -> FrameId:
        return FrameId(self._first + frame_id)


def _nothing() -> None:
    """Stands for removing a folder that was never made."""


def _until_it_fits(tier: _Tier) -> Iterable[FrameId]:
    """The oldest of a tier, one after the other, as long as it is over its limit."""
    for frame_id in tier.oldest_first():
        if not tier.is_over_limit:
            return
        yield frame_id


def _bytes_of(tokens: Tensor) -> memoryview:
    """The memory of contiguous tokens; by way of bytes, as bfloat16 has no counterpart in numpy."""
    return tokens.view(torch.uint8).numpy().reshape(-1).data


def _in_words(error: OSError) -> str:
    """What happened, and to which file."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
