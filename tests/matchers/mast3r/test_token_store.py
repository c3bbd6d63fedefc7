"""The token store: what was put comes back bit by bit, from whichever tier it went to."""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r.token_store import TokensOfRun, TokenStore
from engine.errors import InferenceError
from engine.types import FrameId

NUM_TOKENS, NUM_VALUES = 6, 8
ENTRY_BYTES = NUM_TOKENS * NUM_VALUES * 4


def frame(number: int) -> FrameId:
    return FrameId(number)


def tokens_of(number: int, *, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(NUM_TOKENS, NUM_VALUES, generator=generator).to(device)


def store_in(folder: Path, *, host_entries: int = 2, **settings: Any) -> TokenStore:
    return TokenStore(
        **{
            "device": "cpu",
            "dtype": torch.float32,
            "device_limit_bytes": 2 * ENTRY_BYTES,
            "host_limit_bytes": host_entries * ENTRY_BYTES,
            "folder": folder,
            **settings,
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TokenStore]:
    """Two keyframes fit into memory."""
    made = store_in(tmp_path)
    yield made
    made.close()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def host_bytes(store: TokenStore) -> int:
    """Tokens that are in host memory."""
    return sum(store._host[frame_id].nbytes for frame_id in store._host.oldest_first())


def device_bytes(store: TokenStore) -> int:
    """Tokens that are on the device."""
    return sum(store._device[frame_id].nbytes for frame_id in store._device.oldest_first())


def break_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: memoryview) -> int:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host_entries", [8, 0], ids=["from memory", "from files"])
def test_tokens_come_back_bit_by_bit(tmp_path: Path, dtype: torch.dtype, host_entries: int) -> None:
    store = store_in(tmp_path, dtype=dtype, host_entries=host_entries)
    numbers = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf], [1e-42, 6e4, -1 / 3, torch.nan]])
    special = numbers.to(dtype)
    for number, values in ((1, tokens_of(1).to(dtype)), (2, special)):
        store.put(frame(number), values)
    first, second = store.get([frame(1), frame(2)])
    assert first.dtype == second.dtype == dtype
    assert torch.equal(first.view(torch.uint8), tokens_of(1).to(dtype).view(torch.uint8))
    assert torch.equal(second.view(torch.uint8), special.view(torch.uint8))
    assert len(files_in(tmp_path)) == (0 if host_entries else 2)


def test_tokens_are_kept_in_the_compact_dtype(tmp_path: Path) -> None:
    store = store_in(tmp_path, dtype=torch.bfloat16)
    store.put(frame(1), tokens_of(1))
    assert host_bytes(store) == ENTRY_BYTES // 2
    assert torch.equal(store.get([frame(1)])[0], tokens_of(1).bfloat16())


def test_a_batch_is_not_kept_alive_and_later_changes_to_it_do_no_harm(store: TokenStore) -> None:
    batch = torch.stack([tokens_of(1), tokens_of(2)])
    store.put(frame(2), batch[1])
    batch.zero_()
    kept = store.get([frame(2)])[0]
    assert torch.equal(kept, tokens_of(2))
    assert kept.untyped_storage().nbytes() == ENTRY_BYTES


def test_tokens_made_in_inference_mode_travel_through_all_tiers(tmp_path: Path) -> None:
    store = store_in(tmp_path, host_entries=0)
    with torch.inference_mode():
        store.put(frame(1), tokens_of(1) + 0.0)
    assert torch.equal(store.get([frame(1)])[0], tokens_of(1))


def test_the_least_recently_used_go_to_files_and_come_back_when_asked(
    store: TokenStore, tmp_path: Path
) -> None:
    store.put(frame(1), tokens_of(1))
    store.put(frame(2), tokens_of(2))
    store.get([frame(1)])
    store.put(frame(3), tokens_of(3))  # 2 was used longest ago
    assert host_bytes(store) == 2 * ENTRY_BYTES
    assert [path.read_bytes() for path in files_in(tmp_path)] == [tokens_of(2).numpy().tobytes()]
    assert torch.equal(store.get([frame(2)])[0], tokens_of(2))
    assert len(files_in(tmp_path)) == 2  # 1 had to make room


def test_tokens_are_written_once_however_often_they_come_and_go(
    store: TokenStore, tmp_path: Path
) -> None:
    for number in (1, 2, 3, 4):
        store.put(frame(number), tokens_of(number))
    for number in (1, 2, 3, 4):
        assert torch.equal(store.get([frame(number)])[0], tokens_of(number))
    written = {path: path.stat().st_mtime_ns for path in files_in(tmp_path)}
    assert len(written) == 4
    for number in (1, 2, 3, 4):
        assert torch.equal(store.get([frame(number)])[0], tokens_of(number))
    assert {path: path.stat().st_mtime_ns for path in files_in(tmp_path)} == written
    assert host_bytes(store) == 2 * ENTRY_BYTES


