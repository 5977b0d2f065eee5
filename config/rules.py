"""Settings that are right alone and wrong together."""

import itertools
from collections.abc import Callable, Iterator

from config.errors import ConfigError
from config.schema import FLOW_MAPS, NEEDS_PATH, Config, tells_guidance

Broken = Iterator[tuple[str, str]]  # the key of each broken rule, and what to say about it
CHOSEN = (  # where they are null, training/own_images.py chooses them
    *("data.name", "data.conditional", "network.model_channels", "network.channel_mult", "network.num_blocks"),
    *("network.attn_resolutions", "train.batch_size", "train.steps"),
)


def undecided(cfg: Config) -> list[str]:
    """The settings that are still to be chosen by the images and the device."""
    pairs = [key.split(".") for key in CHOSEN]
    return [f"{part}.{key}" for part, key in pairs if getattr(getattr(cfg, part), key, 0) is None]


def check(cfg: Config, place: Callable[[str], str]) -> None:
    """Raises ConfigError for the first rule that is broken; `place(key)` says where a key was set."""
    if undecided(cfg):  # the rest when they are chosen
        if cfg.data.path is None and cfg.data.name in (None, *NEEDS_PATH):
            raise ConfigError(f"{place('data.path')}: data.path: set it to your images, a folder or a zip")
        return
    rules = (_autoencoder, _data_and_network, _objective, _ema_samples_and_scores)
    for key, message in itertools.chain(*(rule(cfg) for rule in rules)):
        raise ConfigError(f"{place(key)}: {key}: {message}")


def _autoencoder(cfg: Config) -> Broken:
    """What goes with the autoencoder of images, which is told no noise level and makes no samples."""
    d, n, o, s = cfg.data, cfg.network, cfg.objective, cfg.sample
    if (n.name == "autoencoder") != (o.name == "autoencoder"):
        key = "objective.name" if n.name == "autoencoder" else "network.name"
        yield key, "network autoencoder and objective autoencoder go together; set both"
    if o.name != "autoencoder":
        return
    if d.augment:
        yield "data.augment", "is for networks that are told of it, not for objective autoencoder; set it to 0"
    if cfg.train.compile not in ("auto", False):
        yield "train.compile", "an autoencoder is not compiled; set it to auto or false"
    for key in ("sigmas", "times", "guidance", "interval"):
        if getattr(s, key) is not None:
            yield f"sample.{key}", "an autoencoder draws no samples; set it to null"
    if o.lpips_weights is not None and not o.lpips_weight:
        yield "objective.lpips_weights", "is for objective.lpips_weight above 0"
    if o.held_out is not None and d.path is None:
        yield "objective.held_out", f"is read as data.path is, and data.name: {d.name} has none; set it to null"


def _data_and_network(cfg: Config) -> Broken:
    d, n, o, t = cfg.data, cfg.network, cfg.objective, cfg.train
    drops_labels = getattr(n, "label_dropout", 0) > 0
    if n.name == "mlp" and d.name != "npz":
        yield "network.name", "mlp makes vectors; set data.name: npz and data.path"
    if n.name == "mlp" and getattr(o, "metric", "") == "lpips":
        yield "objective.metric", "lpips compares images, not vectors"
    if d.bounds is not None and n.name != "mlp":
        yield "data.bounds", "is for vectors; set network.name: mlp"
    if n.name != "autoencoder" and n.sigma_min >= n.sigma_max:
        yield "network.sigma_min", f"must be below network.sigma_max ({n.sigma_max})"
    if d.name in NEEDS_PATH and d.path is None:
        yield "data.path", f"data.name: {d.name} needs the path of your images"
    if d.name not in NEEDS_PATH and d.path is not None:
        yield "data.path", f"data.name: {d.name} takes no path; your own images are a folder, zip, npz, tar or parquet"
    if d.name != "parquet" and (d.image_column or d.label_column):
        yield f"data.{'image' if d.image_column else 'label'}_column", "is for data.name: parquet; set it to null"
    if d.name != "latents" and (d.autoencoder or d.scaling):
        yield f"data.{'autoencoder' if d.autoencoder else 'scaling'}", "is for data.name: latents; set it to null"
    if d.name == "latents" and o.name == "autoencoder":
        yield "objective.name", "autoencoder takes images, and data.name is latents"
    if d.name == "latents" and getattr(o, "metric", "") == "lpips":
        yield "objective.metric", "lpips compares images, and data.name is latents"
    if drops_labels and not d.conditional:
        yield "network.label_dropout", "there are no labels to drop; set data.conditional: true"
    if drops_labels and getattr(o, "teacher", None):
        yield "network.label_dropout", f"objective {o.name} asks a teacher with the same labels; set it to 0"
    if isinstance(t.microbatch, int) and t.batch_size % t.microbatch != 0:
        yield "train.microbatch", f"must divide train.batch_size ({t.batch_size})"
    if getattr(n, "pixel_norm", False) and not n.scale_shift_norm:
        yield "network.pixel_norm", "normalises AdaGN; set scale_shift_norm: true"
    yield from sampled_guidance(cfg)
    if (t.lr_decay == "inverse_sqrt") != (t.lr_decay_batches is not None):
        yield "train.lr_decay_batches", "belongs to train.lr_decay: inverse_sqrt, which needs it"
    if t.lr_warmup >= t.steps:  # no share is
        yield "train.lr_warmup", f"must be below train.steps ({t.steps})"


