"""The report in a headless browser without a network, and the static picture."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from needs import need
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor, nn
from torch.nn import functional as F

from pws._errors import PwsError
from pws.diagnosis import Diagnosis, diagnose
from pws.diagnosis.report.axis import Axis, log_axis, split
from pws.diagnosis.report.chart_matplotlib import light_colours
from pws.diagnosis.report.number_format import number, percent, short
from pws.methods import build_method
from pws.models import build_model

FIGURES = ("fig-variance", "fig-gradient", "fig-shift", "fig-ratio", "fig-critical")
SCREEN = {"width": 1200, "height": 800}
HOSTILE = "</script><script>alert(1)</script><b>&amp;%{x}$x$"


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    found = need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield Pages(browser)
        browser.close()


class Pages:
    """Opened once each, for a page takes seconds to load; a test that changes one leaves it as it was."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.open: dict[Path, tuple[Page, list[str]]] = {}

    @contextmanager
    def at(self, path: Path, **options: Any) -> Iterator[Page]:
        """The page without a network; what it complains about or asks for fails the test. `options` make a new one."""
        page, wrong = self.open.get(path) or (None, [])
        if page is None or options:
            page, wrong = self._load(path, options)
        if not options:
            self.open[path] = page, wrong
        yield page
        assert wrong == []

    def _load(self, path: Path, options: dict[str, Any]) -> tuple[Page, list[str]]:
        page = self.browser.new_context(**{"viewport": SCREEN, "offline": True, **options}).new_page()
        wrong: list[str] = []
        known = (path.as_uri(), "data:,")
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url in known else wrong.append(f"request: {r.url[:200]}"))
        page.goto(path.as_uri())
        settle(page)
        return page, wrong


