"""Can the tests see? Applies, one at a time, errors found in other code bases, and shows the test that fails for each.

    python tests/mutants.py [NAME ...]      (no name: all; 3 minutes on two idle cores)

An error is one replacement in a temporary copy of the repository; the working tree is never touched. Exit code 1 where
an error survives, its text is no longer there exactly once, or a test fails without any error.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Slow, and no error below is theirs alone to see.
SLOW = "not lpips and not runs_from_a_teacher and not from_scratch and not compiles and not two_ranks and not sigterm"
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torchvision",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "scipy.stats",
    "pydantic",
    "pytest",
]


@dataclass(frozen=True)
class Mutant:
    """One error: `old`, found exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    what: str  # what it does, and where it was seen
    tests: str  # names of the test files that should see it; after a colon, pytest's -k


MUTANTS = [
    # Preconditioning
    Mutant(
        "c_in-without-root", "networks/preconditioning.py",
        "c_in = (sigma**2 + self.sigma_data**2).rsqrt()", "c_in = (sigma**2 + self.sigma_data**2).reciprocal()",
        "c_in = 1/(s^2+sd^2): read in other code", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "c_in-missing", "networks/preconditioning.py",
        "self.model((_wide(c_in, x) * x).to(dtype)", "self.model(x.to(dtype)",
        "the input is not scaled: Kinyugo/consistency_models #18", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "c_out-without-sigma_data", "networks/preconditioning.py",
        "c_out = self.sigma_data * (sigma - eps) /", "c_out = (sigma - eps) /",
        "c_out = s/sqrt(s^2+sd^2): huggingface/diffusers #8547", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "boundary-without-sigma_min", "networks/preconditioning.py",
        'eps = self.sigma_min if self.precond == "cm" else 0.0', "eps = 0.0",
        "D(x; sigma_min) is not x: huggingface/diffusers #6833", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "boundaries-swapped", "networks/preconditioning.py",
        'eps = self.sigma_min if self.precond == "cm"', 'eps = self.sigma_min if self.precond != "cm"',
        "edm gets cm's boundary and cm edm's", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "c_noise-factor", "networks/preconditioning.py",
        "log_sigma * 250", "log_sigma * 1000",
        "1000 ln(s) in place of 1000 ln(s)/4", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "c_noise-missing", "networks/preconditioning.py",
        'return log_sigma / 4 if self.c_noise == "log" else', 'return sigma if self.c_noise == "log" else',
        "the network is told s itself: Kinyugo/consistency_models #7", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "trigflow-sign", "networks/preconditioning.py",
        "-c_out if self.precond", "c_out if self.precond",
        "D = cos x_t + sin sd F", "distillation:trigflow",
    ),
    Mutant(
        "labels-never-reach-the-network", "networks/preconditioning.py",
        "if labels is None:\n            return x.new_zeros(x.shape[0], dim)",
        "if True:\n            return x.new_zeros(x.shape[0], dim)",
        "a conditional network trains without its labels", "networks:label",
    ),
    # Schedules
    Mutant(
        "ct-N-off-by-one", "objectives/schedules.py",
        "max(math.ceil(math.sqrt(square) - 1), 1) + 1", "max(math.ceil(math.sqrt(square) - 1), 1)",
        "CT's N(k) counts intervals, not points", "schedules",
    ),
    Mutant(
        "ct-N-ends-at-s1", "objectives/schedules.py",
        "((s1 + 1) ** 2 - s0**2)", "(s1**2 - s0**2)",
        "CT's N(K) = s1", "schedules",
    ),
    Mutant(
        "ict-N-off-by-one", "objectives/schedules.py",
        "return min(s0 * 2 ** (k // max(interval, 1)), s1) + 1", "return min(s0 * 2 ** (k // max(interval, 1)), s1)",
        "iCT's N(k) without the + 1", "schedules",
    ),
    Mutant(
        "ict-doubles-too-late", "objectives/schedules.py",
        "(math.log2(s1 // s0) + 1)", "math.log2(s1 // s0)",
        "K' without the + 1: the last grid is never reached", "schedules",
    ),
    Mutant(
        "ict-P_mean-sign", "objectives/schedules.py",
        "(sigmas.log() - P_mean)", "(sigmas.log() + P_mean)",
        "pairs around e^1.1: Kinyugo/consistency_models #5", "schedules",
    ),
    Mutant(
        "ict-pairs-uniform", "objectives/ict.py",
        "index = torch.searchsorted(cumulative, u, right=True).clamp(max=N - 2)", "index = (u * (N - 1)).long()",
        "iCT draws its pairs as CT does", "objectives",
    ),
    Mutant(
        "ct-mu-of-N", "objectives/schedules.py",
        "s0 * math.log(mu0) / (levels - 1)", "s0 * math.log(mu0) / levels",
        "mu(k) divides by the points, not the intervals", "schedules",
    ),
    Mutant(
        "ect-clamp-missing", "objectives/schedules.py",
        ").clamp(min=0)", ")",
        "r < 0", "schedules",
    ),
    Mutant(
        "ect-stage-off-by-one", "objectives/schedules.py",
        "q ** (stage + 1)", "q ** max(stage, 1)",
        "the second stage repeats the first one's r", "schedules",
    ),
    Mutant(
        "ect-stage-in-images", "training/build.py",
        "o.double_kimg * 1000 / batch if", "o.double_kimg * 1000 if",
        "stages counted in steps, not images", "distillation:option",
    ),
    Mutant(
        "grid-reversed", "sampler.py",
        "return (high + ramp * (low - high)) ** rho", "return (low + ramp * (high - low)) ** rho",
        "the grid ascends: nathan-barry/tiny-diffusion #2", "schedules sampler",
    ),
    # Distances and weights
    Mutant(
        "huber-per-element", "objectives/losses.py",
        "square = (a - b).square().reshape(len(a), -1).sum(1)\n    if c is None:\n"
        "        c = 0.00054 * math.sqrt(a[0].numel())\n",
        "if c is None:\n        c = 0.00054 * math.sqrt(a[0].numel())\n"
        "    return ((a - b).square() + c * c).sqrt().sub(c).reshape(len(a), -1).mean(1)\n    square = a\n",
        "another loss: one reason that iCT does not reproduce", "losses",
    ),
    Mutant(
        "huber-c-without-root-d", "objectives/losses.py",
        "c = 0.00054 * math.sqrt(a[0].numel())", "c = 0.00054",
        "c does not grow with the image", "losses",
    ),
    Mutant(
        "metric-ignored", "objectives/losses.py",
        'return {"l1": l1, "l2": l2}[metric]', "return l2",
        "a norm option that never reaches the loss: read in other code", "objectives",
    ),
    Mutant(
        "metric-ignored-in-ict", "objectives/ict.py",
        "self.total_steps, self.distance = total_steps, distance",
        "self.total_steps, self.distance = total_steps, pseudo_huber",
        "objective.huber_c changes nothing", "distillation:option",
    ),
    Mutant(
        "mu-ignored-in-cd", "training/build.py",
        "how = (o.N, o.mu, o.solver,", "how = (o.N, 0.0, o.solver,",
        "objective.mu changes nothing", "distillation:option",
    ),
    Mutant(
        "ct-weight-of-the-target", "objectives/ct.py",
        "snr_weight(self.weighting, high,", "snr_weight(self.weighting, low,",
        "lambda at the target's level", "objectives",
    ),
    Mutant(
        "ict-weight-of-the-level", "objectives/ict.py",
        "x.new_zeros(())) / (high - low)", "x.new_zeros(())) / high",
        "1/s_{i+1} in place of 1/(s_{i+1} - s_i)", "objectives",
    ),
    Mutant(
        "ct-pair-swapped", "objectives/ct.py",
        "low, high = sigmas[index].to(x.dtype), sigmas[index + 1].to(x.dtype)",
        "high, low = sigmas[index].to(x.dtype), sigmas[index + 1].to(x.dtype)",
        "the student sees the lower level, the target the higher", "objectives",
    ),
    Mutant(
        "edm-weight", "objectives/edm.py",
        "/ (sigma * self.sigma_data) ** 2", "/ (sigma + self.sigma_data) ** 2",
        "(s + sd)^2 in place of (s sd)^2", "objectives",
    ),
    # Pairs
    Mutant(
        "noise-not-shared-ct", "objectives/ct.py",
        "return x + append_dims(low, x) * noise", "return x + append_dims(low, x) * torch.randn_like(x)",
        "the target sees another noise", "objectives",
    ),
    Mutant(
        "noise-not-shared-ict", "objectives/ict.py",
        "model(x + append_dims(low, x) * noise", "model(x + append_dims(low, x) * torch.randn_like(x)",
        "the target sees another noise", "objectives",
    ),
    Mutant(
        "noise-not-shared-ect", "objectives/ect.py",
        "D_t - model(x + append_dims(at, x) * noise", "D_t - model(x + append_dims(at, x) * torch.randn_like(x)",
        "the target sees another noise", "objectives",
    ),
    Mutant(
        "noise-not-shared-tcm", "objectives/tcm.py",
        "x_r = x + append_dims(r, x) * noise", "x_r = x + append_dims(r, x) * torch.randn_like(x)",
        "the target sees another noise", "objectives",
    ),
    Mutant(
        "mask-not-shared-ct", "objectives/ct.py",
        "with replayed(dropout, x.device):", "if dropout:",
        "two dropout masks: Kinyugo/consistency_models #18", "objectives",
    ),
    Mutant(
        "mask-not-shared-ict", "objectives/ict.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with torch.no_grad():",
        "two dropout masks: Kinyugo/consistency_models #18", "objectives",
    ),
    Mutant(
        "mask-not-shared-ect", "objectives/ect.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with torch.no_grad():",
        "two dropout masks", "objectives",
    ),
    Mutant(
        "mask-not-shared-tcm", "objectives/tcm.py",
        "with replayed(dropout, x.device):\n                D_r", "if dropout:\n                D_r",
        "two dropout masks", "objectives",
    ),
    Mutant(
        "mask-not-shared-scm", "objectives/scm.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with torch.no_grad():",
        "F and its tangent under two dropout masks", "distillation",
    ),
    Mutant(
        "mask-the-same-at-every-step", "objectives/common.py",
        "    yield\n    set_rng_state(now, device)", "    yield",
        "the generator is left where the step began", "objectives",
    ),
    Mutant(
        "stop-gradient-missing-ict", "objectives/ict.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with replayed(dropout, x.device):",
        "the target is pulled to the student", "objectives",
    ),
    Mutant(
        "stop-gradient-missing-ect", "objectives/ect.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with replayed(dropout, x.device):",
        "the target is pulled to the student", "objectives",
    ),
    Mutant(
        "stop-gradient-missing-tcm", "objectives/tcm.py",
        "        with torch.no_grad():\n            with replayed", "        if True:\n            with replayed",
        "the target is pulled to the student", "objectives",
    ),
    Mutant(
        "stop-gradient-missing-scm", "objectives/scm.py",
        "with torch.no_grad(), replayed(dropout, x.device):", "with replayed(dropout, x.device):",
        "the tangent learns too, and F - sg F has no gradient", "objectives",
    ),
    # Labels
    Mutant(
        "target-without-labels-ct", "objectives/ct.py",
        "D_target = self.target(x_low, low, **conditions)", "D_target = self.target(x_low, low)",
        "the target is unconditional", "distillation:labels",
    ),
    Mutant(
        "target-without-labels-ict", "objectives/ict.py",
        "noise, low, **conditions)", "noise, low)",
        "the target is unconditional", "distillation:labels",
    ),
    Mutant(
        "student-without-labels-ect", "objectives/ect.py",
        "D_t = model(x + append_dims(t, x) * noise, t, **conditions)", "D_t = model(x + append_dims(t, x) * noise, t)",
        "the labels are dropped in training", "distillation:labels",
    ),
    Mutant(
        "teacher-without-labels-pd", "objectives/pd.py",
        "half.to(x.dtype), **conditions)", "half.to(x.dtype))",
        "the teacher's steps are unconditional", "distillation:labels",
    ),
    Mutant(
        "frozen-stage-without-labels-tcm", "objectives/tcm.py",
        "self.stage1(x_r, r, **conditions)", "self.stage1(x_r, r)",
        "the targets below t' are unconditional", "distillation:labels",
    ),
    Mutant(
        "labels-of-other-trajectories-cmt", "objectives/cmt.py",
        "n: v[rows].repeat(self.steps, *[1] * (v.ndim - 1))",
        "n: v[rows].repeat_interleave(self.steps, 0)",
        "points are given the labels of other trajectories", "distillation:cmt",
    ),
    Mutant(
        "samples-without-labels", "sampling/drawing.py",
        "noise_at, model.sigma_min, **conditions)", "noise_at, model.sigma_min)",
        "the class asked for is not the class drawn", "sampler",
    ),
    # Distillation
    Mutant(
        "cd-heun-first-half-only", "objectives/cd.py",
        "* (slope + slope_low) / 2", "* slope",
        "CD's Heun step is Euler's", "distillation",
    ),
    Mutant(
        "guidance-one-too-strong", "sampler.py",
        "return D_null + w * (D - D_null)", "return D + w * (D - D_null)",
        "w of another convention", "distillation",
    ),
    Mutant(
        "tangent-unscaled", "objectives/scm.py",
        "(cos * sin * dxdt / sd, t.cos() * t.sin())", "(dxdt / sd, torch.ones_like(t))",
        "the JVP's direction without cos(t) sin(t)", "distillation",
    ),
    Mutant(
        "tangent-norm-rms", "objectives/scm.py",
        "g.reshape(len(g), -1).norm(dim=1)", "g.reshape(len(g), -1).square().mean(1).sqrt()",
        "root mean square in place of the norm: another c (FastGen)", "distillation",
    ),
    Mutant(
        "tangent-norm-squared", "objectives/scm.py",
        "g = g / append_dims(norm + self.c, x)", "g = g / append_dims(norm**2 + self.c, x)",
        "g/(norm(g)^2 + c): NVlabs/rcm #37, in the paper", "distillation",
    ),
    Mutant(
        "tangent-warm-up-missing", "objectives/scm.py",
        "min(1.0, step / max(self.warmup, 1))", "1.0",
        "r = 1 from the first step", "distillation",
    ),
    Mutant(
        "tcm-means-of-its-own-part", "objectives/tcm.py",
        "if given is None else boundary.sum()\n        rows = draws.total if given is None else len(t)",
        "* 0 + boundary.sum()\n        rows = len(t)",
        "the loss depends on how the batch is split", "ranks:passes_give and tcm",
    ),
    Mutant(
        "mask-not-of-its-key", "networks/layers.py",
        "both[:, :size].view(x.shape) >= round(p * 2**16)", "torch.rand_like(x) >= p",
        "every pass drops other units, as a checkpointed backward pass did", "networks:dropout",
    ),
    Mutant(
        "mask-of-every-layer-the-same", "networks/layers.py",
        "keys.to(torch.int32) + layer * 0x3C6EF372", "keys.to(torch.int32)",
        "all layers drop the same places", "networks:dropout",
    ),
    Mutant(
        "resume-forgets-the-microbatch", "training/step.py",
        'math.gcd(self.local_batch, state.get("microbatch", self.local_batch))', "self.local_batch",
        "a resumed run sums in another order, or runs out of memory", "speed:microbatch_auto",
    ),
    Mutant(
        "tcm-targets-from-the-student", "objectives/tcm.py",
        "target = torch.where(append_dims(r, x) < self.t_prime, D_stage1, D_r)", "target = D_r",
        "targets below t' are not the frozen stage's", "distillation",
    ),
    Mutant(
        "cmt-ends-of-other-trajectories", "objectives/cmt.py",
        "target = end.repeat(self.steps, *[1] * (x.ndim - 1))", "target = end.repeat_interleave(self.steps, 0)",
        "points are mapped onto other trajectories' ends", "distillation:cmt",
    ),
    Mutant(
        "pd-student-never-becomes-teacher", "objectives/pd.py",
        "if self.intervals(step + 1) != self.intervals(step):", "if self.intervals(step) != self.intervals(step):",
        "every stage distils the first teacher", "distillation",
    ),
    Mutant(
        "pd-passes-on-parameters-only", "objectives/pd.py",
        "for name, value in model.state_dict().items():", "for name, value in model.named_parameters():",
        "the teacher keeps its own Fourier frequencies: here, until a review", "distillation:augmentation_labels",
    ),
    Mutant(
        "trigflow-from-edm-mlp-without-its-sign", "checkpoints/state.py",
        "_aux_conv|out_conv|last)", "_aux_conv|out_conv)",
        "a mirrored denoiser on vectors: here, until a review", "vectors:sct_starts",
    ),
    Mutant(
        "tcm-sampled-below-its-boundary", "sampling/plan.py",
        'return getattr(cfg.objective, "t_prime", cfg.network.sigma_min)', "return cfg.network.sigma_min",
        "levels that only the frozen first stage knows: here, until a review", "sampler:tcm",
    ),
    Mutant(
        "trigflow-from-edm-without-its-sign", "checkpoints/state.py",
        "weights[name] = -weights[name]", "weights[name] = weights[name]",
        "an EDM teacher's weights in TrigFlow's clock", "distillation:runs_from_a_teacher and scd",
    ),
    # Averages
    Mutant(
        "ema-swapped", "ema.py",
        "weight = 1 - warmed_up(", "weight = warmed_up(",
        "average <- (1 - decay) average + decay weights: read in other code", "ema",
    ),
    Mutant(
        "ct-target-swapped", "objectives/ct.py",
        "1 - self.target_decay(step))", "self.target_decay(step))",
        "target <- (1 - mu) target + mu student", "objectives",
    ),
    Mutant(
        "half-life-in-steps", "ema.py",
        "0.5 ** (batch_size / half_life)", "0.5 ** (1 / half_life)",
        "the half-life counted in steps, not images", "ema",
    ),
    Mutant(
        "grid-from-raw-weights", "training/trainer.py",
        "step.emas[0].module,", "step.model,",
        "raw weights sampled in training", "trainer:average",
    ),
    Mutant(
        "raw-weights-loaded", "checkpoints/state.py",
        '_fill(model, state["ema"][average], path)', '_fill(model, state["model"], path)',
        "raw weights sampled and scored", "checkpoint generate:ema",
    ),
    Mutant(
        "init-from-raw-weights", "checkpoints/state.py",
        'weights = state["ema"][0]', 'weights = state["model"]',
        "the next stage starts from raw weights", "trainer:init_from",
    ),
    # Samplers
    Mutant(
        "heun-first-half-only", "sampler.py",
        "* (slope + slope_ahead) / 2", "* slope",
        "Heun's step is Euler's", "sampler",
    ),
    Mutant(
        "multistep-without-sigma_min", "sampler.py",
        "max(sigma**2 - sigma_min**2, 0) ** 0.5 * noise", "sigma * noise",
        "x + s z: the point lies above s", "sampler",
    ),
    Mutant(
        "multistep-noise-reused", "sampling/drawing.py",
        'return sample_noise(seed, own, shape, f"step {i}").to(device)', "return z",
        "every step adds the noise of the start", "sampler",
    ),
    Mutant(
        "multistep-noise-of-one-step", "sampling/drawing.py",
        'f"step {i}"', '"step"',
        "every later step adds the same noise", "sampler",
    ),
    # The loop
    Mutant(
        "warm-up-ignored", "training/step.py",
        "rise = min((step + 1) / warmup, 1.0) if warmup else 1.0", "rise = 1.0",
        "train.lr_warmup changes nothing", "trainer:learning_rate",
    ),
    Mutant(
        "rate-never-reaches-the-optimizer", "training/step.py",
        "self.update(learning_rate(self.step, self.cfg.train))", "self.update(self.cfg.train.lr)",
        "neither warm-up nor decay happens", "trainer:learning_rate",
    ),
    Mutant(
        "microbatch-not-divided", "training/step.py",
        "self.scaler.scale(loss / len(starts)).backward()", "self.scaler.scale(loss).backward()",
        "the gradient grows with the number of microbatches", "trainer:microbatches",
    ),
    Mutant(
        "ranks-not-averaged", "training/step.py",
        "            self.gradient /= self.world\n", "",
        "the gradient grows with the number of ranks", "trainer:microbatches",
    ),
    Mutant(
        "ranks-not-summed", "training/step.py",
        "talk(dist.all_reduce, self.gradient)", "pass",
        "every rank trains alone", "trainer:microbatches",
    ),
    Mutant(
        "step-counted-on-rank-0-only", "training/step.py",
        "out = self.objective(self.model, x, step=self.step,",
        "out = self.objective(self.model, x, step=self.step if self.rank == 0 else 0,",
        "N(k) advances on rank 0 only: read in other code", "trainer:microbatches",
    ),
    Mutant(
        "same-draws-on-every-rank", "training/step.py",
        "first, total = self.rank * self.local_batch + start,", "first, total = start,",
        "ranks share noise and noise levels", "trainer:microbatches",
    ),
    Mutant(
        "draws-not-keyed-by-place", "objectives/draws.py",
        "return rows[self.start : self.start + self.count]", "return rows[: self.count]",
        "every microbatch and rank gets the first rows' noise", "objectives",
    ),
    Mutant(
        "same-draws-at-every-step", "training/step.py",
        "key(self.cfg.run.seed, stream, self.step)", "key(self.cfg.run.seed, stream)",
        "one noise for the whole run", "trainer:draws_anew",
    ),
    Mutant(
        "same-dropout-at-every-step", "training/step.py",
        "dropping.integers(2**31, rows)", "torch.arange(len(x))",
        "one dropout mask for the whole run: elixir-nx/axon #423", "trainer:draws_anew",
    ),
    Mutant(
        "labels-never-leave-the-loop", "sources/codecs.py",
        '"class_labels": one_hot(', '"class_labels": 0 * one_hot(',
        "a conditional network trains without its labels", "trainer:first_loss",
    ),
    Mutant(
        "pixels-from-0-to-1", "sources/codecs.py",
        "(images.to(torch.float32) / 127.5 - 1)", "(images.to(torch.float32) / 255)",
        "data outside the range that sigma_data is for", "data:float",
    ),
    Mutant(
        "resume-starts-the-data-anew", "training/trainer.py",
        "cfg.train.batch_size, step.step, rows,", "cfg.train.batch_size, 0, rows,",
        "the first images are seen again: Hzfinfdu/Diffusion-BERT #30", "trainer:resumed_run",
    ),
    Mutant(
        "resume-without-the-optimizer", "training/step.py",
        '{"state": {0: own} if own else {}, "param_groups"', '{"state": {}, "param_groups"',
        "Adam's moments start at 0: NVlabs/stylegan2-ada-pytorch #108", "trainer:resumed_run",
    ),
    Mutant(
        "resume-from-the-average", "training/step.py",
        'self.model.load_state_dict(state["model"])', 'self.model.load_state_dict(state["ema"][0])',
        "raw weights replaced by the EMA: Megvii-BaseDetection/YOLOX #1318", "trainer:resumed_run",
    ),
    Mutant(
        "resume-without-the-average", "training/step.py",
        "ema.module.load_state_dict(weights)", "ema.module.load_state_dict(self.model.state_dict())",
        "the EMA starts anew: Vchitect/Latte #55", "trainer:resumed_run",
    ),
    Mutant(
        "resume-without-the-target", "training/step.py",
        '        self.objective.load_state_dict(state["objective"])\n', "",
        "CT's target starts anew", "trainer:resumed_run",
    ),
    # Vectors
    Mutant(
        "condition-never-reaches-the-network", "networks/preconditioning.py",
        '{"condition": condition.to(dtype)}', '{"condition": 0 * condition.to(dtype)}',
        "a policy that does not see the state", "vectors:sees_every",
    ),
    Mutant(
        "condition-not-normalised-in-sampling", "sampling/drawing.py",
        "model.codec.told(given[start : start + batch_size], z)",
        '{"condition": given[start : start + batch_size].to(device)}',
        "trained on normalised states, asked with raw ones", "vectors:own_units",
    ),
    Mutant(
        "vectors-left-normalised", "sources/codecs.py",
        "from_model = restore", "from_model = lambda self, x: x",
        "samples in the model's units, not the data's", "vectors:own_units",
    ),
    Mutant(
        "conditions-of-other-rows", "sources/vectors.py",
        "return self.values[indices], None if self.conditions is None else self.conditions[indices]",
        "return self.values[indices], None if self.conditions is None else self.conditions[indices.roll(1)]",
        "actions paired with other states", "vectors:own_units",
    ),
]  # fmt: skip


