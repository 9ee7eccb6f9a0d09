"""The contact sheet: a page that is well formed, self-contained, and shows what it says."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_shards import make_small_shards

from mmrec import cli
from mmrec.data.contact_sheet import render_contact_sheet, write_contact_sheet
from mmrec.data.inspection import read_facts
from mmrec.data.shards import index_path, open_shards
from mmrec.errors import UserError

VOID = {"meta", "img", "rect", "line", "br"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and gathers what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def images(self) -> list[str]:
        return [str(found["src"]) for tag, found in self.attributes if tag == "img"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return make_small_shards(folder, samples_per_shard=3, cold_products=0.3, val=0.0, test=0.15)


@pytest.fixture(scope="module")
def page(shards: Path) -> Page:
    return Page(render_contact_sheet(read_facts(shards), num_samples=20))


def test_the_page_asks_nothing_of_any_host(page):
    tags = {tag for tag, _ in page.attributes}
    assert tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.images())
    links = [found["href"] for tag, found in page.attributes if tag == "a"]
    ids = {found.get("id") for _, found in page.attributes}
    assert links
    assert {str(link).removeprefix("#") for link in links} <= ids


def test_every_sample_is_shown(shards, page):
    text = page.text()
    for split in ("train", "test"):
        reader = open_shards(shards, "contents", split)
        for row, content_id in enumerate(reader.content_ids):
            assert f"{content_id};" in text
            for time in reader.meta(row)["frame_times"]:
                assert f"{time:.2f} s" in text
    assert "p3, weight 0.5" in text
    assert "Product <3>" in text  # escaped in the page, or the parser would take it for a tag
    assert "5 of 5 products, drawn by chance." in text
    assert "held out p3;" in text
    assert "no title" in text
    # Frames and linked products of 12 contents, images of 5 products, and 3 near duplicates.
    frames = [4] * 11 + [2]
    assert len(page.images()) == sum(frames) + 13 + 5 + 3


def test_the_figures(page):
    text = page.text()
    spoken = [str(found["aria-label"]) for tag, found in page.attributes if tag == "svg"]
    assert "0: 3; 1: 0; 2: 1; 3: 1" in spoken  # training links of a product
    assert "train: 20.0%; test: 0.0%; catalog: 20.0%" in spoken
    for heading in ("Length of a clip, s", "Size of a content's frames, kB", "Shorter side"):
        assert heading in text
    assert "3 contents, 3 in test" in text
    assert re.search(r"not a video or image sample 1 c7 \S+c7\.mp4", text)
    assert re.search(r"cannot open image image 1 p4", text)


def test_pictures_are_small_and_those_of_the_shards(shards, page):
    for source in page.images():
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
            assert image.size[0] <= 240
            assert image.size[1] <= 168


def test_samples_are_drawn_by_a_seed(shards):
    facts = read_facts(shards)
    pages = [render_contact_sheet(facts, num_samples=2, seed=seed) for seed in (0, 0, 1)]
    assert pages[0] == pages[1] != pages[2]
    assert Page(pages[0]).text().count("drawn by chance") == 3
    assert "2 of 7 contents" in Page(pages[0]).text()
    without = Page(render_contact_sheet(facts, num_samples=0))
    assert without.images() == []
    assert "Length of a clip, s" in without.text()


def test_shards_without_facts(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    (folder / "samples.parquet").unlink()
    page = Page(render_contact_sheet(read_facts(folder)))
    assert "Not recorded in these shards: length and resolution of the originals" in page.text()
    assert "Near duplicates" not in page.text()
    assert "c1;" in page.text()


def test_a_picture_that_does_not_decode_is_told(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    tar = folder / "contents/train-000000.tar"
    index = pq.read_table(index_path(tar)).to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[index["offsets"][index["names"].index("f00.jpg")]] ^= 0xFF
    tar.write_bytes(bytes(data))
    page = Page(render_contact_sheet(read_facts(folder), num_samples=20))
    assert page.text().count("does not decode") == 1


def test_text_from_outside_is_escaped(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "<b>shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["tables"] = "<script>x</script>"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    page = Page(render_contact_sheet(read_facts(folder)))
    assert "script" not in {tag for tag, _ in page.attributes}
    assert "<script>x</script>" in page.text()


def test_the_command_writes_it(shards, tmp_path, capsys):
    out = tmp_path / "new" / "sheet.html"
    cli.inspect(shards, report=out, num_samples=1)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert f"contact sheet: {out}" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a folder; expected a file"):
        write_contact_sheet(shards, tmp_path)
    with pytest.raises(UserError, match="--num-samples -1: expected 0 or more"):
        write_contact_sheet(shards, out, num_samples=-1)
