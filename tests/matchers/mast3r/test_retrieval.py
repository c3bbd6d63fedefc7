"""Places found from tokens: right ones first, scores by the formula, files that cannot do harm."""

from __future__ import annotations

import argparse
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.matchers.mast3r import asmk
from adapters.matchers.mast3r.asmk import AsmkModel
from adapters.matchers.mast3r.retrieval import AsmkPlaceIndex, PooledPlaceIndex
from adapters.matchers.mast3r.retrieval_checkpoint import codebook_beside, load_retrieval
from engine.errors import ConfigError
from engine.ports import PlaceIndex
from engine.types import Features, FrameId
from tests.support.waiting import HANG_S

NUM_VALUES, NUM_FEATURE_VALUES, NUM_WORDS = 20, 72, 40
NUM_TOKENS, NUM_KEPT = 30, 12
NUM_PLACES, VISITS = 6, 3

Index = PooledPlaceIndex | AsmkPlaceIndex


def frame(number: int) -> FrameId:
    return FrameId(number)


def features_of(number: int) -> Features:
    return Features(
        frame_id=frame(number),
        keypoints_xy=np.zeros((0, 2)),
        descriptors=np.zeros((0, 0), np.uint8),
        scales=np.zeros(0, np.float32),
        colors=np.zeros((0, 3), np.uint8),
    )


def tokens_of(number: int, *, noise: float = 0.2) -> Tensor:
    """Frames k, k + NUM_PLACES, ... see one place; all tokens share a strong component."""
    place = torch.Generator().manual_seed(1000 + number % NUM_PLACES)
    own = torch.Generator().manual_seed(number)
    common = 4.0 * torch.ones(NUM_VALUES)
    # A place is a mixture of few kinds of tokens.
    kinds = torch.randn(5, NUM_VALUES, generator=place)
    chosen = torch.randint(5, (NUM_TOKENS,), generator=own)
    return common + kinds[chosen] + noise * torch.randn(NUM_TOKENS, NUM_VALUES, generator=own)


def asmk_model(**settings: Any) -> AsmkModel:
    generator = torch.Generator().manual_seed(5)
    projection = torch.randn(
        NUM_VALUES, NUM_FEATURE_VALUES, generator=generator, dtype=torch.float64
    )
    sample = torch.cat([tokens_of(number) for number in range(NUM_PLACES)])
    mean = sample.double().mean(dim=0, keepdim=True)
    rows = torch.randperm(len(sample), generator=generator)[:NUM_WORDS]
    centroids = ((sample[rows] - mean) @ projection).float()
    centroids += 0.5 * torch.randn(centroids.shape, generator=generator)
    return AsmkModel(
        **{
            "mean": mean,
            "projection": projection,
            "centroids": centroids,
            "num_features": float(NUM_KEPT),
            **settings,
        }
    )


def new_asmk() -> AsmkPlaceIndex:
    return AsmkPlaceIndex(asmk_model())


def filled(index: Index, numbers: Sequence[int]) -> Index:
    for number in numbers:
        index.put_tokens(frame(number), tokens_of(number))
        index.add(features_of(number))
    return index


def test_both_kinds_are_place_indexes_to_the_engine() -> None:
    indexes: list[PlaceIndex] = [PooledPlaceIndex(), new_asmk()]  # checked by mypy
    for index in indexes:
        with pytest.raises(KeyError):
            index.query(frame(1), exclude=(), limit=1)


def ids(found: Sequence[tuple[FrameId, float]]) -> list[int]:
    return [int(frame_id) for frame_id, _ in found]


both_kinds = pytest.mark.parametrize("new_index", [PooledPlaceIndex, new_asmk])


@both_kinds
def test_other_visits_of_the_same_place_come_first(new_index: Callable[[], Index]) -> None:
    index = filled(new_index(), range(NUM_PLACES * VISITS))
    for number in range(NUM_PLACES * VISITS):
        found = index.query(frame(number), exclude=(), limit=VISITS - 1)
        assert {other % NUM_PLACES for other in ids(found)} == {number % NUM_PLACES}
        assert number not in ids(found)


@both_kinds
def test_scores_are_in_order_and_within_their_range(new_index: Callable[[], Index]) -> None:
    index = filled(new_index(), range(NUM_PLACES * VISITS))
    scores = [score for _, score in index.query(frame(0), exclude=(), limit=100)]
    assert len(scores) >= VISITS - 1
    assert scores == sorted(scores, reverse=True)
    assert all(0.0 < score <= 1.0 for score in scores)


