"""Optimizers in place of torch.optim's, whose state may live in the tiers."""

from offload.optim.adafactor import Adafactor
from offload.optim.adagrad import Adagrad
from offload.optim.adam import Adam, AdamW
from offload.optim.lion import Lion
from offload.optim.rmsprop import RMSprop
from offload.optim.sgd import SGD
from offload.optim.spill import spill

__all__ = ["SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "Lion", "RMSprop", "spill"]
