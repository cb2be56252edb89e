"""What may stand in a file instead of what belongs there."""

from __future__ import annotations

import json
from typing import Any

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
TEXTS = {
    "nothing": "",
    "a word": "grid",
    "a number": "3",
    "a list": "- 1",
    "open": "a: [",
    "tabs": "a:\n\t- 1",
    "bytes": b"\xff\xfe\x00",
    "deep": "[" * 5000,
    "bomb": BOMB,
    "itself": "&a [*a]",
    "itself in a mapping": "title: &a {b: *a}",
    "no date": "title: 2024-99-99",
    "a date": "title: 2024-01-01",
    "a set": "title: !!set {a, b}",
    "an object": "title: !!python/object/apply:os.system [true]",
    "no float": "title: !!float x",
    "no timestamp": "title: !!timestamp x",
    "digits": f"title: {'9' * 5000}",
    "a key that is a number": "1: 2",
    "a key that is nothing": "null: 2",
    "a key that is a list": "? [1]\n: 2",
}
WRONG: list[Any] = [5, -1, 0.5, True, "word", [], {}, [1], ["a"], [[]], [None], {"a": 1}, {"a": {"b": [1]}}, [{"a": 1}]]


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return copy


RESULTS: dict[str, Any] = {
    "list": [],
    "cells of a number": {"grid": "g", "cells": 3},
    "cells of numbers": {"grid": "g", "cells": [1]},
    "cells of lists": {"grid": "g", "cells": [[]]},
    "an empty cell": {"grid": "g", "cells": [{}]},
    "a word for a number": {
        "grid": "g",
        "cells": [
            {"row": "bn", "column": "c", "seed": 0, "accuracy": None, "non_finite_step": 1, "steps_to_target": "x"}
        ],
    },
    "a cell without its column": {
        **{"grid": "g", "target": 0.8, "settings": {}, "rows": {"bn": {}}, "columns": {}},
        "cells": [
            {"row": "bn", "column": "c", "seed": 0, "accuracy": None, "non_finite_step": 1, "steps_to_target": None}
        ],
    },
    "no rows": {"grid": "g"},
    "rows of a number": {"grid": "g", "rows": 3, "columns": 4, "cells": []},
    "a suite of nothing": {"suite": "s", "cases": None},
    "a suite of numbers": {"suite": "s", "rows": ["none"], "cases": [1]},
    "models of numbers": {"models": 3},
    "networks of nothing": {"networks": []},
    "something else": {"a": 1},
}
