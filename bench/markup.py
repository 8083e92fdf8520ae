"""Pieces of the pages: tables, sections, one file with nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

CSS = (Path(__file__).parent / "page.css").read_text()


def table(head: list[str], rows: list[str]) -> str:
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def row(cells: list[str], css: str = "", first: str = "") -> str:
    """css: class of the row; first: of its first cell."""
    attribute = f' class="{css}"' if css else ""
    start = f'<td class="{first}">' if first else "<td>"
    return f"<tr{attribute}>{start}{cells[0]}</td>" + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"


def section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p class='soft'>{text}</p>{body}</section>"


def document(title: str, lead: str, body: str) -> str:
    """The whole page; lead is the sentence under its title."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>peftkern: {escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{lead}</p>{body}</main></body></html>\n'
    )
