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
from pws.training.detect.compare import detection_difference
from pws.training.model_and_data import ModelAndData, load_run

TOLERANCE: Final = 1e-4
"""The largest difference allowed between the outputs of the file and torch's: of logits and scores, and of boxes in parts of
the image's side."""
OPSET: Final = 17
"""Of a detector's ONNX file: the first operators that know all of torchvision's."""

Images = Tensor | list[Tensor]
"""A batch, or a list of a detector's one image."""
Outputs = Tensor | dict[str, Tensor]
"""Logits, or the detections of that image."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and read back."""

    path: Path
    difference: float
    """The largest between its outputs and those of the network, on a batch of the run's data."""
    compared: int
    """Images of that batch, or detections in a detector's one image."""
    detector: bool


@torch.no_grad()
def export(run: str, kind: str, out: Path | None = None, checkpoint: str = "best") -> Exported:
    """Fold the network of `run`, write it, read it back, and compare its outputs on a batch with the network's.

    Args:
        run: the run's folder, or a checkpoint file of it.
        kind: `onnx`, `torch-export` (both for any batch size; of a detector `onnx` alone, for one image of any size), or
            `safetensors`: the weights of the folded network, whose layers are torch.nn's.
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
    folded = fold(loaded.model).eval()
    images = loaded.images if isinstance(loaded.images, Tensor) else _with_most_objects(folded, loaded)
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
    difference, compared = _compared(found, _outputs(loaded.model.eval(), images), images)
    if not difference <= TOLERANCE:
        raise PwsError(
            f"the exported file's outputs differ from the network's by {difference:.1e}, more than {TOLERANCE:g}; it was not "
            "written. Another version of the exporter may do better."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return Exported(path, difference, compared, detector=isinstance(images, list))


def _outputs(model: nn.Module, images: Images) -> Outputs:
    outputs: Any = model(images)
    found: Outputs = outputs if isinstance(images, Tensor) else outputs[0]
    return found


def _with_most_objects(model: nn.Module, loaded: ModelAndData) -> list[Tensor]:
    """The image that tells most."""
    counts = [len(found["scores"]) for found in model(loaded.images)]
    return [loaded.images[counts.index(max(counts))]]


def _compared(found: Outputs, expected: Outputs, images: Images) -> tuple[float, int]:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return float((found - expected).abs().max()), len(images)
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    return detection_difference(found, expected, max(images[0].shape)), len(expected["scores"])


# Exporters write into memory: on a full disk their own writers abort the process.


def _onnx(model: nn.Module, images: Images) -> tuple[bytes, Outputs]:
    if isinstance(images, list):
        return _onnx_detector(model, images)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    shapes: Any = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content, _run_onnx(content, {"images": images})["logits"]


def _onnx_detector(model: nn.Module, images: list[Tensor]) -> tuple[bytes, Outputs]:
    """By tracing: torch.export can't follow how a detector goes through what it has found."""
    names, buffer = list(model(images)[0]), BytesIO()
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    settings: dict[str, Any] = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes}
    torch.onnx.export(model, (images,), buffer, dynamo=False, opset_version=OPSET, **settings)  # type: ignore[arg-type]
    return buffer.getvalue(), _run_onnx(buffer.getvalue(), {"image": images[0]})


def _run_onnx(content: bytes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are about what the exporter leaves over
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {output.name: torch.from_numpy(array) for output, array in zip(session.get_outputs(), found, strict=True)}


def _torch_export(model: nn.Module, images: Images) -> tuple[bytes, Outputs]:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    logits: Tensor = torch.export.load(buffer).module()(images)
    return buffer.getvalue(), logits


def _safetensors(model: nn.Module, images: Images) -> tuple[bytes, Outputs]:
    from safetensors.torch import load, save

    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    model.load_state_dict(load(content))
    return content, _outputs(model, images)


FORMATS: Final[dict[str, tuple[str, Callable[[nn.Module, Images], tuple[bytes, Outputs]]]]] = {
    "onnx": (".onnx", _onnx),
    "torch-export": (".pt2", _torch_export),
    "safetensors": (".safetensors", _safetensors),
}
"""Name to suffix and writer; a writer returns the file's content and the outputs of it, read back."""