@both_kinds
def test_excluded_keyframes_are_left_out_and_the_limit_holds(
    new_index: Callable[[], Index],
) -> None:
    index = filled(new_index(), range(NUM_PLACES * VISITS))
    everything = ids(index.query(frame(0), exclude=(), limit=100))
    unwanted = [frame(everything[0]), frame(everything[2]), frame(12345)]
    wanted = [other for other in everything if other not in unwanted]
    assert ids(index.query(frame(0), exclude=unwanted, limit=100)) == wanted
    assert ids(index.query(frame(0), exclude=unwanted, limit=1)) == wanted[:1]
    assert index.query(frame(0), exclude=(), limit=0) == []


@both_kinds
def test_unknown_keyframes_are_key_errors(new_index: Callable[[], Index]) -> None:
    index = new_index()
    with pytest.raises(KeyError):
        index.add(features_of(1))
    index.put_tokens(frame(1), tokens_of(1))
    with pytest.raises(KeyError):
        index.query(frame(1), exclude=(), limit=3)  # put, not added
    index.add(features_of(1))
    assert index.query(frame(1), exclude=(), limit=3) == []


@both_kinds
def test_a_keyframe_is_added_once(new_index: Callable[[], Index]) -> None:
    index = filled(new_index(), [1, 2])
    with pytest.raises(ValueError, match="keyframe 1 was added before"):
        index.add(features_of(1))
    index.put_tokens(frame(1), tokens_of(2))
    with pytest.raises(ValueError, match="keyframe 1 was added before"):
        index.add(features_of(1))


@both_kinds
def test_equally_similar_keyframes_come_in_order_of_adding(
    new_index: Callable[[], Index],
) -> None:
    index = filled(new_index(), range(NUM_PLACES))
    for number in (31, 30, 32):
        index.put_tokens(frame(number), tokens_of(0))
        index.add(features_of(number))
    assert ids(index.query(frame(0), exclude=(), limit=3)) == [31, 30, 32]


@both_kinds
def test_tokens_in_bfloat16_find_the_same_places(new_index: Callable[[], Index]) -> None:
    index = new_index()
    for number in range(NUM_PLACES * VISITS):
        index.put_tokens(frame(number), tokens_of(number).bfloat16())
        index.add(features_of(number))
    found = index.query(frame(1), exclude=(), limit=VISITS - 1)
    assert {other % NUM_PLACES for other in ids(found)} == {1}


@both_kinds
def test_one_thread_notes_while_another_adds_and_asks(new_index: Callable[[], Index]) -> None:
    index, has_tokens = new_index(), threading.Semaphore(0)

    def describe() -> None:
        for number in range(NUM_PLACES * VISITS):
            index.put_tokens(frame(number), tokens_of(number))
            has_tokens.release()

    describing = threading.Thread(target=describe)
    describing.start()
    for number in range(NUM_PLACES * VISITS):
        has_tokens.acquire(timeout=HANG_S)
        index.add(features_of(number))
        index.query(frame(number), exclude=(), limit=3)
    describing.join()
    alone = filled(new_index(), range(NUM_PLACES * VISITS))
    for number in range(NUM_PLACES * VISITS):
        found = index.query(frame(number), exclude=(), limit=5)
        assert found == alone.query(frame(number), exclude=(), limit=5)


# -- pooled -------------------------------------------------------------------------------------