def copy_repository(source: Path, folder: Path) -> None:
    """Copy what the tests need of the repository at `source` to `folder`."""
    for path in source.iterdir():
        if path.suffix in (".py", ".yml", ".toml", ".json"):
            shutil.copy(path, folder / path.name)
    rooms = [path.parent.name for path in source.glob("*/__init__.py")]
    for name in ("configs", "tests", *rooms):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


class Failures:
    """A pytest plugin that keeps the tests that failed and what they said."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.said[report.nodeid] = report.longreprtext

    pytest_collectreport = pytest_runtest_logreport


def run_tests(folder: Path, tests: str, *options: str) -> dict[str, str]:
    """The tests among `tests` (see Mutant) that fail in the repository at `folder`, and what they say.

    For a process of its own: what it imports are the modules of that folder.
    """
    import pytest

    files, _, chosen = tests.partition(":")
    where = [str(folder / "tests" / f"test_{name}.py") for name in files.split()]
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    sys.dont_write_bytecode = True
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    failures = Failures()
    here = ["-q", "--tb=short", "-p", "no:cacheprovider", "-n", "0"]  # in this process, whatever pyproject.toml says
    pytest.main([*here, "-k", chosen or SLOW, *options, *where], [failures])
    return failures.said


def baseline(tests: str, source: Path) -> set[str]:
    """The tests among `tests` that fail in the repository at `source` as it is."""
    return set(run_tests(source, tests))


def judge(mutant: Mutant, source: Path, already: set[str]) -> tuple[str, str]:
    """Run a mutant's tests in a copy of `source` that has it: the test that caught it and what that says.

    Capitals in place of the test's name: nothing caught it.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name).resolve()
        copy_repository(source, folder)
        text = (folder / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            return f"NOT FOUND: its text is {text.count(mutant.old)} times in {mutant.file}", ""
        text = text.replace(mutant.old, mutant.new)
        compile(text, mutant.file, "exec")  # an error must train, and train badly
        (folder / mutant.file).write_text(text)
        failures = run_tests(folder, mutant.tests, "-x", *[f"--deselect={test}" for test in already])
        module = sys.modules.get(mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        os.chdir("/")
    if module is None or not module.__file__.startswith(str(folder)):
        return "NOT LOADED by its tests", ""
    return next(iter(failures.items()), ("SURVIVED", ""))


def main(names: list[str]) -> int:
    """Print a table of the mutants called `names` (all: none given); 0 where every one is caught."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names if name not in known]:
        print(f"no mutant {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in names] or MUTANTS
    context = multiprocessing.get_context("forkserver")  # a process for each mutant, forked with torch loaded
    context.set_forkserver_preload(PRELOAD)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as name,
        context.Pool(os.cpu_count(), maxtasksperchild=1) as pool,
    ):
        source = Path(name).resolve()
        copy_repository(ROOT, source)  # the working tree may change while this runs
        tests = sorted({mutant.tests for mutant in chosen})
        already = set().union(*pool.imap(functools.partial(baseline, source=source), tests))
        for test in sorted(already):
            print(f"fails without any error, and is left out: {test}")
        print("| error | file | what it does, where it was seen | caught by |\n| --- | --- | --- | --- |")
        bad = 0
        verdicts = pool.imap(functools.partial(judge, source=source, already=already), chosen)
        for mutant, (verdict, why) in zip(chosen, verdicts, strict=True):
            bad += not verdict.startswith("tests/")
            print(f"| {mutant.name} | {mutant.file} | {mutant.what} | {verdict} |", flush=True)
            if names:
                print(why)
    print(f"\n{len(chosen) - bad} of {len(chosen)} errors caught")
    return 1 if bad or already else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
