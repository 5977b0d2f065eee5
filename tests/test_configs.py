"""The published recipes: each passes the schema, builds its network and objective, and fits what it starts from."""

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml

import config
import networks
from config import rules
from sources.augment import AUGMENT_DIM
from training import own_images
from training.build import build_objective

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yml"))}
CLASSES = {"cifar10": 10, "mnist": 10, "imagenet9": 9, "folder": 1000}  # the only labelled folder is ImageNet's
VECTORS = {"policy_pendulum": {"shape": (1,), "condition_dim": 3}}  # a torque, given cos, sin and speed
LATENTS = {  # pixels, channels and classes
    "photos_latents_edm": (16, 4, 10),
    "photos_latents": (16, 4, 10),
    "imagenet256_meanflow_b4": (32, 4, 1000),
    "imagenet256_imf_b2": (32, 4, 1000),
    "imagenet512_edm2_s": (64, 4, 1000),
}
NATIVE = {"cifar10": (32, 3), "mnist": (32, 1)}  # pixels and channels

# Millions of parameters, as published: DDPM++ and NCSN++ in 2406.14548 table 1, ADM in 2105.05233 table 9, EDM2 in
# 2312.02696 table 3
PUBLISHED = {
    "cifar10_edm": 55.7,
    "cifar10_ect": 55.7,
    "cifar10_tcm": 55.7,
    "cifar10_cmt": 55.7,
    "cifar10_ct": 56.4,
    "cifar10_cd": 56.4,
    "cifar10_pd": 56.4,
    "cifar10_ict": 56.4,
    "imagenet64_edm": 296,
    "imagenet64_cd": 296,
    "imagenet64_ct": 296,
    "imagenet64_scd": 296,
    "imagenet64_edm2_s": 280,
    "imagenet64_ect_edm2_s": 280,
    "imagenet512_edm2_s": 280,
    "imagenet256_meanflow_b4": 131,
}


def header(path: Path) -> str:
    """The comment that a config starts with, its broken lines joined."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines).replace("\\\n", "")


@functools.cache
def load(path: Path, *overrides: str) -> config.Config:
    return config.load(path, list(overrides))


def commands(path: Path) -> list[config.Config]:
    """The configs of the training commands in a config's header."""
    found = re.findall(r"main\.py --cfg (\S+)(.*)", header(path))
    return [load(ROOT / name, *overrides.split()) for name, overrides in found]


def build(cfg: config.Config) -> networks.Preconditioner:
    """The config's network, without memory for its weights."""
    if cfg.network.name == "mlp":
        return networks.build(cfg.network.model_dump(), **VECTORS[cfg.run.name])
    if cfg.data.name == "latents":
        with torch.device("meta"):
            return networks.build(cfg.network.model_dump(), *LATENTS[cfg.run.name])
    resolution, channels = NATIVE.get(cfg.data.name, (cfg.data.resolution, cfg.data.channels))
    label_dim = CLASSES[cfg.data.name] if cfg.data.conditional else 0
    augment_dim = AUGMENT_DIM if cfg.data.augment else 0
    with torch.device("meta"):
        return networks.build(cfg.network.model_dump(), resolution, channels, label_dim, augment_dim)


def millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name", FILES)
def test_network_and_objective_build(name):
    cfg = load(FILES[name])
    if rules.undecided(cfg):  # images.yml
        seen = own_images.Look("folder", "photos", 50_000, [(640, 480)], 1, {})
        cfg = own_images.filled(cfg, {key: value for key, value, _ in own_images.choose(seen, None, on_gpu=True)})
    model = build(cfg)
    if name in PUBLISHED:
        assert millions(model) == pytest.approx(PUBLISHED[name], rel=0.005)
    if getattr(cfg.objective, "metric", None) == "lpips":  # VGG's weights may not be here
        cfg = load(FILES[name], "objective.metric=l2")
    assert isinstance(build_objective(cfg, model, model), torch.nn.Module)


def test_adm_at_256_pixels_has_its_published_size():
    """552M with AdaGN (2105.05233 table 9, LSUN); OpenAI's consistency models go without."""
    path = FILES["lsun256_ct"]
    assert millions(build(load(path, "network.scale_shift_norm=true"))) == pytest.approx(552, rel=3e-3)
    assert millions(build(load(path))) == pytest.approx(526, rel=1e-3)


def test_ict_deep_has_twice_the_blocks():
    assert millions(build(load(FILES["cifar10_ict"], "network.num_blocks=8"))) == pytest.approx(97.6, rel=1e-3)


@functools.cache
def every_run() -> dict[Path, config.Config]:
    """Run folder -> config: every file, and every command in a header."""
    cfgs = [load(path) for path in FILES.values()]
    for path in FILES.values():
        cfgs += commands(path)
    return {cfg.run.folder: cfg for cfg in reversed(cfgs)}  # a file before the commands that run it


@functools.cache
def pairs() -> list:
    """(name, the config that starts from another run's weights, that run's folder)."""
    found = []
    for name, path in FILES.items():
        for i, cfg in enumerate([load(path), *commands(path)]):
            for key, source in (
                ("teacher", getattr(cfg.objective, "teacher", None)),
                ("init_from", cfg.train.init_from),
            ):
                if source:
                    found.append(pytest.param(cfg, Path(source), id=f"{name}-{i}-{key}"))
    return found


