"""Out to other programs: safetensors (and back), ONNX, diffusers."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

import networks
from checkpoints.common import Blocks, State, Weights, defaults, layer_names, new_state, package, short
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
    *("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("scale_shift_norm", "channels_per_head", "norm_groups"),
)


def to_safetensors(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.safetensors: the EMA weights, float32, and in its metadata the config and the data's shape as JSON."""
    safetensors = package("safetensors.torch", "--to safetensors")
    about = {"config": json.dumps(state["config"]), "data": json.dumps(state["data"])}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", about)
    return ["model.safetensors is read back by: python convert.py import"]


def from_safetensors(path: Path) -> State:
    """The state in a safetensors file that `to_safetensors` wrote."""
    safetensors = package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        cfg, data = (json.loads(about[key]) for key in ("config", "data"))
        state = new_state(cfg, data["shape"], weights, path)
        state["data"] |= {"class_counts": data["class_counts"], "scaling": data.get("scaling")}
        return state
    except ConfigError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: was not exported by this project: its metadata has no {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({short(error)})") from None


def to_onnx(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.onnx: D(x, sigma[, class_labels]) for any batch size, float32.

    Weights of 1.5 GiB and more lie beside it in model.onnx.data, since an ONNX file ends at 2 GiB.
    """
    if model.codec.kind == "vectors":
        raise CheckpointError("--to onnx: is for models of images; take --to safetensors for vectors")
    for name in ("onnx", "onnxscript"):
        package(name, "--to onnx")
    size = model.img_resolution
    inputs = {"x": torch.randn(2, model.img_channels, size, size), "sigma": torch.tensor([1.0, 10.0])}
    if model.label_dim:
        inputs["class_labels"] = torch.eye(model.label_dim)[torch.arange(2) % model.label_dim]
    batch = torch.export.Dim("batch")
    axes = {name: {0: batch} for name in inputs}
    large = sum(value.nbytes for value in model.state_dict().values()) >= 1.5 * 2**30
    options = {"input_names": list(inputs), "output_names": ["D"], "dynamic_shapes": axes, "external_data": large}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        torch.onnx.export(model, tuple(inputs.values()), folder / "model.onnx", dynamo=True, verbose=False, **options)
    top = model.sigma_max
    return [f"model.onnx: {', '.join(inputs)} -> D, float32; one step is D({top:g} z, {top:g}), z normal"]


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
        "down_block_types": [f"{'Attn' if a else 'Resnet'}Down{'' if a else 'sample'}Block2D" for a in attentive],
        "up_block_types": [f"{'Attn' if a else 'Resnet'}Up{'' if a else 'sample'}Block2D" for a in attentive[::-1]],
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


EXPORTS = {"diffusers": to_diffusers, "safetensors": to_safetensors, "onnx": to_onnx}
