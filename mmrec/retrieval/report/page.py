"""The frame of a page: head, header, sections, and the small pieces that every page is made of.

A page holds its style, charts and images inline and asks nothing of any host; its own content policy
forbids it. It needs no script, follows the reader's light or dark setting, prints, and says in words
whatever it says in colour. Every text that comes from outside is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape

from mmrec.retrieval.report.style import STYLE


def render_page(title: str, header: str, parts: Mapping[str, str]) -> str:
    """A whole page as text, to be written as UTF-8: `parts` are headings and their HTML.

    The title and the headings are escaped, `header` and what stands under the headings are not. Parts
    without HTML are left out.
    """
    parts = {heading: body for heading, body in parts.items() if body}
    links = "".join(
        f'<li><a href="#{_anchor(heading)}">{escape(heading)}</a></li>' for heading in parts
    )
    sections = "\n".join(
        f'<section id="{_anchor(heading)}" aria-labelledby="{_anchor(heading)}-heading">\n'
        f'<h2 id="{_anchor(heading)}-heading">{escape(heading)}</h2>\n{body}\n</section>'
        for heading, body in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header>
<h1>{escape(title)}</h1>
{header}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="content">
{sections}
</main>
</body>
</html>
"""


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def readable(name: str) -> str:
    """A system's or a slice's name, escaped."""
    return escape(name.replace("_", " "))


def heading(name: str) -> str:
    """A name as the first words of a heading, escaped: "warm" is "Warm"."""
    return escape(name[:1].upper() + name[1:])


def range_text(interval: Sequence[float]) -> str:
    """Both ends of an interval."""
    return f"{interval[0]:.3f}\u2013{interval[1]:.3f}"


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
