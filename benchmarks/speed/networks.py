"""The compared networks: one architecture with each method, and the paper's formula as its authors compute it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pws
from benchmarks.speed.detectors import detector
from pws._errors import UnknownNameError
from pws._mark import marked
from pws.methods import METHODS, Method, build_method
from pws.models import MODELS, build_model, model_of
from pws.models.detectors import DETECTORS
from pws.surgery.standardized import to_layers

FORMULA: Final = "formula"
LAYERS: Final = "pws layers"
"""The layer form: `pws.Conv2d` and its kin, which compute their kernel in the forward pass."""
IN_BACKWARD: Final = "pws in backward"
"""`pws` with `step_in_backward=True`."""
REFERENCE: Final = "pws reference"
"""`pws` with the step in stock operators."""
WAYS: Final = (LAYERS, IN_BACKWARD, REFERENCE)
"""Rows that are `pws` trained in another way."""
LR: Final = 1e-4
MOMENTUM: Final = 0.9


def check_row(row: str) -> None:
    """Raise `UnknownNameError` unless `row` names a method, the formula or pws in one of its ways."""
    known = [*METHODS, FORMULA, *WAYS]
    if row not in known:
        raise UnknownNameError("row of a suite", row, known)


def kernels_of(row: str) -> AbstractContextManager[object]:
    """The row's implementation of the step, the automatic one but for `pws reference`."""
    return pws.kernels.use("reference" if row == REFERENCE else None)


def optimizer_of(row: str, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """SGD with momentum: of `pws.optim` for marked layers, with its bound; torch's for others, fused or as it comes."""
    if marked(model):
        return pws.optim.SGD(model, lr=LR, momentum=MOMENTUM, step_in_backward=row == IN_BACKWARD)
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=fused or None)


def network(model: str, row: str, width: float = 1.0) -> nn.Module:
    """The architecture `model` with the method of `row`, 1000 classes."""
    torch.manual_seed(0)
    if model in DETECTORS:
        return detector(model, row, width)
    method = _formula() if row == FORMULA else build_method("pws" if row in WAYS else row)
    if model in MODELS:
        built: nn.Module = build_model(model, method, num_classes=1000, width=width)
    else:
        built = _swap(model_of(model), method)
    if row == LAYERS:
        to_layers(built)
    return built


class FormulaConv2d(nn.Conv2d):
    """The paper's formula in stock operators, as its authors' code has it: layer norm over each filter, then two products."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardized weight."""
        shape = self.weight.shape[1:]
        kernel = F.layer_norm(self.weight, shape, eps=1e-3) * self.alpha * (2 / shape.numel()) ** 0.5
        output: Tensor = self._conv_forward(input, kernel, self.bias)
        return output


def _formula() -> Method:
    return Method(FORMULA, "Liu et al. 2021, as published code computes it", FormulaConv2d)


def _swap(model: nn.Module, method: Method) -> nn.Module:
    """Each BatchNorm, convolution and linear layer of a model of others replaced by the method's: the same computation beside
    the normalization, which is what is timed. (For a network to train, its plan has to be looked at: `pws.convert`.)"""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and method.norm is not nn.BatchNorm2d:
                activation = getattr(child, "act", nn.Identity())  # timm's BatchNormAct2d
                norm = method.norm(child.num_features) if method.norm else nn.Identity()
                setattr(parent, name, nn.Sequential(norm, activation))
            elif type(child) is nn.Conv2d and child.weight[0].numel() > 1:
                setattr(parent, name, _conv(child, method))
            elif type(child) is nn.Linear:
                setattr(parent, name, method.head(child.in_features, child.out_features))
    return model


def _conv(conv: nn.Conv2d, method: Method) -> nn.Module:
    size: Any = conv.kernel_size
    settings: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    bias = method.norm is None or conv.bias is not None
    return method.conv(conv.in_channels, conv.out_channels, size, groups=conv.groups, bias=bias, **settings)  # type: ignore[call-arg]
