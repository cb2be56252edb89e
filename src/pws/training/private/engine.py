"""What Opacus does in a private run: gradients of single images, clipping, noise, and the sum of the privacy spent."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from pws._errors import PwsError, one_line
from pws.training.private.config import PrivacyConfig
from pws.training.private.spent import Spent

if TYPE_CHECKING:
    from opacus import PrivacyEngine


class Accounting:
    """Opacus' engine of one run."""

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        self.engine = _engine(config)
        self.noise = 0.0

    def attach(
        self, model: nn.Module, optimizer: Optimizer, criterion: nn.Module, images: int, batch_size: int, steps: int
    ) -> tuple[Any, Any]:
        """Hooks on `model`; returns the optimizer that clips and adds noise, and the criterion.

        `steps` is their number in the whole run, from which the noise for an epsilon follows.
        """
        # The engine reads the number of images and of batches from a loader; PoissonSampler draws the batches.
        counted = DataLoader(TensorDataset(torch.empty(images, 0)), batch_size)
        self.rate = 1 / len(counted)
        self.noise = noise_for(self.config, images, batch_size, steps)
        parts = self.engine.make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=counted,
            noise_multiplier=self.noise,
            max_grad_norm=self.config.clip_norm,
            grad_sample_mode=self.config.mode,
            wrap_model=False,
            poisson_sampling=False,  # the engine's own sampler counts int(1 / rate) batches, which makes 92 of 93
        )
        return (parts[1], parts[2]) if self.config.mode == "ghost" else (parts[1], criterion)

    def spent(self) -> Spent:
        """Until now."""
        history = self.engine.accountant.history
        steps = sum(part[2] for part in history)
        # The accountants divide by the noise.
        epsilon = float(self.engine.get_epsilon(self.config.delta)) if steps and self.noise else None
        config = self.config
        return Spent(epsilon, config.delta, self.noise, config.clip_norm, self.rate, steps, config.accountant)


@cache
def noise_for(config: PrivacyConfig, images: int, batch_size: int, steps: int) -> float:
    """Deviation of the noise, in units of clip_norm.

    Raises:
        PwsError: none spends so little in so many steps.
    """
    if config.noise is not None:
        return config.noise
    from opacus.accountants.utils import get_noise_multiplier

    assert config.epsilon is not None
    rate = 1 / -(-images // batch_size)
    try:
        noise: float = get_noise_multiplier(
            target_epsilon=config.epsilon,
            target_delta=config.delta,
            sample_rate=rate,
            steps=steps,
            accountant=config.accountant,
        )
    except ValueError as error:
        raise PwsError(
            f"no noise gives privacy.epsilon {config.epsilon:g} after {steps:,} steps, each with a share of {rate:.3g} of the "
            f"images ({one_line(error)}). Take a larger epsilon, fewer epochs or a smaller data.batch_size."
        ) from error
    return noise


def _engine(config: PrivacyConfig) -> PrivacyEngine:
    import_module("pws.private")  # makes the samplers of pws layers known; says if Opacus is missing
    from opacus import PrivacyEngine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # docs/privacy.md tells of secure random numbers
        return PrivacyEngine(accountant=config.accountant)


def check_trainable(model: nn.Module, method: str) -> None:
    """Raise `PwsError` if Opacus can't take the gradient of a single image of this network."""
    from pws.private.acceptance import check_accepted
    from pws.private.refused_norms import is_refused_norm

    refused = [
        f"{name}, a {type(module).__name__}" for name, module in model.named_modules() if is_refused_norm(module)
    ]
    if refused:
        raise PwsError(
            f"a private run needs the gradient of each image alone, and the method {method} leaves {len(refused)} modules that "
            f"mix the images of a batch, or keep statistics of them, frozen or not (first: {refused[0]}). Use model.method "
            "pws, gn, ws or none. A trained model of your own loses them by pws.private.make_trainable."
        )
    check_accepted(model.train(), {})
