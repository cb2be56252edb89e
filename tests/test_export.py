"""`pws export`: files that other programs load give the network's outputs."""

from __future__ import annotations

import errno
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
from pws.surgery import fold
from pws.training.model_and_data import load_run

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
