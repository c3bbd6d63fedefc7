"""Retrieval checkpoint: the public whitening, and the codebook beside it.

Neither file can run code: the checkpoint is read as weights only, the codebook by an unpickler that
accepts arrays of numbers and nothing else.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.matchers.mast3r.asmk import AsmkModel
from adapters.matchers.mast3r.stored_weights import DAMAGES
from engine.errors import ConfigError
from engine.regular_files import regular_file_size

_DEFAULT_NUM_FEATURES = 300


def load_retrieval(path: Path, *, device: str) -> AsmkModel:
    """Loads a retrieval checkpoint and the codebook beside it.

    Args:
        path: ``<name>_retrieval_trainingfree.pth``; the codebook is the file of the same name with
            its last part replaced, ``<name>_retrieval_codebook.pkl``.
        device: where local features are made and assigned to words.

    Raises:
        ConfigError: a file is missing, damaged or of another kind, or the checkpoint has parts
            besides a whitening.
    """
    settings, state = _read_head(path)
    mean, projection = _whitening_in(state, path=path)
    centroids = _read_codebook(codebook_beside(path))
    if centroids.shape[1] != projection.shape[1]:
        raise ConfigError(
            f"{codebook_beside(path)}: words of {centroids.shape[1]} values, but {path} makes "
            f"features of {projection.shape[1]}; the two files must belong together"
        )
    return AsmkModel(
        mean=mean.to(device),
        projection=projection.to(device),
        centroids=torch.from_numpy(centroids).to(device),
        num_features=_num_features(settings, path=path),
    )


def codebook_beside(path: Path) -> Path:
    """Where the codebook of a retrieval checkpoint is expected."""
    return path.with_name(f"{path.stem.rpartition('_')[0]}_codebook.pkl")


# -- the checkpoint -----------------------------------------------------------------------------


def _read_head(path: Path) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    try:
        regular_file_size(path)
        stream = path.open("rb")
    except OSError as error:
        raise ConfigError(f"the retrieval checkpoint cannot be read: {error}") from error
    with stream, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except (*DAMAGES, OSError) as error:  # OSError: sought beyond the end of a cut-off file
            raise _not_a_head(path) from error
    settings = content.get("args") if isinstance(content, dict) else None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(settings, argparse.Namespace) or not isinstance(state, dict):
        raise _not_a_head(path)
    return settings, state


def _whitening_in(state: Mapping[str, Any], *, path: Path) -> tuple[Tensor, Tensor]:
    """Mean (1, E) and projection (E, D), float64."""
    mean, projection = state.get("prewhiten.m"), state.get("prewhiten.p")
    if not isinstance(mean, Tensor) or not isinstance(projection, Tensor):
        raise _not_a_head(path)
    if projection.ndim != 2 or mean.shape != (1, len(projection)):
        raise _not_a_head(path)
    if not (mean.isfinite().all() and projection.isfinite().all()):
        raise _not_a_head(path)
    others = sorted({key.partition(".")[0] for key in state} - {"prewhiten", "backbone"})
    if others:
        raise ConfigError(
            f"{path}: a retrieval head with {', '.join(others)} is not supported; expected a "
            "whitening alone, as in ..._retrieval_trainingfree.pth"
        )
    return mean.double(), projection.double()


def _num_features(settings: argparse.Namespace, *, path: Path) -> float:
    weighting = getattr(settings, "featweights", "l2norm")
    if weighting != "l2norm" or getattr(settings, "residual", False):
        raise ConfigError(
            f"{path}: a retrieval head with featweights={weighting!r} and "
            f"residual={getattr(settings, 'residual', False)!r} is not supported; expected 'l2norm'"
            " and False"
        )
    num = getattr(settings, "nfeat", _DEFAULT_NUM_FEATURES)
    if not isinstance(num, int | float) or not (num >= 1 or -1 <= num < 0):
        raise ConfigError(f"{path}: nfeat={num!r}; expected a number >= 1, or a share in [-1, 0)")
    return float(num)


def _not_a_head(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is not a retrieval checkpoint: expected a whole file saved by torch with 'args' "
        "and 'model', the latter with 'prewhiten.m' (1, E) and 'prewhiten.p' (E, D)"
    )


# -- the codebook -------------------------------------------------------------------------------


def _read_codebook(path: Path) -> NDArray[np.float32]:
    """Centroids (K, D) float32."""
    try:
        regular_file_size(path)
        with path.open("rb") as stream:
            content = _CodebookUnpickler(stream).load()
    except OSError as error:
        raise ConfigError(
            f"the codebook that belongs to the retrieval checkpoint cannot be read: {error}"
        ) from error
    except DAMAGES as error:
        raise _not_a_codebook(path, str(error)) from error
    match content:
        case {
            "type": "Codebook",
            "params": dict(),
            "state": {"centroids": _PickledArray() as read},
        }:
            pass
        case _:
            raise _not_a_codebook(path, "it holds something else")
    try:
        centroids = read.array()
    except (TypeError, ValueError) as error:
        raise _not_a_codebook(path, str(error)) from error
    if centroids.ndim != 2 or not centroids.size or centroids.dtype.kind != "f":
        raise _not_a_codebook(path, f"centroids {centroids.shape} of {centroids.dtype}")
    if not np.isfinite(centroids).all():
        raise _not_a_codebook(path, "centroids that are not finite")
    return np.require(centroids, np.float32, ["C", "W"])


def _not_a_codebook(path: Path, detail: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a codebook ({detail}): expected a pickle of type 'Codebook' with "
        "'params' and 'state', the latter with 'centroids', an array (K, D) of floats, and nothing "
        "that is not needed for that"
    )


class _PickledDtype:
    """A number format as a pickle describes it: NumPy's short name, then the order of bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[fiu][248]", name):
            raise pickle.UnpicklingError(f"numbers of type {name!r}")
        self._name = name
        self._byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "="):
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self._byte_order = state[1]

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._byte_order + self._name)


