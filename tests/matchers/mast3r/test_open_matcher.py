"""The MASt3R matcher from its configuration: weights, device, precision, places, licence."""

from __future__ import annotations

import argparse
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.matchers.mast3r import open_matcher, upstream
from adapters.matchers.mast3r.checkpoint import load_checkpoint
from adapters.matchers.mast3r.matcher import Mast3rMatcher
from adapters.matchers.mast3r.network import Mast3rNetwork
from adapters.matchers.mast3r.open_matcher import Places, choose_device, open_mast3r
from adapters.matchers.mast3r.retrieval import AsmkPlaceIndex, PooledPlaceIndex
from engine.config import DenseMatchingConfig, Mast3rConfig
from engine.errors import ConfigError
from engine.ports import PairMatcher, PlaceIndex
from engine.types import FrameId, ImagePair, MatchRequest, PairMatches
from tests.support.mast3r_weights import MINI, unpacked_mini_checkpoint
from tests.support.textured_images import frame_of, random_texture, similarity_about

DENSE = DenseMatchingConfig(max_corners=128, max_keypoints=512)
LICENCE = "CC BY-NC-SA"


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other on a busy machine would be all that is measured."""
    monkeypatch.setattr(open_matcher, "_num_cores", lambda: 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return unpacked_mini_checkpoint(tmp_path)


def config(checkpoint: Path | str = "", **settings: Any) -> Mast3rConfig:
    given: dict[str, Any] = {"device": "cpu", "precision": "float32", "image_edge_px": 96}
    return Mast3rConfig(checkpoint=str(checkpoint), **{**given, **settings})


def opened(checkpoint: Path, **settings: Any) -> tuple[Mast3rMatcher, Places]:
    return open_mast3r(config(checkpoint, **settings), dense=DENSE)


def match_images(matcher: Mast3rMatcher, places: Places) -> PairMatches:
    """Two images through all that was opened."""
    texture = random_texture()
    features = []
    for number in (1, 2):
        motion = similarity_about((0.0, 0.0), shift_xy=(4.0 * number, 0.0))
        pixels = texture.image(192, 128, image_from_texture=motion)
        features.append(matcher.describe(frame_of(pixels, frame_id=number)))
        places.add(features[-1])
    (matches,) = matcher.match(
        [
            MatchRequest(
                pair=ImagePair(FrameId(1), FrameId(2)),
                first=features[0],
                second=features[1],
                query_rows1=np.arange(len(features[0])),
                query_rows2=np.arange(len(features[1])),
                wants_pointmaps=True,
            )
        ]
    )
    return matches


# -- the checkpoint -------------------------------------------------------------------------------


def test_a_checkpoint_is_made_a_matcher_and_its_places(checkpoint: Path) -> None:
    matcher, places = opened(checkpoint)
    checked: tuple[PairMatcher, PlaceIndex] = matcher, places  # by mypy
    assert checked[0].name == "mast3r"
    assert isinstance(places, PooledPlaceIndex)
    matches = match_images(matcher, places)
    assert ((matches.confidence >= 0) & (matches.confidence <= 1)).all()
    found = places.query(FrameId(1), exclude=(), limit=5)
    assert all(frame_id == 2 for frame_id, _ in found)


def test_without_a_checkpoint_the_setting_the_command_and_the_licence_are_named() -> None:
    with pytest.raises(ConfigError) as refused:
        open_mast3r(config(), dense=DENSE)
    message = str(refused.value)
    for part in (
        "--set mast3r.checkpoint=PATH",
        "hf download naver/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric --local-dir ",
        LICENCE,
        "non-commercial",
    ):
        assert part in message


@pytest.mark.parametrize("implementation", ["native", "upstream"])
def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path, implementation: str) -> None:
    path = tmp_path / "none.pth"
    with pytest.raises(ConfigError, match=r"none\.pth"):
        opened(path, implementation=implementation)


def test_a_checkpoint_is_found_in_the_home_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    matcher, _ = open_mast3r(config(f"~/{checkpoint.name}"), dense=DENSE)
    assert matcher.name == "mast3r"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("no weights")
    with pytest.raises(ConfigError, match=r"notes\.pth"):
        opened(path)


@pytest.mark.slow
def test_lengths_are_in_metres_when_the_checkpoint_says_so(checkpoint: Path) -> None:
    metric = checkpoint.rename(checkpoint.with_name("mini_metric.pth"))
    in_metres = match_images(*opened(metric))
    plain = match_images(*opened(metric.rename(metric.with_name("mini.pth"))))
    assert len(plain) == len(in_metres) > 0
    assert (plain.depths_m == 0).all()
    assert (in_metres.depths_m[:, 0] > 0).any()


def test_the_licence_of_the_weights_is_logged_once(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        opened(checkpoint)
    (record,) = caplog.records
    assert LICENCE in record.getMessage()
    assert str(checkpoint) in record.getMessage()


# -- the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:77", "nonsense", "meta", "hpu", "", "cpu,cuda"])
def test_a_device_that_is_not_there_is_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^mast3r.device={name}: is not usable here: ."):
        opened(checkpoint, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_is_refused_where_there_is_none(checkpoint: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"mast3r.device={name}: is not usable here"):
        opened(checkpoint, device=name)


def test_a_processor_is_always_there_and_gives_all_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_matcher, "_num_cores", lambda: 12)
    device = choose_device(config())
    assert (device.name, device.is_cuda) == ("cpu", False)
    assert device.num_threads == 12


def test_the_best_device_is_chosen() -> None:
    device = choose_device(config(device="auto"))
    assert device.is_cuda == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_the_network_runs_in_the_precision_that_is_asked_for(
    checkpoint: Path, precision: str, dtype: torch.dtype
) -> None:
    assert choose_device(config(precision=precision)).dtype == dtype
    matches = match_images(*opened(checkpoint, precision=precision))
    assert ((matches.confidence >= 0) & (matches.confidence <= 1)).all()


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_a_processor_runs_bfloat16_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_device(config(precision="auto")).dtype == dtype


def test_an_older_pytorch_without_the_query_runs_in_full_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_device(config(precision="auto")).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_runs_the_network(checkpoint: Path) -> None:
    matcher, places = opened(checkpoint, device="cuda", precision="auto")
    match_images(matcher, places)
    assert matcher.peak_gpu_mb > 0


@pytest.mark.parametrize("place", ["load_checkpoint", "load_retrieval"])
def test_a_device_without_room_for_the_weights_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(path: Path, **_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 MiB.")

    monkeypatch.setattr(open_matcher, place, full)
    with pytest.raises(ConfigError, match=f"mast3r.device=cpu: has no room for {checkpoint}"):
        opened(checkpoint, retrieval_checkpoint="retrieval.pth")


# -- upstream's code ------------------------------------------------------------------------------


def test_a_checkout_of_upstream_that_is_not_there_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Upstream has one size of heads only, not that of this small checkpoint.
    monkeypatch.setattr(upstream, "_constructor_arguments", lambda shape: {})
    root = tmp_path / "checkout"
    with pytest.raises(ConfigError, match=f"{root} is no checkout of upstream's MASt3R"):
        opened(checkpoint, implementation="upstream", upstream_root=str(root))


def test_tokens_for_upstream_are_kept_in_full_whatever_precision_is_asked_for(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, **_: object) -> Mast3rNetwork:
        return load_checkpoint(path, device="cpu", dtype=torch.float32).network

    monkeypatch.setattr(open_matcher, "load_upstream", load)
    rounded, exact = (
        match_images(*opened(checkpoint, implementation="upstream", precision=precision))
        for precision in ("bfloat16", "float32")
    )
    assert np.array_equal(rounded.points2_xy, exact.points2_xy)
    assert np.array_equal(rounded.confidence, exact.confidence)


@pytest.mark.parametrize("root", ["", "~/mast3r"])
def test_upstream_gets_the_folder_of_its_code(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    asked: list[tuple[Path, Path | None, str]] = []

    def load(path: Path, *, root: Path | None, device: str) -> Mast3rNetwork:
        asked.append((path, root, device))
        return load_checkpoint(path, device=device, dtype=torch.float32).network

    monkeypatch.setattr(open_matcher, "load_upstream", load)
    monkeypatch.setenv("HOME", "/home/someone")
    match_images(*opened(checkpoint, implementation="upstream", upstream_root=root))
    assert asked == [(checkpoint, Path("/home/someone/mast3r") if root else None, "cpu")]


# -- places ---------------------------------------------------------------------------------------


def write_retrieval(folder: Path, *, num_values: int = MINI.encoder_dim) -> Path:
    """A retrieval checkpoint and its codebook in the layout of the public files."""
    generator = torch.Generator().manual_seed(0)
    num_words = 16
    path = folder / "mini_retrieval_trainingfree.pth"
    arguments = argparse.Namespace(
        pretrained="backbone.pth",
        freeze_backbone=1,
        prewhiten=1,
        hdims="",
        residual=False,
        postwhiten="",
        featweights="l2norm",
        nfeat=300,
        imsize=512,
        nclusters=num_words,
    )
    state = {
        "prewhiten.m": torch.zeros((1, num_values), dtype=torch.float64),
        "prewhiten.p": torch.eye(num_values, dtype=torch.float64),
    }
    torch.save({"args": arguments, "model": state}, path)
    centroids = torch.randn((num_words, num_values), generator=generator).numpy()
    codebook = {
        "type": "Codebook",
        "params": {"size": num_words},
        "state": {"centroids": centroids},
    }
    (folder / "mini_retrieval_codebook.pkl").write_bytes(pickle.dumps(codebook))
    return path


def test_with_the_retrieval_checkpoint_places_are_found_by_words(
    checkpoint: Path, tmp_path: Path
) -> None:
    retrieval = write_retrieval(tmp_path)
    matcher, places = opened(checkpoint, retrieval_checkpoint=str(retrieval))
    assert isinstance(places, AsmkPlaceIndex)
    match_images(matcher, places)
    ((found, score),) = places.query(FrameId(1), exclude=(), limit=5)
    assert found == 2
    assert 0 < score <= 1


def test_a_retrieval_checkpoint_that_is_not_there_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"none_retrieval\.pth"):
        opened(checkpoint, retrieval_checkpoint=str(tmp_path / "none_retrieval.pth"))


def test_a_retrieval_checkpoint_of_another_network_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    retrieval = write_retrieval(tmp_path, num_values=MINI.encoder_dim + 4)
    with pytest.raises(ConfigError, match="for tokens of 32 values, as .*, found one for 36"):
        opened(checkpoint, retrieval_checkpoint=str(retrieval))
