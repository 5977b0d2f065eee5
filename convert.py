"""Other people's checkpoints, in and out: the convert command.

python convert.py import SRC DST [--arch FILE.json]
python convert.py export CKPT DIR --to diffusers|safetensors|onnx
"""

import os
import pickle
import shutil
import sys
from pathlib import Path

from checkpoints import CheckpointError, config_of, edm, load, model_from, openai, write_state
from checkpoints.common import State
from checkpoints.diffusers import from_diffusers
from checkpoints.disk import write_atomically
from checkpoints.export import EXPORTS, from_safetensors
from config import Arguments, ConfigError, command, dump, exit_code, path_text

LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch.save's files began before they were zips


def main(argv: list[str] | None = None) -> int:
    """Convert as `argv` says. Exit code: 0 when done, 2 for bad input."""
    parser = Arguments(description="Read and write other people's checkpoints.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    formats = "EDM's or ECT's pickle, OpenAI's .pt, a diffusers folder or our safetensors"
    add = commands.add_parser("import", help=f"make a checkpoint of {formats}")
    add.add_argument("source", type=path_text, metavar="SRC", help="the file or folder; nothing in it is run")
    add.add_argument("target", type=path_text, metavar="DST", help="the checkpoint to write; its settings: DST.yml")
    told = "for OpenAI's files: image_size, num_head_channels, dropout, precond"
    add.add_argument("--arch", type=path_text, metavar="FILE.json", help=told)
    add = commands.add_parser("export", help="write a checkpoint's EMA weights for other programs")
    add.add_argument("source", type=path_text, metavar="CKPT", help="a checkpoint of this project")
    add.add_argument("target", type=path_text, metavar="DIR", help="a new folder")
    add.add_argument("--to", required=True, choices=tuple(EXPORTS), help="what to write")
    args = parser.parse_args(argv)

    def run() -> None:
        try:
            if args.command == "import":
                lines = import_checkpoint(args.source, args.target, args.arch)
            else:
                lines = export_checkpoint(args.source, args.target, args.to)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise ConfigError(f"{args.target}: cannot be written: {' '.join(str(error).split())[:200]}") from None
        print("\n".join(lines))

    return exit_code(run)


def import_checkpoint(source: str | Path, target: str | Path, arch: str | Path | None = None) -> list[str]:
    """Write the network in `source` as a checkpoint of ours, `target`, and its settings beside it, `target`.yml.

    source: EDM's or ECT's pickle, OpenAI's .pt file (`arch`: a JSON file with what its weights do not tell), diffusers'
    folder, or a safetensors file of ours. Both files must be new. Returns lines for the user. Raises CheckpointError.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
    settings = Path(f"{target}.yml")
    for path in (target, settings):
        if path.exists():
            raise CheckpointError(f"{path}: is there already, and nothing is written over; name another file")
    state, notes = read(source, arch)
    weights = model_from(state, source).state_dict()  # complete, of the right shapes, float32
    state |= {"model": weights, "ema": [weights]}
    write_state(target, state)
    write_atomically(settings, lambda file: file.write(dump(config_of(state, source)).encode()))
    sample = command("generate.py", "--cfg", settings, "--ckpt", target)
    return [*notes, f"written: {target}", f"written: {settings} (its settings); sample with", f"  {sample}"]


def read(path: Path, arch: str | Path | None = None) -> tuple[State, list[str]]:
    """The state in a file of another format, by what its first bytes say, and notes for the user."""
    if any((path / name).exists() for name in ("config.json", "unet", "model_index.json")):
        return from_diffusers(path)
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_TORCH))
    except OSError as error:
        folder = ", and no diffusers folder: it has no config.json" if path.is_dir() else ""
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{folder}") from None
    if head.startswith(b"PK") or head == LEGACY_TORCH:
        return openai.read(path, arch)
    if arch is not None:
        raise CheckpointError(f"--arch: is for OpenAI's .pt files; {path} says its own settings")
    if head[8:9] == b"{":
        return from_safetensors(path), []
    if head.startswith(b"\x80"):
        return edm.read(path)
    raise CheckpointError(f"{path}: is none of EDM's and ECT's pickles, OpenAI's .pt files and safetensors files")


def export_checkpoint(source: str | Path, folder: str | Path, to: str) -> list[str]:
    """Write a checkpoint's first EMA as `to` (a key of EXPORTS) into a new `folder`, whole or not at all.

    Returns lines for the user. Raises CheckpointError.
    """
    source, folder = Path(os.path.expanduser(source)), Path(os.path.expanduser(folder))
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already, and nothing is written over; name another folder")
    state = load(source)
    model = model_from(state, source)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        notes = EXPORTS[to](model, state, part)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    file = folder / "model.safetensors" if to == "safetensors" else folder
    if file.is_file() or (file / "unet" / "config.json").exists():
        again = command("convert.py", "import", file, f"{folder}.ckpt")
        notes = [*notes, f"it is read back by\n  {again}"]
    return [f"written: {folder}", *notes]


if __name__ == "__main__":
    sys.exit(main())
