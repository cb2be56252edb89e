"""The process that a command runs in: what it sets there for all is set back when it ends."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pws._preserve import random_state


@contextmanager
def process_as_found() -> Iterator[None]:
    """Set back torch's threads, random numbers, warning filters, log levels, environment and the threads' error hook."""
    threads, hook, environment = torch.get_num_threads(), threading.excepthook, dict(os.environ)
    levels = {logger: logger.level for logger in _loggers()}
    rewind = random_state()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        threading.excepthook = hook
        os.environ.clear()
        os.environ.update(environment)
        for logger in _loggers():
            logger.setLevel(levels.get(logger, logging.NOTSET))  # one that the command made says what its parent says
        rewind()


def _loggers() -> list[logging.Logger]:
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
