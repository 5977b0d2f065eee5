"""The autoencoder of latents: its loss by hand, its run (numbers, resuming, ranks, scores), and reading others'."""

import hashlib
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import AUTOENCODER, tiny, tiny_autoencoder
from PIL import Image
from test_examples import load as load_example

import checkpoints
import config
import convert
import data
import edit
import generate
from checkpoints.autoencoder import load, weights_hash
from config import ConfigError
from metrics.scores import psnr
from networks import Autoencoder
from networks.autoencoder import fresh
from objectives import KLAutoencoder, losses
from training import trainer
from training.build import build_objective


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 60 steps, scored and drawn every 20."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    often = {"sample": {"grid": 10, "every": 20}, "metrics": {"num": 100, "every": 20}}
    trainer.train(tiny_autoencoder(folder, train={"steps": 60, "save_every": 20}, **often))
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders that diffusers wrote: "kl", a pipeline's with "vae/" in it, and "tiny"."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    fresh(AUTOENCODER, 16, 3).model.save_pretrained(folder / "kl")
    shutil.copytree(folder / "kl", folder / "pipeline" / "vae")
    narrow = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    diffusers.AutoencoderTiny(**narrow, **blocks).save_pretrained(folder / "tiny")
    return folder


def metrics_of(folder, name):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


# The loss -------------------------------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    """An autoencoder that can be written out: the latent's mean is x / 2, its deviation is 0.1, y is its square."""

    def encode(self, x):
        return x / 2, torch.full_like(x, 0.1)

    def decode(self, z):
        return z.square()


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_the_loss_is_distance_and_kl_over_the_images_values(metric):
    x, noise = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    seen = lambda y, x: (y - x).flatten(1).amax(1)  # noqa: E731
    out = KLAutoencoder(getattr(losses, metric), 0.3, seen, 0.7)(Halves(), x, noise=noise, class_labels=None)
    for i in range(5):
        y = (x[i] / 2 + 0.1 * noise[i]) ** 2
        pixels = (y - x[i]).abs() if metric == "l1" else (y - x[i]) ** 2
        latent = torch.distributions.Normal(x[i] / 2, torch.tensor(0.1, dtype=x.dtype))
        unit = torch.distributions.Normal(torch.zeros_like(x[i]), torch.ones_like(x[i]))
        kl = torch.distributions.kl_divergence(latent, unit).sum()
        expected = pixels.mean() + 0.3 * kl / 16 + 0.7 * (y - x[i]).max()
        assert float(out.loss[i]) == pytest.approx(float(expected), rel=1e-12)
    assert set(out.log) == {"distance", "kl", "lpips"}


def test_the_wrapper_is_diffusers_own_mean_deviation_and_image():
    torch.manual_seed(0)
    model, x = fresh(AUTOENCODER, 16, 3).double(), torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        there = model.model.encode(x).latent_dist
        mean, std = model.encode(x)
        assert torch.equal(mean, there.mean) and torch.allclose(std, there.std, rtol=1e-12, atol=0)
        assert torch.equal(model.decode(mean), model.model.decode(mean).sample)
    assert (model.channels, model.factor, model.image_channels, mean.shape) == (3, 2, 3, (2, 3, 8, 8))


def test_psnr_by_hand():
    a = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0], b[1, 0, 0, 0] = 10, 40  # MSE 100 both
    assert psnr(a, b) == pytest.approx(20 * math.log10(25.5))
    b[1] = a[1]
    assert psnr(a, b) == pytest.approx((20 * math.log10(25.5) + 10 * math.log10(12 * 255**2)) / 2)


# The run --------------------------------------------------------------------------------------------------------------


def test_reconstructions_improve_and_the_held_out_are_shown(trained):
    scores = metrics_of(trained, "psnr")
    assert len(scores) == 3 and scores[-1] > scores[0] + 1
    assert [p.name for p in sorted((trained / "samples").iterdir())] == [f"step-000000{n}.png" for n in (20, 40, 60)]
    grid = torch.from_numpy(np.array(Image.open(trained / "samples" / "step-00000060.png"))[..., 0])
    dataset = data.load(config.load(trained / "config.yml").data)
    first = dataset.images[19, 0].repeat_interleave(6, 0).repeat_interleave(6, 1)
    assert torch.equal(grid[2:50, 2:50], first)  # original on the left
    assert not torch.equal(grid[2:50, 52:100], first)
    assert checkpoints.load(trained / "checkpoints" / "best.ckpt")["best"]["scores"]["psnr"] == max(scores)


def test_the_score_is_the_psnr_of_every_20th_image_through_the_first_average(trained):
    model = load(str(trained / "checkpoints" / "last.ckpt"))
    images = data.load(config.load(trained / "config.yml").data).images[19::20]
    made = data.to_uint8(model.decode(model.encode(data.to_float(images))[0]))
    assert metrics_of(trained, "psnr")[-1] == pytest.approx(psnr(made, images), abs=0.01)


