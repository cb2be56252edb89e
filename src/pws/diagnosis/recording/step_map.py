"""From a step of the parameters to the change of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepMap:
    """Maps a step of the trained parameters to the change of a kernel: the Jacobian of `kernel(parameters)`.

    It takes two backward passes through the kernel's own small graph, so any way to compute a kernel is served.
    """

    def __init__(self, kernel: Tensor, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._direct = next((i for i, p in enumerate(parameters) if p is kernel), None)
        if self._direct is None:
            self._probe = torch.zeros_like(kernel, requires_grad=True)
            found = torch.autograd.grad(kernel, parameters, self._probe, create_graph=True, allow_unused=True)
            self._images = [(i, image) for i, image in enumerate(found) if image is not None]

    def uses(self) -> list[nn.Parameter]:
        """The parameters that the kernel hangs on."""
        if self._direct is not None:
            return [self.parameters[self._direct]]
        return [self.parameters[i] for i, _ in self._images]

    def kernel_change(self, change: dict[nn.Parameter, Tensor]) -> Tensor | None:
        """What a first-order `change` of the parameters does to the kernel; None if it changes none of them, or that can't be
        told."""
        if self._direct is not None:
            return change.get(self.parameters[self._direct])
        pairs = [(image, change[self.parameters[i]]) for i, image in self._images if self.parameters[i] in change]
        pairs = [(image, tangent) for image, tangent in pairs if image.requires_grad]
        if not pairs:
            return None
        images, tangents = zip(*pairs, strict=True)
        try:
            (result,) = torch.autograd.grad(images, self._probe, tangents, retain_graph=True)
        except RuntimeError:  # a backward pass that can't be differentiated (once_differentiable)
            return None
        assert isinstance(result, Tensor)
        return result
