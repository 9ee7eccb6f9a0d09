"""What a query comes back with: Match, Matches, and Why, which says what carried a match."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa

from mmrec.errors import UserError
from mmrec.retrieval.match_gallery import draw_matches, matches_html, signed, why_html
from mmrec.terminal import one_line

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

_MOST_TITLE = 100
"""Characters of a title that a line of text shows."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """One matched product."""

    product_id: str
    """The product's id; in an index of contents the content's."""
    score: float
    """Cosine similarity of query and match, -1 to 1."""
    title: str | None
    attributes: dict[str, Any]
    image: bytes | None = field(default=None, repr=False)
    """The product's first picture as JPEG bytes, where the shards it came from are still there."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Why:
    """What of a query carried one match: its score without each frame, and with each half alone.

    Leave-one-out: the query is embedded again with a part missing, as if that part had never been there,
    and compared with the product again. A loss is the score less what is left without the part; below zero
    the part pulls away from this product. A query of which nothing is left scores 0. Losses do not add up:
    of two equal frames either can be spared.
    """

    product_id: str
    score: float
    """With everything. From the product's vector itself, where a search may have gone by a shorter code."""
    frame_losses: tuple[float, ...] = ()
    """What the score loses without each frame, or picture, in their order."""
    video_alone: float | None = None
    """The score without the title; None where the query has neither frames nor pictures."""
    title_alone: float | None = None
    """The score without frames and pictures; None where the query has no title."""
    match: Match | None = None
    frames: Sequence[bytes] = field(default=(), repr=False)
    """The query's frames or pictures as JPEG bytes, for show."""
    title: str | None = None
    """The query's words."""

    @property
    def video_loss(self) -> float:
        """What the score loses without any frame or picture."""
        return 0.0 if self.video_alone is None else self.score - (self.title_alone or 0.0)

    @property
    def title_loss(self) -> float:
        """What the score loses without the title."""
        return 0.0 if self.title_alone is None else self.score - (self.video_alone or 0.0)

    @property
    def video_share(self) -> float | None:
        """The video's share of the two losses, 0 to 1, a negative one counted as none.

        None where neither is above zero: each alone is at least as near to the product as both together.
        """
        video, title = max(self.video_loss, 0.0), max(self.title_loss, 0.0)
        return video / (video + title) if video + title > 0 else None

    @property
    def title_share(self) -> float | None:
        """The title's share of the two losses; with the video's it makes 1."""
        return None if self.video_share is None else 1 - self.video_share

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone, for JSON."""
        return {
            "product_id": self.product_id,
            "score": self.score,
            "video_alone": self.video_alone,
            "title_alone": self.title_alone,
            "video_share": self.video_share,
            "title_share": self.title_share,
            "frame_losses": list(self.frame_losses),
        }

    def __repr__(self) -> str:
        lines = [f"{one_line(self.product_id)}: score {self.score:.3f}"]
        halves = (
            ("video", self.video_alone, self.video_share),
            ("title", self.title_alone, self.title_share),
        )
        for name, alone, share in halves:
            if alone is not None:
                carries = f", carries {share:.0%}" if share is not None else ""
                lines.append(f"  {name} alone scores {alone:.3f}{carries}")
        for place, loss in enumerate(self.frame_losses, 1):
            lines.append(f"  without frame {place} it loses {signed(loss)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return why_html(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Matches(Sequence[Match]):
    """The products nearest to one query, best first. A notebook shows them as a gallery.

    A sequence of `Match`: `matches[0]` is the best, `len(matches)` at most the k that was asked for.
    """

    matches: list[Match]
    title: str | None = None
    """The query's words."""
    frames: list[bytes] = field(default_factory=list)
    """The query's frames or pictures as JPEG bytes."""
    key: str = "product_id"
    """The name of the id column in tables: content_id where the index is one of contents."""
    schema: pa.Schema | None = field(default=None, compare=False)
    """Types of the attributes, where the index knows them; else they are inferred from what was found."""
    explainer: Callable[[str], Why] | None = field(default=None, compare=False)
    """What `why` asks, by a product's id."""

    @overload
    def __getitem__(self, place: int) -> Match: ...

    @overload
    def __getitem__(self, place: slice) -> list[Match]: ...

    def __getitem__(self, place: Any) -> Any:
        return self.matches[place]

    def __len__(self) -> int:
        return len(self.matches)

    def __iter__(self) -> Iterator[Match]:
        return iter(self.matches)

    def __getstate__(self) -> dict[str, Any]:
        # An explainer holds an encoder and an index, which are not to travel with a table of matches.
        return self.__dict__ | {"explainer": None}

    def why(self, place: int) -> Why:
        """Which frames, and how much the title against the video, carried `matches[place]`.

        Needs no further pass through the towers: what they made of the query was kept. Raises `IndexError`
        past the end, and `UserError` where the product's vector cannot be had, which says why, or where
        these matches did not come from a `Matcher`.
        """
        match = self.matches[place]
        if self.explainer is None:
            raise UserError(
                "these matches have lost their matcher, by pickling or by being made by hand; ask it again"
            )
        found = self.explainer(match.product_id)
        return replace(found, match=match, frames=tuple(self.frames), title=self.title)

    def to_dict(self) -> dict[str, Any]:
        """What `mmrec search --json` prints: no pictures, only what can be read."""
        return {
            "title": self.title,
            "frames": len(self.frames),
            "matches": [
                {name: value for name, value in asdict(match).items() if name != "image"}
                for match in self.matches
            ],
        }

    def to_arrow(self) -> pa.Table:
        """A row a match: place (1 is the best), the id, score, title, and a column an attribute.

        Attributes have the types that the index has, and null where a product has none. One that is called
        like a column of ours is left out.
        """
        rows = self.matches
        columns = {
            "place": pa.array(range(1, len(rows) + 1), pa.int32()),
            self.key: pa.array([match.product_id for match in rows], pa.string()),
            "score": pa.array([match.score for match in rows], pa.float32()),
            "title": pa.array([match.title for match in rows], pa.string()),
        }
        types = {} if self.schema is None else {own.name: own.type for own in self.schema}
        found = dict.fromkeys(name for match in rows for name in match.attributes)
        for name in dict.fromkeys([*types, *found]):
            if name not in columns:
                values = [match.attributes.get(name) for match in rows]
                columns[name] = pa.array(values, types.get(name))
        return pa.table(columns)

    def to_pandas(self) -> "pandas.DataFrame":
        """The same as a data frame; whole numbers and truth values with gaps have pandas' nullable types.

        Needs pandas: `pip install 'mmrec[notebook]'`.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install 'mmrec[notebook]'") from None

        nullable = {
            getattr(pa, name.lower())(): getattr(pandas, f"{name}Dtype")() for name in _WHOLE
        }
        nullable[pa.bool_()] = pandas.BooleanDtype()
        table = self.to_arrow()
        gaps = {
            table.schema.field(name).type for name in table.column_names if table[name].null_count
        }
        return table.to_pandas(
            types_mapper=lambda kind: nullable.get(kind) if kind in gaps else None
        )

    def plot(self, *, columns: int = 5) -> "matplotlib.figure.Figure":
        """The gallery as a matplotlib figure, `columns` products in a row, for a paper or a slide.

        Colours and fonts are those of matplotlib's settings, so a style sheet applies. Needs matplotlib:
        `pip install 'mmrec[notebook]'`.
        """
        return draw_matches(self, columns=columns)

    def __repr__(self) -> str:
        lines = (
            f"{place:3}  {match.score:.3f}  {one_line(match.product_id)}  "
            f"{one_line(match.title or '', most=_MOST_TITLE)}".rstrip()
            for place, match in enumerate(self.matches, 1)
        )
        return "\n".join(lines) or "no matches"

    def _repr_html_(self) -> str:
        return matches_html(self)


_WHOLE = ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
