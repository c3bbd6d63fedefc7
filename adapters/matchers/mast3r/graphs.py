"""CUDA graphs: the network's kernels for inputs of one size, recorded once and started by one call.

For one pair at a time a processor takes three times as long to start the network's kernels as a
GPU takes to run them, and holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from adapters.matchers.mast3r.architecture import Grid, NetworkShape
from adapters.matchers.mast3r.heads import ViewOutput
from adapters.matchers.mast3r.network import Mast3rNetwork

logger = logging.getLogger(__name__)

# With more at once the GPU takes longer than the processor: 8 pairs gain a sixth.
_MAX_BATCH = 4
_MAX_GRAPHS = 12  # of 40 to 220 MB, most of it their results; the first sizes stay
_LEAST_FREE_BYTES = 4_000_000_000  # on the GPU, else nothing more is recorded
_LEAST_USES = 2  # of a size before it is recorded

Work = Callable[..., Sequence[Tensor]]


class Recording(Protocol):
    """Recorded work."""

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results for inputs of the sizes that were recorded; they are the caller's."""


class Recorder(Protocol):
    """Records work on a device."""

    @property
    def has_room(self) -> bool:
        """Whether the device has memory for one more recording."""

    def record(self, work: Work, inputs: Sequence[Tensor]) -> Recording:
        """Records what work does with inputs of these sizes.

        Raises:
            RuntimeError: the device cannot record it.
        """


class GraphedNetwork:
    """A network that records what it does for few images at once, and replays it.

    Results are those of the network to the bit: the same kernels run. Where something cannot be
    recorded, the network runs as it is from then on, which is logged; so do sizes that came when
    enough others were recorded, or when there was no room. Threads take turns with what is
    recorded.

    Args:
        network: on a GPU.
        recorder: of that GPU.
    """

    def __init__(self, network: Mast3rNetwork, *, recorder: Recorder) -> None:
        self._network = network
        self._recorder = recorder
        self._recordings: dict[Hashable, Recording] = {}
        self._num_uses: Counter[Hashable] = Counter()
        self._records = True
        self._turns = Lock()

    @property
    def shape(self) -> NetworkShape:
        """The network's."""
        return self._network.shape

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        return self._network.dtype

    def encode(self, images: Tensor) -> Tensor:
        """As the network's."""

        def work(images: Tensor) -> tuple[Tensor]:
            return (self._network.encode(images),)

        (tokens,) = self._run("encode", work, [images])
        return tokens

    def decode(
        self, tokens1: Tensor, tokens2: Tensor, *, grid1: Grid, grid2: Grid, with_points: bool
    ) -> tuple[ViewOutput, ViewOutput]:
        """As the network's."""

        def work(tokens1: Tensor, tokens2: Tensor) -> list[Tensor]:
            views = self._network.decode(
                tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points
            )
            return [part for view in views for part in _parts(view)]

        parts = self._run(("decode", grid1, grid2, with_points), work, [tokens1, tokens2])
        middle = len(parts) // 2
        return _view(parts[:middle]), _view(parts[middle:])

    def _run(self, name: Hashable, work: Work, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with self._turns:
            recording = self._recordings.get(key)
            if recording is None and self._is_to_be_recorded(key, batch=len(inputs[0])):
                recording = self._recorded(key, work, inputs)
            if recording is not None:
                return recording.replay(inputs)
        return work(*inputs)

    def _is_to_be_recorded(self, key: Hashable, *, batch: int) -> bool:
        if not self._records or batch > _MAX_BATCH:
            return False
        self._num_uses[key] += 1
        is_worth_it = self._num_uses[key] >= _LEAST_USES and len(self._recordings) < _MAX_GRAPHS
        return is_worth_it and self._recorder.has_room

    def _recorded(self, key: Hashable, work: Work, inputs: Sequence[Tensor]) -> Recording | None:
        try:
            recording = self._recorder.record(work, inputs)
        except RuntimeError as error:  # by the driver, the libraries and the memory that is left
            self._records = False
            reason = str(error).partition("\n")[0]
            logger.warning("MASt3R runs without CUDA graphs, slower for single pairs: %s", reason)
            return None
        self._recordings[key] = recording
        return recording


def graphed_on(device: str, network: Mast3rNetwork) -> Mast3rNetwork | GraphedNetwork:
    """The network as it runs fastest on its device, by a name of PyTorch's."""
    if not device.startswith("cuda"):
        return network
    return GraphedNetwork(network, recorder=CudaRecorder(device))


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    @property
    def has_room(self) -> bool:
        """Whether the GPU has memory for one more graph."""
        free_bytes, _ = torch.cuda.mem_get_info(self._device)
        unused_bytes = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return free_bytes + unused_bytes >= _LEAST_FREE_BYTES

    def record(self, work: Work, inputs: Sequence[Tensor]) -> Recording:
        """Records a graph; the work was done before, so that libraries have what they need.

        Raises:
            RuntimeError: the GPU cannot record it.
        """
        with torch.cuda.device(self._device):
            kept = [tensor.clone() for tensor in inputs]
            # One for all: CUDA's libraries keep a workspace for every stream.
            self._stream = stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                # Other threads may use the GPU meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    results = list(work(*kept))
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        return _CudaGraph(graph, kept, results)


class _CudaGraph:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._results = results

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results, copied: the next replay writes over them."""
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return [result.clone() for result in self._results]


def _parts(view: ViewOutput) -> list[Tensor]:
    """What a view has: two tensors, or four with points."""
    parts = (view.descriptors, view.descriptor_confidence, view.points3D, view.confidence)
    return [part for part in parts if part is not None]


def _view(parts: Sequence[Tensor]) -> ViewOutput:
    descriptors, descriptor_confidence, *of_points = parts
    points3D, confidence = of_points or (None, None)
    return ViewOutput(
        descriptors=descriptors,
        descriptor_confidence=descriptor_confidence,
        points3D=points3D,
        confidence=confidence,
    )
