"""Private training with Opacus. Needs the extra `private`."""

from pws._errors import PwsError

try:
    import opacus as _opacus  # noqa: F401
except ModuleNotFoundError as _error:
    raise PwsError(f"pws.private needs {_error.name}: pip install 'pws-torch[private]'.") from _error

from pws.private.make_trainable import make_trainable

__all__ = ["make_trainable"]
