"""Other people's checkpoints: what comes in and goes out computes the same, and nothing in a file is ever run."""

import functools
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden, relative_error
from torch.nn.functional import one_hot

import checkpoints
import config
import convert
import networks
from checkpoints import common, edm, openai

EDM = GOLDEN / "edm_checkpoint.pkl"
OPENAI, ARCH = GOLDEN / "openai_unet.pt", GOLDEN / "openai_unet.json"
TINY_ADM = {"name": "dhariwal_unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}


def saved(path, shape=(8, 3, 3, 0), **network):
    """A checkpoint with a random network, none of whose weights is zero; shape: size, channels, labels, augment."""
    shape = dict(zip(("resolution", "channels", "label_dim", "augment_dim"), shape, strict=True))
    cfg = config.parse(
        {"network": {"attn_resolutions": [4], **network}, "data": {"conditional": shape["label_dim"] > 0}}
    )
    torch.manual_seed(0)
    model = networks.build(cfg.network.model_dump(), **shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    weights = model.state_dict()
    state = common.new_state(cfg.model_dump(), shape, weights, path)
    state["data"]["class_counts"] = list(range(2, 2 + shape["label_dim"])) or None
    checkpoints.write_state(path, state)
    return path


def refused(*argv, capsys):
    """The one line that a refused command prints; its exit code is 2."""
    assert convert.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


# Import ---------------------------------------------------------------------------------------------------------------


def test_edm_pickle_computes_what_edm_computed(tmp_path, capsys):
    assert convert.main(["import", str(EDM), str(tmp_path / "edm.ckpt")]) == 0
    assert "data.path" in capsys.readouterr().out
    model, io = checkpoints.load_model(tmp_path / "edm.ckpt"), golden("edm_checkpoint_io")
    assert relative_error(model(io["x"], io["sigma"]), io["D"]) < 1e-5
    state = checkpoints.load(tmp_path / "edm.ckpt")
    assert state["step"] == 0 and state["optimizer"] == state["objective"] == state["scaler"] == {}
    assert state["data"]["shape"]["augment_dim"] == 9 and state["data"]["class_counts"] is None
    cfg = config.load(tmp_path / "edm.ckpt.yml")
    assert cfg == checkpoints.config_of(state, "")
    assert (cfg.objective.name, cfg.network.precond, cfg.network.dropout) == ("edm", "edm", 0.13)
    assert (cfg.data.name, cfg.data.path, cfg.data.resolution) == ("zip", "cifar10-32x32.zip", 16)


def test_openai_weights_compute_what_openai_computed(tmp_path):
    convert.import_checkpoint(OPENAI, tmp_path / "cm.ckpt", ARCH)
    model, io = checkpoints.load_model(tmp_path / "cm.ckpt"), golden("openai_unet_io")
    labels = one_hot(io["y"], 10).float()
    assert relative_error(model(io["x"], io["sigma"], labels), io["D"]) < 1e-5
    c_noise = 250 * io["sigma"].log()
    assert relative_error(model.model(io["x"], c_noise, labels), io["F_of_x"]) < 1e-5
    cfg = config.load(tmp_path / "cm.ckpt.yml")
    assert (cfg.network.precond, cfg.network.c_noise, cfg.network.dropout) == ("cm", "log250", 0.1)
    assert model.codec.class_counts == [1] * 10


def test_openai_diffusion_teachers_keep_edms_preconditioning(tmp_path):
    """karras_diffusion.py without distillation: c_skip = sd^2/(s^2+sd^2), c_out = s sd/sqrt(s^2+sd^2), 250 ln s."""
    arch = tmp_path / "arch.json"
    arch.write_text(json.dumps({**json.loads(ARCH.read_text()), "precond": "edm"}))
    convert.import_checkpoint(OPENAI, tmp_path / "edm.ckpt", arch)
    model, io = checkpoints.load_model(tmp_path / "edm.ckpt"), golden("openai_unet_io")
    x, labels, sigma = io["x"], one_hot(io["y"], 10).float(), io["sigma"].reshape(-1, 1, 1, 1)
    total = sigma**2 + 0.25
    F = model.model((x / total.sqrt()).float(), (250 * io["sigma"].log()).float(), labels)
    assert relative_error(model(x, io["sigma"], labels), 0.25 / total * x + 0.5 * sigma / total.sqrt() * F) < 1e-5
    assert config.load(tmp_path / "edm.ckpt.yml").objective.name == "edm"


def to_openai(path, target):
    """Our weights under OpenAI's names: import's own table backwards."""
    model = checkpoints.load_model(path)
    net, own = model.model, model.state_dict()
    names = common.layer_names(net, openai._blocks(net), openai.NAMES)
    weights = {}
    for name, theirs in names.items():
        value = own[name].T if theirs == "label_emb.weight" else own[name]
        if ".qkv." in name:
            heads = net.get_submodule(name.removeprefix("model.").split(".qkv.")[0]).num_heads
            value = value.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
        weights[theirs] = value
    torch.save(weights, target)


@pytest.mark.parametrize("scale_shift_norm", [True, False])  # ImageNet-64, LSUN
def test_openai_structure_is_read_from_the_weights(tmp_path, scale_shift_norm):
    network = {
        **TINY_ADM,
        "model_channels": 64,
        "norm_groups": 32,
        "channel_mult": [1, 1, 2],
        "num_blocks": 2,
        "attn_resolutions": [16, 32],
        "scale_shift_norm": scale_shift_norm,
        "dropout": 0.0,
        "precond": "cm",
        "c_noise": "log250",
    }
    path = saved(tmp_path / "a.ckpt", (64, 3, 0, 0), **network)
    to_openai(path, tmp_path / "a.pt")
    notes = convert.import_checkpoint(tmp_path / "a.pt", tmp_path / "b.ckpt")
    assert "image_size 64, num_head_channels 64, dropout 0.0, precond cm" in notes[0]
    old, new = checkpoints.load(path), checkpoints.load(tmp_path / "b.ckpt")
    cfg = checkpoints.config_of(new, "").network
    assert sorted(cfg.attn_resolutions) == [16, 32]
    assert cfg.model_copy(update={"attn_resolutions": [16, 32]}) == checkpoints.config_of(old, "").network
    assert all(torch.equal(value, old["ema"][0][name]) for name, value in new["ema"][0].items())


def test_openai_arch_is_checked_against_the_weights(tmp_path, capsys):
    arch, told = tmp_path / "a.json", json.loads(ARCH.read_text())
    for change, message in {
        ("channel_mult", (2, 1)): "channel_mult: is [2, 1] there and [1, 2] in",
        ("num_head_channels", 48): "num_head_channels: 48 does not divide",
        ("image_size", "16"): "must be whole numbers",
        ("num_heads", 4): "num_heads: is not known",
        ("dropout", 1.5): "network.dropout",
        ("precond", "ve"): "precond: is cm (consistency) or edm (diffusion), found 've'",
    }.items():
        arch.write_text(json.dumps({**told, change[0]: change[1]}))
        assert message in refused("import", OPENAI, tmp_path / "a.ckpt", "--arch", arch, capsys=capsys)
    arch.write_text("{")
    assert "cannot be read as JSON" in refused("import", OPENAI, tmp_path / "a.ckpt", "--arch", arch, capsys=capsys)
    assert "--arch" in refused("import", EDM, tmp_path / "a.ckpt", "--arch", ARCH, capsys=capsys)


def test_other_weights_are_named(tmp_path, capsys):
    weights = torch.load(OPENAI, weights_only=True)
    for change, message in {
        "no": "it has no output_blocks.1.2.out_layers.0.bias",
        "more": "encoder.weight has no place",
        "conv": "only resblock_updown is supported",
        "shape": "is of another network",
    }.items():
        other = dict(weights)
        if change == "no":
            del other["output_blocks.1.2.out_layers.0.bias"]
        if change == "more":
            other["encoder.weight"] = torch.zeros(1)
        if change == "conv":
            other["output_blocks.1.2.conv.weight"] = torch.zeros(1)
        if change == "shape":
            other["out.0.bias"] = torch.zeros(3)
        torch.save(other, tmp_path / "a.pt")
        assert message in refused("import", tmp_path / "a.pt", tmp_path / "a.ckpt", "--arch", ARCH, capsys=capsys)
    torch.save({"state_dict": weights}, tmp_path / "a.pt")
    assert "it is not a dict of weights" in refused("import", tmp_path / "a.pt", tmp_path / "a.ckpt", capsys=capsys)
    own = saved(tmp_path / "own.ckpt", model_channels=8)
    assert "of this project already" in refused("import", own, tmp_path / "a.ckpt", capsys=capsys)
    assert not (tmp_path / "a.ckpt").exists()


# Files that would run code --------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Named:
    """Pickles as the global `module`.`name`, which need not exist; written by `dumps`."""

    def __init__(self, module, name):
        self.parts = module, name

    def __call__(self):
        """Call takes it for a function."""


def dumps(value, protocol=4):
    class Pickler(pickle._Pickler):
        def save(self, obj, save_persistent_id=True):
            if not isinstance(obj, Named):
                return super().save(obj, save_persistent_id)
            for part in obj.parts:
                super().save(part)
            self.write(pickle.STACK_GLOBAL)

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def legacy(value):
    """torch.save's bytes of before the zip, as they lie within EDM's pickles."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zipped(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


STORAGE = ("torch.storage", "_load_from_bytes")
TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PERSISTENT = ("torch_utils.persistence", "_reconstruct_persistent_obj")
SPRING = "open('sprung', 'w')"  # in the current folder, which is the test's own
HOSTILE = {
    "posix.system": lambda: dumps({"ema": Call(os.system, "touch sprung")}),
    "os.system": lambda: b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch sprung\x85R.",
    "builtins.eval": lambda: dumps(Call(eval, SPRING)),
    "builtins.exec": lambda: dumps([1, {"a": Call(exec, SPRING)}], protocol=2).replace(b"__builtin__", b"builtins"),
    "__builtin__.eval": lambda: dumps({"ema": Call(eval, SPRING)}, protocol=2),
    "subprocess.Popen": lambda: dumps(Call(subprocess.Popen, ["touch", "sprung"])),
    "functools.partial": lambda: dumps(Call(functools.partial(os.system, "touch sprung"))),
    "builtins.getattr": lambda: dumps(Call(getattr, {}, "keys")),
    "operator.attrgetter": lambda: dumps(Call(operator.attrgetter, "__class__.__base__")),
    "importlib.import_module": lambda: dumps(Call(Named("importlib", "import_module"), "os")),
    "torch.serialization.load": lambda: dumps(Call(torch.load, "x")),
    "torch._utils._rebuild_tensor_v2.__globals__": lambda: dumps(
        Named("torch._utils", "_rebuild_tensor_v2.__globals__")
    ),
    "collections.OrderedDict.fromkeys": lambda: dumps(Call(Named("collections", "OrderedDict.fromkeys"), "ab")),
    "torch_utils.persistence._src_to_module": lambda: dumps(
        Call(Named("torch_utils.persistence", "_src_to_module"), SPRING)
    ),
    "posix.system in legacy bytes": lambda: dumps(Call(Named(*STORAGE), legacy(Call(os.system, "touch sprung")))),
    "posix.system in zipped bytes": lambda: dumps(Call(Named(*STORAGE), zipped(Call(os.system, "touch sprung")))),
    "posix.system in a .pt": lambda: zipped({"out.0.weight": Call(os.system, "touch sprung")}),
    "posix.system in an old .pt": lambda: legacy({"out.0.weight": Call(os.system, "touch sprung")}),
    "os.sys\\ntem": lambda: dumps(Named("os", "sys\ntem")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_refused_by_the_name_it_asks_for(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(HOSTILE[name]())
    message = refused("import", "a.pkl", "a.ckpt", capsys=capsys)
    assert message.startswith("a.pkl: refused: it asks for ") and f" {name.split(' in ')[0]}," in message
    assert sorted(os.listdir()) == ["a.pkl"]


def test_the_hostile_files_would_have_run(tmp_path, monkeypatch):
    """The test above can fail: plain pickle.load runs what these files hold."""
    monkeypatch.chdir(tmp_path)
    for name in ("posix.system", "os.system", "builtins.eval"):
        value = pickle.loads(HOSTILE[name]())
        if hasattr(value, "close"):
            value.close()
        assert Path("sprung").exists(), name
        os.remove("sprung")


def test_source_text_in_a_pickle_is_left_unread(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, harmless = EDM.read_bytes(), b"# source text removed"
    assert content.count(harmless) == 1
    Path("a.pkl").write_bytes(content.replace(harmless, SPRING.encode().ljust(len(harmless))))
    assert convert.main(["import", "a.pkl", "a.ckpt"]) == 0
    model, io = checkpoints.load_model("a.ckpt"), golden("edm_checkpoint_io")
    assert relative_error(model(io["x"], io["sigma"]), io["D"]) < 1e-5
    meta = {"type": "class", "version": 6, "module_src": SPRING, "class_name": "Evil", "state": {}}
    Path("b.pkl").write_bytes(dumps({"ema": Call(Named(*PERSISTENT), meta)}))
    capsys.readouterr()
    assert "of class Evil; only EDMPrecond" in refused("import", "b.pkl", "b.ckpt", capsys=capsys)
    assert not Path("sprung").exists()


def test_what_a_pickle_can_name_it_cannot_change(tmp_path):
    """BUILD sets attributes: on this load's own functions and classes only."""
    state = (None, {"__defaults__": (1, 2), "__kwdefaults__": {"a": 1}})
    for name in (TENSOR, PERSISTENT, ("torch.nn.modules.container", "ModuleDict"), ("collections", "OrderedDict")):
        stream = dumps(Named(*name))[:-1] + dumps(state)[2:-1] + b"b."
        (tmp_path / "a.pkl").write_bytes(stream)
        with pytest.raises(checkpoints.CheckpointError):
            edm.read(tmp_path / "a.pkl")
    assert relative_error(model_of(EDM)(*inputs()), golden("edm_checkpoint_io")["D"]) < 1e-5


def model_of(path):
    return checkpoints.model_from(convert.read(path)[0], path)


def inputs():
    io = golden("edm_checkpoint_io")
    return io["x"], io["sigma"]


def test_tensors_stay_within_their_storage(tmp_path):
    content = EDM.read_bytes()
    shape = pickle.BININT1 + bytes([32]) + pickle.BININT1 + bytes([9]) + pickle.TUPLE2
    assert shape in content
    (tmp_path / "a.pkl").write_bytes(content.replace(shape, shape[:1] + bytes([33]) + shape[2:], 1))
    with pytest.raises(checkpoints.CheckpointError, match="setStorage: sizes \\[33, 9\\]"):
        edm.read(tmp_path / "a.pkl")


def test_damaged_files_are_one_line(tmp_path, capsys):
    content = {"pkl": EDM.read_bytes(), "pt": OPENAI.read_bytes()}
    for kind, whole in content.items():
        path = tmp_path / f"a.{kind}"
        for part in (0, 1, 5, 30, 1000, 20_000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:part])
            assert f"a.{kind}: " in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    for other in (b"GIF89a", b"PK\x03\x04" + bytes(50), b"\x80\x04N.", b"\x80\x04}.", bytes(range(256))):
        path.write_bytes(other)
        assert "a.pt: " in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    path.write_bytes(struct.pack("<Q", 50) + b'{"a": 1')
    assert "a.pt: " in refused("import", path, tmp_path / "a.ckpt", capsys=capsys)
    assert "No such file" in refused("import", tmp_path / "none.pkl", tmp_path / "a.ckpt", capsys=capsys)
    assert "Is a directory" in refused("import", tmp_path, tmp_path / "a.ckpt", capsys=capsys)
    assert not (tmp_path / "a.ckpt").exists()


def test_changed_bytes_give_one_line_or_a_model(tmp_path):
    whole, path = EDM.read_bytes(), tmp_path / "a.pkl"
    refusals = 0
    for i in range(30):
        place = 661 * i + 3  # the first 20 kB are names and settings, the rest mostly numbers
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << i % 8)]) + whole[place + 1 :])
        try:
            checkpoints.model_from(edm.read(path)[0], path)
        except config.ConfigError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals


