"""The service's routes, as an ASGI application.

POST   /v1/match                 a video, pictures, text or a product in; matched products out
GET    /v1/products/ID           attributes
GET    /v1/images/ID             a picture
PUT    /v1/products, DELETE /v1/products/ID     where the service is writable
GET    /v1/info, /v1/healthz, /v1/readyz, /metrics, /openapi.json
GET    /                         the page
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

import mmrec
from mmrec.data.media import encode_jpeg
from mmrec.errors import UserError
from mmrec.model.encoder import Side
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.matcher import Matcher
from mmrec.serve import schemas
from mmrec.serve.config import ServeConfig
from mmrec.serve.decoding import (
    FRAME_SIDE,
    PRODUCT_SIDE,
    Decoded,
    Decoders,
    DecodeTask,
    What,
    check_kind,
)
from mmrec.serve.fetching import check_url, fetch
from mmrec.serve.front import Direct, Front, answer_refused
from mmrec.serve.live import Live, Served
from mmrec.serve.log import log
from mmrec.serve.matching import (
    Encoded,
    Expected,
    Hit,
    Job,
    Matching,
    explain,
    explain_like,
    plain_attributes,
    search_apart,
    search_like,
)
from mmrec.serve.metrics import CONTENT_TYPE, Metrics
from mmrec.serve.openapi import MATCH_BODY, PRODUCT_BODY, errors
from mmrec.serve.products import (
    MAX_ID,
    PRODUCT_FIELDS,
    Superseded,
    delete,
    own_side,
    product_of,
    row_of,
    upsert,
)
from mmrec.serve.refusals import Kind, Refused, invalid
from mmrec.serve.uploads import Body, FieldKind, Uploads, flag_of, text_of, whole_of

_PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_MATCH = "/v1/match"
# Made once: `json.dumps` makes one a call where anything is not as by default.
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_JPEG = b"\xff\xd8\xff"
_DEFAULT_K = 10
_TRIES = 3
_MATCH_FIELDS: dict[str, FieldKind] = {
    "video": "file",
    "images": "files",
    "text": "text",
    "k": "text",
    "where": "text",
    "why": "text",
    "frames": "text",
    "product_id": "text",
    "content_id": "text",
    "side": "text",
    "rerank": "text",
    "video_url": "text",
}
_KINDS: dict[int, Kind] = {404: "not found", 405: "method"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """The fields of a request for matches, checked."""

    text: str | None
    k: int
    where: str | None
    why: bool
    frames: bool
    product_id: str | None
    content_id: str | None
    side: Side | None
    rerank: bool | None
    video_url: str | None

    @property
    def like(self) -> str | None:
        """The id of what is to be alike, under whichever name it was given."""
        return self.product_id or self.content_id


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a query came to."""

    hits: list[Hit]
    text: str | None
    """The query's words, or the title of what was asked about."""
    num_frames: int = 0
    shown: Sequence[bytes] = ()
    """JPEGs of the query's frames and pictures, where they were asked for."""
    whys: Mapping[str, dict[str, Any]]
    decode_s: float = 0.0
    encode_s: float = 0.0
    search_s: float


