"""benchmarks/gpu.sh on a CPU: every piece from end to end, with a tiny network, and what comes back."""

import copy
import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image
from torch.nn.utils import parameters_to_vector

import checkpoints
from training import trainer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from gpu_table import distances  # noqa: E402
from original import find_parts  # noqa: E402
from original_ect import OriginalECT  # noqa: E402
from originals import Original  # noqa: E402

TINY = "network.model_channels=32 network.channel_mult=[1] network.num_blocks=1 network.attn_resolutions=[] "
TINY += "train.batch_size=16 train.compile=false train.precision=fp32 metrics.num=100 sample.grid=4"
THEIRS = {  # what benchmarks/originals.py calls of the original ECT code
    "networks": """
import torch

class ECMPrecond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, model_type, sigma_data, **settings):
        super().__init__()
        import networks
        ours = {"name": "song_unet", "precond": "edm", "c_noise": "log", "times": None, "heads": 1}
        ours |= {"guidance_inputs": False, "sigma_data": sigma_data, "sigma_min": 0.002, "sigma_max": 80.0}
        self.whole = [networks.build({**ours, **settings}, img_resolution, img_channels)]
        self.model = self.whole[0].model

    def forward(self, x, sigma, labels=None, augment_labels=None):
        return self.whole[0](x, sigma.flatten())
""",
    "loss": """
import torch

class ECMLoss:
    def __init__(self, P_mean, P_std, sigma_data, q, c, adj):
        self.q = q

    def update_schedule(self, stage):
        self.gap = 1 / self.q ** (stage + 1)

    def __call__(self, net, images, labels=None):
        torch.cuda.get_rng_state()
        t = torch.ones(len(images), 1, 1, 1)
        with torch.no_grad():
            target = net(images, (1 - self.gap) * t)
        return (net(images, t) - target).square().flatten(1).sum(1).sqrt() / self.gap
""",
}
# Starting Python and importing torch takes longer than all else: one process does it, and forks for every command.
SERVER = """
import json, os, runpy, socket, sys
root, path = sys.argv[1:]
sys.path[:0] = [root, f"{root}/benchmarks"]
import common, compare, gpu_table, original, quality, scaling, step  # noqa
from diffusers import UNet2DModel  # noqa
quality.pyplot()
common.matmul_peak(common.torch.device("cpu"), "fp32", 1.0)  # once: its cache is forked with the rest
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
while True:
    client, _ = server.accept()
    words, files, _, _ = socket.recv_fds(client, 65536, 3)
    if child := os.fork():
        client.close()
        [os.close(file) for file in files]
        os.waitpid(child, 0)
        continue
    [os.dup2(file, i) for i, file in enumerate(files)]
    status, sys.argv = 0, json.loads(words)
    try:
        if sys.argv[0] == "-":
            exec(sys.stdin.read(), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        status and print(end.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    client.send(str(status).encode())
    os._exit(0)
"""
CLIENT = """#!{python} -SE
import json, os, socket, sys
if sys.argv[1] == "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
socket.send_fds(server, [json.dumps(sys.argv[1:]).encode()], [0, 1, 2])
sys.exit(int(server.recv(8) or 1))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """(environment, folder) of a machine where the file finds data and the ECT checkout in .gpu, and nothing else."""
    folder = tmp_path_factory.mktemp("gpu")
    own, out = folder / ".gpu", folder / "out"
    own.mkdir()
    out.mkdir()
    make_checkout(own / "ect")
    pack(own / "cifar10.tar.xz")
    path, python = str(folder / "socket"), folder / "python"
    python.write_text(CLIENT.format(python=sys.executable, path=path))
    python.chmod(0o755)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": str(python), "OUT": str(out)}
    env |= {"GPU_FILES": str(own), "WORK": str(folder / "work"), "TINY": f"{TINY} data.dir={folder}/data"}
    env |= {"PIXELS": "8", "STEPS": "1", "WARMUP": "1", "JOBS": "0", "TESTS": "tests/test_augment.py"}
    env |= {"BATCHES": "16", "RESOLUTIONS": "", "WIDTHS": ""}
    env |= {"EDM_MINUTES": "0.004", "ROW_MINUTES": "0.004"}
    server = subprocess.Popen([sys.executable, "-c", SERVER, ROOT, path], env=env, cwd=ROOT)
    try:
        while not Path(path).exists():
            assert server.poll() is None
            time.sleep(0.1)
        yield env, folder
    finally:
        server.kill()
        server.wait()


def make_checkout(folder):
    (folder / "training").mkdir(parents=True)
    for name, code in {"__init__": "", **THEIRS}.items():
        (folder / "training" / f"{name}.py").write_text(code)


def pack(path):
    """100 noisy 8x8 images of 2 classes, with EDM's dataset.json, as .gpu/cifar10.tar.xz has them."""
    generator, labels = np.random.default_rng(0), []
    with tarfile.open(path, "w:xz") as tar:

        def add(name, content):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, BytesIO(content))

        for i in range(100):
            file = BytesIO()
            pixels = generator.integers(0, 128, (8, 8, 3)) + 127 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
            add(f"{i:05}.png", file.getvalue())
            labels.append([f"{i:05}.png", i % 2])
        add("dataset.json", json.dumps({"labels": labels}).encode())


