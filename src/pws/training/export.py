"""A run's network, folded, in formats that other programs load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws._errors import PwsError, UnknownNameError, reason_of
from pws._files import write_whole
from pws.surgery import fold
from pws.training.model_and_data import load_run

TOLERANCE: Final = 1e-4
"""The largest absolute difference allowed between the logits of the file and torch's."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and read back."""

    path: Path
    difference: float
    """The largest between its logits and those of the network, on a batch of the run's data."""


@torch.no_grad()
def export(run: str, kind: str, out: Path | None = None, checkpoint: str = "best") -> Exported:
    """Fold the network of `run`, write it, read it back, and compare its outputs on a batch with the network's.

    Args:
        run: the run's folder, or a checkpoint file of it.
        kind: `onnx`, `torch-export` (both for any batch size), or `safetensors`: the weights of the folded network, whose
            layers are torch.nn's.
        out: the file; by default it stands in the run's folder.
        checkpoint: best or last, for a folder.

    Raises:
        UnknownNameError: no such format.
        PwsError: there is no such run, the file exists already, a library is missing, the exporter fails, or the outputs
            differ. Then no file is left.
    """
    if kind not in FORMATS:
        raise UnknownNameError("export format", kind, FORMATS)
    suffix, write = FORMATS[kind]
    folder = Path(run) if Path(run).is_dir() else Path(run).parent.parent
    path = out or folder / f"model{suffix}"
    if path.exists():
        raise PwsError(
            f"{path} exists already, and nothing is overwritten. Remove it, or name another file with --out."
        )
    loaded = load_run(run, checkpoint)
    folded, images = fold(loaded.model).eval(), loaded.images
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn of themselves; what they wrote is compared
            content, found = write(folded, images)
    except ImportError as error:
        raise PwsError(f"the format {kind} needs {error.name}: pip install 'pws-torch[export]'.") from error
    except Exception as error:  # exporters fail in ways of their own
        raise PwsError(
            f"the {kind} exporter can't write this network: {reason_of(error)}. Another --format may."
        ) from error
    difference = float((found - loaded.model.eval()(images)).abs().max())
    if not difference <= TOLERANCE:
        raise PwsError(
            f"the exported file's logits differ from the network's by {difference:.1e}, more than {TOLERANCE:g}; it was not "
            "written. Another version of the exporter may do better."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return Exported(path, difference)


# Exporters write into memory: on a full disk their own writers abort the process.


def _onnx(model: nn.Module, images: Tensor) -> tuple[bytes, Tensor]:
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    shapes: Any = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _torch_export(model: nn.Module, images: Tensor) -> tuple[bytes, Tensor]:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    logits: Tensor = torch.export.load(buffer).module()(images)
    return buffer.getvalue(), logits


def _safetensors(model: nn.Module, images: Tensor) -> tuple[bytes, Tensor]:
    from safetensors.torch import load, save

    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    model.load_state_dict(load(content))
    logits: Tensor = model(images)
    return content, logits


FORMATS: Final[dict[str, tuple[str, Callable[[nn.Module, Tensor], tuple[bytes, Tensor]]]]] = {
    "onnx": (".onnx", _onnx),
    "torch-export": (".pt2", _torch_export),
    "safetensors": (".safetensors", _safetensors),
}
"""Name to suffix and writer; a writer returns the file's content and the logits of it, read back."""
