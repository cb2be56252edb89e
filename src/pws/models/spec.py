"""Models of anybody's by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from pws.errors import PwsError, UnknownNameError, nearest, one_line


def model_of(spec: str) -> nn.Module:
    """The model that `spec` names, with random weights: torchvision:NAME, timm:NAME or package.module:factory (a function
    without arguments that returns a module).

    Raises:
        UnknownNameError: the library has no such model.
        PwsError: `spec` has another form, or the model can't be built.
    """
    library, _, name = spec.partition(":")
    if not name:
        raise PwsError(
            f"a model is torchvision:NAME, timm:NAME or package.module:factory; got {spec!r}. Such as timm:resnet18."
        )
    builders: dict[str, Callable[[str], nn.Module]] = {"torchvision": _from_torchvision, "timm": _from_timm}
    try:
        model: Any = builders[library](name) if library in builders else _from_module(library, name)
    except PwsError:
        raise
    except Exception as error:  # anything may go wrong in other people's constructors
        raise PwsError(f"{spec} can't be built: {type(error).__name__}: {one_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise PwsError(f"{spec} must give a torch.nn.Module; it gave a {type(model).__name__}.")
    return model.train()


def _from_torchvision(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UnknownNameError("torchvision model", name, models.list_models())
    aux = {"weights_backbone": None} if "weights_backbone" in models.get_model_builder(name).__annotations__ else {}
    model: nn.Module = models.get_model(name, weights=None, **aux)
    return model


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise PwsError("timm's models need timm: pip install 'pws-torch[models]'.") from error
    if name.split(".")[0] not in timm.list_models():
        raise UnknownNameError("timm model", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _from_module(module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise PwsError(
            f"{module}:{name} needs the module {module}: {error}. It must be importable from here: a package that is "
            "installed, or PYTHONPATH=. for a file of this folder."
        ) from error
    factory = getattr(found, name, None)
    if not callable(factory):
        raise PwsError(
            f"{module} has no function or class {name!r}{nearest(name, (n for n in vars(found) if n[0] != '_'))}"
        )
    return factory()
