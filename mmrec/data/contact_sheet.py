"""The contact sheet of a shards' folder: one HTML page with its figures, and samples to look at.

Like the report of an evaluation the page holds its style, charts and pictures inline, asks nothing of
any host and needs no script. Every text that comes from outside is escaped.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from mmrec.data.inspection import (
    Distribution,
    ShardFacts,
    cold_in_words,
    distributions,
    first_of_each,
    own_pictures,
    read_facts,
    show,
    show_bytes,
    summarize,
)
from mmrec.data.shards import ShardReader, Split, product_image_name
from mmrec.data.storage import Place
from mmrec.errors import UserError
from mmrec.manifest import write_whole
from mmrec.page import page

_MOST_FRAMES = 8  # of a content, evenly chosen
_MOST_PRODUCTS = 4  # of a content, the heaviest
_MOST_GROUPS = 4
_MOST_ALIKE = 6  # of a group
_MOST_EXAMPLES = 3  # of a reason
_THUMBNAIL = (240, 168)  # px
_WIDTH, _HEIGHT = 360, 190  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 16, 16, 18, 30
_MOST_TICKS = 7
_MOST_WIDE = 56  # px, of a bar


def write_contact_sheet(
    folder: Place | str, path: Path | str, *, num_samples: int = 6, seed: int = 0
) -> None:
    """Render the contact sheet of a shards' folder into a file; its folder is made if it is missing.

    Raises `UserError` as `read_facts` and `render_contact_sheet` do, and for a path that is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--report {path}: is a folder; expected a file, such as sheet.html")
    if num_samples < 0:
        raise UserError(f"--num-samples {num_samples}: expected 0 or more")
    sheet = render_contact_sheet(read_facts(folder), num_samples=num_samples, seed=seed)
    write_whole(path, sheet)


def render_contact_sheet(facts: ShardFacts, *, num_samples: int = 6, seed: int = 0) -> str:
    """The whole page as text, to be written as UTF-8.

    `num_samples` of each split are drawn by `seed`. Parts without data are left out, and what is not
    recorded is named. Raises `UserError` where samples cannot be read; a picture that does not decode is
    shown as such.
    """
    summary = summarize(facts)
    readers: dict[Split, ShardReader] = {}
    if num_samples:
        readers |= {split: facts.open(split) for split in facts.splits}
    parts = {
        "Figures": _figures(facts, summary),
        "Left out": _left_out(facts, summary),
        "Near duplicates": _groups(facts, readers),
        **{
            f"Samples: {split}": _samples(facts, split, reader, num_samples, seed)
            for split, reader in readers.items()
        },
        "How it was made": _making(facts),
    }
    return page(f"Contact sheet of {facts.folder}", _tiles(summary), parts, _STYLE)


# Figures


def _tiles(summary: Mapping[str, Any]) -> str:
    contents = [found for split, found in summary["splits"].items() if split != "catalog"]
    number = sum(found["samples"] for found in contents)
    missing = sum(found["titles_missing"] for found in contents)
    dropped = sum(summary["dropped"].values())
    tiles = [
        ("contents", f"{number:,}", f"in {len(contents)} splits"),
        ("products", f"{summary['splits']['catalog']['samples']:,}", cold_in_words(summary)),
        ("titles missing", f"{missing / max(1, number):.1%}", f"{missing:,} contents"),
        ("left out", f"{dropped:,}", "contents and products"),
    ]
    items = "".join(
        f"<li><span>{label}</span><b>{value}</b><small>{escape(note)}</small></li>"
        for label, value, note in tiles
    )
    return f'<ul class="tiles">{items}</ul>'


