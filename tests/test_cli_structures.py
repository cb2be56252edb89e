"""Files of a wrong structure: one clear error each, whatever stands where something else is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from wrong_files import RESULTS, TEXTS, WRONG, changed

from pws._errors import PwsError
from pws.cli import main
from pws.training.parsing import parse_as
from pws.training.recipe_file import load_recipe
from pws.training.yaml_file import read_yaml

GRID: dict[str, Any] = {
    "settings": {"model": {"name": "allconv", "width": 0.08}, "data": {"name": "digits"}, "trainer": {"max_steps": 2}},
    "columns": [{"optim.lr": 0.1}, {"optim.lr": 0.2}],
    "rows": {"bn": {}},
    "seeds": [0],
}
RECIPE: dict[str, Any] = {"model": {"name": "allconv"}, "data": {"name": "digits"}, "optim": {"lr": 0.1}, "seed": 0}
# Where in a grid and a recipe each of WRONG stands instead of what belongs there.
PLACES: list[tuple[str, tuple[Any, ...]]] = [
    *(("accuracy", (key,)) for key in ("columns", "rows", "seeds", "target", "evaluations", "evaluation_images")),
    *(("accuracy", place) for place in (("title",), ("columns", 0), ("rows", "bn"), ("rows", "bn", "seeds"))),
    *(("accuracy", ("columns", 0, key)) for key in ("optim.lr", "data.train_images", "data.augment", "model")),
    *(("accuracy", ("settings", key)) for key in ("model", "data", "optim.lr", "config", "data.batch_size")),
    *(("train", (key,)) for key in ("model", "data", "optim", "trainer", "seed", "name")),
    *(("train", ("optim", key)) for key in ("lr", "milestones", "schedule", "step_bound")),
    *(("train", ("data", key)) for key in ("name", "batch_size", "image_size", "augment")),
]


def command(kind: str, path: Path) -> list[str]:
    folder = str(path.parent / "out")
    return (
        ["train", str(path), f"--runs={folder}"] if kind == "train" else ["bench", kind, str(path), f"--out={folder}"]
    )


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    before = sorted(Path(arguments[-1].partition("=")[2]).parent.rglob("*"))
    assert main(arguments) == 2, arguments
    said = capsys.readouterr().err
    assert said.startswith("pws: ")
    assert said.count("\n") == 1, said
    assert len(said) < 1500
    assert sorted(Path(arguments[-1].partition("=")[2]).parent.rglob("*")) == before
    return said


@pytest.mark.parametrize("kind", ["accuracy", "train"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_such_file(
    kind: str, text: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in refused(capsys, command(kind, path))


def fits(place: tuple[Any, ...], value: Any) -> bool:
    """Whether the wrong value happens to be right there."""
    right: dict[tuple[Any, ...], list[Any]] = {
        ("title",): ["word"],
        ("name",): ["word"],
        ("seed",): [5],
        ("seeds",): [[1]],
        ("rows", "bn", "seeds"): [[1]],
        ("rows", "bn"): [{}],
        ("columns", 0): [{}],
        ("target",): [5, 0.5],
        ("evaluations",): [5],
        ("evaluation_images",): [5],
        ("optim", "milestones"): [[], [1]],
        ("settings", "optim.lr"): [5, -1, 0.5],  # the columns have their own
        ("optim", "lr"): [5, 0.5],
        ("optim", "step_bound"): [5, 0.5],
        ("data", "batch_size"): [5],
        ("data", "image_size"): [5],
        ("data", "augment"): [True],
    }
    short: dict[str, list[Any]] = {
        "optim.lr": [5, 0.5],
        "data.train_images": [5],
        "data.batch_size": [5],
        "data.augment": [True],
        **{key: [{}] for key in ("model", "data", "optim", "trainer")},
    }
    allowed = right.get(place, short.get(str(place[-1]), []))
    return any(type(value) is type(item) and value == item for item in allowed)


@pytest.mark.parametrize(
    ("kind", "place"), PLACES, ids=lambda value: value if isinstance(value, str) else str(value[-1])
)
def test_a_value_that_does_not_belong_there(
    kind: str, place: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"accuracy": GRID, "train": RECIPE}[kind]
    path = tmp_path / "mine.yaml"
    tried = 0
    for value in WRONG:
        if not fits(place, value):
            path.write_text(yaml.safe_dump(changed(content, place, value)))
            refused(capsys, command(kind, path))
            tried += 1
    assert tried > 5


def test_a_column_cannot_read_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("optim: {lr: 3}")
    for key in ("config", "help", "print_config", "optim.lr=3 --seed"):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**GRID, "columns": [{key: str(tmp_path / "other.yaml")}]}))
        assert "unknown recipe key" in refused(capsys, command("accuracy", path))


def test_what_the_reader_gives(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-3\nb: {c: [1, null, yes]}\nname: ünïcode\n", encoding="utf-8")
    assert read_yaml(path, "recipe") == {"a": "1e-3", "b": {"c": [1, None, True]}, "name": "ünïcode"}
    assert parse_as(float, "1e-3", "x") == 0.001
    given = {"rows": {"none": {"seconds": [1.0]}}}
    assert parse_as(dict[str, Any], given, "x") is not given
    assert type(given["rows"]) is dict
    with pytest.raises(PwsError, match=r"^x: Expected a list\. Got value: 3"):
        parse_as(list[int], 3, "x")
    path.write_text('name: "1"\nmodel: {gain: relu}\ndata: {root: "null", name: digits}\noptim: {milestones: [3, 4]}\n')
    recipe = load_recipe(path)
    assert (recipe.name, recipe.model.gain, recipe.data.root, recipe.optim.milestones) == ("1", "relu", "null", [3, 4])


@pytest.mark.parametrize("content", RESULTS.values(), ids=RESULTS)
def test_a_result_file_that_is_damaged(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(GRID))
    if not (isinstance(content, dict) and content.get("cells") == []):  # nothing to take up
        assert "mine.json" in refused(capsys, ["bench", "accuracy", str(tmp_path / "mine.yaml"), f"--out={tmp_path}"])
