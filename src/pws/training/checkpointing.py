"""`trainer.checkpoint_activations`: residual blocks keep their inputs alone, and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pws._errors import PwsError

FEWEST: Final = 4
"""Layers of a Sequential that is worth cutting up."""


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block run again in the backward pass, in place; gradients, statistics and the state dict stay what they are.

    A block is a module inside a Sequential with two layers or more: a residual block, or a stage. A Sequential of single layers
    is cut into about as many pieces as a piece has layers.

    Raises:
        PwsError: the model has neither.
    """
    blocks = _blocks(model)
    if not blocks:
        raise PwsError(
            f"trainer.checkpoint_activations runs residual blocks again, or pieces of a Sequential of {FEWEST} layers or more; "
            f"{type(model).__name__} has neither. Leave it out, or put the blocks into a torch.nn.Sequential."
        )
    # An attribute `forward` goes before the class's. Of a partial, a deep copy holds the copied block.
    for block in blocks:
        run: Any = partial(_in_pieces, _pieces(block)) if isinstance(block, nn.Sequential) else partial(_again, block)
        block.forward = run


def _blocks(module: nn.Module) -> list[nn.Module]:
    children = list(module.children())
    found: list[nn.Module] = []
    for child in children:
        is_block = isinstance(module, nn.Sequential) and not isinstance(child, nn.Sequential) and _layers(child) > 1
        found += [child] if is_block else _blocks(child)
    if not found and isinstance(module, nn.Sequential) and sum(_layers(child) > 0 for child in children) >= FEWEST:
        return [module]
    return found


def _layers(module: nn.Module) -> int:
    """How many of its modules have a kernel."""
    return sum(any(p.dim() > 1 for p in each.parameters(recurse=False)) for each in module.modules())


def _pieces(sequence: nn.Sequential) -> list[nn.Sequential]:
    """Each begins with a layer: an activation that works in place would change a piece's kept input."""
    children = list(sequence)
    starts = [number for number, child in enumerate(children) if _layers(child)]
    size = max(1, round(len(starts) ** 0.5))
    return [nn.Sequential(*children[a:b]) for a, b in pairwise([0, *starts[size::size], len(children)])]


def _in_pieces(pieces: list[nn.Sequential], inputs: Any) -> Any:
    for piece in pieces:
        inputs = _again(piece, inputs)
    return inputs


def _again(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    run: Callable[..., Any] = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return run(*inputs, **named)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=partial(_contexts, block), **named)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of the first pass, which is about to begin, and of the second."""
    before = [(module, name, value.clone()) for module in block.modules() for name, value in _buffers(module)]
    return nullcontext(), _with_buffers(before)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False))


@contextmanager
def _with_buffers(before: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Let the second pass begin as the first one did, and leave the running statistics that the first one updated."""
    now = [(module, name, getattr(module, name)) for module, name, _ in before]
    try:
        for module, name, value in before:
            setattr(module, name, value.clone())
        yield
    finally:
        for module, name, value in now:
            setattr(module, name, value)
