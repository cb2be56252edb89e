"""`trainer.compile` and `trainer.checkpoint_activations`: the same training, other passes; and what a line says of the pace."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_detectors import small, two_objects
from torch import Tensor, nn

from pws._errors import PwsError
from pws.methods import build_method
from pws.models import build_model, model_of
from pws.training import Recipe, Summary, evaluate, load_recipe, train
from pws.training.checkpointing import checkpoint_activations
from pws.training.classifier import Classifier
from pws.training.module import NonFiniteLossError
from pws.training.progress import EpochLines, duration


def tiny(*flags: str) -> Recipe:
    return load_recipe(
        "fashion-mnist-allconv-pws",
        *("--data.name=digits", "--data.train_images=64", "--data.batch_size=32", "--model.name=stack4"),
        *("--model.width=0.1", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=64-true"),
        *flags,
    )


def state(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def assert_same_runs(first: Path, second: Path, summaries: tuple[Summary, Summary]) -> None:
    a, b = state(first), state(second)
    assert list(a) == list(b)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    assert summaries[1].train_loss == pytest.approx(summaries[0].train_loss, rel=1e-7)
    assert summaries[1].metrics == pytest.approx(summaries[0].metrics, rel=1e-5)


@pytest.mark.needs("compiler")
def test_a_compiled_run_trains_as_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[type] = []
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: (compiled.append(type(self)), original(self)))
    eager = train(tiny("--trainer.epochs=2"), tmp_path / "eager", quiet=True)
    assert compiled == []
    summary = train(tiny("--trainer.epochs=2", "--trainer.compile=true"), tmp_path / "compiled", quiet=True)
    assert [kind.__name__ for kind in compiled] == ["Stack"]
    assert_same_runs(tmp_path / "eager", tmp_path / "compiled", (eager, summary))
    found = evaluate(tmp_path / "compiled")
    assert found.loss == pytest.approx(summary.metrics["loss"], rel=1e-5)  # type: ignore[union-attr]
    # The layer that overflows first is found inside a compiled network too.
    flags = ("--model.method=none", "--optim.lr=1e200", "--optim.step_bound=null", "--trainer.compile=true")
    with pytest.raises(NonFiniteLossError) as caught:
        train(tiny(*flags), tmp_path / "overflow", quiet=True)
    assert str(caught.value.layer).startswith("features.")


def test_without_a_compiler_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(PwsError, match=r"torch can't compile here: RuntimeError: No working C\+\+ compiler.*g\+\+"):
        train(tiny("--trainer.compile=true"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--trainer.compile=true", "--trainer.checkpoint_activations=true"), "chooses by itself"),
        (
            ("--task=detect", "--data.name=digit-scenes", "--model.name=ssd-vgg16", "--trainer.compile=true"),
            "trainer.compile is a setting of task classify",
        ),
    ],
)
def test_what_does_not_go_together(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(PwsError, match=words):
        tiny(*flags)


def ours(name: str, method: str) -> nn.Module:
    return build_model(name, build_method(method), in_channels=3, width=0.1)


MODELS: dict[str, Any] = {
    "preact bn": lambda: ours("preact11", "bn"),
    "preact sn": lambda: ours("preact11", "sn"),
    "allconv pws": lambda: ours("allconv", "pws"),
    "allconv bn with dropout": lambda: nn.Sequential(ours("allconv", "bn"), nn.Dropout(0.3)),
    "stack bn": lambda: ours("stack8", "bn"),
    "torchvision's resnet": lambda: model_of("torchvision:resnet18", num_classes=10),
    "timm's resnet": lambda: model_of("timm:resnet10t", num_classes=10),
    "torchvision's mobilenet": lambda: model_of("torchvision:mobilenet_v3_small", num_classes=10),
}


def backward(model: nn.Module, *inputs: Any) -> tuple[Tensor, int]:
    """The loss of a pass and its gradients; the bytes that it kept for them outside of its blocks."""
    kept: list[int] = []
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        outputs = model(*inputs)
    loss = torch.stack(list(outputs.values())).sum() if isinstance(outputs, dict) else outputs.square().mean()
    loss.backward()
    return loss.detach(), sum(kept)


def assert_same_passes(plain: nn.Module, *inputs: Any) -> None:
    model = copy.deepcopy(plain)
    checkpoint_activations(model)
    model = copy.deepcopy(model)  # as the average of the weights does
    assert list(model.state_dict()) == list(plain.state_dict())
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    (wanted, before), (found, after) = (backward(each, *inputs) for each in (plain, model))
    assert torch.equal(found, wanted)
    for (name, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), (_, b) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(a, b), f"{name}: a statistic that was updated twice"
    assert sum(count == 2 for count in calls.values()) > 5
    assert after < 0.6 * before


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_run_again_give_the_same_gradients(name: str) -> None:
    model = MODELS[name]().double().train()
    assert_same_passes(model, torch.randn(4, 3, 32, 32, dtype=torch.float64))


def test_a_detectors_backbone_runs_again_too() -> None:
    images, targets = two_objects()
    model = small("faster-rcnn-resnet18").double().train()
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    assert_same_passes(model, [image.double() for image in images], targets)


def test_a_run_with_blocks_that_run_again(tmp_path: Path) -> None:
    flags = ("--trainer.epochs=2", "--model.name=cifar-resnet18", "--model.method=bn", "--optim.ema=0.5")
    plain = train(tiny(*flags), tmp_path / "plain", quiet=True)
    again = train(tiny(*flags, "--trainer.checkpoint_activations=true"), tmp_path / "again", quiet=True)
    assert_same_runs(tmp_path / "plain", tmp_path / "again", (plain, again))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(PwsError, match="Linear has neither"):
        checkpoint_activations(nn.Linear(3, 2))


def test_a_monitor_does_not_look_at_blocks_that_run_twice(tmp_path: Path) -> None:
    with pytest.raises(PwsError, match="runs blocks twice"):
        train(tiny("--trainer.checkpoint_activations=true"), tmp_path / "run", quiet=True, monitor=1)
    assert not (tmp_path / "run").exists()


def test_an_epochs_line_says_pace_memory_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(tiny("--trainer.epochs=3", "--optim.lr=0"), tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    tail = r"  ([\d,]+) images/s  ([\d.]+) GB  \d+ s(, \d+ s left)?$"
    found = [re.search(tail, line) for line in lines]
    assert [match is not None and match[3] is not None for match in found] == [True, True, False]
    rates = [float(match[1].replace(",", "")) for match in found if match is not None]
    seconds = sum(64 / rate for rate in rates)
    assert seconds == pytest.approx(summary.train_seconds, rel=0.2)
    assert float(found[-1][2]) * 1024 == pytest.approx(summary.peak_memory_mb, abs=60)  # type: ignore[index]


class Slow:
    """A pace of large numbers."""

    class clock:  # noqa: N801
        seconds, validated_step = 3.5e5, 7

    def words(self, _: object) -> dict[str, str]:
        return {"images/s": "123,456", "GB": "123.4", "left": duration(4.5e5)}


def test_a_line_of_large_numbers_fits_in_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "train_loss_epoch": torch.tensor(6.9078),
        "val_loss": torch.tensor(6.9078),
        "val_accuracy": torch.tensor(1.0),
    }
    trainer: Any = type(
        "T", (), {"callback_metrics": metrics, "global_step": 7, "current_epoch": 998, "max_epochs": 999}
    )()
    pace: Any = Slow()
    said = Classifier.score_line
    lines = EpochLines(pace, lambda found: said(pace, found), validates=True)
    lines.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    (line,) = capsys.readouterr().out.splitlines()
    assert "left" in line
    assert len(line) <= 120, line
