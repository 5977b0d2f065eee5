"""The fast path computes what the plain one does: precision, compiler, checkpointing, microbatches, no waiting."""

import contextlib
import time

import pytest
import torch
from conftest import EVERY, every_objective, tiny
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import config
import data
from networks.layers import UNetBlock
from objectives.draws import Draws
from training import diagnose, speed, trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def one_step(cfg):
    """(loss, gradient) of a training step that moves nothing."""
    run = trainer.Trainer(cfg)
    step = run.train_step
    torch.manual_seed(1)
    with torch.no_grad():  # fresh, the network's last layers are almost zero, and its output with them
        step.flat.vector.add_(0.05 * torch.randn_like(step.flat.vector))
    step.update = lambda lr: None
    step(run.dataset.images[:16].to(run.device), None)
    return float(step.sums["loss"]), step.gradient.double().cpu()


def difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [name for name in EVERY if name != "tcm"])
def test_bf16_gives_the_loss_and_gradient_of_fp32(name, teacher, tmp_path):
    """To bfloat16's 8 bits. Not TCM: its pair differs by t / 1000, less than two bfloat16 outputs do by rounding."""
    settings = {"network": {"dropout": 0.0, "model_channels": 8}}
    (loss, gradient), (low_loss, low_gradient) = (
        one_step(every_objective(tmp_path, name, teacher, **settings, train={"precision": precision}))
        for precision in ("fp32", "bf16")
    )
    assert low_loss == pytest.approx(loss, rel=0.05)
    assert 0 < difference(low_gradient, gradient) < 0.15


SMALL = {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "model_channels": 4}


@pytest.mark.parametrize("name", ["ect", "sct"])
def test_the_compiled_step_is_the_eager_one(name, teacher, tmp_path, without_kernels):
    """Both passes' dropout masks and the JVP included."""
    settings = {"network": {**SMALL, "dropout": 0.5}}
    loss, gradient = one_step(every_objective(tmp_path, name, teacher, **settings))
    assert not without_kernels
    again = one_step(every_objective(tmp_path, name, teacher, **settings, train={"compile": "reduce-overhead"}))
    assert again[0] == pytest.approx(loss, rel=1e-5) and difference(again[1], gradient) < 1e-4
    assert without_kernels == [None, "reduce-overhead", "reduce-overhead"]  # the trial, the network, its derivative


@pytest.mark.parametrize("derivative", ["forward_mode", "difference"])
def test_each_phase_of_meanflow_is_one_graph(derivative, tmp_path, without_kernels):
    """With dropout, in bf16. Eager on a CPU it picks the rows with r < t, whose number is another in every step."""
    objective = {"name": "meanflow", "flow": 2, "derivative": derivative}
    settings = {"network": {**SMALL, "dropout": 0.3}, "train": {"compile": True, "precision": "bf16"}}
    run = trainer.Trainer(tiny(tmp_path, objective=objective, **settings))
    batch, compiled = run.dataset.read(torch.arange(16)), []
    torch._dynamo.reset()
    for _ in range(5):
        run.train_step(*batch)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[1] < compiled[2] == compiled[3] == compiled[4]
    assert run.train_step.means()["loss"] > 0 and not run.train_step.skipped


def test_without_a_compiler_training_goes_on_and_says_so_once(tmp_path, capsys):
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # Not by monkeypatch, which cannot put these back: the tests after this one in the process would not compile.
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), torch.compiler.config.patch(force_disable_caches=True):
        trainer.train(tiny(tmp_path / "a", train={"compile": True}))
    said = capsys.readouterr()
    assert said.err.count("warning: train.compile: nothing compiles here, training goes on without") == 1
    assert len([line for line in said.err.splitlines() if "compile" in line]) == 1 and "step 6/6" in said.out
    trainer.train(tiny(tmp_path / "b", train={"compile": False}))
    assert "compile" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ect", "sct"])
def test_checkpointing_changes_no_bit_and_computes_blocks_again(name, teacher, tmp_path, monkeypatch):
    calls, real = [], UNetBlock.compute
    monkeypatch.setattr(UNetBlock, "compute", lambda self, *inputs: calls.append(self) or real(self, *inputs))
    settings = {"network": {"dropout": 0.3}}
    loss, gradient = one_step(every_objective(tmp_path, name, teacher, **settings, train={"microbatch": 8}))
    plain, calls[:] = len(calls), []
    again = one_step(
        every_objective(tmp_path, name, teacher, **settings, train={"microbatch": 8, "checkpointing": True})
    )
    assert again[0] == loss and torch.equal(again[1], gradient)
    blocks = len(set(calls))
    assert len(calls) == plain + 2 * blocks  # once more in each of two passes' backward; the target needs none


