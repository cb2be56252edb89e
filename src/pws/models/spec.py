"""Models of anybody's by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from pws._error_messages import frames_of_others, note_code_of_others
from pws._errors import PwsError, UnknownNameError, nearest, reason_of


def model_of(spec: str, *, num_classes: int | None = None, in_channels: int | None = None) -> nn.Module:
    """The model that `spec` names, with random weights.

    Args:
        spec: torchvision:NAME, timm:NAME or package.module:factory, a function that returns a module.
        num_classes: the library's default if left out; given to a factory if it takes an argument of this name.
        in_channels: of the images; the same. torchvision's models get another first convolution.

    Raises:
        UnknownNameError: the library has no such model.
        PwsError: `spec` has another form, or the model can't be built.
    """
    library, _, name = spec.partition(":")
    if not name:
        raise PwsError(
            f"a model is torchvision:NAME, timm:NAME or package.module:factory; got {spec!r}. Such as timm:resnet18."
        )
    builders: dict[str, Callable[..., nn.Module]] = {"torchvision": _from_torchvision, "timm": _from_timm}
    given = {"num_classes": num_classes, "in_channels": in_channels}
    wanted = {key: value for key, value in given.items() if value is not None}
    try:
        model: Any = builders[library](name, **wanted) if library in builders else _from_module(library, name, wanted)
    except PwsError:
        raise
    except (Exception, SystemExit) as error:  # anything may go wrong in other people's constructors
        raise PwsError(f"{spec} can't be built: {reason_of(error)}.") from error
    if not isinstance(model, nn.Module):
        raise PwsError(f"{spec} must give a torch.nn.Module; it gave a {type(model).__name__}.")
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise PwsError(
            f"{spec} must give a model with values; {len(empty)} of its tensors are on the meta device, such as {empty[0]}. "
            "Leave `with torch.device('meta')` out of its factory, or fill them: model.to_empty(device='cpu')."
        )
    return model.train()


def _from_torchvision(name: str, in_channels: int | None = None, **wanted: Any) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise UnknownNameError("torchvision model", name, models.list_models())
    aux = {"weights_backbone": None} if "weights_backbone" in models.get_model_builder(name).__annotations__ else {}
    model: nn.Module = models.get_model(name, weights=None, **aux, **wanted)
    first = next((n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and in_channels is not None:
        model.set_submodule(first, _with_channels(model.get_submodule(first), in_channels))
    return model


def _with_channels(conv: Any, channels: int) -> nn.Conv2d:
    """A new convolution like `conv` for inputs of `channels` channels."""
    settings = {key: getattr(conv, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    result = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None, **settings)
    nn.init.kaiming_normal_(result.weight, mode="fan_out", nonlinearity="relu")
    return result


def _from_timm(name: str, in_channels: int | None = None, **wanted: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise PwsError("timm's models need timm: pip install 'pws-torch[models]'.") from error
    if name.split(".")[0] not in timm.list_models():
        raise UnknownNameError("timm model", name, timm.list_models())
    channels: dict[str, Any] = {} if in_channels is None else {"in_chans": in_channels}
    model: nn.Module = timm.create_model(name, pretrained=False, **channels, **wanted)
    return model


def _from_module(module: str, name: str, wanted: dict[str, Any]) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        if frames_of_others(error):  # an import inside the module failed
            raise
        raise PwsError(
            f"{module}:{name} needs the module {module}: {error}. It must be importable from here: a package that is "
            "installed, or PYTHONPATH=. for a file of this folder."
        ) from error
    note_code_of_others(found)
    factory = getattr(found, name, None)
    if not callable(factory):
        raise PwsError(
            f"{module} has no function or class {name!r}{nearest(name, (n for n in vars(found) if n[0] != '_'))}"
        )
    taken = inspect.signature(factory).parameters
    return factory(**{key: value for key, value in wanted.items() if key in taken})
