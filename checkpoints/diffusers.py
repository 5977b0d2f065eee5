"""diffusers' folders: a UNet2DModel, alone or in a ConsistencyModelPipeline; out, and in again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import networks
from checkpoints.common import Blocks, State, Weights, data_section, defaults, layer_names, new_state, package, short
from checkpoints.state import CheckpointError
from config import ConfigError

NAMES = {  # our layers -> diffusers'
    **{"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2"},
    **{"map_label": "class_embedding", "map_augment": ""},  # no counterpart: at label zero it does nothing
    **{"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"},
    **{"skip": "conv_shortcut", "norm2": "group_norm", "qkv": "qkv", "proj": "to_out.0"},
    **{"out_norm": "conv_norm_out", "out_conv": "conv_out"},
}
KNOWS = (  # settings of network that are translated, or change nothing in eval mode
    *("name", "precond", "c_noise", "sigma_data", "sigma_min", "sigma_max", "dropout", "label_dropout"),
    *("times", "heads", "guidance_inputs"),
    *("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("scale_shift_norm", "channels_per_head", "norm_groups"),
)
FIXED = {  # settings of UNet2DModel that dhariwal_unet has no other value of
    **{"center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 0, "flip_sin_to_cos": True},
    **{"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "act_fn": "silu", "norm_eps": 1e-5},
    **{"class_embed_type": None, "_class_name": "UNet2DModel"},
}
DEFAULTS = {  # what it takes where its config.json leaves a setting out
    **FIXED,
    **{"sample_size": None, "in_channels": 3, "out_channels": 3, "time_embedding_dim": None, "layers_per_block": 2},
    **{"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "downsample_type": "conv"},
    **{"upsample_type": "conv", "block_out_channels": [224, 448, 672, 896], "dropout": 0.0, "attention_head_dim": 8},
    **{"norm_num_groups": 32, "attn_norm_num_groups": None, "resnet_time_scale_shift": "default"},
    **{"add_attention": True, "num_class_embeds": None},
}


def to_diffusers(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """A folder that diffusers.ConsistencyModelPipeline.from_pretrained loads: one step gives the same images.

    For dhariwal_unet with precond cm and c_noise log250, where diffusers' UNet2DModel has the same network.
    """
    safetensors = package("safetensors.torch", "--to diffusers")
    levels = {key: getattr(model, key) for key in ("sigma_data", "sigma_min", "sigma_max")}
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    for name, content in {
        "model_index.json": {"_class_name": "ConsistencyModelPipeline", **parts},
        "unet/config.json": _unet(model, state),
        "scheduler/scheduler_config.json": {"_class_name": "CMStochasticIterativeScheduler", **levels},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    safetensors.save_file(_weights(model), folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return ["load it with: diffusers.ConsistencyModelPipeline.from_pretrained(folder)"]


def from_diffusers(folder: Path) -> tuple[State, list[str]]:
    """The state of a consistency model in a diffusers folder, the pipeline's or the UNet2DModel's; notes for the user.

    Raises CheckpointError, also where the UNet2DModel has no counterpart here.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" / "scheduler_config.json"
    notes = ["set data.path in the settings: the folder does not say what it was trained on"]
    levels = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}  # the scheduler's own defaults
    if scheduler.exists():
        given = _json(scheduler)
        if given.get("_class_name") != "CMStochasticIterativeScheduler":
            name = short(given.get("_class_name"))
            raise CheckpointError(f"{scheduler}: is a {name}; consistency models have a CMStochasticIterativeScheduler")
        levels = {key: given.get(key, value) for key, value in levels.items()}
    else:
        notes.insert(0, f"assumed, as the folder has no scheduler: a consistency model, {levels}")
    settings = _json(unet / "config.json")
    try:
        shape, network = _network({**DEFAULTS, **settings}, unet / "config.json")
        raw = {"data": data_section(shape), "network": {**network, **levels}, "objective": {"name": "ct"}}
        state = new_state(raw, shape, {}, folder)
        model = networks.build(state["config"]["network"], **shape)
        state["model"] = _renamed(_tensors(unet), model, unet)
    except ConfigError:
        raise
    except Exception as error:  # settings of any type
        raise CheckpointError(f"{unet}: is no UNet2DModel that can be read ({short(error)})") from None
    return {**state, "ema": [state["model"]]}, notes


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or short(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}), as a diffusers folder has it") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no settings")
    return content


