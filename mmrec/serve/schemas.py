"""The bodies of answers, as OpenAPI describes them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Fault(BaseModel):
    """Why a request was refused."""

    status: int = Field(examples=[422])
    reason: str = Field(examples=["k: expected a whole number from 1 to 100"])
    request_id: str = Field(description="As in the header X-Request-ID and in the log.")
    field: str | None = Field(None, description="The field of the request that it is about.")


class ErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: Fault


class Health(BaseModel):
    """The process is alive."""

    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """What answers now; status 503 while it stops."""

    status: str = Field(description="ready or stopping", examples=["ready"])
    encoder: str = Field(description="The encoder's fingerprint.", examples=["451521cba3226a01"])
    index: str = Field(description="The index's fingerprint.", examples=["49add45fa7bab72a"])
    generation: str = Field(examples=["000002"])
    products: int = Field(examples=[240])


class Explanation(BaseModel):
    """What of a query carried a match: its score with a part of the query left out."""

    product_id: str
    score: float = Field(description="With everything.")
    video_alone: float | None = Field(description="The score without the text.")
    title_alone: float | None = Field(description="The score without frames and pictures.")
    video_share: float | None = Field(description="The video's share of both losses, 0 to 1.")
    title_share: float | None = Field(description="The text's; with the video's it makes 1.")
    frame_losses: list[float] = Field(description="What the score loses without each frame.")


class MatchItem(BaseModel):
    """One matched product."""

    place: int = Field(description="1 is the best.", examples=[1])
    product_id: str = Field(
        description="In an index of contents the content's id.", examples=["p00017"]
    )
    score: float = Field(description="Cosine similarity, -1 to 1.", examples=[0.83])
    title: str | None = Field(examples=["NOVA mug, red"])
    attributes: dict[str, Any] = Field(examples=[{"price": 12.5, "available": True}])
    image: str | None = Field(
        description="Where its picture is, on this host.", examples=["/v1/images/p00017"]
    )
    why: Explanation | None = Field(
        None, description="With why=true, of queries with media or text."
    )


class QueryEcho(BaseModel):
    """What was understood of the query."""

    text: str | None
    num_frames: int = Field(description="Frames or pictures that the encoder looked at.")
    frames: list[str] | None = Field(
        None, description="With frames=true: the frames as data URIs of JPEGs."
    )


class Timing(BaseModel):
    """Milliseconds of the parts of a query."""

    decode: float
    encode: float = Field(description="With the wait for a batch.")
    search: float


class MatchAnswer(BaseModel):
    """The products nearest to a query, best first."""

    query: QueryEcho
    matches: list[MatchItem]
    key: str = Field(
        description="What the ids are: product_id, or content_id in an index of contents.",
        examples=["product_id"],
    )
    generation: str = Field(description="The generation of the index that answered.")
    index: str = Field(description="Its fingerprint.")
    request_id: str
    timing_ms: Timing


class ProductAnswer(BaseModel):
    """A product of the index."""

    product_id: str
    title: str | None
    attributes: dict[str, Any]
    image: str | None


class UpsertAnswer(BaseModel):
    """A product that was added or replaced."""

    product_id: str
    created: bool = Field(description="Whether it was not there before.")
    products: int = Field(description="Products in the index now.")


class DeleteAnswer(BaseModel):
    """A product that was taken out."""

    product_id: str
    deleted: bool = Field(description="false where there was none.")
    products: int


class Column(BaseModel):
    """An attribute that a filter may name."""

    name: str
    type: str = Field(examples=["double"])


class EncoderFacts(BaseModel):
    """The encoder that answers."""

    model_config = ConfigDict(protected_namespaces=())
    fingerprint: str
    towers: str
    width: int
    num_frames: int
    device: str


class IndexFacts(BaseModel):
    """The index that answers."""

    fingerprint: str
    generation: str
    factory: str
    key: str = Field(description="product_id, or content_id in an index of contents.")
    products: int
    width: int
    device: str
    age_s: float = Field(description="Seconds since the generation was made.")


class Limits(BaseModel):
    """What a request may hold."""

    max_k: int
    max_images: int
    max_bytes: int
    max_pixels: int
    max_total_pixels: int
    max_frames: int
    max_text: int
    max_where: int
    decode_timeout_s: float


class InfoAnswer(BaseModel):
    """What the service holds and takes."""

    version: str
    encoder: EncoderFacts
    index: IndexFacts
    columns: list[Column]
    limits: Limits
    writable: bool
    url_hosts: list[str] = Field(description="Hosts that a video_url may name.")


class ProductBody(BaseModel):
    """A product to add or replace; pictures go in a multipart body, as `images`."""

    product_id: str = Field(min_length=1, max_length=512, examples=["p00017"])
    title: str | None = Field(None, examples=["NOVA mug, red"])
    attributes: dict[str, Any] = Field(
        default_factory=dict,
        description="By the names of the index's columns; one that is left out is null.",
        examples=[{"price": 12.5}],
    )
