"""Flow maps taken to other programs: the same noise gives the same image there."""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from torch.nn.functional import one_hot

import checkpoints
import config
import convert
import networks
import sampler
from checkpoints import common, export


def saved(path, objective, label_dim=3, **network):
    """A checkpoint of a small flow map of 8 x 8 RGB images, none of whose weights is zero."""
    shape = {"resolution": 8, "channels": 3, "label_dim": label_dim, "augment_dim": 0}
    small = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
    data = {"conditional": label_dim > 0}
    cfg = config.parse({"network": {**small, **network}, "data": data, "objective": objective})
    torch.manual_seed(0)
    model = networks.build(cfg.network.model_dump(), **shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = common.new_state(cfg.model_dump(), shape, model.state_dict(), path)
    state["data"]["class_counts"] = [5] * label_dim or None
    checkpoints.write_state(path, state)
    return path


MEANFLOW, IMF = {"name": "meanflow"}, {"name": "imf", "guidance": 8.0}


def given(model, batch):
    """Points, times and what the network is told, by name."""
    z = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    r = torch.linspace(0, 0.5, batch)
    inputs = {"z": z, "t": r + 0.4, "r": r}
    if model.label_dim:
        inputs["class_labels"] = one_hot(torch.arange(batch) % 3, 3).float()
    if model.guidance_inputs:
        inputs |= {"guidance": torch.linspace(1, 5, batch), "interval": torch.tensor([[0.2, 0.7]]).repeat(batch, 1)}
    return inputs


def test_onnx_computes_the_same_for_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = saved(tmp_path / "a.ckpt", IMF)
    assert convert.main(["export", str(path), str(tmp_path / "out"), "--to", "onnx"]) == 0
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    model = checkpoints.load_model(path)
    for batch in (1, 5):
        inputs = given(model, batch)
        made = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        assert relative_error(torch.from_numpy(made), model(**inputs)) < 1e-4


@pytest.mark.parametrize("objective", [MEANFLOW, IMF])
def test_safetensors_there_and_back(objective, tmp_path):
    pytest.importorskip("safetensors")
    path = saved(tmp_path / "a.ckpt", objective)
    convert.export_checkpoint(path, tmp_path / "out", "safetensors")
    convert.import_checkpoint(tmp_path / "out" / "model.safetensors", tmp_path / "b.ckpt")
    old, new = (checkpoints.load_model(p) for p in (path, tmp_path / "b.ckpt"))
    assert isinstance(new, networks.FlowMap) and torch.equal(old(**given(old, 4)), new(**given(new, 4)))


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize(("objective", "label_dim", "scheduler"), [(IMF, 3, True), (MEANFLOW, 0, False)])
def test_diffusers_makes_the_same_images(objective, label_dim, scheduler, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    path, out = saved(tmp_path / "a.ckpt", objective, label_dim), tmp_path / "out"
    if not scheduler:  # an older version
        monkeypatch.setattr(
            export, "package", lambda name, why: SimpleNamespace() if name == "diffusers" else common.package(name, why)
        )
    convert.export_checkpoint(path, out, "diffusers")
    assert (out / "scheduler").exists() is scheduler and "model.onnx" in os.listdir(out / "unet")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    expected = "FlowMapEulerDiscreteScheduler" if scheduler else "NoneType"
    assert type(pipe.scheduler).__name__ == expected

    model, labels = checkpoints.load_model(path), torch.tensor([2, 0])
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    told = {"class_labels": one_hot(labels, 3).float()} if label_dim else {}
    asked = {"class_labels": labels} if label_dim else {}
    w, interval = (3.0, (0.1, 0.9)) if model.guidance_inputs else (None, None)
    if w:
        asked |= {"guidance_scale": w, "guidance_interval": interval}
    for times in ([1.0], [1.0, 0.4]):
        made = pipe(2, latents=z.clone(), times=times, output_type="pt", **asked).images
        with torch.no_grad():
            x = sampler.jumps(sampler.guided(model, w, interval), z, times, **told)
        assert float((made - (x.clamp(-1, 1) + 1) / 2).abs().max()) < 1e-4 and float(x.std()) > 0.1
    two = pipe(2, latents=z.clone(), num_inference_steps=2, output_type="pt", **asked).images
    assert not torch.allclose(two, made) and len(pipe(2, latents=z.clone(), **asked).images) == 2  # even times; PIL's
