"""Latents: three forms of files and their numbers, encode.py, and the way from encoded images to decoded samples."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden, tiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import convert
import data
import edit
import encode
import generate
from checkpoints import autoencoder
from config import ConfigError
from objectives.draws import Draws
from sampling import encoding
from sampling.decoding import attach, images_of
from sources.codecs import codec_from
from training import trainer

EDM2, SHARD = GOLDEN / "latents_edm2.zip", GOLDEN / "latents_shard.safetensors"
MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # golden/README.md, EDM2's raw latents
COUNT = 150  # images: three batches of encode.py


def small_vae(folder: Path, seed: int = 0, latent_channels: int = 4, levels: int = 2) -> Path:
    """A diffusers folder with an untrained AutoencoderKL of grey images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[8] * levels,
        latent_channels=latent_channels,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with images.npz, 16 pixels in 3 classes, an autoencoder `vae`, a config and encode.py's file."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    labels = np.arange(COUNT) % 3
    images = rng.integers(0, 60, (COUNT, 16, 16, 1)) + 70 * labels[:, None, None, None]
    images[:, :, :8] += 40  # left is not right
    np.savez(folder / "images.npz", images=images.astype(np.uint8), labels=labels)
    small_vae(folder / "vae")
    section = {"name": "npz", "path": str(folder / "images.npz"), "dir": str(folder / "cache"), "flip": True}
    (folder / "images.yml").write_text(json.dumps({"run": {"device": "cpu"}, "data": section}))
    assert encoded(folder, "a.safetensors") == 0
    return folder


def encoded(place: Path, name: str, *more: str, vae: str = "vae") -> int:
    argv = ["--cfg", place / "images.yml", "--autoencoder", place / vae, "--out", place / name, *more]
    return encode.main([str(word) for word in argv])


def section(path: Path, **changes):
    """The config's `data` for latents."""
    return tiny(path.parent, data={"name": "latents", "path": str(path), **changes}, network={"sigma_data": 0.5}).data


def latent_run(folder: Path, place: Path, **changes):
    """A config that trains on the file of `place` in about a second."""
    own = {"name": "latents", "path": str(place / "a.safetensors"), "conditional": True, "flip": True}
    own |= {"dir": str(place / "cache"), **changes.pop("data", {})}
    return tiny(folder, data=own, **{"network": {"dropout": 0.0}, **changes})


# The forms and their numbers ------------------------------------------------------------------------------------------