class Service:
    """All parts of the service that live as long as its process."""

    def __init__(self, config: ServeConfig, *, token: str | None = None) -> None:
        """Open the index and start threads; decoders start with the application. Raises `UserError`."""
        self.config, self.token = config, token
        self.stopping = False
        self.live = Live(config.index, encoder=config.encoder, device=config.device, log=log)
        self.metrics = Metrics()
        self.matching = Matching(config, self.metrics)
        self.uploads = Uploads(config)
        self.decoders = Decoders(
            config.decoders,
            timeout_s=config.decode_timeout_s,
            memory_mb=config.decode_memory_mb,
            max_waiting=config.max_queue,
        )
        self._add_gauges()

    def _add_gauges(self) -> None:
        gauge, live = self.metrics.gauge, self.live
        gauge(
            "mmrec_queue_length",
            "Queries that wait for the encoder.",
            self.matching.batcher.__len__,
        )
        gauge(
            "mmrec_decode_queue_length",
            "Requests whose media are decoded or wait for it.",
            lambda: self.decoders.waiting,
        )
        gauge(
            "mmrec_index_age_seconds",
            "Since the live generation was made.",
            lambda: time.time() - live.current.published_at,
        )
        gauge(
            "mmrec_index_generation",
            "The number of the live generation.",
            lambda: int(live.current.generation),
        )
        gauge("mmrec_index_products", "Products.", lambda: len(live.current.matcher.index))
        gauge("mmrec_upload_bytes", "Bytes of uploads held.", lambda: self.uploads.held_bytes)
        counter = self.metrics.counter
        counter("mmrec_swaps", "Generations taken up since the start.", lambda: live.num_swaps)
        counter(
            "mmrec_swap_failures",
            "Changes of the index that could not be taken up.",
            lambda: live.num_failures,
        )

    async def start(self) -> None:
        """Start decoders, and run the encoder once, so that the first request does not wait for that."""
        grey = encode_jpeg(np.full((64, 64, 3), 128, np.uint8), 90)
        task = self._decode_task(self.live.current, "images", thumbnails=0)
        await self.decoders.warm_up(task, grey)
        served = self.live.current
        job = Job(served=served, pictures=None, text="warm-up", side=served.matcher.side, k=1)
        await self.matching.encode(job)
        self.live.watch(self.config.watch_s)

    def close(self) -> None:
        """End all threads and processes; no request is to be under way."""
        self.live.close()
        self.matching.close()
        self.decoders.close()

    # ---------------------------------------------------------------------------------- matching

    async def match(self, request: Request) -> Response:
        """The products nearest to a query."""
        received = time.perf_counter()
        expected = self.matching.expect()
        try:
            async with self.uploads.received(request, _MATCH_FIELDS, _check_head) as body:
                self.metrics.observe_stage("receive", time.perf_counter() - received)
                question = self._question(body)
                if question.video_url is not None:
                    expected.close()
                    await fetch(
                        check_url(question.video_url, self.config.allow_url_host),
                        self.uploads,
                        body,
                        self.config.upload_timeout_s,
                    )
                try:
                    async with asyncio.timeout(self.config.request_timeout_s):
                        answer = await self._answer(request, body, question, expected)
                except TimeoutError:
                    raise Refused(
                        503,
                        "timeout",
                        f"no answer within {self.config.request_timeout_s:g} s",
                        retry_after_s=5,
                    ) from None
        finally:
            expected.close()
        return _json(answer)

    def _question(self, body: Body) -> Question:
        fields, config = body.fields, self.config
        question = Question(
            text=text_of(fields, "text", config.max_text),
            k=whole_of(fields, "k", min(_DEFAULT_K, config.max_k), config.max_k),
            where=text_of(fields, "where", config.max_where),
            why=flag_of(fields, "why"),
            frames=flag_of(fields, "frames"),
            product_id=text_of(fields, "product_id", MAX_ID),
            content_id=text_of(fields, "content_id", MAX_ID),
            side=_side_of(fields),
            rerank=flag_of(fields, "rerank") if fields.get("rerank") not in (None, "") else None,
            video_url=text_of(fields, "video_url", 2000),
        )
        media = [name for name in ("video", "images") if body.files.get(name)]
        media += ["video_url"] if question.video_url else []
        if len(media) > 1:
            raise invalid(media[1], f"give it or {media[0]}, not both")
        ids = [name for name in ("product_id", "content_id") if getattr(question, name)]
        if len(ids) > 1 or (ids and (media or question.text)):
            raise invalid(ids[0], "give one id, or media and text, not both")
        if not (media or question.text or ids):
            raise Refused(
                422, "invalid field", "nothing to match: give a video, images, text or a product_id"
            )
        return question

    async def _answer(
        self, request: Request, body: Body, question: Question, expected: Expected
    ) -> dict[str, Any]:
        served = self.live.current
        _check_key(served, question)
        if question.like is None:
            found = await self._by_query(served, body, question, expected)
        else:
            expected.close()
            found = await self._by_id(served, question.like, question)
        self.metrics.observe_stage("search", found.search_s)
        request.state.facts = {
            "generation": served.generation,
            "frames": found.num_frames,
            "matches": len(found.hits),
        }
        query: dict[str, Any] = {"text": found.text, "num_frames": found.num_frames}
        if question.frames:
            query["frames"] = [_data_uri(jpeg) for jpeg in found.shown]
        seconds = {"decode": found.decode_s, "encode": found.encode_s, "search": found.search_s}
        return {
            "query": query,
            "matches": [
                _match(served, place, hit)
                | ({"why": found.whys.get(hit.product_id)} if question.why else {})
                for place, hit in enumerate(found.hits, 1)
            ],
            "key": served.matcher.index.key,
            "generation": served.generation,
            "index": served.index,
            "request_id": request.state.request_id,
            "timing_ms": {name: round(1000 * s, 2) for name, s in seconds.items()},
        }

    async def _by_query(
        self, served: Served, body: Body, question: Question, expected: Expected
    ) -> Found:
        """What is nearest to media, a text or both."""
        started = time.perf_counter()
        side = FRAME_SIDE if question.frames else 0
        decoded = await self._decoded(served, body, thumbnails=side)
        decode_s = time.perf_counter() - started
        encoded, hits, encode_s, search_s = await self._searched(
            served, decoded, question, expected
        )
        whys: dict[str, dict[str, Any]] = {}
        if question.why:
            ids = [hit.product_id for hit in hits]
            whys = await self.matching.apart(explain, served.matcher, encoded.query, ids)
        return Found(
            hits=hits,
            text=question.text,
            num_frames=len(decoded.pixels) if decoded else 0,
            shown=decoded.thumbnails if decoded else (),
            whys=whys,
            decode_s=decode_s,
            encode_s=encode_s,
            search_s=search_s,
        )

    async def _by_id(self, served: Served, id_: str, question: Question) -> Found:
        """What is nearest to something that the index holds."""
        started = time.perf_counter()
        apart, matcher = self.matching.apart, served.matcher
        search = self.matching.threads_of(question.where)
        hits = await search(search_like, matcher, id_, question.k, question.where, question.rerank)
        search_s = time.perf_counter() - started
        shown, whys = (), {}
        if question.frames:
            shown = await apart(_held_picture, matcher, id_)
        if question.why:
            whys = await apart(explain_like, matcher, id_, [hit.product_id for hit in hits])
        return Found(
            hits=hits,
            text=plain_attributes(_attributes(served, id_))[0],
            shown=shown,
            whys=whys,
            search_s=search_s,
        )

    async def _searched(
        self,
        served: Served,
        decoded: Decoded | None,
        question: Question,
        expected: Expected,
    ) -> tuple[Encoded, list[Hit], float, float]:
        """The encoded query, matches, and the seconds of encoding, its wait too, and of searching."""
        # Filters are other work for each query, and may be slow: not in the encoder's thread.
        together = question.where is None and question.rerank is None
        job = Job(
            served=served,
            pictures=decoded.pixels if decoded else None,
            text=question.text,
            side=question.side or served.matcher.side,
            k=question.k if together else None,
        )
        encoded, waited_s = await self.matching.encode(job, expected)
        self.metrics.observe_stage("queue", waited_s)
        self.metrics.observe_stage("encode", encoded.encode_s)
        encode_s, hits, search_s = waited_s + encoded.encode_s, encoded.hits, encoded.search_s
        if hits is None:
            started = time.perf_counter()
            asked = (encoded.query.vector, question.k, question.where, question.rerank)
            search = self.matching.threads_of(question.where)
            hits = await search(search_apart, served.matcher, *asked)
            search_s = time.perf_counter() - started
        return encoded, hits, encode_s, search_s

    async def _decoded(self, served: Served, body: Body, *, thumbnails: int) -> Decoded | None:
        what: What = "video" if body.files.get("video") else "images"
        files = body.files.get(what, [])
        if not files:
            return None
        started = time.perf_counter()
        task = self._decode_task(served, what, thumbnails=thumbnails)
        decoded = await self.decoders.decode(task, files)
        self.metrics.observe_stage("decode", time.perf_counter() - started)
        return decoded

    def _decode_task(self, served: Served, what: What, *, thumbnails: int) -> DecodeTask:
        encoder = served.matcher.encoder
        return DecodeTask(
            what=what,
            num_frames=encoder.config.num_frames,
            size=encoder.preprocess.size,
            interpolation=encoder.preprocess.interpolation,
            resize=encoder.preprocess.resize,
            max_pixels=self.config.max_pixels,
            max_total_pixels=self.config.max_total_pixels,
            max_frames=self.config.max_frames,
            thumbnails=thumbnails,
        )

    # ---------------------------------------------------------------------------------- products

    async def product(self, product_id: str) -> Response:
        """A product's attributes."""
        served = self.live.current
        title, attributes = plain_attributes(_attributes(served, product_id))
        return _json(
            {
                "product_id": product_id,
                "title": title,
                "attributes": attributes,
                "image": served.image_path(product_id),
            }
        )

    async def image(self, product_id: str) -> Response:
        """A product's picture."""
        served = self.live.current
        data = None
        if product_id in served.matcher.index and served.matcher.has_picture(product_id):
            data = await self.matching.apart(served.matcher.picture_of, product_id)
        if data is None:
            raise Refused(404, "not found", "there is no picture of such a product here")
        if not data.startswith(_JPEG):
            data = await self.matching.apart(_as_jpeg, data)
        return Response(
            data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"}
        )

    async def put_product(self, request: Request) -> Response:
        """Add a product, or replace it."""
        await self._check_writable(request)
        async with self.uploads.received(request, PRODUCT_FIELDS, _check_head) as body:
            product = product_of(body, self.config.max_text)
            for _ in range(_TRIES):
                served = self.live.current
                index = served.matcher.index
                assert isinstance(index, ProductIndex)
                row_of(product, index)  # What it refuses is refused before the work.
                decoded = await self._decoded(served, body, thumbnails=PRODUCT_SIDE)
                job = Job(
                    served=served,
                    pictures=decoded.pixels if decoded else None,
                    text=product.title,
                    side=own_side(served),
                )
                encoded, _ = await self.matching.encode(job)
                vector = encoded.query.vector
                picture = decoded.thumbnails[0] if decoded else b""
                arguments = (self.live, self.config.index, served, product, vector, picture)
                with suppress(Superseded):
                    return _json(await self.matching.apart(upsert, *arguments))
                await asyncio.sleep(self.config.watch_s)
        raise _replaced()

    async def delete_product(self, request: Request, product_id: str) -> Response:
        """Take a product out."""
        await self._check_writable(request)
        for _ in range(_TRIES):
            with suppress(Superseded):
                arguments = (self.live, self.config.index, product_id)
                return _json(await self.matching.apart(delete, *arguments))
            await asyncio.sleep(self.config.watch_s)
        raise _replaced()

    async def _check_writable(self, request: Request) -> None:
        if not self.config.writable:
            await self.uploads.drain(request.stream())
            raise Refused(
                403, "forbidden", "this service does not change its index; start it with --writable"
            )

    # ------------------------------------------------------------------------------------- facts

    def ready(self) -> Response:
        """Whether requests are welcome."""
        served = self.live.current
        body = {
            "status": "stopping" if self.stopping else "ready",
            "encoder": served.encoder,
            "index": served.index,
            "generation": served.generation,
            "products": len(served.matcher.index),
        }
        return _json(body, status=503 if self.stopping else 200)

    def info(self) -> Response:
        """What the service holds and takes."""
        served, config = self.live.current, self.config
        encoder, index = served.matcher.encoder, served.matcher.index
        assert isinstance(index, ProductIndex)
        return _json(
            {
                "version": mmrec.__version__,
                "encoder": {
                    "fingerprint": served.encoder,
                    "towers": Path(encoder.config.towers).name,
                    "width": encoder.width,
                    "num_frames": encoder.config.num_frames,
                    "device": str(encoder.device),
                },
                "index": {
                    "fingerprint": served.index,
                    "generation": served.generation,
                    "factory": index.factory,
                    "key": index.key,
                    "products": len(index),
                    "width": index.width,
                    "device": index.device,
                    "age_s": round(time.time() - served.published_at, 1),
                },
                "columns": [
                    {"name": field.name, "type": str(field.type)} for field in index.schema
                ],
                "limits": {
                    "max_k": config.max_k,
                    "max_images": config.max_images,
                    "max_bytes": config.max_upload_bytes,
                    "max_pixels": config.max_pixels,
                    "max_total_pixels": config.max_total_pixels,
                    "max_frames": config.max_frames,
                    "max_text": config.max_text,
                    "max_where": config.max_where,
                    "decode_timeout_s": config.decode_timeout_s,
                },
                "writable": config.writable,
                "url_hosts": list(config.allow_url_host),
            }
        )


