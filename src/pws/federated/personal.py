"""What stays with a client, in a file of its own: its norms after the last rounds that it trained in."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from pws._files import write_whole

CLIENTS: Final = "clients"
"""The folder of these files."""
Norms = dict[str, Tensor]


def keep(folder: Path, client: int, number: int, norms: Norms) -> None:
    """Store a client's norms after round `number`, beside those of two rounds before it: a resumed run repeats a round, and two
    where its last checkpoint is damaged."""
    path, stored = _file(folder, client), _stored(folder, client)
    before = sorted(n for n in stored if n < number)[-2:]
    content = {**{n: stored[n] for n in before}, number: norms}
    buffer = BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, buffer.getvalue())


def kept(folder: Path, client: int, number: int) -> Norms:
    """A client's norms as they were at the end of round `number`; none before its first one."""
    stored = _stored(folder, client)
    newest = max((n for n in stored if n <= number), default=None)
    return {} if newest is None else stored[newest]


def _stored(folder: Path, client: int) -> dict[int, Norms]:
    path = _file(folder, client)
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}


def _file(folder: Path, client: int) -> Path:
    return folder / CLIENTS / f"{client}.pt"
