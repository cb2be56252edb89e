"""The documents: their examples run, and what they link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
EXAMPLES = {
    "README.md": 1,
    "docs/start.md": 4,
    "docs/how-to/optimizer.md": 8,
    "docs/how-to/layers.md": 1,
    "docs/how-to/deploy.md": 2,
    "docs/how-to/diagnose.md": 3,
    "docs/detection.md": 1,
    "docs/privacy.md": 2,
    "docs/federated.md": 1,
}


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for example in examples(page):
        exec(example, scope)
        model = scope["model"]
        assert isinstance(model, torch.nn.Module)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("page", EXAMPLES)
def test_a_page_has_its_examples(page: str) -> None:
    assert len(examples(page)) == EXAMPLES[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_of_a_page_exist(page: str) -> None:
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_readme_links() -> None:
    assert len(re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())) > 10


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