def make_app(service: Service) -> Front:
    """The application; it starts and closes the service with itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        log("ready", **json.loads(bytes(service.ready().body)))
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="mmrec",
        version=mmrec.__version__,
        description="Which products does this video match?",
        # Their pages load scripts from another host.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    _add_matching(app, service)  # Routes are tried in order.
    _add_facts(app, service)
    _add_products(app, service)
    _add_page(app)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _pass_on)
    matching = next(route for route in app.routes if getattr(route, "path", "") == _MATCH)
    return Front(
        app,
        metrics=service.metrics,
        token=service.token,
        direct={("POST", _MATCH): Direct(matching, service.match)},
        stopping=lambda: service.stopping,
    )


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/healthz", response_model=schemas.Health, tags=["facts"])
    async def healthz() -> Response:
        """Whether the process is alive."""
        return _json({"status": "ok"})

    @app.get(
        "/v1/readyz",
        response_model=schemas.Readiness,
        responses={503: {"model": schemas.Readiness, "description": "It is stopping."}},
        tags=["facts"],
    )
    async def readyz() -> Response:
        """Whether requests are welcome, and what answers them."""
        return service.ready()

    @app.get("/v1/info", response_model=schemas.InfoAnswer, responses=errors(401), tags=["facts"])
    async def info() -> Response:
        """The encoder, the index, its columns, and what a request may hold."""
        return service.info()

    @app.get(
        "/metrics",
        responses=errors(401) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
        tags=["facts"],
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _add_matching(app: FastAPI, service: Service) -> None:
    @app.post(
        _MATCH,
        response_model=schemas.MatchAnswer,
        responses=errors(400, 401, 403, 404, 408, 413, 415, 422, 503),
        openapi_extra=MATCH_BODY,
        tags=["matching"],
    )
    async def match(request: Request) -> Response:
        """The products nearest to a video or pictures, with or without a text, to a text, or to a product."""
        return await service.match(request)


def _add_products(app: FastAPI, service: Service) -> None:
    @app.put(
        "/v1/products",
        response_model=schemas.UpsertAnswer,
        responses=errors(400, 401, 403, 408, 409, 413, 415, 422, 503),
        openapi_extra=PRODUCT_BODY,
        tags=["products"],
    )
    async def put(request: Request) -> Response:
        """Add a product, or replace it as a whole. Of its pictures the first is kept, made smaller."""
        return await service.put_product(request)

    @app.delete(
        "/v1/products/{product_id:path}",
        response_model=schemas.DeleteAnswer,
        responses=errors(401, 403, 404, 409, 503),
        tags=["products"],
    )
    async def delete_one(request: Request, product_id: str) -> Response:
        """Take a product out of the index."""
        return await service.delete_product(request, product_id)

    # Ids may hold slashes, and end in what a route could end in.
    @app.get(
        "/v1/images/{product_id:path}",
        responses=errors(401, 404, 503) | {200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
        tags=["products"],
    )
    async def image(product_id: str) -> Response:
        """A product's first picture: as it was put here, or as it is in the index's shards."""
        return await service.image(product_id)

    @app.get(
        "/v1/products/{product_id:path}",
        response_model=schemas.ProductAnswer,
        responses=errors(401, 404),
        tags=["products"],
    )
    async def product(product_id: str) -> Response:
        """A product's title and attributes."""
        return await service.product(product_id)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _page_file(name)


