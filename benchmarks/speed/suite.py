"""Suites: which networks are timed how, read from a YAML file.

A suite has rows (methods) and cases. A case's settings may be lists: all combinations are timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

from benchmarks.speed.networks import WAYS, check_row
from pws._errors import PwsError, UnknownNameError, shown
from pws.methods import APPLIED
from pws.models.detectors import DETECTORS
from pws.training.parsing import parse_as
from pws.training.rules import AT_LEAST_ONE, POSITIVE, SIDE, WIDTH, check_rules
from pws.training.yaml_file import read_yaml

MOST_CASES: Final = 1000
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
    """The factor of all numbers of channels, for the networks of pws."""
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
    """How long a case is timed, beside warming up."""
    processes: int
    """For each row, one after the other: what a heap looks like is settled when a process starts, and makes a difference of
    some percent."""


SUITES: Final = {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.yaml"))}


def rows_of(case: Case, rows: Sequence[str]) -> list[str]:
    """Those of `rows` that differ in this case: folded, pws is one network, in whatever way it was trained."""
    return [row for row in rows if case.task == "train" or row not in WAYS]


@dataclass
class SuiteFile:
    """A suite as it is written: what its keys may hold."""

    rows: list[str]
    cases: list[dict[str, Any]]
    title: str = ""
    seconds: float = 30.0
    processes: int = 3


KEYS: Final = tuple(field.name for field in fields(SuiteFile))
RULES: Final = {"seconds": POSITIVE, "processes": AT_LEAST_ONE}
CASE_RULES: Final = {"batch": AT_LEAST_ONE, "pixels": SIDE, "width": WIDTH}


def load_suite(name: str, *, quick: bool = False) -> Suite:
    """The suite called `name`, or the YAML file of that path.

    Args:
        name: of one of `SUITES`, or a file.
        quick: the first and the last case, small: to see that it works.

    Raises:
        UnknownNameError: no such suite, key, method or setting.
        PwsError: the file is not a suite, or a setting has a wrong value.
    """
    path = SUITES.get(name, Path(name))
    if not path.is_file():
        raise UnknownNameError("suite (no such file or suite)", name, SUITES)
    content = read_yaml(path, "suite", KEYS)
    file: SuiteFile = parse_as(SuiteFile, content, str(path))
    check_rules(RULES, file, f"{path}: ")
    if file.rows[:1] != ["none"]:
        raise PwsError(f"{path}: the first row must be none, which all ratios are to; got {shown(file.rows)}.")
    for row in file.rows:
        check_row(row)
    cases = [case for settings in content["cases"] for case in _cases(path, settings)]
    for case in cases:
        _check_detector(path, case, file.rows)
    if not cases:
        raise PwsError(f"{path}: cases must hold at least one; got {shown(content['cases'])}.")
    if quick:
        cases = list(dict.fromkeys(_quick(case) for case in (cases[0], cases[-1])))
    seconds, processes = (2.0, 1) if quick else (file.seconds, file.processes)
    title = file.title or path.stem
    title = f"quick look, not a measurement: {title}" if quick else title
    return Suite(path.stem, title, tuple(file.rows), tuple(cases), seconds, processes)


def _cases(path: Path, settings: dict[str, Any]) -> Iterator[Case]:
    known = [field.name for field in fields(Case)]
    for key in settings:
        if key not in known:
            raise UnknownNameError(f"case setting in {path}:", key, known)
    lists = [value if isinstance(value, list) else [value] for value in settings.values()]
    if prod(map(len, lists)) > MOST_CASES:
        raise PwsError(f"{path}: a case's lists must combine to at most {MOST_CASES:,} cases; got {shown(settings)}.")
    for values in product(*lists):
        case: Case = parse_as(Case, dict(zip(settings, values, strict=True)), f"{path}, case {shown(settings)}")
        check_rules(CASE_RULES, case, f"{path}, case: ")
        for kind, value, names in (
            ("task", case.task, TASKS),
            ("optimizer", case.optimizer, OPTIMIZERS),
            ("setting to vary", case.vary, [None, *known]),
        ):
            if value not in names:
                raise UnknownNameError(f"{kind} in {path}:", value, [name for name in names if name])
        yield case


def _check_detector(path: Path, case: Case, rows: list[str]) -> None:
    """A detector takes the methods of models of others, and makes its batch of images itself."""
    if case.model not in DETECTORS:
        return
    for row in rows:
        if row not in APPLIED:
            raise UnknownNameError(f"row for the detector {case.model} in {path}:", row, APPLIED)
    if case.channels_last:
        raise PwsError(f"{path}: a detector lays its batch out itself; leave out channels_last of {case.model}.")


def _quick(case: Case) -> Case:
    small = {"batch": min(case.batch, 2), "pixels": min(case.pixels, 64)}
    return Case(**{**asdict(case), **small})
