"""Out to ONNX: the denoiser D(x, sigma) as a graph."""

import warnings
from pathlib import Path

import torch

from checkpoints.common import State, package
from checkpoints.state import CheckpointError


def export(model: torch.nn.Module, state: State, folder: Path) -> list[str]:
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
    names = {
        "input_names": list(inputs),
        "output_names": ["D"],
        "dynamic_shapes": {name: {0: batch} for name in inputs},
    }
    large = sum(value.nbytes for value in model.state_dict().values()) >= 1.5 * 2**30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            folder / "model.onnx",
            dynamo=True,
            external_data=large,
            verbose=False,
            **names,
        )
    top = model.sigma_max
    return [f"model.onnx: {', '.join(inputs)} -> D, float32; one step is D({top:g} z, {top:g}), z normal"]
