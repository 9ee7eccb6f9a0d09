"""What OpenAPI says of bodies that the routes read themselves."""

from typing import Any

from mmrec.serve.schemas import ErrorAnswer

_REASONS = {
    400: "The body cannot be parsed.",
    401: "The bearer token is missing or wrong.",
    403: "The service does not do this; the reason says how it would.",
    404: "There is no such product, or no picture of it.",
    408: "The body did not arrive in time.",
    409: "Another process is changing the index.",
    413: "The body, or a part of it, is too large.",
    415: "A file is of another type than expected, by its content, or the body is.",
    422: "A field makes no sense, or media cannot be read.",
    503: "Too much waits already, or the answer took too long: come back after Retry-After seconds.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may refuse with these statuses."""
    return {status: {"model": ErrorAnswer, "description": _REASONS[status]} for status in statuses}


_FILE = {"type": "string", "format": "binary"}
_QUERY: dict[str, Any] = {
    "text": {
        "type": "string",
        "description": "A content's title, or a query typed by a person.",
        "examples": ["love this red mug"],
    },
    "k": {
        "type": "integer",
        "minimum": 1,
        "default": 10,
        "description": "Matches at most; /v1/info has the most.",
    },
    "where": {
        "type": "string",
        "description": "A condition on the columns that /v1/info lists.",
        "examples": ["price < 30 and available"],
    },
    "why": {
        "type": "boolean",
        "default": False,
        "description": "Say of each match what of the query carried it.",
    },
    "frames": {
        "type": "boolean",
        "default": False,
        "description": "Send back the frames that were looked at.",
    },
    "product_id": {
        "type": "string",
        "description": "What is like this product, instead of media and text.",
    },
    "content_id": {
        "type": "string",
        "description": "What is like this content, where the index is one of contents.",
    },
    "side": {
        "type": "string",
        "enum": ["content", "product"],
        "description": "What the query is, where it is not the other side of what the index holds.",
    },
    "rerank": {
        "type": "boolean",
        "description": "Score matches again by whole vectors, or do not; else as the index was built.",
    },
    "video_url": {
        "type": "string",
        "description": "A video on a host that the operator allows.",
    },
}
_MEDIA: dict[str, Any] = {
    "video": _FILE | {"description": "MP4, MOV, WebM, Matroska, AVI, GIF or WebP."},
    "images": {
        "type": "array",
        "items": _FILE,
        "description": "Pictures, instead of a video: the field repeated.",
    },
}

MATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": _MEDIA | _QUERY,
                    "additionalProperties": False,
                },
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": _QUERY,
                    "additionalProperties": False,
                },
                "examples": {
                    "text": {"value": {"text": "love this red mug", "k": 5}},
                    "filtered": {"value": {"text": "red mug", "where": "price < 30", "why": True}},
                    "like a product": {"value": {"product_id": "p00017"}},
                },
            },
        },
    }
}

_PRODUCT: dict[str, Any] = {
    "product_id": {"type": "string", "minLength": 1, "maxLength": 512, "examples": ["p00017"]},
    "title": {"type": "string", "examples": ["NOVA mug, red"]},
}

PRODUCT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["product_id"],
                    "properties": _PRODUCT
                    | {
                        "attributes": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "description": "A JSON object, by the names of the index's columns.",
                            "examples": ['{"price": 12.5}'],
                        },
                        "images": {"type": "array", "items": _FILE},
                    },
                    "additionalProperties": False,
                },
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["product_id"],
                    "properties": _PRODUCT
                    | {
                        "attributes": {
                            "type": "object",
                            "description": "By the names of the index's columns; one left out is null.",
                            "examples": [{"price": 12.5}],
                        }
                    },
                    "additionalProperties": False,
                },
                "examples": {
                    "mug": {
                        "value": {
                            "product_id": "p00017",
                            "title": "NOVA mug, red",
                            "attributes": {"price": 12.5},
                        }
                    }
                },
            },
        },
    }
}