def _figures(facts: ShardFacts, summary: Mapping[str, Any]) -> str:
    """Tables of splits and quantiles, and a histogram of every distribution."""
    found = distributions(facts)
    charts = [_histogram(distribution) for distribution in found]
    notes = [
        f"Commonest resolutions of {kind}: {escape(_counted(sizes))}."
        for kind, sizes in summary["resolutions"].items()
    ]
    if summary["not_recorded"]:
        notes.append(f"Not recorded in these shards: {escape('; '.join(summary['not_recorded']))}.")
    return (
        _split_table(summary)
        + _quantile_table(found)
        + "".join(f'<p class="note">{note}</p>' for note in notes)
        + f'<div class="charts">{"".join(charts)}{_title_chart(summary)}</div>'
    )


def _split_table(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            split,
            f"{found['samples']:,}",
            f"{found['titles_missing']:,}",
            f"{found['titles_missing'] / max(1, found['samples']):.1%}",
            show_bytes(found["bytes"]),
            show_bytes(found["bytes"] / max(1, found["samples"])),
        ]
        for split, found in summary["splits"].items()
    ]
    return _table(["Split", "Samples", "No title", "Share", "Own pictures", "A sample"], rows)


def _quantile_table(found: Sequence[Distribution]) -> str:
    names = ["min", "5%", "median", "95%", "max"]
    rows = [
        [_named(part), *(show(part.quantiles()[name]) for name in names), f"{len(part.values):,}"]
        for part in found
    ]
    return _table(["Figure", *names, "Of"], rows)


def _named(distribution: Distribution) -> str:
    unit = f", {distribution.unit}" if distribution.unit else ""
    return f"{distribution.name}{unit}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text: the first cell of each names it."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{escape(head[0])}" tabindex="0">{table}</div>'


def _histogram(distribution: Distribution) -> str:
    bins = distribution.bins()
    labels = [part.label.split("\u2013")[0] for part in bins]
    spoken = "; ".join(f"{part.label}: {part.count:,}" for part in bins)
    name = _named(distribution)
    stretches = any("\u2013" in part.label for part in bins)
    return _chart(
        escape(name[0].upper() + name[1:]),
        labels,
        [part.count for part in bins],
        spoken,
        middle=not stretches,
    )


def _title_chart(summary: Mapping[str, Any]) -> str:
    """Titles missing in each split, in percent of its samples."""
    found = summary["splits"]
    shares = [100 * part["titles_missing"] / max(1, part["samples"]) for part in found.values()]
    spoken = "; ".join(f"{s}: {share:.1f}%" for s, share in zip(found, shares, strict=True))
    return _chart("Titles missing, % of each split", list(found), shares, spoken, middle=True)


def _chart(
    caption: str,
    labels: Sequence[str],
    heights: Sequence[int | float],
    spoken: str,
    *,
    middle: bool = False,
) -> str:
    """Bars as an SVG, a label at each left edge or, where bars stand for themselves, at each middle."""
    step = (_WIDTH - _LEFT - _RIGHT) / len(heights)
    bottom, top = _HEIGHT - _BOTTOM, max([*heights, 1e-9])
    every = -(-len(labels) // _MOST_TICKS)
    parts = []
    for number, (label, height) in enumerate(zip(labels, heights, strict=True)):
        left = _LEFT + number * step
        tall = height / top * (bottom - _TOP)
        # Bars that stand for themselves need not touch, and few of them not be fat.
        width = min(step - 2, _MOST_WIDE) if middle else step - 2
        parts.append(
            f'<rect x="{left + (step - width) / 2:.1f}" y="{bottom - tall:.1f}" '
            f'width="{width:.1f}" height="{tall:.1f}"/>'
        )
        if height and len(heights) <= 14:
            parts.append(_text(left + step / 2, bottom - tall - 4, show(round(height, 1)), "count"))
        if number % every == 0:
            at = left + step / 2 if middle else left
            parts.append(_text(at, bottom + 16, label, "tick"))
    axis = f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(parts)}{axis}</svg></figure>"
    )


