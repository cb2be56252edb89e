"""`pws export`: files that other programs load give the network's outputs."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pws.cli import main
from pws.models.detector_spec import DetectorSpec
from pws.models.detectors import build_detector
from pws.surgery import fold
from pws.training import export as export_module
from pws.training.detect.compare import detection_difference
from pws.training.model_and_data import ModelAndData, load_run

TRAIN = (
    *(
        "train",
        "fashion-mnist-allconv-pws",
        "--data.name=digits",
        "--data.image_size=16",
        "--data.train_images=64",
        "--data.batch_size=32",
    ),
    *("--model.width=0.125", "--trainer.epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, f"--runs={runs}", "--name=run"]) == 0
    return runs / "run"


def test_onnx_for_any_batch_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "onnx"]) == 0
    assert "logits differ from the network's by at most" in capsys.readouterr().out
    operators = {node.op_type for node in onnx.load(run / "model.onnx").graph.node}
    assert "Conv" in operators
    assert not any("Norm" in operator for operator in operators)
    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    model = load_run(str(run), "best").model.eval()
    for size in (1, 5):
        images = torch.randn(size, 1, 16, 16)
        with torch.no_grad():
            expected = model(images).numpy()
        assert np.abs(session.run(None, {"images": images.numpy()})[0] - expected).max() < 1e-4


def test_torch_export_loads_where_pws_is_not_installed(run: Path) -> None:
    assert main(["export", str(run), "--format", "torch-export", "--checkpoint", "last"]) == 0
    images = torch.randn(3, 1, 16, 16)
    torch.save((images, load_run(str(run), "last").model.eval()(images).detach()), run / "expected.pt")
    code = f"""
import sys
sys.modules["pws"] = None
import torch
images, expected = torch.load({str(run / "expected.pt")!r})
print(float((torch.export.load({str(run / "model.pt2")!r}).module()(images) - expected).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 1e-4


def test_safetensors_holds_the_plain_layers_weights(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "new" / "w.safetensors")]) == 0
    state = load_file(tmp_path / "new" / "w.safetensors")
    model = load_run(str(run), "best").model
    folded = fold(model)
    assert set(state) == set(folded.state_dict()) == set(model.state_dict())
    assert not any("alpha" in name for name in state)
    assert all(torch.equal(state[name], tensor) for name, tensor in folded.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "onxx"], "did you mean onnx"),
        (["--format", "safetensors", "--checkpoint", "third"], "third"),
        (["--out", __file__], "nothing is overwritten"),
    ],
)
def test_wrong_arguments(run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_an_exporter_that_fails_leaves_no_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def halfway(program: object, buffer: BytesIO) -> None:
        buffer.write(b"half")
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.export, "save", halfway)
    assert main(["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "model.pt2")]) == 2
    error = capsys.readouterr().err
    assert "RuntimeError: no such operator" in error
    assert "Another --format may" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "safetensors"])
def test_a_full_disk_leaves_no_half_file_and_no_noise(
    kind: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    arguments = ["export", str(run), "--format", kind, "--out", str(tmp_path / "model")]
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        assert main(arguments) == 2
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith("pws: [Errno 28] No space left on device")
    assert all(line.startswith(("pws: ", "  File ")) for line in said.splitlines()), said
    assert not list(tmp_path.iterdir())
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def tiny(name: str) -> ModelAndData:
    """A detector of random weights that finds objects, and two images of its data."""
    torch.manual_seed(0)
    model = build_detector(name, DetectorSpec(num_classes=3, image_size=64, width=0.03, anchor_size=16)).eval()
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 80, generator=generator) for _ in range(2)]
    return ModelAndData("tiny", model, images, [])


