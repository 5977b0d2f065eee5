"""A training step of the original ECT code, in its own float32 defaults: images/s, MFU, peak memory.

    python benchmarks/original.py PATH --cfg configs/cifar10_ect.yml --stage 15 [section.key=value ...] [--out FILE]

PATH is a checkout of github.com/locuslab/ect (its licence: non-commercial; nothing of it is here). Its network, loss,
RAdam and average, eager, with TF32 off and cudnn.benchmark on; widths, dropout, rate and batch are the config's. Its
DistributedDataParallel and DataLoader are left out: batches of noise are on the device already.
"""

import argparse
import contextlib
import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import checkout, flops, machine, matmul_peak, peak_memory, random_images, save, seconds

import config
from training.devices import pick_device, set_arithmetic

OURS = ("name", "precond", "c_noise", "times", "heads", "guidance_inputs")  # settings that EDM's network has not
OURS += ("fourier_scale", "scale_shift_norm", "pixel_norm", "label_dropout")


def main() -> int:
    parser = config.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout of github.com/locuslab/ect")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="its network (song_unet), batch size and rate")
    parser.add_argument("--random", metavar="CxR", default="3x32", help="channels and pixels of the images, of noise")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    try:
        result = measure(args)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{result['what']}, {result['parameters'] / 1e6:.2f}M parameters, fp32: "
        f"{result['images_per_second']:,.1f} images/s, MFU {result['share_of_peak']:.1%} of "
        f"{result['matmul_peak'] / 1e12:.3f} TFLOP/s, peak memory {result['peak_memory'] / 2**30:.2f} GiB"
    )
    if args.out:
        save(result, args.out)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    cfg = config.load(args.cfg, args.overrides)
    device, batch = pick_device(cfg.run.device), cfg.train.batch_size
    set_arithmetic(tf32=False)
    network, step = original_step(args, cfg, device)
    for _ in range(args.warmup):
        step(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = seconds(lambda: [step(batch) for _ in range(args.steps)], device) / args.steps
    memory, operations = peak_memory(device), flops(lambda: step(1))
    peak = matmul_peak(device, "fp32", 1.0)
    return {
        "what": f"original ECT at stage {args.stage}, {args.random}, batch {batch}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "stage": args.stage,
        "batch": batch,
        "precision": "fp32",
        "seconds": took,
        "images_per_second": batch / took,
        "peak_memory": memory,
        "flops_per_image": operations,
        "matmul_peak": peak,
        "share_of_peak": operations * batch / took / peak,
        "machine": machine(device),
    }


def original_step(
    args: argparse.Namespace, cfg: config.Config, device: torch.device
) -> tuple[torch.nn.Module, Callable[[int], None]]:
    """(its network, a training step on so many images)."""
    channels, resolution = map(int, args.random.split("x"))
    settings = {name: value for name, value in cfg.network.model_dump().items() if name not in OURS}
    levels = {name: settings.pop(name) for name in ("sigma_min", "sigma_max", "sigma_data")}
    with checkout(args.path):
        networks, losses = (importlib.import_module(f"training.{name}") for name in ("networks", "loss"))
        shape = {"img_resolution": resolution, "img_channels": channels, "model_type": "SongUNet"}
        network = networks.ECMPrecond(**shape, sigma_data=levels["sigma_data"], **settings).to(device).train()
        average = copy.deepcopy(network).eval().requires_grad_(False)
        loss = losses.ECMLoss()
    loss.update_schedule(args.stage)
    optimizer = torch.optim.RAdam(network.parameters(), lr=cfg.train.lr, betas=(0.9, 0.999), eps=1e-8)
    images = random_images(args.random, max(cfg.train.batch_size, 2)).images.to(device)

    def step(count: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        with on_device(device):
            loss(net=network, images=images[:count].float() / 127.5 - 1).mean().backward()
        for p in network.parameters():
            torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(average.parameters(), network.parameters(), strict=True):
                p.copy_(q.lerp(p, cfg.ema.decay[0]))

    return network, step


def on_device(device: torch.device) -> Any:
    """Its loss keeps the state of CUDA's generator; on a CPU, of the CPU's."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    return mock.patch.multiple(torch.cuda, get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state)


if __name__ == "__main__":
    sys.exit(main())
