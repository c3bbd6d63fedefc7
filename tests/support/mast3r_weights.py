"""MASt3R weights by formula, and checkpoints written with them.

The weights are those of ``golden/mast3r/README.md``: every tensor is a function of its name and
shape, so that expected outputs can be kept without keeping weights.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.matchers.mast3r.architecture import Grid, NetworkShape
from adapters.matchers.mast3r.network import Mast3rNetwork
from tests.support import paths

GOLDEN = paths.GOLDEN / "mast3r"

TINY = NetworkShape(
    encoder_dim=64,
    encoder_depth=2,
    encoder_heads=4,
    decoder_dim=48,
    decoder_depth=10,
    decoder_heads=4,
    descriptor_dim=24,
)
MINI = replace(
    TINY,
    encoder_dim=32,
    encoder_heads=2,
    decoder_dim=16,
    decoder_heads=2,
    descriptor_dim=4,
    image_edge_px=64,
    dpt_layer_dims=(6, 8, 10, 12),
    dpt_feature_dim=16,
    dpt_last_dim=8,
)
_ALIAS = re.compile(r"scratch\.layer_rn\.(\d)\.weight$")
_TRANSPOSED = (".act_postprocess.0.1.weight", ".act_postprocess.1.1.weight")


def canonical(name: str) -> str:
    """The one name of a tensor that checkpoints name twice."""
    return _ALIAS.sub(lambda match: f"scratch.layer{int(match[1]) + 1}_rn.weight", name)


def formula_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of that name, float32."""
    random = np.random.RandomState(zlib.crc32(canonical(name).encode()))
    uniform = 2.0 * random.random_sample(shape) - 1.0
    if len(shape) == 1:
        values = 1.0 + 0.2 * uniform if name.endswith(".weight") else 0.1 * uniform
    else:
        fan = shape[0] if name.endswith(_TRANSPOSED) else prod(shape[1:])
        gain = 0.15 if name.endswith(".dpt.head.4.weight") else 1.0
        values = uniform * np.sqrt(3.0 / fan) * gain
    return torch.from_numpy(values.astype(np.float32))


def formula_network(shape: NetworkShape) -> Mast3rNetwork:
    """A network of that shape with weights by formula, ready to use."""
    with torch.device("meta"):
        network = Mast3rNetwork(shape)
    made: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if canonical(name) not in made:
            made[canonical(name)] = formula_tensor(name, tuple(tensor.shape))
    state = {name: made[canonical(name)] for name in network.state_dict()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def golden(name: str) -> dict[str, Any]:
    """One golden file: arrays as tensors by name."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def unpacked_mini_checkpoint(folder: Path) -> Path:
    """The small checkpoint with the layout of the public ones."""
    path = folder / "mini.pth"
    path.write_bytes(gzip.decompress((GOLDEN / "mini_ckpt.pth.gz").read_bytes()))
    return path


def read_torch_file(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        contents: dict[str, Any] = torch.load(path, weights_only=True)
    return contents


def constructor_arguments(shape: NetworkShape) -> dict[str, Any]:
    """What a Hugging Face folder's ``config.json`` says of a network."""
    return {
        "pos_embed": "RoPE100",
        "patch_embed_cls": "PatchEmbedDust3R",
        "img_size": [shape.image_edge_px, shape.image_edge_px],
        "head_type": "catmlp+dpt",
        "output_mode": f"pts3d+desc{shape.descriptor_dim}",
        "depth_mode": ["exp", -inf, inf],
        "conf_mode": ["exp", 1, inf],
        "enc_embed_dim": shape.encoder_dim,
        "enc_depth": shape.encoder_depth,
        "enc_num_heads": shape.encoder_heads,
        "dec_embed_dim": shape.decoder_dim,
        "dec_depth": shape.decoder_depth,
        "dec_num_heads": shape.decoder_heads,
        "two_confs": shape.two_confs,
        "desc_conf_mode": ["exp", 0, inf],
        "landscape_only": False,
    }


_SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors_bytes(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A file in the format of https://github.com/huggingface/safetensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    parts = []
    end = 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def write_hugging_face_folder(
    folder: Path, tensors: Mapping[str, Tensor], *, shape: NetworkShape
) -> Path:
    """Writes what the hub's mixin writes: tensors with two names under the second one alone."""
    folder.mkdir(parents=True, exist_ok=True)
    aliases = {name: canonical(name) for name in tensors if name != canonical(name)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    metadata = {"format": "pt", **aliases}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(kept, metadata=metadata))
    (folder / "config.json").write_text(json.dumps(constructor_arguments(shape)))
    return folder


def golden_grids(case: Mapping[str, Tensor]) -> tuple[Grid, Grid]:
    """Rows and columns of tokens of the two views of a golden file."""
    (rows1, columns1), (rows2, columns2) = (
        (case[f"true_shape{view}"][0] // 16).tolist() for view in (1, 2)
    )
    return (rows1, columns1), (rows2, columns2)


def intermediate_values(network: Mast3rNetwork, case: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a golden file may hold of a pair, by its names there."""
    grids = golden_grids(case)
    tokens = [network.encode(case[f"img{view}"]) for view in (1, 2)]
    layers = network.decoder_features(
        *tokens,
        grid1=grids[0],
        grid2=grids[1],
        wanted=range(network.shape.decoder_depth + 1),
    )
    outputs = network.decode(*tokens, grid1=grids[0], grid2=grids[1], with_points=True)
    values: dict[str, Tensor] = {}
    for k, head in enumerate((network.downstream_head1, network.downstream_head2)):
        output = outputs[k]
        assert output.points3D is not None
        assert output.confidence is not None
        values |= {f"dec{k + 1}_{number}": layer for number, layer in layers[k].items()}
        values |= {
            f"enc{k + 1}": tokens[k],
            f"dpt_raw{k + 1}": head.dpt(
                [layers[k][hook] for hook in network.shape.hooks], grids[k]
            ),
            f"pts3d{k + 1}": output.points3D,
            f"conf{k + 1}": output.confidence,
            f"desc{k + 1}": output.descriptors,
            f"desc_conf{k + 1}": output.descriptor_confidence,
        }
    return values


def assert_reproduces(network: Mast3rNetwork, name: str) -> None:
    """Compares every output and intermediate value of a golden file with the network's."""
    case = golden(name)
    values = intermediate_values(network, case)
    compared = 0
    for key, expected in case.items():
        match = re.fullmatch(r"(enc|dec|dpt_raw|pts3d|conf|desc|desc_conf)(\d)(_\d+)?(_s\d+)?", key)
        if match is None:
            continue
        step = int((match[4] or "_s1")[2:])
        value = values["".join(part or "" for part in match.groups()[:3])][:, ::step, ::step]
        tolerance = 1e-4 if match[1] == "pts3d" else 2e-5
        assert value.shape == expected.shape, key
        error = (value - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{key}: {error}"
        compared += 1
    # Images, shapes and positions are not outputs.
    assert compared == len(case) - 6
