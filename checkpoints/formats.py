"""Other people's checkpoints: EDM's pickles and OpenAI's consistency models in; diffusers, safetensors and ONNX out.

Nothing here runs code from a file. An EDM pickle is read by an unpickler that knows a short list of names, and builds
tensors, plain containers and inert records; OpenAI's files are read with weights_only=True.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoints
import config
import networks
from checkpoints.state import CheckpointError

Weights = dict[str, Tensor]
State = dict[str, Any]

LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch.save's files began before they were zips
NO_PATH = "path/to/the/images"  # data.path where a file does not say what it was trained on


# Import ---------------------------------------------------------------------------------------------------------------


def import_checkpoint(source: str | Path, target: str | Path, arch: str | Path | None = None) -> list[str]:
    """Write the network in `source` as a checkpoint of ours, `target`, and its settings beside it, `target`.yml.

    source: an EDM pickle, an OpenAI .pt file (`arch`: a JSON file with what its weights do not tell), or a safetensors
    file of ours. Both files must be new. Returns lines for the user. Raises CheckpointError.
    """
    source, target = Path(source), Path(target)
    settings = Path(f"{target}.yml")
    for path in (target, settings):
        if path.exists():
            raise CheckpointError(f"{path}: is there already, and nothing is written over; name another file")
    state, notes = read(source, arch)
    state = _checked(state, source)
    cfg = checkpoints.config_of(state, source)
    checkpoints.write_state(target, state)
    checkpoints.write_atomically(settings, lambda file: file.write(config.dump(cfg).encode()))
    return [*notes, f"written: {target}", f"written: {settings} (its settings, for generate.py --cfg)"]


def read(path: Path, arch: str | Path | None = None) -> tuple[State, list[str]]:
    """The state in a file of another format, by what its first bytes say, and notes for the user."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_TORCH))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if head.startswith(b"PK") or head == LEGACY_TORCH:
        return read_openai(path, arch)
    if arch is not None:
        raise CheckpointError(f"--arch: is for OpenAI's .pt files; {path} says its own settings")
    if head[8:9] == b"{":
        return read_safetensors(path), []
    if head.startswith(b"\x80"):
        return read_edm(path)
    raise CheckpointError(f"{path}: is none of EDM's pickles, OpenAI's .pt files and safetensors files")


def _state(
    raw: dict[str, Any], shape: dict[str, Any], class_counts: list[int] | None, weights: Weights, path: Path
) -> State:
    """A checkpoint's state at step 0 (see trainer.Trainer.state) from raw settings, checked, and weights, not yet."""
    raw = {"run": {"name": re.sub(r"[^\w.-]", "-", path.stem) or "imported"}, **raw}
    cfg = config.parse(raw, lambda key: f"{path} (its settings)")
    sizes = [size for value in shape.values() for size in (value if isinstance(value, list) else [value])]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(f"{path}: its sizes are no whole numbers: {_short(shape)}")
    return {
        "step": 0,
        "config": cfg.model_dump(),
        "data": {"shape": shape, "class_counts": class_counts, "scaling": None},
        "model": weights,
        "ema": [weights],
        "objective": {},
        "optimizer": {},
        "scaler": {},
    }


def _checked(state: State, path: Path) -> State:
    """The state with the weights as our network has them: complete, of the right shapes, float32."""
    try:
        weights = checkpoints.model_from(state, path).state_dict()
    except config.ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: its network cannot be built: {_short(error)}") from None
    return {**state, "model": weights, "ema": [weights]}


def _equal_counts(label_dim: int) -> list[int] | None:
    """class_counts where the training images are not here to be counted: every class is drawn equally often."""
    return [1] * label_dim or None


def _data_section(cfg_path: str, resolution: Any, channels: Any, label_dim: Any) -> dict[str, Any]:
    return {
        "name": "zip" if cfg_path.endswith(".zip") else "folder",
        "path": cfg_path,
        "resolution": resolution,
        "channels": channels if channels in (1, 3) else None,
        "conditional": bool(label_dim),
    }


# EDM's pickles --------------------------------------------------------------------------------------------------------


