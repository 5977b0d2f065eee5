"""Ours against what a user would pick instead, turn by turn on one machine.

    python benchmarks/compare.py --cfg benchmarks/cpu.yml [--original PATH] [--random 3x32] [--out FILE.json]

A consistency step is ECT's: student forward and backward, target forward without gradients. Rows "network" are that
alone, by the same code for every network; rows "whole step" add data, optimizer and EMA. Against ours stand diffusers'
UNet2DModel of the same widths, blocks, dropout and attention resolutions, else in its default settings, and, with
--original, the SongUNet in a checkout of NVlabs/edm (its licence: non-commercial; nothing of it is here), which takes
our weights first and must give our output. Each in float32, and under autocast to the config's precision.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import checkout, flops, machine, peak_memory, random_images, save, seconds
from torch import nn

import config
import networks
from objectives.draws import Draws
from objectives.ect import EasyConsistencyTuning
from training import build, trainer

Step = Callable[[], None]


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="its network (song_unet), batch and precision")
    parser.add_argument("--original", type=Path, metavar="PATH", help="a checkout of github.com/NVlabs/edm")
    parser.add_argument("--random", metavar="CxR", default="3x32", help="channels and pixels of the images, of noise")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--repeats", type=int, default=1, help="steps in a turn")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            quiet = [f"run.dir={folder}/run", "train.init_from=null"]
            cfg = config.load(args.cfg, [*args.overrides, *quiet])
            trainer.data.load = lambda _: random_images(args.random)
            run = trainer.Trainer(cfg)
        except config.ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        rows = contestants(run, args.original)
        result = {
            "what": f"consistency step, {args.random}, batch {run.train_step.local_batch}",
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "rows": turns(rows, run, args.rounds, args.repeats),
            "machine": machine(run.device),
        }
    print(table(result))
    if args.out:
        save(result, args.out)
    return 0


def contestants(run: trainer.Trainer, original: Path | None) -> dict[str, tuple[Step, nn.Module]]:
    """Name -> (one step, its network)."""
    whole, device = run.train_step, run.device
    low, shape = build.HALF.get(whole.precision), whole.codec.network_shape
    ours = networks.build(run.cfg.network.model_dump(), **shape).to(device, memory_format=build.layout(device))
    theirs = {"diffusers": diffusers_unet(run).to(device)}
    if original:
        theirs["original"] = original_unet(run, original, ours).to(device)
    if run.cfg.train.compile is True or (run.cfg.train.compile == "auto" and device.type == "cuda"):
        ours.model.compile(dynamic=False)
    images = run.dataset.images[: whole.local_batch].to(device)
    rows: dict[str, tuple[Step, nn.Module]] = {"ours, whole step": (lambda: whole(images, None), whole.model)}
    for name, model in {"ours": ours, **theirs}.items():
        for autocast in dict.fromkeys([None, low]):
            arithmetic = "fp32" if autocast is None else whole.precision
            rows[f"{name}, network, {arithmetic}"] = (consistency_step(model, autocast, run), model)
    rows["diffusers, whole step, fp32"] = (plain_training(theirs["diffusers"], run), theirs["diffusers"])
    return rows


def consistency_step(model: networks.Preconditioner, autocast: torch.dtype | None, run: trainer.Trainer) -> Step:
    """Student forward, target forward, backward; gradients are dropped."""
    objective = EasyConsistencyTuning(1.0)
    x = torch.randn(run.train_step.local_batch, *run.dataset.shape, device=run.device)

    def step() -> None:
        model.autocast = autocast
        draws = Draws(0, len(x), device=run.device)
        objective(model, x, step=1, draws=draws).loss.mean().backward()
        model.zero_grad()

    return step


def plain_training(model: networks.Preconditioner, run: trainer.Trainer) -> Step:
    """The loop that a user writes around it: a batch to the device, the step, RAdam, an EMA by torch's own class."""
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-4)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999))
    objective = EasyConsistencyTuning(1.0)
    images = run.dataset.images[: run.train_step.local_batch]

    def step() -> None:
        model.autocast = None
        x = images.to(run.device).float() / 127.5 - 1
        loss = objective(model, x, step=1).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        loss.item()  # for the progress bar

    return step


class Theirs(nn.Module):
    """Another network in our preconditioner."""

    def __init__(self, net: nn.Module, call: Callable[..., torch.Tensor], run: trainer.Trainer):
        super().__init__()
        self.net, self.call = net, call
        self.img_channels, self.img_resolution, _ = run.dataset.shape
        self.label_dim = self.augment_dim = 0

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, *labels: None) -> torch.Tensor:
        return self.call(self.net, x, c_noise)


