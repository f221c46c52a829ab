from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from loraplex.adapters.training.html_report import Picture, Report, ReportTable, shown, write_html


class Texts(HTMLParser):
    """Collects cells and what the page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.loaded: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag in ("td", "th")
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if self._in_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def test_a_page_holds_everything_and_text_stays_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> & 'q'"
    table = ReportTable(hostile, ["name", "value"], [(hostile, 1234), ("b", 0.123456), ("c", None)])
    write_html(Report(hostile, [hostile], [Picture(b"\x89PNG", hostile)], [table], hostile), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text
    page = Texts()
    page.feed(text)
    assert page.cells == ["name", "value", hostile, "1,234", "b", "0.123", "c", ""]
    assert [each[:22] for each in page.loaded] == ["data:image/png;base64,"]


def test_numbers_are_shown_short() -> None:
    assert [shown(each) for each in (None, 12345, 0.00012345, 1234.5, "x")] == ["", "12,345", "0.000123", "1,234", "x"]