@pytest.fixture
def detector_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pws.training.export.load_run", lambda *_: tiny("mask-rcnn-resnet18"))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_detectors_onnx_file_takes_images_of_any_size(detector_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(detector_run), "--format", "onnx"]) == 0
    said = capfd.readouterr()
    assert re.search(r"model.onnx: \d+ detections differ from the network's by at most \d\.\de-", said.out)
    assert said.err == ""
    session = onnxruntime.InferenceSession(detector_run / "model.onnx", providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.shape) == ("image", [3, "height", "width"])
    model = fold(tiny("mask-rcnn-resnet18").model).eval()
    for height, width in ((64, 80), (90, 70)):
        pixels = torch.rand(3, height, width)
        with torch.no_grad():
            (expected,) = model([pixels])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"image": pixels.numpy()}), strict=True))
        assert names == ["boxes", "labels", "scores", "masks"]
        assert len(expected["scores"]) > 10
        assert found["masks"].shape == (len(expected["scores"]), 1, height, width)
        assert np.abs(found["scores"] - expected["scores"].numpy()).max() < 1e-4
        sure = (expected["scores"].diff().abs() > 1e-5).nonzero()[:, 0] + 1  # in no tie with the one before
        sure = sure[np.isin(sure, sure - 1)]
        assert len(sure) > 5
        assert np.abs(found["boxes"][sure] - expected["boxes"][sure].numpy()).max() < 0.01
        assert (found["labels"][sure] == expected["labels"][sure].numpy()).all()


def test_a_detectors_weights(detector_run: Path) -> None:
    from safetensors.torch import load_file

    assert main(["export", str(detector_run), "--format", "safetensors"]) == 0
    expected = fold(tiny("mask-rcnn-resnet18").model).state_dict()
    found = load_file(detector_run / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_torch_export_refuses_a_detector(detector_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(detector_run), "--format", "torch-export"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pws: the torch-export exporter can't write this network: ")
    assert "Another --format may" in said
    assert not list(detector_run.iterdir())


def test_a_detectors_file_that_differs_is_not_written(
    detector_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(content: bytes, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = original(content, inputs)
        return {**found, "boxes": found["boxes"] + 0.1}

    original = export_module._run_onnx
    monkeypatch.setattr(export_module, "_run_onnx", moved)
    assert main(["export", str(detector_run), "--format", "onnx"]) == 2
    assert "differ from the network's by 1." in capsys.readouterr().err  # 0.1 of 80 pixels: 1.2e-03
    assert not list(detector_run.iterdir())


def detections(scores: list[float]) -> dict[str, torch.Tensor]:
    count = len(scores)
    boxes = torch.arange(count * 4.0).reshape(count, 4)
    masks = torch.linspace(0, 1, count * 6).reshape(count, 1, 2, 3)
    return {"boxes": boxes, "labels": torch.arange(count) % 2, "scores": torch.tensor(scores), "masks": masks}


def test_detections_are_compared_in_any_order() -> None:
    expected = detections([0.9, 0.8, 0.7, 0.2])
    order = torch.tensor([1, 0, 3, 2])
    assert detection_difference({name: value[order] for name, value in expected.items()}, expected, 100) == 0
    nothing = {name: value[:0] for name, value in expected.items()}
    assert detection_difference(nothing, nothing, 100) == 0


@pytest.mark.parametrize(
    ("name", "change", "difference"),
    [
        ("boxes", torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]]), 0.05),
        ("scores", torch.tensor([0.0, 0.03, 0, 0]), 0.03),
        ("masks", torch.full((4, 1, 2, 3), 0.25), 0.25),
        # A class that nothing else has; a mask whose box is rounded another way; what is found with the lowest score.
        ("labels", torch.tensor([0, 5, 0, 5]), float("inf")),
        ("masks", torch.tensor([1.0, 0, 0, 0])[:, None, None, None], 0),
        ("boxes", torch.tensor([[0.0], [0], [0], [50]]), 0),
    ],
)
def test_the_difference_of_detections(name: str, change: torch.Tensor, difference: float) -> None:
    expected = detections([0.9, 0.8, 0.7, 0.2])
    found = {**expected, name: expected[name] + change}
    assert detection_difference(found, expected, 100) == pytest.approx(difference, abs=1e-6)


def test_a_missing_detection_is_a_difference() -> None:
    expected = detections([0.9, 0.8, 0.7])
    assert detection_difference({name: value[:2] for name, value in expected.items()}, expected, 100) == float("inf")