def _page_file(name: str) -> Response:
    # Compared with what is there: a name is never made into a path.
    for path in _PAGE.glob("*"):
        if path.name == name and path.suffix in _PAGE_TYPES:
            return FileResponse(
                path,
                headers={"Content-Type": _PAGE_TYPES[path.suffix], "Cache-Control": "no-cache"},
            )
    raise Refused(404, "not found", "there is no such page")


async def _pass_on(request: Request, error: Exception) -> Response:
    """Let what is raised go on to `Front`, where the framework would answer in its own way."""
    raise error


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: "there is no such route", 405: "this route does not take this method"}
    refused = Refused(
        error.status_code,
        _KINDS.get(error.status_code, "bad request"),
        reason.get(error.status_code, str(error.detail)),
    )
    return _Refusal(refused, error.headers)


class _Refusal(Response):
    def __init__(self, refused: Refused, headers: Mapping[str, str] | None) -> None:
        super().__init__(status_code=refused.status)
        self._refused, self._more = refused, headers or {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in self._more.items()
                ]
            await send(message)

        await answer_refused(scope, receive, send_on, self._refused)


def _replaced() -> Refused:
    return Refused(409, "conflict", "the index is being replaced; try again", retry_after_s=1)


def _check_head(field: str, head: bytes, number: int) -> None:
    check_kind("video" if field == "video" else "images", head, number)