def _text(x: int | float, y: int | float, text: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({number:,})" for name, number in counts.items())


# What was left out


def _left_out(facts: ShardFacts, summary: Mapping[str, Any]) -> str:
    """Reasons with counts and a few examples."""
    examples = first_of_each(facts.dropped, _MOST_EXAMPLES)
    rows = []
    for what, kind in (("dropped", "sample"), ("images_skipped", "image")):
        for reason, number in summary[what].items():
            # The same reason may drop a sample, and one image of another sample.
            told = [
                d for d in examples.get(reason, []) if (d["kind"] == "image") == (kind == "image")
            ]
            rows.append(_reason_row(reason, kind, number, told))
    if not rows:
        return '<p class="note">Nothing was left out.</p>'
    head = "".join(f'<th scope="col">{h}</th>' for h in ("Reason", "What", "Number", "For example"))
    return (
        '<div class="scroll" role="region" aria-label="Left out" tabindex="0"><table class="reasons">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _reason_row(reason: str, kind: str, number: int, told: Sequence[Mapping[str, str]]) -> str:
    lines = "".join(
        f"<li><b>{escape(drop['id'])}</b> {escape(drop['detail'] or '')}</li>" for drop in told
    )
    return (
        f'<tr><th scope="row">{escape(reason)}</th><td>{kind}</td><td>{number:,}</td>'
        f"<td><ul>{lines}</ul></td></tr>"
    )


# Near duplicates


def _groups(facts: ShardFacts, readers: Mapping[Split, ShardReader]) -> str:
    """The largest groups, a picture of each content side by side."""
    if not facts.has("group") or not readers:
        return ""
    rows = facts.samples.filter(pc.field("group").is_valid()).to_pylist()
    if not rows:
        return '<p class="note">No two contents look alike.</p>'
    sizes = Counter(row["group"] for row in rows)
    shown = []
    for group, size in sizes.most_common(_MOST_GROUPS):
        members = [row for row in rows if row["group"] == group]
        cells = "".join(_alike_cell(row, readers) for row in members[:_MOST_ALIKE])
        splits = ", ".join(f"{n:,} in {s}" for s, n in Counter(r["split"] for r in members).items())
        shown.append(f"<h3>{size:,} contents, {escape(splits)}</h3><ul class='alike'>{cells}</ul>")
    note = f"{sizes.total():,} contents in {len(sizes):,} groups; the largest are shown."
    return f'<p class="note">{note}</p>{"".join(shown)}'


def _alike_cell(row: Mapping[str, Any], readers: Mapping[Split, ShardReader]) -> str:
    reader: ShardReader = readers[row["split"]]
    names = own_pictures(row["split"], set(reader.names(row["row"])))
    name = names[len(names) // 2]
    picture = _picture(reader.read(row["row"], [name])[name], f"Frame of {row['id']}")
    title = _title(reader.meta(row["row"])["title"])
    return (
        f"<li>{picture}{_tag(row['split'])} <small>{escape(row['id'])}</small><p>{title}</p></li>"
    )


# Samples


def _samples(
    facts: ShardFacts, split: Split, reader: ShardReader, num_samples: int, seed: int
) -> str:
    """Some samples of a split, drawn without replacement, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(reader))[:num_samples]
    numbers = sorted(int(number) for number in chosen)
    rows = facts.of(split).take(numbers).to_pylist()
    card = _product_card if split == "catalog" else _content_card
    cards = "".join(card(reader, number, row) for number, row in zip(numbers, rows, strict=True))
    kind = "products" if split == "catalog" else "contents"
    note = f'<p class="note">{len(numbers):,} of {len(reader):,} {kind}, drawn by chance.</p>'
    return f'{note}<div class="{kind}">{cards}</div>'


def _content_card(reader: ShardReader, number: int, row: Mapping[str, Any]) -> str:
    meta, members = reader.meta(number), reader.read(number)
    names = own_pictures("train", members)
    times = meta.get("frame_times") or []
    shown = [i * len(names) // _MOST_FRAMES for i in range(_MOST_FRAMES)]
    if len(names) <= _MOST_FRAMES:
        shown = list(range(len(names)))
    frames = "".join(
        f"<li>{_picture(members[names[t]], f'Frame {t + 1}')}"
        f"<small>{f'{times[t]:.2f} s' if t < len(times) else t + 1}</small></li>"
        for t in shown
    )
    products = "".join(
        _linked_product(members, p, product)
        for p, product in enumerate(meta["products"][:_MOST_PRODUCTS])
    )
    more = len(meta["products"]) - _MOST_PRODUCTS
    return (
        f'<article class="card"><div><h3>{_title(meta.get("title"))}</h3>'
        f"<p>{_tag(row['split'])} <small>{escape(str(row['id']))}; {escape(_about(row))}</small></p>"
        f'<ul class="frames">{frames}</ul></div><ul class="links">{products}</ul>'
        + (f'<p class="note">and {more} more products</p>' if more > 0 else "")
        + "</article>"
    )


def _linked_product(members: Mapping[str, bytes], p: int, product: Mapping[str, Any]) -> str:
    name = product_image_name(p, 0)
    picture = (
        _picture(members[name], str(product["product_id"]))
        if name in members
        else '<span class="none">no image inline</span>'
    )
    weight = show(float(product.get("weight", 1.0)))
    return (
        f"<li>{picture}<small>{escape(product['product_id'])}, weight {weight}</small>"
        f"<p>{_title(product.get('title'))}</p></li>"
    )


def _product_card(reader: ShardReader, number: int, row: Mapping[str, Any]) -> str:
    meta = reader.meta(number)
    names = own_pictures("catalog", set(reader.names(number)))
    members = reader.read(number, names)
    pictures = "".join(f"<li>{_picture(members[name], name)}</li>" for name in names)
    filled = [(k, v) for k, v in meta.get("attributes", {}).items() if v not in (None, "")]
    attributes = "; ".join(f"{key} {value}" for key, value in filled[:3])
    links = f"{row['num_links']:,} training links"
    cold = _tag("held out") if row.get("cold") else ""
    return (
        f'<article class="product"><ul class="images">{pictures}</ul>'
        f"<h3>{_title(meta.get('title'))}</h3><p>{cold} <small>{escape(str(row['id']))}; "
        f"{escape(_about(row))}; {links}</small></p><p><small>{escape(attributes)}</small></p></article>"
    )


def _about(row: Mapping[str, Any]) -> str:
    """Size, length and resolution, as far as they are recorded."""
    parts = []
    if row.get("duration"):
        parts.append(f"{show(row['duration'])} s")
    if row.get("width"):
        parts.append(f"{row['width']}x{row['height']}")
    parts.append(f"{row['num_pictures']} pictures, {show_bytes(row['num_bytes'])}")
    return ", ".join(parts)


def _title(title: str | None) -> str:
    return escape(title) if title else "<em>no title</em>"


def _tag(text: str) -> str:
    return f'<span class="tag">{escape(text)}</span>'


def _picture(data: bytes, words: str) -> str:
    """A picture reduced to what a card shows, or a note in its place."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", _THUMBNAIL)
            small = image.convert("RGB")
            small.thumbnail(_THUMBNAIL)
    except Exception:  # a decoder may raise anything on damaged bytes
        return '<span class="none">does not decode</span>'
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    text = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{text}" alt="{escape(words)}">'


# How it was made


def _making(facts: ShardFacts) -> str:
    manifest = facts.manifest
    parents = ", ".join(f"{parent.kind} {parent.fingerprint}" for parent in manifest.parents)
    settings = "\n".join(f"{name} = {value}" for name, value in manifest.config.items())
    rows = {
        "folder": str(facts.folder),
        "fingerprint": manifest.fingerprint,
        "made from": parents or "foreign tars",
        "mmrec": manifest.mmrec_version,
        "settings": settings,
    }
    listed = "".join(f"<div><dt>{n}</dt><dd>{escape(v)}</dd></div>" for n, v in rows.items())
    return f'<dl class="facts">{listed}</dl>'


_STYLE = """
:root { --paper: #ffffff; --panel: #f5f6f8; --ink: #16181d; --soft: #5b6270; --line: #dfe2e8;
  --accent: #2456c7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #111317; --panel: #1a1d23; --ink: #e9ebef; --soft: #a0a7b4; --line: #2d323b;
    --accent: #86abff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 44px 24px 72px; max-width: 1168px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; }
h1, h2, h3, p, ul, dl, dd, figure { margin: 0; padding: 0; }
ul { list-style: none; }
h1 { font-size: 30px; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin-bottom: 14px; }
h3 { font-size: 15px; font-weight: 650; line-height: 1.35; overflow-wrap: anywhere; }
section { margin-top: 52px; scroll-margin-top: 16px; }
small, .note, em { color: var(--soft); font-size: 13px; }
em { font-weight: 400; }
.note { margin: 6px 0 12px; }
a { color: var(--accent); }
nav ul { display: flex; flex-wrap: wrap; gap: 6px 20px; margin-top: 22px; font-size: 14px; }
.skip { position: absolute; left: -999px; top: 8px; }
.skip:focus { left: 8px; padding: 4px 10px; background: var(--paper); z-index: 1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin-top: 24px; }
.tiles li { padding: 14px 16px; border-radius: 10px; background: var(--panel); }
.tiles span { display: block; font-size: 13px; color: var(--soft); }
.tiles b { display: block; font-size: 30px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-bottom: 24px; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; vertical-align: top;
  font-weight: 400; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-size: 13px; border-color: var(--ink); }
.reasons td:last-child, .reasons th:last-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; font-size: 13px; color: var(--soft); }
.reasons b { color: var(--ink); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  gap: 22px 26px; }
figcaption { font-weight: 650; font-size: 14px; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg rect { fill: var(--accent); }
svg line { stroke: var(--soft); }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; object-fit: contain; border-radius: 4px; background: var(--panel); }
.none { display: grid; place-items: center; min-height: 72px; border: 1px dashed var(--line);
  border-radius: 4px; color: var(--soft); font-size: 12px; text-align: center; }
.tag { padding: 0 8px; border: 1px solid var(--line); border-radius: 99px; color: var(--soft);
  font-size: 12px; }
.card { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 3fr); gap: 8px 24px;
  padding: 18px 0; border-top: 1px solid var(--line); break-inside: avoid; }
.frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px 6px; margin-top: 10px; }
.frames img, .links img, .alike img { aspect-ratio: 4 / 3; }
.links { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
  gap: 12px; align-content: start; }
.links p, .alike p { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.links img { background: #ffffff; border: 1px solid var(--line); }
.alike { display: grid; grid-template-columns: repeat(6, 1fr); gap: 10px; margin: 8px 0 22px; }
.alike small { overflow-wrap: anywhere; }
.products { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr));
  gap: 22px 20px; }
.images { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; margin-bottom: 8px; }
.images img { aspect-ratio: 1; background: #ffffff;
  border: 1px solid var(--line); }
.images li:first-child { grid-column: 1 / -1; }
.images li:first-child img { aspect-ratio: 4 / 3; }
.facts div { display: grid; grid-template-columns: 10em minmax(0, 1fr); gap: 4px 16px;
  padding: 8px 0; border-top: 1px solid var(--line); }
.facts dt { color: var(--soft); }
.facts dd { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, "SF Mono",
  Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 760px) {
  body { padding: 26px 16px 48px; }
  .card { grid-template-columns: minmax(0, 1fr); }
  .alike { grid-template-columns: repeat(3, 1fr); }
}
"""