def diffusers_unet(run: trainer.Trainer) -> networks.Preconditioner:
    """UNet2DModel with the config's widths, blocks and attention resolutions; all else is its default."""
    from diffusers import UNet2DModel

    n, (channels, resolution, _) = run.cfg.network, run.dataset.shape
    attention = [resolution >> level in n.attn_resolutions for level in range(len(n.channel_mult))]
    net = UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(n.model_channels * mult for mult in n.channel_mult),
        layers_per_block=n.num_blocks,
        dropout=n.dropout,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
    )
    return networks.Preconditioner(Theirs(net, lambda net, x, c: net(x, c).sample, run))


def original_unet(run: trainer.Trainer, path: Path, ours: networks.Preconditioner) -> networks.Preconditioner:
    """EDM's SongUNet with our weights; it must give what ours gives."""
    with checkout(path):
        SongUNet = importlib.import_module("training.networks").SongUNet
    channels, resolution, _ = run.dataset.shape
    settings = run.cfg.network.model_dump()
    for name in ("name", "precond", "c_noise", "times", "heads", "guidance_inputs"):
        settings.pop(name)
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        settings.pop(name)
    for name in ("fourier_scale", "pixel_norm", "label_dropout"):  # which EDM's has not
        settings.pop(name)
    if settings.pop("scale_shift_norm"):
        raise SystemExit("compare.py: the original's SongUNet has no scale_shift_norm")
    net = SongUNet(resolution, channels, channels, **settings)
    with torch.no_grad():
        for p in ours.model.parameters():  # fresh, its last layers are almost zero, and hide what comes before
            p.add_(0.05 * torch.randn_like(p))
        net = net.to(run.device)
        net.load_state_dict(ours.model.state_dict())
        x = torch.randn(2, channels, resolution, resolution, device=run.device)
        c_noise = torch.tensor([-0.3, 0.4], device=run.device)
        expected = ours.model.eval()(x, c_noise)
        ours.train()
        error = float((net.eval()(x, c_noise, None) - expected).norm() / expected.norm())
    print(f"the original with our weights differs by {error:.1e}")
    if error > (1e-2 if run.device.type == "cuda" else 1e-4):  # a GPU's convolutions may round to TF32
        raise SystemExit("compare.py: the original and ours are not the same network")
    return networks.Preconditioner(Theirs(net.train(), lambda net, x, c: net(x, c, None), run))


def turns(
    rows: dict[str, tuple[Step, nn.Module]], run: trainer.Trainer, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Every contestant once a round, each round starting with another; medians, and ratios round by round."""
    device, names, took = run.device, list(rows), {name: [] for name in rows}
    result = {}
    for name, (step, network) in rows.items():
        result[name] = {
            "name": name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "flops_per_image": flops(step) / run.train_step.local_batch,
        }
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            result[name]["peak_memory"] = peak_memory(device)  # what the others hold included
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            step = rows[name][0]
            took[name].append(seconds(lambda step=step: [step() for _ in range(repeats)], device) / repeats)
    for name, row in result.items():
        row["seconds"] = statistics.median(took[name])
        row["images_per_second"] = run.train_step.local_batch / row["seconds"]
        pairs = zip(took[name], took[names[0]], strict=True)
        row["times_ours"] = statistics.median(theirs / ours for theirs, ours in pairs)
        own = name.replace("diffusers", "ours").replace("original", "ours")
        if own in took and own != name:
            row["times_our_network"] = statistics.median(a / b for a, b in zip(took[name], took[own], strict=True))
    return list(result.values())


def table(r: dict[str, Any]) -> str:
    """For people: how many times our whole step's time, and our network's in the same arithmetic, each takes."""
    m = r["machine"]
    lines = [
        f"{r['what']}: {m['hardware']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, {m['date']}",
        "",
        f"{'':30}{'M params':>9}{'GFLOP/img':>11}{'s/step':>9}{'images/s':>10}{'x our step':>12}{'x our network':>15}",
    ]
    for row in r["rows"]:
        ratio = f"{row['times_our_network']:15.2f}" if "times_our_network" in row else ""
        lines.append(
            f"{row['name']:30}{row['parameters'] / 1e6:9.2f}{row['flops_per_image'] / 1e9:11.2f}{row['seconds']:9.3f}"
            f"{row['images_per_second']:10.1f}{row['times_ours']:12.2f}{ratio}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