def test_a_pooled_score_is_the_cosine_without_the_mean_of_all_added() -> None:
    numbers = list(range(10))
    index = filled(PooledPlaceIndex(), numbers)
    index.put_tokens(frame(99), 100.0 * tokens_of(99))  # put alone: changes nothing
    pooled = []
    for number in numbers:
        tokens = tokens_of(number).double().numpy()
        pooled.append((tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).mean(axis=0))
    centred = np.array(pooled) - np.mean(pooled, axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    expected = {number: centred[3] @ centred[number] for number in numbers if number != 3}
    found = dict(index.query(frame(3), exclude=(), limit=100))
    assert set(found) == {number for number, cosine in expected.items() if cosine > 0.0}
    assert found == pytest.approx({number: expected[number] for number in found}, abs=1e-5)


def test_the_order_of_adding_does_not_change_pooled_scores() -> None:
    numbers = list(range(12))
    forward = filled(PooledPlaceIndex(), numbers)
    backward = filled(PooledPlaceIndex(), numbers[::-1])
    one, other = (dict(index.query(frame(4), exclude=(), limit=5)) for index in (forward, backward))
    assert one == pytest.approx(other, abs=1e-5)


def test_a_few_very_long_tokens_do_not_drown_the_others() -> None:
    index = PooledPlaceIndex()
    for number in range(NUM_PLACES * VISITS):
        tokens = tokens_of(number)
        tokens[number % NUM_TOKENS] *= 100.0
        index.put_tokens(frame(number), tokens)
        index.add(features_of(number))
    found = index.query(frame(2), exclude=(), limit=VISITS - 1)
    assert {other % NUM_PLACES for other in ids(found)} == {2}


def test_identical_keyframes_give_no_scores_that_are_not_numbers() -> None:
    index = PooledPlaceIndex()
    for number in (1, 2, 3):
        index.put_tokens(frame(number), torch.ones(4, NUM_VALUES))
        index.add(features_of(number))
    assert index.query(frame(2), exclude=(), limit=3) == []


# -- ASMK ---------------------------------------------------------------------------------------


def slow_local_features(model: AsmkModel, tokens: Tensor) -> NDArray[Any]:
    whitened = (tokens.double().numpy() - model.mean.numpy()) @ model.projection.numpy()
    order = np.argsort(-np.linalg.norm(whitened, axis=1))
    return np.asarray(whitened[order[:NUM_KEPT]])


def slow_signs(model: AsmkModel, tokens: Tensor, *, num: int) -> dict[int, NDArray[Any]]:
    """Signs of the summed residuals by word."""
    centroids = model.centroids.double().numpy()
    sums: dict[int, NDArray[Any]] = {}
    for feature in slow_local_features(model, tokens):
        distances = ((centroids - feature) ** 2).sum(axis=1)
        for word in np.argsort(distances)[:num].tolist():
            sums[word] = sums.get(word, 0.0) + (feature - centroids[word])
    return {word: total > 0.0 for word, total in sums.items()}


def slow_similarity(model: AsmkModel, asked: Tensor, known: Tensor) -> float:
    """The kernel as the specification has it, one word after the other."""
    query, found_by = slow_signs(model, asked, num=5), slow_signs(model, known, num=1)
    total = 0.0
    for word in set(query) & set(found_by):
        hamming = np.count_nonzero(query[word] != found_by[word]) / NUM_FEATURE_VALUES
        similarity = 1.0 - 2.0 * hamming
        total += similarity**3 if similarity >= 0.0 else 0.0
    return float(total / np.sqrt(len(found_by)) / np.sqrt(len(query)))


def test_asmk_scores_are_cube_roots_of_the_kernel_computed_directly() -> None:
    model, numbers = asmk_model(), range(10)
    index = filled(AsmkPlaceIndex(model), numbers)
    for asked in (0, 7):
        found = dict(index.query(frame(asked), exclude=(), limit=100))
        expected = {
            frame(number): slow_similarity(model, tokens_of(asked), tokens_of(number)) ** (1 / 3)
            for number in numbers
            if number != asked
        }
        assert found == pytest.approx({k: s for k, s in expected.items() if s > 0.0}, abs=1e-6)
        assert len(found) >= 1


def test_words_are_the_nearest_by_distance_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asmk, "_BLOCK_WORDS", 7)
    model = asmk_model()
    features = model.local_features(tokens_of(3))
    distances = torch.cdist(features.double(), model.centroids.double())
    expected = distances.argsort(dim=1)[:, :5]
    assert torch.equal(model.nearest_words(features, num=5), expected)
    assert torch.equal(model.nearest_words(features, num=1), expected[:, :1])


def test_a_codebook_smaller_than_the_words_asked_for_is_used_whole() -> None:
    model = asmk_model(centroids=asmk_model().centroids[:3])
    found_by, asked_with = model.signatures(tokens_of(1))
    assert asked_with.words.tolist() == [0, 1, 2]
    assert set(found_by.words.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("num_features", "expected"), [(12.0, 12), (1000.0, NUM_TOKENS), (-0.5, 15), (-0.001, 1)]
)
def test_as_many_tokens_as_wanted_are_kept_those_of_largest_norm(
    num_features: float, expected: int
) -> None:
    model = asmk_model(num_features=num_features)
    norms = model.local_features(tokens_of(1)).norm(dim=1)
    everything = asmk_model(num_features=1000.0).local_features(tokens_of(1)).norm(dim=1)
    assert len(norms) == expected
    assert torch.equal(norms, everything.sort(descending=True).values[:expected])


