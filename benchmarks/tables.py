"""A benchmark's table in a page of docs, between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

from pathlib import Path


def put_into(page: Path, name: str, table: str) -> None:
    """Replace what stands between the two marks of `name`. Raises SystemExit where the page lacks them."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise SystemExit(
            f"{page} has no marks {begin.strip()} and {end}; add them where the table shall stand"
        )
    head, rest = text.split(begin, 1)
    _, tail = rest.split(end, 1)
    page.write_text(f"{head}{begin}{table}\n{end}{tail}", encoding="utf-8")
