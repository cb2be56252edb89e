"""What server and clients of a federated run have in common: the recipe, the data, and the network at its start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from pws._errors import PwsError
from pws.federated.images import ClientImages, labels_of
from pws.federated.partition import Shares, partition
from pws.federated.skew import Change, changes_of, check_skew
from pws.surgery.norms import NORMS
from pws.training.data import ImageData
from pws.training.images import Images
from pws.training.module import TaskModule
from pws.training.recipe import Recipe
from pws.training.recipe_file import load_recipe
from pws.training.tasks import data_of, module_of

State = dict[str, Tensor]
"""The weights and buffers of a network, by name."""
LOCAL_EPOCHS: Final = 100_000
"""More than a client makes in a round: each round draws orders and augmentations of its own."""


@dataclass
class Federation:
    """A recipe's data, divided among clients, and its network."""

    recipe: Recipe
    data: ImageData
    shares: Shares
    """The training images of each client."""
    changes: list[Change]
    """What each client's images go through."""
    module: TaskModule
    """Whoever works in this process loads its weights into it."""
    initial: State
    """The network's state before the first round, the same in all processes."""
    personal: frozenset[str]
    """The names in it that stay with the client."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def load(self, *parts: State) -> None:
        """Load a state; the later parts win, and the first one fills what they lack."""
        state = {name: value for part in (self.initial, *parts) for name, value in part.items()}
        self.module.model.load_state_dict(state)

    def client_data(self, client: int) -> ImageData:
        """A client's training images, in batches of an order of its own."""
        images = ClientImages(self.data.splits.train, self.shares[client], [self.changes[client]])
        seed = seed_of(self.recipe.seed, "client", client)
        return ImageData(self.recipe.data, seed, replace(self.data.splits, train=images, order=None))

    def tested(self, part: str, client: int | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the validation or test images, image n as client n mod K of K sees them; `client`'s alone if given."""
        images: Images = getattr(self.data.splits, part)
        clients = len(self.shares)
        numbers = range(len(images)) if client is None else range(client, len(images), clients)
        splits = replace(self.data.splits, test=ClientImages(images, numbers, self.changes))
        return ImageData(self.recipe.data, self.recipe.seed, splits).test_dataloader()


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of its own for each purpose of a run, below 2 ** 32."""
    return int(np.random.SeedSequence([seed, *purpose.encode(), *numbers]).generate_state(1)[0])


@lru_cache(maxsize=1)
def federation_in(folder: Path) -> Federation:
    """That of a run's folder: the apps of server and clients know nothing else of the run."""
    return federation_of(load_recipe(folder / "recipe.yaml"))


def federation_of(recipe: Recipe) -> Federation:
    """That of a recipe, the same in every process.

    Raises:
        PwsError: the data can't be divided or changed as the recipe says, or what `pws train` raises it for.
    """
    config = recipe.federated
    data = data_of(recipe)
    assert isinstance(data, ImageData)
    clients = config.clients or 0
    train = data.splits.train
    labels = torch.zeros(len(train)) if config.alpha is None else labels_of(train)
    shares = partition(labels, clients, config.alpha, recipe.data.batch_size, seed_of(recipe.seed, "partition"))
    check_skew(config.skew, data.splits.test.get([0])[0])
    seed_everything(recipe.seed, workers=True, verbose=False)
    module = module_of(recipe, data)
    module.to(_device(recipe))
    if recipe.trainer.precision == "64-true":
        module.double()
    initial = {name: value.detach().clone() for name, value in module.model.state_dict().items()}
    personal = _norms_in(module.model) if config.personal_norms else frozenset()
    if config.personal_norms and not personal:
        raise PwsError(
            f"federated.personal_norms keeps norms with their clients, and {recipe.model.name} with the method "
            f"{recipe.model.method} has none. Take a method with norms, such as bn, or leave it out."
        )
    return Federation(recipe, data, shares, changes_of(config.skew, clients), module, initial, personal)


def _norms_in(model: nn.Module) -> frozenset[str]:
    """The names of the parameters and buffers of norms."""
    tests = [test for family in NORMS.values() for test in family]
    norms = [(name, module) for name, module in model.named_modules() if any(test(module) for test in tests)]
    return frozenset(f"{name}.{own}" for name, module in norms for own in module.state_dict())


def _device(recipe: Recipe) -> torch.device:
    on_gpu = recipe.trainer.accelerator in ("gpu", "cuda") or (
        recipe.trainer.accelerator == "auto" and torch.cuda.is_available()
    )
    return torch.device("cuda" if on_gpu else "cpu")
