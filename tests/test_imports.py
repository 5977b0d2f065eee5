"""Checkpoints of ECT, diffusers and OpenAI as people have them: read to the same numbers, or refused in one line."""

import json
import pickletools
import shlex
import struct
import subprocess

import pytest
import torch
from conftest import GOLDEN, golden, relative_error
from test_formats import ARCH, OPENAI, TINY_ADM, refused, saved, to_openai
from torch.nn.functional import one_hot

import checkpoints
import config
import convert

ECT = GOLDEN / "ect_snapshot.pkl"
CONVERT = GOLDEN.parent.parent / "convert.py"
CM = {"precond": "cm", "c_noise": "log250"}


# ECT ------------------------------------------------------------------------------------------------------------------


def test_an_ect_snapshot_computes_what_ect_computes(tmp_path):
    assert convert.main(["import", str(ECT), str(tmp_path / "ect.ckpt")]) == 0
    model, io = checkpoints.load_model(tmp_path / "ect.ckpt"), golden("ect_snapshot_io")
    assert relative_error(model(io["x"], io["sigma"]), io["D"]) < 1e-5
    assert (model.precond, model.c_noise, model.sigma_min, model.sigma_max) == ("cm", "log", 0.003, 80.0)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.full((2,), 0.003)), x)  # its boundary
    cfg = config.load(tmp_path / "ect.ckpt.yml")
    assert cfg == checkpoints.config_of(checkpoints.load(tmp_path / "ect.ckpt"), "")
    assert (cfg.objective.name, cfg.data.path, cfg.data.resolution) == ("ect", "images.zip", 8)


@pytest.mark.parametrize(("name", "value", "there"), [("sigma_min", 0.01, 0.003), ("sigma_data", 0.7, 0.5)])
def test_an_ect_snapshot_keeps_its_own_levels(tmp_path, name, value, there):
    """D by ECMPrecond's formula, of the network's output behind the golden D."""
    content = ECT.read_bytes()
    place = content.index(b"G" + struct.pack(">d", there), content.rindex(name.encode())) + 1
    (tmp_path / "a.pkl").write_bytes(content[:place] + struct.pack(">d", value) + content[place + 8 :])
    model = checkpoints.model_from(convert.read(tmp_path / "a.pkl")[0], "a")
    assert getattr(model, name) == value and model.precond == "cm"
    x, sigma = golden("ect_snapshot_io")["x"], golden("ect_snapshot_io")["sigma"]
    low, sd, s = model.sigma_min, model.sigma_data, sigma.reshape(-1, 1, 1, 1)
    F = model.model(x / (s**2 + sd**2).sqrt(), sigma.log() / 4)
    D = sd**2 / ((s - low) ** 2 + sd**2) * x + (s - low) * sd / (s**2 + sd**2).sqrt() * F
    assert relative_error(model(x, sigma), D) < 1e-5


def with_loss(content: bytes, value: bytes) -> bytes:
    """The snapshot with these opcodes as its loss_fn, which is None there."""
    place = content.rindex(b"loss_fn\x94N") + len(b"loss_fn\x94")
    frame, size = [(pos, arg) for op, arg, pos in pickletools.genops(content) if op.name == "FRAME" and pos < place][-1]
    head = content[: frame + 1] + struct.pack("<Q", size + len(value) - 1) + content[frame + 9 : place]
    return head + value + content[place + 1 :]


