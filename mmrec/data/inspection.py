"""What shards hold, in figures: samples, titles, lengths, sizes, links, drops, near duplicates.

The figures come from `samples.parquet`, which data_prep/make_shards.py writes. A folder without one
(of an earlier version, or of foreign tars) is told from its indexes and metas: what these do not say
is left out, and named under `not_recorded`.

Shape letters: N values.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, takewhile
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from mmrec.data.shards import (
    Family,
    ShardReader,
    Split,
    frame_name,
    image_name,
    index_path,
    open_shards,
)
from mmrec.data.storage import Place, is_file, list_files, local_copy, place
from mmrec.errors import UserError
from mmrec.manifest import Manifest, lineage_to_json, read_manifest

ORIGINALS = ("width", "height", "duration", "num_frames")
"""Columns of samples.parquet about the media as they were: no shard holds these."""
TRAINING_LINKS = "training links of a product"
_NEEDED = ("kind", "id", "split", "row", "num_pictures", "num_bytes", "has_title", "num_links")
_MOST_BINS = 12
_WIDE = 30  # largest value over a small one, from which on bins grow by a factor
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What is known of a folder of shards without opening its tars."""

    folder: Place
    manifest: Manifest
    samples: pa.Table
    """A row per sample, with those columns of samples.parquet that are known."""
    dropped: list[dict[str, Any]]
    """Id, kind, reason and detail of what was left out, and the links lost with it: all of it, or the
    manifest's first ones."""

    @property
    def splits(self) -> list[Split]:
        """The splits of contents, then the catalogue."""
        return [*cast("dict[Split, Any]", self.manifest.details["splits"]), "catalog"]

    def of(self, split: Split) -> pa.Table:
        """The samples of a split, by row number."""
        return self.samples.filter(pc.field("split") == split).sort_by("row")

    def has(self, *names: str) -> bool:
        """Whether all these columns are known."""
        return set(names) <= set(self.samples.column_names)

    def open(self, split: Split) -> ShardReader:
        """The samples themselves. Raises `UserError` as `open_shards` does."""
        return open_shards(self.folder, family_of(split), split)


def family_of(split: Split) -> Family:
    """The family that a split belongs to."""
    return "products" if split == "catalog" else "contents"


def read_facts(folder: Place | str) -> ShardFacts:
    """Read what is recorded of the samples of a shards' folder, or take it from the indexes.

    Raises `UserError` for a folder that is not one of shards, or whose records cannot be read.
    """
    folder = place(folder)
    manifest = read_manifest(folder, "shards")
    path = folder / "samples.parquet"
    if is_file(path):
        samples = _read_table(path, _NEEDED)
    else:
        samples = pa.Table.from_pylist(list(_rows_of_indexes(folder, manifest)))
    dropped = read_dropped(folder, manifest)
    return ShardFacts(folder=folder, manifest=manifest, samples=samples, dropped=dropped)


def read_dropped(folder: Place, manifest: Manifest) -> list[dict[str, Any]]:
    """What was left out, from dropped.parquet, or the first ones that the manifest lists."""
    path = folder / "dropped.parquet"
    if not is_file(path):
        return manifest.details.get("dropped", [])
    return _read_table(path, ("id", "kind", "reason", "detail")).to_pylist()