def test_old_keyframes_can_still_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.matchers.mast3r.retrieval._KEPT_QUERIES", 2)
    index = filled(new_asmk(), range(NUM_PLACES * VISITS))
    found = index.query(frame(0), exclude=(), limit=VISITS - 1)
    assert {other % NUM_PLACES for other in ids(found)} == {0}


# -- files --------------------------------------------------------------------------------------


def write_files(folder: Path, *, protocol: int = 4, **settings: Any) -> Path:
    """The model of these tests in the layout of the public files."""
    model = asmk_model()
    arguments = argparse.Namespace(
        **{
            "pretrained": "backbone.pth",
            "freeze_backbone": 1,
            "prewhiten": 1,
            "hdims": "",
            "residual": False,
            "postwhiten": "",
            "featweights": "l2norm",
            "nfeat": NUM_KEPT,
            "imsize": 512,
            "nclusters": NUM_WORDS,
            **settings,
        }
    )
    state = OrderedDict({"prewhiten.m": model.mean, "prewhiten.p": model.projection})
    path = folder / "Tiny_retrieval_trainingfree.pth"
    torch.save({"args": arguments, "model": state}, path)
    codebook = {
        "type": "Codebook",
        "params": {"size": np.int64(NUM_WORDS), "index_factory": "Flat"},
        "state": {"centroids": model.centroids.numpy()},
    }
    write_codebook(path, codebook, protocol=protocol)
    return path


def write_codebook(path: Path, content: object, *, protocol: int = 4) -> None:
    codebook_beside(path).write_bytes(pickle.dumps(content, protocol=protocol))


