"""Rules that the numbers of a recipe, a grid or a suite keep."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from pws._errors import PwsError, shown

Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Final[Rule] = ("positive", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Final[Rule] = ("at least 0", lambda value: 0 <= value < math.inf)
MOST: Final = 10**9
"""The largest count that is taken: beyond it are slips of the keyboard."""
AT_LEAST_ONE: Final[Rule] = (f"at least 1, and at most {MOST:,}", lambda value: 1 <= value <= MOST)
PROCESSES: Final = max(64, 4 * (os.cpu_count() or 1))
"""The most that a command starts: each takes some 300 MB, and more than cores are of no use."""
SEED: Final[Rule] = ("at least 0 and below 2 ** 32", lambda value: 0 <= value < 2**32)
LOADERS: Final[Rule] = (f"at least 0, and at most {PROCESSES} on this machine", lambda value: 0 <= value <= PROCESSES)
WIDTH: Final[Rule] = ("positive, and at most 1,000", lambda value: 0 < value <= 1000)
SIDE: Final[Rule] = ("at least 1, and at most 65,536", lambda value: 1 <= value <= 2**16)
DEVICES: Final[Rule] = (f"-1 (all), or 1 to {PROCESSES}", lambda value: value == -1 or 1 <= value <= PROCESSES)
SHARE: Final[Rule] = ("from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE: Final[Rule] = ("at least 0 and below 1", lambda value: 0 <= value < 1)


def check_rules(rules: Mapping[str, Rule], values: object, where: str = "") -> None:
    """Raise `PwsError` for the first number of `values` that breaks its rule; None and words keep every rule."""
    for name, (words, holds) in rules.items():
        value = getattr(values, name)
        if value is not None and not isinstance(value, str) and not holds(value):
            raise PwsError(f"{where}{name} must be {words}; got {shown(value)}.")


def check_only(recipe: object, only: Mapping[str, tuple[Any, str]], run: str) -> None:
    """Raise `PwsError` for a dotted setting of a recipe with another value than the only one that `run` takes, and say why."""
    for setting, (value, why) in only.items():
        found: Any = recipe
        for name in setting.split("."):
            found = getattr(found, name)
        if found != value:
            raise PwsError(f"{run} takes {setting} {value} alone: {why}. Got {found!r}: leave it out.")
