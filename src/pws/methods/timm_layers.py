"""timm's layers, asked for only where a method needs them."""

from __future__ import annotations

import importlib
from typing import Any

from pws._errors import PwsError


def timm_layer(method: str, module: str, name: str) -> Any:
    """`timm.layers.<module>.<name>`, or a clear error where timm is missing."""
    try:
        return getattr(importlib.import_module(f"timm.layers.{module}"), name)
    except ImportError as error:
        raise PwsError(f"the method {method} uses timm's {name}: pip install 'pws-torch[models]'.") from error