def test_the_held_out_are_never_trained_on(tmp_path, monkeypatch):
    read, real = set(), data.ImageSet.read
    monkeypatch.setattr(data.ImageSet, "read", lambda self, rows: (read.update(rows.tolist()), real(self, rows))[1])
    many = {"steps": 14, "batch_size": 128}
    trainer.train(tiny_autoencoder(tmp_path / "a", train=many, metrics={"at_end": False, "num": 100}))
    shown = {19 + 20 * (i * 89 // 10) for i in range(10)}  # by the grid
    assert {row for row in read if row % 20 == 19} <= shown
    assert len(read) > 1000


def test_images_held_out_elsewhere(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder, number, size in (("train", 40, 8), ("other", 24, 8), ("large", 24, 16)):
        (tmp_path / folder).mkdir()
        for i in range(number):
            Image.fromarray(rng.integers(0, 255, (size, size), np.uint8)).save(tmp_path / folder / f"{i}.png")
    where = {"name": "folder", "path": str(tmp_path / "train"), "dir": str(tmp_path)}
    trainer.train(tiny_autoencoder(tmp_path / "a", data=where, objective={"held_out": str(tmp_path / "other")}))
    assert "mean of 24 held-out images" in capsys.readouterr().out
    for other, said in (("large", "holds images of 1x16x16, and the training set is 1x8x8"), ("none", "not exist")):
        with pytest.raises(ConfigError, match=f"^objective.held_out: .*{said}"):
            trainer.train(tiny_autoencoder(tmp_path / "b", data=where, objective={"held_out": str(tmp_path / other)}))


def test_a_resumed_run_is_the_unbroken_run(tmp_path):
    trainer.train(tiny_autoencoder(tmp_path / "whole"))
    cfg = tiny_autoencoder(tmp_path / "broken")
    trainer.train(cfg)
    for name in ("step-00000006.ckpt", "last.ckpt"):
        (cfg.run.folder / "checkpoints" / name).unlink()
    trainer.train(cfg, resume=True)
    a, b = (checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "broken"))
    assert a["step"] == b["step"] == 6
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]) and torch.equal(a["ema"][1][name], b["ema"][1][name])


@pytest.mark.parametrize("how", ["microbatch", "checkpointing"])
def test_passes_change_no_number(tmp_path, how):
    fp64 = {"steps": 3, "precision": "fp64"}
    trainer.train(tiny_autoencoder(tmp_path / "a", train=fp64))
    trainer.train(tiny_autoencoder(tmp_path / "b", train={**fp64, how: {"microbatch": 4, "checkpointing": True}[how]}))
    a, b = (checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt")["model"] for name in "ab")
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-9) for name in a)


