"""How matches are shown in a notebook: HTML with its pictures inside, and matplotlib figures.

Nothing here has a colour of its own: text, lines and bars take the notebook's, light or dark, and styles are
inline, since notebooks drop style sheets from what they do not trust. Every text from outside is escaped.
"""

import base64
import io
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mmrec.errors import UserError

if TYPE_CHECKING:
    import matplotlib.figure

    from mmrec.retrieval.matches import Match, Matches, Why

THUMBNAIL = 96
"""The shorter side of a query's pictures, in pixels."""
_CARD = 132
_NOTHING = 0.01
"""A loss of score that fills a bar at least: among smaller ones bars would make much of little."""
_MOST_FRAMES = 12
_MOST_ATTRIBUTES = 6
_ROW = "display:flex;flex-wrap:wrap;gap:4px;align-items:flex-end"
_LIST = "list-style:none;margin:8px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:14px"
_SOFT = "opacity:.72;font-size:smaller;overflow-wrap:anywhere"


def picture(jpeg: bytes, description: str, *, style: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(jpeg).decode()
    return (
        f"<img alt='{escape(description, quote=True)}' src='data:image/jpeg;base64,{data}' "
        f"style='margin:0;border-radius:4px;{style}'>"
    )


def matches_html(matches: "Matches", *, right: Collection[str] = ()) -> str:
    """The query's frames and words, and a card for each match; `right` answers are marked as such."""
    cards = "".join(
        f"<li style='width:{_CARD}px'>{_card(place, match, match.product_id in right)}</li>"
        for place, match in enumerate(matches, 1)
    )
    found = f"<ol style='{_LIST}'>{cards}</ol>" if cards else "<p>no matches</p>"
    return f"<div style='color:inherit;line-height:1.35'>{query_html(matches)}{found}</div>"


def query_html(matches: "Matches") -> str:
    """The frames and words that were asked with."""
    shown = "".join(
        picture(frame, f"query picture {place} of {len(matches.frames)}", style="height:72px")
        for place, frame in enumerate(matches.frames[:_MOST_FRAMES], 1)
    )
    rest = len(matches.frames) - _MOST_FRAMES
    more = f"<span style='{_SOFT}'>and {rest} more</span>" if rest > 0 else ""
    return f"<div style='{_ROW}'>{shown}{more}</div>{_quoted(matches.title)}"


def why_html(why: "Why") -> str:
    """The product, how much video and title carried it, and what each frame is worth."""
    product = _card(None, why.match) if why.match else escape(why.product_id)
    halves = _half("video", why.video_alone, why.video_share)
    halves += _half("title", why.title_alone, why.title_share)
    largest = max([_NOTHING, *map(abs, why.frame_losses)])
    frames = "".join(
        f"<li style='width:88px'>{_frame(why.frames, place)}{_bar(loss / largest)}"
        f"<div><span style='{_SOFT}'>frame {place + 1}</span> {signed(loss)}</div></li>"
        for place, loss in enumerate(why.frame_losses)
    )
    listed = (
        f"<div style='margin-top:10px'>What the score loses without each frame:</div>"
        f"<ol style='{_LIST}'>{frames}</ol>"
        if frames
        else ""
    )
    return (
        "<div style='color:inherit;line-height:1.35;display:flex;flex-wrap:wrap;gap:24px'>"
        f"<div style='width:{_CARD}px'>{product}</div>"
        f"<div style='flex:1;min-width:260px'>{_quoted(why.title)}"
        f"<div>Score <b>{why.score:.3f}</b></div>{halves}{listed}</div></div>"
    )


def draw_matches(matches: "Matches", *, columns: int) -> "matplotlib.figure.Figure":
    """The gallery as a figure: the query's pictures above, matches in rows below."""
    if columns < 1:
        raise UserError(f"columns is {columns}; expected at least 1")
    frames = matches.frames[:columns]
    query_rows = 1 if frames else 0
    rows = -(-len(matches) // columns)
    heights = [0.8] * query_rows + [1.0] * rows or [1.0]
    figure = new_figure(2.0 * columns, 2.1 * sum(heights) + 0.4)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    if matches.title:
        figure.suptitle(f"“{matches.title}”", parse_math=False)
    for column, frame in enumerate(frames):
        _show(figure.add_subplot(grid[0, column]), frame, "query" if column == 0 else "")
    for number, match in enumerate(matches):
        place = grid[query_rows + number // columns, number % columns]
        words = textwrap.fill(match.title or match.product_id, 22, max_lines=2)
        _show(figure.add_subplot(place), match.image, f"{number + 1} · {match.score:.3f}\n{words}")
    return figure


def attribute_texts(attributes: Mapping[str, Any]) -> list[str]:
    """What can be said of a product's attributes: name and value of those that are filled in."""
    texts = {name: _short(value) for name, value in attributes.items() if value is not None}
    return [f"{name} {text}" for name, text in texts.items() if text.strip()]


def signed(loss: float) -> str:
    """A difference of scores in three digits, and no -0.000."""
    return f"{round(loss, 3) + 0.0:+.3f}"


def _card(place: int | None, match: "Match", right: bool = False) -> str:
    title = match.title or match.product_id
    side = f"width:{_CARD}px;height:{_CARD}px;object-fit:contain;object-position:left bottom"
    shown = picture(match.image, f"picture of {title}", style=side) if match.image else ""
    score = (
        ""
        if place is None
        else f"<div><b>{place}</b> · {match.score:.3f}{'  <b>✓ right</b>' if right else ''}</div>"
    )
    texts = attribute_texts(match.attributes)
    if len(texts) > _MOST_ATTRIBUTES:
        texts[_MOST_ATTRIBUTES:] = [f"and {len(texts) - _MOST_ATTRIBUTES} more"]
    attributes = escape(" · ".join(texts))
    return (
        f"{shown}{score}<div style='overflow-wrap:anywhere'>{escape(title)}</div>"
        f"<div style='{_SOFT}'>{attributes}</div>"
    )


def _quoted(title: str | None) -> str:
    return f"<p style='margin:6px 0'>“{escape(title)}”</p>" if title else ""


def _half(name: str, alone: float | None, share: float | None) -> str:
    if alone is None:
        return ""
    carries = "" if share is None else f", carries <b>{share:.0%}</b>"
    bar = "" if share is None else _bar(share)
    return (
        f"<div style='margin-top:6px;max-width:420px'>{name} alone {alone:.3f}{carries}{bar}</div>"
    )


def _bar(share: float) -> str:
    """A bar of a length from -1 to 1, in the colour of the text; a hollow one is below zero."""
    fill = "background:currentColor" if share >= 0 else "border:1px solid currentColor"
    return (
        f"<div aria-hidden='true' style='height:6px;width:{abs(share):.1%};min-width:1px;{fill};"
        "box-sizing:border-box;border-radius:2px;opacity:.6;margin:3px 0'></div>"
    )


def _frame(frames: Sequence[bytes], place: int) -> str:
    if place >= len(frames):
        return ""
    style = "width:88px;height:66px;object-fit:contain;object-position:left bottom"
    return picture(frames[place], f"query picture {place + 1} of {len(frames)}", style=style)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return ", ".join(map(_short, value))
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def new_figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """A figure, in inches, that a notebook shows where a cell returns it, and only there."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'mmrec[notebook]'") from None
    # Asking pyplot tells a notebook how figures are shown; closed, it is not shown a second time.
    with plt.ioff():
        figure = plt.figure(figsize=(width, height), layout="constrained")
        plt.close(figure)
    return figure


def _show(axes: Any, jpeg: bytes | None, words: str) -> None:
    from PIL import Image

    axes.axis("off")
    # Titles may hold dollar signs, which are no formulas.
    axes.set_title(words, loc="left", fontsize=8, parse_math=False)
    if jpeg is not None:
        axes.imshow(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        axes.set_anchor("NW")
