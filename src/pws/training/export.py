"""A run's network, folded, in formats that other programs load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pws.errors import PwsError, UnknownNameError, one_line
from pws.surgery import fold
from pws.training.subject import subject_of_run

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
    subject = subject_of_run(run, checkpoint)
    folded, images = fold(subject.model).eval(), subject.images
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_stem(f"{path.stem}.partial")  # the suffix stays: exporters look at it
    try:
        found = write(folded, images, partial)
        difference = float((found - subject.model.eval()(images)).abs().max())
        if not difference <= TOLERANCE:
            raise PwsError(
                f"the exported file's logits differ from the network's by {difference:.1e}, more than {TOLERANCE:g}; it was "
                "removed. Another version of the exporter may do better."
            )
        partial.rename(path)
    except ImportError as error:
        raise PwsError(f"the format {kind} needs {error.name}: pip install 'pws-torch[export]'.") from error
    except PwsError:
        raise
    except Exception as error:  # exporters fail in ways of their own
        raise PwsError(
            f"the {kind} exporter can't write this network: {type(error).__name__}: {one_line(error)}. Another --format may."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(path, difference)


def _onnx(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    import onnxruntime

    batch = torch.export.Dim("batch")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: batch},)}
    torch.onnx.export(model, (images,), str(path), dynamo=True, external_data=False, verbose=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _torch_export(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


def _safetensors(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    logits: Tensor = model(images)
    return logits


FORMATS: Final[dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], Tensor]]]] = {
    "onnx": (".onnx", _onnx),
    "torch-export": (".pt2", _torch_export),
    "safetensors": (".safetensors", _safetensors),
}
"""Name to suffix and writer; a writer returns the logits of what it wrote, read back."""
