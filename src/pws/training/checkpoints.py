"""A run's checkpoints: verified before anything is done with them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from pws._errors import PwsError, one_line
from pws.optim.sharding import is_sharded
from pws.training.federated import check_has_norms
from pws.training.recipe import Recipe
from pws.training.recipe_file import RESULT, differing

BEST: Final = "best.ckpt"
LAST: Final = "last.ckpt"
BEFORE: Final = "before.ckpt"
"""What was `last.ckpt` before the last epoch's end."""
CHECKSUM: Final = "checksum"
REST: Final = "meta.pt"
"""(sharded) The file with all but the tensors; Lightning's name."""
FILES: Final = "files"
"""(sharded) The checksums of the others, by name."""

USED: Final[dict[str, type]] = {"state_dict": Mapping, "epoch": int, "global_step": int}
"""What every command needs of a checkpoint."""
RESUMED: Final[dict[str, type]] = {
    **USED,
    **dict.fromkeys(("loops", "callbacks", "recipe"), Mapping),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    CHECKSUM: str,
}
"""What `--resume` needs."""


class DamagedCheckpointError(PwsError):
    """A checkpoint that can't be read, or holds something else than what was written: `reason` says which."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = f"{path} {reason}."
        super().__init__(f"{self.reason} {_next_step(path)}")


def checksum_of(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 of all that a checkpoint holds, in its order, but for its checksum."""
    digest = hashlib.sha256()
    for part in _bytes_of({key: value for key, value in checkpoint.items() if key != CHECKSUM}):
        digest.update(part)
    return digest.hexdigest()