class Record:
    """An object of a pickle as data: its class's name and its attributes. Nothing in it can run."""

    name = ""
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads an EDM pickle into tensors, plain containers and records. Any name outside `_known` is refused."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path
        self.known = _known(path)  # its own functions and classes: a pickle may set attributes on what it can name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise _refused(self.path, f"{module}.{name}")
        return self.known[module, name]


def _refused(path: Path, name: str) -> CheckpointError:
    name = ascii(name)[1:-1]  # whatever it holds, it is one line without control characters
    return CheckpointError(f"{path}: refused: it asks for {name[:100]}, which is not data; nothing in it was run")


def _known(path: Path) -> dict[tuple[str, str], Callable | type]:
    """What the names in a published EDM pickle stand for here."""

    def persistent(meta: dict[str, Any]) -> Record:  # an object of EDM's; its class's source text is left unread
        record = Record()
        record.name, record.state = str(meta["class_name"]), meta["state"]
        return record

    def storage(data: bytes) -> Tensor:  # 1-D; torch.save's bytes within the pickle
        try:
            typed = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _unpicklable(path, error) from None
        return torch.empty(0, dtype=typed.dtype).set_(typed._untyped_storage)

    def tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *flags: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)  # checks its bounds

    def parameter(data: Tensor, *flags: Any) -> Tensor:
        return data

    def dtype(name: str, *flags: Any) -> Record:
        record = Record()
        record.name = str(name)
        return record

    def scalar(dtype: Record, data: bytes) -> Any:
        if not re.fullmatch("[biuf][1248]", dtype.name):
            raise CheckpointError(f"{path}: a number in it is of type {_short(dtype.name)}, which is not supported")
        order = dtype.state[1] if dtype.state and dtype.state[1] in "<>" else "<"
        return np.frombuffer(data, order + dtype.name)[0].item()

    def inert(name: str) -> type:
        return type(name, (Record,), {"name": name})

    known: dict[tuple[str, str], Callable | type] = {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): dict,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("numpy", "dtype"): dtype,
    }
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[core, "scalar"] = scalar
    for name in ("ModuleDict", "ModuleList", "Sequential"):
        known["torch.nn.modules.container", name] = inert(name)
    return known


def _unpicklable(path: Path, error: Exception) -> CheckpointError:
    """What torch.load's weights_only reader said, in one line."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return _refused(path, name[1]) if name else CheckpointError(f"{path}: cannot be read: {_short(error)}")


def read_edm(path: Path) -> tuple[State, list[str]]:
    """The EMA network in one of EDM's network-snapshot-*.pkl (2206.00364), as a state, and notes for the user."""
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, path).load()
        state = _from_edm(content, path)
    except config.ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole EDM pickle ({type(error).__name__}: {_short(error)})") from None
    note = f"set data.path in the settings: they say {state['config']['data']['path']}, where EDM read its images"
    return state, [note]


EDM_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")
EDM_NETWORKS = {"SongUNet": "song_unet", "DhariwalUNet": "dhariwal_unet"}


