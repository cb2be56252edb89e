"""What every test shares: a fixed seed, one thread, and what it needs."""

from __future__ import annotations

import signal

import pytest
import torch
from needs import NEEDS, missing, need


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"needs(name): of {', '.join(NEEDS)}; see needs.py")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; it would be inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        need(*marker.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in missing.items():
        terminalreporter.write_line(f"{count} skipped, {name} is missing: {NEEDS[name][1]}", yellow=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tensors are tiny here; on a busy machine two threads that wait for each other take up to 50 times as long.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