def _side_of(fields: Mapping[str, Any]) -> Side | None:
    """The side that a query is encoded on, where the request says it."""
    value = fields.get("side")
    if value in (None, ""):
        return None
    if value not in ("content", "product"):
        raise invalid("side", "expected content or product")
    return value


def _check_key(served: Served, question: Question) -> None:
    """Refuse an id under the name that this index has not: an id of a product is not one of a content."""
    key = served.matcher.index.key
    for name, given in (("product_id", question.product_id), ("content_id", question.content_id)):
        if given is not None and name != key:
            held = "contents" if key == "content_id" else "products"
            raise invalid(name, f"this index holds {held}; give the {key} of one")


def _attributes(served: Served, product_id: str) -> dict[str, Any]:
    try:
        return served.matcher.index.attributes(product_id)
    except UserError:
        raise Refused(404, "not found", "there is no such product") from None


def _match(served: Served, place: int, hit: Hit) -> dict[str, Any]:
    return {
        "place": place,
        "product_id": hit.product_id,
        "score": hit.score,
        "title": hit.title,
        "attributes": hit.attributes,
        "image": served.image_path(hit.product_id),
    }


def _held_picture(matcher: Matcher, id_: str) -> list[bytes]:
    data = matcher.picture_of(id_)
    return [data if data.startswith(_JPEG) else _as_jpeg(data)] if data else []


def _as_jpeg(data: bytes) -> bytes:
    from mmrec.data.media import read_image

    return encode_jpeg(read_image(data), 90)


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _json(body: Any, *, status: int = 200) -> Response:
    return Response(_JSON.encode(body).encode(), status_code=status, media_type="application/json")
