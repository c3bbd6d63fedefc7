"""Construction of the MASt3R matcher and its place index from the configuration."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from adapters.matchers.mast3r.architecture import NetworkShape
from adapters.matchers.mast3r.checkpoint import is_named_metric, load_checkpoint
from adapters.matchers.mast3r.graphs import GraphedNetwork, graphed_on
from adapters.matchers.mast3r.matcher import (
    Device,
    Mast3rMatcher,
    is_out_of_memory,
    open_token_store,
)
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.retrieval import AsmkPlaceIndex, PooledPlaceIndex
from adapters.matchers.mast3r.retrieval_checkpoint import load_retrieval
from adapters.matchers.mast3r.second import Mast3rSecond, gpu_budget
from adapters.matchers.mast3r.token_store import TokensOfRun
from adapters.matchers.mast3r.upstream import UpstreamNetwork, load_upstream
from adapters.matchers.mast3r.weights import WEIGHTS_LICENCE, download_command
from engine.config import DenseMatchingConfig, Mast3rConfig, SecondMatcherConfig
from engine.errors import ConfigError
from engine.types import FrameId

logger = logging.getLogger(__name__)

Places = AsmkPlaceIndex | PooledPlaceIndex
OpenedNetwork = Mast3rNetwork | GraphedNetwork | UpstreamNetwork


def open_mast3r(
    config: Mast3rConfig, *, dense: DenseMatchingConfig
) -> tuple[Mast3rMatcher, Places]:
    """Loads the weights; returns the matcher, and the place index that gets its tokens.

    Raises:
        ConfigError: no checkpoint is configured, a file cannot be used, the device is not there or
            has no room for the weights, or upstream's package is asked for and incomplete.
    """
    if not config.checkpoint:
        raise ConfigError(
            "matching.matcher=mast3r needs its weights: --set mast3r.checkpoint=PATH; "
            f"to get them: {download_command()} ({WEIGHTS_LICENCE})"
        )
    network, device, is_metric = _network_on_device(config)
    with _room_on(device, config):
        places = _open_places(config, device, token_dim=network.shape.encoder_dim)
    matcher = Mast3rMatcher(
        config, dense=dense, network=network, device=device, places=places, is_metric=is_metric
    )
    return matcher, places


def mast3r_opener(
    config: Mast3rConfig, *, dense: DenseMatchingConfig
) -> Callable[[], Mast3rMatcher]:
    """Loads the weights once for several matchers, which recognize no places.

    The limits of memory for encoded keyframes hold for all matchers together.

    Raises:
        ConfigError: as `open_mast3r`.
    """
    network, device, is_metric = _network_on_device(config)
    store = open_token_store(config, device)
    numbers, gone = itertools.count(), deque[set[FrameId]]()
    return lambda: Mast3rMatcher(
        config,
        dense=dense,
        network=network,
        device=device,
        places=None,
        is_metric=is_metric,
        tokens=TokensOfRun(store, number=next(numbers), gone=gone),
    )


def open_mast3r_second(
    config: Mast3rConfig, *, second: SecondMatcherConfig, dense: DenseMatchingConfig
) -> Mast3rSecond:
    """Loads the weights for a second matcher, which takes no more of a GPU than it may.

    Raises:
        ConfigError: as `open_mast3r`; or the GPU's share does not hold the network and one pair.
    """
    if not config.checkpoint:
        raise ConfigError(
            "matching.second=mast3r needs its weights: --set mast3r.checkpoint=PATH; "
            f"to get them: {download_command()} ({WEIGHTS_LICENCE})"
        )
    network, device, is_metric = _network_on_device(config, may_be_graphed=False)
    if device.is_cuda:
        config = within_budget(config, network.shape, network.dtype, second=second, dense=dense)
    return Mast3rSecond(
        Mast3rMatcher(
            config,
            dense=dense,
            network=network,
            device=device,
            places=None,
            is_metric=is_metric,
        ),
        image_edge_px=config.image_edge_px,
        max_kept_images=second.max_kept_images,
    )


def within_budget(
    config: Mast3rConfig,
    shape: NetworkShape,
    dtype: torch.dtype,
    *,
    second: SecondMatcherConfig,
    dense: DenseMatchingConfig,
) -> Mast3rConfig:
    """The same settings with no more keyframes on a GPU than its share has room for.

    Raises:
        ConfigError: it does not hold the network and one pair.
    """
    budget = gpu_budget(
        shape,
        edge_px=config.image_edge_px,
        num_queries=dense.max_query_points,
        bytes_per_value=dtype.itemsize,
        max_mb=second.max_gpu_mb,
        wanted_cache_mb=config.device_cache_mb,
    )
    logger.info(
        "of %d MB of the GPU the weights may take %d, one pair %d and encoded keyframes %d",
        second.max_gpu_mb,
        budget.weights // 1_000_000,
        budget.working // 1_000_000,
        budget.cache // 1_000_000,
    )
    return config.model_copy(update={"device_cache_mb": budget.cache // 1_000_000})


def _network_on_device(
    config: Mast3rConfig, *, may_be_graphed: bool = True
) -> tuple[OpenedNetwork, Device, bool]:
    """The network, its device with the type of numbers it has, and whether points are metric.

    On a GPU it is graphed where that may take memory.
    """
    device = choose_device(config)
    with _room_on(device, config):
        network, is_metric = _load_network(config, device)
    if may_be_graphed and isinstance(network, Mast3rNetwork):
        network = graphed_on(device.name, network)
    logger.warning("MASt3R weights %s: %s", config.checkpoint, WEIGHTS_LICENCE)
    # Upstream's runs in float32 whatever is asked.
    return network, replace(device, dtype=network.dtype), is_metric


@contextmanager
def _room_on(device: Device, config: Mast3rConfig) -> Iterator[None]:
    """Loads something onto a device.

    Raises:
        ConfigError: it has no room for that.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"mast3r.device={device.name}: has no room for {config.checkpoint}"
        ) from error


def choose_device(config: Mast3rConfig) -> Device:
    """The device on which the network runs, and its type of numbers.

    ``auto`` takes a GPU when there is one, and bfloat16 where the hardware multiplies it.

    Raises:
        ConfigError: the device is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # by PyTorch's build
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"mast3r.device={name}: is not usable here: {reason}") from error
    return Device(name=name, dtype=_dtype(config, name), num_threads=_num_cores())


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _dtype(config: Mast3rConfig, device: str) -> torch.dtype:
    match config.precision:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return torch.float16
        case "auto":
            return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _load_network(config: Mast3rConfig, device: Device) -> tuple[OpenedNetwork, bool]:
    path = Path(config.checkpoint).expanduser()
    if config.implementation == "native":
        loaded = load_checkpoint(path, device=device.name, dtype=device.dtype)
        return loaded.network, loaded.is_metric
    root = Path(config.upstream_root).expanduser() if config.upstream_root else None
    return load_upstream(path, root=root, device=device.name), is_named_metric(path)


def _open_places(config: Mast3rConfig, device: Device, *, token_dim: int) -> Places:
    if not config.retrieval_checkpoint:
        return PooledPlaceIndex()
    path = Path(config.retrieval_checkpoint).expanduser()
    model = load_retrieval(path, device=device.name)
    if model.mean.shape[1] != token_dim:
        raise ConfigError(
            f"{path}: expected a retrieval checkpoint for tokens of {token_dim} values, as"
            f" {config.checkpoint} makes them, found one for {model.mean.shape[1]}"
        )
    return AsmkPlaceIndex(model)