def sampled_guidance(cfg: Config) -> Broken:
    """What goes with sample.guidance: also asked of a checkpoint's own objective, whatever the config says."""
    w, o, n = cfg.sample.guidance, cfg.objective, cfg.network
    learned = getattr(o, "guidance", None)
    if w is None:
        return
    if learned is not None and not n.guidance_inputs:
        yield "sample.guidance", f"objective {o.name} is guided in training (objective.guidance), and never again"
    if n.guidance_inputs and w < 1:
        yield "sample.guidance", "this network is told it, from 1 (not guided) upwards"
    if isinstance(learned, list) and not learned[0] <= w <= learned[1]:
        yield "sample.guidance", f"{w:g} is outside of objective.guidance {learned}, which the network was trained with"
    if not n.guidance_inputs and not getattr(n, "label_dropout", 0) > 0:
        known = "data.conditional: true and network.label_dropout above 0"
        yield "sample.guidance", f"needs a network that knows the null label: {known}"


def _objective(cfg: Config) -> Broken:
    d, n, o, t = cfg.data, cfg.network, cfg.objective, cfg.train
    if o.name in ("edm", "trigflow") and n.precond == "cm":
        weight = "its loss weight is made for edm and trigflow"
        yield "network.precond", f"objective {o.name} trains a denoiser, and {weight}"
    if getattr(o, "logvar", False) and n.name != "edm2_unet":
        yield "objective.logvar", f"needs a network that learns it, edm2_unet, and network.name is {n.name}"
    if o.name in ("sct", "scd") and n.precond != "trigflow":
        yield "network.precond", f"objective {o.name} needs trigflow"
    yield from _flow_maps(cfg)
    yield from _guided(cfg)
    if getattr(o, "anchor", 0) and n.c_noise != "t":
        yield "objective.anchor", "is told apart by the time -t; it needs network.c_noise: t"
    if o.name == "sct" and o.anchor and not t.init_from:
        yield "objective.anchor", "its cosine blows up on a fresh network, whose output is 0; set train.init_from"
    if getattr(o, "guidance", None) is not None and (not d.conditional or n.name == "mlp"):
        yield "objective.guidance", "guides by class labels; it needs images and data.conditional: true"
    if o.name == "pd" and o.N & (o.N - 1) != 0:
        yield "objective.N", "must be a power of two"
    if o.name == "tcm" and not n.sigma_min < o.t_prime < n.sigma_max:
        yield "objective.t_prime", f"must lie between network.sigma_min ({n.sigma_min}) and sigma_max ({n.sigma_max})"
    images = t.microbatch if isinstance(t.microbatch, int) else t.batch_size  # of a pass on one device
    if o.name == "cmt" and images % o.steps != 0:
        yield "objective.steps", f"must divide the images of a pass ({images})"
    if o.name == "soflow" and o.rho[0] < o.rho[1]:
        yield "objective.rho", "must not rise: l moves from r to t as the run goes on"
    if o.name in ("ct", "ict") and o.s1 < o.s0:
        yield "objective.s1", f"must be at least objective.s0 ({o.name})"
    if o.name == "ect" and o.stage is not None and o.double_kimg is not None:
        yield "objective.stage", "give either this or objective.double_kimg, and null for the other"
    if o.name != "autoencoder" and getattr(o, "lpips_weights", None) is not None and o.metric != "lpips":
        yield "objective.lpips_weights", f"is for objective.metric: lpips, and the metric is {o.metric}"


