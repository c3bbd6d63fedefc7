from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.benchmark.colmap_pipeline import Request
from adapters.benchmark.datasets import Dataset, PeerImages
from adapters.benchmark.pipelines import Colmap, LiveSfm, options_for, pipelines_for
from engine.errors import ConfigError
from tests.support.benchmark_runs import rows

PHOTOS = Dataset(name="fox", source=Path("data/fox"), names=("1.jpg",), reference=None)
VIDEO = Dataset(name="walk", source=Path("data/walk.mp4"), names=(), reference=None)


def pipelines(dataset: Dataset = PHOTOS, **options: Any) -> list[LiveSfm | Colmap]:
    given: dict[str, Any] = {
        "configs": [],
        "settings": [],
        "peers": [],
        "baseline": None,
        "only": [],
    }
    return pipelines_for(dataset, **given | options)


def names(dataset: Dataset = PHOTOS, **options: Any) -> list[str]:
    return [pipeline.name for pipeline in pipelines(dataset, **options)]


def test_photos_go_through_both_mappers_with_all_pairs_once_for_each_number_of_features() -> None:
    assert names() == [
        "livesfm-default",
        "colmap-exhaustive-incremental",
        "colmap-exhaustive-global",
    ], "LiveSfM takes as many features of a photo as COLMAP does"
    assert names(configs=["phone"]) == [
        "livesfm-phone",
        "colmap-exhaustive-incremental",
        "colmap-exhaustive-incremental-1000",
        "colmap-exhaustive-global",
        "colmap-exhaustive-global-1000",
    ]


def test_a_video_goes_through_sequential_pairs() -> None:
    assert names(VIDEO) == [
        "livesfm-default",
        "colmap-sequential-incremental",
        "colmap-sequential-incremental-2000",
        "colmap-sequential-global",
        "colmap-sequential-global-2000",
    ]


def test_ours_and_peers_take_turns() -> None:
    assert names(
        configs=["phone", "drone"],
        peers=["colmap-sequential-incremental-2500", "colmap-exhaustive-global"],
    ) == [
        "livesfm-phone",
        "colmap-sequential-incremental-2500",
        "livesfm-drone",
        "colmap-exhaustive-global",
    ]


def test_another_version_gets_every_configuration(tmp_path: Path) -> None:
    program = tmp_path / "livesfm"
    found = pipelines(configs=["phone"], baseline=program, peers=["none"])
    assert [pipeline.name for pipeline in found] == ["livesfm-phone", "baseline-phone"]
    assert isinstance(found[1], LiveSfm)
    assert found[1].command(PHOTOS, tmp_path)[:2] == [str(program), "run"]


def test_options_that_name_a_dataset_win_over_the_others() -> None:
    options = ["drone", "fox=phone", "wal?=drone_video"]
    assert options_for("fox", options) == ["phone"]
    assert options_for("walk", options) == ["drone_video"]
    assert options_for("seneca", options) == ["drone"]


def test_only_pipelines_of_a_pattern_are_left() -> None:
    assert names(only=["livesfm-*", "*-global"]) == ["livesfm-default", "colmap-exhaustive-global"]


@pytest.mark.parametrize(
    "name",
    ["colmap", "colmap-exhaustive", "colmap-all-global", "colmap-exhaustive-global-0", "openmvg"],
)
def test_an_unknown_peer_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: is no peer; use none or colmap-PAIRS"):
        pipelines(peers=[name])


def test_an_unknown_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        pipelines(configs=["nowhere"])


def test_the_command_of_livesfm_shows_nothing_and_has_all_settings(tmp_path: Path) -> None:
    (ours,) = pipelines(configs=["phone"], settings=["sift.max_features=500"], peers=["none"])
    assert isinstance(ours, LiveSfm)
    command = ours.command(PHOTOS, tmp_path)
    assert command[command.index("run") :] == [
        *("run", "data/fox", "--config", "phone", "--set", "sift.max_features=500"),
        *("--out", str(tmp_path / "run"), "--view", "none", "--quiet"),
    ]


def test_the_request_of_a_peer_is_whole(tmp_path: Path) -> None:
    (peer,) = pipelines(peers=["colmap-sequential-global-700"], only=["colmap-*"])
    assert isinstance(peer, Colmap)
    images = PeerImages(
        root=Path("data/fox"), frames=tuple(rows(["1.jpg"])), camera_mode="AUTO", step=1
    )
    command = peer.command(images, tmp_path, num_threads=3)
    request = Request(**json.loads(Path(command[-1]).read_text()))
    assert request == Request(
        root="data/fox",
        names=["1.jpg"],
        work=str(tmp_path),
        pairs="sequential",
        mapper="global",
        num_features=700,
        camera_mode="AUTO",
        num_threads=3,
    )
