"""What a config describes, built on a device: network, teacher, objective; and compiled."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

import checkpoints
import networks
from config import Config, ConfigError, in_steps
from config.schema import FLOW_MAPS, Autoencode
from objectives import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    EasyConsistencyTuning,
    FlowMatching,
    ImprovedConsistencyTraining,
    ImprovedMeanFlow,
    KLAutoencoder,
    MeanFlow,
    MidTraining,
    ProgressiveDistillation,
    SoFlow,
    TruncatedConsistency,
    losses,
)
from objectives.draws import key
from training.step import HALF


def layout(device: torch.device) -> torch.memory_format:
    """Tensor cores read channels_last; a CPU's group norm is slower in it."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def build_model(cfg: Config, codec: torch.nn.Module, device: torch.device, precision: str) -> networks.Wrapper:
    """The network in training mode, with the weights of the seed, of train.init_from or of the teacher."""
    torch.manual_seed(key(cfg.run.seed, "weights"))  # the same on every rank: nothing to broadcast
    try:
        model = networks.build(cfg.network.model_dump(), **codec.network_shape)
    except ValueError as error:
        raise ConfigError(f"network: {error}") from None
    model.codec = codec
    teacher = getattr(cfg.objective, "teacher", None)
    start = cfg.train.init_from or teacher
    if start:
        try:
            model.started = checkpoints.initialise(model, start)
        except ConfigError:
            if teacher:  # of another kind, it is also another network
                refuse_teacher(cfg, checkpoints.load(teacher))
            raise
    model = model.to(device, memory_format=layout(device)).train()
    for block in model.modules():
        if hasattr(block, "checkpointing"):
            block.checkpointing = cfg.train.checkpointing
    if precision == "fp64":
        model.double()
    model.autocast = HALF.get(precision)
    return model


def say_what_attends_nowhere(cfg: Config, model: networks.Wrapper) -> None:
    """Warn where attn_resolutions, set and not left at its default, asks for attention at pixels that no level has."""
    if "attn_resolutions" not in cfg.network.model_fields_set:
        return
    levels = [model.img_resolution >> level for level in range(len(cfg.network.channel_mult))]
    if off := [str(res) for res in cfg.network.attn_resolutions if res not in levels]:
        what = f"no level has {' or '.join(off)} pixels: {', '.join(map(str, levels))}"
        print(f"warning: network.attn_resolutions: {what}", file=sys.stderr)


TEACHERS = {"meanflow": ("edm", "trigflow", *FLOW_MAPS), "pd": ("edm", "trigflow", "pd")}  # the others: edm, trigflow
KINDS = {  # the others: consistency models
    **dict.fromkeys(("edm", "trigflow"), "a diffusion model"),
    **dict.fromkeys(FLOW_MAPS, "a flow model"),
    "autoencoder": "an autoencoder",
    "pd": "distilled already",
}


def refuse_teacher(cfg: Config, state: dict[str, Any]) -> None:
    """Raise ConfigError for the state of a teacher of another kind than the method's, or that cannot be guided."""
    trained = checkpoints.config_of(state, cfg.objective.teacher)
    o, there = cfg.objective, trained.objective
    known, said = TEACHERS.get(o.name, ("edm", "trigflow")), f"objective.teacher: {o.teacher}"
    if o.name == "tcm":  # its first stage is a consistency model, of whatever kind
        known, needs = {there.name} - KINDS.keys(), "a consistency model (objective ect or ict)"
    else:
        needs = f"a {'diffusion or flow' if o.name == 'meanflow' else 'diffusion'} model (objective {', '.join(known)})"
    if there.name not in known:
        kind = KINDS.get(there.name, "a consistency model")
        raise ConfigError(f"{said}: is {kind} (objective {there.name}); {o.name} needs {needs}")
    if getattr(o, "guidance", None) is None:
        return
    if (before := getattr(there, "guidance", None)) is not None:
        raise ConfigError(f"{said}: is guided already (objective.guidance {before}); set objective.guidance: null here")
    imported = not state["optimizer"]  # other people's files do not say whether the network knows the null label
    if not imported and not getattr(trained.network, "label_dropout", 0) > 0:
        raise ConfigError(f"{said}: never saw the null label, which guidance needs: network.label_dropout was 0")


def load_teacher(cfg: Config, model: networks.Wrapper) -> networks.Wrapper | None:
    """The model of objective.teacher, in eval mode, in the arithmetic of `model`; None where the method has none."""
    path = getattr(cfg.objective, "teacher", None)
    if path is None:
        return None
    first = next(model.parameters())
    state = checkpoints.load(path)
    refuse_teacher(cfg, state)
    teacher = checkpoints.model_from(state, path).to(first.device)
    there = teacher.codec.network_shape
    for name, here in model.codec.network_shape.items():
        if there.get(name) != here and (name != "augment_dim" or here):
            raise ConfigError(f"objective.teacher: {path}: its {name} is {there.get(name)}, this run's {here}")
    if teacher.codec.state()["scaling"] != model.codec.state()["scaling"]:
        kind = model.codec.kind
        raise ConfigError(f"objective.teacher: {path}: was trained on {kind} of another mean, spread or bounds")
    teacher.autocast = model.autocast
    return teacher.to(dtype=first.dtype, memory_format=layout(first.device))


