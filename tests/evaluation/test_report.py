"""report.html: whole runs, torn ones, resumed ones; well-formed; with the curves it promises."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmnorm.errors import UserError
from llmnorm.evaluation import read_metrics, write_report
from llmnorm.evaluation.curves import Series, chart, compact, downsampled, smoothed

VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Tags in balance, the text, and every address that something would be fetched from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def rows(steps: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"step": 0, "tokens": 0, "eval/loss": 7.0, "eval/perplexity": math.exp(7), "eval/tokens": 99}
    ]
    for step in range(1, steps + 1):
        made.append(
            {
                "step": step,
                "tokens": 1024 * step,
                "loss": 3 + 4 * math.exp(-step / 20),
                "lr": 1e-3 * step / steps,
                "grad_norm": 1.0,
                "tokens_per_second": 1e4 + step,
            }
        )
    loss = 3 + 4 * math.exp(-steps / 20)
    made.append({"step": steps, "eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/tokens": 99})
    return made


def write(run: Path, made: list[dict[str, Any]], config: str = "", tail: str = "") -> str:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made) + tail)
    if config:
        (run / "config.yaml").write_text(config)
    path = write_report(run)
    assert path == run / "report.html" and sorted(p.suffix for p in run.iterdir())[0] == ".html"
    return path.read_text()


def charts(html: str) -> dict[str, ElementTree.Element]:
    """Each chart's title -> its SVG, parsed as XML."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ElementTree.fromstring(svg)
        found[root.findtext("{*}title") or ""] = root
    return found


def lines(svg: ElementTree.Element) -> list[str]:
    return [path.get("d") or "" for path in svg.iter("{http://www.w3.org/2000/svg}path")]


CONFIG = """
model: {preset: 2m, norm: mix_ln}
optimizer: {name: adamw, lr: 1e-03}
train: {max_steps: 120, global_batch_size: 8, precision: fp32}
data: {sequence_length: 64, tokenizer: "<script>alert(1)</script>"}
paper: {perplexity: 26.07, source: a table}
"""


def test_a_finished_run(tmp_path: Path) -> None:
    html = write(tmp_path / "my <run>", rows(120), CONFIG)
    page, text = Page(html), html
    assert not page.fetched and "script" not in page.tags, "nothing is loaded and nothing runs"
    assert "<script>" not in text and "&lt;script&gt;" in text, "text of the run is text"
    assert set(charts(html)) == {
        "Loss",
        "Held-out perplexity",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    }
    loss = charts(html)["Loss"]
    assert len(lines(loss)) == 2, "training and held-out"
    assert lines(loss)[0].count("L") == 119, "every step is drawn"
    shown = " ".join(page.text)
    for expected in (
        "mix_ln",
        "adamw",
        "lr 0.001",
        "context 64",
        "of 120",
        "122.9k",
        "its lowest",
        "paper 26.07",
    ):
        assert expected in shown, expected
    assert "prefers-color-scheme: dark" in html


def test_short_torn_and_resumed_runs(tmp_path: Path) -> None:
    assert Page(write(tmp_path / "none", [{"step": 0}])).text
    one = charts(write(tmp_path / "one", rows(1)[1:2]))
    assert len(list(one["Loss"].iter("{http://www.w3.org/2000/svg}circle"))) == 1, "one step is a dot"
    torn = write(tmp_path / "torn", rows(10), tail='{"step": 11, "lo')
    assert lines(charts(torn)["Loss"])[0].count("L") == 9
    repeated = [*rows(10), {"step": 10, "loss": 5.0}]  # the later row of a step wins
    assert "5.0000" in write(tmp_path / "repeated", repeated)
    with pytest.raises(UserError, match="does not exist, so there is no run to read"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_steps_without_a_number_are_gaps_and_marks(tmp_path: Path) -> None:
    made = rows(20)
    made[10]["loss"] = None
    html = write(tmp_path / "run", made)
    loss = charts(html)["Loss"]
    assert len(lines(loss)) == 3, "training before and after the gap, and held-out"
    assert sum(line.get("class") == "lost" for line in loss.iter("{http://www.w3.org/2000/svg}line")) == 1
    assert "steps whose loss was not a number" in html


def test_several_validation_sets_have_a_line_each(tmp_path: Path) -> None:
    made = rows(20)[:-1]
    for step in (10, 20):
        made.append({"step": step, "eval/loss": 3.5, "eval/wiki/loss": 3.0, "eval/code/loss": 4.0})
        made[-1] |= {"eval/perplexity": 33.1, "eval/wiki/perplexity": 20.1, "eval/code/perplexity": 54.6}
    page = Page(write(tmp_path / "run", made))
    shown = " ".join(page.text)
    assert "Held-out text at step 20" in shown and "54.6000" in shown
    assert "Perplexity, wiki" in shown and "Perplexity, code" in shown and "Perplexity, held-out" not in shown


def test_an_outlier_asks_for_a_logarithmic_axis() -> None:
    def ticks(values: list[float]) -> list[str]:
        svg = ElementTree.fromstring(chart("t", [Series("t", "c1", list(enumerate(values)))]))
        labels = [t for t in svg.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "tick end"]
        return [label.text or "" for label in labels]

    assert ticks([1.0, 1.1, 0.9, 1.0, 800.0]) == ["1", "10", "100"]
    assert ticks([1.0, 1.1, 0.9, 1.0, 1.2]) == ["0.9", "1", "1.1", "1.2"] or "1" in ticks(
        [1.0, 1.1, 0.9, 1.2]
    )


def test_downsampling_keeps_every_spike() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -9.0)
    kept = downsampled(points)
    assert len(kept) < 4000 and kept == sorted(kept)
    assert (54_321.0, 9.0) in kept and (77_777.0, -9.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert len(chart("t", [Series("t", "c1", points)])) < 60_000


def test_the_trend_does_not_lag() -> None:
    falling = [(float(x), 10.0 - x / 1000) for x in range(10_000)]
    for x, y in smoothed(falling):
        assert y == pytest.approx(10.0 - x / 1000, abs=0.06)
    falling[5000] = (5000.0, 1e9)
    assert max(y for _, y in smoothed(falling)) < 11


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (1.5, "1.5"), (12_000, "12k"), (2_500_000, "2.5M"), (3.5e-4, "3.5e-4"), (1e9, "1B")],
)
def test_tick_labels(value: float, label: str) -> None:
    assert compact(value) == label