def test_microbatch_auto_halves_until_a_pass_fits_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, train={"microbatch": "auto", "steps": 2}, network={"dropout": 0.0})
    run = trainer.Trainer(cfg)
    step = run.train_step
    tried, real = [], step.objective.forward

    def of_a_small_gpu(model, x, **rest):
        tried.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, x, **rest)

    step.objective.forward = of_a_small_gpu
    before = step.flat.vector.clone()
    diagnose.find_microbatch(step, run.dataset.read)
    assert tried == [16, 8, 4] and step.microbatch == 4
    assert torch.equal(step.flat.vector, before) and not step.gradient.any()
    with run.opened():
        run.loop()  # on a CPU it asks no more
    assert tried[3:] == [4] * 8 + [1]  # two steps of the whole batch; one row, whose operations are counted
    longer = trainer.Trainer(tiny(tmp_path, train={"microbatch": "auto", "steps": 4}, network={"dropout": 0.0}))
    assert longer.train_step.microbatch == 16
    longer.resume()
    assert longer.train_step.microbatch == 4


def test_ranks_agree_on_one_microbatch(tmp_path, monkeypatch):
    """This rank had room for all; another had not."""
    run = trainer.Trainer(tiny(tmp_path, train={"microbatch": "auto"}))
    answers = iter([True, True, False])
    monkeypatch.setattr(diagnose, "any_rank", lambda full: next(answers))
    diagnose.find_microbatch(run.train_step, run.dataset.read)
    assert run.train_step.microbatch == 4


def test_where_not_one_image_fits_one_line_says_so(tmp_path, monkeypatch):
    run = trainer.Trainer(tiny(tmp_path, train={"microbatch": "auto"}))
    monkeypatch.setattr(diagnose, "fits", lambda step, batch: False)
    with pytest.raises(config.ConfigError, match=r"has no memory for 1 images a pass; set train\.checkpointing=true"):
        diagnose.find_microbatch(run.train_step, run.dataset.read)


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: values read from tensors, and results whose size depends on them."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(self.NAMES):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EVERY)
def test_a_step_reads_no_tensor(name, teacher, tmp_path):
    """All but the optimizer, whose learning rate is a tensor on a GPU alone."""
    settings = {"data": {"augment": 0.5}, "train": {"grad_clip": 1.0}}
    run = trainer.Trainer(every_objective(tmp_path, name, teacher, **settings))
    run.train_step.update = lambda lr: None
    images = run.dataset.images[:16]
    run.train_step(images, None)  # tables that are made once may be read
    with Reads() as seen:
        run.train_step(images, None)
    on_a_cpu = ["aten.nonzero.default"] if name == "meanflow" else []  # which rows need du/dt; a GPU takes all
    assert seen.found == on_a_cpu


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True, "reduce-overhead"])
@pytest.mark.parametrize("name", EVERY)
def test_a_step_on_a_gpu_waits_for_nothing(name, compiled, teacher, tmp_path):
    if compiled and name not in ("edm", "ect", "sct"):
        pytest.skip("compiled, one of each kind is enough")
    settings = {"run": {"device": "cuda", "dir": str(tmp_path)}, "train": {"compile": compiled, "precision": "bf16"}}
    run = trainer.Trainer(every_objective(tmp_path, name, teacher, **settings))
    images = run.dataset.images[:16].cuda()
    for _ in range(4):
        run.train_step(images, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.train_step(images, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in run.train_step.model.parameters())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [True, "reduce-overhead"])
@pytest.mark.parametrize("name", ["ect", "cd", "sct"])
def test_on_a_gpu_the_fast_path_gives_the_loss_and_gradient_of_fp32(name, compiled, teacher, tmp_path):
    """Over three steps that move the weights in place, as CUDA graphs must see."""
    results = []
    for train in ({"precision": "fp32", "compile": False}, {"precision": "bf16", "compile": compiled}):
        settings = {"run": {"device": "cuda", "dir": str(tmp_path)}, "network": {"dropout": 0.0}, "train": train}
        run = trainer.Trainer(every_objective(tmp_path, name, teacher, **settings))
        images = run.dataset.images[:16].cuda()
        for _ in range(3):
            run.train_step.sums.clear()
            run.train_step(images, None)
        results.append((float(run.train_step.sums["loss"]), run.train_step.gradient.double().cpu()))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.05)
    assert difference(results[1][1], results[0][1]) < 0.2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_the_loop_never_waits_for_images_in_files(tmp_path):
    """32-pixel PNGs by two workers: while a step runs, the next batches come. benchmarks/loading.py has the figures."""
    noise = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8).numpy()
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    dataset = data.load(config.Data(name="folder", path=str(tmp_path), memory_gb=0.0))
    assert dataset.images is None
    waited = {0: 0.0, 2: 0.0}
    for workers in waited:
        with contextlib.closing(data.batches(dataset, 0, 128, workers=workers)) as batches:
            next(batches)  # the workers start
            for _ in range(6):
                time.sleep(0.25)  # a step
                start = time.perf_counter()
                next(batches)
                waited[workers] += time.perf_counter() - start
    assert waited[2] < 0.5 * waited[0]


