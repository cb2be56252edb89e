"""The structure of the package: no circle of imports between its files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(code: str, modules: set[str]) -> set[str]:
    """The modules that a file imports at any place: functions and `if TYPE_CHECKING` count.

    `from a.b import c` imports the module `a.b.c` if there is one, else `a.b`, which holds or re-exports `c`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module or "")
    return found & modules


def circles(graph: Graph) -> list[list[str]]:
    """The sets of two or more modules each of which leads to all others."""
    ahead = {name: reached(graph, name) for name in graph}
    together = {name: frozenset(other for other in ahead[name] if name in ahead[other]) for name in graph}
    return sorted(sorted(circle) for circle in set(together.values()) if len(circle) > 1)


def reached(graph: Graph, start: str) -> set[str]:
    found, ahead = set[str](), [start]
    while ahead:
        following = graph[ahead.pop()] - found
        found |= following
        ahead += following
    return found


def package() -> Graph:
    files = {name_of(path): path for path in (SOURCE / "pws").rglob("*.py")}
    return {name: imported(path.read_text(), set(files)) - {name} for name, path in files.items()}


def test_no_file_leads_back_to_itself() -> None:
    graph = package()
    assert len(graph) > 100
    assert {"pws.diagnosis", "pws.surgery", "pws._layers"} <= graph["pws"]
    assert circles(graph) == []


def rooms(graph: Graph) -> Graph:
    """The same between subpackages, each as a whole; what stands beside them counts by itself."""
    folders = {path.name for path in (SOURCE / "pws").iterdir() if path.is_dir()}

    def room_of(name: str) -> str:
        part = name.split(".")[1] if "." in name else name
        return part if part in folders else name

    found: Graph = {room_of(name): set() for name in graph}
    for name, following in graph.items():
        found[room_of(name)] |= {room_of(other) for other in following} - {room_of(name)}
    return found


def test_no_room_leads_back_to_itself() -> None:
    found = rooms(package())
    assert "surgery" in found["diagnosis"]
    assert circles(found) == []


def test_a_circle_would_be_seen() -> None:
    graph = package()
    graph["pws._errors"].add("pws")
    (circle,) = circles(graph)
    assert {"pws", "pws._errors", "pws._layers"} <= set(circle)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import a.b", {"a.b"}),
        ("from a import b", {"a.b"}),
        ("from a import name", {"a"}),
        ("from a.b import name as other", {"a.b"}),
        ("def f():\n    from a.b import name", {"a.b"}),
        ("if TYPE_CHECKING:\n    from a.b import name\nelse:\n    import a", {"a", "a.b"}),
        ("import torch", set()),
    ],
)
def test_imports_are_read_wherever_they_stand(code: str, expected: set[str]) -> None:
    assert imported(code, {"a", "a.b"}) == expected