def build_objective(cfg: Config, model: torch.nn.Module, teacher: torch.nn.Module | None = None) -> torch.nn.Module:
    """The objective that `cfg` asks for, on `model`'s noise levels; `teacher` is the model of objective.teacher.

    Raises ConfigError, also where LPIPS has no VGG weights.
    """
    o, n, steps, batch = cfg.objective, cfg.network, cfg.train.steps, cfg.train.batch_size
    if o.name == "autoencoder":
        return build_autoencoding(o, next(model.parameters()).device)
    levels = {"sigma_min": n.sigma_min, "sigma_max": n.sigma_max}
    device = next(model.parameters()).device
    if o.name in ("ct", "cd", "ict", "cmt"):
        metric = getattr(o, "metric", "pseudo_huber")
        try:
            weights = getattr(o, "lpips_weights", None)
            distance = losses.build(metric, o.huber_c, weights, device, resize=o.name != "cmt")
        except losses.WeightsMissing as error:
            raise ConfigError(str(error)) from None

    match o.name:
        case "edm" | "trigflow":  # one loss in two clocks: only the preconditioning and P_mean, P_std differ
            return EDM(o.P_mean, o.P_std, n.sigma_data, getattr(o, "logvar", False))
        case "ct":
            grid = {**levels, "sigma_data": n.sigma_data}
            return ConsistencyTraining(model, steps, distance, o.s0, o.s1, o.mu0, o.weighting, **grid)
        case "cd":
            grid = {**levels, "sigma_data": n.sigma_data}
            how = (o.N, o.mu, o.solver, o.guidance, o.weighting)
            return ConsistencyDistillation(model, teacher, distance, *how, **grid)
        case "ict":
            pairs = (o.s0, o.s1, o.P_mean, o.P_std)
            return ImprovedConsistencyTraining(steps, distance, *pairs, **levels, difference=o.difference)
        case "ect":
            steps_per_stage = o.double_kimg * 1000 / batch if o.double_kimg else math.inf
            if o.stage is not None:
                steps_per_stage = in_steps(o.stage, steps, whole=False)
            how = (o.q, o.mapping, o.P_mean, o.P_std, o.huber_c, o.difference, o.weighting, n.sigma_data)
            return EasyConsistencyTuning(steps_per_stage, *how)
        case "sct" | "scd":
            how = (n.sigma_data, o.P_mean, o.P_std, in_steps(o.warmup, steps), o.c)
            return ContinuousConsistency(*how, teacher, getattr(o, "guidance", None), anchor=o.anchor)
        case "flow":
            return FlowMatching(o.P_mean, o.P_std)
        case "meanflow":
            settings = o.model_dump(exclude={"name", "teacher", "flow"})
            return MeanFlow(**settings, teacher=teacher, flow=in_steps(o.flow, steps))
        case "soflow":
            return SoFlow(steps, **o.model_dump(exclude={"name"}))
        case "imf":
            return ImprovedMeanFlow(**o.model_dump(exclude={"name"}))
        case "tcm":
            how = (o.t_prime, o.q, o.boundary_share, o.boundary_weight, o.df, o.scale, o.huber_c)
            for block in teacher.modules():  # the frozen stage drops as the student does
                if hasattr(block, "dropout"):
                    block.dropout = n.dropout
            return TruncatedConsistency(teacher, *how, n.sigma_max, o.weighting, n.sigma_data, o.difference)
        case "cmt":
            return MidTraining(teacher, distance, o.steps, **levels)
        case "pd":
            for name in ("precond", "c_noise"):  # the student will take the teacher's place
                there, here = (getattr(m, name, None) for m in (teacher, model))
                if there != here:
                    raise ConfigError(
                        f"network.{name}: is {here}, and objective.teacher's is {there}; pd needs the same"
                    )
            return ProgressiveDistillation(teacher, steps, o.N, o.weighting, **levels, sigma_data=n.sigma_data)
    raise AssertionError(f"config.py let through objective.name {o.name!r}")


def build_autoencoding(o: Autoencode, device: torch.device) -> KLAutoencoder:
    """The autoencoder's objective. Raises ConfigError where LPIPS has no VGG weights."""
    perceptual = None
    if o.lpips_weight:
        try:
            perceptual = losses.build("lpips", None, o.lpips_weights, device, resize=False)
        except losses.WeightsMissing as error:
            words = str(error).replace("objective.metric: lpips", "objective.lpips_weight")
            raise ConfigError(words.replace("objective.metric: l2", "objective.lpips_weight: 0")) from None
    return KLAutoencoder(losses.build(o.metric), o.kl_weight, perceptual, o.lpips_weight)


def compile_networks(how: bool | str, model: torch.nn.Module, objective: torch.nn.Module, shown: bool) -> None:
    """torch.compile the networks of a step, as train.compile says; where nothing compiles, say so (if `shown`)."""
    device = next(model.parameters()).device
    if how is False or (how == "auto" and device.type != "cuda"):
        return
    try:
        torch.compile(torch.nn.SiLU())(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no support: each raises its own
        if shown:
            reason = " ".join(str(error).split())[:150]
            print(f"warning: train.compile: nothing compiles here, training goes on without: {reason}", file=sys.stderr)
        return
    for module in [model, *objective.modules()]:
        if isinstance(module, networks.Wrapper):
            options = {"dynamic": False, "mode": how if how == "reduce-overhead" else None}
            module.model.compile(**options)
            module.compiled_jvp = torch.compile(module.network_jvp, **options)
