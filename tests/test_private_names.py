"""The private names of torch that pws uses: each is there in the torch installed, and each gives a warning."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pws

PACKAGE = Path(pws.__file__).parent
SEEN_THROUGH = (nn.Conv2d(1, 1, 1), nn.Parameter(torch.ones(1)), torch.optim.SGD([torch.ones(1)], lr=0.1))
"""A layer, a parameter and an optimizer: what has a private name, and is neither self nor a module of torch."""


class PrivateTorchNameWarning(UserWarning):
    """pws uses a name that torch may change without a word."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_torchs(name: str) -> bool:
    return any(hasattr(thing, name) for thing in SEEN_THROUGH)


def chain_of(node: ast.expr) -> list[str]:
    """The names of `a.b.c`; empty where it begins with something else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def private_names(source: str) -> Iterator[str]:
    """Private names below `torch`, in full; and those of torch's objects, behind a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in full if any(map(is_private, name.split("."))))
        elif isinstance(node, ast.Attribute):
            chain = chain_of(node)
            if chain[:1] == ["torch"] and is_private(node.attr):
                yield ".".join(chain)
            elif is_private(node.attr) and chain[:1] not in (["torch"], ["self"], ["cls"]) and is_torchs(node.attr):
                yield f".{node.attr}"


@cache
def used() -> dict[str, list[str]]:
    """Each name, to the files that use it."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in set(private_names(path.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    return found


def resolve(name: str) -> Any:
    thing: Any = torch
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def test_private_names_are_found() -> None:
    source = "import torch\nfrom torch._x import y\ntorch._foreach_norm(a)\nlayer._parameters\nself._own\nother._own\n"
    assert sorted(private_names(source)) == ["._parameters", "torch._foreach_norm", "torch._x.y"]


@pytest.mark.parametrize("name", sorted(used()))
def test_a_private_name_is_there(name: str) -> None:
    warnings.warn(f"{name} in {', '.join(used()[name])}", PrivateTorchNameWarning, stacklevel=1)
    if name.startswith("torch"):
        assert resolve(name) is not None
    else:
        assert is_torchs(name[1:])