def settle(page: Page) -> None:
    """Wait until the observers and listeners have run."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drawn(page: Page, figure: str) -> list[dict[str, Any]]:
    """Name, number of drawn marks and values of each trace."""
    found: list[dict[str, Any]] = page.evaluate(
        """(id) => { const plot = document.querySelector(`#${id} .plot`);
        const shown = plot.querySelectorAll(".scatterlayer .trace .point, .barlayer .trace .point").length;
        return plot.data.map((t) => ({ name: t.name, y: t.y, text: t.hovertext, symbol: t.marker.symbol, shown })); }""",
        figure,
    )
    return found


def points(traces: list[dict[str, Any]]) -> int:
    return sum(value is not None for trace in traces for value in trace["y"])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32), torch.arange(4)


def net(method: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model("allconv", build_method(method), width=0.1)


@cache
def plain() -> Diagnosis:
    return diagnose(net("none"), batch(), F.cross_entropy, lr=2.0, momentum=0.9, steps=3)


@cache
def standardized() -> Diagnosis:
    return diagnose(net("pws"), batch(), F.cross_entropy)


@cache
def broken() -> Diagnosis:
    """Finite layers, then infinite ones, then NaN; no backward pass."""
    model = net("none")
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)][3:5]:
            layer.weight.fill_(1e30)
    return dataclasses.replace(diagnose(model, batch(), F.cross_entropy, lr=0.1), step=40)


@cache
def history() -> list[Diagnosis]:
    return [*(dataclasses.replace(plain(), step=10 * i, loss=2.0 + i) for i in range(4)), broken()]


@cache
def deep() -> Diagnosis:
    layers = [nn.Linear(6, 6) for _ in range(160)]
    model = nn.Sequential()
    for index, layer in enumerate(layers):
        nn.init.orthogonal_(layer.weight)
        model.add_module(f"a_rather_long_name_of_a_block_{index}", layer)
    return diagnose(model, (torch.randn(8, 6), torch.arange(8) % 6), F.cross_entropy, lr=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def broken_report(folder: Path) -> Path:
    return broken().html(folder / "broken.html", history=history(), title="A run")


@pytest.fixture(scope="module")
def pws_report(folder: Path) -> Path:
    return standardized().html(folder / "pws.html")


@pytest.fixture(scope="module")
def deep_report(folder: Path) -> Path:
    return deep().html(folder / "deep.html")


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return plain().html(folder / "new" / "plain.html")


def test_every_figure_is_drawn(pages: Pages, report: Path) -> None:
    layers = len(plain().layers)
    series = dict(zip(FIGURES, (4, 1, 2, 2, 1), strict=True))
    with pages.at(report) as page:
        assert [f.get_attribute("id") for f in page.query_selector_all("figure")] == [*FIGURES]
        for figure, count in series.items():
            traces = drawn(page, figure)
            assert points(traces) == traces[0]["shown"] == count * layers, figure
            assert page.locator(f"#{figure} .main-svg").first.bounding_box()["width"] > 900  # type: ignore[index]
            assert page.locator(f"#{figure} figcaption").inner_text()
            assert len(page.locator(f"#{figure} .plot").get_attribute("aria-label") or "") > 40
            texts = [text for trace in traces for text in trace["text"] if text]
            assert all(re.search(r"<b>[\w.]+</b><br>\w+, kernel \d+ × \d+", text) for text in texts)
        ticks = page.locator("#fig-variance .xtick text").all_text_contents()
        assert ticks == [layer.name for layer in plain().layers]


def test_values_are_those_of_the_diagnosis(pages: Pages, report: Path) -> None:
    d = plain()
    with pages.at(report) as page:
        var_in, var_out, centred, shift = (trace["y"] for trace in drawn(page, "fig-variance"))
        now, later = (trace["y"] for trace in drawn(page, "fig-shift"))
        gradient = drawn(page, "fig-gradient")[0]["y"]
        critical = drawn(page, "fig-critical")
    assert var_in == pytest.approx([layer.input.variance for layer in d.layers])
    assert var_out == pytest.approx([layer.output.variance for layer in d.layers])
    assert centred == pytest.approx([layer.centred for layer in d.layers])
    assert shift == pytest.approx([layer.shift for layer in d.layers])
    assert now == pytest.approx([layer.shift_share for layer in d.layers])
    assert later == pytest.approx(d.predicted_shift_shares())
    assert gradient == pytest.approx([layer.gradient.variance for layer in d.layers if layer.gradient])
    low = next(trace["y"] for trace in critical if trace["symbol"] == "diamond")
    assert [y is not None for y in low] == [(layer.critical_lr or 0) <= 2.0 for layer in d.layers]
    assert any(y is not None for y in low)


def test_the_verdict_is_in_the_first_screen(pages: Pages, report: Path) -> None:
    with pages.at(report) as page:
        for text in (plain().verdict.finding, plain().verdict.remedy):
            box = page.get_by_text(text, exact=True).bounding_box() if text else {"y": 0, "height": 0}
            assert box is not None
            assert box["y"] + box["height"] < 800
        assert (
            page.evaluate(
                "document.querySelector('.verdict').compareDocumentPosition(document.querySelector('figure'))"
            )
            == 4
        )
        facts = page.locator(".facts").inner_text()
    assert re.search(r"AllConv.*LR judged\s+2\s+Momentum\s+0.9\s+Steps ahead\s+3", facts, re.DOTALL)


def test_a_verdict_is_told_by_word_and_sign(pages: Pages, broken_report: Path, pws_report: Path) -> None:
    with pages.at(broken_report) as page:
        cause, signs = page.locator(".cause").inner_text(), page.locator(".verdict svg").inner_html()
        assert "unhealthy" in (page.locator(".verdict").get_attribute("class") or "")
    with pages.at(pws_report) as page:
        assert page.locator(".cause").inner_text() == standardized().verdict.cause.capitalize()
        assert page.locator(".verdict svg").inner_html() != signs
    assert cause.lower().startswith(broken().verdict.cause)


RIGHT_EDGE = "Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect().right))"
HIDDEN_NAMES = """() => [...document.querySelectorAll("#fig-variance .xtick text")]
    .filter((text) => text.getBoundingClientRect().width === 0).map((text) => text.textContent)"""
RANGE = "document.querySelector('#fig-variance .plot').layout.xaxis.range"
COLOURS = """() => { const style = getComputedStyle;
  const plot = document.querySelector("#fig-variance");
  return { ground: style(document.body).backgroundColor, text: style(document.body).color,
    muted: style(document.querySelector("figcaption")).color, finding: style(document.querySelector(".cause")).color,
    tick: style(plot.querySelector(".ytick text")).fill, legend: style(plot.querySelector(".legendtext")).fill,
    line: style(plot.querySelector(".scatterlayer .trace:nth-of-type(2) .js-line")).stroke }; }"""


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark(pages: Pages, report: Path) -> None:
    found = {}
    with pages.at(report) as page:
        found["light"] = page.evaluate(COLOURS)
        page.emulate_media(color_scheme="dark")
        settle(page)
        found["dark"] = page.evaluate(COLOURS)
        page.emulate_media(color_scheme="light")
        settle(page)
        assert page.evaluate(COLOURS) == found["light"]
    assert luminance(found["light"]["ground"]) > 0.9
    assert luminance(found["dark"]["ground"]) < 0.05
    for colours in found.values():
        for name in ("text", "muted", "finding", "tick", "legend"):
            assert contrast(colours[name], colours["ground"]) >= 4.5, (name, colours)
        assert contrast(colours["line"], colours["ground"]) >= 3
        assert colours["tick"] == colours["legend"] == colours["text"]


@pytest.mark.parametrize("options", [{}, {"has_touch": True, "is_mobile": True}])
def test_narrow(pages: Pages, deep_report: Path, options: dict[str, bool]) -> None:
    with pages.at(deep_report, **options) as page:
        page.set_viewport_size({"width": 360, "height": 800})
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate(RIGHT_EDGE) <= 360
        assert page.locator("#fig-variance .xtick text").count() > 8
        assert page.evaluate(HIDDEN_NAMES) == []
        assert page.evaluate(
            "(() => { const s = document.querySelector('.scroll'); return s.scrollWidth > s.clientWidth })()"
        )
        page.set_viewport_size(SCREEN)
        settle(page)
        assert 900 < page.evaluate(RIGHT_EDGE) <= 1200


def test_many_layers_have_few_labels_and_more_after_a_zoom(pages: Pages, deep_report: Path) -> None:
    with pages.at(deep_report) as page:
        assert points(drawn(page, "fig-variance")) == 4 * 160
        labels = page.locator("#fig-variance .xtick text").all_text_contents()
        assert 20 < len(labels) < 60
        assert all(len(label) <= 20 for label in labels)
        box = page.locator("#fig-variance .nsewdrag").first.bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.25 * box["width"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.34 * box["width"], y, steps=4)
        page.mouse.up()
        page.wait_for_function(f"{RANGE}[1] < 100")
        settle(page)
        zoomed = page.evaluate(RANGE)
        shown = page.locator("#fig-variance .xtick text").all_text_contents()
        first, last = math.ceil(zoomed[0]), math.floor(zoomed[1])
        assert shown == [short(layer.name) for layer in deep().layers[first : last + 1]]
        page.emulate_media(color_scheme="dark")
        settle(page)
        assert page.evaluate(RANGE) == zoomed
        page.emulate_media(color_scheme="light")
        page.mouse.dblclick(box["x"] + box["width"] / 2, y)
        page.wait_for_function(f"{RANGE}[1] > 150")


def test_print(pages: Pages, report: Path) -> None:
    with pages.at(report) as page:
        page.emulate_media(color_scheme="dark")
        settle(page)
        dark = page.evaluate(COLOURS)
        pdf = page.pdf(format="A4")
        settle(page)
        assert page.evaluate(COLOURS) == dark
        page.set_viewport_size({"width": 690, "height": 900})
        page.emulate_media(media="print")
        settle(page)
        colours = page.evaluate(COLOURS)
        assert page.evaluate("document.documentElement.scrollWidth") <= 690
        assert 600 < page.evaluate(RIGHT_EDGE) <= 690
        assert page.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
        page.emulate_media(media="screen", color_scheme="light")
        page.set_viewport_size(SCREEN)
        settle(page)
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    assert luminance(colours["ground"]) > 0.9
    assert contrast(colours["tick"], colours["ground"]) >= 4.5


def test_the_table_has_the_numbers(pages: Pages, report: Path) -> None:
    with pages.at(report) as page:
        head, *rows = page.evaluate(
            "[...document.querySelectorAll('table tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        assert page.locator("table caption").count() == 1
        assert page.locator("thead th[scope=col]").count() == len(head)
        assert page.locator("tbody th[scope=row]").count() == len(rows)
    layers = plain().to_dict()["layers"]
    assert len(rows) == len(layers)
    for row, layer in zip((dict(zip(head, row, strict=True)) for row in rows), layers, strict=True):
        assert row["layer"] == layer["name"]
        assert row["kernel"] == " × ".join(map(str, layer["kernel_shape"]))
        assert row["Var in"] == number(layer["input"]["variance"])
        assert row["Var out"] == number(layer["output"]["variance"])
        assert row["transmission"] == number(layer["transmission"])
        assert row["centred part"] == number(layer["centred"])
        assert row["shift part"] == number(layer["shift"])
        assert row["shift share"] == percent(layer["shift_share"])
        assert row["Var(dL/dy)"] == number(layer["gradient"]["variance"])
        assert row["average-gradient ratio"] == number(layer["average_gradient_ratio"])
        assert row["1/n"] == number(layer["independent_ratio"])
        assert row["critical LR"] == number(layer["critical_lr"])
        assert row["share after 3 steps at LR 2, momentum 0.9"] == percent(layer["predicted_shift_share"])


def test_zeros_and_infinities_are_drawn_as_what_they_are(pages: Pages, pws_report: Path) -> None:
    layers = len(standardized().layers)
    with pages.at(pws_report) as page:
        ratio, rate = drawn(page, "fig-ratio"), drawn(page, "fig-critical")
        cells = page.locator("tbody td").all_inner_texts()
    assert cells.count("∞") == layers
    [zeros] = [trace for trace in ratio if trace["name"].startswith("0")]
    assert len(zeros["y"]) == layers
    assert 0 < zeros["y"][0] < min(layer.independent_ratio for layer in standardized().layers)
    [endless] = rate
    assert endless["symbol"] == "triangle-up"
    assert len(endless["y"]) == layers
    assert all("critical LR: infinite: no step can shift it" in text for text in endless["text"])


def test_without_a_backward_pass(pages: Pages, broken_report: Path) -> None:
    d = broken()
    assert not math.isfinite(d.loss or 0)
    with pages.at(broken_report) as page:
        for figure in ("fig-gradient", "fig-ratio", "fig-critical"):
            assert page.locator(f"#{figure} .plot").count() == 0
            assert f"the loss is {number(d.loss)}" in page.locator(f"#{figure} .missing").inner_text()
        traces = drawn(page, "fig-variance")
        cells = page.locator("tbody td").all_inner_texts()
    assert points(traces) == traces[0]["shown"] == 4 * len(d.layers)
    assert {trace["symbol"] for trace in traces} >= {"x-thin-open"}
    assert {"NaN", "–"} <= set(cells)


def test_history(pages: Pages, broken_report: Path) -> None:
    with pages.at(broken_report) as page:
        assert page.title() == page.locator("h1").inner_text() == "A run"
        assert "Training step" in page.locator(".facts").inner_text()
        share, rate, loss, undefined = drawn(page, "fig-history")
        assert page.evaluate("document.querySelector('#fig-history .plot').data[0].x") == [0, 10, 20, 30, 40]
        assert page.locator("#fig-history .shapelayer path").count() >= 1
    finite = [s for s in (layer.shift_share for layer in broken().layers) if math.isfinite(s)]
    assert share["y"] == pytest.approx([max(layer.shift_share for layer in plain().layers)] * 4 + [max(finite)])
    assert rate["y"] == [pytest.approx(plain().critical_lr)] * 4 + [None]
    assert loss["y"] == [2, 3, 4, 5, None]
    assert len(undefined["y"]) == 1


def test_hostile_names_are_text_and_notes_say_why_a_number_is_missing(pages: Pages, folder: Path) -> None:
    model = nn.Sequential(nn.Flatten())
    model.add_module(HOSTILE, nn.Linear(3 * 32 * 32, 6))
    model.add_module("head", nn.Linear(6, 4))
    model[1].weight.requires_grad_(False)
    d = dataclasses.replace(diagnose(model, batch(), F.cross_entropy), model=HOSTILE, unused=(HOSTILE,))
    note = d.layers[0].note
    assert note
    with pages.at(d.html(folder / "hostile.html", history=[d], title=HOSTILE)) as page:
        assert page.title() == page.locator("h1").inner_text() == HOSTILE
        assert page.locator("tbody th").all_inner_texts() == [HOSTILE, "head"]
        assert note in page.locator("tbody tr").first.inner_text()
        assert f"{note}: {HOSTILE}" in page.locator(".facts").inner_text()
        assert page.locator("#fig-variance .xtick text").first.text_content() == "…" + HOSTILE[-19:]
        assert points(drawn(page, "fig-critical")) == 1
        page.locator("#fig-variance .plot").focus()
        page.keyboard.press("ArrowRight")
        page.locator("#fig-variance .hoverlayer .hovertext").filter(has_text="<script>alert(1)").wait_for(timeout=5000)
        assert page.locator("script").count() == 2 + 6


def test_keys_walk_through_the_layers(pages: Pages, report: Path) -> None:
    first, second = plain().layers[0].name, plain().layers[1].name
    with pages.at(report) as page:
        page.locator("#fig-critical .plot").focus()
        for key, name in (("ArrowRight", first), ("ArrowRight", second), ("ArrowLeft", first)):
            page.keyboard.press(key)
            page.locator("#fig-critical .hoverlayer .hovertext").filter(has_text=name).wait_for(timeout=5000)
        page.keyboard.press("Escape")


def test_no_button_uploads_a_figure(pages: Pages, report: Path) -> None:
    with pages.at(report) as page:
        page.locator("#fig-variance .plot").hover()
        titles = page.locator("#fig-variance .modebar-btn").evaluate_all(
            "all => all.map((b) => b.dataset.title || b.title)"
        )
    assert any("Zoom" in title for title in titles)
    assert not [title for title in titles if re.search("cloud|share|send|upload|link", title, re.IGNORECASE)]


def test_the_file_asks_for_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    head = text[: text.index("<style>")]
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?https?:""", text[: text.index("/**\n* plotly.js")])
    assert "default-src 'none'" in head
    specs = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    assert len(specs) == len(FIGURES)
    assert all({"data", "layout"} <= json.loads(spec).keys() for spec in specs)


