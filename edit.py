"""Edit pictures with a trained model: python edit.py inpaint --cfg config.yml --ckpt FILE --input a.png --mask m.png

No training is needed for any of the tasks: they are linear constraints on sampling (2303.01469 algorithm 4).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
from config import Config, ConfigError
from sampling import choices
from sampling.choices import count, evaluations, natural, numbers

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from networks import Preconditioner
    from sampling.editing import Constraint

TASKS = {  # name -> (what it does, results, evaluations of each)
    "inpaint": ("fill in what --mask covers", 4, 40),
    "colorize": ("give colours to the picture's grey", 4, 40),
    "superres": ("give details to a picture --factor times smaller", 4, 40),
    "stroke": ("make a picture of a drawing", 4, 3),
    "denoise": ("take white noise away", 1, 1),
    "interpolate": ("go from one picture to another", 8, 3),
}
NEEDS = {"mask": ("inpaint",), "factor": ("superres",), "sigma": ("stroke", "denoise", "interpolate")}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when done, 2 for bad input."""
    args = arguments().parse_intermixed_args(argv)
    # --input takes what follows it, settings too.
    settings = [text for text in args.input if re.match(r"\w+\.\w+=", text)]
    args.input = [text for text in args.input if text not in settings]
    args.overrides += settings
    return config.exit_code(lambda: run(args))