def _from_edm(content: Any, path: Path) -> State:
    ema = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(ema, Record):
        raise CheckpointError(f"{path}: holds no network named 'ema', as EDM's network-snapshot-*.pkl do")
    if ema.name != "EDMPrecond":
        raise CheckpointError(f"{path}: its network is of class {_short(ema.name)}; only EDMPrecond is supported")
    given = {**dict(zip(EDM_ARGUMENTS, ema.state["_init_args"], strict=False)), **ema.state["_init_kwargs"]}
    resolution, channels, label_dim = given.pop("img_resolution"), given.pop("img_channels"), given.pop("label_dim", 0)
    low, high = given.pop("sigma_min", 0), given.pop("sigma_max", math.inf)
    kind, augment_dim = given.pop("model_type", "DhariwalUNet"), given.pop("augment_dim", 0)
    given.pop("use_fp16", None)
    if kind not in EDM_NETWORKS:
        raise CheckpointError(f"{path}: its network is of class {_short(kind)}; supported: {', '.join(EDM_NETWORKS)}")
    defaults = _defaults(EDM_NETWORKS[kind])
    for key in given:
        if key not in defaults and key != "sigma_data":
            raise CheckpointError(f"{path}: its {kind} has a setting {_short(key)}, which this project lacks")
    network = {
        **defaults,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        "precond": "edm",
        "c_noise": "log",
        "sigma_min": low or 0.002,  # EDM's samplers start and end at these where the network has no limits
        "sigma_max": 80.0 if high == math.inf else high,
    }
    images, pipe = content.get("dataset_kwargs") or {}, content.get("augment_pipe")
    augment = float(pipe.state["_init_kwargs"].get("p", 1)) if isinstance(pipe, Record) else 0.0
    data = _data_section(str(images.get("path") or NO_PATH), resolution, channels, label_dim)
    data |= {"augment": augment, "flip": bool(images.get("xflip")) and not augment}
    shape = {"resolution": resolution, "channels": channels, "label_dim": label_dim, "augment_dim": augment_dim}
    raw = {"data": data, "network": network, "objective": {"name": "edm"}}
    return _state(raw, shape, _equal_counts(label_dim), _edm_weights(ema), path)


def _defaults(name: str) -> dict[str, Any]:
    """The constructor defaults of a network of ours, which are EDM's."""
    parameters = inspect.signature(networks.NETWORKS[name]).parameters.values()
    given = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
    sizes = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
    return {"name": name, **{key: value for key, value in given.items() if key not in sizes}}


def _edm_weights(module: Record, prefix: str = "") -> Weights:
    """Parameters and buffers of a recorded module and those below it, by the names of torch's state_dict."""
    own = {**module.state["_parameters"], **module.state["_buffers"]}
    weights = {prefix + name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name, child in module.state["_modules"].items():
        if isinstance(child, Record):
            weights |= _edm_weights(child, f"{prefix}{name}.")
    return weights


# OpenAI's consistency models ------------------------------------------------------------------------------------------

# What weights do not tell, in the released models; precond is "edm" for the diffusion models among them, the teachers.
TOLD = {"image_size": 64, "num_head_channels": 64, "dropout": 0.0, "precond": "cm"}
OPENAI_PARTS = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
OPENAI_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
OPENAI_LAYERS = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


def read_openai(path: Path, arch: str | Path | None = None) -> tuple[State, list[str]]:
    """The network in one of OpenAI's consistency-model .pt files (2303.01469), as a state, and notes for the user.

    arch: a JSON file with the arguments of OpenAI's UNet; what the weights tell too must agree with them.
    """
    weights = _openai_weights(path)
    told, notes = _arch(arch)
    try:
        state = _from_openai(weights, told, path)
    except config.ConfigError:
        raise
    except KeyError as error:
        missing = _short(error.args[0])
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's: it has no {missing}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's ({_short(error)})") from None
    return state, [*notes, "set data.path in the settings: the file does not say what it was trained on"]


def _from_openai(weights: Weights, told: dict[str, Any], path: Path) -> State:
    shape, network = _openai_network(weights, told, path)
    data = _data_section(NO_PATH, shape["resolution"], shape["channels"], shape["label_dim"])
    objective = {"name": "ct" if network["precond"] == "cm" else "edm"}
    raw = {"data": data, "network": network, "objective": objective}
    state = _state(raw, shape, _equal_counts(shape["label_dim"]), {}, path)
    model = networks.build(checkpoints.config_of(state, path).network, **shape)
    renamed = _openai_renamed(weights, model, path)
    return {**state, "model": renamed, "ema": [renamed]}


def _openai_weights(path: Path) -> Weights:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpicklable(path, error) from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole .pt file ({_short(error)})") from None
    if isinstance(weights, dict) and "format" in weights:
        raise CheckpointError(f"{path}: is a checkpoint of this project already")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path}: is no consistency model of OpenAI's: it is not a dict of weights")
    return dict(weights)


