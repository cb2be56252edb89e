"""The optimizer form of PWS: optimizers that keep the weights of marked layers standardized, while the model stays plain."""

from pws.optim.adamw import AdamW
from pws.optim.moving import NonFiniteGradientError
from pws.optim.sgd import SGD
from pws.optim.wrapped import Wrapped

__all__ = ["SGD", "AdamW", "NonFiniteGradientError", "Wrapped"]