@pytest.mark.parametrize(("student", "source"), pairs())
def test_a_student_has_the_network_of_the_run_it_starts_from(student, source):
    assert source.parts[-2] == "checkpoints" and source.name in ("last.ckpt", "std-0.075.ckpt")
    teacher = every_run()[source.parent.parent]
    ours, theirs = student.network.model_dump(), teacher.network.model_dump()
    for key in ("precond", "dropout", "dropout_max_resolution"):  # what may change: the boundary, and regularisation
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
    # The weights of either clock fit the other where the noise label is the same (2410.11081 sec. 3).
    either = student.network.c_noise == teacher.network.c_noise and student.network.c_noise in ("log", "log250")
    either = either and (student.train.init_from is not None or student.objective.name == "scd")
    assert either or (student.network.precond == "trigflow") == (teacher.network.precond == "trigflow")
    wanted = {"cd": "edm", "pd": "edm", "cmt": "edm", "scd": "trigflow", "sct": "trigflow", "tcm": "ect"}
    if student.objective.name in wanted:
        assert teacher.objective.name in (wanted[student.objective.name], "edm" if either else None)
    for key in ("name", "resolution", "channels", "conditional"):
        assert getattr(student.data, key) == getattr(teacher.data, key)


def test_pairs_are_those_we_publish():
    """The test above sees every method that starts from another's weights."""
    assert {p.values[0].objective.name for p in pairs()} == {"cd", "pd", "cmt", "sct", "scd", "tcm", "ect"}
    assert len(pairs()) >= 15


@pytest.mark.parametrize("name", FILES)
def test_headers_say_the_figure_the_command_and_the_way_without_vgg(name):
    path, cfg = FILES[name], load(FILES[name])
    assert cfg.run.name == name
    assert re.search(r"Published.*FID \d+\.\d+|No published recipe", header(path), re.DOTALL)
    if getattr(cfg.objective, "teacher", None):
        runs = [c for c in commands(path) if c.run.name == name]
        assert len(runs) == 1 and runs[0].objective.name == cfg.objective.name
    if getattr(cfg.objective, "metric", None) == "lpips":
        assert re.search(r"cannot be had: (objective\.)?metric[=:] ?(l2|pseudo_huber)", path.read_text())


def test_cmt_goes_on_to_ect_with_a_constant_q_of_4096():
    mid, ect = commands(FILES["cifar10_cmt"])
    assert mid.objective.name == "cmt" and mid.train.lr_decay == "linear"
    assert (ect.objective.q, ect.objective.double_kimg, ect.train.lr_decay) == (4096, None, "linear")
    assert ect.train.steps * ect.train.batch_size == 12_800_000
    assert mid.train.steps * mid.train.batch_size == 38_400_000


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.yml")), ids=lambda path: path.stem)
def test_every_row_of_a_benchmark_is_a_config_of_any_length(path):
    rows = yaml.safe_load(path.read_text())
    if isinstance(rows, dict):  # a config itself, that rows share
        rows = [{"name": "itself", "cfg": path.relative_to(ROOT)}]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert {row.get("teacher"), row.get("init_from")} <= {None, *names}
        teacher = [f"objective.teacher={row['teacher']}"] if "teacher" in row else []
        for steps in ([], ["train.steps=30"], ["train.steps=10000"]):
            config.load(ROOT / row["cfg"], [*row.get("set", []), *teacher, *steps])


@pytest.mark.parametrize("path", [ROOT / "config.yml", *FILES.values()], ids=lambda path: path.stem)
@pytest.mark.parametrize("steps", [30, 10_000])
def test_the_length_of_a_run_alone_is_a_valid_edit(path, steps):
    assert load(path, f"train.steps={steps}").train.steps == steps


@pytest.mark.parametrize(
    ("name", "key", "steps"),
    [
        ("cifar10_edm", "train.lr_warmup", 10_000_000 // 512),
        ("cifar10_trigflow", "train.lr_warmup", 10_000_000 // 512),
        ("imagenet64_edm", "train.lr_warmup", 10_000_000 // 4096),
        ("imagenet64_edm2_s", "train.lr_warmup", 10_000_000 // 2048 + 1),
        ("imagenet64_edm2_s", "ema.snapshot_every", 2**23 // 2048),
        ("cifar10_meanflow", "train.lr_warmup", 9600),
        ("mnist_edm", "train.lr_warmup", 50),
        ("mnist", "train.lr_warmup", 28),
        ("mnist", "objective.warmup", 1400),
        ("mnist", "sample.every", 700),
        ("policy_pendulum", "train.lr_warmup", 100),
        ("policy_pendulum", "train.log_every", 1000),
        ("policy_pendulum", "train.save_every", 3000),
    ],
)
def test_a_share_is_the_published_or_measured_number_of_steps(name, key, steps):
    cfg = load(FILES[name])
    section, setting = key.split(".")
    assert config.in_steps(getattr(getattr(cfg, section), setting), cfg.train.steps) == steps


def test_a_policy_has_six_stages_of_a_thousand_steps():
    cfg = load(FILES["policy_pendulum"])
    stage = config.in_steps(cfg.objective.stage, cfg.train.steps, whole=False)
    assert [k // stage for k in range(cfg.train.steps)] == [k // 1000 for k in range(6000)]
