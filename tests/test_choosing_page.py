"""The page on choosing: its figures are those of the pages that measured them, its flags are there."""

import re

from conftest import ROOT

PAGE = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
MEASURED = " ".join(
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "train/README.md", "index/README.md", "docs/planning.md")
)


def test_every_measured_figure_is_where_it_was_measured() -> None:
    figures = set(re.findall(r"(?<![\d.])\d+\.\d{2,3}(?!\d)", PAGE)) - {"0.95"}
    assert len(figures) > 15
    assert [figure for figure in figures if figure not in MEASURED] == []


def test_whole_numbers_of_planning_are_its() -> None:
    table = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    for kind, size in (("HNSW32", "1,296"), ("HNSW32_SQ8", "528"), ("IVF{lists},SQ8", "277")):
        assert f"| `{kind}` | {size} |" in table
        assert size in PAGE
    assert "| `HNSW32` | 14.02 TB | 40 |" in table
    assert "| `IVF{lists},SQ8` | 3.83 TB | 11 |" in table
    assert "take 40 of them, or\n  11 as" in PAGE


def test_recipes_and_flags_are_there() -> None:
    program = (ROOT / "train/contrastive.py").read_text(encoding="utf-8")
    for recipe in ("demo", "grocery", "grocery-videos", "vit-b-32"):
        assert f'"{recipe}"' in program
        assert f"`{recipe}`" in PAGE
    sources = program + "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "mmrec").rglob("*.py")
    )
    sources += (ROOT / "data_prep/make_shards.py").read_text(encoding="utf-8")
    for flag in set(re.findall(r"--(?:[a-z]+\.)?([a-z][a-z-]+)", PAGE)):
        assert re.search(rf"\b{flag.replace('-', '_')}\b", sources), flag
