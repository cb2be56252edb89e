"""A diagnosis as a table, as plain values and as text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diagnose_helpers import (
    X,
    cross_entropy,
    deterministic,
    images,
    rendered,
    small_net,
    square,
)
from torch import nn

from pws.diagnosis import diagnose


def test_the_table_has_a_row_a_layer_and_the_numbers() -> None:
    diagnosis = diagnose(small_net(), images(), cross_entropy, lr=0.25)
    text, lines = rendered(diagnosis), list[str]()
    for layer in diagnosis.layers:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [layer.name]]
        lines.append(line)
        assert f"{layer.output.variance:.3g}" in line
        assert f"{layer.critical_lr:.3g}" in line
        assert f"{100 * layer.shift_share:.0f} %" in line
    shares = [f"{100 * share:.0f} %" for share in diagnosis.predicted_shift_shares()]
    assert [line.rstrip().endswith(share) for line, share in zip(lines, shares, strict=True)] == [True] * 3
    assert rendered(diagnosis, width=40)


def test_a_name_like_markup_is_shown_as_it_is() -> None:
    model = nn.Sequential()
    model.add_module("[red]a[/red]", nn.Linear(3, 2))
    assert "[red]a[/red]" in rendered(diagnose(model, X, square))
    model = nn.Sequential()
    model.add_module("[/b]", nn.Linear(3, 2))
    assert "[/b]" in rendered(diagnose(model, X, square))


def test_repr_and_dict() -> None:
    model = deterministic()
    model[0].requires_grad_(False)
    diagnosis = diagnose(model, images(), cross_entropy, lr=0.2, momentum=0.9, steps=3)
    told = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert (told["model"], told["lr"], told["momentum"], told["steps"]) == ("Sequential", 0.2, 0.9, 3)
    assert told["loss"] == diagnosis.loss
    assert [layer["name"] for layer in told["layers"]] == ["0", "4", "7"]
    for layer, entry in zip(diagnosis.layers, told["layers"], strict=True):
        assert entry["critical_lr"] == layer.critical_lr
        assert entry["shift_share"] == layer.shift_share
        assert entry["output"]["variance"] == layer.output.variance
        assert entry["kernel_shape"] == list(layer.kernel_shape)
        assert entry["predicted_shift_share"] == layer.predicted_shift_share(0.2, 0.9, 3)
        assert "filters" not in entry
    assert told["critical_lr"] == min(layer.critical_lr for layer in diagnosis.layers if layer.critical_lr is not None)
    filters = diagnosis.to_dict(filters=True)["layers"][1]["filters"]
    assert filters["mean"] == model[4].weight.double().flatten(1).mean(1).tolist()
    assert len(filters["average_step"]) == 6
    assert "Diagnosis" in repr(diagnosis)
    assert "None" not in rendered(diagnosis)


@pytest.mark.parametrize("imported", ["pws", "pws.diagnosis"])
def test_import_loads_nothing_to_draw_with(imported: str) -> None:
    code = (
        f"import sys, {imported}; print([m for m in ('rich', 'plotly', 'matplotlib', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_diagnosis_loads_nothing_to_draw_with() -> None:
    code = """
import sys, torch, pws.diagnosis
found = pws.diagnose(torch.nn.Linear(3, 2), torch.ones(4, 3), lambda out: out.square().sum(), lr=0.1)
found.to_dict(), repr(found), found.verdict
print([m for m in ("rich", "plotly", "matplotlib", "lightning", "timm") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_update_to_weight_ratio_at_a_rate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 5
    told = diagnose(model, batch, nn.functional.cross_entropy, lr=0.25).to_dict()["layers"][0]["update_to_weight"]
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    assert told == pytest.approx(float(0.25 * model[1].weight.grad.norm() / model[1].weight.norm()), rel=1e-5)
    assert diagnose(model, batch, nn.functional.cross_entropy).to_dict()["layers"][0]["update_to_weight"] is None


def test_a_diagnosis_prints_as_a_sentence() -> None:
    found = diagnose(small_net(), images(), cross_entropy)
    assert repr(found) == str(found) == f"Diagnosis of Sequential, 3 layers. {found.verdict}"