@pytest.mark.parametrize("make", [standardized, broken, deep])
def test_picture(tmp_path: Path, make: Any) -> None:
    path = make().png(tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[0] > 900
    assert image.shape[1] > 1200
    assert 0.005 < (image[..., :3].mean(-1) < 0.9).mean() < 0.5
    # Ink in each quarter.
    half, middle = image.shape[0] // 2, image.shape[1] // 2
    for part in (image[:half, :middle], image[:half, middle:], image[half:, :middle], image[half:, middle:]):
        assert (part[..., :3].mean(-1) < 0.6).sum() > 500


def test_the_picture_has_the_pages_colours_and_they_stand_out(pages: Pages, report: Path) -> None:
    colours = {
        name: f"rgb{tuple(round(255 * part) for part in to_rgb(value))}" for name, value in light_colours().items()
    }
    with pages.at(report) as page:
        assert page.evaluate(COLOURS)["text"] == colours["ink"]
    assert contrast(colours["ink"], "rgb(255, 255, 255)") >= 4.5
    for name in ("input", "output", "centred", "shift"):
        assert contrast(colours[name], "rgb(255, 255, 255)") >= 4.5


@pytest.mark.parametrize(("write", "library"), [(Diagnosis.html, "plotly"), (Diagnosis.png, "matplotlib")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write: Any, library: str) -> None:
    for name in [
        name for name in sys.modules if name.startswith("pws.diagnosis.report.") and not name.endswith("write")
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PwsError, match=rf"needs {library}: pip install 'pws-torch\[report\]'"):
        write(plain(), tmp_path / "file")


@pytest.mark.parametrize("write", [Diagnosis.html, Diagnosis.png])
def test_a_path_that_cannot_be_written(tmp_path: Path, write: Any) -> None:
    with pytest.raises(PwsError, match="file that can be written"):
        write(standardized(), tmp_path)


def test_places_on_a_logarithmic_axis() -> None:
    values = [1e-3, 10.0, 0.0, -1e-20, math.inf, math.nan, None]
    axis = log_axis(values)
    assert split(values, axis) == {"value": [0, 1], "zero": [2, 3], "infinite": [4], "undefined": [5]}
    assert axis.place(0.0) == axis.floor < 1e-3
    assert axis.place(math.inf) == axis.ceiling > 10
    assert log_axis([1e-3, 10.0]) == Axis(pytest.approx(1e-3), pytest.approx(10.0))
    assert all(map(math.isfinite, log_axis([5e-324, 1.7e308, 0.0, math.inf]).limits))
    assert math.isfinite(log_axis([None, math.nan]).ceiling)


def test_numbers() -> None:
    assert [number(v) for v in (None, math.nan, math.inf, -math.inf, 0.0, 1234.5)] == [
        "–",
        "NaN",
        "∞",
        "−∞",
        "0",
        "1.23e+03",
    ]
    shares = [percent(v).replace("\u00a0", " ") for v in (None, math.nan, 0.0, 1e-9, 0.004, 0.126, 1.0)]
    assert shares == ["–", "NaN", "0 %", "< 0.1 %", "0.4 %", "13 %", "100 %"]
