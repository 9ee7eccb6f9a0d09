"""An index that changes while it serves: products put and deleted, generations and encoders swapped."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from serving import Served, reason_of, service_on

from mmrec import Encoder, Matcher, ProductIndex
from mmrec.data.media import read_image as pixels
from mmrec.errors import UserError
from mmrec.manifest import Parent, relative_path
from mmrec.model.encoder import EncoderConfig


@pytest.fixture
def own_index(index: Path) -> Iterator[Path]:
    """A copy beside the original, so that the way to its encoder is the same."""
    copy = index.parent / "own-index"
    shutil.copytree(index, copy)
    yield copy
    shutil.rmtree(copy)


def wait_until(true: Callable[[], bool]) -> None:
    """Return once something holds, which it must within a while."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def build_with(encoder: Path, out: Path, ids: list[str]) -> str:
    """An index of random vectors that names an encoder; returns the encoder's fingerprint."""
    loaded = Encoder.load(encoder)
    assert loaded.fingerprint
    vectors = np.random.default_rng(len(ids)).standard_normal((len(ids), loaded.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    parent = Parent(
        kind="encoder", fingerprint=loaded.fingerprint, path=relative_path(out, encoder)
    )
    ProductIndex.build(ids, vectors).save(out, parents=[parent], overwrite=True)
    return loaded.fingerprint


def test_products_are_put_and_deleted(own_index: Path) -> None:
    with service_on(own_index, writable=True, watch_s=0.1) as served:
        before = served.http.get("/v1/readyz").json()["products"]
        new = {
            "product_id": "a/new <one>",
            "title": "<script>alert(1)</script>",
            "attributes": {"price": 1, "shape": "mug"},
        }
        answer = served.http.put("/v1/products", json=new)
        assert answer.json() == {
            "product_id": new["product_id"],
            "created": True,
            "products": before + 1,
        }
        again = served.http.put(
            "/v1/products",
            files=[
                (name, (None, value))
                for name, value in (("product_id", "a/new <one>"), ("title", "x"))
            ],
        )
        assert again.json()["created"] is False
        assert served.http.put("/v1/products", json=new).status_code == 200
        best = served.match(text=new["title"], where="price = 1")["matches"][0]
        expected = Matcher.load(own_index, device="cpu")
        assert best["product_id"] == new["product_id"]
        vector = expected.embed([], new["title"], side="product")
        assert expected.index.vectors([new["product_id"]])[0] == pytest.approx(vector, abs=1e-5)
        product = served.http.get("/v1/products/a%2Fnew%20%3Cone%3E").json()
        assert product["attributes"]["price"] == 1.0
        assert product["attributes"]["colour"] is None
        assert product["image"] is None
        for wrong in (
            {"product_id": "x"},
            {"title": "x"},
            {"product_id": "x", "title": "y", "attributes": {"no column": 1}},
            {"product_id": "x", "title": "y", "attributes": {"price": "cheap"}},
            {"product_id": "x", "title": "y", "attributes": {"price": "nan"}},
            {"product_id": "x", "title": "y", "attributes": {"price": "-inf"}},
            {"product_id": "x", "title": "y", "attributes": {"price": True}},
            {"product_id": "x", "title": "y", "attributes": [1]},
        ):
            assert reason_of(served.http.put("/v1/products", json=wrong), 422)
        for attributes in ('{"price": 1e999}', '{"price": 1, "price": 2}'):
            text = f'{{"product_id": "x", "title": "y", "attributes": {attributes}}}'
            headers = {"Content-Type": "application/json"}
            put = served.http.put("/v1/products", content=text, headers=headers)
            assert "price" in reason_of(put, 422)
            parts = {"product_id": "x", "title": "y", "attributes": attributes}
            files = [(name, (None, value)) for name, value in parts.items()]
            assert "price" in reason_of(served.http.put("/v1/products", files=files), 422)
        gone = served.http.delete("/v1/products/a%2Fnew%20%3Cone%3E").json()
        assert gone == {"product_id": new["product_id"], "deleted": True, "products": before}
        assert served.http.delete("/v1/products/none").json()["deleted"] is False
        assert reason_of(served.http.get("/v1/products/a%2Fnew%20%3Cone%3E"), 404)
        # It does not stay the index's writer: another may change it, and is seen.
        with ProductIndex.load(own_index, device="cpu") as writer:
            writer.delete(writer.ids[:1])
            busy = served.http.delete(f"/v1/products/{writer.ids[0]}")
            assert "another process" in reason_of(busy, 409)
        wait_until(lambda: served.http.get("/v1/readyz").json()["products"] == before - 1)


def test_an_id_may_end_in_what_a_route_ends_in(own_index: Path) -> None:
    with service_on(own_index, writable=True) as served:
        for id_ in ("x", "x/image", "images/x", "x/", "a?b#c%20"):
            put = served.http.put("/v1/products", json={"product_id": id_, "title": "y"})
            assert put.status_code == 200
        for id_ in ("x/image", "x", "images/x", "x/", "a?b#c%20"):
            address = f"/v1/products/{quote(id_, safe='')}"
            assert served.http.get(address).json()["product_id"] == id_
            assert served.http.delete(address).json() | {"products": 0} == {
                "product_id": id_,
                "deleted": True,
                "products": 0,
            }
        for id_ in (".", "..", "/", "./..", "x\n", "x\u202ey", "x\u2028"):
            put = served.http.put("/v1/products", json={"product_id": id_, "title": "y"})
            assert "printable" in reason_of(put, 422)


def test_the_picture_of_a_product_that_was_put_is_kept(own_index: Path, tiny_tables: Path) -> None:
    photos = sorted((tiny_tables / "media/products").glob("*.jpg"))
    with service_on(own_index, writable=True, watch_s=0.05) as served:

        def put(id_: str, *pictures: Path) -> None:
            parts = [("product_id", (None, id_)), ("title", (None, "y"))]
            files = [("images", (path.name, path.read_bytes())) for path in pictures]
            assert served.http.put("/v1/products", files=parts + files).status_code == 200

        def picture(id_: str) -> bytes | None:
            address = served.http.get(f"/v1/products/{quote(id_, safe='')}").json()["image"]
            if address is None:
                assert served.http.get(f"/v1/images/{quote(id_, safe='')}").status_code == 404
                return None
            answer = served.http.get(address)
            assert answer.headers["content-type"] == "image/jpeg"
            return answer.content

        put("a/new one", photos[0], photos[1])
        kept = picture("a/new one")
        assert kept
        difference = pixels(kept).astype(int) - pixels(photos[0].read_bytes())
        assert np.abs(difference).mean() < 4
        old = Matcher.load(own_index, device="cpu").index.ids[0]
        assert picture(old)
        put(old, photos[1])
        assert picture(old) not in (None, kept)
        # What is replaced without a picture has none, whatever the shards know.
        put(old)
        assert picture(old) is None
        # A generation later all is as it was; a notebook sees the same.
        with ProductIndex.load(own_index, device="cpu") as writer:
            assert writer.compact()
        wait_until(lambda: served.http.get("/v1/readyz").json()["generation"] == "000002")
        assert picture("a/new one") == kept
        assert picture(old) is None
        matcher = Matcher.load(own_index, device="cpu")
        assert matcher.picture_of("a/new one") == kept
        assert matcher.picture_of(old) is None
        with pytest.raises(UserError, match="not in the shards"):
            matcher.match(product_id=old).why(0)
        served.http.delete("/v1/products/a%2Fnew%20one")
        put("a/new one")
        assert picture("a/new one") is None


def asked_under_load(served: Served, work: Callable[[], None]) -> list[int]:
    """The statuses of requests that three clients make while something is done."""
    over = threading.Event()
    statuses: list[int] = []

    def ask(number: int) -> None:
        while not over.is_set():
            fields = {"text": f"query {number}"} | ({"where": "true"} if number == 0 else {})
            statuses.append(served.http.post("/v1/match", json=fields).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        work()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return statuses


def test_generations_and_encoders_are_swapped_without_a_failed_request(
    own_index: Path, tmp_path: Path
) -> None:
    encoder = own_index.parent / "train/encoder"
    torch.manual_seed(7)
    config = EncoderConfig(towers="mmrec-tiny", image_size=32, num_frames=2)
    other = Encoder(config).save(tmp_path / "other")
    with service_on(own_index, watch_s=0.05) as served:

        def ready() -> dict[str, Any]:
            return served.http.get("/v1/readyz").json()

        first = ready()

        def change() -> None:
            build_with(encoder, own_index, [f"second-{n}" for n in range(30)])
            wait_until(lambda: ready()["generation"] == "000002")
            assert ready()["encoder"] == first["encoder"]
            # The folder itself is replaced, by one with another encoder and a first generation.
            build_with(
                tmp_path / "other", own_index.parent / "next", [f"third-{n}" for n in range(20)]
            )
            own_index.rename(own_index.parent / "behind")
            (own_index.parent / "next").rename(own_index)
            wait_until(lambda: ready()["encoder"] == other)

        statuses = asked_under_load(served, change)
        assert set(statuses) == {200}
        assert ready()["generation"] == "000001"
        answer = served.match(text="x", k=20)
        assert all(match["product_id"].startswith("third-") for match in answer["matches"])
        assert served.service.live.num_swaps == 2
        shutil.rmtree(own_index.parent / "behind")


def test_what_cannot_be_opened_changes_nothing(own_index: Path) -> None:
    with service_on(own_index, watch_s=0.05) as served:
        before = served.http.get("/v1/readyz").json()
        (own_index / "CURRENT").write_text("000009\n")
        wait_until(lambda: served.service.live.num_failures > 0)
        assert served.http.get("/v1/readyz").json() == before
        assert served.match(text="goes on")["matches"]
        (own_index / "CURRENT").write_text("000001\n")
