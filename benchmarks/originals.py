"""The original code of EDM, ECT and MeanFlow, from checkouts of one's own: network, loss, optimizer and averages.

    https://github.com/NVlabs/edm, https://github.com/locuslab/ect, https://github.com/Gsunshine/py-meanflow

None of it is here, and none of it is changed (the first two licences: non-commercial). It computes as its own training
loop has it: EDM and ECT eager in float32, TF32 off; MeanFlow compiled, TF32 on, forward mode in float32. Its
DistributedDataParallel and DataLoader are left out: batches are on the device already.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import checkout
from torch import Tensor, nn

import config

OURS = ("name", "precond", "c_noise", "times", "heads", "guidance_inputs")  # settings that EDM's network has not
OURS += ("fourier_scale", "scale_shift_norm", "pixel_norm", "label_dropout")
ALL_OF_IT = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}  # EDM's pipe
UPRIGHT = {**ALL_OF_IT, "yflip": 0, "rotate_frac": 0}  # MeanFlow's


@dataclass
class Original:
    """A side of somebody else's."""

    network: nn.Module  # trained
    loss: Callable[[Tensor], Tensor]  # of images in [-1, 1], (B, C, R, R), float32: the mean
    optimizer: torch.optim.Optimizer
    average: Callable[[], None]  # after each optimizer step
    tf32: bool = False
    compiled: bool = False
    clean: bool = True  # whether its loop replaces what is not finite in a gradient
    microbatch: int | None = None
    schedule: Callable[[float], None] | None = None  # ECT's: sets the stage

    def step(self, images: Tensor) -> Tensor:
        """An optimizer step; the mean loss."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = images.split(self.microbatch or len(images))
        total = sum(self.backward(part, len(parts)) for part in parts)
        if self.clean:
            for p in self.network.parameters():
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        self.average()
        return total

    def backward(self, images: Tensor, parts: int) -> Tensor:
        """The gradient of one of so many parts of a batch; its share of the mean loss."""
        loss = self.loss(images) / parts
        loss.backward()
        return loss.detach()

    def compile(self) -> None:
        """As its own loop does, the pass with its backward."""
        self.backward = torch.compile(self.backward)
        self.compiled = True


def ect(path: Path, cfg: config.Config, shape: tuple[int, int], device: torch.device, stage: float = 0) -> Original:
    """ECT at a stage. shape: (channels, resolution)."""
    network = edm_network(path, "ECMPrecond", cfg, shape, device)
    with checkout(path):
        loss = importlib.import_module("training.loss").ECMLoss(
            **{name: getattr(cfg.objective, name) for name in ("P_mean", "P_std", "q")},
            sigma_data=cfg.network.sigma_data,
            c=cfg.objective.huber_c,
            adj=cfg.objective.mapping,
        )
    loss.update_schedule(stage)

    def mean(images: Tensor) -> Tensor:
        with on_device(device):
            return loss(net=network, images=images).mean()

    optimizer = torch.optim.RAdam(network.parameters(), lr=cfg.train.lr, betas=(0.9, 0.999), eps=1e-8)
    return Original(network, mean, optimizer, averaging(network, cfg), schedule=loss.update_schedule)


def edm(path: Path, cfg: config.Config, shape: tuple[int, int], device: torch.device, stage: float = 0) -> Original:
    """EDM with its augmentation, where the config has any."""
    network = edm_network(path, "EDMPrecond", cfg, shape, device, augment_dim=9 if cfg.data.augment else 0)
    with checkout(path):
        loss = importlib.import_module("training.loss").EDMLoss(
            cfg.objective.P_mean, cfg.objective.P_std, cfg.network.sigma_data
        )
        pipe = importlib.import_module("training.augment").AugmentPipe(p=cfg.data.augment, **ALL_OF_IT)
    pipe = pipe if cfg.data.augment else None
    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.train.lr, betas=(0.9, 0.999), eps=1e-8)
    return Original(
        network,
        lambda images: loss(net=network, images=images, augment_pipe=pipe).mean(),
        optimizer,
        averaging(network, cfg),
    )


def py_meanflow(
    path: Path, cfg: config.Config, shape: tuple[int, int], device: torch.device, stage: float = 0
) -> Original:
    """MeanFlow with its augmentation, where the config has any, and its three averages."""
    o, (channels, resolution) = cfg.objective, shape
    with checkout(path / "meanflow"):
        code, unet, augment = (importlib.import_module(f"models.{name}") for name in ("meanflow", "unet", "augment"))
    args = types.SimpleNamespace(
        **{"tr_sampler": o.sampler, "norm_p": o.p, "norm_eps": o.eps, "ratio": o.ratio},
        **{name: getattr(o, name) for name in ("P_mean_t", "P_std_t", "P_mean_r", "P_std_r")},
        **{"ema_decay": 0.9999, "ema_decays": [0.99995, 0.9996]},
    )
    settings = {"img_resolution": resolution, "in_channels": channels, "out_channels": channels}
    settings |= {**of_song_unet(cfg), "augment_dim": 6 if cfg.data.augment else 0}
    model = code.MeanFlow(unet.SongUNet, args, settings).to(device).train()
    pipe = augment.AugmentPipe(p=cfg.data.augment, **UPRIGHT)

    def mean(images: Tensor) -> Tensor:
        return model.forward_with_loss(*(pipe(images) if cfg.data.augment else (images, None)))

    optimizer = torch.optim.Adam(model.net.parameters(), lr=cfg.train.lr, betas=(0.9, 0.999))
    side = Original(model.net, mean, optimizer, model.update_ema, tf32=True, clean=False)
    if device.type == "cuda":
        side.compile()
    return side


CODES = {"ect": ect, "edm": edm, "py-meanflow": py_meanflow}


def of_song_unet(cfg: config.Config) -> dict[str, Any]:
    """The settings of EDM's SongUNet."""
    levels = ("sigma_min", "sigma_max", "sigma_data")
    return {name: value for name, value in cfg.network.model_dump().items() if name not in (*OURS, *levels)}


def edm_network(
    path: Path, name: str, cfg: config.Config, shape: tuple[int, int], device: torch.device, **settings: Any
) -> nn.Module:
    """A preconditioned SongUNet of the checkout, in training mode."""
    with checkout(path):
        kind = getattr(importlib.import_module("training.networks"), name)
        channels, resolution = shape
        network = kind(
            img_resolution=resolution,
            img_channels=channels,
            model_type="SongUNet",
            sigma_data=cfg.network.sigma_data,
            **of_song_unet(cfg),
            **settings,
        )
    return network.to(device).train()


def averaging(network: nn.Module, cfg: config.Config) -> Callable[[], None]:
    """What moves an average of the network as EDM's and ECT's loops do, one parameter at a time."""
    average = copy.deepcopy(network).eval().requires_grad_(False)
    decay = cfg.ema.decay[0] if cfg.ema.decay else 0.5 ** (cfg.train.batch_size / cfg.ema.half_life_kimg[0] / 1000)

    @torch.no_grad()
    def move() -> None:
        for p, q in zip(average.parameters(), network.parameters(), strict=True):
            p.copy_(q.lerp(p, decay))

    return move


def on_device(device: torch.device) -> Any:
    """ECT's loss keeps the state of CUDA's generator; on a CPU, of the CPU's."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    return mock.patch.multiple(torch.cuda, get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)
