"""Write images as latents: python encode.py --cfg images.yml --autoencoder NAME|FOLDER|CKPT --out FILE

A model is then trained on them with data.name: latents, data.path: FILE. The same command goes on where it was stopped;
torchrun starts it on several GPUs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import config
from config import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when done, 2 for bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    for i in range(len(words) - 1):
        if words[i] == "--input-range":  # -1,1 would be read as another option
            words[i : i + 2] = [f"--input-range={words[i + 1]}"]
            break
    args = arguments().parse_intermixed_args(words)
    return config.exit_code(lambda: run(args), "stopped; the same command goes on")


def arguments() -> config.Arguments:
    """The command's options."""
    parser = config.Arguments(description="Write images as latents of an autoencoder.", allow_abbrev=False)
    add, path = parser.add_argument, config.path_text
    add("--cfg", type=path, required=True, metavar="FILE", help="settings whose data section names the images")
    named = (
        "a diffusers folder, a name on the hub, as stabilityai/sd-vae-ft-mse, or a checkpoint of objective autoencoder"
    )
    add("--autoencoder", type=path, required=True, metavar="NAME", help=named)
    add("--out", type=path, required=True, metavar="FILE", help="the file to write, as latents.safetensors")
    what = "the pixels that the autoencoder is given: -1,1, as it was trained, or 0,1, as EDM2 does [-1,1]"
    add("--input-range", choices=["-1,1", "0,1"], default="-1,1", metavar="A,B", help=what)
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def run(args: argparse.Namespace) -> None:
    """Encode as the command asks, on all its devices."""
    cfg = config.load(args.cfg, args.overrides)
    if cfg.data.name == "latents" or cfg.data.augment:
        key, why = ("name", "these are latents already") if cfg.data.name == "latents" else ("augment", "set it to 0")
        raise ConfigError(f"data.{key}: images are encoded, as they are; {why}")
    import torch.distributed as dist

    import data
    from checkpoints import autoencoder
    from sampling import encoding
    from training import devices

    devices.start_ranks()
    device = devices.pick_device(cfg.run.device)
    devices.set_arithmetic(cfg.train.tf32)
    place = rank, _ = devices.rank_and_world()
    try:
        with devices.rank_0_first():
            images, coder = data.load(cfg.data), autoencoder.load(args.autoencoder, device)
        if not hasattr(images, "resolution"):
            raise ConfigError(f"data.path: {cfg.data.path} holds vectors; images are encoded")
        file = encoding.LatentFile(Path(args.out), *encoding.header(cfg, images, coder, args.input_range))
        if rank == 0:
            for line in images.said():
                print(line)
            file.begin()
        devices.wait_for_all()
        said = print if rank == 0 else lambda line: None
        encoding.encode(images, coder, file, args.input_range, device, place, cfg.data.workers, said)
        devices.wait_for_all()
        if rank == 0:
            mean, std = (" ".join(f"{value:.3g}" for value in values) for values in file.end())
            mirrored = " and of their mirror images" if cfg.data.flip else ""
            print(f"latents of {len(images):,} images{mirrored}, mean {mean}, std {std} a channel")
            print(f"written: {args.out}; train on it with data.name=latents data.path={args.out}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
