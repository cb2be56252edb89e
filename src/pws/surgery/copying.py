"""A copy of a model, or a clear error."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from pws._errors import PwsError, one_line
from pws.optim.sharding import is_sharded


def copy_of(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` holds what stands for parts of the model in it.

    Raises:
        PwsError: the model is sharded, or one of its modules holds what can't be copied: a tensor that autograd made.
    """
    try:
        return deepcopy(model, memo)
    except Exception as error:  # modules may hold anything
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise PwsError(
                f"{type(model).__name__} can't be copied: it is sharded by fully_shard. Gather its weights "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load them into "
                "the model that you built before sharding, and go on with that."
            ) from error
        raise PwsError(
            f"{type(model).__name__} can't be copied: {one_line(error)}. One of its modules keeps something that has no copy. "
            "Mostly it is a tensor that autograd made, such as an activation or a pruned weight. Keep a detached tensor, or "
            "make the pruning permanent by torch.nn.utils.prune.remove."
        ) from error
