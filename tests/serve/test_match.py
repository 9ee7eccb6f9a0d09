"""The service answers what the matcher in this process answers, alone and in batches."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from servers import http_server
from serving import Served, reason_of, service_on

from mmrec import Matcher, cli
from mmrec.data.batches import Preprocess
from mmrec.errors import UserError
from mmrec.retrieval.matcher import build_index
from mmrec.serve.decoding import DecodeTask, decode


@pytest.fixture(scope="module")
def served(index: Path) -> Iterator[Served]:
    with service_on(index) as served:
        yield served


@pytest.fixture(scope="module")
def matcher(index: Path) -> Matcher:
    return Matcher.load(index, device="cpu")


@pytest.fixture(scope="module")
def clip(tiny_tables: Path) -> bytes:
    return min((tiny_tables / "media/contents").glob("*.mp4")).read_bytes()


@pytest.fixture(scope="module")
def photos(tiny_tables: Path) -> list[bytes]:
    return [
        path.read_bytes() for path in sorted((tiny_tables / "media/products").glob("*.jpg"))[:3]
    ]


def test_text_gives_what_the_matcher_gives(served: Served, matcher: Matcher) -> None:
    answer, expected = served.match(text="a red mug", k=5), matcher.match(text="a red mug", k=5)
    assert [m["product_id"] for m in answer["matches"]] == [m.product_id for m in expected]
    assert [m["score"] for m in answer["matches"]] == pytest.approx(
        [m.score for m in expected], abs=1e-5
    )
    assert [m["title"] for m in answer["matches"]] == [m.title for m in expected]
    assert [m["attributes"] for m in answer["matches"]] == [m.attributes for m in expected]
    assert [m["place"] for m in answer["matches"]] == [1, 2, 3, 4, 5]
    assert answer["query"] == {"text": "a red mug", "num_frames": 0}


def test_media_give_what_the_matcher_gives(
    served: Served, matcher: Matcher, clip: bytes, photos: list[bytes]
) -> None:
    """But for the rounding of pixels, since decoders resize by another library."""
    video = served.upload(("video", clip), text="so nice", k=4, frames="true").json()
    expected = matcher.match(video=clip, title="so nice", k=4)
    assert [m["score"] for m in video["matches"]] == pytest.approx(
        [m.score for m in expected], abs=2e-3
    )
    assert video["query"]["num_frames"] == len(expected.frames) == len(video["query"]["frames"])
    assert video["query"]["frames"][0].startswith("data:image/jpeg;base64,/9j/")
    pictures = served.upload(*(("images", photo) for photo in photos), k=4).json()
    assert [m["score"] for m in pictures["matches"]] == pytest.approx(
        [m.score for m in matcher.match(images=photos, k=4)], abs=2e-3
    )


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(37, 90), (200, 64), (64, 64), (20, 31)])
def test_decoders_prepare_pictures_as_the_encoder_does(
    resize: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A decoder is a process of its own, which the limit of pixels is set in.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize(shape, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "p.png")
    preprocess = Preprocess(size=32, resize=resize)  # pyright: ignore[reportArgumentType]
    expected = preprocess(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    task = DecodeTask(
        max_total_pixels=10**9,
        what="images",
        files=((tmp_path / "p.png").read_bytes(),),
        num_frames=4,
        size=32,
        interpolation="bicubic",
        resize=preprocess.resize,
        max_pixels=10**6,
        max_frames=10,
        thumbnails=0,
    )
    found = decode(task).pixels[0].astype(int)  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(found - expected.numpy()).mean() < 1
    assert np.abs(found - expected.numpy()).max() <= 8


def test_filters_and_k(served: Served, matcher: Matcher) -> None:
    where = "price < 30 and shape <> 'mug'"
    answer = served.match(text="anything", where=where, k=3)
    expected = matcher.match(text="anything", where=where, k=3)
    assert [m["product_id"] for m in answer["matches"]] == [m.product_id for m in expected]
    assert served.match(text="anything", where="price < 0")["matches"] == []


def test_what_is_like_a_product(served: Served, matcher: Matcher) -> None:
    first = matcher.index.ids[0]
    answer = served.match(product_id=first, k=3)
    expected = [m.product_id for m in matcher.match(product_id=first, k=3)]
    assert [m["product_id"] for m in answer["matches"]] == expected
    assert first not in expected


def test_why_is_the_matchers(served: Served, matcher: Matcher, photos: list[bytes]) -> None:
    answer = served.upload(*(("images", p) for p in photos), text="a mug", k=2, why="true").json()
    expected = matcher.match(images=photos, title="a mug", k=2).why(0).to_dict()
    found = answer["matches"][0]["why"]
    assert found["product_id"] == expected["product_id"]
    for name in ("score", "video_alone", "title_alone", "frame_losses"):
        assert found[name] == pytest.approx(expected[name], abs=3e-3)
    assert "why" not in served.match(text="a mug")["matches"][0]


def test_batches_give_what_single_queries_give(served: Served, photos: list[bytes]) -> None:
    """Texts, pictures and different k at once; and they are encoded together."""
    texts = [f"query {number}" for number in range(24)]
    alone = [served.match(text=text, k=1 + n % 5) for n, text in enumerate(texts)]
    pictures_alone = served.upload(("images", photos[0]), text="x").json()
    batches = []
    served.service.matching.batcher._observe = batches.append
    with ThreadPoolExecutor(12) as threads:
        picture = threads.submit(lambda: served.upload(("images", photos[0]), text="x").json())
        together = list(
            threads.map(lambda n: served.match(text=texts[n], k=1 + n % 5), range(len(texts)))
        )
    for one, other in zip([*alone, pictures_alone], [*together, picture.result()], strict=True):
        assert [m["product_id"] for m in one["matches"]] == [
            m["product_id"] for m in other["matches"]
        ]
        scores = [[m["score"] for m in found["matches"]] for found in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert sum(batches) == 25
    assert max(batches) > 1


def test_a_side_and_whole_vectors_are_taken_as_the_matcher_takes_them(
    trained: Path, photos: list[bytes], tmp_path: Path
) -> None:
    """On an index of short vectors beside the whole ones."""
    out = tmp_path / "index"
    embeddings = trained.parent / "embeddings"
    build_index(embeddings, out, width=8, rerank=True, report=lambda line: None)
    encoder = trained / "encoder"
    matcher = Matcher.load(out, encoder=encoder, device="cpu")
    with service_on(out, encoder=encoder) as served, Matcher.connect(served.url) as remote:
        for asked in ({}, {"rerank": False}, {"rerank": True}, {"side": "product"}):
            found = remote.match(images=photos[:1], title="a mug", k=6, **asked)
            expected = matcher.match(images=photos[:1], title="a mug", k=6, **asked)
            scores = [[m.score for m in own] for own in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=3e-3), asked
        short, whole = (remote.match(text="a mug", rerank=rerank)[0] for rerank in (False, True))
        assert abs(short.score - whole.score) > 1e-3
        assert "content or product" in reason_of(served.upload(text="x", side="video"), 422)
        assert "true or false" in reason_of(served.upload(text="x", rerank="maybe"), 422)


def test_an_index_that_keeps_no_whole_vectors_says_so(served: Served) -> None:
    answer = served.http.post("/v1/match", json={"text": "x", "rerank": True})
    assert "keeps no vectors" in reason_of(answer, 422)
    assert answer.json()["error"]["field"] == "rerank"


def test_an_index_of_contents_is_asked_by_content_id(
    trained: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    cli.embed(encoder=trained / "encoder", shards=tiny_shards, out=tmp_path / "e", split="test")
    build_index(tmp_path / "e", tmp_path / "index", report=lambda line: None)
    matcher = Matcher.load(tmp_path / "index", device="cpu")
    with service_on(tmp_path / "index") as served, Matcher.connect(served.url) as remote:
        first = matcher.index.ids[0]
        found = remote.match(content_id=first, k=3)
        expected = matcher.match(content_id=first, k=3)
        assert [m.product_id for m in found] == [m.product_id for m in expected]
        assert found.key == "content_id"
        with pytest.raises(UserError, match="this index holds contents; give the content_id"):
            remote.match(product_id=first)


def test_products_and_their_pictures(served: Served, matcher: Matcher) -> None:
    match = served.match(text="anything", k=1)["matches"][0]
    product = served.http.get(f"/v1/products/{match['product_id']}").json()
    assert product == {name: match[name] for name in ("product_id", "title", "attributes", "image")}
    picture = served.http.get(match["image"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content == matcher.picture_of(match["product_id"])


def test_facts(served: Served, matcher: Matcher) -> None:
    assert served.http.get("/v1/healthz").json() == {"status": "ok"}
    ready = served.http.get("/v1/readyz").json()
    assert ready == {
        "status": "ready",
        "encoder": matcher.encoder.fingerprint,
        "index": matcher.index.manifest.fingerprint,  # pyright: ignore
        "generation": "000001",
        "products": len(matcher.index),
    }
    info = served.http.get("/v1/info").json()
    assert {"name": "price", "type": "double"} in info["columns"]
    assert info["limits"]["max_k"] == 100
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/v1/match", "/v1/products", "/v1/readyz", "/metrics"} <= set(paths)
    assert "multipart/form-data" in paths["/v1/match"]["post"]["requestBody"]["content"]


def test_metrics_count_requests_batches_and_refusals(served: Served, photos: list[bytes]) -> None:
    assert served.upload(("images", photos[0]), text="one more").status_code == 200
    served.http.post("/v1/match", json={"text": "x", "where": "nonsense ("})
    lines = served.http.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    route = 'method="POST",route="/v1/match"'
    assert float(figures[f'mmrec_request_seconds_count{{{route},status="200"}}']) >= 1
    assert float(figures['mmrec_errors_total{reason="invalid field"}']) >= 1
    assert float(figures["mmrec_batch_size_count"]) >= 1
    assert float(figures["mmrec_index_generation"]) == 1
    assert float(figures["mmrec_index_age_seconds"]) > 0
    assert float(figures["mmrec_queue_length"]) == 0
    stages = ("receive", "decode", "queue", "encode", "search")
    assert all(f'mmrec_stage_seconds_count{{stage="{stage}"}}' in figures for stage in stages)


def test_the_client_has_the_matchers_methods(
    served: Served, matcher: Matcher, photos: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "p.jpg").write_bytes(photos[0])
    with Matcher.connect(served.url) as remote:
        found = remote.match(text="a red mug", k=3, where="price > 1")
        expected = matcher.match(text="a red mug", k=3, where="price > 1")
        assert [m.product_id for m in found] == [m.product_id for m in expected]
        assert [m.image for m in found] == [m.image for m in expected]
        assert found.why(0).title_alone == pytest.approx(expected.why(0).title_alone, abs=1e-4)
        lists = remote.match(images=[[tmp_path / "p.jpg"], photos[1:]], title=["one", None], k=2)
        assert [len(own) for own in lists] == [2, 2]
        assert len(lists[1].frames) == 2
        like = remote.match(product_id=found[0].product_id, k=2)
        expected = matcher.match(product_id=found[0].product_id, k=2)
        assert [m.product_id for m in like] == [m.product_id for m in expected]
        assert (like.title, like.frames) == (expected.title, expected.frames)
        assert like.why(1).title_alone == pytest.approx(expected.why(1).title_alone, abs=1e-4)
        two = remote.match(product_id=[found[0].product_id, found[1].product_id], k=2)
        assert [m.product_id for m in two[0]] == [m.product_id for m in expected]
        with pytest.raises(UserError, match="give the product_id"):
            remote.match(content_id="c")
        with pytest.raises(UserError, match="not both"):
            remote.match(product_id="p", content_id="c")
        assert remote.info()["index"]["key"] == "product_id"
        with pytest.raises(UserError, match=r"where.*nonsense"):
            remote.match(text="x", where="nonsense > 1")
        with pytest.raises(UserError, match="file not found"):
            remote.match(video=tmp_path / "none.mp4")
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1/info").write_text("{}")
    with http_server(tmp_path) as server, Matcher.connect(server.url) as remote:
        server.cut = 1
        assert remote.info() == {}
        server.cut = 2
        with pytest.raises(UserError, match="cannot be reached"):
            remote.info()
    with pytest.raises(UserError, match="cannot be reached"):
        Matcher.connect("http://127.0.0.1:9").match(text="x")
    with pytest.raises(UserError, match="expected the URL"):
        Matcher.connect("localhost:8080")