# Nothing is written over ----------------------------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path, capsys):
    for there in ("a.ckpt", "a.ckpt.yml"):
        (tmp_path / there).write_text("mine")
        message = refused("import", EDM, tmp_path / "a.ckpt", capsys=capsys)
        assert there in message and "nothing is written over" in message
        assert sorted(os.listdir(tmp_path)) == [there] and (tmp_path / there).read_text() == "mine"
        os.remove(tmp_path / there)
    path = saved(tmp_path / "a.ckpt", model_channels=8)
    (tmp_path / "out").mkdir()
    assert "nothing is written over" in refused("export", path, tmp_path / "out", "--to", "onnx", capsys=capsys)
    assert not os.listdir(tmp_path / "out")


def test_the_command_line_is_one_line_too(tmp_path, capsys):
    for argv in (["import", "a"], ["export", "a", "b", "--to", "keras"], ["publish"], []):
        with pytest.raises(SystemExit) as stop:
            convert.main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert "no such checkpoint" in refused("export", tmp_path / "no", tmp_path / "d", "--to", "onnx", capsys=capsys)


# Export ---------------------------------------------------------------------------------------------------------------


def one_step(model, labels):
    torch.manual_seed(1)
    z = torch.randn(len(labels), model.img_channels, model.img_resolution, model.img_resolution)
    return z, model(80 * z, torch.full((len(z),), 80.0), one_hot(labels, model.label_dim).float())


