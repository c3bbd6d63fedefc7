"""The MASt3R network: upstream's values at every stage, in every type, and nothing done twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.matchers.mast3r import heads
from adapters.matchers.mast3r.architecture import VIT_LARGE, NetworkShape
from adapters.matchers.mast3r.blocks import grid_rotary_table, rotary_table
from adapters.matchers.mast3r.network import Mast3rNetwork, ViewOutput
from engine.errors import ConfigError, InferenceError
from tests.support.mast3r_weights import (
    GOLDEN,
    MINI,
    TINY,
    assert_reproduces,
    formula_network,
    formula_tensor,
    golden,
    golden_grids,
)

LANDSCAPE, PORTRAIT = (3, 4), (4, 3)


@pytest.fixture(scope="module")
def tiny() -> Mast3rNetwork:
    return formula_network(TINY)


@pytest.fixture(scope="module")
def mini() -> Mast3rNetwork:
    return formula_network(MINI)


def unloaded(shape: NetworkShape) -> Mast3rNetwork:
    with torch.device("meta"):
        return Mast3rNetwork(shape)


def images(*, batch: int = 1, height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, 3, height, width), generator=generator) * 2.0 - 1.0


def outputs_of(
    network: Mast3rNetwork, name: str, *, with_points: bool = True
) -> tuple[ViewOutput, ViewOutput]:
    """What the network says of the pair of a golden file."""
    case = golden(name)
    grid1, grid2 = golden_grids(case)
    tokens1, tokens2 = network.encode(case["img1"]), network.encode(case["img2"])
    return network.decode(tokens1, tokens2, grid1=grid1, grid2=grid2, with_points=with_points)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


# -- upstream's values ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_LL", "tiny_PP", "tiny_LP"])
def test_every_stage_gives_upstreams_values(tiny: Mast3rNetwork, name: str) -> None:
    assert_reproduces(tiny, name)


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("LIVESFM_HEAVY_TESTS") != "1",
    reason="needs 4 GB of memory: set LIVESFM_HEAVY_TESTS=1",
)
def test_the_public_configuration_gives_upstreams_values() -> None:
    network = formula_network(VIT_LARGE)
    state = network.state_dict()
    sums = {
        "patch_embed.proj.weight": 19.654912066630196,
        "enc_blocks.23.mlp.fc2.weight": 19.019088169885112,
        "dec_blocks2.11.cross_attn.projk.weight": 10.281530751949376,
        "downstream_head2.head_local_features.fc2.weight": 75.1539681750232,
    }
    for key, expected in sums.items():
        assert state[key].sum(dtype=torch.float64).item() == pytest.approx(expected, abs=1e-6)
    assert_reproduces(network, "vitl_formula_LL")


def test_tokens_are_turned_by_their_positions_as_upstream_does() -> None:
    case = golden("rope2d")
    positions = case["positions"][0]
    table = rotary_table(positions, head_dim=16, base=100.0, dtype=torch.float32)
    turned = table.rotate(case["tokens"].transpose(1, 2)).transpose(1, 2)
    assert relative_error(turned, case["out"]) < 1e-6
    # The golden positions are those of a grid of three rows of four.
    of_grid = grid_rotary_table(
        (3, 4), head_dim=16, base=100.0, dtype=torch.float32, device=torch.device("cpu")
    )
    assert torch.equal(of_grid.cosine, table.cosine)
    assert torch.equal(of_grid.signed_sine, table.signed_sine)


def test_angles_are_exact_in_every_type() -> None:
    positions = torch.tensor([[300, 511]])
    exact = rotary_table(positions, head_dim=64, base=100.0, dtype=torch.float64)
    rounded = rotary_table(positions, head_dim=64, base=100.0, dtype=torch.bfloat16)
    # Half a unit in the last place of numbers up to one; angles of 8 bits would be anywhere.
    assert (exact.cosine - rounded.cosine.double()).abs().max() < 2**-8
    assert (exact.signed_sine - rounded.signed_sine.double()).abs().max() < 2**-8


# -- names and shapes -----------------------------------------------------------------------------


def test_parameters_have_the_names_and_shapes_of_the_public_checkpoint() -> None:
    expected = json.loads((GOLDEN / "vitl_state_dict_shapes.json").read_text())
    network = unloaded(VIT_LARGE)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == 688_638_856


def test_the_formula_gives_the_weights_that_upstream_ran_with(tiny: Mast3rNetwork) -> None:
    expected = json.loads((GOLDEN / "tiny_formula_weights_checksums.json").read_text())
    state = tiny.state_dict()
    assert state.keys() == expected.keys()
    for key, (shape, total) in expected.items():
        assert list(state[key].shape) == shape
        assert state[key].sum(dtype=torch.float64).item() == pytest.approx(total, abs=1e-6), key


def test_the_formula_gives_one_tensor_for_both_of_its_names() -> None:
    names = [f"downstream_head1.dpt.scratch.{name}.weight" for name in ("layer_rn.2", "layer3_rn")]
    first, second = (formula_tensor(name, (4, 3, 3, 3)) for name in names)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_heads": 3}, "encoder.*multiple of 4.*64 channels in 3 heads"),
        ({"decoder_dim": 24, "decoder_heads": 4}, "decoder.*24 channels in 4 heads"),
        ({"encoder_heads": 0}, "encoder.*64 channels in 0 heads"),
        ({"patch_size": 14}, "16 px, not 14 px"),
        ({"encoder_depth": 0}, "not 0 and 10"),
        ({"decoder_depth": 1}, "not 2 and 1"),
        ({"descriptor_dim": 0}, "descriptors"),
    ],
)
def test_shapes_that_no_network_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_the_dpt_reads_four_layers_of_any_decoder() -> None:
    assert VIT_LARGE.hooks == (0, 6, 9, 12)
    assert TINY.hooks == (0, 5, 7, 10)
    assert replace(TINY, decoder_depth=2).hooks == (0, 1, 1, 2)


# -- what comes out -------------------------------------------------------------------------------


def test_outputs_are_of_each_views_own_size(tiny: Mast3rNetwork) -> None:
    for output, (height, width) in zip(
        outputs_of(tiny, "tiny_LP"), [(48, 64), (64, 48)], strict=True
    ):
        assert output.points3D is not None
        assert output.confidence is not None
        assert output.descriptors.shape == (1, height, width, 24)
        assert output.descriptor_confidence.shape == (1, height, width)
        assert output.points3D.shape == (1, height, width, 3)
        assert output.confidence.shape == (1, height, width)
        lengths = torch.linalg.vector_norm(output.descriptors, dim=-1)
        assert (lengths - 1.0).abs().max() < 1e-6
        assert output.confidence.min() >= 1.0
        assert output.descriptor_confidence.min() >= 0.0


@pytest.mark.parametrize("size", [(16, 16), (16, 64), (80, 48), (48, 112)])
def test_images_of_any_number_of_tokens_are_read(
    mini: Mast3rNetwork, size: tuple[int, int]
) -> None:
    height, width = size
    grid = (height // 16, width // 16)
    tokens = mini.encode(images(height=height, width=width))
    assert tokens.shape == (1, grid[0] * grid[1], MINI.encoder_dim)
    other = mini.encode(images())
    first, second = mini.decode(tokens, other, grid1=grid, grid2=LANDSCAPE, with_points=True)
    assert first.points3D is not None
    assert first.points3D.shape == (1, height, width, 3)
    assert second.descriptors.shape == (1, 48, 64, MINI.descriptor_dim)
    assert torch.isfinite(first.points3D).all()
    assert torch.isfinite(second.descriptors).all()


def test_without_points_descriptors_are_the_same_and_the_dpt_is_not_run(
    tiny: Mast3rNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = outputs_of(tiny, "tiny_LP")

    def refuse(*_: object) -> None:
        raise AssertionError("the DPT was run")

    monkeypatch.setattr(heads.DenseHead, "forward", refuse)
    short = outputs_of(tiny, "tiny_LP", with_points=False)
    for output, expected in zip(short, complete, strict=True):
        assert output.points3D is None
        assert output.confidence is None
        assert torch.equal(output.descriptors, expected.descriptors)
        assert torch.equal(output.descriptor_confidence, expected.descriptor_confidence)


@pytest.mark.parametrize("with_points", [True, False])
def test_descriptors_without_their_own_confidence_have_that_of_the_points(
    with_points: bool,
) -> None:
    network = formula_network(replace(MINI, two_confs=False))
    first, _ = outputs_of(network, "mini_LL", with_points=with_points)
    complete, _ = outputs_of(network, "mini_LL")
    assert complete.confidence is not None
    assert torch.equal(first.descriptor_confidence, complete.confidence)
    assert (first.confidence is None) == (not with_points)
    assert (first.points3D is None) == (not with_points)
    assert first.descriptors.shape == (1, 48, 64, MINI.descriptor_dim)


@pytest.mark.slow
def test_a_batch_of_pairs_gives_what_each_pair_gives_alone(tiny: Mast3rNetwork) -> None:
    together1 = tiny.encode(images(batch=3))
    together2 = tiny.encode(images(batch=3, height=64, width=48, seed=1))
    batch = tiny.decode(together1, together2, grid1=LANDSCAPE, grid2=PORTRAIT, with_points=True)
    for k in range(3):
        tokens1 = tiny.encode(images(batch=3)[k : k + 1])
        tokens2 = tiny.encode(images(batch=3, height=64, width=48, seed=1)[k : k + 1])
        alone = tiny.decode(tokens1, tokens2, grid1=LANDSCAPE, grid2=PORTRAIT, with_points=True)
        assert relative_error(together1[k], tokens1[0]) < 1e-5
        for output, expected in zip(batch, alone, strict=True):
            assert output.points3D is not None
            assert expected.points3D is not None
            assert relative_error(output.descriptors[k], expected.descriptors[0]) < 1e-5
            assert relative_error(output.points3D[k], expected.points3D[0]) < 1e-4


def test_the_roles_of_the_two_views_differ(tiny: Mast3rNetwork) -> None:
    tokens1, tokens2 = tiny.encode(images()), tiny.encode(images(seed=1))
    grids = {"grid1": LANDSCAPE, "grid2": LANDSCAPE}
    first, _ = tiny.decode(tokens1, tokens2, **grids, with_points=False)
    _, second = tiny.decode(tokens2, tokens1, **grids, with_points=False)
    assert relative_error(first.descriptors, second.descriptors) > 0.1


def test_only_the_layers_that_are_wanted_are_kept(mini: Mast3rNetwork) -> None:
    tokens = mini.encode(images())
    for layers in mini.decoder_features(
        tokens, tokens, grid1=LANDSCAPE, grid2=LANDSCAPE, wanted=(0, 5, 10)
    ):
        assert sorted(layers) == [0, 5, 10]


def test_a_network_keeps_no_gradients() -> None:
    network = Mast3rNetwork(MINI)
    tokens = network.encode(images())
    output, _ = network.decode(tokens, tokens, grid1=LANDSCAPE, grid2=LANDSCAPE, with_points=True)
    assert not tokens.requires_grad
    assert not output.descriptors.requires_grad


# -- half precision -------------------------------------------------------------------------------

# Measured: at the worst pixel a descriptor turns by a cosine of 0.9997 (bfloat16, 24 channels) and
# 0.9998 (float16, 4 channels); points move by 2.5 % and 0.3 % of the farthest one.
HALF_PRECISION = [
    (torch.bfloat16, TINY, "tiny_LP", 1e-3, 0.05),
    (torch.float16, MINI, "mini_LL", 5e-4, 0.008),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shape", "name", "cosine_loss", "error"), HALF_PRECISION)
def test_half_precision_stays_close_and_gives_float32(
    dtype: torch.dtype, shape: NetworkShape, name: str, cosine_loss: float, error: float
) -> None:
    network = formula_network(shape)
    exact = outputs_of(network, name)
    rounded = outputs_of(network.to(dtype), name)
    for output, expected in zip(rounded, exact, strict=True):
        assert output.points3D is not None
        assert output.confidence is not None
        assert expected.points3D is not None
        assert expected.confidence is not None
        for value in (
            output.descriptors,
            output.descriptor_confidence,
            output.points3D,
            output.confidence,
        ):
            assert value.dtype == torch.float32
            assert value.is_contiguous()
        cosines = (output.descriptors * expected.descriptors).sum(dim=-1)
        assert cosines.min() > 1.0 - cosine_loss
        # The norm is taken in float32: unit length does not suffer from the type of the network.
        lengths = torch.linalg.vector_norm(output.descriptors, dim=-1)
        assert (lengths - 1.0).abs().max() < 1e-6
        assert relative_error(output.points3D, expected.points3D) < error
        assert relative_error(output.confidence, expected.confidence) < error
        own, expected_own = output.descriptor_confidence, expected.descriptor_confidence
        assert ((own - expected_own).abs() / expected_own).max() < error


def test_tokens_kept_in_another_type_are_decoded_in_the_networks(mini: Mast3rNetwork) -> None:
    tokens = mini.encode(images())
    grids = {"grid1": LANDSCAPE, "grid2": LANDSCAPE}
    exact, _ = mini.decode(tokens, tokens, **grids, with_points=False)
    kept = tokens.half()
    output, _ = mini.decode(kept, kept, **grids, with_points=False)
    assert output.descriptors.dtype == torch.float32
    assert 0.0 < relative_error(output.descriptors, exact.descriptors) < 0.01


# -- the last step --------------------------------------------------------------------------------


def test_a_point_keeps_its_direction_and_its_distance_is_exponential() -> None:
    raw = torch.zeros((1, 3, 1, 3))
    raw[0, :, 0, 0] = torch.tensor([0.0, 0.0, 2.0])
    raw[0, :, 0, 1] = torch.tensor([3.0, 0.0, -4.0])
    points = heads.points_of(raw)[0, 0]
    near, far = torch.tensor([2.0, 5.0]).expm1().tolist()
    expected = torch.tensor([[0.0, 0.0, near], [0.6 * far, 0.0, -0.8 * far], [0.0, 0.0, 0.0]])
    assert torch.allclose(points, expected, rtol=1e-6)


def test_confidence_stays_in_its_range() -> None:
    raw = torch.tensor([-100.0, 0.0, 1.0, 50.0])
    unbounded = heads.exponential(raw, (1.0, inf))
    assert unbounded[:2].tolist() == [1.0, 2.0]
    assert heads.exponential(raw, (0.5, 2.0)).tolist() == [0.5, 1.5, 2.0, 2.0]


def test_raw_numbers_are_left_as_they_were() -> None:
    raw = torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    before = raw.clone()
    heads.points_of(raw[:, :3])
    heads.exponential(raw[:, 3], (1.0, inf))
    assert torch.equal(raw, before)
    last = raw[:, :3].contiguous(memory_format=torch.channels_last)
    heads.points_of(last)
    assert torch.equal(last, before[:, :3])


def test_descriptors_are_unit_vectors_in_the_order_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn((2, 3, 4, 5, 16, 16), generator=generator)
    patches[0, 0, 0, :, 0, 0] = 0.0
    descriptors = heads.unit_descriptors(patches)
    assert descriptors.shape == (2, 48, 64, 5)
    shuffled = torch.nn.functional.pixel_shuffle(
        patches.permute(0, 3, 4, 5, 1, 2).flatten(1, 3), 16
    )
    expected = torch.nn.functional.normalize(shuffled, dim=1).permute(0, 2, 3, 1)
    assert torch.allclose(descriptors, expected, atol=1e-6)
    assert descriptors[0, 0, 0].tolist() == [0.0] * 5  # nothing is said there: not a NaN


# -- what cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 64), (48, 60), (0, 64)])
def test_images_that_are_not_whole_patches_are_refused(
    mini: Mast3rNetwork, size: tuple[int, int]
) -> None:
    with pytest.raises(InferenceError, match=f"whole 16 px patches, not {size[1]} x {size[0]} px"):
        mini.encode(images(height=size[0], width=size[1]))


def test_tokens_that_do_not_fill_their_grid_are_refused(mini: Mast3rNetwork) -> None:
    tokens = mini.encode(images(batch=2))
    with pytest.raises(InferenceError, match="12 tokens do not fill a grid of 3 x 5"):
        mini.decode(tokens, tokens, grid1=LANDSCAPE, grid2=(3, 5), with_points=False)
    with pytest.raises(InferenceError, match="2 first views cannot be paired with 1"):
        mini.decode(tokens, tokens[:1], grid1=LANDSCAPE, grid2=LANDSCAPE, with_points=False)
