"""Weights and state on disk: our checkpoints (state.py), and other people's, a file each (formats.py lists them)."""

from checkpoints.state import (
    CheckpointError,
    config_of,
    initialise,
    load,
    load_model,
    model_from,
    newest_good,
    numbered,
    save,
    saved,
    write_state,
)

__all__ = [
    "CheckpointError", "config_of", "initialise", "load", "load_model", "model_from", "newest_good", "numbered", "save",
    "saved", "write_state",
]  # fmt: skip
