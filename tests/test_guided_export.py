"""Models that are told their guidance, taken to other programs and back."""

import pytest
import torch
from conftest import relative_error
from test_guided_distillation import CLASSES, IMAGES, SIGMA, made, saved

import checkpoints
import convert
from config import ConfigError


@pytest.mark.filterwarnings("ignore")  # onnx's own
def test_onnx_takes_w(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    cfg, model = made("dit", told=True)
    convert.export_checkpoint(saved(tmp_path / "a.ckpt", cfg, model), tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    given = {
        "x": IMAGES[:3],
        "sigma": SIGMA[:3],
        "class_labels": torch.eye(3),
        "guidance": torch.tensor([1.0, 2.5, 4.0]),
    }
    (D,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    assert relative_error(torch.from_numpy(D), model(**given)) < 1e-4
    assert [entry.name for entry in session.get_inputs()] == [*given]


def test_safetensors_brings_back_w_classes_and_data(tmp_path):
    pytest.importorskip("safetensors")
    cfg, model = made("adm", told=True)
    path = saved(tmp_path / "a.ckpt", cfg, model)
    state = checkpoints.load(path)
    state["data"] |= {"classes": ["cat", "dog", "eel"], "data": "images", "encoder": None}
    checkpoints.write_state(path, state)
    convert.export_checkpoint(path, tmp_path / "out", "safetensors")
    convert.import_checkpoint(tmp_path / "out/model.safetensors", tmp_path / "b.ckpt")
    back, new = checkpoints.load(tmp_path / "b.ckpt"), checkpoints.load_model(tmp_path / "b.ckpt")
    assert back["config"]["objective"]["guidance"] == [1, 4] and back["data"]["classes"] == ["cat", "dog", "eel"]
    assert back["data"]["data"] == "images"
    told = {**CLASSES, "guidance": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert torch.equal(new(IMAGES, SIGMA, **told), model(IMAGES, SIGMA, **told))


def test_diffusers_refuses_what_it_cannot_carry(tmp_path):
    pytest.importorskip("safetensors")
    cfg, model = made("adm", told=True)
    with pytest.raises(ConfigError, match=r"no counterpart in diffusers for network.guidance_inputs: true; try"):
        convert.export_checkpoint(saved(tmp_path / "a.ckpt", cfg, model), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_from_before_there_was_a_setting_loads(tmp_path):
    cfg, model = made("song", told=False)
    path = saved(tmp_path / "a.ckpt", cfg, model)
    state = checkpoints.load(path)
    del state["config"]["network"]["guidance_inputs"]
    checkpoints.write_state(path, state)
    assert torch.equal(checkpoints.load_model(path)(IMAGES, SIGMA, **CLASSES), model(IMAGES, SIGMA, **CLASSES))