def _tensors(unet: Path) -> Weights:
    """The weights beside a config.json; their half-precision form where that is all there is."""
    safetensors = package("safetensors.torch", unet)
    names = [f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")]
    path = next((unet / name for name in names if (unet / name).exists()), None)
    if path is None:
        raise CheckpointError(f"{unet}: has no {names[0]}")
    try:
        return safetensors.load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({short(error)})") from None


def _network(given: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(shape, network section) of a UNet2DModel's settings. CheckpointError where it is another network than ADM's."""
    attentive = [kind == "AttnDownBlock2D" for kind in given["down_block_types"]]
    widths, size, head = given["block_out_channels"], given["sample_size"], given["attention_head_dim"]
    attending = [width for width, a in zip(widths, attentive, strict=True) if a]
    attending += [widths[-1]] if given["add_attention"] else []
    if head is None and len(set(attending)) == 1:  # then it has one head
        head = attending[0]
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    for key in _lacking({**given, "sample_size": size, "attention_head_dim": head}, attentive, attending):
        raise CheckpointError(f"{path}: {key}: {short(given[key])} has no counterpart in this project's networks")
    network = {
        **defaults("dhariwal_unet"),
        "precond": "cm",
        "c_noise": "log250",
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_blocks": given["layers_per_block"],
        "attn_resolutions": [size >> level for level, a in enumerate(attentive) if a],
        "dropout": given["dropout"],
        "scale_shift_norm": given["resnet_time_scale_shift"] == "scale_shift",
        "channels_per_head": head if attending else 2 * max(widths),  # wider than any level: no attention
        "norm_groups": given["norm_num_groups"],
    }
    shape = {"resolution": size, "channels": given["in_channels"], "label_dim": given["num_class_embeds"] or 0}
    return shape | {"augment_dim": 0}, network


def _lacking(given: dict[str, Any], attentive: list[bool], attending: list[int]) -> Iterator[str]:
    """The settings of a UNet2DModel that dhariwal_unet cannot have.

    attentive: whether each level attends; attending: the channels of those that do and of the middle.
    """
    widths, head = given["block_out_channels"], given["attention_head_dim"]
    yield from (key for key, value in FIXED.items() if given[key] != value)
    for side, way, resampled in (("down", attentive, attentive[:-1]), ("up", attentive[::-1], attentive[1:])):
        if given[f"{side}_block_types"] != _block_types(side, way):
            yield f"{side}_block_types"
        if any(resampled) and given[f"{side}sample_type"] != "resnet":
            yield f"{side}sample_type"
    if type(given["sample_size"]) is not int:
        yield "sample_size"
    if given["out_channels"] != given["in_channels"]:
        yield "out_channels"
    if any(width % widths[0] for width in widths):
        yield "block_out_channels"
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        yield "time_embedding_dim"
    if attending and (head is None or any(width % head for width in attending)):
        yield "attention_head_dim"
    if any(attentive) and not given["add_attention"]:
        yield "add_attention"
    if given["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        yield "resnet_time_scale_shift"
    groups = given["norm_num_groups"]
    plain = groups if given["resnet_time_scale_shift"] == "default" else None  # the middle attends without a norm
    if given["add_attention"] and (given["attn_norm_num_groups"] or plain) != groups:
        yield "attn_norm_num_groups"


def _block_types(side: str, attentive: list[bool]) -> list[str]:
    """diffusers' names of the blocks on one side, "down" or "up", of which these attend."""
    return [f"Attn{side.title()}Block2D" if a else f"Resnet{side.title()}sampleBlock2D" for a in attentive]


def _renamed(weights: Weights, model: torch.nn.Module, path: Path) -> Weights:
    """diffusers' weights under our names; q, k and v as one. CheckpointError where one lacks or has no place."""
    own, net = model.state_dict(), model.model
    for name, theirs in layer_names(net, _blocks(net), NAMES).items():
        parts = [theirs.replace(".qkv.", f".to_{letter}.") for letter in ("qkv" if ".qkv." in name else " ")]
        if lacking := [part for part in parts if part not in weights]:
            raise CheckpointError(f"{path}: is of another network than its config.json says: it has no {lacking[0]}")
        values = [weights.pop(part) for part in parts]
        value = values[0].T if name == "model.map_label.weight" else values[0]
        if len(values) > 1:
            heads = net.get_submodule(name.removeprefix("model.").split(".qkv.")[0]).num_heads
            value = torch.stack([part.unflatten(0, (heads, -1)) for part in values], 2).flatten(0, 2)
        own[name] = value.reshape(own[name].shape) if value.numel() == own[name].numel() else value
    if weights:
        known = f"{path}: is of another network than its config.json says"
        raise CheckpointError(f"{known}: {short(min(weights))} has no place")
    return own


def _unet(model: torch.nn.Module, state: State) -> dict[str, Any]:
    """The settings of diffusers' UNet2DModel that make it `model.model`. CheckpointError where there are none."""

    def no(what: str) -> CheckpointError:
        return CheckpointError(f"--to diffusers: no counterpart in diffusers for {what}; try --to safetensors or onnx")

    net = model.model
    if not isinstance(net, networks.DhariwalUNet):
        raise no(f"{type(net).__name__}; it has dhariwal_unet's")
    for key, value in {"precond": "cm", "c_noise": "log250"}.items():
        if getattr(model, key) != value:
            raise no(f"network.{key}: {getattr(model, key)}; it has {value}'s")
    if model.guidance_inputs:
        raise no("network.guidance_inputs: true")
    own = defaults("dhariwal_unet")
    for key, value in state["config"]["network"].items():
        if key not in KNOWS and value != own.get(key):
            raise no(f"network.{key}: {value}")
    blocks = [*net.enc.values(), *net.dec.values()]
    widths = [net.enc[f"{res}x{res}_block0"].conv0.out_channels for res in net.resolutions]
    groups = {m.num_groups for m in net.modules() if isinstance(m, torch.nn.GroupNorm)}
    if len(groups) > 1:
        raise no(f"group norms of {sorted(groups)} groups: it has one number, so take 128 channels or more throughout")
    head = {b.proj.out_channels / b.num_heads for b in blocks if getattr(b, "num_heads", 0)}
    if len(head) > 1 or not float(min(head, default=64)).is_integer():
        raise no(f"attention heads of {sorted(head)} channels: it has one number")
    if net.map_layer0.in_features != widths[0] or net.map_layer0.out_features != 4 * widths[0]:
        raise no("this width of the noise embedding: it follows from channel_mult 1 first and channel_mult_emb 4")
    attentive = [net.enc[f"{res}x{res}_block0"].num_heads > 0 for res in net.resolutions]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": net.img_resolution,
        "in_channels": net.img_channels,
        "out_channels": net.img_channels,
        "block_out_channels": widths,
        "layers_per_block": net.num_blocks,
        "down_block_types": _block_types("down", attentive),
        "up_block_types": _block_types("up", attentive[::-1]),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": int(min(head, default=64)),
        "add_attention": net.dec[f"{net.resolutions[-1]}x{net.resolutions[-1]}_in0"].num_heads > 0,
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups),
        "norm_eps": net.out_norm.eps,
        "resnet_time_scale_shift": "scale_shift" if blocks[1].scale_shift_norm else "default",
        "num_class_embeds": net.label_dim or None,
    }


