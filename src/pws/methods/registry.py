"""The registry. torch's and timm's own implementations wherever they exist; only PWS and Switchable Norm are ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, Final

from pws._errors import PwsError, UnknownNameError
from pws.methods import outputs, weights
from pws.methods.method import Method

METHODS: Final = MappingProxyType(
    {
        "none": weights.none,
        "bn": outputs.bn,
        "frozen-bn": outputs.frozen_bn,
        "gn": outputs.gn,
        "ln": outputs.ln,
        "in": outputs.instance,
        "sn": outputs.sn,
        "frn": outputs.frn,
        "wn": weights.wn,
        "ws": outputs.ws,
        "centred": weights.centred,
        "gc": weights.gc,
        "nf": weights.nf,
        "skipinit": weights.skipinit,
        "pws-paper": weights.pws_paper,
        "pws": weights.pws_default,
    }
)
"""Name to builder; a builder's keywords are the method's options."""


def build_method(name: str, **options: Any) -> Method:
    """The method called `name`; `options` are the keywords of its builder.

    Raises:
        UnknownNameError: no such method.
        PwsError: an option the method does not have.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    builder: Callable[..., Method] = METHODS[name]
    check_options(name, builder, options)
    return builder(**options)


def check_options(name: str, builder: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise `PwsError` for an option that is no keyword of the method's builder."""
    parameters = inspect.signature(builder).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise PwsError(
                f"the method {name} has no option {option!r}; it has: {', '.join(known) or 'none'}. "
                "Leave the option out, or choose the method it belongs to."
            )
