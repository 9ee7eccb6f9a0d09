"""The small pieces that every report is made of; every text that comes from outside is escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from mmrec.page import page
from mmrec.retrieval.report.style import STYLE


def render_page(title: str, header: str, parts: Mapping[str, str]) -> str:
    """A whole page in the style of reports: see mmrec/page.py."""
    return page(title, header, parts, STYLE)


def readable(name: str) -> str:
    """A system's or a slice's name, escaped."""
    return escape(name.replace("_", " "))


def heading(name: str) -> str:
    """A name as the first words of a heading, escaped: "warm" is "Warm"."""
    return escape(name[:1].upper() + name[1:])


def range_text(interval: Sequence[float]) -> str:
    """Both ends of an interval."""
    return f"{interval[0]:.3f}\u2013{interval[1]:.3f}"


def count_of(queries: int) -> str:
    """A number of queries, in words."""
    return f"{queries:,} {'query' if queries == 1 else 'queries'}"


def note(html: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{html}</p>'


def table(
    caption: str, columns: Sequence[str], bodies: Sequence[str], *, kind: str = "plain"
) -> str:
    """A table in a box of its own that scrolls, also by keyboard; `bodies` are tbody elements.

    `caption` and `columns` are escaped.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f'<table class="{kind}"><caption><span>{escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
    )


def facts(rows: Mapping[str, str]) -> str:
    """Names and values, a line each; a value may have several lines."""
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in rows.items()
    )
    return f'<dl class="facts">{listed}</dl>' if listed else ""
