"""The frame of a page that is one file: head, header, and sections to jump to.

A page holds its style, charts and images inline and asks nothing of any host; its own content policy
forbids it. It needs no script, follows the reader's light or dark setting, prints, and says in words
whatever it says in colour.
"""

import re
from collections.abc import Mapping
from html import escape


def page(title: str, header: str, parts: Mapping[str, str], style: str) -> str:
    """A whole page as text, to be written as UTF-8: `parts` are headings and their HTML.

    The title and the headings are escaped; `header`, `style` and what stands under the headings are not.
    Parts without HTML are left out.
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
<style>{style}</style>
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
    return re.sub("[^a-z]+", "-", heading.lower())