def test_edm2s_zip_has_its_numbers():
    cfg = tiny(Path("x"), data={"name": "latents", "path": str(EDM2), "scaling": "edm2", "conditional": True})
    dataset = data.load(cfg.data)
    values, labels = dataset.read(torch.arange(12))
    assert labels.tolist() == [9, 0, 8, 6, 3, 0, 2, 0, 0, 9, 3, 8] and dataset.shape == (4, 8, 8)
    assert float(values[3].double().sum()) == pytest.approx(454.0624, abs=1e-4)
    assert float(values[3, 0, 0, 0]) == pytest.approx(11.374245, abs=1e-6)
    x, conditions = dataset.codec(cfg).to_model(values, labels, Draws(5, 12))
    noise = Draws(5, 12).normal((12, 4, 8, 8))
    with zipfile.ZipFile(EDM2) as archive:
        rows = [np.load(archive.open(f"00000/img-mean-std-{i:08d}.npy")) for i in range(12)]
    raw = torch.from_numpy(np.stack(rows)).double()
    scale = 0.5 / torch.tensor(STD, dtype=torch.float64).view(4, 1, 1)
    wanted = (raw[:, :4] + raw[:, 4:] * noise) * scale - torch.tensor(MEAN).double().view(4, 1, 1) * scale
    assert float((x - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())
    assert conditions["class_labels"].argmax(1).tolist() == labels.tolist()


def test_an_edm2_pickle_brings_its_scaling(tmp_path):
    convert.import_checkpoint(GOLDEN / "edm2_checkpoint.pkl", tmp_path / "a.ckpt")
    codec, io = checkpoints.load_model(tmp_path / "a.ckpt").codec, golden("edm2_checkpoint_io")
    mean, std = io["encoder_raw"].chunk(2, dim=1)
    scale, bias = codec.scale.double(), codec.bias.double()
    latents = (mean + std * io["encoder_noise"]) * scale + bias
    assert float((latents - io["encoder_latents"]).abs().max()) < 1e-6 * float(io["encoder_latents"].abs().max())
    given = []
    codec.autoencoder |= {"factor": 8, "image_channels": 3}
    codec.decoder = lambda z: given.append(z) or z
    codec.decode(io["encoder_latents"].float())
    wanted = io["encoder_decoder_input"]
    assert float((torch.cat(given) - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("folder", [False, True])
def test_lightningdits_shards_have_their_numbers(tmp_path, folder):
    path = SHARD
    if folder:  # two shards of 5 and 7, beside a file that is none
        tensors, path = load_file(SHARD), tmp_path
        for name, rows in (("latents_rank00_shard000", slice(5)), ("latents_rank00_shard001", slice(5, 12))):
            save_file({key: value[rows].clone() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        (tmp_path / "latents_stats.pt").write_bytes(b"no shard")
    own = {"name": "latents", "path": str(path), "scaling": "lightningdit", "flip": True, "conditional": True}
    cfg = tiny(tmp_path, data=own)
    dataset = data.load(cfg.data)
    values, labels = dataset.read(torch.arange(12))
    assert labels.tolist() == [7, 2, 5, 3, 8, 6, 6, 1, 6, 4, 8, 4] and dataset.shape == (16, 8, 8)
    assert float(values[:, :16].double().sum()) == pytest.approx(-2359.830, abs=1e-3)
    mean, std = dataset.statistics()
    assert float(mean[0]) == pytest.approx(-0.119299, abs=1e-6) and float(std[0]) == pytest.approx(0.836872, abs=1e-6)
    x, _ = dataset.codec(cfg).to_model(values, labels, Draws(5, 12))
    mirrored = Draws(5, 12).integers(2, (12,)).bool()
    assert mirrored.any() and not mirrored.all()
    raw = load_file(SHARD)
    chosen = torch.where(mirrored.view(12, 1, 1, 1), raw["latents_flip"], raw["latents"]).double()
    wanted = (chosen - mean.view(16, 1, 1)) / std.view(16, 1, 1)
    assert float((x - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("scaling", [None, "imm", "sd"])
def test_other_scalings(scaling, caplog):
    cfg = tiny(Path("x"), data={"name": "latents", "path": str(EDM2), "scaling": scaling}, network={"sigma_data": 0.8})
    codec = data.load(cfg.data).codec(cfg)
    with zipfile.ZipFile(EDM2) as archive:
        raw = [np.load(archive.open(m)) for m in sorted(archive.namelist()) if m.endswith(".npy")]
    z = torch.from_numpy(np.stack(raw)).double()
    if scaling is None:  # mean 0 and standard deviation sigma_data of what is drawn
        variance = z[:, :4].var((0, 2, 3), correction=0) + z[:, 4:].square().mean((0, 2, 3))
        scale = 0.8 / variance.sqrt()
        bias = -z[:, :4].mean((0, 2, 3)) * scale
    elif scaling == "imm":
        scale = 0.5 / torch.tensor([4.855, 5.319, 3.937, 3.987])
        bias = -torch.tensor([0.86488, -0.27787, 0.21617, 0.37384]) * scale
    else:
        scale, bias = torch.full((4,), 0.18215), torch.zeros(4)
    assert torch.allclose(codec.scale.flatten().double(), scale.double(), rtol=2e-3 if scaling is None else 1e-4)
    assert torch.allclose(codec.bias.flatten().double(), bias.double(), rtol=2e-3, atol=1e-4)
    assert codec.autoencoder["input_range"] == "-1,1"
    assert ("is not the scaling of" in caplog.text) == (scaling is not None)  # these are of EDM2's range


# encode.py ------------------------------------------------------------------------------------------------------------


def test_a_file_holds_what_the_autoencoder_gives_and_what_it_was(place):
    vae = autoencoder.load(str(place / "vae"))
    images = torch.from_numpy(np.load(place / "images.npz")["images"]).permute(0, 3, 1, 2)
    tensors = load_file(place / "a.safetensors")
    with torch.no_grad():
        for ending, x in (("", data.to_float(images)), ("_flip", data.to_float(images.flip(3)))):
            mean, std = vae.encode(x)
            for name, value in ((f"latents{ending}", mean), (f"latents{ending}_std", std)):
                assert tensors[name].dtype == torch.float16 and tensors[name].shape == (COUNT, 4, 8, 8)
                assert torch.allclose(tensors[name].float(), value, rtol=2**-10, atol=1e-6), name
    assert tensors["labels"].tolist() == [i % 3 for i in range(COUNT)]
    mean, std = tensors["latents"].double(), tensors["latents_std"].double()
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    assert torch.allclose(tensors["channel_mean"], mean.mean((0, 2, 3)))
    assert torch.allclose(tensors["channel_std"], variance.sqrt(), rtol=1e-4)
    with safe_open(place / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["consistency_latents"])
    source = str(place / "vae")
    known = {"source": source, "hash": vae.hash, "input_range": "-1,1", "factor": 2, "image_channels": 1}
    assert about["autoencoder"] == known and about["classes"] == ["0", "1", "2"] and about["format"] == 1
    assert about["images"]["path"] == str(place / "images.npz") and about["images"]["count"] == COUNT
    dataset = data.load(section(place / "a.safetensors", conditional=True))
    assert dataset.autoencoder == known and dataset.said()[0].startswith("data: 150 latents of 4x8x8")


def test_the_range_of_the_input_is_kept(place):
    assert encoded(place, "range.safetensors", "--input-range", "0,1", "data.flip=false") == 0
    images = torch.from_numpy(np.load(place / "images.npz")["images"]).permute(0, 3, 1, 2)
    vae = autoencoder.load(str(place / "vae"))
    with torch.no_grad():
        mean = vae.encode(images / 255)[0]
    tensors = load_file(place / "range.safetensors")
    assert torch.allclose(tensors["latents"].float(), mean, rtol=2**-10, atol=1e-6) and "latents_flip" not in tensors
    cfg = latent_run(place / "x", place, data={"path": str(place / "range.safetensors"), "flip": False})
    codec = data.load(cfg.data).codec(cfg)
    attach([codec], None, torch.device("cpu"))
    x = data.to_float(images[:3])
    with torch.no_grad():
        assert torch.allclose(codec.encode(x), mean[:3] * codec.scale + codec.bias, rtol=1e-4, atol=1e-4)
        assert torch.allclose(codec.decode(codec.encode(x)), 2 * vae.decode(mean[:3]) - 1, atol=1e-4)


def test_a_stopped_encode_goes_on_and_gives_the_same_file(place, monkeypatch, capsys):
    write, seen = encoding.LatentFile.write, []

    def stops(self, batch, *rest):
        if batch == 2 and len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch)
        write(self, batch, *rest)

    monkeypatch.setattr(encoding.LatentFile, "write", stops)
    assert encoded(place, "b.safetensors") == 130
    assert not (place / "b.safetensors").exists() and seen == [0, 1]
    assert encoded(place, "b.safetensors", "data.flip=false") == 2  # other settings than what is there
    assert "is of other images, another autoencoder or other settings" in capsys.readouterr().err
    seen.append("again")
    assert encoded(place, "b.safetensors") == 0 and seen == [0, 1, "again", 2]
    assert "2 batches of 64 are done" in capsys.readouterr().out
    assert (place / "b.safetensors").read_bytes() == (place / "a.safetensors").read_bytes()
    assert not list(place.glob("b.safetensors.part*"))
    assert encoded(place, "b.safetensors") == 2
    assert "is there already" in capsys.readouterr().err


def test_several_ranks_write_the_same_file(place):
    """Two places' batches in turn; torchrun adds no more than the place."""
    cfg = encode.config.load(place / "images.yml", [])
    images, vae = data.load(cfg.data), autoencoder.load(str(place / "vae"))
    file = encoding.LatentFile(place / "c.safetensors", *encoding.header(cfg, images, vae, "-1,1"))
    file.begin()
    for rank in (1, 0):
        encoding.encode(images, vae, file, "-1,1", torch.device("cpu"), (rank, 2), 0, print)
        done = file.finished()[:, 0] > 0
        assert done.tolist() == ([False, True, False] if rank else [True] * 3)
    file.end()
    assert (place / "c.safetensors").read_bytes() == (place / "a.safetensors").read_bytes()


def test_an_autoencoder_without_a_spread_keeps_none(place, tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(in_channels=1, out_channels=1, **sizes, **blocks).save_pretrained(tmp_path / "tiny")
    assert encoded(place, "tiny.safetensors", "data.flip=true", vae=str(tmp_path / "tiny")) == 0
    with safe_open(place / "tiny.safetensors", "pt") as file:
        assert set(file.keys()) == {"latents", "latents_flip", "labels", "channel_mean", "channel_std"}


@pytest.mark.parametrize(
    ("more", "vae", "message"),
    [
        (["data.name=latents", "data.path={}/a.safetensors"], "vae", "data.name: images are encoded"),
        (["data.augment=0.1"], "vae", "data.augment: images are encoded"),
        (["data.channels=3"], "vae", "takes images of 1 channels, and these have 3; set data.channels=1"),
        (["data.resolution=15"], "vae", "15 pixels do not divide"),
        ([], "nowhere", "nowhere: no autoencoder can be read there"),
    ],
)
def test_what_cannot_be_encoded_is_one_line(place, more, vae, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert encoded(place, "bad.safetensors", *(text.format(place) for text in more), vae=vae) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


# Training, sampling, scoring, editing ---------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "checkpoints" / "last.ckpt")["model"]


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A run of six steps with its score."""
    changes = {"metrics": {"at_end": True, "num": 100}, "sample": {"grid": 6}}
    trainer.train(latent_run(place / "run", place, **changes))
    return place / "run"


def test_a_resumed_run_and_one_that_reads_the_disk_are_the_same(place, run, capsys):
    for name, own in (("halves", {}), ("lazy", {"memory_gb": 0.0, "workers": 1})):
        folder = place / name
        trainer.train(latent_run(folder, place, data=own, train={"steps": 4}))
        trainer.train(latent_run(folder, place, data=own), resume=True)
        assert same(folder, run), name
    trainer.train(latent_run(place / "unmirrored", place, data={"flip": False}))
    assert not same(place / "unmirrored", run)


def test_other_latents_are_noticed_and_keep_the_scaling_of_the_first(place, tmp_path, capsys):
    trainer.train(latent_run(tmp_path / "run", place, train={"steps": 4}))
    tensors = load_file(place / "a.safetensors")
    with safe_open(place / "a.safetensors", "pt") as file:
        about = file.metadata()
    tensors["latents"], tensors["channel_std"] = tensors["latents"] * 2, tensors["channel_std"] * 2
    save_file(tensors, tmp_path / "b.safetensors", about)
    cfg = latent_run(tmp_path / "run", place, data={"path": str(tmp_path / "b.safetensors")})
    with pytest.raises(ConfigError, match=r"does not hold the latents that .* was trained on: other latents"):
        trainer.train(cfg, resume=True)
    trainer.train(cfg, resume=True, on_other_data=True)
    first, last = (checkpoints.load(tmp_path / "run" / "checkpoints" / f"step-0000000{n}.ckpt") for n in (4, 6))
    assert first["data"]["scaling"] == last["data"]["scaling"] and first["data"]["data"] != last["data"]["data"]


def test_grids_and_scores_are_of_pixels(place, run, capsys):
    assert (run / "samples" / "step-00000006.png").exists()
    argv = ["--cfg", run / "config.yml", "--ckpt", run / "checkpoints" / "last.ckpt", "--num", "20"]
    argv = [str(word) for word in argv]
    assert generate.main([*argv, "--out", str(place / "g"), "--calc_fid", "--nearest"]) == 0
    said = capsys.readouterr().out
    images = np.load(place / "g" / "samples" / "000000.npz")["images"]
    assert images.shape == (20, 16, 16, 1) and images.dtype == np.uint8
    assert "against the 150 images of" in said and "images.npz, 16 pixels" in said  # not their decoded latents
    shutil.move(place / "images.npz", place / "moved.npz")
    try:
        assert generate.main([*argv, "--out", str(place / "g2"), "--calc_fid"]) == 0
        named = ["data.name=npz", f"data.path={place / 'moved.npz'}"]
        assert generate.main([*argv, "--out", str(place / "g3"), "--calc_fid", *named]) == 0
        assert "against the 150 images of" in (said := capsys.readouterr().out) and "moved.npz, 16 pixels" in said
    finally:
        shutil.move(place / "moved.npz", place / "images.npz")
    assert "a.safetensors, 16 pixels (decoded by" in said


def test_decoded_latents_are_the_same_in_memory_and_one_by_one(place, tmp_path):
    cfg = latent_run(tmp_path, place)
    dataset = data.load(cfg.data)
    dataset.images = None  # the file says nothing of them
    codec = dataset.codec(cfg)
    attach([codec], None, torch.device("cpu"))
    held = images_of(dataset, codec, cfg)
    read = images_of(dataset, codec, latent_run(tmp_path, place, data={"memory_gb": 0.0}))
    assert held.images is not None and read.images is None
    rows = torch.tensor([3, 140, 7])
    assert torch.equal(held.batch(rows), read.batch(rows)) and held.shape == (1, 16, 16)
    mean = load_file(place / "a.safetensors")["latents"][rows].float()
    with torch.no_grad():
        wanted = data.to_uint8(autoencoder.load(str(place / "vae")).decode(mean))
    assert (held.batch(rows).int() - wanted.int()).abs().max() <= 1


def test_a_checkpoint_knows_its_codec(run):
    state = checkpoints.load(run / "checkpoints" / "last.ckpt")
    codec = codec_from(state["data"])
    assert codec.state() == state["data"] and codec.kind == "latents" and codec.autoencoder["factor"] == 2
    assert not any("decoder" in name for name in state["model"])  # the autoencoder is not in it


def test_editing_goes_through_the_autoencoder(place, run, tmp_path, capsys):
    picture = np.random.default_rng(1).integers(0, 255, (2, 16, 16), dtype=np.uint8)
    for name, pixels in zip("ab", picture, strict=True):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    def edited(task, *more):
        argv = ["--cfg", run / "config.yml", "--ckpt", run / "checkpoints" / "last.ckpt", "--out", tmp_path / task]
        code = edit.main([task, *map(str, argv), "--steps", "2", "--input", str(tmp_path / "a.png"), *more])
        return code, [np.array(Image.open(p)) for p in sorted((tmp_path / task).glob("a*_0?.png"))]

    code, results = edited("inpaint", "--mask", "5,4,9,8")
    kept = np.ones((16, 16), bool)
    kept[4:8, 5:9] = False
    assert code == 0 and all((result[kept] == picture[0][kept]).all() for result in results)
    assert any((result[~kept] != picture[0][~kept]).any() for result in results)
    for task in ("stroke", "denoise"):
        code, results = edited(task)
        assert code == 0 and results[0].shape == (16, 16), task
    code, results = edited("interpolate", str(tmp_path / "b.png"))
    assert code == 0 and len(results) == 8
    for task, *more in (("colorize",), ("superres", "--factor", "2")):
        assert edited(task, *more)[0] == 2
        assert f"{task}: keeps sums of pixels" in capsys.readouterr().err


def test_what_is_hidden_in_a_picture_does_not_reach_its_latents(place, run, tmp_path):
    """The result is the same whatever lies under the mask."""
    results = []
    for name, hidden in (("black", 0), ("white", 255)):
        pixels = np.full((16, 16), 90, np.uint8)
        pixels[4:8, 5:9] = hidden
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        argv = ["inpaint", "--cfg", run / "config.yml", "--ckpt", run / "checkpoints" / "last.ckpt", "--class", "1"]
        argv += ["--input", tmp_path / f"{name}.png", "--out", tmp_path / name, "--mask", "5,4,9,8", "--steps", "2"]
        assert edit.main([str(word) for word in argv]) == 0
        results.append(np.array(Image.open(tmp_path / name / f"{name}_00.png")))
    assert (results[0] == results[1]).all()


# What is wrong is one line --------------------------------------------------------------------------------------------


def test_another_autoencoder_is_refused_before_anything_is_done(place, run, tmp_path, capsys):
    for name, changes, words in (
        ("other", {"seed": 1}, "its weights' SHA-256 is"),
        ("wide", {"latent_channels": 8}, "makes latents of 8 channels, and these have 4"),
    ):
        small_vae(tmp_path / name, **changes)
        argv = ["--cfg", run / "config.yml", "--ckpt", run / "checkpoints" / "last.ckpt", "--out", tmp_path / "g"]
        assert generate.main([*map(str, argv), f"data.autoencoder={tmp_path / name}"]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said and not (tmp_path / "g").exists()
        cfg = latent_run(tmp_path / "run", place, data={"autoencoder": str(tmp_path / name)})
        with pytest.raises(ConfigError, match=words):
            trainer.train(cfg)
        assert not (tmp_path / "run").exists()


def test_where_its_factor_is_another(place, tmp_path):
    cfg = latent_run(tmp_path, place)
    dataset = data.load(cfg.data)
    dataset.autoencoder["hash"] = None  # as where a checkpoint was made by hand
    small_vae(tmp_path / "deep", levels=3)
    with pytest.raises(ConfigError, match="its factor is 4, and theirs is 2"):
        attach([dataset.codec(cfg)], str(tmp_path / "deep"), torch.device("cpu"))


def test_without_its_autoencoder_a_run_says_so_and_goes_on(place, tmp_path, capsys):
    own = {"path": str(EDM2), "flip": False, "scaling": "edm2"}
    trainer.train(latent_run(tmp_path / "run", place, data=own))
    said = capsys.readouterr()
    assert "warning: data.autoencoder: the latents do not say what made them" in said.err
    assert "without sample grids and scores" in said.err and "failed" not in said.out
    assert not (tmp_path / "run" / "samples").exists()
    small_vae(tmp_path / "vae")  # with it the same run goes on, and its checkpoint knows which it was
    more = {**own, "autoencoder": str(tmp_path / "vae")}
    trainer.train(latent_run(tmp_path / "run", place, data=more, train={"steps": 8}), resume=True)
    state = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["data"]["autoencoder"]["hash"] == autoencoder.load(str(tmp_path / "vae")).hash
    assert (tmp_path / "run" / "samples" / "step-00000008.png").exists()
    small_vae(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="is not the autoencoder of these latents"):
        changed = {**own, "autoencoder": str(tmp_path / "other")}
        trainer.train(latent_run(tmp_path / "run", place, data=changed, train={"steps": 9}), resume=True)


def cut(source: Path, path: Path, size: int = -100) -> Path:
    path.write_bytes(source.read_bytes()[:size])
    return path


def zipped(path: Path, arrays: dict[str, np.ndarray], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, array in arrays.items():
            with archive.open(name, "w") as file:
                np.save(file, array)
    return path


def shard(path: Path, **changes) -> Path:
    tensors = {**load_file(SHARD), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    return path


def lying(path: Path) -> Path:
    path.write_bytes(SHARD.read_bytes().replace(b'"shape":[12,16,8,8]', b'"shape":[99,16,8,8]'))
    return path


ROW = np.ones((8, 4, 4), np.float32)
WRONG = {
    "cut shard": (lambda p: cut(SHARD, p / "a"), {}, r"is cut off or damaged: 98,596 bytes, 98,696 by its header"),
    "cut header": (lambda p: cut(SHARD, p / "a", 60), {}, "holds no latents: no file of encode.py, zip of EDM2"),
    "lying header": (lambda p: lying(p / "a"), {}, "has tensors of another size than their place"),
    "cut zip": (lambda p: cut(EDM2, p / "a"), {}, "is no whole zip"),
    "nothing": (lambda p: p / "none", {}, "does not exist; set it to latents"),
    "empty folder": (lambda p: p, {}, "holds no *.safetensors"),
    "pixels": (lambda p: zipped(p / "a", {"a.txt": ROW}), {}, "holds no .npy; images in a zip are data.name: zip"),
    "compressed": (lambda p: zipped(p / "a", {"a.npy": ROW}, 8), {}, "a.npy in .* is compressed"),
    "odd": (lambda p: zipped(p / "a", {"a.npy": ROW[:7]}), {}, r"a.npy in .* is not a float32 or float16 array \(2 c"),
    "unlike": (lambda p: zipped(p / "a", {"a.npy": ROW, "b.npy": ROW[:4]}), {}, "b.npy in .* is no array like a.npy"),
    "channels": (lambda p: SHARD, {"scaling": "edm2"}, "edm2 is for latents of 4 channels, and .* has 16"),
    "flip": (lambda p: EDM2, {"flip": True}, "data.flip: .* a latent cannot be mirrored afterwards"),
    "unmirrored": (lambda p: shard(p / "a", latents_flip=None), {"flip": True}, "a latent cannot be mirrored"),
    "augment": (lambda p: EDM2, {"augment": 0.1}, "data.augment: is for images"),
    "resolution": (lambda p: EDM2, {"resolution": 8}, "data.resolution: is for images"),
    "no labels": (lambda p: shard(p / "a", labels=None), {"conditional": True}, "data.conditional: .* has no labels"),
    "few labels": (lambda p: shard(p / "a", labels=torch.zeros(3).long()), {}, "holds 3 labels for 12 latents"),
    "no tensor": (lambda p: shard(p / "a", latents=None), {}, "has no tensor `latents`; it holds"),
    "shapes": (lambda p: shard(p / "a", latents=torch.ones(12, 16, 8, 4)), {}, r"must be all \(N, c, r, r\)"),
    "not a number": (lambda p: shard(p / "a", latents=torch.full((12, 16, 8, 8), torch.nan)), {}, "0 in .* not finite"),
    "constant": (lambda p: shard(p / "a", latents=torch.ones(12, 16, 8, 8)), {}, "a channel .* never changes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_or_setting_is_one_line(name, tmp_path):
    make, changes, words = WRONG[name]
    own = {"name": "latents", "path": str(make(tmp_path)), **changes}
    with pytest.raises(ConfigError, match=words.replace("*.s", r"\*.s")) as caught:
        cfg = tiny(tmp_path, data=own)
        data.load(cfg.data).codec(cfg)
    assert "\n" not in str(caught.value)


def test_settings_of_latents_are_for_latents():
    for changes, words in (
        ({"data": {"name": "digits", "scaling": "edm2"}}, "data.scaling: is for data.name: latents"),
        ({"data": {"name": "digits", "autoencoder": "a"}}, "data.autoencoder: is for data.name: latents"),
        ({"data": {"name": "latents", "path": "a", "scaling": "sdxl"}}, "data.scaling"),
        (
            {"data": {"name": "latents", "path": "a"}, "objective": {"name": "ct", "s1": 8, "metric": "lpips"}},
            "objective.metric: lpips compares images, and data.name is latents",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            tiny(Path("x"), **changes)
