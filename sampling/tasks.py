"""The tasks of edit.py: what is read of a picture and a mask, where sampling starts, and the results."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import data
from config import Config, ConfigError
from networks import FlowMap, Preconditioner
from objectives.draws import sample_noise
from sampler import guided, karras_sigmas, shares, to_data
from sampling import choices, editing, plan
from sources.files import SUFFIXES, BrokenImage, Files
from sources.images import fit_channels, fit_resolution


@dataclass
class Problem:
    """One input, ready to be edited."""

    name: str  # of the files written
    image: torch.Tensor  # uint8 (C, R, R), the input
    seen: torch.Tensor  # uint8 (C, R, R), what an edit sees of it
    x: torch.Tensor  # (1, *model.shape), what the model sees: pixels in [-1, 1], or latents
    levels: list[float]  # descending noise levels, or a flow map's times, one for each evaluation
    constraint: editing.Constraint | None  # what is kept of x; None where nothing is exact
    mask: torch.Tensor | None = None  # uint8 (C, R, R), white where to fill in


def input_files(args: argparse.Namespace) -> list[Path]:
    """The pictures that --input names, those of a folder by name."""
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
    if model.codec.kind == "vectors":
        raise ConfigError(f"--ckpt: {args.ckpt} makes vectors; editing is for images")
    if model.codec.kind == "latents" and args.task in ("colorize", "superres"):
        why = "keeps sums of pixels, which are no linear function of a latent"
        raise ConfigError(f"{args.task}: {why}; take a model of images, or inpaint, stroke, denoise or interpolate")
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


def prepare(args: argparse.Namespace, cfg: Config, model: Preconditioner, path: Path, steps: int) -> Problem:
    """Read one input, bring it to the model's size and channels, and settle what an edit may see of it."""
    (channels, resolution, _), factor = model.codec.image_shape, args.factor or 1
    size = picture(path, "--input").size
    small = args.task == "superres" and min(size) < resolution
    image = read(path, resolution // factor if small else resolution, channels)
    if small:
        image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    pixels = data.to_float(image[None]).to(next(model.parameters()).device)
    levels = chosen_levels(args, cfg, pixels, model.shape[-1], path, steps)

    constraint, seen, covered = None, image, None
    if args.task == "inpaint":
        fill = mask(args.mask, size, resolution)
        constraint, covered = in_model(fill, model), (fill * 255).to(torch.uint8).expand_as(image)
        pixels = pixels.masked_fill(fill.to(pixels.device), 0)  # an encoder looks beyond a latent's own pixels
    elif args.task == "colorize":
        constraint = editing.colorisation()
    elif args.task == "superres":
        constraint = editing.super_resolution(factor)
    x = model.codec.encode(pixels)
    if args.task == "colorize":  # as a picture, grey has three equal channels
        seen = fit_channels(fit_channels(image[None], 1), 3)[0]
    elif constraint:
        of_pixels = constraint if covered is None else editing.inpainting(~fill)
        seen = data.to_uint8(editing.visible(pixels, of_pixels))[0].cpu()
    elif args.task == "stroke":  # under the noise of the first result
        noise = sample_noise(args.seed, [0], x.shape[1:]).to(x.device)
        of_data, of_noise = shares(levels[0], model.clock)
        seen = model.codec.from_model(of_data * x + of_noise * noise)[0].cpu()
    return Problem(path.stem, image, seen, x, levels, constraint, covered)


def in_model(fill: torch.Tensor, model: Preconditioner) -> editing.Constraint:
    """What is kept of what the model sees, where `fill`, bool (R, R), is filled in: no latent of any pixel of it."""
    return editing.inpainting(torch.nn.functional.adaptive_max_pool2d(fill[None].float(), model.shape[-1])[0] == 0)


def chosen_levels(
    args: argparse.Namespace, cfg: Config, x: torch.Tensor, side: int, path: Path, steps: int
) -> list[float]:
    """Descending, an evaluation each: --sigmas or --times, or even `steps` from where the task starts: down the Karras
    grid, or in time."""
    if args.sigmas is not None or args.times is not None:
        return choices.chosen_levels(args, cfg)[0]
    start = noise_level(args, cfg, x, side, path)
    if plan.clock(cfg) == "time":
        first = 1.0 if start is None else start / (1 + start)
        return [first * (1 - i / steps) for i in range(steps)]
    start = cfg.network.sigma_max if start is None else start
    return karras_sigmas(steps + 1, plan.lowest_level(cfg), start)[:-1].tolist()


def noise_level(args: argparse.Namespace, cfg: Config, x: torch.Tensor, side: int, path: Path) -> float | None:
    """The noise, beside data in [-1, 1], under which the task hides its input; None where there is nothing but noise.

    A flow map's time t has t / (1 - t) of it. x: the input's pixels; side: of what the model sees, pixels or latents.
    """
    low, high, start = getattr(cfg.objective, "t_prime", cfg.network.sigma_min), cfg.network.sigma_max, None
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
        start = min(max(5.38 * side / 256, cfg.network.sigma_data), high)
    return start


def solve(
    args: argparse.Namespace, cfg: Config, problems: list[Problem], model: Preconditioner | FlowMap, num: int,
    classes: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The results, uint8 images (num, C, R, R) on the CPU; what a mask keeps is the input's, to the pixel.

    Result i of a seed has the same noise whatever the input.

    problems: one, or two to interpolate between; classes: int64 (num,).
    """
    first = problems[0]
    device, shape = first.x.device, first.x.shape[1:]
    together = args.task == "interpolate"  # neighbours differ in the weight alone

    def noise(stream: str) -> torch.Tensor:
        return sample_noise(args.seed, [0] if together else range(num), shape, stream).to(device)

    settings: dict[str, Any] = {"clock": model.clock, **model.codec.told(classes, first.x)}
    own_model = guided(model, cfg.sample.guidance, cfg.sample.interval)
    if model.clock == "time":
        own_model = to_data(own_model)
    else:
        settings["sigma_min"] = model.sigma_min
    settings["noise_at"] = lambda i: noise(f"step {i}").expand(num, *shape)
    if first.constraint:
        # Algorithm 4 starts at y + sigma z, y what is seen of the input: it matters where the first level is low.
        seen = editing.visible(first.x, first.constraint)
        z = editing.under(noise("start"), seen, first.levels[0], model.clock)
        x = editing.edit(own_model, first.x, *first.constraint, first.levels, z, **settings)
    elif args.task == "stroke":
        x = editing.stroke(own_model, first.x, first.levels, noise("start"), **settings)
    elif args.task == "denoise":
        x = editing.denoise(own_model, first.x.expand(num, *shape), first.levels, **settings)
    else:  # interpolate
        z = sample_noise(args.seed, [0, 1], shape).to(device)
        weights = torch.linspace(0, 1, num, device=device)
        x = editing.interpolate(own_model, first.x, problems[1].x, weights, first.levels, z, **settings)
    images = model.codec.from_model(x).cpu()
    return images if first.mask is None else first.image.where(first.mask == 0, images)


# Pictures and masks ---------------------------------------------------------------------------------------------------


def picture(path: Path, option: str) -> Image.Image:
    """The picture in a file, upright, in its own size and mode. ConfigError where there is none."""
    if not path.is_file():
        raise ConfigError(f"{option}: {path}: there is no such file")
    try:
        return ImageOps.exif_transpose(Files(str(path.parent), [path.name], zipped=False).open(0))
    except Exception as error:  # a damaged file can raise anything from a decoder
        raise ConfigError(f"{option}: {path} cannot be read ({' '.join(str(error).split())[:200]})") from None


def read(path: Path, resolution: int, channels: int) -> torch.Tensor:
    """The picture as training would see it, uint8 (C, R, R), with a printed note of what was done to it."""
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
    image = picture(path, "--mask")
    if image.mode[0] in "IF":  # 16 bits and more
        pixels = np.asarray(image, np.float64)
        return torch.from_numpy(pixels > pixels.max() / 2), "white is filled in"
    red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")).astype(np.int32), 2, 0)
    if alpha.min() < 255:  # erased, if only in part
        return torch.from_numpy(alpha < max(alpha.max(), 1)), "what is transparent is filled in"
    rgb = np.stack([red, green, blue])
    if (rgb.max(0) - rgb.min(0)).max() <= 32:  # only greys, with room for JPEG's colour errors
        threshold = 127 if green.max() > 1 else 0  # masks of zeros and ones are common
        return torch.from_numpy(green > threshold), "white is filled in"
    colours, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    ground = int(colours[counts.argmax()])
    away = np.abs(rgb - np.array([ground >> 16, ground >> 8 & 255, ground & 255]).reshape(3, 1, 1)).max(0)
    return torch.from_numpy(away > 32), f"a drawing on a ground of colour #{ground:06x}: all strokes are filled in"