def test_more_than_fits_is_delivered_at_once_in_the_order_asked(store: TokenStore) -> None:
    for number in (1, 2, 3, 4):
        store.put(frame(number), tokens_of(number))
    asked = (3, 1, 4, 1, 2)
    delivered = store.get([frame(number) for number in asked])
    assert all(
        torch.equal(got, tokens_of(number)) for got, number in zip(delivered, asked, strict=True)
    )
    assert host_bytes(store) == 2 * ENTRY_BYTES


def test_tokens_put_again_replace_the_earlier_ones_wherever_they_are(
    store: TokenStore, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        store.put(frame(number), tokens_of(number))
    store.put(frame(1), tokens_of(7))
    assert torch.equal(store.get([frame(1)])[0], tokens_of(7))
    assert [path.read_bytes() for path in files_in(tmp_path)] == [tokens_of(2).numpy().tobytes()]


def test_an_unknown_or_discarded_keyframe_is_a_key_error_and_moves_nothing(
    store: TokenStore, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        store.put(frame(number), tokens_of(number))
    store.discard(frame(1))
    assert frame(1) not in store
    assert frame(2) in store
    assert files_in(tmp_path) == []
    with pytest.raises(KeyError):
        store.get([frame(2), frame(1)])
    with pytest.raises(KeyError):
        store.get([frame(9)])
    assert files_in(tmp_path) == []


def test_tokens_of_another_rank_are_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"\(1, 6, 8\), expected \(N, E\)"):
        store.put(frame(1), tokens_of(1)[None])


def test_a_full_disk_refuses_new_tokens_and_keeps_the_older_ones(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(frame(1), tokens_of(1))
    store.put(frame(2), tokens_of(2))
    with monkeypatch.context() as patch:
        break_the_disk(patch)
        with pytest.raises(InferenceError, match="frame 3: No space left on device"):
            store.put(frame(3), tokens_of(3))
    assert frame(3) not in store
    assert host_bytes(store) == 2 * ENTRY_BYTES
    assert files_in(tmp_path) == []
    store.put(frame(3), tokens_of(3))  # there is room again
    delivered = store.get([frame(number) for number in (1, 2, 3)])
    assert all(torch.equal(got, tokens_of(k)) for k, got in enumerate(delivered, start=1))


def test_a_folder_that_cannot_be_made_is_an_inference_error(tmp_path: Path) -> None:
    store = store_in(tmp_path / "missing", host_entries=0)
    with pytest.raises(InferenceError, match="frame 1: No such file or directory"):
        store.put(frame(1), tokens_of(1))


def test_a_full_disk_does_not_stop_what_is_already_in_files_from_being_used(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3, 4):
        store.put(frame(number), tokens_of(number))
    break_the_disk(monkeypatch)
    for number in (1, 2, 3, 4, 2, 1):
        assert torch.equal(store.get([frame(number)])[0], tokens_of(number))
    assert host_bytes(store) == 2 * ENTRY_BYTES


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_file_is_an_inference_error(
    store: TokenStore, tmp_path: Path, damage: str
) -> None:
    for number in (1, 2, 3):
        store.put(frame(number), tokens_of(number))
    (path,) = files_in(tmp_path)
    if damage == "truncated":
        path.write_bytes(b"short")
    else:
        path.unlink()
    with pytest.raises(InferenceError, match="frame 1 cannot be read back"):
        store.get([frame(1)])
    assert torch.equal(store.get([frame(2)])[0], tokens_of(2))


def test_closing_removes_the_files_and_forgets_everything(
    store: TokenStore, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        store.put(frame(number), tokens_of(number))
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert host_bytes(store) == 0
    with pytest.raises(KeyError):
        store.get([frame(3)])
    store.close()


def test_a_store_that_nobody_holds_removes_its_files(tmp_path: Path) -> None:
    store = store_in(tmp_path, host_entries=0)
    store.put(frame(1), tokens_of(1))
    assert len(files_in(tmp_path)) == 1
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    first, second = (store_in(tmp_path, host_entries=0) for _ in range(2))
    first.put(frame(1), tokens_of(1))
    second.put(frame(1), tokens_of(2))
    first.close()
    assert torch.equal(second.get([frame(1)])[0], tokens_of(2))


def test_describing_and_matching_threads_share_a_store(store: TokenStore) -> None:
    num_frames, wrong = 40, []

    def describe() -> None:
        for number in range(1, num_frames + 1):
            store.put(frame(number), tokens_of(number))

    def match() -> None:
        for number in [1 + step * 7 % num_frames for step in range(200)]:
            if frame(number) in store:
                got = store.get([frame(number)])[0]
                if not torch.equal(got, tokens_of(number)):
                    wrong.append(number)

    threads = [threading.Thread(target=work) for work in (describe, match)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert host_bytes(store) == 2 * ENTRY_BYTES
    delivered = store.get([frame(number) for number in range(1, num_frames + 1)])
    assert all(torch.equal(got, tokens_of(k)) for k, got in enumerate(delivered, start=1))


def with_a_device(store: TokenStore) -> TokenStore:
    """Lets a store on the CPU go through the device tier, too, as if the CPU were a device."""
    store._is_on_cpu = False
    store._device.limit_bytes = 2 * ENTRY_BYTES
    return store


def test_the_device_pages_to_host_memory_and_that_to_files(tmp_path: Path) -> None:
    store = with_a_device(store_in(tmp_path, host_entries=1))
    for number in (1, 2, 3, 4):
        store.put(frame(number), tokens_of(number))
    assert (device_bytes(store), host_bytes(store)) == (2 * ENTRY_BYTES, ENTRY_BYTES)
    assert [path.stat().st_size for path in files_in(tmp_path)] == [ENTRY_BYTES]
    delivered = store.get([frame(number) for number in (1, 2, 3, 4)])
    assert all(torch.equal(got, tokens_of(k)) for k, got in enumerate(delivered, start=1))
    assert device_bytes(store) == 2 * ENTRY_BYTES
    assert host_bytes(store) == ENTRY_BYTES


def test_a_full_disk_while_reading_is_logged_once_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = with_a_device(store_in(tmp_path, host_entries=1))
    for number in range(1, 7):
        store.put(frame(number), tokens_of(number))
    break_the_disk(monkeypatch)
    caplog.set_level(logging.WARNING)
    for number in (1, 2, 3, 4, 5, 6, 1, 2, 3):
        assert torch.equal(store.get([frame(number)])[0], tokens_of(number))
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert device_bytes(store) == 2 * ENTRY_BYTES
    assert host_bytes(store) <= 3 * ENTRY_BYTES


@pytest.mark.gpu
def test_on_a_gpu_all_tiers_deliver_to_the_device(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    store = store_in(tmp_path, device="cuda", host_entries=1)
    for number in (1, 2, 3, 4):
        store.put(frame(number), tokens_of(number, device="cuda"))
    delivered = store.get([frame(number) for number in (1, 2, 3, 4)])
    assert all(got.is_cuda for got in delivered)
    assert all(torch.equal(got.cpu(), tokens_of(k)) for k, got in enumerate(delivered, start=1))
    assert device_bytes(store) == 2 * ENTRY_BYTES


def test_runs_that_share_a_store_have_their_own_tokens_and_its_limit_together() -> None:
    store = TokenStore(device="cpu", dtype=torch.float32, device_limit_bytes=0, host_limit_bytes=64)
    gone: deque[set[FrameId]] = deque()
    first, second = (TokensOfRun(store, number=number, gone=gone) for number in range(2))
    for frame_id in (1, 2):
        for run, value in ((first, 1.0), (second, 2.0)):
            run.put(FrameId(frame_id), torch.full((2, 4), value + frame_id))
    assert store._host.num_bytes <= 64  # two of four
    for frame_id in (1, 2):
        (own,) = first.get([FrameId(frame_id)])
        (other,) = second.get([FrameId(frame_id)])
        assert (float(own[0, 0]), float(other[0, 0])) == (1.0 + frame_id, 2.0 + frame_id)
    first.discard(FrameId(1))
    with pytest.raises(KeyError):
        first.get([FrameId(1)])
    second.get([FrameId(1)])


def test_tokens_of_a_run_that_is_gone_are_discarded_when_another_puts_some() -> None:
    store = TokenStore(device="cpu", dtype=torch.float32, device_limit_bytes=0, host_limit_bytes=64)
    gone: deque[set[FrameId]] = deque()
    runs = [TokensOfRun(store, number=number, gone=gone) for number in range(2)]
    for tokens in runs:
        tokens.put(FrameId(1), torch.zeros(2, 4))
    del tokens
    runs.pop(0)
    gc.collect()
    runs[0].put(FrameId(2), torch.zeros(2, 4))
    assert len(store._host.oldest_first()) == 2
    assert not gone
