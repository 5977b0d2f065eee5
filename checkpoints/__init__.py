"""Weights and state on disk: our checkpoints (state.py), and other people's, a file each (convert.py lists them)."""

# ruff: noqa: F401, I001 (one module may take several lines)
from checkpoints.state import CheckpointError, config_of, initialise, load, load_model, model_from
from checkpoints.state import newest_good, numbered, save, saved, write_state