def _arch(arch: str | Path | None) -> tuple[dict[str, Any], list[str]]:
    """What the weights do not tell, from the JSON file or as in the released models, and notes for the user."""
    told = {}
    if arch is not None:
        try:
            told = json.loads(Path(arch).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--arch: {arch} cannot be read as JSON: {_short(error)}") from None
        if not isinstance(told, dict):
            raise CheckpointError(f"--arch: {arch} holds no JSON object with the arguments of OpenAI's UNet")
    assumed = ", ".join(f"{key} {value}" for key, value in TOLD.items() if key not in told)
    note = f"assumed, as in OpenAI's ImageNet-64 models: {assumed}; give --arch for others"
    return {**TOLD, **told}, [note] if assumed else []


def _openai_network(weights: Weights, told: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(shape, network section) of OpenAI's UNet, from its weights and from what they do not tell."""
    if any(re.search(r"\.(conv|op)\.weight$", name) for name in weights):
        raise CheckpointError(f"{path}: resamples by plain convolutions; only resblock_updown is supported")
    blocks = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    ups = [i for i in range(blocks) if _up_of(weights, i)]
    levels = len(ups) + 1  # every level but the last ends in a block that doubles the resolution
    per_level = blocks // levels
    starts = [level * per_level for level in reversed(range(levels))]  # a level's first decoder block, highest first
    widths = [weights[f"output_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in starts]
    model_channels = weights["time_embed.0.weight"].shape[1]
    found: dict[str, Any] = {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "model_channels": model_channels,
        "out_channels": weights["out.2.weight"].shape[0],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": sorted(
            (2**i for i, k in enumerate(starts) if f"output_blocks.{k}.1.qkv.weight" in weights), key=str
        ),
        "channel_mult": [width // model_channels for width in widths],
        "num_classes": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
        "use_scale_shift_norm": weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1],
        "resblock_updown": True,
    }
    for key, value in told.items():
        if key not in found and key not in TOLD:
            raise CheckpointError(f"--arch: {_short(key)}: is not known; known: {', '.join([*TOLD, *found])}")
        if key == "attention_resolutions" and isinstance(value, list):
            value = sorted(value, key=str)  # a set
        if key in found and value != found[key]:
            raise CheckpointError(f"--arch: {key}: is {_short(value)} there and {found[key]} in {path}")
    size, heads = told["image_size"], told["num_head_channels"]
    if type(size) is not int or type(heads) is not int or size < 1 or heads < 1:
        raise CheckpointError(f"--arch: image_size and num_head_channels must be whole numbers, found {size}, {heads}")
    if told["precond"] not in ("cm", "edm"):
        raise CheckpointError(f"--arch: precond: is cm (consistency) or edm (diffusion), found {told['precond']!r}")
    attentive = [widths[-1], *(widths[i.bit_length() - 1] for i in found["attention_resolutions"])]
    if any(width % heads for width in attentive):
        raise CheckpointError(f"--arch: num_head_channels: {heads} does not divide all of the widths {attentive}")
    network = {
        **_defaults("dhariwal_unet"),
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


def _up_of(weights: Weights, i: int) -> bool:
    """Whether decoder block i ends in a residual block that doubles the resolution."""
    return any(f"output_blocks.{i}.{k}.in_layers.2.weight" in weights for k in (1, 2))


def _openai_renamed(weights: Weights, model: torch.nn.Module, path: Path) -> Weights:
    """OpenAI's weights under our names and in our order of channels."""
    own = model.state_dict()
    names = _names(model.model, _openai_blocks(model.model), OPENAI_PARTS, OPENAI_ATTENTION, OPENAI_LAYERS)
    for name, theirs in names.items():
        value = weights.pop(theirs)
        if ".qkv." in name:  # theirs: three, heads, channels; ours: heads, channels, three
            heads = model.model.get_submodule(name.removeprefix("model.").split(".qkv.")[0]).num_heads
            value = value.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)
        own[name] = value.T if name == "model.map_label.weight" else value
    if weights:
        raise CheckpointError(f"{path}: is of another network than OpenAI's: {_short(min(weights))} has no place")
    return own


def _openai_blocks(net: networks.DhariwalUNet) -> dict[str, tuple[str, str]]:
    """Our blocks -> (residual block, attention) of OpenAI's UNet, which numbers them in the order of use."""
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


def _names(
    net: networks.DhariwalUNet,
    blocks: dict[str, tuple[str, str]],  # our block -> (their residual block, their attention)
    parts: dict[str, str],  # within a residual block
    attention: dict[str, str],  # within an attention block
    layers: dict[str, str],  # outside of blocks
) -> dict[str, str]:
    """Our parameters' names -> theirs. Filters are constants and have no name there."""
    names = {}
    for name, _ in net.named_parameters():
        layer, leaf = name.rsplit(".", 1)
        block, _, part = layer.rpartition(".")
        if layer in layers:
            theirs = layers[layer]
        elif layer in blocks:  # the first convolution
            theirs = blocks[layer][0]
        elif part in parts:
            theirs = f"{blocks[block][0]}.{parts[part]}"
        else:
            theirs = f"{blocks[block][1]}.{attention[part]}"
        names[f"model.{name}"] = f"{theirs}.{leaf}"
    return names


# Safetensors, both ways -----------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> State:
    """The state in a safetensors file that export_safetensors wrote."""
    safetensors = _package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        cfg, data = (json.loads(about[key]) for key in ("config", "data"))
        state = _state(cfg, data["shape"], data["class_counts"], weights, path)
        return {**state, "data": {**state["data"], "scaling": data.get("scaling")}}  # of vectors
    except config.ConfigError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: was not exported by this project: its metadata has no {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({_short(error)})") from None


def export_safetensors(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.safetensors: the EMA weights, float32, and in its metadata the config and the data's shape as JSON."""
    safetensors = _package("safetensors.torch", "--to safetensors")
    about = {"config": json.dumps(state["config"]), "data": json.dumps(state["data"])}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", about)
    return ["model.safetensors is read back by: python checkpoint.py import"]


# Export ---------------------------------------------------------------------------------------------------------------


def export_checkpoint(source: str | Path, folder: str | Path, to: str) -> list[str]:
    """Write a checkpoint's first EMA as `to` (a key of EXPORTS) into a new `folder`, whole or not at all.

    Returns lines for the user. Raises CheckpointError.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already, and nothing is written over; name another folder")
    state = checkpoints.load(source)
    model = checkpoints.model_from(state, source)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        notes = EXPORTS[to](model, state, part)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return [*notes, f"written: {folder}"]


DIFFUSERS_PARTS = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
DIFFUSERS_ATTENTION = {"norm2": "group_norm", "qkv": "qkv", "proj": "to_out.0"}
DIFFUSERS_LAYERS = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "map_label": "class_embedding",
    "map_augment": "",  # no counterpart; without augmentation labels it does nothing
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
DIFFUSERS_KNOWS = (  # settings of network that are translated, or change nothing in eval mode
    *("name", "precond", "c_noise", "sigma_data", "sigma_min", "sigma_max", "dropout", "label_dropout"),
    *("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions"),
    *("scale_shift_norm", "channels_per_head", "norm_groups"),
)


def export_diffusers(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """A folder that diffusers.ConsistencyModelPipeline.from_pretrained loads: one step gives the same images.

    For dhariwal_unet with precond cm and c_noise log250, where diffusers' UNet2DModel has the same network.
    """
    safetensors = _package("safetensors.torch", "--to diffusers")
    unet = _diffusers_unet(model, state)
    scheduler = {
        "_class_name": "CMStochasticIterativeScheduler",
        "sigma_data": model.sigma_data,
        "sigma_min": model.sigma_min,
        "sigma_max": model.sigma_max,
    }
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "CMStochasticIterativeScheduler"]}
    for name, content in {
        "model_index.json": {"_class_name": "ConsistencyModelPipeline", **parts},
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": scheduler,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    weights = _diffusers_weights(model)
    safetensors.save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    return ["load it with: diffusers.ConsistencyModelPipeline.from_pretrained(folder)"]


def _diffusers_unet(model: torch.nn.Module, state: State) -> dict[str, Any]:
    """The settings of diffusers' UNet2DModel that make it `model.model`. CheckpointError where there are none."""

    def no(what: str) -> CheckpointError:
        return CheckpointError(f"--to diffusers: no counterpart in diffusers for {what}; try --to safetensors or onnx")

    net = model.model
    if not isinstance(net, networks.DhariwalUNet):
        raise no(f"{type(net).__name__}; it has dhariwal_unet's")
    for key, value in {"precond": "cm", "c_noise": "log250"}.items():
        if getattr(model, key) != value:
            raise no(f"network.{key}: {getattr(model, key)}; it has {value}'s")
    defaults = _defaults("dhariwal_unet")
    for key, value in state["config"]["network"].items():
        if key not in DIFFUSERS_KNOWS and value != defaults.get(key):
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


def _diffusers_weights(model: torch.nn.Module) -> Weights:
    """Our weights under diffusers' names; q, k and v as three matrices."""
    net, own = model.model, model.state_dict()
    names = _names(net, _diffusers_blocks(net), DIFFUSERS_PARTS, DIFFUSERS_ATTENTION, DIFFUSERS_LAYERS)
    weights = {}
    for name, theirs in names.items():
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


def _diffusers_blocks(net: networks.DhariwalUNet) -> dict[str, tuple[str, str]]:
    """Our blocks -> (residual block, attention) of diffusers' UNet2DModel, which numbers them level by level."""
    blocks = {}
    for half, side, resampler in (("enc", "down", "downsamplers"), ("dec", "up", "upsamplers")):
        level, i = 0, 0
        for name in getattr(net, half):
            if name.endswith("_conv"):
                theirs = ("conv_in", "")
            elif name.endswith("_in0"):
                theirs = ("mid_block.resnets.0", "mid_block.attentions.0")
            elif name.endswith("_in1"):
                theirs = ("mid_block.resnets.1", "")
            elif name.endswith(("_down", "_up")):
                theirs = (f"{side}_blocks.{level}.{resampler}.0", "")
                level, i = level + 1, 0
            else:
                theirs = (f"{side}_blocks.{level}.resnets.{i}", f"{side}_blocks.{level}.attentions.{i}")
                i += 1
            blocks[f"{half}.{name}"] = theirs
    return blocks


def export_onnx(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.onnx: D(x, sigma[, class_labels]) for any batch size, float32.

    Weights of 1.5 GiB and more lie beside it in model.onnx.data, since an ONNX file ends at 2 GiB.
    """
    if model.scaling is not None:
        raise CheckpointError("--to onnx: is for models of images; take --to safetensors for vectors")
    for package in ("onnx", "onnxscript"):
        _package(package, "--to onnx")
    size = model.img_resolution
    inputs = [torch.randn(2, model.img_channels, size, size), torch.tensor([1.0, 10.0])]
    names = ["x", "sigma"]
    if model.label_dim:
        inputs.append(torch.eye(model.label_dim)[torch.arange(2) % model.label_dim])
        names.append("class_labels")
    batch = torch.export.Dim("batch")
    large = sum(value.nbytes for value in model.state_dict().values()) >= 1.5 * 2**30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        torch.onnx.export(
            model,
            tuple(inputs),
            folder / "model.onnx",
            input_names=names,
            output_names=["D"],
            dynamic_shapes={name: {0: batch} for name in names},
            dynamo=True,
            external_data=large,
            verbose=False,
        )
    top = model.sigma_max
    return [f"model.onnx: {', '.join(names)} -> D, float32; one step is D({top:g} z, {top:g}), z normal"]


EXPORTS = {"diffusers": export_diffusers, "safetensors": export_safetensors, "onnx": export_onnx}


def _package(name: str, what: object) -> Any:
    """An optional package, or a CheckpointError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CheckpointError(f"{what}: needs {name.split('.')[0]}; pip install -r requirements-dev.txt") from None


def _short(value: object) -> str:
    """One line of at most 120 printable characters."""
    text = " ".join(str(value).split()).encode("unicode_escape").decode()
    return text if len(text) <= 120 else text[:117] + "..."
