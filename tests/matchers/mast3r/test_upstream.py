"""Upstream's MASt3R: found, imported without a trace, refused with what is missing, and equal."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r import upstream
from adapters.matchers.mast3r.architecture import Grid, NetworkShape
from adapters.matchers.mast3r.checkpoint import LoadedCheckpoint
from adapters.matchers.mast3r.network import Mast3rNetwork, ViewOutput
from adapters.matchers.mast3r.upstream import (
    UpstreamNetwork,
    build_upstream,
    import_upstream,
    load_upstream,
)
from engine.errors import ConfigError, InferenceError
from tests.support.mast3r_weights import (
    MINI,
    TINY,
    formula_network,
    golden,
    unpacked_mini_checkpoint,
    write_hugging_face_folder,
)

ROOT_VARIABLE = "LIVESFM_MAST3R_ROOT"
UPSTREAM_PACKAGES = {"mast3r", "dust3r", "models", "croco"}

# The names the adapter uses, in the layout of a checkout, with the side effects of importing it.
FAKE_FILES = {
    "mast3r/__init__.py": "",
    "mast3r/model.py": """
import sys
from pathlib import Path

import torch

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / "dust3r"))
sys.path.insert(0, str(root / "dust3r" / "croco"))
print("Warning, this is slow")
torch.backends.cuda.matmul.allow_tf32 = True
import dust3r.model
import models.croco


class AsymmetricMASt3R(models.croco.Network):
    pass
""",
    "dust3r/dust3r/__init__.py": "",
    "dust3r/dust3r/model.py": "from models.croco import Network",
    "dust3r/croco/models/croco.py": """
import torch


