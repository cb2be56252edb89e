"""A test whose data or browser is missing is skipped on a developer's machine, and fails in CI."""

from __future__ import annotations

import needs
import pytest


@pytest.fixture(params=needs.NEEDS)
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(needs.NEEDS, name, (lambda: None, needs.NEEDS[name][1]))
    monkeypatch.setattr(needs, "missing", {})
    return name


def test_it_is_skipped_and_counted(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match=f"{absent} is missing: apt-get install"):
            needs.need(absent)
    assert needs.missing == {absent: 2}


def test_it_fails_in_ci(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"{absent} is missing"):
        needs.need(absent)
    assert needs.missing == {}