def test_the_codebook_is_looked_for_beside_the_checkpoint() -> None:
    path = Path("weights/MASt3R_ViTLarge_retrieval_trainingfree.pth")
    assert codebook_beside(path) == Path("weights/MASt3R_ViTLarge_retrieval_codebook.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_public_files_are_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    path = write_files(tmp_path, protocol=protocol)
    model, expected = load_retrieval(path, device="cpu"), asmk_model()
    assert torch.equal(model.mean, expected.mean)
    assert torch.equal(model.projection, expected.projection)
    assert torch.equal(model.centroids, expected.centroids)
    assert model.num_features == NUM_KEPT


def test_a_codebook_written_by_an_older_numpy_is_read(tmp_path: Path) -> None:
    path = write_files(tmp_path, protocol=2)  # names are lines of text there
    codebook = codebook_beside(path)
    written = codebook.read_bytes()
    assert b"numpy._core." in written
    codebook.write_bytes(written.replace(b"numpy._core.", b"numpy.core."))
    assert torch.equal(load_retrieval(path, device="cpu").centroids, asmk_model().centroids)


@pytest.mark.parametrize(
    "convert",
    [np.asfortranarray, lambda values: values.astype(">f4"), lambda values: values.astype("<f8")],
    ids=["by columns", "big endian", "double"],
)
def test_centroids_are_read_however_they_are_laid_out(
    tmp_path: Path, convert: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    path = write_files(tmp_path)
    centroids = convert(asmk_model().centroids.numpy())
    write_codebook(
        path, {"type": "Codebook", "params": {}, "state": {"centroids": centroids}}, protocol=5
    )
    assert torch.equal(load_retrieval(path, device="cpu").centroids, asmk_model().centroids)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


def test_a_codebook_that_would_run_a_command_is_refused_and_does_not_run_it(
    tmp_path: Path,
) -> None:
    path, made = write_files(tmp_path), tmp_path / "made"
    write_codebook(path, {"type": "Codebook", "params": Malicious(os.system, f"touch {made}")})
    with pytest.raises(ConfigError, match=r"asks for \w+\.system"):
        load_retrieval(path, device="cpu")
    assert not made.exists()
    pickle.loads(codebook_beside(path).read_bytes())
    assert made.exists(), "the pickle was harmless"


@pytest.mark.parametrize(
    "content",
    [
        Malicious(eval, "1"),
        Malicious(getattr, "text", "upper"),
        Malicious(np.ndarray, (1,), "O", b"12345678"),
        Malicious(np.dtype, "O"),
        {"type": "Codebook", "params": {}, "state": {"centroids": np.array([[None]])}},
        {"type": "Codebook", "params": {}, "state": {"centroids": np.array([["a"]])}},
        {"type": "Codebook", "params": {}, "state": {"centroids": np.arange(6).reshape(2, 3)}},
        {"type": "Codebook", "params": {}, "state": {"centroids": np.ones(3, np.float32)}},
        {"type": "Codebook", "params": {}, "state": {"centroids": np.ones((0, 3), np.float32)}},
        {"type": "Codebook", "params": {}, "state": {"centroids": np.full((2, 3), np.nan)}},
        {"type": "Codebook", "params": {}, "state": {"centroids": [[1.0]]}},
        {"type": "Codebook", "params": {}, "state": {}},
        {"type": "Kernel", "params": {}, "state": {"centroids": np.ones((2, 3), np.float32)}},
        [1, 2, 3],
        "text",
    ],
    ids=range(15),
)
def test_other_content_of_a_codebook_is_refused_with_what_was_expected(
    tmp_path: Path, content: object
) -> None:
    path = write_files(tmp_path)
    write_codebook(path, content)
    with pytest.raises(ConfigError, match=r"is not a codebook \(.*expected a pickle of type"):
        load_retrieval(path, device="cpu")


def test_a_codebook_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    codebook = codebook_beside(path)
    whole = codebook.read_bytes()
    for length in [*range(0, len(whole) - 1, 101), len(whole) - 1]:
        codebook.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="is not a codebook"):
            load_retrieval(path, device="cpu")


def test_a_codebook_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    rng = np.random.default_rng(3)
    for _ in range(200):
        codebook_beside(path).write_bytes(b"\x80\x04" + rng.bytes(60))
        with pytest.raises(ConfigError, match="is not a codebook"):
            load_retrieval(path, device="cpu")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    codebook_beside(path).unlink()
    with pytest.raises(ConfigError, match=r"codebook .* read: .*Tiny_retrieval_codebook\.pkl"):
        load_retrieval(path, device="cpu")
    path.unlink()
    with pytest.raises(ConfigError, match=r"checkpoint .* read: .*retrieval_trainingfree\.pth"):
        load_retrieval(path, device="cpu")


def test_a_codebook_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    centroids = np.ones((2, 7), np.float32)
    write_codebook(path, {"type": "Codebook", "params": {}, "state": {"centroids": centroids}})
    with pytest.raises(ConfigError, match="words of 7 values, but .* features of 72"):
        load_retrieval(path, device="cpu")


@pytest.mark.parametrize("length", [0, 10, 500, -20])
def test_a_checkpoint_that_is_cut_off_is_refused_with_what_was_expected(
    tmp_path: Path, length: int
) -> None:
    path = write_files(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"not a retrieval checkpoint: .*'prewhiten\.m'"):
        load_retrieval(path, device="cpu")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"prewhiten.m": torch.zeros(1, 3), "prewhiten.p": torch.zeros(3, 3)}},
        {"args": argparse.Namespace(), "model": {"enc_norm.weight": torch.zeros(3)}},
        {
            "args": argparse.Namespace(),
            "model": {"prewhiten.m": torch.zeros(1, 2), "prewhiten.p": torch.zeros(3, 3)},
        },
        {
            "args": argparse.Namespace(),
            "model": {"prewhiten.m": torch.zeros(1, 3) / 0.0, "prewhiten.p": torch.zeros(3, 3)},
        },
        [torch.zeros(3)],
        {"args": Malicious(os.system, "false"), "model": {}},
    ],
    ids=range(6),
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, content: object) -> None:
    path = write_files(tmp_path)
    torch.save(content, path)
    with pytest.raises(ConfigError, match="not a retrieval checkpoint"):
        load_retrieval(path, device="cpu")


def test_a_head_with_more_than_a_whitening_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    content = {
        "args": argparse.Namespace(hdims="64"),
        "model": {
            "prewhiten.m": torch.zeros(1, 3),
            "prewhiten.p": torch.eye(3),
            "projector.0.weight": torch.eye(3),
            "postwhiten.m": torch.zeros(1, 3),
        },
    }
    torch.save(content, path)
    with pytest.raises(ConfigError, match="head with postwhiten, projector is not supported"):
        load_retrieval(path, device="cpu")


@pytest.mark.parametrize(
    "settings", [{"featweights": "uniform"}, {"residual": True}, {"nfeat": 0}, {"nfeat": -3}]
)
def test_settings_that_are_not_supported_are_named(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = write_files(tmp_path, **settings)
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        load_retrieval(path, device="cpu")