def call(env, *pieces, **more):
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *pieces]
    done = subprocess.run(command, env={**env, **more}, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def averaged(folder, name):
    return checkpoints.load(folder / "work" / "train" / f"{name}-seed0" / "checkpoints" / "last.ckpt")["ema"][0]


def test_every_piece_runs_and_its_figures_come_back(machine):
    env, folder = machine
    status, said = call(env, *"123456789")
    assert status == 0, said
    with tarfile.open(folder / "out" / "gpu.tar.gz") as tar:
        tar.extractall(folder / "home", filter="data")
        assert not [name for name in tar.getnames() if name.endswith((".ckpt", ".zip"))]
    home = folder / "home"
    found = json.loads((home / "all_gpu.json").read_text())
    for r in found["originals"]:
        assert r["ratio"] == pytest.approx(r["theirs"]["seconds"] / r["ours"]["seconds"], rel=0.5)
        for side in (r["ours"], r["theirs"]):
            assert side["images_per_second"] > 0 and 0 < side["share_of_peak"] < 1 and side["peak_memory"] > 0
    assert sorted(r["stage"] for r in found["originals"]) == [0, 15, 15]  # EDM and MeanFlow have no checkout here
    methods = {r["what"].split()[0].strip(",") for r in found["steps"]}
    assert methods == {
        "edm",
        "sct",
        "scd",
        "tcm",
        "cmt",
        "pd",
        "imf",
        "meanflow",
        "soflow",
        *("ect", "ict", "ct", "cd"),
    }
    assert all(r["images_per_second"] > 0 and 0 < r["share_of_peak"] < 1 for r in found["steps"])
    rows = {r["name"]: r for r in found["rows"]}
    ect = ["edm+ect", "edm+ect-original", "edm+ect-low", "edm+ect-low-original"]
    assert set(rows) == {"edm", *ect, "edm+sct", "edm+meanflow", "edm+soflow", "meanflow"}
    assert all(np.isfinite(r["scores"][kind]["fid"]) for r in rows.values() for kind in r["scores"])
    for name in ect:
        assert rows[name]["images"] > 0 and set(rows[name]["scores"]) == {"1-step", "2-step"}
        curve = [json.loads(line) for line in (home / f"train/{name}-seed0/metrics.jsonl").read_text().splitlines()]
        assert any("fid" in entry for entry in curve)
    first, last = (averaged(folder, name) for name in ("edm", "edm+ect-original"))
    assert max(float((first[name] - weights).abs().max()) for name, weights in last.items()) > 1e-5  # theirs is scored
    share = rows["edm+ect"]["scores"]["1-step"]["fid"] / rows["edm+ect-original"]["scores"]["1-step"]["fid"]
    table = (home / "gpu.md").read_text()
    assert f"| {share:.2f} |" in next(line for line in table.splitlines() if line.startswith("| edm+ect |"))
    assert (home / "train" / "curves.png").stat().st_size > 1000 and list(home.glob("train/edm-seed0/samples/*.png"))
    assert (home / "compare_gpu.json").exists() and (home / "scaling_gpu.json").exists()


def test_what_is_done_is_not_done_again_and_what_has_no_time_waits(machine):
    env, folder = machine
    status, said = call(env, "2", "3")
    assert status == 0 and "+ " not in said.split("Beside the originals")[0], said
    status, said = call(env, "3", WORK=str(folder / "other"), MINUTES="0")
    assert status == 0 and "no time for train_edm: the same command goes on with it" in said
    assert "Not yet measured." in said


def test_a_piece_that_fails_leaves_the_others_their_turn_and_is_told(machine):
    env, folder = machine
    status, said = call(env, "3", "1", WORK=str(folder / "third"), CFG="nowhere.yml")
    assert status == 1 and "train_edm: failed (1)" in said and (folder / "third" / "tests.done").exists()
    assert call(env, "10", WORK=str(folder / "third"))[0] == 2


def test_the_original_trains_in_our_loop_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    make_checkout(tmp_path / "ect")
    monkeypatch.setattr(trainer, "TrainingStep", partial(OriginalECT, tmp_path / "ect"))
    cfg = tiny(tmp_path / "run", network={"dropout": 0.0}, ema={"decay": [0.5]})
    run = trainer.Trainer(cfg)
    step, batch = run.train_step, run.dataset.read(torch.arange(16))
    networks = (step.model.model, step.original.network.model, step.emas[0].module.model)
    start = parameters_to_vector(networks[0].parameters()).clone()
    for _ in range(2):
        step(*batch)
    ours, theirs, average = (parameters_to_vector(network.parameters()) for network in networks)
    assert torch.equal(ours, theirs) and step.step == 2
    assert 1e-5 < (average - start).abs().max() < 0.9 * (ours - start).abs().max()
    again = trainer.Trainer(cfg).train_step
    again.load_state(copy.deepcopy(step.state()))
    for one in (step, again):
        one(*batch)
    assert torch.equal(step.flat.vector, again.flat.vector)


def test_where_memory_does_not_hold_the_batch_the_original_takes_it_in_parts():
    layer, images = torch.nn.Linear(4, 1), torch.randn(8, 4)

    def loss(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return layer(x).square().mean()

    side = Original(layer, loss, torch.optim.SGD(layer.parameters(), lr=0.0), average=lambda: None)
    find_parts(side, lambda: side.step(images), 8)
    assert side.microbatch == 2
    whole = torch.autograd.grad(layer(images).square().mean(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, whole)


def test_a_rows_share_is_of_the_originals_distance():
    row = {"seed": 0, "features": "classifier features", "starts_from": "edm", "minutes": 3, "images": 9}
    row |= {"hardware": "H100", "torch": "2.11", "commit": "c", "date": "d"}
    scores = [{"1-step": {"fid": fid}, "2-step": {"fid": 1.0}} for fid in (3.0, 6.0)]
    found = [{**row, "name": name, "scores": s} for name, s in zip(("ect", "ect-original"), scores, strict=True)]
    assert "| 1-step: 3, 2-step: 1 | 0.50 |" in distances(found) and distances(found).count("0.50") == 1
