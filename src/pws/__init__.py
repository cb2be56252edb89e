"""Parametric Weights Standardization: train convolutional networks without BatchNorm."""

import typing as _typing

from pws import kernels, optim
from pws._clip_grad import clip_grad
from pws._errors import PwsError, ShapeError
from pws._gain import PAPER_GAIN, variance_preserving_gain
from pws._layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
    StandardizedLayer,
)
from pws._load import load
from pws._mark import Mark, mark, marked, unmark
from pws._param_groups import param_groups
from pws._standardize import standardize
from pws.diagnosis import CollapseWarning, Diagnosis, Monitor, diagnose, forecast
from pws.surgery import Plan, calibrate, convert, fold, plan

__all__ = [
    "PAPER_GAIN",
    "CollapseWarning",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Diagnosis",
    "Linear",
    "Mark",
    "Monitor",
    "Plan",
    "PwsError",
    "ShapeError",
    "StandardizedLayer",
    "calibrate",
    "clip_grad",
    "convert",
    "diagnose",
    "fold",
    "forecast",
    "kernels",
    "load",
    "mark",
    "marked",
    "optim",
    "param_groups",
    "plan",
    "standardize",
    "unmark",
    "variance_preserving_gain",
]

if _typing.TYPE_CHECKING:
    from pws import federated as federated
    from pws import private as private
    from pws import training as training
else:

    def __getattr__(name: str) -> object:
        """Rooms that need more than torch are imported when they are asked for."""
        if name not in ("federated", "private", "training"):
            raise AttributeError(f"module 'pws' has no attribute {name!r}")
        import importlib

        return importlib.import_module(f"pws.{name}")
