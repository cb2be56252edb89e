"""Rules that a recipe's numbers keep, checked before anything is read or written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from pws._errors import PwsError, shown
from pws._layers import StandardizedLayer
from pws._mark import marked
from pws.models import ResNet
from pws.training.recipe import ModelConfig, Recipe

Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Final[Rule] = ("positive", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Final[Rule] = ("at least 0", lambda value: 0 <= value < math.inf)
MOST: Final = 10**9
"""Of anything that is counted: beyond it are slips of the keyboard."""
AT_LEAST_ONE: Final[Rule] = (f"at least 1, and at most {MOST:,}", lambda value: 1 <= value <= MOST)
PROCESSES: Final = max(64, 4 * (os.cpu_count() or 1))
"""The most that a command starts: each takes some 300 MB, and more than cores are of no use."""
SEED: Final[Rule] = ("at least 0 and below 2 ** 32", lambda value: 0 <= value < 2**32)
LOADERS: Final[Rule] = (f"at least 0, and at most {PROCESSES} on this machine", lambda value: 0 <= value <= PROCESSES)
WIDTH: Final[Rule] = ("positive, and at most 1,000", lambda value: 0 < value <= 1000)
SIDE: Final[Rule] = ("at least 1, and at most 65,536", lambda value: 1 <= value <= 2**16)
DEVICES: Final[Rule] = (f"-1 (all), or 1 to {PROCESSES}", lambda value: value == -1 or 1 <= value <= PROCESSES)
BELOW_ONE: Final[Rule] = ("at least 0 and below 1", lambda value: 0 <= value < 1)

RULES: Final[dict[str, Rule]] = {
    **{"seed": SEED, "model.width": WIDTH, "data.workers": LOADERS, "data.image_size": SIDE},
    "trainer.devices": DEVICES,
    **dict.fromkeys(("optim.clip_norm", "optim.step_bound", "optim.decay"), POSITIVE),
    **dict.fromkeys(("optim.lr", "optim.weight_decay", "optim.scale_lr_factor", "optim.warmup_epochs"), NOT_NEGATIVE),
    **dict.fromkeys(("data.batch_size", "data.train_images", "model.num_classes"), AT_LEAST_ONE),
    **dict.fromkeys(("trainer.epochs", "trainer.max_steps", "trainer.num_nodes"), AT_LEAST_ONE),
    **dict.fromkeys(("trainer.accumulate", "trainer.early_stop"), AT_LEAST_ONE),
    **dict.fromkeys(("optim.momentum", "optim.label_smoothing", "model.dropout"), BELOW_ONE),
}
"""Setting to rule; a setting left out (None), or one that is a word, keeps every rule."""


def check_rules(rules: Mapping[str, Rule], values: Any, where: str = "", advice: str = "") -> None:
    """Raise `PwsError` for the first number of `values` (dotted names reach into its parts) that breaks its rule."""
    for path, (words, holds) in rules.items():
        value: Any = values
        for part in path.split("."):
            value = getattr(value, part)
        if value is not None and not isinstance(value, str) and not holds(value):
            raise PwsError(f"{where}{path} must be {words}; got {shown(value)}.{advice}")


def check_recipe(recipe: Recipe) -> None:
    """Raise `PwsError` for the first number that can't be."""
    check_rules(RULES, recipe, advice=" Correct it in the recipe or on the command line.")
    optim = recipe.optim
    if optim.clip_norm is not None and isinstance(optim.step_bound, float):
        raise PwsError(
            f"optim.clip_norm ({optim.clip_norm}) and optim.step_bound ({optim.step_bound}) both clip the gradient: give one, "
            "and null for the other if the recipe sets it."
        )
    if optim.schedule == "step" and not optim.milestones:
        raise PwsError(
            "optim.schedule step needs optim.milestones, the epochs at which the rate falls, such as [30, 60]."
        )
    if recipe.trainer.strategy.split("_")[0] not in ("auto", "ddp"):
        raise PwsError(
            f"trainer.strategy must be auto or ddp (or a variant, such as ddp_spawn); got {recipe.trainer.strategy!r}. "
            "Sharded strategies flatten the parameters, and neither weight decay by parameter nor the filters survive that."
        )
    if optim.nesterov and (optim.name != "sgd" or not optim.momentum):
        raise PwsError(
            f"optim.nesterov needs optim.name sgd and optim.momentum above 0; got {optim.name} and momentum {optim.momentum:g}."
        )


def check_calibration(config: ModelConfig, model: nn.Module) -> None:
    """Raise `PwsError` if the network has nothing that the recipe's calibration could set."""
    if config.calibrate == "none":
        return
    if not marked(model) and not any(isinstance(module, StandardizedLayer) for module in model.modules()):
        raise PwsError(
            f"model.calibrate scales standardized kernels, and the method {config.method} has none. Use method pws, or "
            "calibrate none."
        )
    if config.calibrate == "initalpha" and not isinstance(model, ResNet):
        raise PwsError(
            f"model.calibrate initalpha is defined by residual blocks, and {config.name} has none. Use all or none."
        )
