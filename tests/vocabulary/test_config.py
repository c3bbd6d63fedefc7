"""Configuration: what is refused, what wins, and that the explained defaults are the real ones."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from engine.config import Config, dump_config, load_config, preset_paths
from engine.errors import ConfigError
from tests.support.paths import CONFIGS, TOOLS

DEFAULT = CONFIGS / "default.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def flatten(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every value under its section.key."""
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", TOOLS / "generate_default_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def builtin_values() -> dict[str, Any]:
    return flatten(Config().model_dump(mode="json"))


# -- what is refused ------------------------------------------------------------------------------


def test_an_unknown_section_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path / "my.yaml", "snapshot: {keep: 3}")
    with pytest.raises(ConfigError) as refused:
        load_config([path])
    assert str(refused.value) == f"{path}: unknown section: snapshot; did you mean snapshots?"


def test_an_unknown_key_is_refused_with_the_nearest_name_of_its_section() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(settings=["sift.max_feature=2048"])
    message = "--set sift.max_feature=2048: unknown key of sift: max_feature"
    assert str(refused.value) == f"{message}; did you mean max_features?"


def test_what_an_older_version_wrote_into_a_run_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "config.yaml", "sift: {max_features: 77, gone: 1}\nno_section: {x: 2}")
    config = load_config(settings=["sift.max_features_in_video=99"], former=path)
    assert (config.sift.max_features, config.sift.max_features_in_video) == (77, 99)
    assert [record.message for record in caplog.records] == [
        f"{path}: sift.gone is no setting any more",
        f"{path}: no_section is no section of settings any more",
    ]
    with pytest.raises(ConfigError):
        load_config([path])


def test_a_key_that_resembles_nothing_is_refused_with_some_name_too() -> None:
    with pytest.raises(ConfigError, match=r"unknown section: 7; did you mean \w+\?"):
        load_config(settings=["7.x=1"])


@pytest.mark.parametrize(
    "setting",
    [
        "sift.max_features=0",
        "sift.max_ratio=1.01",
        "sift.max_ratio=-0.01",
        "cameras.model=FISH_EYE",
        "cameras.intrinsics=guessed",
        "global_bundle_adjustment.growth_ratio=1.0",
        "local_bundle_adjustment.num_keyframes=1",
        "scene_graph.temporal_offsets=[1, 0]",
        "snapshots.every_s=-1",
        "snapshots.every_s=.nan",
        "views.grpc_port=65536",
        "views.jpeg_quality=101",
        "sift.max_features=many",
        "sift.max_features=2.5",
        "second.free_keypoints=1000000000",
        "second.pairs_per_s=1e9",
        "second.pairs_at_once=1001",
        "second.look_back=1001",
        "initialization.early_triangulation_angle_deg=500",
        "window.weak_fit_ratio=11",
        "snapshots.growth_ratio=11",
        "sift.max_features=",
        "sift.mutual=7",
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(settings=[setting])
    assert str(refused.value).startswith(setting.partition("=")[0])


def test_every_value_out_of_range_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(settings=["sift.max_features=-5", "views.web_port=-1"])
    assert "sift.max_features: Input should be" in str(refused.value)
    assert "(given -5)" in str(refused.value)
    assert "views.web_port" in str(refused.value)


def test_a_calibration_of_another_length_than_its_model_is_refused() -> None:
    model = "cameras.model=PINHOLE"
    with pytest.raises(ConfigError, match="PINHOLE has 4 parameters, 3 given"):
        load_config(settings=[model, "cameras.params=[500, 320, 240]"])
    for focal_px in ("-500, 500", "500, -500", "500, 0"):
        with pytest.raises(ConfigError, match=f"begin with {focal_px}, which must be above 0"):
            load_config(settings=[model, f"cameras.params=[{focal_px}, 320, 240]"])
    config = load_config(settings=[model, "cameras.params=[500, 500, 320, 240]"])
    assert config.cameras.params == (500.0, 500.0, 320.0, 240.0)


@pytest.mark.parametrize(
    "setting", ["sift.max_features", "max_features=1", "sift=1", ".x=1", "sift.=1", ""]
)
def test_a_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_config(settings=[setting])


def test_a_setting_whose_value_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        load_config(settings=["scene_graph.temporal_offsets=[1, 2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sift: [", "is not valid YAML"),
        ("just words", "expected sections of settings, found str"),
        ("- sift", "expected sections of settings, found list"),
        ("sift: 7", "sift is a section of settings, not a value"),
        ("sift:", "sift is a section of settings, not a value"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path / "my.yaml", text)
    with pytest.raises(ConfigError) as refused:
        load_config([path])
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match="cannot be read: is a folder"):
        load_config([tmp_path])


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0 a JPEG by mistake")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config([path])


@pytest.mark.parametrize(
    "value",
    [
        "2026-99-99",
        "2026-01-01",
        "9" * 5000,
        f"0x{'f' * 5000}",
        ":".join(["1"] * 3000),
        "1e999",
        ".nan",
        str(2**31),
        "-1",
        f"[{'x,' * 20_000}]",
        "[" * 3000,
        f"'{'x' * 100_000}'",
        "&a [*a]",
        "{a: 1}",
        "!!int ''",
        "\x1b[2J",
    ],
)
def test_an_absurd_value_is_refused_in_one_short_line(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "my.yaml", f"runtime: {{seed: {value}}}")
    for overlays, settings in (([], [f"runtime.seed={value}"]), ([path], [])):
        with pytest.raises(ConfigError) as refused:
            load_config(overlays, settings)
        said = str(refused.value)
        assert said.isprintable()
        assert len(said) < 1000 + len(str(path))


def test_of_very_many_wrong_values_the_first_are_named_and_the_others_counted() -> None:
    with pytest.raises(ConfigError, match=r"cameras\.params\.0: .*; and 995 more") as refused:
        load_config(settings=[f"cameras.params=[{'x,' * 1000}]"])
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 100_000, "\x1b[2J", "2026-01-01", "1" * 4000])
def test_a_name_of_any_length_is_refused_in_one_short_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "my.yaml", f'? "{name}"\n: {{a: 1}}')
    for overlays, settings in (([path], []), ([], [f"{name}.b=1"]), ([], [f"sift.{name}=1"])):
        with pytest.raises(ConfigError) as refused:
            load_config(overlays, settings)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 600 + len(str(path))