class Network(torch.nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        print("Made")
        self.arguments = arguments
        self.patch_embed = torch.nn.Conv2d(3, arguments["enc_embed_dim"], 16, stride=16)

    def _encode_image(self, image, true_shape):
        self.true_shape = true_shape
        return self.patch_embed(image).flatten(2).transpose(1, 2), "positions", None

    def _decoder(self, tokens1, positions1, tokens2, positions2):
        return (tokens1, positions1), (tokens2, positions2)

    def _downstream_head(self, number, layers, true_shape):
        assert all(layer.dtype == torch.float32 for layer in layers)
        tokens, positions = layers
        height, width = true_shape[0].tolist()
        (rows, columns), images = (height // 16, width // 16), len(tokens)
        maps = positions.reshape(images, rows, columns, 2)
        return {"desc": maps, "desc_conf": number * maps[..., 0], "pts3d": maps, "conf": maps}
""",
}
FAKE_STATE = {
    "patch_embed.weight": torch.ones(TINY.encoder_dim, 3, 16, 16),
    "patch_embed.bias": torch.zeros(TINY.encoder_dim),
    "mask_token": torch.zeros(1),  # not used by this model
}


def upstream_modules() -> dict[str, object]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in UPSTREAM_PACKAGES
    }


@pytest.fixture(autouse=True)
def nothing_loaded_before() -> Iterator[None]:
    """Every test begins and ends without upstream's modules."""
    for name in upstream_modules():
        del sys.modules[name]
    search_path = list(sys.path)
    yield
    for name in upstream_modules():
        del sys.modules[name]
    sys.path[:] = search_path
    importlib.invalidate_caches()


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "checkout", FAKE_FILES)


def fake_network(root: Path | None) -> UpstreamNetwork:
    return build_upstream(TINY, FAKE_STATE, root=root, device="cpu")


# -- importing ----------------------------------------------------------------------------------


def test_importing_a_checkout_leaves_no_trace(
    checkout: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    search_path = list(sys.path)
    allowed = torch.backends.cuda.matmul.allow_tf32
    module = import_upstream(checkout)
    assert module.__file__ == str(checkout / "mast3r" / "model.py")
    assert sys.path == search_path
    assert torch.backends.cuda.matmul.allow_tf32 == allowed
    assert {name.partition(".")[0] for name in upstream_modules()} == {"mast3r", "dust3r"}
    assert capfd.readouterr().out == ""
    assert "Warning, this is slow" in caplog.text


def test_a_checkout_is_imported_again_without_being_loaded_again(checkout: Path) -> None:
    assert import_upstream(checkout) is import_upstream(checkout)


def test_a_relative_folder_and_one_with_links_are_the_same_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = import_upstream(checkout)
    (checkout.parent / "link").symlink_to(checkout)
    monkeypatch.chdir(checkout.parent)
    assert import_upstream(Path("checkout")) is first
    assert import_upstream(Path("link")) is first


def test_an_installed_package_is_used_where_no_folder_is_given(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(checkout)
    search_path = list(sys.path)
    assert import_upstream(None).__file__ == str(checkout / "mast3r" / "model.py")
    assert sys.path == search_path


def test_without_package_and_folder_the_error_says_how_to_get_it() -> None:
    if importlib.util.find_spec("mast3r") is not None:
        pytest.skip("mast3r is installed")
    with pytest.raises(ConfigError) as refused:
        import_upstream(None)
    text = str(refused.value)
    assert "package mast3r is not installed" in text
    assert "git clone --recursive https://github.com/naver/mast3r" in text
    assert "CC BY-NC-SA" in text


@pytest.mark.parametrize("missing", ["mast3r", "dust3r", "dust3r/croco"])
def test_a_missing_part_of_a_checkout_is_named(checkout: Path, missing: str) -> None:
    shutil.rmtree(checkout / missing)
    with pytest.raises(ConfigError) as refused:
        import_upstream(checkout)
    text = str(refused.value)
    assert f"{checkout / missing}/" in text
    assert "is missing" in text
    assert "git clone --recursive" in text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no checkout of upstream's MASt3R"):
        import_upstream(tmp_path / "nowhere")


def test_all_missing_dependencies_are_named_at_once_and_nothing_stays_loaded(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_DEPENDENCIES", ("numpy", "missing_one", "missing_two"))
    croco = checkout / "dust3r" / "croco" / "models" / "croco.py"
    whole = croco.read_text()
    croco.write_text("import missing_two.part\n" + whole)
    search_path = list(sys.path)
    with pytest.raises(ConfigError, match="pip install missing_one missing_two$"):
        import_upstream(checkout)
    assert sys.path == search_path
    assert upstream_modules() == {}
    croco.write_text(whole)
    shutil.rmtree(croco.parent / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    import_upstream(checkout)


def test_a_missing_dependency_is_named_as_the_index_has_it(checkout: Path) -> None:
    model = checkout / "dust3r" / "dust3r" / "model.py"
    model.write_text("raise ModuleNotFoundError('No module named PIL', name='PIL.Image')")
    with pytest.raises(ConfigError, match="pip install .*pillow"):
        import_upstream(checkout)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import models.other", "No module named 'models.other'"),
        ("from models.croco import Gone", "cannot import name 'Gone'"),
    ],
)
def test_a_broken_checkout_is_distinguished_from_a_missing_dependency(
    checkout: Path, text: str, said: str
) -> None:
    (checkout / "dust3r" / "dust3r" / "model.py").write_text(text)
    with pytest.raises(ConfigError, match=f"cannot be imported: {said}"):
        import_upstream(checkout)


@pytest.mark.parametrize("layout", ["models/__init__.py", "models.py"])
def test_another_package_models_is_refused_before_it_is_in_the_way(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    other = write_tree(tmp_path / "other", {layout: ""})
    monkeypatch.syspath_prepend(other)
    with pytest.raises(ConfigError, match=f"another package models, {other / layout}, hides"):
        import_upstream(checkout)
    assert upstream_modules() == {}


def test_a_loaded_package_models_is_refused_and_stays_loaded(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tree(tmp_path / "other", {"models/__init__.py": ""})
    with monkeypatch.context() as patch:
        patch.syspath_prepend(other)
        loaded = importlib.import_module("models")
    with pytest.raises(ConfigError, match=f"another package models, {other / 'models'}"):
        import_upstream(checkout)
    assert sys.modules["models"] is loaded


def test_a_folder_named_models_that_is_no_package_does_no_harm(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "models").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "work")
    import_upstream(checkout)


@pytest.mark.parametrize("package", ["mast3r", "dust3r"])
def test_a_package_loaded_from_elsewhere_is_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    other = write_tree(tmp_path / "other", {f"{package}/__init__.py": ""})
    monkeypatch.syspath_prepend(other)
    importlib.import_module(package)
    with pytest.raises(ConfigError, match=f"another package {package} is loaded, from {other}"):
        import_upstream(checkout)


def test_a_folder_bound_as_dust3r_by_an_earlier_import_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.syspath_prepend(checkout)
        importlib.import_module("dust3r")  # binds the folder that holds the package
    with pytest.raises(ConfigError, match="another package dust3r is loaded"):
        import_upstream(checkout)


# -- the model ----------------------------------------------------------------------------------


def test_the_model_is_built_from_the_shape_without_printing(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = fake_network(checkout)
    arguments = network._model.arguments
    assert arguments["enc_embed_dim"] == TINY.encoder_dim
    assert arguments["output_mode"] == "pts3d+desc24"
    assert arguments["pos_embed"] == "RoPE100"
    assert arguments["landscape_only"] is False
    assert network.shape is TINY
    assert not network._model.training
    assert not any(weight.requires_grad for weight in network._model.parameters())
    assert capfd.readouterr().out == ""


def test_upstream_is_asked_with_the_size_of_images_and_the_places_of_tokens(
    checkout: Path,
) -> None:
    network = fake_network(checkout)
    images1, images2 = torch.ones(2, 3, 32, 48), torch.ones(2, 3, 48, 16)
    tokens1, tokens2 = network.encode(images1), network.encode(images2)
    assert tokens1.shape == (2, 6, TINY.encoder_dim)
    assert network._model.true_shape.tolist() == [[48, 16], [48, 16]]
    first, second = network.decode(
        tokens1.bfloat16(), tokens2.bfloat16(), grid1=(2, 3), grid2=(3, 1), with_points=True
    )
    expected = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), dim=-1)
    assert torch.equal(first.descriptors, expected.float().expand(2, -1, -1, -1))
    assert second.descriptor_confidence[1].tolist() == [[0.0], [2.0], [4.0]]  # head 2: rows twice
    assert first.points3D is not None
    assert second.confidence is not None
    without = network.decode(tokens1, tokens2, grid1=(2, 3), grid2=(3, 1), with_points=False)
    assert (
        [view.points3D for view in without] == [view.confidence for view in without] == [None] * 2
    )


@pytest.mark.parametrize("size", [(40, 48), (48, 40), (0, 16)])
def test_images_of_broken_patches_are_refused(checkout: Path, size: tuple[int, int]) -> None:
    with pytest.raises(InferenceError, match="whole 16 px patches"):
        fake_network(checkout).encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("num_images", "grid2"), [(1, (2, 2)), (2, (2, 3))])
def test_tokens_that_do_not_fit_are_refused(checkout: Path, num_images: int, grid2: Grid) -> None:
    tokens = torch.zeros(1, 6, TINY.encoder_dim)
    with pytest.raises(InferenceError, match="do not fill"):
        fake_network(checkout).decode(
            tokens,
            tokens.expand(num_images, -1, -1),
            grid1=(2, 3),
            grid2=grid2,
            with_points=False,
        )


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, r"needs more weights, 'patch_embed\.weight', 'patch_embed\.bias'"),
        ({**FAKE_STATE, "patch_embed.bias": torch.zeros(3)}, "do not fit"),
    ],
    ids=["missing", "of another size"],
)
def test_weights_of_another_model_are_refused(
    checkout: Path, state: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_upstream(TINY, state, root=checkout, device="cpu")


@pytest.mark.slow
def test_a_checkpoint_is_read_by_safe_means_and_put_into_upstream_s_model(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        own = Mast3rNetwork(TINY)
    own.to_empty(device="cpu").requires_grad_(False)
    own.patch_embed.proj.weight.uniform_(generator=torch.Generator().manual_seed(1))
    croco = checkout / "dust3r" / "croco" / "models" / "croco.py"
    croco.write_text(
        croco.read_text()
        .replace(
            "self.patch_embed = ",
            "self.patch_embed = torch.nn.Module()\n        self.patch_embed.proj = ",
        )
        .replace("self.patch_embed(", "self.patch_embed.proj(")
    )

    def load(path: Path, *, device: str, dtype: torch.dtype) -> LoadedCheckpoint:
        assert (device, dtype) == ("cpu", torch.float32)
        return LoadedCheckpoint(network=own, is_metric=False, path=path)

    monkeypatch.setattr(upstream, "load_checkpoint", load)
    network = load_upstream(Path("tiny.pth"), root=checkout, device="cpu")
    assert torch.equal(network._model.patch_embed.proj.weight, own.patch_embed.proj.weight)


def test_a_checkpoint_whose_heads_upstream_does_not_have_is_refused(
    checkout: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no heads of dpt_layer_dims \(6, 8, 10, 12\)"):
        load_upstream(unpacked_mini_checkpoint(tmp_path), root=checkout, device="cpu")
    assert upstream_modules() == {}


def test_a_decoder_that_upstream_does_not_have_is_refused(checkout: Path) -> None:
    shape = NetworkShape(
        encoder_dim=64,
        encoder_depth=2,
        encoder_heads=4,
        decoder_dim=48,
        decoder_depth=8,
        decoder_heads=4,
        descriptor_dim=MINI.descriptor_dim,
    )
    with pytest.raises(ConfigError, match="at least 10 decoder blocks, not 8"):
        build_upstream(shape, FAKE_STATE, root=checkout, device="cpu")


# -- the real thing -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tiny_LL", "tiny_PP", "tiny_LP"])
def test_a_real_checkout_computes_what_this_project_s_network_computes(
    case: str, tmp_path: Path
) -> None:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        pytest.skip(f"{ROOT_VARIABLE} names no checkout of upstream's MASt3R")
    own, inputs = formula_network(TINY), golden(case)
    folder = write_hugging_face_folder(tmp_path, own.state_dict(), shape=TINY)
    theirs = load_upstream(folder, root=Path(root), device="cpu")
    images = inputs["img1"], inputs["img2"]
    (rows1, columns1), (rows2, columns2) = (
        (image.shape[2] // 16, image.shape[3] // 16) for image in images
    )
    outputs: list[ViewOutput] = []
    for network in (own, theirs):
        tokens1, tokens2 = (network.encode(image) for image in images)
        outputs += network.decode(
            tokens1, tokens2, grid1=(rows1, columns1), grid2=(rows2, columns2), with_points=True
        )
    for view, expected in zip(outputs[:2], outputs[2:], strict=True):
        for name in ("descriptors", "descriptor_confidence", "points3D", "confidence"):
            ours, upstreams = getattr(view, name), getattr(expected, name)
            torch.testing.assert_close(ours, upstreams, atol=1e-5, rtol=1e-5)
