"""Weights and state on disk, ours and other people's."""

from checkpoints.state import *  # noqa: F403
