"""What some tests need beside Python packages: outside CI they are skipped without it, in CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Final

import pytest

from pws.training.datasets import DEBIAN_FASHION_MNIST


def _browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def _fashion_mnist() -> str | None:
    return str(DEBIAN_FASHION_MNIST) if DEBIAN_FASHION_MNIST.is_dir() else None


NEEDS: Final[dict[str, tuple[Callable[[], str | None], str]]] = {
    "chromium": (_browser, "apt-get install chromium"),
    "compiler": (lambda: shutil.which("g++"), "apt-get install g++"),
    "fashion-mnist": (_fashion_mnist, "apt-get install dataset-fashion-mnist"),
}
"""Name to what finds it, and how to get it."""
missing: Final[dict[str, int]] = {}
"""Name to the number of tests skipped for it: the summary says so once."""


def need(name: str) -> str:
    """The path of what a test needs; without it the test is skipped, in CI it fails."""
    find, advice = NEEDS[name]
    found = find()
    if found is None:
        reason = f"{name} is missing: {advice}"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}. In CI nothing is skipped for it.", pytrace=False)
        missing[name] = missing.get(name, 0) + 1
        pytest.skip(reason)
    return found
