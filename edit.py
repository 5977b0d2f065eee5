"""Edit pictures with a trained model: python edit.py inpaint --cfg config.yml --ckpt FILE --input a.png --mask m.png

No training is needed for any of the tasks: they are linear constraints on sampling (2303.01469 algorithm 4).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import config
from config import Config, ConfigError
from sampling import choices
from sampling.choices import count, evaluations, natural, numbers

if TYPE_CHECKING:  # torch is imported after the arguments and the config are known to be right
    import torch

    from networks import Preconditioner
    from sampling.tasks import Problem

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
    covered = "inpaint: what to fill in. An image with transparency, as a photo with a part erased: what is "
    covered += "transparent; a black and white one: the white; a drawing on a plain coloured ground: every stroke; or "
    covered += "a box in the input's pixels, right and bottom edge not included"
    add("--mask", type=path, metavar="FILE|x0,y0,x1,y1", help=covered)
    add("--factor", type=count, metavar="N", help="superres: how many times smaller, in each direction")
    start = "denoise: the noise level, with pixels in [-1, 1] [estimated]; stroke, interpolate: how much noise hides "
    start += "the input, more changes more [5.38 for 256 pixels, less for fewer, at least sigma_data]"
    add("--sigma", type=float, metavar="S", help=start)
    levels = parser.add_mutually_exclusive_group().add_argument
    levels("--steps", type=evaluations, metavar="S", help="evaluations a result [40; stroke, interpolate 3, denoise 1]")
    levels("--sigmas", type=numbers, metavar="80,20,...", help="the noise levels of the evaluations instead")
    levels("--times", type=numbers, metavar="1,0.5,...", help="a flow map's times, from 1 (noise), instead")
    add("--seed", type=natural, default=0, metavar="K", help="the same seed gives the same results [0]")
    add("--class", dest="class_index", metavar="C", help="class of the results, by name or number [drawn, one by one]")
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
        what = "an image (what is transparent, or white, is filled in), a drawing, or a box x0,y0,x1,y1"
        raise ConfigError(f"--mask: inpaint needs one: {what}")
    if args.task == "superres" and args.factor is None:
        raise ConfigError("--factor: superres needs one: how many times smaller the picture is, as --factor 4")
    if args.sigma is not None and (args.sigmas or args.times):
        raise ConfigError(f"--sigma: the first of --{'sigmas' if args.sigmas else 'times'} says it already; give one")


def prepared(
    args: argparse.Namespace, cfg: Config, model: Preconditioner, paths: list[Path]
) -> tuple[list[Problem], int, torch.Tensor | None]:
    """The inputs, ready to be edited, how many results of each, and their classes. All that can be wrong is said."""
    from sampling import tasks

    tasks.check_model(args, model)
    _, usual_num, usual_steps = TASKS[args.task]
    num, steps = args.num or usual_num, args.steps or usual_steps
    classes = tasks.chosen_classes(args, num, model)
    return [tasks.prepare(args, cfg, model, path, steps) for path in paths], num, classes


def run(args: argparse.Namespace) -> None:
    """Edit as the command asks."""
    check_options(args)
    cfg = config.load(args.cfg, args.overrides)
    import torch  # after the arguments and the config are known to be right: a typo is answered at once

    from metrics import pictures
    from sampler import evaluations as evaluations_of
    from sampling import tasks
    from training.devices import pick_device, set_arithmetic

    paths = tasks.input_files(args)
    device = pick_device(cfg.run.device)
    set_arithmetic(cfg.train.tf32)
    model, _ = choices.trained_model(args, cfg, device)
    problems, num, classes = prepared(args, cfg, model, paths)
    out = choices.new_folder(args, cfg)

    if args.task == "interpolate":
        jobs = [(f"{problems[0].name}_to_{problems[1].name}", problems)]
    else:
        several = len(problems) > 1  # their names may be the same
        jobs = [(f"{i:03d}_{p.name}" if several else p.name, [p]) for i, p in enumerate(problems)]
    started = time.perf_counter()
    for name, own in jobs:
        results = tasks.solve(args, cfg, own, model, num, classes)
        before, after = ([own[0].image], [own[1].image]) if len(own) == 2 else ([own[0].image, own[0].seen], [])
        before[1:1] = [own[0].mask] if own[0].mask is not None else []
        strip = torch.stack([*before, *results[:32], *after])
        pictures.write_png(pictures.grid(strip, columns=len(strip), tile=96), out / f"{name}_strip.png")
        for i, result in enumerate(results):
            pictures.write_png(result, out / f"{name}_{i:02d}.png")
    seconds = time.perf_counter() - started
    columns = "first | results | second" if args.task == "interpolate" else "input | what the model sees | results"
    if args.task == "inpaint":
        columns = "input | mask, white filled in | what the model sees | results"
    total, steps = num * len(jobs), len(problems[0].levels) * evaluations_of(model, cfg.sample.guidance)
    print(f"{args.task}: {total} results, {steps} evaluations each, seed {args.seed}: {seconds:.1f} s on {device}")
    print(f"written: {out}; strips show {columns}")


if __name__ == "__main__":
    sys.exit(main())
