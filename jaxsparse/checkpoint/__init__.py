"""Checkpoints that a killed run can trust, on top of orbax."""

from jaxsparse.checkpoint._checkpointer import Checkpointer, Restored, restore_masks

__all__ = ["Checkpointer", "Restored", "restore_masks"]
