"""A plan as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from pws._errors import PwsError, one_line

_LEFT_OUT: Final = ("model", "example", "progress", "forward")

Made = TypeVar("Made")


def plan_text(plan: Any) -> str:
    """All that a plan holds but the model and the example, as JSON."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name not in _LEFT_OUT}
    values["steps"] = [asdict(step) for step in plan.steps]
    listed = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in values.items()}
    return json.dumps(listed, indent=1) + "\n"


def read_plan(kind: type[Made], step: type[Any], path: str | Path) -> Made:
    """The plan in a file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, value in values.items():
            if name != "steps" and isinstance(value, list):
                values[name] = frozenset(value)
        values["steps"] = tuple(step(**found) for found in values["steps"])
        return kind(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PwsError(
            f"{path} must hold a plan, as Plan.save writes it: {type(error).__name__}: {one_line(error)}. Make it again: "
            "pws.plan(model, example).save(FILE)."
        ) from error
