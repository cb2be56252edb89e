"""Write the report to a file; plotly and matplotlib are imported here, when they are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pws._errors import PwsError
from pws._files import write_whole, written_whole
from pws.diagnosis.measurement import Measurement
from pws.diagnosis.report.layer_charts import main_charts
from pws.diagnosis.verdicts import Verdict


def require_plotly() -> None:
    """Raise `PwsError` unless a report can be made: asked before the work, where that takes long."""
    if importlib.util.find_spec("plotly") is None:
        raise PwsError("the report needs plotly: pip install 'pws-torch[report]'.")


def write_report(
    path: Path, measurement: Measurement, verdict: Verdict, history: Sequence[Measurement] = (), title: str = ""
) -> Path:
    """Write one HTML file that opens without a network; missing folders are made.

    Args:
        path: the file.
        measurement: what the charts and the table show.
        verdict: drawn from it.
        history: what a `Monitor` measured during training, for a chart over the steps.
        title: of the page; by default it names the model.

    Raises:
        PwsError: plotly is not installed, or the file cannot be written.
    """
    require_plotly()
    from pws.diagnosis.report.page import page_of

    content = page_of(measurement, verdict, history, title).encode("utf-8", "xmlcharrefreplace")
    try:
        _folder(path)
        write_whole(path, content)
    except OSError as error:
        raise _unwritable("report", path, error) from error
    return path


def write_picture(path: Path, measurement: Measurement, verdict: Verdict) -> Path:
    """Write the main charts as one PNG; missing folders are made.

    Raises:
        PwsError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from pws.diagnosis.report.chart_matplotlib import save_picture
    except ImportError as error:
        raise PwsError("the picture needs matplotlib: pip install 'pws-torch[report]'.") from error
    try:
        _folder(path)
        with written_whole(path) as partial:
            save_picture(main_charts(measurement), f"{measurement.model}: {verdict.finding}", partial)
    except OSError as error:
        raise _unwritable("picture", path, error) from error
    return path


def _folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _unwritable(what: str, path: Path, error: OSError) -> PwsError:
    return PwsError(
        f"the {what} must go to a file that can be written; {path} cannot: {error.strerror}. Pass another path."
    )
