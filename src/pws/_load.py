"""`pws.load`: the way from a run's folder to its network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pws._errors import PwsError

if TYPE_CHECKING:
    import torch

    from pws.training.trained import Trained


def load(run: str | Path, checkpoint: str = "best", *, device: str | torch.device = "cpu") -> Trained:
    """Load the network of a run, ready to predict; the run's data are not needed.

        model = pws.load("runs/fashion-mnist-allconv-pws")
        labels = model.predict(images)                 # (N, 1, 28, 28) uint8 to (N,)
        names = [model.classes[label] for label in labels]

    Args:
        run: the folder that `pws train` wrote, or a copy of it.
        checkpoint: "best", "last" or the path of a file.
        device: where the network goes.

    Returns:
        A module in eval mode. It takes images as they are (bytes, or floats with 1 for white), and normalizes them itself. Of a
        classifier `model(images)` gives logits and `predict` labels; of a detector `model(list_of_images)` gives
        torchvision's dicts and `predict` those of sure objects. `model.network` is the plain network on normalized images.

    Raises:
        PwsError: the run or its checkpoint is missing or damaged, or its network can't be built here; or what runs are trained
            with is not installed.
    """
    try:
        from pws.training.trained import trained_of
    except ModuleNotFoundError as error:
        raise PwsError(f"pws.load needs {error.name}, as training does: pip install 'pws-torch[train]'.") from error
    return trained_of(run, checkpoint, device=device)
