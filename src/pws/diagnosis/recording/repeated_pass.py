"""The forward pass of a training step once more, recorded to see which layer did what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pws._preserve import preserved
from pws.diagnosis.recording.recorder import Recorder


def record_again(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, rewind: Callable[[], None], args: Any, kwargs: Any
) -> Recorder:
    """Repeat a forward pass of `model` with the random numbers that `rewind` gives back, and record it.

    The model and the random generators are left as they are now.
    """
    recorder = Recorder(model, optimizer)
    # The other processes do not run this pass: a synchronized norm would wait for them for ever.
    synchronized = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    try:
        for norm in synchronized:
            norm.training = False
        # With gradients: the model may take some itself.
        with preserved(model), torch.enable_grad(), recorder.forward():
            rewind()
            model(*args, **kwargs)
            recorder.abandon()
    finally:
        recorder.close()
        for norm in synchronized:
            norm.training = True
    return recorder