def test_no_time_is_longer_than_clocks_can_wait_and_no_number_larger_than_colmap_takes() -> None:
    longest = "live_sources.open_timeout_s=1e9"
    assert load_config(settings=[longest]).live_sources.open_timeout_s < threading.TIMEOUT_MAX
    for setting in ("live_sources.open_timeout_s=2e9", "sift.max_features=2147483648"):
        with pytest.raises(ConfigError, match="less than or equal"):
            load_config(settings=[setting])


def test_a_file_that_is_no_regular_one_or_far_too_large_is_refused(tmp_path: Path) -> None:
    fifo, giant, device = (tmp_path / f"{name}.yaml" for name in ("fifo", "giant", "device"))
    os.mkfifo(fifo)
    device.symlink_to("/dev/zero")
    with giant.open("wb") as file:
        file.truncate(2**40)
    for path, words in ((fifo, "is a FIFO"), (device, "is a device"), (giant, "too large")):
        with pytest.raises(ConfigError, match=words):
            load_config([path])


# -- what wins ------------------------------------------------------------------------------------


def test_settings_win_over_later_files_over_earlier_files_over_defaults(tmp_path: Path) -> None:
    first = write(tmp_path / "first.yaml", "sift: {max_features: 1, max_ratio: 0.1, mutual: false}")
    second = write(tmp_path / "second.yaml", "sift: {max_features: 2, max_ratio: 0.2}")
    sift = load_config([first, second], ["sift.max_features=3"]).sift
    assert (sift.max_features, sift.max_ratio, sift.mutual) == (3, 0.2, False)
    assert sift.working_edge_px == Config().sift.working_edge_px


def test_the_last_of_two_settings_wins() -> None:
    assert load_config(settings=["runtime.seed=1", "runtime.seed=2"]).runtime.seed == 2


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_config([write(tmp_path / "empty.yaml", "# later\n")]) == Config()


def test_a_setting_is_read_as_yaml() -> None:
    config = load_config(
        settings=[
            "scene_graph.temporal_offsets=[1, 5]",
            "sift.mutual=no",
            "views.bind=0.0.0.0",
            " runtime.seed = 4 ",
        ]
    )
    assert config.scene_graph.temporal_offsets == (1, 5)
    assert config.sift.mutual is False
    assert config.views.bind == "0.0.0.0"
    assert config.runtime.seed == 4


def test_calibrations_are_a_list_or_a_mapping_of_patterns_to_files(tmp_path: Path) -> None:
    listed = load_config(settings=["cameras.calibrations=[a.yml, 'left*=b.yml#1']"])
    assert listed.cameras.calibrations == ("a.yml", "left*=b.yml#1")
    text = "cameras:\n  calibrations:\n    left*: b.yml#1\n    '*': a.yml\n"
    mapped = load_config([write(tmp_path / "a.yaml", text)])
    assert mapped.cameras.calibrations == ("left*=b.yml#1", "*=a.yml")
    with pytest.raises(ConfigError, match=r"cameras\.calibrations"):
        load_config(settings=["cameras.calibrations=a.yml"])