def test_a_run_starts_from_another_autoencoder(tmp_path, trained):
    ckpt = str(trained / "checkpoints" / "last.ckpt")
    trainer.train(tiny_autoencoder(tmp_path / "a", train={"steps": 1, "lr": 1e-9, "init_from": ckpt}))
    a, b = (checkpoints.load(path)["ema"][0] for path in (ckpt, tmp_path / "a" / "checkpoints" / "last.ckpt"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


# Read as an autoencoder -----------------------------------------------------------------------------------------------


def test_a_checkpoint_and_its_diffusers_folder_are_one_autoencoder(tmp_path, trained, capsys):
    ckpt = trained / "checkpoints" / "last.ckpt"
    assert convert.main(["export", str(ckpt), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    ours, exported = load(str(ckpt)), load(str(tmp_path / "out"))
    assert ours.hash == exported.hash and (ours.source, exported.source) == (str(ckpt), str(tmp_path / "out"))
    assert ours.hash != weights_hash(load_average(ckpt, 1).model)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    for a, b in zip(ours.encode(x), exported.encode(x), strict=True):
        assert torch.equal(a, b)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert convert.main(["export", str(ckpt), str(tmp_path / "st"), "--to", "safetensors"]) == 0
    back = tmp_path / "back.ckpt"
    assert convert.main(["import", str(tmp_path / "st" / "model.safetensors"), str(back)]) == 0
    assert load(str(back)).hash == ours.hash
    assert convert.main(["export", str(ckpt), str(tmp_path / "onnx"), "--to", "onnx"]) == 2
    assert "--to onnx: is not for autoencoders" in capsys.readouterr().err


def load_average(path, number):
    return checkpoints.load_model(path, average=number)


def test_a_folder_of_diffusers_and_a_pipelines(theirs):
    a, b = load(str(theirs / "kl")), load(str(theirs / "pipeline"))
    assert a.hash == b.hash and isinstance(a, Autoencoder)
    assert (a.channels, a.factor, a.image_channels, a.scaling_factor, a.shift_factor) == (3, 2, 3, 1.0, 0.0)
    digest = hashlib.sha256()
    for name in sorted(a.model.state_dict()):
        digest.update(name.encode() + a.model.state_dict()[name].numpy().tobytes())
    assert a.hash == digest.hexdigest()


def test_tiny_takes_and_gives_minus_one_to_one(theirs):
    """Its layers work in [0, 1] (TAESD's convention), and it has no deviation."""
    model, x = load(str(theirs / "tiny")), torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = model.encode(x)
    assert torch.equal(mean, model.model.encoder.layers((x + 1) / 2)) and not std.any()
    y = model.model.decoder.layers(torch.tanh(mean / 3) * 3)
    assert torch.allclose(model.decode(mean), 2 * y - 1, atol=1e-6)
    assert (model.channels, model.factor, model.image_channels) == (4, 2, 3)


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": {"norm_num_groups": 3}}, "network: block_out_channels: 8 channels do not divide"),
        ({"network": {"block_out_channels": [8] * 5}}, "network: block_out_channels: 5 levels do not halve 8 pixels"),
        ({"data": {"augment": 0.1}}, "data.augment: is for networks that are told of it"),
        ({"sample": {"sigmas": [80.0]}}, "sample.sigmas: an autoencoder draws no samples"),
        ({"sample": {"guidance": 2.0}}, "sample.guidance: an autoencoder draws no samples"),
        ({"objective": {"lpips_weights": "vgg.pth"}}, "objective.lpips_weights: is for objective.lpips_weight above 0"),
        ({"train": {"compile": True}}, "train.compile: an autoencoder is not compiled; set it to auto or false"),
        ({"objective": {"held_out": "x"}}, "objective.held_out: is read as data.path is, and data.name: digits has"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, changes, said):
    with pytest.raises(ConfigError) as error:
        trainer.train(tiny_autoencoder(tmp_path / "a", **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [{"network": AUTOENCODER}, {"objective": {"name": "autoencoder"}}])
def test_network_and_objective_go_together(raw):
    with pytest.raises(ConfigError, match="network autoencoder and objective autoencoder go together"):
        config.parse(raw)


def test_lpips_without_its_weights_is_one_line(tmp_path):
    cfg = tiny_autoencoder(tmp_path / "a", objective={"lpips_weight": 1.0, "lpips_weights": str(tmp_path / "none.pth")})
    with pytest.raises(ConfigError, match=r"^objective\.lpips_weight: VGG16's .*, or set objective\.lpips_weight: 0$"):
        build_objective(cfg, fresh(AUTOENCODER, 8, 1))


def test_what_makes_samples_says_what_is_next(tmp_path, trained, capsys):
    cfg, ckpt = str(trained / "config.yml"), str(trained / "checkpoints" / "last.ckpt")
    assert generate.main(["--cfg", cfg, "--ckpt", ckpt]) == 2
    picture = ["--input", str(trained / "samples" / "step-00000060.png"), "--out", str(tmp_path / "o")]
    assert edit.main(["denoise", "--cfg", cfg, "--ckpt", ckpt, *picture]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("is an autoencoder, which draws no samples" in line for line in lines)
    assert all("encode.py --cfg" in line for line in lines)
    for changes in ({"objective": {"name": "meanflow", "teacher": ckpt}}, {"train": {"init_from": ckpt}}):
        with pytest.raises(ConfigError, match=r"is an autoencoder |autoencoder there, and this run trains none"):
            trainer.train(tiny(tmp_path / "a", **changes))


def test_what_is_no_autoencoder_is_one_line(tmp_path, theirs, teacher):
    broken = tmp_path / "broken"
    shutil.copytree(theirs / "kl", broken)
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    other = tmp_path / "other"
    shutil.copytree(theirs / "kl", other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "layers_per_block": 2}))
    pickled = tmp_path / "pickled"
    shutil.copytree(theirs / "kl", pickled)
    (pickled / weights.name).unlink()
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"")
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    for source, said in (
        (broken, "its weights cannot be read"),
        (other, "its weights do not fit its config.json: missing"),
        (pickled, "its weights cannot be read"),  # a pickle is not opened
        (unet, "is a diffusers UNet2DModel; give AutoencoderKL or AutoencoderTiny"),
        (tmp_path, "has no config.json, here or in vae/"),
        (teacher.format("edm"), "is no autoencoder, but a model of images"),
    ):
        with pytest.raises(ConfigError) as error:
            load(str(source))
        assert said in str(error.value) and str(error.value).startswith(str(source)), error.value
        assert "\n" not in str(error.value)


def test_the_photographs(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(sys, "argv", ["photographs.py", "--quick", "--out", str(tmp_path)])
    photographs = load_example("photographs")
    photographs.main()
    for part, number in (("train", 20), ("held_out", 2)):
        images = sorted((tmp_path / part).glob("*/*.png"))
        assert len(images) == 10 * number
        for path in images:
            with Image.open(path) as tile:
                assert (tile.mode, tile.size) == ("RGB", (64, 64))
