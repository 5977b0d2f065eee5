"""Out to other programs: safetensors (and back), ONNX; diffusers.py has its own."""

import json
import shutil
import warnings
from pathlib import Path

import torch

from checkpoints.common import State, new_state, package, short
from checkpoints.diffusers import to_diffusers
from checkpoints.state import CheckpointError
from config import ConfigError


def to_safetensors(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.safetensors: the EMA weights, float32, and in its metadata the config and the data's shape as JSON."""
    safetensors = package("safetensors.torch", "--to safetensors")
    about = {"config": json.dumps(state["config"]), "data": json.dumps(state["data"])}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(weights, folder / "model.safetensors", about)
    return []


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
        state["data"] |= {name: data[name] for name in ("classes", "data", "encoder", "autoencoder") if name in data}
        return state
    except ConfigError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: was not exported by this project: its metadata has no {error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: is no whole safetensors file ({short(error)})") from None


def to_onnx(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """model.onnx: D(x, sigma[, class_labels]) for any batch size, float32; of a flow map u(z, t, r[, class_labels]).

    A network that is told its guidance takes guidance (B,) as well, a flow map interval (B, 2) too. Weights of 1.5 GiB
    and more lie beside it in model.onnx.data, since an ONNX file ends at 2 GiB.
    """
    if model.clock is None:
        raise CheckpointError("--to onnx: is not for autoencoders; take --to diffusers or --to safetensors")
    if model.codec.kind == "vectors":
        raise CheckpointError("--to onnx: is for models of images; take --to safetensors for vectors")
    for name in ("onnx", "onnxscript"):
        package(name, "--to onnx")
    flow_map = model.clock == "time"
    levels = {"t": torch.tensor([0.9, 0.5]), "r": torch.tensor([0.4, 0.0])} if flow_map else {"sigma": torch.ones(2)}
    inputs = {"z" if flow_map else "x": torch.randn(2, *model.shape), **levels}
    if model.label_dim:
        inputs["class_labels"] = torch.eye(model.label_dim)[torch.arange(2) % model.label_dim]
    if getattr(model, "guidance_inputs", False):
        inputs |= {"guidance": torch.ones(2)}
        inputs |= {"interval": torch.tensor([[0.0, 1.0]]).repeat(2, 1)} if flow_map else {}
    batch = torch.export.Dim("batch")
    axes = {name: {0: batch} for name in inputs}
    large = sum(value.nbytes for value in model.state_dict().values()) >= 1.5 * 2**30
    made = "u" if flow_map else "D"
    options = {"input_names": list(inputs), "output_names": [made], "dynamic_shapes": axes, "external_data": large}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        torch.onnx.export(model, (), folder / "model.onnx", kwargs=inputs, dynamo=True, verbose=False, **options)
    top = model.sigma_max
    step = "z - u(z, 1, 0)" if flow_map else f"D({top:g} z, {top:g})"
    return [f"model.onnx: {', '.join(inputs)} -> {made}, float32; one step is {step}, z normal"]


def to_pipeline(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
    """A folder for diffusers: of a flow map, any, as ONNX in a pipeline of its own; else what `to_diffusers` writes.

    Its scheduler is diffusers' FlowMapEulerDiscreteScheduler where the installed version has it.
    """
    if model.clock is None:
        model.model.save_pretrained(folder)
        return ["load it with: diffusers.AutoencoderKL.from_pretrained(folder)"]
    if model.codec.kind == "latents":
        raise CheckpointError("--to diffusers: is for models of pixels; take --to safetensors or onnx for latents")
    if model.clock == "sigma":
        return to_diffusers(model, state, folder)
    diffusers = package("diffusers", "--to diffusers")
    (folder / "unet").mkdir()
    to_onnx(model, state, folder / "unet")
    scheduler = "FlowMapEulerDiscreteScheduler" if hasattr(diffusers, "FlowMapEulerDiscreteScheduler") else None
    content = {"_class_name": ["pipeline", "FlowMapPipeline"], "scheduler": [scheduler and "diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(content, indent=1) + "\n")
    if scheduler:
        (folder / "scheduler").mkdir()
        settings = {"_class_name": scheduler, "num_train_timesteps": 1000, "shift": 1.0}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    shutil.copyfile(Path(__file__).parent / "flow_map_pipeline.py", folder / "pipeline.py")
    load = "diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)"
    return [f"load it with: {load}; pipeline.py in it is short, and says what it runs"]


EXPORTS = {"diffusers": to_pipeline, "safetensors": to_safetensors, "onnx": to_onnx}