@pytest.mark.filterwarnings("ignore")  # diffusers' own
@pytest.mark.parametrize("source", ["ours", "without attention", "openai"])
def test_diffusers_makes_the_same_images(tmp_path, source, capsys):
    pytest.importorskip("safetensors")
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path / "a.ckpt"
    network = {**TINY_ADM, "precond": "cm", "c_noise": "log250", "sigma_data": 0.4}
    if source == "ours":  # augmentation labels have no counterpart and no effect; heads of 64 in 128 channels
        saved(path, (8, 3, 10, 9), **{**network, "model_channels": 128})
    elif source == "without attention":  # heads would be wider than any level
        saved(path, (8, 3, 10, 0), **network, norm_groups=8, scale_shift_norm=False)
    else:
        convert.import_checkpoint(OPENAI, path, ARCH)
    assert convert.main(["export", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    files = {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor([3, 9])
    z, x = one_step(checkpoints.load_model(path), labels)
    made = pipe(2, class_labels=labels, latents=z.clone(), num_inference_steps=1, output_type="pt").images
    assert float((made - (x.clamp(-1, 1) + 1) / 2).abs().max()) < 1e-3
    assert float(x.std()) > 0.1 and float((x.abs() > 1).float().mean()) < 0.3  # pictures that can differ


@pytest.mark.parametrize(
    ("network", "what"),
    [
        ({"model_channels": 8}, "SongUNet"),
        ({**TINY_ADM, "precond": "edm"}, "network.precond: edm"),
        ({**TINY_ADM, "c_noise": "log"}, "network.c_noise: log"),
        ({**TINY_ADM, "pixel_norm": True}, "network.pixel_norm: True"),
        (TINY_ADM, r"group norms of \[4, 8, 12, 16\] groups"),
        ({**TINY_ADM, "model_channels": 128, "channel_mult_emb": 2}, "width of the noise embedding"),
        ({**TINY_ADM, "model_channels": 160, "attn_resolutions": [8]}, r"heads of \[64\.0, 80\.0\] channels"),
    ],
)
def test_diffusers_says_what_it_lacks(tmp_path, network, what, capsys):
    pytest.importorskip("safetensors")
    path = saved(tmp_path / "a.ckpt", **{"precond": "cm", "c_noise": "log250", **network})
    with pytest.raises(checkpoints.CheckpointError, match=what) as error:
        convert.export_checkpoint(path, tmp_path / "out", "diffusers")
    assert str(error.value).startswith("--to diffusers: no counterpart") and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.ckpt"]  # and no part of a folder


def test_safetensors_there_and_back(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = saved(tmp_path / "a.ckpt", model_channels=8, precond="cm", dropout=0.2)
    convert.export_checkpoint(path, tmp_path / "out", "safetensors")
    file = tmp_path / "out" / "model.safetensors"
    with safetensors.safe_open(file, "pt") as content:
        assert json.loads(content.metadata()["config"])["network"]["dropout"] == 0.2
    convert.import_checkpoint(file, tmp_path / "b.ckpt")
    old, new = checkpoints.load(path), checkpoints.load(tmp_path / "b.ckpt")
    assert new["config"] == old["config"] and new["data"] == old["data"] and new["data"]["class_counts"] == [2, 3, 4]
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 50.0]), torch.eye(3)[:2]
    same = [checkpoints.load_model(p)(x, sigma, labels) for p in (path, tmp_path / "b.ckpt")]
    assert torch.equal(*same)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b'\\"precond\\": \\"cm\\"', b'\\"precond\\": \\"no\\"')):
        file.write_bytes(damaged)
        with pytest.raises(config.ConfigError, match="safetensors") as error:
            convert.import_checkpoint(file, tmp_path / "c.ckpt")
        assert "\n" not in str(error.value)


def test_onnx_computes_the_same_for_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = saved(tmp_path / "a.ckpt", model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[])
    convert.export_checkpoint(path, tmp_path / "out", "onnx")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    model = checkpoints.load_model(path)
    for batch in (1, 5):
        x, sigma = torch.randn(batch, 3, 8, 8), torch.linspace(0.01, 80, batch)
        labels = torch.eye(3)[torch.arange(batch) % 3]
        made = session.run(None, {"x": x.numpy(), "sigma": sigma.numpy(), "class_labels": labels.numpy()})[0]
        assert relative_error(torch.from_numpy(made), model(x, sigma, labels)) < 1e-4


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_missing_packages_are_named(tmp_path, monkeypatch, to, package):
    path = saved(tmp_path / "a.ckpt", model_channels=8)
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(checkpoints.CheckpointError, match=r"needs .*; pip install -r requirements-dev\.txt"):
        convert.export_checkpoint(path, tmp_path / "out", to)