def arguments() -> config.Arguments:
    """The command's options."""
    tasks = "tasks: " + "; ".join(f"{name}: {what}" for name, (what, _, _) in TASKS.items())
    parser = config.Arguments(description="Edit pictures with a trained model.", epilog=tasks, allow_abbrev=False)
    add, path = parser.add_argument, config.path_text
    add("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    add("--cfg", type=path, required=True, metavar="FILE", help="settings of the run: its own config.yml")
    add("--ckpt", type=path, required=True, metavar="FILE", help="checkpoint, as runs/NAME/checkpoints/last.ckpt")
    pictures = "pictures or folders of them; interpolate takes two"
    add("--input", type=path, required=True, nargs="+", metavar="FILE", help=pictures)
    add("--out", type=path, required=True, metavar="DIR", help="new folder for the results and strips")
    covered = "inpaint: what to fill in. A black and white image: the white; a drawing on a transparent or a plain "
    covered += "coloured ground: every stroke; or a box in the input's pixels, right and bottom edge not included"
    add("--mask", type=path, metavar="FILE|x0,y0,x1,y1", help=covered)
    add("--factor", type=count, metavar="N", help="superres: how many times smaller, in each direction")
    start = "denoise: the noise level, with pixels in [-1, 1] [estimated]; stroke, interpolate: how much noise hides "
    start += "the input, more changes more [5.38 for 256 pixels, less for fewer, at least sigma_data]"
    add("--sigma", type=float, metavar="S", help=start)
    levels = parser.add_mutually_exclusive_group().add_argument
    levels("--steps", type=evaluations, metavar="S", help="evaluations a result [40; stroke, interpolate 3, denoise 1]")
    levels("--sigmas", type=numbers, metavar="80,20,...", help="the noise levels of the evaluations instead")
    add("--seed", type=natural, default=0, metavar="K", help="the same seed gives the same results [0]")
    add("--class", type=natural, dest="class_index", metavar="C", help="class of the results [drawn, one by one]")
    add("--num", type=count, metavar="N", help="results for each input [4; denoise 1, interpolate 8]")
    add("--ema", type=natural, default=0, metavar="I", help="which of several averages, counted from 0 [0]")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that the task does not have, and say which it lacks. Raises ConfigError."""
    for option, tasks in NEEDS.items():
        if getattr(args, option) is not None and args.task not in tasks:
            raise ConfigError(f"--{option}: {args.task} takes none; it is for {', '.join(tasks)}")
    if args.task == "inpaint" and args.mask is None:
        raise ConfigError("--mask: inpaint needs one: an image (white is filled in), a drawing, or a box x0,y0,x1,y1")
    if args.task == "superres" and args.factor is None:
        raise ConfigError("--factor: superres needs one: how many times smaller the picture is, as --factor 4")
    if args.sigma is not None and args.sigmas is not None:
        raise ConfigError("--sigma: the first of --sigmas says it already; give one of the two")


@dataclass
class Problem:
    """One input, ready to be edited."""

    name: str  # of the files written
    image: torch.Tensor  # uint8 (C, R, R), the input
    seen: torch.Tensor  # uint8 (C, R, R), what an edit sees of it
    x: torch.Tensor  # (1, C, R, R) in [-1, 1], where it is edited
    sigmas: list[float]  # descending noise levels, one for each evaluation
    constraint: Constraint | None  # what is kept of x; None where nothing is exact


def run(args: argparse.Namespace) -> None:
    """Edit as the command asks."""
    check_options(args)
    cfg = config.load(args.cfg, args.overrides)
    import torch  # after the arguments and the config are known to be right: a typo is answered at once

    import data
    from metrics import pictures
    from training.devices import pick_device

    paths = input_files(args)
    device = pick_device(cfg.run.device)
    model, _ = choices.trained_model(args, cfg, device)
    check_model(args, model)
    num = args.num or TASKS[args.task][1]
    classes = chosen_classes(args, num, model)
    problems = [prepare(args, cfg, model, path) for path in paths]  # all that can be wrong is said before any work
    out = choices.new_folder(args, cfg)

    if args.task == "interpolate":
        jobs = [(f"{problems[0].name}_to_{problems[1].name}", problems)]
    else:
        several = len(problems) > 1  # their names may be the same
        jobs = [(f"{i:03d}_{p.name}" if several else p.name, [p]) for i, p in enumerate(problems)]
    started = time.perf_counter()
    for name, own in jobs:
        results = data.to_uint8(solve(args, own, model, num, classes)).cpu()
        before, after = ([own[0].image], [own[1].image]) if len(own) == 2 else ([own[0].image, own[0].seen], [])
        strip = torch.stack([*before, *results[:32], *after])
        pictures.write_png(pictures.grid(strip, columns=len(strip), tile=96), out / f"{name}_strip.png")
        for i, result in enumerate(results):
            pictures.write_png(result, out / f"{name}_{i:02d}.png")
    seconds = time.perf_counter() - started
    columns = "first | results | second" if args.task == "interpolate" else "input | what the model sees | results"
    total, steps = num * len(jobs), len(problems[0].sigmas)
    print(f"{args.task}: {total} results, {steps} evaluations each, seed {args.seed}: {seconds:.1f} s on {device}")
    print(f"written: {out}; strips show {columns}")


def input_files(args: argparse.Namespace) -> list[Path]:
    """The pictures that --input names, those of a folder by name."""
    from sources.files import SUFFIXES

    paths = []
    for path in map(Path, args.input):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower()[1:] in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"--input: {path} is a folder without pictures ({', '.join(SUFFIXES)})")
        paths += inside
    if args.task == "interpolate" and len(paths) != 2:
        raise ConfigError(f"--input: interpolate takes two pictures, and here are {len(paths)}")
    if not paths:
        raise ConfigError("--input: names no picture")
    return paths


def check_model(args: argparse.Namespace, model: Preconditioner) -> None:
    """Refuse a model that cannot do the task. Raises ConfigError."""
    if model.codec.kind != "images":
        raise ConfigError(f"--ckpt: {args.ckpt} makes vectors; editing is for images")
    if args.task == "colorize" and model.img_channels == 1:
        raise ConfigError(f"colorize: {args.ckpt} makes grey pictures; it takes a model trained with data.channels: 3")
    side, factor = model.img_resolution, args.factor
    if args.task == "superres" and (factor < 2 or side % factor):
        fits = ", ".join(str(n) for n in range(2, side + 1) if side % n == 0)
        what = f"does not divide the model's {side} pixels into blocks"
        raise ConfigError(f"--factor: {factor} {what}; choose one of {fits}")


def chosen_classes(args: argparse.Namespace, num: int, model: Preconditioner) -> torch.Tensor | None:
    """int64 (num,), the class of each result, or None without labels; one for the whole of an interpolation."""
    labels = choices.chosen_labels(args, 1 if args.task == "interpolate" else num, model.codec)
    if labels is None:
        return None
    if args.class_index is None:
        drawn = ", ".join(str(int(label)) for label in labels[:16])
        print(f"classes drawn: {drawn}{', ...' if len(labels) > 16 else ''}; --class C asks for one")
    return labels.expand(num)


def prepare(args: argparse.Namespace, cfg: Config, model: Preconditioner, path: Path) -> Problem:
    """Read one input, bring it to the model's size and channels, and settle what an edit may see of it."""
    import data
    from objectives.draws import sample_noise
    from sampling import editing
    from sources.images import fit_channels

    resolution, factor = model.img_resolution, args.factor or 1
    small = args.task == "superres" and min(picture(path, "--input").size) < resolution
    image = read(path, resolution // factor if small else resolution, model.img_channels)
    if small:
        image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    x = data.to_float(image[None]).to(next(model.parameters()).device)
    sigmas = noise_levels(args, cfg, x, path)

    constraint, seen = None, image
    if args.task == "inpaint":
        constraint = editing.inpainting(~mask(args.mask, picture(path, "--input").size, resolution))
    elif args.task == "colorize":
        constraint = editing.colorisation()
    elif args.task == "superres":
        constraint = editing.super_resolution(factor)
    if args.task == "colorize":  # as a picture, grey has three equal channels
        seen = fit_channels(fit_channels(image[None], 1), 3)[0]
    elif constraint:
        seen = data.to_uint8(editing.visible(x, constraint))[0].cpu()
    elif args.task == "stroke":  # under the noise of the first result
        noise = sample_noise(args.seed, [0], x.shape[1:])
        seen = data.to_uint8(x.cpu() + sigmas[0] * noise)[0]
    return Problem(path.stem, image, seen, x, sigmas, constraint)


def noise_levels(args: argparse.Namespace, cfg: Config, x: torch.Tensor, path: Path) -> list[float]:
    """Descending, one for each evaluation: --sigmas, or even steps down the Karras grid from where the task starts."""
    from sampler import karras_sigmas
    from sampling import editing, plan

    if args.sigmas is not None:
        return choices.chosen_levels(args, cfg)[0]
    low, high = plan.lowest_level(cfg), cfg.network.sigma_max
    if args.sigma is not None:
        if not low < args.sigma <= high:
            raise ConfigError(f"--sigma: {args.sigma} is outside what the network was trained for ({low} to {high})")
        start = args.sigma
    elif args.task == "denoise":
        start = float(editing.noise_level(x))
        print(f"{path}: noise level estimated at {start:.3g} (with pixels in [-1, 1]); --sigma S sets it")
        start = min(max(start, low), high)
    elif args.task in ("stroke", "interpolate"):
        # 2303.01469's level for strokes at 256 pixels. Noise of a level hides more of a smaller picture; below
        # sigma_data it hides little of any.
        start = min(max(5.38 * x.shape[-1] / 256, cfg.network.sigma_data), high)
    else:
        start = high
    return karras_sigmas((args.steps or TASKS[args.task][2]) + 1, low, start)[:-1].tolist()


def solve(
    args: argparse.Namespace, problems: list[Problem], model: Preconditioner, num: int, classes: torch.Tensor | None
) -> torch.Tensor:
    """The results (num, C, R, R), float32 in [-1, 1]. Result i of a seed has the same noise whatever the input.

    problems: one, or two to interpolate between; classes: int64 (num,).
    """
    import torch

    from objectives.draws import sample_noise
    from sampling import editing

    first = problems[0]
    device, shape = first.x.device, first.x.shape[1:]
    together = args.task == "interpolate"  # neighbours differ in the weight alone

    def noise(stream: str) -> torch.Tensor:
        return sample_noise(args.seed, [0] if together else range(num), shape, stream).to(device)

    settings: dict[str, Any] = {
        "noise_at": lambda i: noise(f"step {i}").expand(num, *shape),
        "sigma_min": model.sigma_min,
    }
    settings |= model.codec.told(classes, first.x)
    if first.constraint:
        # Algorithm 4 starts at y + sigma z, y what is seen of the input: it matters where the first level is low.
        z = noise("start") + editing.visible(first.x, first.constraint) / first.sigmas[0]
        x = editing.edit(model, first.x, *first.constraint, first.sigmas, z, **settings)
    elif args.task == "stroke":
        x = editing.stroke(model, first.x, first.sigmas, noise("start"), **settings)
    elif args.task == "denoise":
        x = editing.denoise(model, first.x.expand(num, *shape), first.sigmas, **settings)
    else:  # interpolate
        z = sample_noise(args.seed, [0, 1], shape).to(device)
        weights = torch.linspace(0, 1, num, device=device)
        x = editing.interpolate(model, first.x, problems[1].x, weights, first.sigmas, z, **settings)
    return x.clamp(-1, 1)


# Pictures and masks ---------------------------------------------------------------------------------------------------


def picture(path: Path, option: str) -> Image.Image:
    """The picture in a file, upright, in its own size and mode. ConfigError where there is none."""
    from PIL import ImageOps

    from sources.files import Files

    if not path.is_file():
        raise ConfigError(f"{option}: {path}: there is no such file")
    try:
        return ImageOps.exif_transpose(Files(str(path.parent), [path.name], zipped=False).open(0))
    except Exception as error:  # a damaged file can raise anything from a decoder
        raise ConfigError(f"{option}: {path} cannot be read ({' '.join(str(error).split())[:200]})") from None


def read(path: Path, resolution: int, channels: int) -> torch.Tensor:
    """The picture as training would see it, uint8 (C, R, R), with a printed note of what was done to it."""
    import torch

    from sources.files import BrokenImage, Files

    image = picture(path, "--input")
    try:
        files = Files(str(path.parent), [path.name], zipped=False, resolution=resolution, channels=channels)
        pixels = torch.from_numpy(files.decode(0).copy())
    except BrokenImage as error:
        raise ConfigError(f"--input: {path} cannot be read ({error})") from None
    mode, colours = ("L", "grey") if channels == 1 else ("RGB", "RGB")
    changes = {
        "cropped to its central square": image.width != image.height,
        f"resized to {resolution} x {resolution}": min(image.size) != resolution,
        f"{image.mode} made {colours}": image.mode != mode,
    }
    if done := [change for change, needed in changes.items() if needed]:
        print(f"{path}: {image.width} x {image.height} pixels, {', '.join(done)}")
    return pixels


def mask(text: str, size: tuple[int, int], resolution: int) -> torch.Tensor:
    """bool (R, R), True where to fill in: a box or a file for an input of `size` (width, height) pixels.

    It is cropped and resized with the input; a pixel of the model's that holds any of the mask is filled in.
    """
    import torch

    from sources.images import fit_resolution

    if re.fullmatch(r"\d+(,\d+){3}", text):
        x0, y0, x1, y1 = map(int, text.split(","))
        fill = torch.zeros(size[1], size[0], dtype=torch.bool)
        fill[y0:y1, x0:x1] = True
        how = "box"
    elif re.fullmatch(r"[\d\s.,-]+", text) and not Path(text).exists():
        raise ConfigError(f"--mask: {text} is no box; write four whole numbers left,top,right,bottom, as 8,8,24,24")
    else:
        fill, how = painted(Path(text))
        (height, width), side = fill.shape, (resolution, resolution)
        if (width, height) != side and abs(width * size[1] - height * size[0]) > max(width, height, *size):
            raise ConfigError(
                f"--mask: {text} is {width} x {height} pixels and the input {size[0]} x {size[1]}: draw it in the "
                f"input's shape, or in the model's ({resolution} x {resolution})"
            )
    square = fit_resolution(fill[None, None], None)[0].float()
    fill = torch.nn.functional.adaptive_max_pool2d(square, resolution)[0] > 0
    covered = int(fill.sum())
    if covered in (0, fill.numel()):
        what = "nothing: there is nothing to fill in" if covered == 0 else "everything: there is nothing to keep"
        raise ConfigError(
            f"--mask: {text} ({how}) covers {what} in the {resolution} x {resolution} pixels of the model"
        )
    print(f"mask {text} ({how}): {covered:,} of {fill.numel():,} pixels to be filled in")
    return fill


def painted(path: Path) -> tuple[torch.Tensor, str]:
    """What a mask file covers, bool (H, W), and how the file was understood."""
    import numpy as np
    import torch

    image = picture(path, "--mask")
    if image.mode[0] in "IF":  # 16 bits and more
        pixels = np.asarray(image, np.float64)
        return torch.from_numpy(pixels > pixels.max() / 2), "white is filled in"
    red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")).astype(np.int32), 2, 0)
    if alpha.min() < 255:
        return torch.from_numpy(alpha > 0), "a drawing on a transparent ground: all strokes are filled in"
    rgb = np.stack([red, green, blue])
    if (rgb.max(0) - rgb.min(0)).max() <= 32:  # only greys, with room for JPEG's colour errors
        threshold = 127 if green.max() > 1 else 0  # masks of zeros and ones are common
        return torch.from_numpy(green > threshold), "white is filled in"
    colours, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    ground = int(colours[counts.argmax()])
    away = np.abs(rgb - np.array([ground >> 16, ground >> 8 & 255, ground & 255]).reshape(3, 1, 1)).max(0)
    return torch.from_numpy(away > 32), f"a drawing on a ground of colour #{ground:06x}: all strokes are filled in"


if __name__ == "__main__":
    sys.exit(main())