def _read_table(path: Place, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(local_copy(path))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; make the shards anew")
    return table


def _rows_of_indexes(folder: Place, manifest: Manifest) -> Iterator[dict[str, Any]]:
    splits: list[Split] = [*manifest.details["splits"], "catalog"]
    links: Counter[str] = Counter()
    for split in splits:
        reader = open_shards(folder, family_of(split), split)
        if split == "train":
            links.update(product for ids in reader.product_ids for product in ids)
        sizes = _member_sizes(folder, manifest, split)
        shard_of = np.repeat(np.arange(len(reader.shard_sizes)), reader.shard_sizes)
        for row, members in enumerate(sizes):
            ids, pictures = reader.product_ids[row], own_pictures(split, members)
            is_product = split == "catalog"
            yield {
                "kind": "product" if is_product else "content",
                "id": ids[0] if is_product else reader.content_ids[row],
                "split": split,
                "shard": int(shard_of[row]),
                "row": row,
                "num_pictures": len(pictures),
                "num_bytes": sum(members[name] for name in pictures),
                "has_title": reader.meta(row)["title"] is not None,
                "num_links": links[ids[0]] if is_product else len(ids),
            }


def _member_sizes(folder: Place, manifest: Manifest, split: Split) -> Iterator[dict[str, int]]:
    """The size of each member of each sample of a split."""
    for path in find_indexes(folder, manifest, split):
        table = pq.read_table(local_copy(path), columns=["names", "sizes"])
        for names, sizes in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield dict(zip(names, sizes, strict=True))


def find_indexes(folder: Place, manifest: Manifest, split: Split) -> list[Place]:
    """Where the indexes of a split lie; a folder that cannot be listed is one whose manifest lists them."""
    family = family_of(split)
    listed = manifest.details.get("files")
    if listed is None:
        return list_files(folder / family, f"{split}-*.parquet")
    names = [name for name in sorted(listed) if name.startswith(f"{family}/{split}-")]
    return [index_path(folder / name) for name in names]


def own_pictures(split: Split, names: Collection[str]) -> list[str]:
    """The member names of a content's frames, or of a product's images, in order."""
    name_at: Callable[[int], str] = image_name if split == "catalog" else frame_name
    return list(takewhile(names.__contains__, map(name_at, count())))


# Distributions


@dataclass(frozen=True)
class Bin:
    """A stretch of values and how many lie in it."""

    low: float
    high: float
    """The first value that is not in it; of the last bin the largest that is."""
    label: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """One number of every sample of a kind."""

    name: str
    unit: str
    """Empty for plain numbers."""
    values: Float[np.ndarray, " N"]
    """At least one."""
    whole: bool
    """Whether the numbers are whole, and bins are labelled so."""

    def quantiles(self) -> dict[str, float]:
        """The least, the largest, and three between, each a value that occurs."""
        found = np.quantile(self.values, [0, 0.05, 0.5, 0.95, 1], method="inverted_cdf")
        names = ("min", "5%", "median", "95%", "max")
        return {name: float(value) for name, value in zip(names, found, strict=True)}

    def bins(self) -> list[Bin]:
        """At most a dozen or so; they grow by a factor where values differ by orders of magnitude."""
        edges = _edges(self.values, whole=self.whole)
        counts = np.histogram(self.values, edges)[0]
        label = partial(_bin_label, whole=self.whole)
        pairs = zip(edges[:-1], edges[1:], counts, strict=True)
        return [Bin(low, high, label(low, high), int(number)) for low, high, number in pairs]


def distributions(facts: ShardFacts) -> list[Distribution]:
    """Of clips, contents and products: whatever is recorded and has a value."""
    contents = facts.samples.filter(pc.field("kind") == "content")
    products = facts.samples.filter(pc.field("kind") == "product")
    found = [
        _distribution("length of a clip", "s", _positive(contents, "duration")),
        _distribution("shorter side of a content", "px", _shorter_side(contents), whole=True),
        _distribution("shorter side of a product", "px", _shorter_side(products), whole=True),
        _distribution(
            "frames kept of a content", "", _column(contents, "num_pictures"), whole=True
        ),
        _distribution("size of a content's frames", "kB", _column(contents, "num_bytes") / 1000),
        _distribution("size of a product's images", "kB", _column(products, "num_bytes") / 1000),
        _distribution("products of a content", "", _column(contents, "num_links"), whole=True),
        _distribution(
            "training links of a product", "", _column(products, "num_links"), whole=True
        ),
    ]
    return [distribution for distribution in found if distribution is not None]


def _distribution(
    name: str, unit: str, values: Float[np.ndarray, " N"], *, whole: bool = False
) -> Distribution | None:
    return Distribution(name=name, unit=unit, values=values, whole=whole) if len(values) else None


def _column(table: pa.Table, name: str) -> Float[np.ndarray, " N"]:
    if name not in table.column_names:
        return np.zeros(0)
    return table[name].drop_null().to_numpy().astype(np.float64)


def _positive(table: pa.Table, name: str) -> Float[np.ndarray, " N"]:
    values = _column(table, name)
    return values[values > 0]


def _shorter_side(table: pa.Table) -> Float[np.ndarray, " N"]:
    sides = [_positive(table, name) for name in ("width", "height")]
    return np.minimum(*sides) if len(sides[0]) == len(sides[1]) else np.zeros(0)


def _edges(values: Float[np.ndarray, " N"], *, whole: bool) -> list[float]:
    low, high = float(values.min()), float(values.max())
    if whole and high - low < _MOST_BINS:
        return [low + step for step in range(int(high - low) + 2)]
    positive = values[values > 0]
    if low >= 0 and len(positive) and high > _WIDE * np.quantile(positive, 0.05):
        start = float(positive.min())
        return [0.0] * (low == 0) + _growing(max(start, 1.0) if whole else start, high)
    return _even(low, high, least=1.0 if whole else 0.0)


def _growing(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... around the values; only the powers where these would be too many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 5 else (1,)
    # A power more on each side, since logarithms are rounded.
    steps = [f * 10.0**power for power in range(first - 1, last + 2) for f in factors]
    start = max(step for step in steps if step <= low)
    end = min(step for step in steps if step > high)
    return [step for step in steps if start <= step <= end]


def _even(low: float, high: float, *, least: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten around the values."""
    rough = (high - low) / (_MOST_BINS - 2) or abs(low) or 1.0
    power = math.floor(math.log10(rough))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**power >= rough * 0.999)
    step = max(least, factor * 10.0**power)
    edges = [round(math.floor(low / step) * step, max(0, -power))]
    while edges[-1] <= high:
        # Rounded, or 3 steps of 0.1 were above 0.3.
        edges.append(round(edges[-1] + step, max(0, -power)))
    return edges[1:] if edges[1] <= low else edges


def _bin_label(low: float, high: float, *, whole: bool) -> str:
    if not whole:
        # As many decimals as tell one edge from the next.
        decimals = max(0, math.ceil(-math.log10(high - low) - 1e-9))
        return f"{low:,.{decimals}f}\u2013{high:,.{decimals}f}"
    return show(low) if high - low <= 1 else f"{show(low)}\u2013{show(high - 1)}"


def show(value: int | float) -> str:
    """A number with three digits that count, and no exponent."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.6f}"


# Summary


def summarize(facts: ShardFacts) -> dict[str, Any]:
    """The figures of a folder, as JSON can hold them."""
    details, counts = facts.manifest.details, facts.manifest.counts
    held_out = details.get("claims", {}).get("cold_products", {}).get("held_out")
    return {
        "splits": {split: _summarize_split(facts.of(split)) for split in facts.splits},
        "distributions": {d.name: _summarize_values(d) for d in distributions(facts)},
        "resolutions": _resolutions(facts),
        "dropped": counts.get("dropped", {}),
        "images_skipped": counts.get("images_skipped", {}),
        "near_duplicates": _summarize_groups(facts) if facts.has("group") else None,
        "cold_products": {
            "without_training_links": details["cold_products"],
            "held_out": held_out,
        },
        "not_recorded": [
            *([] if facts.has(*ORIGINALS) else ["length and resolution of the originals"]),
            *([] if facts.has("group") else ["near duplicates"]),
            *([] if held_out is not None else ["products held out of training"]),
        ],
    }


def _summarize_split(table: pa.Table) -> dict[str, int]:
    titled, size = (int(table[name].to_numpy().sum()) for name in ("has_title", "num_bytes"))
    return {"samples": len(table), "titles_missing": len(table) - titled, "bytes": size}


def _summarize_values(found: Distribution) -> dict[str, Any]:
    return {
        "unit": found.unit,
        "count": len(found.values),
        **found.quantiles(),
        "histogram": [asdict(part) for part in found.bins()],
    }


def _resolutions(facts: ShardFacts) -> dict[str, dict[str, int]]:
    """The commonest widths and heights."""
    if not facts.has("width", "height"):
        return {}
    found: dict[str, Counter[str]] = {"content": Counter(), "product": Counter()}
    sides = facts.samples.group_by(["kind", "width", "height"]).aggregate([([], "count_all")])
    for row in sides.to_pylist():
        if row["width"]:
            found[row["kind"]][f"{row['width']}x{row['height']}"] += row["count_all"]
    return {f"{kind}s": dict(counter.most_common(5)) for kind, counter in found.items() if counter}


def _summarize_groups(facts: ShardFacts) -> dict[str, int]:
    sizes = Counter(group for group in facts.samples["group"].to_pylist() if group is not None)
    return {
        "groups": len(sizes),
        "contents": sum(sizes.values()),
        "largest": max(sizes.values(), default=0),
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as the command line prints it."""
    lines = ["samples"]
    for split, found in summary["splits"].items():
        kind = "products" if split == "catalog" else "contents"
        share = found["titles_missing"] / max(1, found["samples"])
        lines.append(
            f"    {split:<8}{found['samples']:>10,} {kind}  {found['titles_missing']:,} without a title "
            f"({share:.1%})  {show_bytes(found['bytes'])}"
        )
    for name, found in summary["distributions"].items():
        lines += _distribution_lines(name, found)
    for kind, found in summary["resolutions"].items():
        lines.append(f"commonest resolutions of {kind}: {_listed(found)}")
    for what in ("dropped", "images_skipped"):
        lines.append(f"{what.replace('_', ' ')}: {_listed(summary[what]) or 'none'}")
    alike = summary["near_duplicates"]
    if alike is not None:
        lines.append(
            f"near duplicates: {alike['contents']:,} contents in {alike['groups']:,} groups, the largest of "
            f"{alike['largest']:,}"
        )
    lines.append(f"cold products: {cold_in_words(summary)}")
    if summary["not_recorded"]:
        lines.append(f"not recorded: {'; '.join(summary['not_recorded'])}")
    return "\n".join(lines)


def _distribution_lines(name: str, found: Mapping[str, Any]) -> list[str]:
    names = ("min", "5%", "median", "95%", "max")
    quantiles = ", ".join(f"{quantile} {show(found[quantile])}" for quantile in names)
    unit = f", {found['unit']}" if found["unit"] else ""
    lines = [f"{name}{unit}: {quantiles} (of {found['count']:,})"]
    bins = found["histogram"] if name == TRAINING_LINKS else []
    width = max((len(part["label"]) for part in bins), default=0)
    most = max((part["count"] for part in bins), default=0)
    for part in bins:
        # The least that is there is seen.
        bar = "#" * math.ceil(_BAR * part["count"] / most)
        lines.append(f"    {part['label']:>{width}}  {bar:<{_BAR}} {part['count']:,}")
    return lines


def cold_in_words(summary: Mapping[str, Any]) -> str:
    """What a summary says of products that are not trained."""
    cold = summary["cold_products"]
    text = f"{cold['without_training_links']:,} in no training link"
    return text if not cold["held_out"] else f"{text}; {cold['held_out']:,} held out on purpose"


def show_bytes(size: int | float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{show(size)} {unit}"
        size /= 1000
    return f"{show(size)} TB"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def inspection_to_json(folder: Place | str, parts: Mapping[str, Any]) -> str:
    """The chain of manifests, as `lineage_to_json` has it, with more parts about the folder itself."""
    chain = json.loads(lineage_to_json(folder))
    chain[0] |= parts
    return json.dumps(chain, ensure_ascii=False, default=str)


def first_of_each(
    dropped: Iterable[Mapping[str, Any]], most: int
) -> dict[str, list[dict[str, Any]]]:
    """The first drops of each reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for drop in dropped:
        examples = found.setdefault(drop["reason"], [])
        if len(examples) < most:
            examples.append(dict(drop))
    return found
