"""What the reports share: a document that loads nothing from elsewhere, tables, figures. Text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("style.css")


def document(title: str, body: Sequence[str]) -> str:
    """One file: printable, light and dark. ``body`` is html, ``title`` text."""
    head = (
        f'<meta charset="utf-8"/><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>"
    )
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{content}</body></html>\n'


def escape(text: object) -> str:
    return html.escape(str(text))


def table(head: Sequence[str], body: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    def row(cells: Sequence[object], tag: str) -> str:
        css = [' class="n"' if i in numbers else "" for i in range(len(cells))]
        made = (f"<{tag}{c}>{escape(cell)}</{tag}>" for c, cell in zip(css, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    top = row(head, "th") if head else ""
    return f'<div class="scroll"><table>{top}{"".join(row(cells, "td") for cells in body)}</table></div>'


def figure(drawing: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{drawing}</div>{below}</figure>'


def names(layers: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(layers))}</pre>"