class _PickledArray:
    """An array as a pickle describes it; checked when it is made, by `array`."""

    def __init__(self, *_: object) -> None:
        self._parts: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self._parts = (data, dtype, shape, "F" if is_fortran else "C")

    @classmethod
    def from_buffer(cls, data: object, dtype: object, shape: object, order: object) -> Any:
        """As pickle protocol 5 puts it."""
        made = cls()
        made._parts = (data, dtype, shape, order)
        return made

    def array(self) -> NDArray[Any]:
        """The array, read-only.

        Raises:
            TypeError: a part is missing or of another kind.
            ValueError: the parts do not fit together.
        """
        data, dtype, shape, order = self._parts
        if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _PickledDtype):
            raise TypeError("an array without numbers")
        return np.frombuffer(data, dtype.dtype()).reshape(shape, order=order)


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as pickle protocols below 3 put them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _ignored(*_: object) -> None:
    """A single number: only parameters hold some, and those are not used."""


class _CodebookUnpickler(pickle.Unpickler):
    """Reads plain data and arrays of numbers; refuses to find anything else.

    Not even NumPy's own names are given out: handed the right arguments, ``numpy.ndarray`` reads
    arbitrary memory. Stand-ins keep the arguments that a pickle gives for its arrays instead.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in of a known name.

        Raises:
            UnpicklingError: any other name.
        """
        # NumPy 2 moved numpy.core to numpy._core.
        name = f"{module_name.replace('numpy._core', 'numpy.core')}.{global_name}"
        if name not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return _STAND_INS[name]


_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _PickledArray,
    "numpy.dtype": _PickledDtype,
    "numpy.core.multiarray._reconstruct": _PickledArray,
    "numpy.core.multiarray.scalar": _ignored,
    "numpy.core.numeric._frombuffer": _PickledArray.from_buffer,
    "_codecs.encode": _encoded,
}
