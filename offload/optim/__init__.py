"""Optimizers whose state lives in the tiers of the model they train."""

from offload.optim.adamw import AdamW

__all__ = ["AdamW"]
