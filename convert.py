"""Other people's checkpoints, in and out: the convert command.

python convert.py import SRC DST [--arch FILE.json]
python convert.py export CKPT DIR --to diffusers|safetensors|onnx
"""

import argparse
import sys

from checkpoints import formats
from config import Arguments, ConfigError, exit_code, path_text


def main(argv: list[str] | None = None) -> int:
    """Convert as `argv` says. Exit code: 0 when done, 2 for bad input."""
    parser = Arguments(description="Read and write other people's checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="make a checkpoint of an EDM pickle, an OpenAI .pt or a safetensors file")
    add.add_argument("source", type=path_text, metavar="SRC", help="the file to read; nothing in it is run")
    add.add_argument("target", type=path_text, metavar="DST", help="the checkpoint to write; its settings: DST.yml")
    told = "for OpenAI's files: image_size, num_head_channels, dropout, precond"
    add.add_argument("--arch", type=path_text, metavar="FILE.json", help=told)
    add = commands.add_parser("export", help="write a checkpoint's EMA weights for other programs")
    add.add_argument("source", type=path_text, metavar="CKPT", help="a checkpoint of this project")
    add.add_argument("target", type=path_text, metavar="DIR", help="a new folder")
    add.add_argument("--to", required=True, choices=tuple(formats.EXPORTS), help="what to write")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Convert as the command asks."""
    try:
        if args.command == "import":
            lines = formats.import_checkpoint(args.source, args.target, args.arch)
        else:
            lines = formats.export_checkpoint(args.source, args.target, args.to)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise ConfigError(f"{args.target}: cannot be written: {' '.join(str(error).split())[:200]}") from None
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
