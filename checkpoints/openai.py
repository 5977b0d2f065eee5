"""OpenAI's consistency models and the diffusion models that taught them (2303.01469), as their .pt files hold them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import networks
from checkpoints import common
from checkpoints.common import Blocks, State, Weights, short
from checkpoints.state import CheckpointError
from config import ConfigError

# What weights do not tell, in the released models; precond is "edm" for the diffusion models among them, the teachers.
TOLD = {"image_size": None, "num_head_channels": 64, "dropout": 0.0, "precond": "cm"}
ATTENTION, DEEPEST = 32, 8  # pixels where they begin to attend, at every image_size, and of their last level
NAMES = {
    **{"map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "map_label": "label_emb"},
    **{"norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "norm1": "out_layers.0"},
    **{"conv1": "out_layers.3", "skip": "skip_connection", "norm2": "norm", "qkv": "qkv", "proj": "proj_out"},
    **{"out_norm": "out.0", "out_conv": "out.2"},
}


def read(path: Path, arch: str | Path | None = None) -> tuple[State, list[str]]:
    """The network in one of OpenAI's consistency-model .pt files (2303.01469), as a state, and notes for the user.

    arch: a JSON file with the arguments of OpenAI's UNet; what the weights tell too must agree with them.
    """
    weights = _weights(path)
    told = _arch(arch)
    try:
        shape, network = _network(weights, {**TOLD, **told}, path)
        objective = {"name": "ct" if network["precond"] == "cm" else "edm"}
        raw = {"data": common.data_section(shape), "network": network, "objective": objective}
        state = common.new_state(raw, shape, {}, path)
        model = networks.build(state["config"]["network"], **shape)
        state["model"] = _renamed(weights, model, path)
        state["ema"] = [state["model"]]
    except ConfigError:
        raise
    except KeyError as error:
        missing = short(error.args[0])
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's: it has no {missing}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's ({short(error)})") from None
    used = {**TOLD, "image_size": shape["resolution"], **told}
    assumed = ", ".join(f"{key} {used[key]}" for key in TOLD if key not in told)
    notes = [f"assumed, as in OpenAI's models: {assumed}; give --arch for others"] if assumed else []
    return state, [*notes, "set data.path in the settings: the file does not say what it was trained on"]


def _weights(path: Path) -> Weights:
    try:
        weights = common.read_tensors(path, path)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole .pt file ({short(error)})") from None
    if isinstance(weights, dict) and "format" in weights:
        raise CheckpointError(f"{path}: is a checkpoint of this project already")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's: it is not a dict of weights")
    return dict(weights)


def _arch(arch: str | Path | None) -> dict[str, Any]:
    """What the weights do not tell, as far as the JSON file says it."""
    if arch is None:
        return {}
    try:
        told = json.loads(Path(arch).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--arch: {arch} cannot be read as JSON: {short(error)}") from None
    if not isinstance(told, dict):
        raise CheckpointError(f"--arch: {arch} holds no JSON object with the arguments of OpenAI's UNet")
    return told


def _image_size(factors: list[int], levels: int, path: Path) -> int:
    """The pixels of a released model: they attend from 32 pixels down, and large ones have their last level at 8."""
    size = ATTENTION * min(factors, default=0)
    if size == 0 or (levels > 4 and size >> (levels - 1) != DEEPEST):
        attention = f"attention at 1/{', 1/'.join(map(str, factors))}" if factors else "no attention"
        seen = f"{levels} levels, {attention}"
        raise CheckpointError(f"{path}: its weights ({seen}) do not tell its image_size; give it in --arch FILE.json")
    return size


def _network(weights: Weights, told: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(shape, network section) of OpenAI's UNet, from its weights and from what they do not tell."""
    if any(re.search(r"\.(conv|op)\.weight$", name) for name in weights):
        raise CheckpointError(f"{path}: resamples by plain convolutions; only resblock_updown is supported")
    blocks = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    ups = (f"output_blocks.{i}.{k}.in_layers.2.weight" in weights for i in range(blocks) for k in (1, 2))
    levels = sum(ups) + 1  # every level but the last ends in a residual block that doubles the resolution
    per_level = blocks // levels
    starts = [level * per_level for level in reversed(range(levels))]  # a level's first decoder block, highest first
    widths = [weights[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in starts]
    model_channels = weights["time_embed.0.weight"].shape[1]
    attention = (2**i for i, k in enumerate(starts) if f"output_blocks.{k}.1.qkv.weight" in weights)
    found: dict[str, Any] = {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "model_channels": model_channels,
        "out_channels": weights["out.2.weight"].shape[0],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": sorted(attention, key=str),
        "channel_mult": [width // model_channels for width in widths],
        "num_classes": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        "use_scale_shift_norm": weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1],
        "resblock_updown": True,
    }
    for key, value in told.items():
        if key not in found and key not in TOLD:
            raise CheckpointError(f"--arch: {short(key)}: is not known; known: {', '.join([*TOLD, *found])}")
        if key == "attention_resolutions" and isinstance(value, list):
            value = sorted(value, key=str)  # a set
        if key in found and value != found[key]:
            raise CheckpointError(f"--arch: {key}: is {short(value)} there and {found[key]} in {path}")
    size, heads = told["image_size"], told["num_head_channels"]
    if size is None:
        size = _image_size(sorted(found["attention_resolutions"]), levels, path)
    if type(size) is not int or type(heads) is not int or size < 1 or heads < 1:
        raise CheckpointError(f"--arch: image_size and num_head_channels must be whole numbers, found {size}, {heads}")
    if told["precond"] not in ("cm", "edm"):
        raise CheckpointError(f"--arch: precond: is cm (consistency) or edm (diffusion), found {told['precond']!r}")
    attentive = [widths[-1], *(widths[i.bit_length() - 1] for i in found["attention_resolutions"])]
    if any(width % heads for width in attentive):
        raise CheckpointError(f"--arch: num_head_channels: {heads} does not divide all of the widths {attentive}")
    network = {
        **common.defaults("dhariwal_unet"),
        "precond": told["precond"],
        "c_noise": "log250",
        "model_channels": model_channels,
        "channel_mult": found["channel_mult"],
        "num_blocks": found["num_res_blocks"],
        "attn_resolutions": [size // factor for factor in found["attention_resolutions"]],
        "dropout": told["dropout"],
        "scale_shift_norm": found["use_scale_shift_norm"],
    }
    if any(width // 64 != width // heads for width in attentive):
        network["channels_per_head"] = heads
    if min(widths) < 128:  # OpenAI always has 32 groups, EDM fewer where there are few channels
        network["norm_groups"] = 32
    shape = {"resolution": size, "channels": found["in_channels"], "label_dim": found["num_classes"] or 0}
    return shape | {"augment_dim": 0}, network


def _renamed(weights: Weights, model: torch.nn.Module, path: Path) -> Weights:
    """OpenAI's weights under our names and in our order of channels."""
    own = model.state_dict()
    for name, theirs in common.layer_names(model.model, _blocks(model.model), NAMES).items():
        value = weights.pop(theirs)
        if ".qkv." in name:  # theirs: three, heads, channels; ours: heads, channels, three
            heads = model.model.get_submodule(name.removeprefix("model.").split(".qkv.")[0]).num_heads
            value = value.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)
        own[name] = value.T if name == "model.map_label.weight" else value
    if weights:
        raise CheckpointError(f"{path}: is of another network than OpenAI's: {short(min(weights))} has no place")
    return own


def _blocks(net: networks.DhariwalUNet) -> Blocks:
    """Our blocks as those of OpenAI's UNet, which numbers them in the order of use."""
    blocks = {f"enc.{name}": (f"input_blocks.{i}.0", f"input_blocks.{i}.1") for i, name in enumerate(net.enc)}
    i, attentive = -1, False
    for name, block in net.dec.items():
        if name.endswith("_in0"):
            theirs = ("middle_block.0", "middle_block.1")
        elif name.endswith("_in1"):
            theirs = ("middle_block.2", "")
        elif name.endswith("_up"):
            theirs = (f"output_blocks.{i}.{1 + attentive}", "")
        else:
            i, attentive = i + 1, block.num_heads > 0
            theirs = (f"output_blocks.{i}.0", f"output_blocks.{i}.1")
        blocks[f"dec.{name}"] = theirs
    return blocks
