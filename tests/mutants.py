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
    # Flow maps' networks
    Mutant(
        "t-r-told-as-r", "networks/flow_map.py",
        'r if self.times == "t,r" else t - r)', "r)",
        "MeanFlow's network is told r: another function of the two times", "flow_maps_networks:told",
    ),
    Mutant(
        "columns-swapped", "networks/flow_map.py",
        "told = torch.stack(told, dim=1)", "told = torch.stack(told, dim=1).flip(1)",
        "t - r in the place of t: a flow model's weights start no map", "flow_maps_networks:told",
    ),
    Mutant(
        "heads-swapped", "networks/flow_map.py",
        "for f in F.split(z.shape[1], dim=1))", "for f in F.split(z.shape[1], dim=1)[::-1])",
        "iMF's velocity sampled as its average velocity", "flow_maps_networks:heads",
    ),
    Mutant(
        "linear-clock-without-sigma_data", "networks/flow_map.py",
        "s = (t**2 + self.sigma_data**2 * (1 - t) ** 2).sqrt()", "s = (t**2 + (1 - t) ** 2).sqrt()",
        "an EDM model's weights give another velocity", "flow_maps_networks:denoisers",
    ),
    Mutant(
        "guidance-told-as-w", "networks/flow_map.py",
        "told = (1 - 1 / w)", "told = w",
        "iMF's network is told w, not 1 - 1/w", "flow_maps_networks:guidance",
    ),
    Mutant(
        "new-columns-with-weights", "checkpoints/starting.py",
        "new = own[name] if dim == 0 else torch.zeros_like(own[name])", "new = own[name]",
        "a flow model's start is disturbed by the step it does not know yet", "flow_maps_start:same_velocity",
    ),
    Mutant(
        "rope-without-order", "networks/dit.py",
        "a * sin + b * cos], dim=-1)", "b * cos - a * sin], dim=-1)",
        "a mirror, no rotation: products depend on i + j", "flow_maps_networks:rope",
    ),
    # Preconditioning
    Mutant(
        "c_in-without-root", "networks/preconditioning.py",
        "c_in = (sigma**2 + self.sigma_data**2).rsqrt()", "c_in = (sigma**2 + self.sigma_data**2).reciprocal()",
        "c_in = 1/(s^2+sd^2): read in other code", "networks:precondition or boundary or variance",
    ),
    Mutant(
        "c_in-missing", "networks/preconditioning.py",
        "self.model((wide(c_in, x) * x).to(dtype)", "self.model(x.to(dtype)",
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
        "with replayed(dropout, x.device):\n                    D_r = model",
        "if dropout:\n                    D_r = model",
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
        "        with torch.no_grad():\n            if forward_mode", "        if True:\n            if forward_mode",
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
        "return null + weight * (own - null)", "return own + weight * (own - null)",
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
        "torch.where(append_dims(r, x) < self.t_prime, D_stage1, D_r)", "D_r",
        "targets below t' are not the frozen stage's", "distillation",
    ),
    Mutant(
        "tcm-two-networks-in-half", "objectives/tcm.py",
        "with in_float32(model, self.stage1):", "if True:",
        "the rounding of two networks at almost one point", "precision:tcm",
    ),
    Mutant(
        "tcm-rows-under-keys-of-others", "objectives/tcm.py",
        "value[rows] for name, value", "value[: len(rows)] for name, value",
        "rows taken alone get other rows' labels and masks", "precision:tcm",
    ),
    Mutant(
        "tcm-no-room-for-chance", "objectives/tcm.py",
        "mean + 6 * math.sqrt(mean + 1) + 2", "0 * mean",
        "rows a little above t' have the student's target", "precision:tcm",
    ),
    Mutant(
        "norm-tangent-of-a-fixed-mean", "networks/layers.py",
        "dv - dv.mean(**over)", "dv",
        "group norm's derivative does not see its mean move", "masks:derivative",
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
        "trigflow-from-edm-mlp-without-its-sign", "checkpoints/starting.py",
        "_aux_conv|out_conv|last|last_2)", "_aux_conv|out_conv|last_2)",
        "a mirrored denoiser on vectors: here, until a review", "vectors:sct_starts",
    ),
    Mutant(
        "tcm-sampled-below-its-boundary", "sampling/plan.py",
        'return getattr(cfg.objective, "t_prime", cfg.network.sigma_min)', "return cfg.network.sigma_min",
        "levels that only the frozen first stage knows: here, until a review", "sampler:tcm",
    ),
    Mutant(
        "trigflow-from-edm-without-its-sign", "checkpoints/starting.py",
        "weights[name] = -weights[name]", "weights[name] = weights[name]",
        "an EDM teacher's weights in TrigFlow's clock", "distillation:runs_from_a_teacher and scd",
    ),
    # Averages
    Mutant(
        "ema-swapped", "ema.py",
        "list(model.parameters()), 1 - decay)", "list(model.parameters()), decay)",
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
    # EDM2
    Mutant(
        "edm2-weights-not-normalised", "networks/edm2.py",
        "return unit(self.weight.to(wide), range(1, self.weight.ndim))", "return self.weight.to(wide)",
        "a plain convolution in the place of MPConv", "edm2:published or forces or gradient",
    ),
    Mutant(
        "edm2-eps", "networks/edm2.py",
        "EPS = 1e-4", "EPS = 1e-8",
        "a smaller eps: rows near zero keep their length", "edm2:published or forces or pieces",
    ),
    Mutant(
        "edm2-sum-shares-swapped", "networks/edm2.py",
        "torch.lerp(a, b, t) / math.hypot(1 - t, t)", "torch.lerp(b, a, t) / math.hypot(1 - t, t)",
        "mp_sum's t is the first's share", "edm2:published or pieces",
    ),
    Mutant(
        "edm2-target-forces", "networks/edm2.py",
        "return self.training and self.forcing and torch.is_grad_enabled()", "return self.training and self.forcing",
        "the target's pass normalises the weights again, under the student's gradient", "edm2:forces or force",
    ),
    Mutant(
        "edm2-forcing-left-out", "training/step.py",
        "        for network in self.forced:\n            network.force_weights()\n", "",
        "the trainer never forces: the effective learning rate falls as weights grow", "edm2:a_step_forces",
    ),
    Mutant(
        "edm2-logvar-sign", "objectives/edm.py",
        "loss = loss * torch.exp(-u) + u", "loss = loss * torch.exp(u) + u",
        "the loss multiplied by its own size", "edm2:logvar",
    ),
    Mutant(
        "power-ema-counts-before-the-step", "ema.py",
        "power_decay(self.std, step, 1)", "power_decay(self.std, step + 1, 1)",
        "nimg of the next step: the initialisation stays in the average", "ema:over_a_run",
    ),
    Mutant(
        "ect-c_out-root", "objectives/ect.py",
        'else c_out**2\n', 'else c_out\n',
        "1 / c_out in place of its square", "edm2:c_out",
    ),
    # Samplers
    Mutant(
        "heun-first-half-only", "sampler.py",
        "ahead = x + (lower - sigma) * (slope + slope_ahead) / 2", "ahead = x + (lower - sigma) * slope",
        "Heun's step is Euler's", "sampler",
    ),
    Mutant(
        "multistep-without-sigma_min", "sampler.py",
        "of_noise = max(level**2 - sigma_min**2, 0) ** 0.5", "of_noise = level",
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
    # Flow maps trained
    Mutant(
        "meanflow-mean-for-sum", "objectives/meanflow.py",
        "adaptive(square.sum(1),", "adaptive(square.mean(1),",
        "the adaptive weight of a mean: haidog-yaqub/MeanFlow", "flow_maps:meanflow",
    ),
    Mutant(
        "meanflow-flow-a-step-long", "objectives/meanflow.py",
        "if step < self.flow:", "if step <= self.flow:",
        "one step more of flow matching alone", "flow_maps:first_steps",
    ),
    Mutant(
        "muon-scaled-by-the-short-side", "training/muon.py",
        "0.2 * max(", "0.2 * min(",
        "a matrix's step is too short", "muon",
    ),
    Mutant(
        "muon-without-nesterov", "training/muon.py",
        "torch.lerp(slope, momentum, MOMENTUM, out=self.slope)", "self.slope.copy_(momentum)",
        "the momentum itself is made orthogonal", "muon",
    ),
    Mutant(
        "muon-transposed-as-it-lies", "training/muon.py",
        "padded[:columns, :rows].T", "padded[:columns, :rows].reshape(rows, columns)",
        "a tall matrix is read in another order", "muon",
    ),
    Mutant(
        "meanflow-equal-before-the-larger-is-t", "objectives/schedules.py",
        """    if sampler == "v0":
        t, r = torch.maximum(t, r), torch.minimum(t, r)
    r = torch.where(equal, t, r)
""",
        """    r = torch.where(equal, t, r)
    if sampler == "v0":
        t, r = torch.maximum(t, r), torch.minimum(t, r)
""",
        "t of rows with r = t is the first draw, not the larger", "flow_maps:times or samplers",
    ),
    Mutant(
        "meanflow-larger-is-t-in-v1", "objectives/schedules.py",
        'if sampler == "v0":', "if True:",
        "v1 keeps t where r is above it", "flow_maps:times or samplers",
    ),
    Mutant(
        "meanflow-r-moves", "objectives/meanflow.py",
        "torch.ones_like(t), torch.zeros_like(r), **", "torch.ones_like(t), torch.ones_like(r), **",
        "du/dt along (v, 1, 1)", "flow_maps:meanflow",
    ),
    Mutant(
        "meanflow-difference-at-one-time", "objectives/meanflow.py",
        "append_dims(t - s, z) * v, s, r,", "append_dims(t - s, z) * v, t, r,",
        "the difference along (v, 0, 0)", "flow_maps:difference",
    ),
    Mutant(
        "meanflow-difference-past-r", "objectives/meanflow.py",
        "torch.maximum(t - GAP, r)", "t - GAP",
        "the earlier time is before r", "flow_maps:difference",
    ),
    Mutant(
        "meanflow-difference-in-half-precision", "objectives/meanflow.py",
        'return self.derivative == "forward_mode" or step < self.flow', "return True",
        "bf16 rounds the difference", "precision:difference",
    ),
    Mutant(
        "threads-change-for-nothing", "training/threads.py",
        "times[best] * WORTH > times", "times[best] > times",
        "a quiet machine's figures do not repeat", "threads",
    ),
    Mutant(
        "threads-though-a-number-is-asked-for", "training/threads.py",
        'device.type != "cpu" or "OMP_NUM_THREADS" in os.environ', 'device.type != "cpu"',
        "OMP_NUM_THREADS does not fix the number", "threads",
    ),
    Mutant(
        "meanflow-phases-not-told-apart", "objectives/meanflow.py",
        "int(step >= self.flow)", "0",
        "MFU against the operations of the first phase", "speed:second_phase",
    ),
    Mutant(
        "meanflow-rows-picked-where-compiled", "objectives/meanflow.py",
        ' and getattr(model, "compiled_jvp", None) is None', "",
        "a compilation for every number of rows", "speed:is_one_graph",
    ),
    Mutant(
        "adaptive-weight-with-gradient", "objectives/losses.py",
        "square / (square.detach() + eps) ** p", "square / (square + eps) ** p",
        "the weight is not detached", "flow_maps:matches",
    ),
    Mutant(
        "meanflow-target-with-gradient", "objectives/meanflow.py",
        "        with torch.no_grad():\n            if self.teacher", "        if True:\n            if self.teacher",
        "the guided target moves with the weights", "flow_guidance:meanflow",
    ),
    Mutant(
        "meanflow-labels-dropped-in-one-pass", "objectives/meanflow.py",
        "of_rows({**conditions, **told}, rows)", "of_rows({**labelled, **told}, rows)",
        "du/dt at the label, u at the null label", "flow_guidance:meanflow or drops",
    ),
    Mutant(
        "meanflow-guided-outside-its-interval", "objectives/meanflow.py",
        "(t >= low) & (t <= high) & ~dropped", "(t >= 0) & ~dropped",
        "guidance at every t", "flow_guidance:meanflow",
    ),
    Mutant(
        "meanflow-dropped-rows-guided", "objectives/meanflow.py",
        "(t >= low) & (t <= high) & ~dropped", "(t >= low) & (t <= high)",
        "the null label learns the guided velocity", "flow_guidance:meanflow",
    ),
    Mutant(
        "mask-not-shared-meanflow", "objectives/meanflow.py",
        "with replayed(dropout, x.device):", "if True:",
        "u and du/dt drop different units", "flow_guidance:mask",
    ),
    Mutant(
        "imf-along-the-pairs-velocity", "objectives/imf.py",
        "for values in (z, t, r, tangent,", "for values in (z, t, r, v,",
        "MeanFlow's tangent in place of the predicted one", "flow_maps:imf",
    ),
    Mutant(
        "imf-derivative-with-gradient", "objectives/imf.py",
        "_, dudt[rest] = along_map(model, *along, **of_rows(conditions, rest))",
        "with torch.enable_grad(): dudt = dudt + torch.func.jvp(\n"
        "                        lambda *at: model(*at, **conditions), tuple(along[:3]), tuple(along[3:]))[1]",
        "du/dt is not detached", "flow_maps:imf",
    ),
    Mutant(
        "imf-target-with-gradient", "objectives/imf.py",
        "        with torch.no_grad():\n            dudt", "        if True:\n            dudt",
        "predicted velocities move with the weights", "flow_guidance:imf",
    ),
    Mutant(
        "imf-told-no-interval-at-the-tangent", "objectives/imf.py",
        'w = torch.where((t >= low) & (t <= high), told["guidance"], 1.0)', 'w = told["guidance"]',
        "guided outside the interval", "flow_guidance:imf",
    ),
    Mutant(
        "mask-not-shared-imf", "objectives/imf.py",
        "with replayed(dropout, x.device):", "if True:",
        "u and du/dt drop different units", "flow_guidance:mask",
    ),
    Mutant(
        "soflow-l-without-its-least-gap", "objectives/soflow.py",
        "gap = ((t - r) * rho).clamp(min=LEAST)", "gap = (t - r) * rho",
        "l as near to t as rho says", "flow_maps:soflow",
    ),
    Mutant(
        "soflow-sum-for-mean", "objectives/soflow.py",
        "q).square().reshape(len(x), -1).mean(1)", "q).square().reshape(len(x), -1).sum(1)",
        "the weight of a sum", "flow_maps:soflow",
    ),
    Mutant(
        "soflow-q-with-gradient", "objectives/soflow.py",
        "        with torch.no_grad():\n            if self.guidance", "        if True:\n            if self.guidance",
        "q moves with the weights", "flow_maps:soflow",
    ),
    Mutant(
        "soflow-labels-dropped-in-one-pass", "objectives/soflow.py",
        "dropout, of_rows(conditions, rest)", "dropout, of_rows(labelled, rest)",
        "u_t at the null label, u_l at the label", "flow_guidance:soflow",
    ),
    Mutant(
        "soflow-velocity-rows-of-each-pass", "objectives/soflow.py",
        "draws.first(int(self.velocity_share * draws.total))", "int(self.velocity_share * draws.count)",
        "two ranks, or microbatches, are not one batch", "ranks:passes_give and soflow",
    ),
    Mutant(
        "mask-not-shared-soflow", "objectives/soflow.py",
        "with replayed(dropout, z.device):", "if True:",
        "u_t and u_l drop different units", "flow_guidance:mask",
    ),
    Mutant(
        "denoisers-velocity-unscaled", "objectives/flow.py",
        "teacher(z / append_dims(1 - t, z), t / (1 - t), **conditions)", "teacher(z, t / (1 - t), **conditions)",
        "a denoiser asked at the flow's point", "flow_maps:velocity",
    ),
    Mutant(
        "anchor-not-told-apart", "objectives/scm.py",
        "network(model, x_t / sd, -t, sd, conditions)", "network(model, x_t / sd, t, sd, conditions)",
        "FACM's two tasks at the same time", "flow_maps:anchor",
    ),
    # Flow maps sampled
    Mutant(
        "renoised-at-the-time-before", "sampler.py",
        "of_data, of_noise = shares(level, clock)", "of_data, of_noise = shares(levels[i - 1], clock)",
        "t for t' in (1 - t') x + t' noise", "flow_maps_sampling:soflow or spread",
    ),
    Mutant(
        "last-jump-not-to-zero", "sampler.py",
        "    for t, r in itertools.pairwise([*times, 0.0]):\n        z = z - (t - r)",
        "    for t, r in itertools.pairwise([*times, 0.5 * times[-1]]):\n        z = z - (t - r)",
        "the samples keep noise", "flow_maps_sampling:jumps or exact",
    ),
    Mutant(
        "jumps-told-the-same-time-twice", "sampler.py",
        "model(z, _level(t, z), _level(r, z), **conditions)", "model(z, _level(t, z), _level(t, z), **conditions)",
        "an ODE's step in place of a jump", "flow_maps_sampling:jumps or jump or exact",
    ),
    Mutant(
        "editing-in-the-other-clock", "sampling/editing.py",
        "of_data, of_noise = shares(level, clock)", 'of_data, of_noise = shares(level, "sigma")',
        "x + t z where (1 - t) x + t z is known to the network", "flow_maps_sampling:edits or editing",
    ),
    # Scores and masks
    Mutant(
        "a-class-scored-against-all", "metrics/scores.py",
        "input2=FidelityImages(own, rgb", "input2=FidelityImages(dataset, rgb",
        "FID of one class to the whole set: zoubohao/DenoisingDiffusionProbabilityModel-ddpm- #22", "reports_scores",
    ),
    Mutant(
        "what-is-opaque-filled-in", "sampling/tasks.py",
        "alpha < max(alpha.max(), 1)", "alpha > 0",
        "a photo with a part erased keeps what was erased: here, until it was reported", "editing:mask_files",
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
        "mnist-padded-and-shrunk", "data.py",
        "side = size if size and 28 <= size <= 32 else 32", "side = 32",
        "MNIST at 28 pixels is not MNIST: torch/tutorials #48", "reports_data:mnist",
    ),
    Mutant(
        "resized-without-antialiasing", "sources/files.py",
        "Image.Resampling.LANCZOS", "Image.Resampling.NEAREST",
        "pixels are left out: mseitzer/pytorch-fid #32", "reports_data:same_pixels or line",
    ),
    Mutant(
        "links-to-classes-left-out", "sources/finding.py",
        "return entry.is_dir() if", "return entry.is_dir(follow_symlinks=False) if",
        "half of the classes are missing: pytorch/vision #1580", "reports_data:links",
    ),
    Mutant(
        "splits-as-classes", "sources/finding.py",
        "if len(set(split_of.values())) > 1:", "if False:",
        "val/ is trained on, as a class: huggingface/datasets #4015", "reports_data:splits",
    ),
    Mutant(
        "12-bits-as-16", "sources/files.py",
        "top = white or (", "top = (",
        "data.white_level changes nothing, images stay black", "reports_data:12_bits",
    ),
    Mutant(
        "an-end-saves-nothing", "training/trainer.py",
        "self.save_last_step(error)\n            kind", "kind",
        "an error in mid-run costs all steps since the last save: read in other code",
        "reports_runs:error_in_mid_run",
    ),
    Mutant(
        "a-bad-batch-is-raised-at-once", "training/trainer.py",
        "            self.unread = error\n            return None", "            raise",
        "the checkpoint holds the fingerprint of data that are about to be mended", "reports_runs:mended_otherwise",
    ),
    Mutant(
        "half-a-step-is-saved", "training/step.py",
        "self.whole = False", "pass",
        "a checkpoint of weights after the step and averages before it", "reports_runs:half_updated",
    ),
    Mutant(
        "done-though-the-last-steps-were-bad", "training/step.py",
        '"streak": int(self.streak)', '"streak": 0',
        "exit code 0 and 'done' after steps that moved nothing", "reports_runs:not_finite_is_not_done",
    ),
    Mutant(
        "a-moved-run-goes-back", "config/reading.py",
        'run["dir"] = str(folder)', "pass",
        "a renamed run folder is trained in the old place: openai/improved-diffusion #102",
        "reports_runs:where_its_config or place_on",
    ),
    Mutant(
        "resume-of-nothing-starts", "training/run_folder.py",
        "if resume and not checkpoints.saved(self.checkpoints) and", "if False and",
        "--resume in the wrong place starts at step 0 with exit code 0: huggingface/diffusers #2079",
        "reports_runs:empty_place",
    ),
    Mutant(
        "other-data-of-the-same-shape", "training/run_folder.py",
        'None not in (a := old["fingerprint"], b := new["fingerprint"]) and a != b', "False",
        "a run goes on with other images", "reports_other_data:other_data_are_named",
    ),
    Mutant(
        "classes-by-number-alone", "training/run_folder.py",
        "i is not None:", "False:",
        "a renamed class folder renumbers the classes unseen", "reports_other_data:other_data_are_named",
    ),
    Mutant(
        "resume-starts-the-data-anew", "training/trainer.py",
        "cfg.train.batch_size, step.step, rows)", "cfg.train.batch_size, 0, rows)",
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
    Mutant(
        "ect-snapshot-without-its-boundary", "checkpoints/edm.py",
        '("cm", "ect", 0.003, 0.02)',
        '("edm", "ect", 0.003, 0.02)',
        "D(x) is not x at sigma_min: EDM's preconditioning", "imports:ect_snapshot",
    ),
    Mutant(
        "diffusers-q-k-v-one-after-another", "checkpoints/diffusers.py",
        "torch.stack([part.unflatten(0, (heads, -1)) for part in values], 2).flatten(0, 2)",
        "torch.cat(values)",
        "heads mixed: another attention", "imports:there_and_back",
    ),
    Mutant(
        "every-openai-model-has-64-pixels", "checkpoints/openai.py",
        "ATTENTION * min(factors, default=0)",
        "64",
        "LSUN's models attend at 8, 4 and 2 pixels", "imports:size",
    ),
    Mutant(
        "home-not-expanded", "config/schema.py",
        "    text = os.path.expanduser(text)\n",
        "",
        "a folder named ~ in the current one (huggingface/transformers#10628)", "reports_messages:home",
    ),
    # The autoencoder of latents
    Mutant(
        "kl-of-half-the-logarithm", "objectives/autoencoder.py",
        "- 2 * std.log()", "- std.log()",
        "the logarithm of the variance taken for that of the deviation", "autoencoder:loss",
    ),
    Mutant(
        "kl-not-over-the-images-values", "objectives/autoencoder.py",
        "self.kl_weight * kl / x[0].numel()", "self.kl_weight * kl",
        "a mean over pixels beside a sum over the latent: every latent is normal noise", "autoencoder:loss",
    ),
    Mutant(
        "decoded-from-the-mean", "objectives/autoencoder.py",
        "mean + std * noise", "mean",
        "the decoder never sees a drawn latent, and std only shrinks the KL", "autoencoder:loss",
    ),
    Mutant(
        "variance-as-deviation", "networks/autoencoder.py",
        "(logvar.clamp(-30, 20) / 2).exp()", "logvar.clamp(-30, 20).exp()",
        "latents drawn with the wrong spread", "autoencoder:wrapper",
    ),
    Mutant(
        "held-out-images-trained-on", "training/trainer.py",
        "*order, cfg.data.workers, self.rows)", "*order, cfg.data.workers)",
        "PSNR of images that were trained on", "autoencoder:held_out",
    ),
    Mutant(
        "missing-weights-left-random", "checkpoints/autoencoder.py",
        'for what in ("missing_keys", "unexpected_keys"):', "for what in ():",
        "diffusers warns, and goes on with weights that were never trained", "autoencoder:no_autoencoder",
    ),
    # Latents
    Mutant(
        "latents-without-their-spread", "sources/codecs.py",
        "z = z + std[0] * draws.normal(z.shape, dtype)", "pass",
        "means alone: the decoder is given latents that it never saw", "latents:numbers",
    ),
    Mutant(
        "latents-of-the-mirrored-never-taken", "sources/codecs.py",
        "plain, mirrored = values.chunk(2, dim=1)", "plain = mirrored = values.chunk(2, dim=1)[0]",
        "data.flip does nothing", "latents:numbers",
    ),
    Mutant(
        "latents-scaled-without-their-mean", "sources/latents.py",
        "(-mean * scale).tolist()", "(0 * mean).tolist()",
        "x 0.5 / std alone: EDM2's channels keep means of up to 1.4 deviations", "latents:numbers or scalings",
    ),
    Mutant(
        "encoded-in-another-range", "sources/codecs.py",
        'return (x + 1) / 2 if input_range == "0,1" else x', "return (x + 1) / 2",
        "the autoencoder sees grey for black; the commonest fault reported", "latents:holds",
    ),
    Mutant(
        "decoded-in-another-range", "sources/codecs.py",
        'return 2 * y - 1 if self.autoencoder["input_range"] == "0,1" else y', "return y",
        "EDM2's samples come out pale", "latents:range",
    ),
    Mutant(
        "latents-of-the-unmirrored-twice", "sampling/encoding.py",
        '("_flip", x.flip(3))', '("_flip", x)',
        "the mirrored images' latents are the images'", "latents:holds",
    ),
    Mutant(
        "any-autoencoder-will-do", "sources/codecs.py",
        "if known.get(name) not in (None, here[name]):", "if False:",
        "samples decoded by another autoencoder, without a word", "latents:autoencoder",
    ),
    Mutant(
        "hidden-pixels-encoded", "sampling/tasks.py",
        "pixels = pixels.masked_fill(fill.to(pixels.device), 0)", "pass",
        "what is under the mask shines through the latents around it", "latents:hidden",
    ),
    # Shards
    Mutant(
        "image-of-another-shard", "sources/shards.py",
        "with open(self.stores[shard],", "with open(self.stores[0],",
        "bytes of the first shard under every label", "shards:path_is",
    ),
    Mutant(
        "tar-cut-at-a-member-read-as-whole", "sources/tars.py",
        "if len(block) < tarfile.BLOCKSIZE or any(block):", "if False:",
        "what follows the cut is silently not in the set, as tarfile does it", "shards:truncated_tar",
    ),
    Mutant(
        "bytes-of-a-whole-group", "sources/parquets.py",
        "[ends[0] : ends[-1]]", "",
        "a batch that is a slice of a row group brings the whole group's bytes", "shards:part_of_a_column",
    ),
    Mutant(
        "index-of-a-replaced-shard", "sources/shards.py",
        "os.path.abspath(part), info.st_size, info.st_mtime_ns, *read", "os.path.abspath(part), *read",
        "a replaced shard read through the old one's index", "shards:never_stale",
    ),
    Mutant(
        "decoded-cache-of-another-column", "sources/shards.py",
        "read = (cfg.image_column, cfg.label_column)", "read = ()",
        "the images of the column that was read before", "shards:columns_of_images",
    ),
    Mutant(
        "test-split-trained-on", "sources/shards.py",
        "    if len(where) > 1:\n        first", "    if False:\n        first",
        "the Hub's train-... and test-... lie in one folder", "shards:split",
    ),
    Mutant(
        "some-labels-are-none", "sources/shards.py",
        "    if all(label is None for label in labels):\n", "    if None in labels:\n",
        "one record without a label, and the whole set has none", "shards:some_records",
    ),
    # Own images
    Mutant(
        "choice-over-what-is-set", "training/own_images.py",
        "if _value(cfg, choice.key, 0) is None]", "if _value(cfg, choice.key, 0) != 0]",
        "a setting of the command line is chosen anew", "own_images:set_wins",
    ),
    Mutant(
        "resumed-run-looks-again", "training/own_images.py",
        "if resume and kept.exists():", "if False:",
        "a run whose folder grew is asked for another network", "own_images:goes_on",
    ),
    Mutant(
        "network-of-the-chosen-size", "training/own_images.py",
        "resolution = resolution or resolution_chosen.value", "resolution = resolution_chosen.value",
        "a network of 32 pixels where 16 are asked for", "own_images:set_wins",
    ),
    Mutant(
        "size-of-the-smallest", "training/own_images.py",
        "side = sides[len(sides) // 10]", "side = sides[0]",
        "one thumbnail among photographs, and all are thumbnails", "own_images:resolution",
    ),
    Mutant(
        "timing-left-in-the-log", "training/own_images.py",
        "    step.sums.clear()\n", "",
        "the first entry of the curves counts three steps too many", "own_images:timing",
    ),
    Mutant(
        "longer-side", "training/own_images.py",
        "return sorted(map(min, self.sizes))", "return sorted(map(max, self.sizes))",
        "a panorama 28 pixels high counts as large", "own_images:shorter",
    ),
    # Guidance told to the student
    Mutant(
        "told-w-beyond-its-range", "objectives/draws.py",
        "w[0] + (w[1] - w[0]) * self.uniform", "w[0] + w[1] * self.uniform",
        "w from w_min to w_min + w_max", "guided_distillation:target or whatever",
    ),
    Mutant(
        "told-w-of-lcms-convention", "objectives/common.py",
        'guided(teacher, conditions.get("guidance", w))',
        'guided(teacher, conditions["guidance"] + 1 if "guidance" in conditions else w)',
        "D + w (D - D_null): LCM's w, where ours is told", "guided_distillation:target or tangent",
    ),
    Mutant(
        "meanflow-guided-by-the-mean-w", "objectives/meanflow.py",
        'w = append_dims(told["guidance"], z) if told', 'w = told["guidance"].mean() if told',
        "one w guides, another is told", "guided_distillation:meanflows",
    ),
    Mutant(
        "w-told-as-it-is", "networks/preconditioning.py",
        "label = w.log() *", "label = w *",
        "w itself beside ln(sigma)/4: not 0 where unguided", "guided_distillation:ln_w or starts",
    ),
    Mutant(
        "second-evaluation-not-counted", "sampler.py",
        "w is None or w == 1 else 2", "w is None or w == 1 else 1",
        "guidance by two evaluations is said to cost one, and is not applied", "guided_distillation:mixed",
    ),
    Mutant(
        "sampled-outside-what-was-told", "config/rules.py",
        "not learned[0] <= w <= learned[1]", "not learned[0] <= w",
        "w above all that the network saw", "guided_distillation:refuses",
    ),
    Mutant(
        "any-teacher-will-do", "training/build.py",
        "if there.name not in known:", "if False:",
        "a consistency model is distilled as if it were a diffusion model", "guided_distillation:kind",
    ),
    # Weights & Biases, the model card, progress
    Mutant(
        "wandb-run-of-its-own", "training/weights_and_biases.py",
        "if not path.exists():", "if True:",
        "a resumed run is a second one, its curves begin in the middle", "wandb:resumed",
    ),
    Mutant(
        "wandb-failure-ends-the-run", "training/weights_and_biases.py",
        "except Exception as error:  # none of theirs", "except KeyError as error:  # none of theirs",
        "no network, no training", "wandb:start or later",
    ),
    Mutant(
        "wandb-pictures-by-channel", "training/weights_and_biases.py",
        "image.permute(1, 2, 0)", "image",
        "a grid of (3, H, W) shown as 3 rows", "wandb:resumed",
    ),
    Mutant(
        "card-over-a-users", "training/model_card.py",
        'path = folder / "README.new.md"', "pass",
        "the licence that a user filled in is gone when the run goes on", "model_card:again",
    ),
    Mutant(
        "card-with-markup-of-names", "training/model_card.py",
        'return re.sub(r"([\\\\`*_\\[\\]<>&|~#$@!])", r"\\\\\\1", printable(text))', "return printable(text)",
        "a folder's name is a tag or a link on the Hub", "model_card:name_breaks",
    ),
    Mutant(
        "card-time-of-the-last-process", "training/model_card.py",
        "seconds += (entry", "seconds = (entry",
        "a resumed run says the time since its last entry", "model_card:training_time",
    ),
    Mutant(
        "bars-in-files", "metrics/common.py",
        '"disable": None if shown else True', '"disable": not shown',
        "a log file fills with redrawn bars", "progress",
    ),
    # The demo
    Mutant(
        "demo-mask-everywhere", "studio.py",
        "[..., 3] > 127", "[..., 3] >= 0",
        "what is not painted is filled in too", "demo:edits_are",
    ),
    Mutant(
        "demo-pictures-of-one-name", "studio.py",
        'f"{name}-{hashlib.sha256(image.tobytes()).hexdigest()[:8]}.png"', 'f"{name}.png"',
        "a shown command reads the picture of a later one", "demo:edits_are",
    ),
    Mutant(
        "demo-edits-without-guidance", "studio.py",
        'words += [f"sample.guidance={guidance:g}"] if guidance is not None else []', "words += []",
        "the slider moves and nothing changes", "demo:edits_are",
    ),
    Mutant(
        "demo-levels-ignored", "studio.py",
        "        if levels.strip():", "        if not levels:",
        "noise levels are typed and not used", "demo:samples_are",
    ),
    Mutant(
        "demo-grid-transposed", "demo.py",
        "int(point[1] // cell) * columns", "int(point[0] // cell) * columns",
        "another sample than the clicked one is edited", "demo:place",
    ),
    Mutant(
        "tcm-after-a-diffusion-model", "training/build.py",
        '    **dict.fromkeys(("edm", "trigflow"), "a diffusion model"),\n', "",
        "the frozen stage gives targets that are no samples: here, until a review", "guided_distillation:kind",
    ),
    Mutant(
        "scoring-advised-without-labels", "training/run_folder.py",
        'self.cfg.metrics.features == "classifier" and not labelled', "False",
        "the command that a run ends with says that it cannot: here, until a review", "reports_messages:advised",
    ),
    Mutant(
        "own-batches-at-the-front", "training/evaluate.py",
        "made[own] = values", "made[: len(values)] = values",
        "one batch over another: a score of uninitialised memory", "autoencoder:every_20th",
    ),
    # What scores mean
    Mutant(
        "grey-as-red", "metrics/scores.py",
        "images.expand(-1, 3, -1, -1) if self.rgb",
        "torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 3 - images.shape[1])) if self.rgb",
        "a grey image is no more three equal channels: its FID compares with no paper's", "score_meaning:grey",
    ),
    Mutant(
        "statistics-of-other-weights", "metrics/weights.py",
        'f"rgb-{digest[:16]}"', '"rgb"',
        "samples by one Inception, the training set by another, from the cache", "score_meaning:inception_fid",
    ),
    Mutant(
        "an-image-left-out", "metrics/scores.py",
        "fid_features_to_statistics(features.double())", "fid_features_to_statistics(features.double()[1:])",
        "the statistics are not EDM's of the same images", "score_meaning:pngs",
    ),
    Mutant(
        "any-numbers-are-a-reference", "metrics/scores.py",
        "if not (finite and", "if False and not (finite and",
        "a damaged reference gives a figure, or a traceback after 50,000 samples", "score_meaning:refused",
    ),
    Mutant(
        "kid-of-small-subsets", "metrics/scores.py",
        "kid_subset_size=min(1000,", "kid_subset_size=min(100,",
        "KID of 100 images at a time where papers take 1,000", "score_meaning:kid",
    ),
    Mutant(
        "pixels-cut-off", "sources/codecs.py",
        "* 127.5).round().clamp(0, 255).to(torch.uint8)", "* 127.5).clamp(0, 255).to(torch.uint8)",
        "every sample half a level darker than EDM's", "score_meaning:pixels",
    ),
    Mutant(
        "sides-begin-elsewhere", "benchmarks/versus_sides.py",
        "    torch.manual_seed(0)\n", "",
        "ours and theirs start from other weights: luck, not losses, is compared", "versus:alike",
    ),
    Mutant(
        "numpy-draws-unseeded", "benchmarks/versus_sides.py",
        'np.random.seed(key(seed, "versus", step) % 2**32)', "pass",
        "a side that draws times by numpy gives another figure every time", "versus:alike",
    ),
    Mutant(
        "student-without-its-start", "benchmarks/versus_stages.py",
        "400, 0.004)\n    pair = network(case), network(case)\n    for model in pair:",
        "400, 0.004)\n    pair = network(case), network(case)\n    for model in pair[1:]:",
        "TCM's second stage from scratch", "versus:alike",
    ),
    Mutant(
        "rows-of-other-data-count", "benchmarks/versus.py",
        '{"cfg": DIGITS, "batch": 64, **row}.items()', "{**row, **wanted}.items()",
        "a figure of another dataset stands in the table", "versus:table",
    ),
    # benchmarks/gpu.sh
    Mutant(
        "original-not-scored", "benchmarks/original_ect.py",
        "torch._foreach_copy_(self.pairs[1], self.pairs[0])", "pass",
        "the original's weights never reach what is scored: its distance stays the start's", "gpu_sh:in_our_loop",
    ),
    Mutant(
        "original-goes-on-fresh", "benchmarks/original_ect.py",
        'self.original.optimizer.load_state_dict(state["original"])', "pass",
        "a stopped run of the original goes on without its moments", "gpu_sh:in_our_loop",
    ),
    Mutant(
        "original-parts-summed", "benchmarks/originals.py",
        "loss = self.loss(images) / parts", "loss = self.loss(images)",
        "a batch in parts has so many times its gradient", "gpu_sh:in_parts",
    ),
    Mutant(
        "share-of-ours", "benchmarks/gpu_table.py",
        "{r['scores'][first]['fid'] / other['scores'][first]['fid']:.2f}",
        "{other['scores'][first]['fid'] / r['scores'][first]['fid']:.2f}",
        "the share of the original's distance upside down", "gpu_sh:share",
    ),
]  # fmt: skip


def copy_repository(source: Path, folder: Path) -> None:
    """Copy what the tests need of the repository at `source` to `folder`."""
    for path in source.iterdir():
        if path.suffix in (".py", ".yml", ".toml", ".json"):
            shutil.copy(path, folder / path.name)
    rooms = [path.parent.name for path in source.glob("*/__init__.py")]
    for name in ("benchmarks", "configs", "tests", *rooms):
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
        path = mutant.file.removeprefix("benchmarks/").removesuffix(".py").removesuffix("/__init__")
        module = sys.modules.get(path.replace("/", "."))
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
