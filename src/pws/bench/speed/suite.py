"""Suites: which networks are timed how, read from a YAML file.

A suite has rows (methods) and cases. A case's settings may be lists: all combinations are timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Final

import yaml

from pws.bench.speed.networks import check_row
from pws.errors import PwsError, UnknownNameError

KEYS: Final = ("title", "rows", "seconds", "lives", "cases")
DEFAULTS: Final = {"seconds": 30.0, "lives": 3}
TASKS: Final = ("train", "inference")
OPTIMIZERS: Final = {"sgd": "", "sgd-fused": "fused SGD"}
"""To words; nothing for torch's SGD as it comes."""


@dataclass(frozen=True)
class Case:
    """One network at one size, done one way."""

    model: str
    """A network of ours, or torchvision:NAME, timm:NAME."""
    batch: int
    pixels: int
    task: str = "train"
    """`train`: a step of SGD with momentum; `inference`: a forward pass in eval mode, pws folded."""
    optimizer: str = "sgd"
    """torch's SGD of the rows without a step of their own, as it comes or fused; that of pws is the same beside both."""
    width: float = 1.0
    """Of our networks."""
    compile: bool = False
    autocast: bool = False
    """To bfloat16."""
    channels_last: bool = False
    vary: str | None = None
    """The setting on the horizontal axis of the picture that this case is a point of."""

    def __str__(self) -> str:
        """In words."""
        name = self.model.rpartition(":")[2] + ("" if self.width == 1 else f" x {self.width:g}")
        flags = [flag for flag in ("compile", "autocast", "channels_last") if getattr(self, flag)]
        last = "inference" if self.task == "inference" else OPTIMIZERS[self.optimizer]
        return ", ".join([name, f"batch {self.batch}", f"{self.pixels} px", *flags, *([last] if last else [])])


@dataclass(frozen=True)
class Suite:
    """Rows by cases."""

    name: str
    title: str
    rows: tuple[str, ...]
    cases: tuple[Case, ...]
    seconds: float
    """Of timing a case, beside warming up."""
    lives: int
    """Of the rows' processes, one after the other: what a heap looks like is settled when a process starts, and makes a
    difference of some percent."""


def shipped_suites() -> dict[str, Path]:
    """Name to file of the suites that come with pws."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.yaml"))}


def load_suite(name: str, *, quick: bool = False) -> Suite:
    """The shipped suite called `name`, or the YAML file of that path.

    Args:
        name: of a suite or a file.
        quick: the first and the last case, small: to see that it works.

    Raises:
        UnknownNameError: no such suite, key, method or setting.
        PwsError: the file is not a suite, or a setting has a wrong value.
    """
    path = shipped_suites().get(name, Path(name))
    if not path.is_file():
        raise UnknownNameError("suite (no such file or shipped suite)", name, shipped_suites())
    content = _read(path)
    for row in content["rows"]:
        check_row(row)
    cases = [case for settings in content["cases"] for case in _cases(path, settings)]
    if quick:
        cases = list(dict.fromkeys(_quick(case) for case in (cases[0], cases[-1])))
    seconds, lives = (2.0, 1) if quick else (content["seconds"], content["lives"])
    title = f"quick look, not a measurement: {content['title']}" if quick else content["title"]
    return Suite(path.stem, title, tuple(content["rows"]), tuple(cases), seconds, lives)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PwsError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise PwsError(f"{path} must hold a suite's keys ({', '.join(KEYS)}); got {content!r}.")
    for key in content:
        if key not in KEYS:
            raise UnknownNameError(f"suite key in {path}:", key, KEYS)
    for key in ("rows", "cases"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise PwsError(f"{path}: {key} must be a list of at least one; got {content.get(key)!r}.")
    if content["rows"][0] != "none":
        raise PwsError(f"{path}: the first row must be none, which all ratios are to; got {content['rows'][0]!r}.")
    content = {"title": path.stem, **DEFAULTS, **content}
    for key, default in DEFAULTS.items():
        value = content[key]
        if isinstance(value, bool) or not isinstance(value, type(default) | int) or not 0 < value < float("inf"):
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise PwsError(f"{path}: {key} must be {kind} above 0; got {value!r}. Usual: {default:g}.")
    return content


def _cases(path: Path, settings: dict[str, Any]) -> Iterator[Case]:
    known = [field.name for field in fields(Case)]
    for key in settings:
        if key not in known:
            raise UnknownNameError(f"case setting in {path}:", key, known)
    lists = [value if isinstance(value, list) else [value] for value in settings.values()]
    for values in product(*lists):
        try:
            case = Case(**dict(zip(settings, values, strict=True)))
        except TypeError as error:
            raise PwsError(f"{path}: a case needs model, batch and pixels; got {settings}.") from error
        if case.task not in TASKS:
            raise UnknownNameError(f"task in {path}:", case.task, TASKS)
        if case.optimizer not in OPTIMIZERS:
            raise UnknownNameError(f"optimizer in {path}:", case.optimizer, OPTIMIZERS)
        yield case


def _quick(case: Case) -> Case:
    small = {"batch": min(case.batch, 2), "pixels": min(case.pixels, 64)}
    return Case(**{**asdict(case), **small})
