"""A client's images among those of a dataset, as the client sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pws.federated.skew import Change
from pws.training.images import FolderImages, Images, TensorImages


class ClientImages:
    """Some images of others, changed; an image keeps its number there, which its change may depend on."""

    def __init__(self, images: Images, numbers: Sequence[int], changes: Sequence[Change]) -> None:
        self.images, self.numbers, self.changes = images, numbers, changes
        self.augment = images.augment

    def __len__(self) -> int:
        return len(self.numbers)

    def get(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels and labels; image n of the others goes through the change n mod K of K."""
        own = [self.numbers[number] for number in numbers]
        pixels, labels = self.images.get(own)
        which = torch.tensor(own) % len(self.changes)
        changed = pixels.clone()
        for number in which.unique().tolist():
            mine = torch.nonzero(which == number).flatten().tolist()
            changed[mine] = self.changes[number](pixels[mine], [own[place] for place in mine])
        return changed, labels

    def prepare(self, image: Tensor) -> Tensor:
        """As the others."""
        return self.images.prepare(image)

    def name(self, number: int) -> str:
        """As the others."""
        return self.images.name(self.numbers[number])


def labels_of(images: Images) -> Tensor:
    """The label of each image, read from the image itself where no list has it."""
    if isinstance(images, TensorImages):
        return images.labels
    if isinstance(images, FolderImages):
        targets = images.files.targets
        return torch.tensor(targets if images.numbers is None else [targets[number] for number in images.numbers])
    return torch.cat([images.get([number])[1] for number in range(len(images))])
