"""A copy of a model, or a clear error."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from pws.errors import PwsError, one_line


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` holds what stands for parts of the model in it.

    Raises:
        PwsError: the model holds a tensor that autograd made.
    """
    try:
        return deepcopy(model, memo)
    except RuntimeError as error:
        raise PwsError(
            f"{type(model).__name__} can't be copied: {one_line(error)}. One of its modules keeps a tensor that autograd made, "
            "such as an activation or a pruned weight: keep a detached one, or make the pruning permanent by "
            "torch.nn.utils.prune.remove."
        ) from error
