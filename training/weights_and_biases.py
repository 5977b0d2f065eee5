"""Weights & Biases (an optional package): a run's curves, grids and config in the project that train.wandb names."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable
from typing import Any

import torch

from checkpoints.disk import write_atomically
from config import Config, ConfigError


def check(cfg: Config) -> None:
    """Raise ConfigError where train.wandb asks for a package that is not there."""
    if cfg.train.wandb is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a mere folder of that name, as the package makes them for its files
        raise ConfigError("train.wandb: the package wandb is not installed: pip install wandb, or set it to null")


class WandbRun:
    """A run in Weights & Biases; a resumed one goes on under the id that the run folder keeps in `wandb-id`.

    Where it fails (no network, no login) that is said once, and the training goes on without.
    """

    def __init__(self, cfg: Config, say: Callable[[str], None]):
        self.say, self.run = say, None
        self.run = self.best_effort(_begin, cfg)

    def curves(self, step: int, values: dict[str, float]) -> None:
        """Each value to its curve."""
        self.log(step, lambda: values)

    def picture(self, step: int, image: torch.Tensor, caption: str = "") -> None:
        """A uint8 image (3, H, W), and what is said of it."""

        def entry() -> dict[str, Any]:
            import wandb

            return {"samples": wandb.Image(image.permute(1, 2, 0).cpu().numpy(), caption=caption)}

        self.log(step, entry)

    def log(self, step: int, entry: Callable[[], dict[str, Any]]) -> None:
        """The values of a step.

        Of a resumed run Weights & Biases may have steps after the checkpoint already: the same, and it takes no others.
        """
        if self.run is not None and step >= self.run.starting_step:
            self.best_effort(lambda: self.run.log(entry(), step=step))

    def finish(self, failed: bool) -> None:
        """Send what is left; with a network this waits until it is sent."""
        if self.run is not None:
            self.best_effort(self.run.finish, int(failed))

    def best_effort(self, work: Callable[..., Any], *args: Any) -> Any:
        """What work(*args) gives; None, for good, where it fails."""
        try:
            return work(*args)
        except Exception as error:  # none of theirs may end a run
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"warning: train.wandb: Weights & Biases failed ({reason}): the run goes on without it")
            self.run = None
            return None


def _begin(cfg: Config) -> Any:
    """The package's run, new or the one that the run folder keeps the id of."""
    import wandb

    path = cfg.run.folder / "wandb-id"
    if not path.exists():
        write_atomically(path, lambda file: file.write(secrets.token_hex(4).encode()))
    # What its console would copy is in the run's own lines; links would lead out of the run folder.
    settings = wandb.Settings(console="off", quiet=True, symlink=False)
    return wandb.init(
        project=cfg.train.wandb, name=cfg.run.name, id=path.read_text().strip(), resume="allow",
        dir=cfg.run.folder, config=cfg.model_dump(), settings=settings,
    )  # fmt: skip