def method_of_a_record(name: bytes) -> bytes:
    """getattr(an ECMLoss, name) as opcodes: ECMLoss keeps one of its methods in an attribute."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    loss = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}("
    loss += text(b"class_name") + text(b"ECMLoss") + text(b"state") + b"}u\x85R"
    return b"cbuiltins\ngetattr\n" + loss + text(name) + b"\x86R"


@pytest.mark.parametrize("name", [b"t_to_r_sigmoid", b"__class__", b"__setstate__"])
def test_the_method_in_ects_loss_is_read_as_nothing(tmp_path, name):
    (tmp_path / "a.pkl").write_bytes(with_loss(ECT.read_bytes(), method_of_a_record(name)))
    model, io = checkpoints.model_from(convert.read(tmp_path / "a.pkl")[0], "a"), golden("ect_snapshot_io")
    assert relative_error(model(io["x"], io["sigma"]), io["D"]) < 1e-5
    called = method_of_a_record(name) + b")R"  # what getattr gave, called
    (tmp_path / "b.pkl").write_bytes(with_loss(ECT.read_bytes(), called))
    with pytest.raises(checkpoints.CheckpointError):
        convert.read(tmp_path / "b.pkl")


def test_a_damaged_ect_snapshot_is_one_line(tmp_path, capsys):
    whole, path = ECT.read_bytes(), tmp_path / "a.pkl"
    for part in (1, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        assert "a.pkl: " in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    path.write_bytes(whole.replace(b"ECMPrecond", b"VPXPrecond"))
    assert "of class VPXPrecond; only EDMPrecond" in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    path.write_bytes(whole.replace(b"SongUNet", b"SungUNet"))
    assert "of class SungUNet; supported:" in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    assert not (tmp_path / "a.ckpt").exists()


# diffusers ------------------------------------------------------------------------------------------------------------

NETWORKS = {
    "heads of 64": ((8, 3, 10, 9), {**TINY_ADM, "model_channels": 128}),
    "two widths": ((8, 3, 0, 0), {**TINY_ADM, "model_channels": 128, "attn_resolutions": [8, 4], "num_blocks": 2}),
    "without attention": ((8, 3, 10, 0), {**TINY_ADM, "norm_groups": 8, "scale_shift_norm": False}),
    "three levels, grey": ((16, 1, 0, 0), {**TINY_ADM, "norm_groups": 4, "channel_mult": [1, 2, 3], "sigma_data": 0.4}),
}


def exported(tmp_path, kind):
    """(a checkpoint, the folder that it was exported to)."""
    pytest.importorskip("safetensors")
    path = tmp_path / "a.ckpt"
    if kind == "openai":
        convert.import_checkpoint(OPENAI, path, ARCH)
    else:
        shape, network = NETWORKS[kind]
        saved(path, shape, **{**network, **CM})
    convert.export_checkpoint(path, tmp_path / "out", "diffusers")
    return path, tmp_path / "out"


def answers(path):
    model = checkpoints.load_model(path)
    torch.manual_seed(1)
    x, sigma = torch.randn(3, *model.shape), torch.tensor([80.0, 0.5, 0.002])
    labels = torch.eye(model.label_dim)[torch.tensor([0, 1, 0])] if model.label_dim else None
    return model(x * sigma.reshape(-1, 1, 1, 1), sigma, labels)


@pytest.mark.parametrize("kind", [*NETWORKS, "openai"])
def test_diffusers_there_and_back(tmp_path, kind):
    path, folder = exported(tmp_path, kind)
    convert.import_checkpoint(folder, tmp_path / "b.ckpt")
    assert torch.equal(answers(path), answers(tmp_path / "b.ckpt"))
    convert.export_checkpoint(tmp_path / "b.ckpt", tmp_path / "again", "diffusers")
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text()
    cfg = config.load(tmp_path / "b.ckpt.yml")
    assert cfg.network.sigma_data == checkpoints.load_model(path).sigma_data and cfg.objective.name == "ct"


def test_a_unet_folder_of_its_own_is_taken_for_a_consistency_model(tmp_path, capsys):
    path, folder = exported(tmp_path, "heads of 64")
    assert convert.main(["import", str(folder / "unet"), str(tmp_path / "b.ckpt")]) == 0
    assert "assumed, as the folder has no scheduler: a consistency model" in capsys.readouterr().out
    assert torch.equal(answers(path), answers(tmp_path / "b.ckpt"))


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize(
    "settings",
    [
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, "num_class_embeds": 5},
        {"attention_head_dim": 16, "dropout": 0.1, "sample_size": [16, 16]},
        {"attention_head_dim": None, "layers_per_block": 1},
    ],
)
def test_diffusers_own_unets_compute_the_same(tmp_path, settings):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "norm_num_groups": 8}
    kinds |= {"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "block_out_channels": [32, 64]}
    resampling = {"downsample_type": "resnet", "upsample_type": "resnet", "sample_size": 16}
    unet = diffusers.UNet2DModel(**{**kinds, **resampling, **settings}).eval()
    unet.save_pretrained(tmp_path / "unet")
    convert.import_checkpoint(tmp_path / "unet", tmp_path / "a.ckpt")
    model, sigma = checkpoints.load_model(tmp_path / "a.ckpt"), torch.tensor([80.0, 0.5])
    x, s = torch.randn(2, 3, 16, 16) * sigma.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    classes = torch.tensor([1, 4]) if model.label_dim else None
    F = unet(x / (s**2 + 0.25).sqrt(), 250 * sigma.log(), classes).sample
    D = 0.25 / ((s - 0.002) ** 2 + 0.25) * x + 0.5 * (s - 0.002) / (s**2 + 0.25).sqrt() * F
    labels = None if classes is None else one_hot(classes, 5).float()
    assert relative_error(model(x, sigma, labels), D) < 1e-5


def test_a_folder_that_cannot_be_read_says_why(tmp_path, capsys):
    _, folder = exported(tmp_path, "heads of 64")
    settings, weights = folder / "unet/config.json", folder / "unet/diffusion_pytorch_model.safetensors"
    good, whole = settings.read_text(), weights.read_bytes()

    def message(**changes):
        settings.write_text(json.dumps({**json.loads(good), **changes}))
        said = refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
        settings.write_text(good)
        return said

    plain = ["DownBlock2D", "AttnDownBlock2D"]
    assert "config.json: down_block_types: ['DownBlock2D', 'AttnDownBlock2D'] has no" in message(down_block_types=plain)
    for key, value in {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "gelu",
        "time_embedding_type": "fourier",
        "norm_eps": 1e-6,
        "out_channels": 6,
        "sample_size": None,
        "block_out_channels": [128, 200],
        "attention_head_dim": 48,
        "attn_norm_num_groups": None,
        "resnet_time_scale_shift": "spatial",
    }.items():
        assert f"config.json: {key}: " in message(**{key: value}), key
    assert "is of another network" in message(layers_per_block=2)  # its weights are of one
    assert "is no UNet2DModel" in message(block_out_channels="many")
    settings.write_text("[]")
    assert "holds no settings" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    settings.write_text("{")
    assert "config.json: cannot be read" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    settings.write_text(good)
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text('{"_class_name": "DDPMScheduler"}')
    assert "is a DDPMScheduler; consistency" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    settings.unlink()  # a flow map's pipeline, which runs ONNX: safetensors are what is read back of it
    scheduler.write_text('{"_class_name": "FlowMapEulerDiscreteScheduler"}')
    assert "is a FlowMapEulerDiscreteScheduler;" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    settings.write_text(good)
    scheduler.unlink()
    weights.write_bytes(whole[:1000])
    assert "is no whole safetensors" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    weights.unlink()
    assert "has no diffusion_pytorch_model.saf" in refused("import", folder, tmp_path / "b.ckpt", capsys=capsys)
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in refused("import", tmp_path / "empty", tmp_path / "b.ckpt", capsys=capsys)
    assert not (tmp_path / "b.ckpt").exists()


# OpenAI ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "levels", "attention"),
    [(256, 6, [32, 16, 8]), (64, 4, [32, 16, 8]), (128, 5, [32, 16, 8]), (256, 6, [32]), (64, 3, [32, 16])],
)
def test_the_size_of_openais_models_is_read_from_their_weights(tmp_path, size, levels, attention):
    path = tmp_path / "a.ckpt"
    network = {**TINY_ADM, **CM, "model_channels": 64, "channel_mult": [1] * levels, "norm_groups": 32, "dropout": 0.0}
    saved(path, (size, 3, 0, 0), **{**network, "attn_resolutions": attention, "scale_shift_norm": False})
    to_openai(path, tmp_path / "a.pt")
    notes = convert.import_checkpoint(tmp_path / "a.pt", tmp_path / "b.ckpt")
    assert f"image_size {size}, " in notes[0]
    model = checkpoints.load_model(tmp_path / "b.ckpt")
    assert model.img_resolution == size and config.load(tmp_path / "b.ckpt.yml").data.resolution == size
    attending = [name for name, block in model.named_modules() if getattr(block, "num_heads", 0)]
    assert attending == [n for n, b in checkpoints.load_model(path).named_modules() if getattr(b, "num_heads", 0)]


@pytest.mark.parametrize(("levels", "attention"), [(6, []), (6, [128]), (4, []), (5, [8])])
def test_a_size_that_the_weights_leave_open_is_asked_for(tmp_path, levels, attention, capsys):
    network = {**TINY_ADM, **CM, "model_channels": 64, "channel_mult": [1] * levels, "norm_groups": 32}
    saved(tmp_path / "a.ckpt", (256, 3, 0, 0), **{**network, "attn_resolutions": attention})
    to_openai(tmp_path / "a.ckpt", tmp_path / "a.pt")
    argv = ["import", tmp_path / "a.pt", tmp_path / "b.ckpt"]
    assert "do not tell its image_size; give it in --arch" in refused(*argv, capsys=capsys)
    (tmp_path / "arch.json").write_text('{"image_size": 256}')
    assert convert.main([*map(str, argv), "--arch", str(tmp_path / "arch.json")]) == 0
    assert checkpoints.load_model(tmp_path / "b.ckpt").img_resolution == 256


def test_what_is_said_to_come_next_works_when_pasted(tmp_path):
    """From another folder, with spaces and quotes in the names: import, sample, export, import again."""
    pytest.importorskip("safetensors")
    source = tmp_path / "it's a snapshot #1.pkl"
    source.write_bytes(ECT.read_bytes())

    def run(line):
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    said = run(f"python {CONVERT} import {shlex.quote(source.name)} 'my model.ckpt'")
    assert "written: my model/generated" in " ".join(run(f"{said[-1]} --num 1 --out 'my model/generated'"))
    said = run(f"python {CONVERT} export 'my model.ckpt' 'my export' --to safetensors")
    run(said[-1])
    assert torch.equal(answers(tmp_path / "my model.ckpt"), answers(tmp_path / "my export.ckpt"))