def _weights(model: torch.nn.Module) -> Weights:
    """Our weights under diffusers' names; q, k and v as three matrices."""
    net, own = model.model, model.state_dict()
    weights = {}
    for name, theirs in layer_names(net, _blocks(net), NAMES).items():
        if name.startswith("model.map_augment."):
            continue
        value = own[name]
        if ".qkv." in name:
            heads = net.get_submodule(name.removeprefix("model.").split(".qkv.")[0]).num_heads
            for i, letter in enumerate("qkv"):
                part = value.unflatten(0, (heads, -1, 3))[:, :, i].flatten(0, 1)
                weights[theirs.replace(".qkv.", f".to_{letter}.")] = part.flatten(1) if value.ndim > 1 else part
        elif name.endswith(".proj.weight"):
            weights[theirs] = value.flatten(1)
        else:
            weights[theirs] = value.T if name == "model.map_label.weight" else value
    return {name: value.contiguous() for name, value in weights.items()}


def _blocks(net: networks.DhariwalUNet) -> Blocks:
    """Our blocks as those of diffusers' UNet2DModel, which numbers them level by level."""
    blocks = {}
    fixed = {"conv": ("conv_in", ""), "in1": ("mid_block.resnets.1", "")}
    fixed["in0"] = ("mid_block.resnets.0", "mid_block.attentions.0")
    for half, side in (("enc", "down"), ("dec", "up")):
        level, i = 0, 0
        for name in getattr(net, half):
            kind = name.split("_")[-1]
            if kind == side:
                theirs = (f"{side}_blocks.{level}.{side}samplers.0", "")
                level, i = level + 1, 0
            elif kind in fixed:
                theirs = fixed[kind]
            else:
                theirs = (f"{side}_blocks.{level}.resnets.{i}", f"{side}_blocks.{level}.attentions.{i}")
                i += 1
            blocks[f"{half}.{name}"] = theirs
    return blocks