def _guided(cfg: Config) -> Broken:
    """What goes with guidance that is learned."""
    o, told = cfg.objective, tells_guidance(cfg.objective)
    if getattr(cfg.network, "guidance_inputs", False) != told:
        said = "tells the network its guidance" if told else "has no guidance to tell the network"
        yield "network.guidance_inputs", f"objective {o.name} {said}; set it to {str(told).lower()}"
    if hasattr(o, "label_dropout") and o.guidance is not None and getattr(cfg.network, "label_dropout", 0) > 0:
        yield "network.label_dropout", f"objective {o.name} drops labels itself (objective.label_dropout); set it to 0"
    if o.name == "meanflow" and o.interval[0] >= o.interval[1]:
        yield "objective.interval", "must rise"
    if o.name == "meanflow" and o.kappa and o.teacher:
        yield "objective.kappa", "mixes in the network's own velocity; with a teacher it is the teacher's, set it to 0"
    if o.name == "meanflow" and o.kappa and told:
        yield "objective.kappa", "would make the guidance another than the network is told; set it to 0"


def _levels_of_the_clock(cfg: Config) -> Broken:
    if cfg.network.name == "autoencoder":
        return
    s, flow_map = cfg.sample, cfg.network.times is not None
    if flow_map and s.sigmas is not None:
        yield "sample.sigmas", f"objective {cfg.objective.name} makes a flow map, which is told times: set sample.times"
    if not flow_map and s.times is not None:
        yield "sample.times", f"objective {cfg.objective.name} trains at noise levels: set sample.sigmas"
    if any(a <= b for a, b in itertools.pairwise(s.times or [])):
        yield "sample.times", "must descend"
    if s.solver in (("multistep",) if flow_map else ("jumps", "renoise")):
        others = "jumps, renoise or heun" if flow_map else "multistep or heun"
        yield "sample.solver", f"objective {cfg.objective.name} is sampled by {others}"
    if s.interval is not None and not cfg.network.guidance_inputs:
        yield "sample.interval", "is for networks that are told their guidance: network.guidance_inputs: true"
    if s.interval is not None and isinstance(getattr(cfg.objective, "guidance", None), list):
        yield "sample.interval", f"objective {cfg.objective.name} tells the network its guidance alone; set it to null"
    if s.interval is not None and s.interval[0] >= s.interval[1]:
        yield "sample.interval", "must rise"


def _flow_maps(cfg: Config) -> Broken:
    """What goes with two times, and with none."""
    n, o = cfg.network, cfg.objective
    if o.name == "autoencoder":
        return
    if o.name not in FLOW_MAPS:
        for key, told in (("precond", "flow"), ("c_noise", "time"), ("heads", 2)):
            if getattr(n, key) == told:
                yield f"network.{key}", f"objective {o.name} trains no flow map, which {told} is for; set it to null"
        if n.times is not None:
            yield "network.times", f"objective {o.name} tells the network a noise level, no times; set it to null"
        return
    if n.precond == "cm":
        yield "network.precond", f"objective {o.name} trains a velocity; it needs flow, edm or trigflow"
    if n.times == "t" and o.name != "flow":
        yield "network.times", f"objective {o.name} learns jumps from t to r, and t alone does not tell them apart"
    if n.times == "t-r" and o.name == "flow":
        yield "network.times", "t - r is 0 in flow matching, and the network is told nothing else"
    if n.times == "t-r" and n.c_noise != "time":
        yield "network.c_noise", "is a label of t, and network.times: t-r does not tell t; set it to time"
    if n.heads == 2 and o.name != "imf":
        yield "network.heads", f"objective {o.name} trains one head; set it to 1"


def _ema_samples_and_scores(cfg: Config) -> Broken:
    m, sigmas = cfg.metrics, cfg.sample.sigmas or []
    highest = getattr(cfg.network, "sigma_max", 0.0)  # an autoencoder has none
    if cfg.ema.decay is not None and cfg.ema.half_life_kimg is not None:
        yield "ema.half_life_kimg", "give either this or ema.decay, and null for the other"
    if cfg.ema.decay is None and cfg.ema.half_life_kimg is None and cfg.ema.std is None:
        yield "ema.decay", "there is no average to sample: give this, ema.half_life_kimg or ema.std"
    if any(a <= b for a, b in itertools.pairwise(sigmas)):
        yield "sample.sigmas", "must descend"
    if max(sigmas, default=0) > highest:
        yield "sample.sigmas", f"starts above network.sigma_max ({highest}), which the network never saw"
    yield from _levels_of_the_clock(cfg)
    if m.reference is not None and m.scores != ["fid"]:
        yield "metrics.scores", "metrics.reference has the statistics of a FID alone; set metrics.scores: [fid]"
    if m.reference is not None and m.features != "inception":
        yield "metrics.reference", "holds Inception statistics; set metrics.features: inception"
    if m.features != "inception" and "isc" in m.scores:
        yield "metrics.scores", "isc is defined on Inception's classes; set metrics.features: inception"
