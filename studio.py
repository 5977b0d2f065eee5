"""What demo.py asks of a trained model: the words of generate.py and edit.py, answered by their own functions."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import edit
import generate
from config import ConfigError
from sampling import choices

if TYPE_CHECKING:  # torch is imported after the command's arguments are known to be right
    import torch
    from PIL import Image

    from sources.images import ImageSet

TASKS = ("inpaint", "stroke", "colorize", "superres", "interpolate")  # those of edit.py's that are on the page


def config_beside(ckpt: str) -> str:
    """The config.yml of a checkpoint's run folder, or what convert.py import wrote beside it."""
    path = Path(ckpt)
    places = (f"{ckpt}.yml", path.parent.parent / "config.yml", path.parent / "config.yml")
    for place in map(Path, places):
        if place.is_file():
            return str(place)
    raise ConfigError(f"--cfg: there is no config.yml in the folder above {ckpt}; name the run's own")


@dataclass
class Answer:
    """Pictures, what is said of them, and the command that makes the same."""

    images: torch.Tensor  # uint8 (N, C, R, R)
    said: str
    command: str
    around: torch.Tensor | None = None  # uint8 (M, C, H, W): pictures beside them


class Studio:
    """A trained model of images, and the files that the commands on the page name."""

    def __init__(self, ckpt: str, cfg: str | None = None):
        from training.devices import pick_device, set_arithmetic

        self.words = ("--cfg", cfg or config_beside(ckpt), "--ckpt", ckpt)
        args = generate.arguments().parse_args(self.words)
        self.cfg = generate.settings(args)
        self.device = pick_device(self.cfg.run.device)
        set_arithmetic(self.cfg.train.tf32)
        self.model, self.step = choices.trained_model(args, self.cfg, self.device)
        if self.model.codec.kind == "vectors":
            raise ConfigError(f"--ckpt: {ckpt} makes vectors, and the demo is for images; generate.py samples it")
        self.folder = Path(tempfile.mkdtemp(prefix="demo-"))

    # What the model can do ----

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Those of edit.py's that the model can do."""
        return [task for task in TASKS if self.can(task)]

    def can(self, task: str) -> bool:
        """Whether edit.py does this task with the model."""
        from sampling import tasks

        words = [task, *self.words, "--input", "a.png", "--out", "edited"]
        words += ["--factor", str(self.factors[0])] if task == "superres" and self.factors else []
        try:
            tasks.check_model(edit.arguments().parse_args(words), self.model)
        except ConfigError:
            return False
        return task != "superres" or bool(self.factors)

    @functools.cached_property
    def factors(self) -> list[int]:
        """How many times smaller a picture can be whose details are added."""
        side = self.model.codec.image_shape[1]
        return [factor for factor in range(2, min(side, 16) + 1) if side % factor == 0]

    @functools.cached_property
    def classes(self) -> list[str]:
        """What --class takes, of every class that has been trained on: names, or numbers."""
        from sampling.samples import samples_of

        names = self.model.codec.classes or []
        shown = samples_of(self.model.codec).classes_shown()
        return [names[number] if number < len(names) else str(number) for number in shown]

    @functools.cached_property
    def guidance(self) -> tuple[float, float] | None:
        """The lowest and highest guidance that sampling takes; None for a model that takes none."""
        learned = getattr(self.cfg.objective, "guidance", None)
        low, high = learned if isinstance(learned, list) else (1.0, learned or 8.0)
        try:
            config.load(self.words[1], [f"sample.guidance={low}"])
        except ConfigError:
            return None
        return float(low), float(high)

    @functools.cached_property
    def heun(self) -> bool:
        """Whether the config samples by Heun's method, whose steps are a setting."""
        from sampling import plan

        return plan.plan(self.cfg)[1] == "heun"

    @functools.cached_property
    def levels(self) -> str:
        """What the evaluations' levels are called: sigmas, or a flow map's times."""
        from sampling import plan

        return plan.LEVELS[plan.clock(self.cfg)]

    def two_levels(self) -> list[float]:
        """The levels of two steps."""
        args = generate.arguments().parse_args([*self.words, "--steps", "2"])
        return choices.chosen_levels(args, self.cfg)[0]

    def hiding_noise(self) -> float:
        """edit.py's own --sigma where a drawing is the start."""
        from sampling import tasks

        args = edit.arguments().parse_args(["stroke", *self.words, "--input", "a.png", "--out", "edited"])
        return tasks.noise_level(args, self.cfg, None, self.model.shape[-1], Path())  # the picture is not looked at

    def name(self) -> str:
        """The model in words."""
        c, side, _ = self.model.codec.image_shape
        classes = f", {len(self.classes)} classes" if self.classes else ""
        kind = f"{self.cfg.objective.name}, {side} x {side} pixels, {'grey' if c == 1 else 'colour'}{classes}"
        return f"**{self.cfg.run.folder.name}** · {kind} · step {self.step:,} · {self.device}"

    # What it makes ----

    def sample(
        self, num: int, seed: int, of_class: str = "", steps: int = 1, levels: str = "",
        guidance: float | None = None, nearest: bool = False,
    ) -> Answer:  # fmt: skip
        """generate.py's samples; levels: numbers with commas between, in place of steps. Raises ConfigError."""
        words = [*self.words, "--num", int(num), "--seed", int(seed)]
        words += [f"--class={of_class}"] if of_class else []
        if levels.strip():
            words.append(f"--{self.levels}={self.checked(levels)}")
        else:
            words += [f"sample.heun_steps={int(steps)}"] if self.heun else ["--steps", int(steps)]
        words += [f"--guidance={guidance:g}"] if guidance is not None else []
        words += ["--format", "png", *(["--nearest"] if nearest else [])]
        args = generate.arguments().parse_intermixed_args([str(word) for word in words])
        generate.check(args)
        drawing, _ = generate.drawing_of(args, generate.settings(args), self.model, lambda: self.training_set)
        images = drawing.draw(0, drawing.num)
        said = f"{drawing.told('samples')} · {drawing.seconds:.2f} s on {self.device}"
        around = None
        if nearest:
            picture, copies = generate.beside_nearest(images, self.training_set, self.device, self.copy_threshold)
            said, around = f"{said}\n\nThe first of each row is a sample. {copies}", picture[None]
        return Answer(images, said, config.command("generate.py", *words), around)

    def edit(
        self, task: str, inputs: list[Path], num: int, seed: int, of_class: str = "", steps: int | None = None,
        guidance: float | None = None, **options: Any,
    ) -> Answer:  # fmt: skip
        """edit.py's results; options: mask, sigma, factor. Raises ConfigError."""
        import torch

        from sampling import tasks

        words = [task, *self.words, "--input", *inputs, "--out", "edited", "--num", int(num), "--seed", int(seed)]
        words += [f"--class={of_class}"] if of_class else []
        words += [] if steps is None else ["--steps", int(steps)]
        for option, value in options.items():
            words += [f"--{option}", value]
        words += [f"sample.guidance={guidance:g}"] if guidance is not None else []
        args = edit.arguments().parse_intermixed_args([str(word) for word in words])
        edit.check_options(args)
        cfg = config.load(args.cfg, args.overrides)
        started = time.perf_counter()
        problems, num, classes = edit.prepared(args, cfg, self.model, inputs)
        images = tasks.solve(args, cfg, problems, self.model, num, classes)
        seconds, nfe = time.perf_counter() - started, len(problems[0].levels)
        said = f"{num} results, {nfe} evaluations each, seed {seed} · {seconds:.2f} s on {self.device}"
        around = torch.stack([problem.image if task == "interpolate" else problem.seen for problem in problems])
        return Answer(images, said, config.command("edit.py", *words), around)

    def checked(self, levels: str) -> str:
        """Levels as the commands take them. Raises ConfigError."""
        words = [part.strip() for part in levels.strip(" ,").split(",")]
        try:
            choices.numbers(",".join(words))
        except ValueError:
            example = "80, 0.8" if self.levels == "sigmas" else "1, 0.5"
            raise ConfigError(
                f"{levels} are no {self.levels}: write numbers with commas between, as {example}"
            ) from None
        return ",".join(words)

    @functools.cached_property
    def training_set(self) -> ImageSet:
        """The config's. Raises ConfigError."""
        from sampling.samples import samples_of

        return samples_of(self.model.codec).training_set(self.cfg)

    @functools.cached_property
    def copy_threshold(self) -> float:
        """The distance to a training image up to which a sample counts as a copy."""
        from metrics import nearest

        return nearest.copy_threshold(self.training_set, self.device)

    # Files that the commands name ----

    def keep(self, image: Image.Image, name: str) -> Path:
        """The picture as a PNG file of the demo's folder, named by its content."""
        path = self.folder / f"{name}-{hashlib.sha256(image.tobytes()).hexdigest()[:8]}.png"
        image.save(path)
        return path

    def read(self, path: str | Path) -> torch.Tensor:
        """A picture as the model would see it, uint8 (C, R, R). Raises ConfigError for anything else."""
        from sampling import tasks

        channels, side, _ = self.model.codec.image_shape
        return tasks.read(Path(path), side, channels)

    def mask(self, layers: list[Image.Image]) -> Path:
        """The file of what is painted, white, in the model's pixels; one that holds any paint is white."""
        import numpy as np
        import torch
        from PIL import Image

        painted = [torch.from_numpy(np.asarray(layer.convert("RGBA"))[..., 3] > 127) for layer in layers]
        if not any(bool(layer.any()) for layer in painted):
            raise ConfigError("Nothing is painted yet: paint over what is to be made anew.")
        paint = torch.stack(painted).any(0).float()
        white = torch.nn.functional.adaptive_max_pool2d(paint[None], self.model.codec.image_shape[1])[0]
        return self.keep(Image.fromarray((white * 255).byte().numpy()), "mask")

    def drawing(self, composite: Image.Image | None) -> Path:
        """The file of a drawing on a canvas of one colour."""
        flat = composite and composite.convert("RGB")
        if not flat or all(low == high for low, high in flat.getextrema()):
            raise ConfigError("Nothing is drawn yet: draw something first.")
        return self.keep(flat, "drawing")