# -- what a configuration is ----------------------------------------------------------------------


def test_a_dumped_configuration_holds_every_value_and_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(
        settings=[
            "cameras.params=[500, 320, 240, 0.1]",
            "sift.max_ratio=0.7",
            "sources.max_frames=9",
        ]
    )
    path = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config([path]) == config
    assert config != Config()
    assert set(flatten(yaml.safe_load(dump_config(config)))) == set(builtin_values())


def test_a_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.sift.max_features = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.sift = config.sift


# -- the files beside the code --------------------------------------------------------------------


def test_default_yaml_is_what_its_generator_writes_and_changes_nothing(
    generator: ModuleType,
) -> None:
    is_stale = DEFAULT.read_text("utf-8") != generator.default_config_text()
    assert not is_stale, "configs/default.yaml is stale: run tools/generate_default_config.py"
    assert load_config([DEFAULT]) == Config()


def test_a_setting_without_words_below_it_is_refused_by_its_line(generator: ModuleType) -> None:
    module = ast.parse('class A:\n    """Words."""\n    a: int = 1\n    b: int = 2\n    """B."""\n')
    with pytest.raises(SystemExit, match=r"config\.py:3: no string below says what this does"):
        generator._words_of_class(module.body[0])


@pytest.mark.parametrize("name", ["phone", "drone"])
def test_an_overlay_changes_something_and_stays_small(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config([path])
    assert config != Config()
    changed = flatten(yaml.safe_load(path.read_text("utf-8")))
    assert len(changed) < len(builtin_values()) / 4


def test_photos_of_a_survey_get_their_depth_before_its_share_of_the_cpu_time_is_spent() -> None:
    drone = load_config(["drone"])
    assert drone.dense.orthophoto
    assert drone.dense.max_cpu_share == 0.9
    assert load_config().dense.max_cpu_share == 0.25


# -- presets --------------------------------------------------------------------------------------


def test_every_file_in_configs_is_a_preset_by_its_name() -> None:
    assert preset_paths() == {path.stem: path for path in sorted(CONFIGS.iterdir())}
    for name, path in preset_paths().items():
        assert load_config([name]) == load_config([path])


def test_presets_and_files_are_laid_over_each_other_in_their_order(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "sift: {max_features: 7}")
    phone = load_config(["phone"]).sift
    over, under = load_config(["phone", mine]).sift, load_config([str(mine), "phone"]).sift
    assert (over.max_features, under.max_features) == (7, phone.max_features)
    assert over.working_edge_px == phone.working_edge_px != Config().sift.working_edge_px


def test_a_preset_wins_over_a_file_of_its_name_and_a_path_is_always_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("phone"), "sift: {max_features: 7}")
    write(Path("phone.yaml"), "sift: {max_features: 8}")
    assert load_config(["phone"]) == load_config([CONFIGS / "phone.yaml"])
    overlays: list[tuple[str | Path, int]] = [("./phone", 7), (Path("phone"), 7), ("phone.yaml", 8)]
    for overlay, max_features in overlays:
        assert load_config([overlay]).sift.max_features == max_features


def test_a_file_without_a_suffix_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("mine"), "sift: {max_features: 7}")
    assert load_config(["mine"]).sift.max_features == 7


@pytest.mark.parametrize(
    ("name", "advice"),
    [("phon", "; did you mean phone?"), ("drones", "; did you mean drone?"), ("xyz", ".")],
)
def test_an_unknown_preset_is_refused_with_the_known_ones(name: str, advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([name])
    names = "default, drone, drone_video, mast3r, oracle, phone"
    assert str(refused.value) == f"unknown preset: {name}{advice} Presets: {names}"


def test_a_missing_file_that_is_called_as_a_preset_is_refused_with_the_presets_name() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["elsewhere/phone.yaml"])
    assert str(refused.value) == (
        "elsewhere/phone.yaml: cannot be read: No such file or directory;"
        " the preset of that name is --config phone"
    )


# -- what settings are for ------------------------------------------------------------------------


def test_every_key_is_used_by_the_engine_or_an_adapter() -> None:
    root = CONFIGS.parent
    sources = [*root.glob("engine/**/*.py"), *root.glob("adapters/**/*.py")]
    code = "\n".join(
        path.read_text("utf-8") for path in sources if path != root / "engine" / "config.py"
    )
    unused = [
        name for name in builtin_values() if not re.search(rf"\.{name.partition('.')[2]}\b", code)
    ]
    assert not unused, f"these settings do nothing: {unused}"
