"""Exact inner products of byte descriptors: onnxruntime's ``MatMulInteger``, block by block.

Factors are bytes of at most 127 and sums are int32, so products are whole numbers without rounding
or saturation: the same on every machine, with or without int8 units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.types import Uint8Array

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_BLOCK_PRODUCTS = 2**20  # int32: 4 MB, to stay in cache
_MIN_BLOCK_ROWS = 256  # fewer spend their time on laying out the columns again

# Numbers of onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_UINT8, _INT8, _INT32 = 2, 3, 6  # TensorProto.DataType
_IR_VERSION = 8
_OPSET_VERSION = 10  # the first with MatMulInteger


class ByteProducts:
    """Inner products of two sets of descriptors. One thread at a time.

    All blocks are views of one buffer, which is kept from call to call. It holds 2**20 products, or
    256 rows of the widest call where those are more.
    """

    def __init__(self) -> None:
        self._buffer: NDArray[np.int32] = np.empty(0, np.int32)

    def blocks(
        self, rows: Uint8Array, columns: Uint8Array
    ) -> Iterator[tuple[slice, NDArray[np.int32]]]:
        """Yields slices of ``rows`` and their products with all columns, (n, M) int32.

        A block may be written to, and is valid until the next one is asked for.

        Args:
            rows: (N, D) at most 127.
            columns: (M, D) at most 127.
        """
        num_rows = max(_MIN_BLOCK_ROWS, _BLOCK_PRODUCTS // max(1, len(columns)))
        size = min(num_rows, len(rows)) * len(columns)
        if self._buffer.size < size:
            self._buffer = np.empty(max(size, _BLOCK_PRODUCTS), np.int32)
        session = _session()
        binding = session.io_binding()
        binding.bind_cpu_input("columns", _transposed(columns).view(np.int8))
        for start in range(0, len(rows), num_rows):
            block = rows[start : start + num_rows]
            shape = (len(block), len(columns))
            binding.bind_cpu_input("rows", block)
            binding.bind_output("products", "cpu", 0, np.int32, shape, self._buffer.ctypes.data)
            session.run_with_iobinding(binding)
            products = self._buffer[: len(block) * len(columns)].reshape(shape)
            yield slice(start, start + len(block)), products


def _transposed(values: Uint8Array) -> Uint8Array:
    """Bytes (N, M) laid out as (M, N), by OpenCV: eight times as fast as by NumPy."""
    import cv2

    transposed = np.empty(values.shape[::-1], np.uint8)
    if transposed.size:  # OpenCV knows no empty image
        cv2.transpose(values, dst=transposed)
    return transposed


@functools.cache
def _session() -> InferenceSession:
    """The product as a program of onnxruntime, on the thread that runs it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        _product_model(), options, providers=["CPUExecutionProvider"]
    )


def _product_model() -> bytes:
    """The graph ``products = MatMulInteger(rows, columns)`` as a serialized ONNX ``ModelProto``.

    Uint8 rows (N, D) by int8 columns (D, M), which is the fastest of the operator's combinations.
    """
    node = (
        _field(1, b"rows")  # NodeProto.input
        + _field(1, b"columns")
        + _field(2, b"products")  # .output
        + _field(4, b"MatMulInteger")  # .op_type
    )
    graph = (
        _field(1, node)  # GraphProto.node
        + _field(2, b"products")  # .name
        + _field(11, _value_info(b"rows", _UINT8, (b"N", b"D")))  # .input
        + _field(11, _value_info(b"columns", _INT8, (b"D", b"M")))
        + _field(12, _value_info(b"products", _INT32, (b"N", b"M")))  # .output
    )
    opset = _field(1, b"") + _field(2, _OPSET_VERSION)  # OperatorSetIdProto.domain, .version
    return (
        _field(1, _IR_VERSION)  # ModelProto.ir_version
        + _field(7, graph)  # .graph
        + _field(8, opset)  # .opset_import
    )


def _value_info(name: bytes, element_type: int, sizes: tuple[bytes, bytes]) -> bytes:
    """A ``ValueInfoProto``: the name, element type and named sizes of a matrix."""
    # TensorShapeProto.dim, each with its .dim_param
    shape = b"".join(_field(1, _field(2, size)) for size in sizes)
    tensor_type = _field(1, element_type) + _field(2, shape)  # TypeProto.Tensor.elem_type, .shape
    return _field(1, name) + _field(2, _field(1, tensor_type))  # .name, .type.tensor_type


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protobuf message: a number below 128, or bytes with their length in front."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """A number in groups of 7 bits, the lowest first, as protobuf writes it."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