def test_operations_are_counted_as_torch_counts_them_and_grow_with_the_rows(teacher, tmp_path):
    """A product by hand; and every objective's step: its first rows by torch's counter, and the whole batch."""
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert speed.flops(lambda: a @ b) == 2 * 3 * 4 * 5
    for name in EVERY:
        run = trainer.Trainer(every_objective(tmp_path, name, teacher, data={"conditional": False}))
        step, batch = run.train_step, run.dataset.read(torch.arange(16))
        step(*batch)
        weights, sums = step.flat.vector.clone(), dict(step.sums)
        random = torch.get_rng_state()
        counted = run.speed.flops_per_image(*batch)
        assert torch.equal(weights, step.flat.vector) and sums == step.sums and step.step == 1
        assert torch.equal(random, torch.get_rng_state()) and not step.gradient.any()
        differ = getattr(step.objective, "rows_differ", False)
        rows = 16 if differ else step.group_size
        step.step = 0  # the draws are those of the step just done
        x, conditions, draws = step.prepare(batch[0][:rows], None, 0)
        draws = Draws(0, rows) if differ else draws
        with FlopCounterMode(display=False) as counter:
            step.objective(step.model, x, step=0, draws=draws, **conditions).loss.mean().backward()
        assert counter.get_total_flops() == counted * rows, name
        step.group_size = 16
        assert run.speed.flops_per_image(*batch) == pytest.approx(counted, rel=0.05), name


def test_forward_mode_and_half_precision_are_counted(tmp_path):
    """Forward, target, backward: 1 + 1 + 2 passes. A derivative in place of the target makes it 1 + 2 + 2; torch's own
    rule would multiply by the zeros that are the weights' tangents too."""
    counts = {}
    for difference in ("two_passes", "forward_mode"):
        settings = {"objective": {"name": "ect", "difference": difference}, "train": {"precision": "bf16"}}
        run = trainer.Trainer(tiny(tmp_path, **settings))
        counts[difference] = run.speed.flops_per_image(*run.dataset.read(torch.arange(16)))
    assert 1.2 < counts["forward_mode"] / counts["two_passes"] < 1.3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_peak_is_measured_in_no_time_and_moves_no_generator(precision):
    before, start = torch.get_rng_state(), time.perf_counter()
    peak = speed.matmul_peak.__wrapped__(torch.device("cpu"), precision)
    assert peak > 1e8 and time.perf_counter() - start < 0.5  # 20 ms on a quiet machine
    assert torch.equal(before, torch.get_rng_state())


def test_attention_of_a_cpu_is_counted():
    q = torch.randn(1, 2, 300, 16, requires_grad=True)
    forward = speed.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert forward == 2 * 2 * 2 * 300 * 300 * 16
    both = speed.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == forward * 3.5  # the scores are computed again


def test_the_second_phase_of_meanflow_is_counted_anew(tmp_path):
    """The derivative comes to the passes, and the bound of images/s falls, from the entry of both phases on."""
    run = trainer.Trainer(tiny(tmp_path, objective={"name": "meanflow", "flow": 3}, train={"precision": "fp32"}))
    batch, counted = run.dataset.read(torch.arange(16)), []
    with run.opened():
        for _ in range(4):
            run.train_step(*batch)
            run.train_step(*batch)
            run.speed.counted_at -= 11
            run.write_log(batch)
            counted.append(run.speed.counted)
    stages, bounds = zip(*counted, strict=True)
    assert stages == (0, 0.5, 1, 1)
    assert bounds[1] == bounds[2] == bounds[3] < 0.8 * bounds[0]


def test_another_stage_is_counted_anew_but_not_all_the_time(tmp_path):
    run = trainer.Trainer(tiny(tmp_path))
    batch, counted, real = run.dataset.read(torch.arange(16)), [], run.speed.flops_per_image
    run.speed.flops_per_image = lambda *batch: counted.append(1) or real(*batch)
    first = run.speed.bound(batch, 0)
    assert run.speed.bound(batch, 0) == first and run.speed.bound(batch, 1) == first and len(counted) == 1
    run.speed.counted_at -= 11
    assert run.speed.bound(batch, 0) == first and len(counted) == 1
    run.speed.bound(batch, 1)
    assert len(counted) == 2
