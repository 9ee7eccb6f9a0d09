"""Queries and what they found, in pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from mmrec.retrieval.match_gallery import attribute_texts
from mmrec.retrieval.report.page import heading, note

# Of a picture in the page: wide enough for a sharp screen, so that a page stays within some megabytes.
_LONGEST_SIDE = 176
_MOST_FRAMES = 4
_MOST_ATTRIBUTES = 3
_QUALITY = 80
_CHOICE = {
    "all over": "evenly spaced over the split, not chosen by how well they went.",
    "best": "a right product comes first, by the largest margin: its score less that of the best wrong one.",
    "worst": "the best right product stands last; of equal ranks, by how far it is behind.",
}


@dataclass(frozen=True, kw_only=True)
class MatchedProduct:
    """One product that a query found."""

    product_id: str
    title: str | None
    score: float
    """Inner product with the query."""
    image: bytes
    """A JPEG."""
    right: bool
    """Whether the query's content links to it."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the product; the first three that are filled in are shown."""


@dataclass(frozen=True, kw_only=True)
class QueryCard:
    """One query and what it found, best first."""

    content_id: str
    title: str | None
    """None when the content has no title, or was asked for without it."""
    frames: Sequence[bytes]
    """JPEGs in the order of time."""
    slice: str
    """"warm" when a right product has training links, "cold" when none has."""
    right_titles: Sequence[str]
    """Titles of all the right products, shown when the query missed them."""
    matches: Sequence[MatchedProduct]
    rank: int | None = None
    """Of the best right product among the whole catalogue."""
    margin: float | None = None
    """Score of the best right product less that of the best wrong one."""


def gallery(galleries: Mapping[str, Sequence[QueryCard]]) -> str:
    """Galleries one after another, each with how its queries were chosen.

    Pictures are made small, and the page says how many there are and what they weigh.
    """
    galleries = {name: cards for name, cards in galleries.items() if cards}
    if not galleries:
        return ""
    links = "".join(
        f'<li><a href="#{_anchor(name)}">{heading(name)}: {len(cards)}</a></li>'
        for name, cards in galleries.items()
    )
    parts = [_part(name, cards) for name, cards in galleries.items()]
    sizes = [len(data) for part in parts for data in part.split("data:image/jpeg;base64,")[1:]]
    told = (
        f"{len(sizes):,} pictures of at most {_LONGEST_SIDE} pixels, in a page of about "
        f"{sum(map(len, parts)) / 1e6:.1f} MB. Under each product: its place and its score."
    )
    return f'{note(told)}<ul class="jumps">{links}</ul>' + "".join(parts)


def _anchor(name: str) -> str:
    return "matches-" + name.replace(" ", "-")


def _part(name: str, cards: Sequence[QueryCard]) -> str:
    shown = max(len(card.matches) for card in cards)
    found = sum(any(match.right for match in card.matches) for card in cards)
    anchor = _anchor(name)
    words = (
        f"{len(cards)} queries: {_CHOICE[name]} Each has its first {shown} products; with a right one among "
        f"these: {found}."
    )
    return (
        f'<div class="part" role="group" aria-labelledby="{anchor}"><h3 id="{anchor}">'
        f"{heading(name)}</h3>{note(words)}{''.join(map(_card, cards))}</div>"
    )


def _card(card: QueryCard) -> str:
    content = escape(card.content_id)
    total = len(card.frames)
    frames = "".join(
        f'<li><img src="{_data_uri(frame)}" alt="Frame {place} of {total}"></li>'
        for place, frame in spread_frames(card.frames, _MOST_FRAMES)
    )
    tiles = "".join(_product_tile(place, match) for place, match in enumerate(card.matches, 1))
    title = escape(card.title) if card.title else "<em>no title</em>"
    return (
        f'<article class="card"><div class="query"><h4>{title}</h4>'
        f'<p><span class="tag">{escape(card.slice)}</span> <small>{content}</small></p>'
        f'<ul class="frames">{frames}</ul>{_verdict(card)}</div>'
        f'<div class="arrow" aria-hidden="true"></div><ol class="matches">{tiles}</ol></article>'
    )


def spread_frames(frames: Sequence[bytes], count: int) -> list[tuple[int, bytes]]:
    """At most `count` of the frames, evenly spread over the video, each with its number from 1."""
    numbered = list(enumerate(frames, 1))
    if len(frames) <= count:
        return numbered
    return [numbered[int((place + 0.5) * len(frames) / count)] for place in range(count)]


def _verdict(card: QueryCard) -> str:
    places = [place for place, match in enumerate(card.matches, 1) if match.right]
    margin = "" if card.margin is None else f", margin {card.margin:+.3f}"
    if places:
        listed = ", ".join(map(str, places))
        return f'<p class="verdict right">\u2713 Right at place {listed}<small>{margin}</small></p>'
    missed = ", ".join(escape(title) for title in card.right_titles) or "a product without a title"
    rank = "" if card.rank is None else f", found at place {card.rank:,}"
    return (
        f'<p class="verdict wrong">\u2717 Missed in the first {len(card.matches)}'
        f"<small>{rank}{margin}</small></p>"
        f'<p class="sought">Right would be: {missed}</p>'
    )


def _product_tile(place: int, match: MatchedProduct) -> str:
    title = escape(match.title) if match.title else "<em>no title</em>"
    kind, sign = ("right", "\u2713 right") if match.right else ("wrong", "\u2717 wrong")
    texts = attribute_texts(match.attributes)[:_MOST_ATTRIBUTES]
    attributes = "".join(f"<span>{escape(text)}</span>" for text in texts)
    return (
        f'<li class="{kind}"><div class="photo"><img src="{_data_uri(match.image)}" '
        f'alt="{escape(match.title or match.product_id)}">'
        f'<span class="badge">{sign}</span></div>'
        f'<p class="score"><span><span class="spoken">place </span>{place}</span>'
        f'<span><span class="spoken">score </span>{match.score:.3f}</span></p>'
        f'<p class="name">{title}</p>'
        + (f'<p class="attributes">{attributes}</p>' if attributes else "")
        + "</li>"
    )


def _data_uri(picture: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(_small(picture)).decode("ascii")


def _small(picture: bytes) -> bytes:
    """A JPEG of at most `_LONGEST_SIDE` pixels; one that is that small already stays as it is.

    What cannot be decoded, which tars that others wrote may hold, becomes a grey square.
    """
    try:
        image = Image.open(io.BytesIO(picture))
        if image.format == "JPEG" and max(image.size) <= _LONGEST_SIDE:
            return picture
        image = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        image = Image.new("RGB", (32, 32), (235, 235, 235))
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