def _bytes_of(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for pair in value.items():
            yield from _bytes_of(pair)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _bytes_of(item)
    else:
        yield repr(value).encode()


def file_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a sharded checkpoint but `REST`."""
    files = sorted(file for file in folder.iterdir() if file.name != REST)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def checkpoint_path(run: Path, name: str) -> Path:
    """The file of a run's checkpoint: "best", "last" or a path; the last one where the run ended before a best one."""
    if name not in ("best", "last"):
        return Path(name)
    best, last = run / "checkpoints" / BEST, run / "checkpoints" / LAST
    return best if name == "best" and best.exists() else last


def read_checkpoint(path: Path, module: nn.Module, recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """A checkpoint that `pws train` wrote of this network and recipe: tensors and plain values only.

    Raises:
        DamagedCheckpointError: the file can't be loaded, or its content does not match its checksum.
        PwsError: there is no such file, or it is of another program, network or recipe.
    """
    checkpoint = _read(path, RESUMED if resume else USED)
    _check_weights(path, checkpoint["state_dict"], module)
    _check_recipe(path, checkpoint.get("recipe"), recipe, RESULT if resume else ("task", "model"))
    _check_unchanged(path, checkpoint)
    return checkpoint


def read_weights(path: Path) -> Mapping[str, Any]:
    """The tensors of a checkpoint that `pws train` wrote, of any network.

    Raises:
        DamagedCheckpointError: the file can't be loaded, or its content does not match its checksum.
        PwsError: there is no such file, or it is of another program.
    """
    checkpoint = _read(path, USED)
    _check_unchanged(path, checkpoint)
    weights: Mapping[str, Any] = checkpoint["state_dict"]
    return weights


def _read(path: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    if not path.exists():
        raise PwsError(
            f"the checkpoint {path} does not exist. A run writes its first one at the end of its first epoch."
        )
    checkpoint: dict[str, Any] = _load(path)
    _check_fields(path, checkpoint, needed)
    return checkpoint


def _check_unchanged(path: Path, checkpoint: dict[str, Any]) -> None:
    stored = None if path.is_dir() else checkpoint.get(CHECKSUM)  # a folder's files were checked before they were read
    if stored is not None and stored != _checksum_found(checkpoint):
        raise DamagedCheckpointError(path, "does not match its checksum: it was changed after `pws train` wrote it")


def _load(path: Path) -> Any:
    return _load_folder(path) if path.is_dir() else _load_file(path)


def _load_folder(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as one process would have written it."""
    rest = _load_file(path / REST)
    if not isinstance(rest, dict) or _checksum_found(rest) != rest.get(CHECKSUM):
        raise DamagedCheckpointError(path / REST, "does not match its checksum")
    found = file_checksums(path)
    for name, checksum in rest[FILES].items():
        if found.get(name) != checksum:
            raise DamagedCheckpointError(
                path / name, "is missing" if name not in found else "does not match its checksum"
            )
    buffer = BytesIO()
    with warnings.catch_warnings():  # that there are no other processes
        warnings.simplefilter("ignore")
        dcp_to_torch_save(path, buffer)  # type: ignore[arg-type]
    tensors = torch.load(BytesIO(buffer.getbuffer()), map_location="cpu", weights_only=True)
    optimizers = [_by_number(tensors[key]) for key in sorted(tensors) if key.startswith("optimizer_")]
    return {**rest, "state_dict": tensors["state_dict"], "optimizer_states": optimizers}


def _by_number(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer whose parameters go by number, as torch's own, not by name."""
    groups = [dict(group) for group in optimizer["param_groups"]]
    numbers = {name: i for i, name in enumerate(chain.from_iterable(group["params"] for group in groups))}
    for group in groups:
        group["params"] = [numbers[name] for name in group["params"]]
    states = optimizer.get("state", {})  # of plain SGD there are none
    return {"state": {numbers[name]: state for name, state in states.items()}, "param_groups": groups}


def _load_file(path: Path) -> Any:
    try:
        raw = BytesIO(path.read_bytes())
    except OSError as error:
        raise PwsError(f"cannot read the checkpoint {path}: {error.strerror}. Check its permissions.") from error
    try:
        with warnings.catch_warnings():  # of what the file is about to be refused for
            warnings.simplefilter("ignore")
            return torch.load(raw, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in ways of its own
        reason = f"{type(error).__name__}: {one_line(error).split('. ')[0][:120]}"
        raise DamagedCheckpointError(path, f"is not a checkpoint of pws train, or is cut off ({reason})") from error


def _check_fields(path: Path, checkpoint: Any, needed: Mapping[str, type]) -> None:
    if not isinstance(checkpoint, dict):
        raise PwsError(f"{path} is not a checkpoint of pws train: it holds a {_kind(checkpoint)}. {_next_step(path)}")
    for key, kind in needed.items():
        value = checkpoint.get(key)
        empty = isinstance(value, Mapping | list) and not value
        if not isinstance(value, kind) or empty or (isinstance(value, int) and value < 0):
            found = f"it holds {'an empty' if empty else 'a'} {_kind(value)}" if key in checkpoint else "it has none"
            raise PwsError(
                f"{path} is not a checkpoint of pws train: {key} must be {_words(kind)}; {found}. {_next_step(path)}"
            )


def _checksum_found(checkpoint: dict[str, Any]) -> str | None:
    try:
        return checksum_of(checkpoint)
    except Exception:  # a tensor of a kind that pws train never writes
        return None


def _words(kind: type) -> str:
    return "a whole number, at least 0" if kind is int else f"a {kind.__name__.lower()}"


def _kind(value: Any) -> str:
    return f"negative {type(value).__name__}" if isinstance(value, int) and value < 0 else type(value).__name__


def _next_step(path: Path) -> str:
    """What to do about a bad one."""
    beside = " and ".join(name for name in (LAST, BEST, BEFORE) if name != path.name and path.with_name(name).exists())
    return f"Put the file back that the run wrote{f'; {beside} beside it may be good' if beside else ''}."


def load_weights(module: nn.Module, path: Path, recipe: Recipe) -> None:
    """Load a checkpoint's weights; raise `PwsError` unless it is as `pws train` wrote it, of this network and recipe."""
    check_has_norms(recipe.federated)
    weights = read_checkpoint(path, module, recipe)["state_dict"]
    if any(map(is_sharded, module.parameters())):
        set_model_state_dict(module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that was verified before, of one process or of several."""
    checkpoint: dict[str, Any] = _load(path)
    return checkpoint


def _check_recipe(path: Path, stored: Any, recipe: Recipe, parts: tuple[str, ...]) -> None:
    if not isinstance(stored, Mapping):  # of another program, which may have stored weights alone
        return
    for key, (there, here) in differing(stored, recipe, parts).items():
        raise PwsError(
            f"{path} is a checkpoint of another recipe than the run's recipe.yaml: {key} is {there} there, {here} here. Use "
            "the checkpoint with the recipe it was trained with."
        )


def _check_weights(path: Path, weights: Mapping[str, Any], module: nn.Module) -> None:
    own = module.state_dict()
    problems = misfits(weights, own)
    if problems:
        raise PwsError(
            f"{path} is a checkpoint of another architecture than the run's recipe.yaml describes: "
            f"{len(problems)} differences to its {len(own)} tensors, such as: {'; '.join(sorted(problems)[:3])}. "
            "Use the checkpoint with the recipe it was trained with."
        )


def misfits(weights: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """What of `weights` is not a plain tensor of the shape and kind that the network's `own` has."""
    return [
        *(f"{key} is missing" for key in own.keys() - weights.keys()),
        *(f"{key} is not in the network" for key in weights.keys() - own.keys()),
        *(problem for key in own.keys() & weights.keys() if (problem := _misfit(key, weights[key], own[key]))),
    ]


def _misfit(key: str, found: Any, own: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"{key} is a {type(found).__name__}, not a tensor"
    if found.layout != torch.strided or found.is_quantized or found.is_meta:
        return f"{key} is no plain tensor: {found.layout}, {found.dtype}, on {found.device.type}"
    if found.shape != own.shape:
        return f"{key} is {tuple(found.shape)}, the network's is {tuple(own.shape)}"
    if (found.is_complex(), found.is_floating_point()) != (own.is_complex(), own.is_floating_point()):
        return f"{key} is {found.dtype}, the network's is {own.dtype}"
    return None
