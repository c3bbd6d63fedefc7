"""Products of byte descriptors: exact at every size, in blocks of one buffer, on every thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from adapters.matchers import byte_products
from adapters.matchers.byte_products import ByteProducts
from engine.types import Uint8Array

NUM_COMPONENTS = 128


def descriptors(num: int, *, seed: int = 0) -> Uint8Array:
    """Bytes (num, 128) over the whole range that descriptors have."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 128, (num, NUM_COMPONENTS)).astype(np.uint8)


def whole(products: ByteProducts, rows: Uint8Array, columns: Uint8Array) -> Any:
    """All blocks put together, (N, M)."""
    table = np.full((len(rows), len(columns)), -1, np.int32)
    for block, values in products.blocks(rows, columns):
        assert values.dtype == np.int32
        table[block] = values
    return table


def expected(rows: Uint8Array, columns: Uint8Array) -> Any:
    return rows.astype(np.int32) @ columns.astype(np.int32).T


@pytest.mark.parametrize("num_columns", [0, 1, 127, 129, 300])
@pytest.mark.parametrize("num_rows", [0, 1, 127, 129, 300])
def test_products_are_those_of_whole_numbers(num_rows: int, num_columns: int) -> None:
    rows, columns = descriptors(num_rows), descriptors(num_columns, seed=1)
    table = whole(ByteProducts(), rows, columns)
    assert table.shape == (num_rows, num_columns)
    assert np.array_equal(table, expected(rows, columns))


@pytest.mark.parametrize(("num_rows", "num_columns"), [(8192, 129), (129, 8192), (1, 8192)])
def test_products_of_many_descriptors_are_those_of_whole_numbers(
    num_rows: int, num_columns: int
) -> None:
    rows, columns = descriptors(num_rows), descriptors(num_columns, seed=1)
    assert np.array_equal(whole(ByteProducts(), rows, columns), expected(rows, columns))


def test_the_largest_products_do_not_saturate() -> None:
    extremes = np.array([[127] * NUM_COMPONENTS, [0] * NUM_COMPONENTS], np.uint8)
    table = whole(ByteProducts(), extremes, extremes)
    assert table.tolist() == [[127 * 127 * NUM_COMPONENTS, 0], [0, 0]]


def test_rows_and_columns_may_lie_anywhere_in_memory() -> None:
    rows, columns = descriptors(60)[::-2], np.asfortranarray(descriptors(50, seed=1))
    assert np.array_equal(whole(ByteProducts(), rows, columns), expected(rows, columns))


def test_blocks_have_as_many_rows_as_stay_in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_products, "_BLOCK_PRODUCTS", 4000)
    monkeypatch.setattr(byte_products, "_MIN_BLOCK_ROWS", 16)
    rows, products = descriptors(90), ByteProducts()
    sizes = {
        num_columns: [
            len(values) for _, values in products.blocks(rows, descriptors(num_columns, seed=1))
        ]
        for num_columns in (100, 1000)
    }
    assert sizes == {100: [40, 40, 10], 1000: [16] * 5 + [10]}
    assert np.array_equal(whole(products, rows, rows), expected(rows, rows))


def test_one_buffer_serves_all_calls_and_grows_only_for_a_wider_block() -> None:
    products = ByteProducts()
    starts = set()
    for num_rows, num_columns in ((300, 4096), (5000, 200), (4096, 4096), (1, 1)):
        for _, values in products.blocks(descriptors(num_rows), descriptors(num_columns, seed=1)):
            starts.add(values.ctypes.data)
    assert len(starts) == 1
    assert products._buffer.size == 2**20
    for _ in range(2):
        wide = whole(products, descriptors(300), descriptors(5000, seed=1))
        assert products._buffer.size == 256 * 5000
    assert np.array_equal(wide, expected(descriptors(300), descriptors(5000, seed=1)))


def test_a_block_may_be_written_to() -> None:
    products, rows, columns = ByteProducts(), descriptors(300), descriptors(4096, seed=1)
    for _, values in products.blocks(rows, columns):
        values[:] = -7
    assert np.array_equal(whole(products, rows, columns), expected(rows, columns))


@pytest.mark.slow
def test_threads_with_products_of_their_own_do_not_disturb_each_other() -> None:
    def work(seed: int) -> bool:
        products = ByteProducts()
        rows, columns = descriptors(400, seed=seed), descriptors(3000, seed=seed + 100)
        truth = expected(rows, columns)
        return all(np.array_equal(whole(products, rows, columns), truth) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
