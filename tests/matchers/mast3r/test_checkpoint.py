"""MASt3R checkpoints: every way the same weights come in files, and every file that is refused."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r import safetensors_file
from adapters.matchers.mast3r.checkpoint import (
    LoadedCheckpoint,
    is_named_metric,
    load_checkpoint,
)
from adapters.matchers.mast3r.model_string import parse_model_string
from adapters.matchers.mast3r.weights import download_command
from engine.errors import AdapterUnavailableError, ConfigError
from tests.support.mast3r_weights import (
    MINI,
    assert_reproduces,
    canonical,
    constructor_arguments,
    formula_network,
    read_torch_file,
    unpacked_mini_checkpoint,
    write_hugging_face_folder,
)

Contents = dict[str, Any]
Weights = dict[str, Tensor]
QKV = "enc_blocks.0.attn.qkv.weight"
SECOND_NAME = "downstream_head2.dpt.scratch.layer_rn.1.weight"


@pytest.fixture(scope="module")
def mini_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked_mini_checkpoint(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def contents_as_read(mini_file: Path) -> Contents:
    """What the small checkpoint holds; reading takes longer than copying."""
    return read_torch_file(mini_file)


@pytest.fixture
def contents(contents_as_read: Contents) -> Contents:
    """What the small checkpoint holds, to be changed and saved again."""
    return copy.deepcopy(contents_as_read)


@pytest.fixture
def weights(contents: Contents) -> Weights:
    """The tensors of the small checkpoint by name, aliases included."""
    model: Weights = contents["model"]
    return model


def load(path: Path, *, dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
    return load_checkpoint(path, device="cpu", dtype=dtype)


def saved(contents: object, folder: Path, *, name: str = "checkpoint.pth") -> Path:
    path = folder / name
    torch.save(contents, path)
    return path


def assert_same_weights(loaded: LoadedCheckpoint, expected: Weights) -> None:
    state = loaded.network.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def refusal(path: Path) -> str:
    """Why a file is not loaded."""
    with pytest.raises(ConfigError) as refused:
        load(path)
    text = str(refused.value)
    assert "expected" in text
    return text


# -- torch files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini_LL", "mini_PP"])
def test_a_checkpoint_as_the_public_one_is_laid_out_gives_upstreams_values(
    mini_file: Path, name: str
) -> None:
    loaded = load(mini_file)
    assert loaded.network.shape == MINI
    assert not loaded.is_metric
    assert loaded.path == mini_file
    assert_reproduces(loaded.network, name)


def test_a_loaded_network_is_ready_to_use(mini_file: Path, weights: Weights) -> None:
    network = load(mini_file).network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.is_meta for parameter in network.parameters())
    assert_same_weights(load(mini_file), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_loaded_in_the_type_that_is_asked_for(
    mini_file: Path, weights: Weights, dtype: torch.dtype
) -> None:
    loaded = load(mini_file, dtype=dtype)
    assert loaded.network.dtype == dtype
    assert_same_weights(loaded, {name: tensor.to(dtype) for name, tensor in weights.items()})


def test_a_file_of_the_training_is_loaded_without_the_rest_of_it(
    contents: Contents, weights: Weights, tmp_path: Path
) -> None:
    expected = dict(weights)
    weights["prediction_head.weight"] = torch.zeros(3, 3)
    state = {"optimizer": {"state": {0: torch.ones(4)}}, "scaler": {"scale": 1.0}}
    path = saved({**contents, **state, "best_so_far": inf}, tmp_path)
    assert_same_weights(load(path), expected)


def test_weights_without_a_second_decoder_use_the_first_one_twice(
    contents: Contents, weights: Weights, tmp_path: Path
) -> None:
    contents["model"] = {
        name: tensor for name, tensor in weights.items() if not name.startswith("dec_blocks2.")
    }
    state = load(saved(contents, tmp_path)).network.state_dict()
    copies = [name for name in state if name.startswith("dec_blocks2.")]
    assert len(copies) > 200
    for name in copies:
        assert torch.equal(state[name], weights[name.replace("blocks2", "blocks", 1)])


@pytest.mark.parametrize("keep_first", [True, False])
def test_tensors_with_two_names_are_found_under_either(
    contents: Contents, weights: Weights, tmp_path: Path, keep_first: bool
) -> None:
    second = {name for name in weights if name != canonical(name)}
    first = {canonical(name) for name in second}
    assert len(second) == len(first) == 8
    left_out = second if keep_first else first
    contents["model"] = {name: weights[name] for name in weights if name not in left_out}
    loaded = load(saved(contents, tmp_path))
    assert_same_weights(loaded, weights)
    for name in second:
        parameters = dict(loaded.network.named_parameters(remove_duplicate=False))
        assert parameters[name] is parameters[canonical(name)]


def test_what_is_never_used_need_not_be_there(
    contents: Contents, weights: Weights, tmp_path: Path
) -> None:
    del weights["mask_token"]
    network = load(saved(contents, tmp_path)).network
    assert network.mask_token.shape == (1, 1, MINI.decoder_dim)
    assert not network.mask_token.any()


# -- Hugging Face folders -------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["", "model.safetensors"])
def test_a_hugging_face_folder_gives_what_the_torch_file_gives(
    weights: Weights, tmp_path: Path, entry: str
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    assert (
        b'"downstream_head1.dpt.scratch.layer_rn.0.weight": {'
        not in (folder / "model.safetensors").read_bytes()
    )
    loaded = load(folder / entry)
    assert loaded.network.shape == MINI
    assert_same_weights(loaded, weights)
    assert_reproduces(loaded.network, "mini_LL")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_half_precision(
    weights: Weights, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    folder = write_hugging_face_folder(tmp_path / "hub", stored, shape=MINI)
    assert_same_weights(load(folder), {name: tensor.float() for name, tensor in stored.items()})
    assert_same_weights(load(folder, dtype=dtype), stored)


def test_arguments_of_other_networks_are_read_from_the_folder(tmp_path: Path) -> None:
    shape = replace(MINI, two_confs=False, descriptor_dim=6, image_edge_px=224, decoder_depth=4)
    state = formula_network(shape).state_dict()
    folder = write_hugging_face_folder(tmp_path / "hub", state, shape=shape)
    arguments = {**constructor_arguments(shape), "img_size": 224, "conf_mode": ["exp", 1, 50]}
    (folder / "config.json").write_text(json.dumps(arguments))
    expected = replace(shape, confidence_range=(1.0, 50.0), descriptor_confidence_range=(1.0, 50.0))
    assert load(folder).network.shape == expected


def test_unknown_arguments_are_logged(
    weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    arguments = {**constructor_arguments(MINI), "colour": "blue", "freeze": "encoder"}
    (folder / "config.json").write_text(json.dumps(arguments))
    load(folder)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{folder}: arguments 'colour' are not known, ignored"
    ]


# -- licence and scale ----------------------------------------------------------------------------


def test_the_error_of_a_missing_checkpoint_says_how_to_fetch_it(tmp_path: Path) -> None:
    text = refusal(tmp_path / "nothing.pth")
    assert "nothing.pth is not there" in text
    assert download_command() in text
    assert download_command(Path("weights")) == (
        "hf download naver/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"
        " --local-dir weights/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"
    )


def test_a_path_that_no_file_can_have_is_refused(mini_file: Path) -> None:
    assert "cannot be read: File name too long" in refusal(mini_file.with_name("m" * 5000))
    assert "is not there" in refusal(mini_file / "model.safetensors")
    assert "is not there" in refusal(Path("mast3r\0.pth"))


@pytest.mark.parametrize(
    ("path", "is_metric"),
    [
        ("weights/MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric.pth", True),
        ("MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric/model.safetensors", True),
        ("models--naver--MASt3R_catmlpdpt_metric/snapshots/0a1b2c", True),
        ("models--naver--MASt3R_catmlpdpt_metric/snapshots/0a1b2c/model.safetensors", True),
        ("Metric/mast3r.pth", True),
        ("photogrammetric/mast3r.pth", False),
        ("metrics/mast3r.pth", False),
        ("metric/weights/mast3r.pth", False),
        ("mast3r.pth", False),
    ],
)
def test_the_name_of_a_checkpoint_decides_whether_it_is_metric(path: str, is_metric: bool) -> None:
    assert is_named_metric(Path("/data") / path) == is_metric


def test_a_metric_checkpoint_is_known_as_one(mini_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "mini_metric.pth"
    path.write_bytes(mini_file.read_bytes())
    assert load(path).is_metric


# -- the construction as text ---------------------------------------------------------------------


def test_a_construction_is_parsed_without_running_it() -> None:
    text = (
        "AsymmetricMASt3R(a='x', b=(64, -inf, inf), c=True, d=None, e=-1.5, f=[1, 2],"
        " landscape_only=False)"
    )
    assert parse_model_string(text) == {
        "a": "x",
        "b": (64, -inf, inf),
        "c": True,
        "d": None,
        "e": -1.5,
        "f": (1, 2),
        "landscape_only": False,
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("AsymmetricCroCo3DStereo(enc_depth=24)", "class AsymmetricMASt3R.*AsymmetricCroCo3DS"),
        ("__import__('os').system('true')", "class AsymmetricMASt3R.*__import__"),
        ("AsymmetricMASt3R(enc_depth=__import__('os'))", "a literal for enc_depth.*__import__"),
        ("AsymmetricMASt3R(enc_depth=12 * 2)", "a literal for enc_depth.*12 \\* 2"),
        ("AsymmetricMASt3R(enc_depth=nan)", "a literal for enc_depth.*nan"),
        ("AsymmetricMASt3R(enc_depth=-True)", "a literal for enc_depth.*-True"),
        ("AsymmetricMASt3R(enc_depth=b'24')", "a literal for enc_depth"),
        ("AsymmetricMASt3R(24)", "keyword arguments only"),
        ("AsymmetricMASt3R(**{'enc_depth': 24})", "keyword arguments only"),
        ("AsymmetricMASt3R", r"a call of AsymmetricMASt3R\(\.\.\.\)"),
        ("AsymmetricMASt3R(enc_depth=24", r"a call of AsymmetricMASt3R\(\.\.\.\)"),
        ("", r"a call of AsymmetricMASt3R\(\.\.\.\)"),
        ("a\0b", r"a call of AsymmetricMASt3R\(\.\.\.\)"),
        ("AsymmetricMASt3R(a=" + "(" * 5000 + ")" * 5000 + ")", r"a call of AsymmetricMASt3R"),
        ("AsymmetricMASt3R(a=" + "-" * 2000 + "1)", r"a call of AsymmetricMASt3R"),
    ],
)
def test_text_that_is_not_the_construction_of_mast3r_is_refused(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"expected .*{found}") as refused:
        parse_model_string(text)
    assert len(str(refused.value)) < 300


# -- torch files that are refused -----------------------------------------------------------------


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda path: path.write_bytes(b""), "begins with b''"),
        (lambda path: path.write_bytes(bytes(range(256)) * 40), r"begins with b'\\x00\\x01"),
        (lambda path: path.write_text("version https://git-lfs"), "b'version https://git-lfs'"),
        (lambda path: path.write_bytes(pickle.dumps({"model": {}})), "begins with"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)), "damaged or foreign"),
        (write_zip, "damaged or foreign"),
    ],
    ids=["empty", "random", "pointer", "pickle", "no zip", "other zip"],
)
def test_a_file_that_torch_did_not_write_is_refused(
    tmp_path: Path, write: Callable[[Path], object], found: str
) -> None:
    path = tmp_path / "foreign.pth"
    write(path)
    with pytest.raises(ConfigError, match=rf"foreign\.pth: expected .*torch\.save.*{found}"):
        load(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_what_was_expected(
    mini_file: Path, tmp_path: Path, kept: float
) -> None:
    data = mini_file.read_bytes()
    path = tmp_path / "truncated.pth"
    path.write_bytes(data[: int(len(data) * kept)])
    assert "torch.save" in refusal(path)


def test_a_file_with_a_damaged_pickle_is_refused(mini_file: Path, tmp_path: Path) -> None:
    data = mini_file.read_bytes()
    with zipfile.ZipFile(mini_file) as archive:
        (info,) = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
    start = data.index(b"\x80\x02}", info.header_offset)
    for k, damage in enumerate((b"\xff" * 8, b"R" * 40, b"." * 3, b"\x85R0b")):
        path = tmp_path / f"damaged{k}.pth"
        path.write_bytes(data[:start] + damage + data[start + len(damage) :])
        assert "torch.save" in refusal(path)


def test_an_archive_whose_pickle_breaks_off_is_refused(mini_file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(mini_file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in files if name.endswith("data.pkl")]
    # Within the length of a text, and at places where something else is missing.
    cut_within_a_length = files[pickled].index(b"X") + 3
    path = tmp_path / "broken_off.pth"
    for kept in (cut_within_a_length, 0, 1, 100, len(files[pickled]) // 2):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data[:kept] if name == pickled else data)
        assert "torch.save" in refusal(path)


class Wish:
    """Unpickling this would run something."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._made,)


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(
    contents: Contents, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    path = saved({**contents, "args": Wish(made)}, tmp_path)
    text = refusal(path)
    assert "asks for" in text
    assert "weights_only" not in text
    assert not made.exists()


@pytest.mark.parametrize(
    ("replaced", "found"),
    [
        ([1, 2], "a dictionary with the entries 'args' and 'model', found list"),
        ({}, "the entries 'args' and 'model', found nothing"),
        ({"fc.weight": torch.ones(2, 2)}, "the entries 'args' and 'model', found 'fc.weight'"),
        ({"args": Namespace(model="AsymmetricMASt3R()"), "epoch": 1}, "found 'args', 'epoch'"),
        ({"args": Namespace(arch="resnet"), "model": {}}, "construction as text.*Namespace"),
        ({"args": {"model": "AsymmetricMASt3R()"}, "model": {}}, "construction as text.*dict"),
        (
            {"args": Namespace(model="AsymmetricMASt3R()"), "model": {}},
            "tensors by name in its entry 'model', found dict",
        ),
        (
            {"args": Namespace(model="AsymmetricMASt3R()"), "model": {"epoch": 3}},
            "a plain tensor of floating-point numbers as 'epoch', found int",
        ),
        (
            {"args": Namespace(model="AsymmetricMASt3R()"), "model": {"a": torch.ones(2).int()}},
            "a plain tensor .* as 'a', found one of torch.int32 on cpu",
        ),
        (
            {
                "args": Namespace(model="AsymmetricMASt3R()"),
                "model": {"a": torch.ones(1).expand(10**12)},
            },
            "a plain tensor .* as 'a'",
        ),
        (
            {
                "dune_backbone_name": "dune_vitbase14",
                "mast3r_model_str": "AsymmetricMASt3R()",
                "model": {},
            },
            "DUNE variant.*expected a MASt3R checkpoint with its own encoder",
        ),
    ],
)
def test_a_torch_file_of_something_else_is_refused(
    tmp_path: Path, replaced: Any, found: str
) -> None:
    with pytest.raises(ConfigError, match=rf"checkpoint\.pth is .*{found}"):
        load(saved(replaced, tmp_path))


def test_another_class_of_network_is_refused_by_its_name(
    contents: Contents, tmp_path: Path
) -> None:
    contents["args"].model = contents["args"].model.replace("MASt3R", "CroCo3DStereo")
    text = refusal(saved(contents, tmp_path))
    assert "checkpoint.pth: expected a network of class AsymmetricMASt3R" in text
    assert "AsymmetricCroCo3DStereo" in text


# -- weights that are refused ---------------------------------------------------------------------


def test_missing_tensors_are_named(contents: Contents, weights: Weights, tmp_path: Path) -> None:
    for name in ("enc_norm.weight", "enc_norm.bias", QKV):
        weights[f"other.{name}"] = weights.pop(name)
    text = refusal(saved(contents, tmp_path))
    assert "expected 657 tensors, 3 are missing" in text
    assert "'enc_norm.weight'" in text
    assert f"'{QKV}'" in text
    assert "not expected were 'other.enc_norm.weight'" in text


def test_tensors_of_another_network_are_named(
    contents: Contents, weights: Weights, tmp_path: Path
) -> None:
    contents["model"] = {f"module.{name}": tensor for name, tensor in weights.items()}
    text = refusal(saved(contents, tmp_path))
    assert "not a MASt3R checkpoint: expected a tensor 'patch_embed.proj.weight'" in text
    assert "found 'module.mask_token'" in text
    assert "653 more" in text


def test_a_block_that_is_not_there_is_missed(
    contents: Contents, weights: Weights, tmp_path: Path
) -> None:
    for name in [name for name in weights if name.startswith("dec_blocks.4.")]:
        del weights[name]
    assert "'dec_blocks.4.norm1.weight'" in refusal(saved(contents, tmp_path))


@pytest.mark.parametrize("name", [QKV, SECOND_NAME, "decoder_embed.bias", "mask_token"])
def test_a_tensor_of_another_shape_is_named(
    contents: Contents, weights: Weights, tmp_path: Path, name: str
) -> None:
    weights[canonical(name)] = torch.zeros(7, 5)
    text = refusal(saved(contents, tmp_path))
    assert f"expected '{canonical(name)}' of shape" in text
    assert "found (7, 5)" in text


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "decoder_embed.weight"])
@pytest.mark.parametrize("shape", [(), (0, 3, 16, 16)])
def test_sizes_are_not_taken_from_tensors_that_have_none(
    contents: Contents, weights: Weights, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    weights[name] = torch.zeros(shape)
    assert f"'{name}'" in refusal(saved(contents, tmp_path))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (inf, torch.bfloat16), (1e5, torch.float16)],
)
def test_weights_that_are_no_numbers_are_refused(
    contents: Contents, weights: Weights, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    weights[QKV][3, 4] = value
    path = saved(contents, tmp_path)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"expected numbers that {name} can hold in '{QKV}'"):
        load(path, dtype=dtype)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("enc_depth=2", "enc_depth=3", "argument enc_depth to be 2, as its tensors .* found 3"),
        ("enc_embed_dim=32", "enc_embed_dim=64", "enc_embed_dim to be 32, .* found 64"),
        ("dec_depth=10", "dec_depth=12", "dec_depth to be 10, .* found 12"),
        ("dec_embed_dim=16", "dec_embed_dim=8", "dec_embed_dim to be 16, .* found 8"),
        ("two_confs=True", "two_confs=False", "fc2.weight' of shape .1024, 192., found .1280"),
        ("two_confs=True", "two_confs=1", "two_confs to be True or False, found 1"),
        ("pts3d+desc4", "pts3d+desc5", "fc2.weight' of shape .1536, 192., found .1280"),
        ("pts3d+desc4", "pts3d", "output_mode to be .* found 'pts3d'"),
        ("'catmlp+dpt'", "'linear'", "head_type to be 'catmlp\\+dpt', found 'linear'"),
        ("RoPE100", "cosine", "pos_embed to be .* found 'cosine'"),
        ("RoPE100", "RoPE٣", "pos_embed to be .* found 'RoPE٣'"),
        ("ManyAR_PatchEmbed", "PatchEmbedConv", "patch_embed_cls to be .* 'PatchEmbedConv'"),
        ("depth_mode=('exp', -inf, inf)", "depth_mode=('linear', -inf, inf)", "depth_mode to be"),
        ("conf_mode=('exp', 1, inf)", "conf_mode=('sigmoid', 0, 1)", "conf_mode to be"),
        ("desc_conf_mode=('exp', 0, inf)", "desc_conf_mode=('exp', 2, 1)", "desc_conf_mode to"),
        ("enc_num_heads=2", "enc_num_heads=0", "enc_num_heads to be a whole number, found 0"),
        ("enc_num_heads=2", "enc_num_heads=3", "32 channels in 3 heads"),
        (", dec_num_heads=2", "", "dec_num_heads to be a whole number, found nothing"),
        ("img_size=(64, 64)", "img_size=('a', 64)", "img_size to be a size in px"),
        ("img_size=(64, 64)", "img_size=()", "img_size to be a size in px"),
        ("two_confs=True", "two_confs=True, patch_size=8", "patch_size to be 16, .* found 8"),
        ("two_confs=True", "two_confs=True, mlp_ratio=2.0", "mlp_ratio to be 4, .* found 2.0"),
        ("two_confs=True", "two_confs=True, desc_mode='raw'", "desc_mode to be 'norm'"),
    ],
)
def test_arguments_that_are_not_of_these_weights_are_refused(
    contents: Contents, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in contents["args"].model
    contents["args"].model = contents["args"].model.replace(old, new)
    with pytest.raises(ConfigError, match=f"expected.*{message}|{message}"):
        load(saved(contents, tmp_path))


# -- Hugging Face folders that are refused --------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused(
    weights: Weights, tmp_path: Path, missing: str
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    (folder / missing).unlink()
    (left,) = folder.iterdir()
    text = refusal(folder)
    assert "a Hugging Face folder with config.json and model.safetensors" in text
    assert f"found no {missing} but '{left.name}'" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "arguments as JSON"),
        ("{", "arguments as JSON"),
        ("[1]", "arguments by name, found list"),
        ("\xff\xfe", "arguments as JSON"),
        ("[" * 100_000, "arguments as JSON"),
        ('{"model_type": "bert"}', "argument head_type to be 'catmlp\\+dpt', found nothing"),
    ],
)
def test_a_folder_with_a_foreign_config_is_refused(
    weights: Weights, tmp_path: Path, config: str, message: str
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    (folder / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ConfigError, match=f"expected the .*{message}"):
        load(folder)


def with_header(header: object, *, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[Any], begin: Any, end: Any, *, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"PK\x03\x04" * 10,
        (10**9).to_bytes(8, "little") + b"{}",
        with_header(b"not json"),
        with_header(b"\xff\xfe{}"),
        with_header(b"[" * 100_000),
        with_header([1, 2]),
        with_header({"a": 3}),
        with_header({"a": {"dtype": "F32", "shape": [1]}}),
        with_header({"a": entry([-1], 0, 4)}, data=bytes(4)),
        with_header({"a": entry([2**62, 4], 0, 0)}),
        with_header({"a": entry([2], 0, 4)}, data=bytes(4)),
        with_header({"a": entry([2], 0, 8)}, data=bytes(4)),
        with_header({"a": entry([1], 0, 4)}, data=bytes(9)),
        with_header({"a": entry([1], 4, 8)}, data=bytes(8)),
        with_header({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, data=bytes(8)),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", {}, shape=MINI)
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors: expected a whole safetensors file: " in refusal(folder)


def test_numbers_of_another_type_are_refused(tmp_path: Path) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", {}, shape=MINI)
    data = with_header({"a": entry([1], 0, 8, kind="I64")}, data=bytes(8))
    (folder / "model.safetensors").write_bytes(data)
    assert "numbers of type F32, F16, BF16, found 'a' of type I64" in refusal(folder)


def test_a_hugging_face_folder_without_the_package_is_refused_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", {}, shape=MINI)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(AdapterUnavailableError, match="needs the package safetensors: .*mast3r"):
        load(folder)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(
    weights: Weights, tmp_path: Path, kept: float
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "expected a whole safetensors file" in refusal(folder)


def test_a_safetensors_file_that_shrinks_while_it_is_read_is_refused(
    weights: Weights, tmp_path: Path
) -> None:
    folder = write_hugging_face_folder(tmp_path / "hub", weights, shape=MINI)
    opened = safetensors_file.open_hugging_face(folder)
    path = folder / "model.safetensors"
    last = list(opened.shapes)[-1]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"expected \d+ bytes, as when it was opened"):
        opened.read(last)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        opened.read(last)


def test_a_folder_with_weights_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_hugging_face_folder(
        tmp_path / "hub", {"fc.weight": torch.zeros(3, 3)}, shape=MINI
    )
    text = refusal(folder)
    assert "not a MASt3R checkpoint: expected a tensor 'patch_embed.proj.weight'" in text
    assert "found 'fc.weight'" in text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "found no model.safetensors but nothing" in refusal(tmp_path)
