"""What a request is refused for, and how that is said: {"error": {"status", "reason", "request_id"}}."""

from typing import Any, Literal

Kind = Literal[
    "bad request",
    "unauthorised",
    "forbidden",
    "not found",
    "method",
    "timeout",
    "conflict",
    "too large",
    "media type",
    "invalid field",
    "unreadable media",
    "busy",
    "stopping",
    "fault",
]
"""Faults as metrics count them: few, and nothing of a request in their names."""


class Refused(Exception):
    """A request that is answered with an error status: the asker can mend it, or come back later."""

    def __init__(
        self,
        status: int,
        kind: Kind,
        reason: str,
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.kind: Kind = kind
        self.reason = reason
        self.field = field
        """The field of the request that it is about."""
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """What the status asks for beside the body."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(self.retry_after_s)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self, request_id: str) -> dict[str, Any]:
        """The body of the answer."""
        error = {"status": self.status, "reason": self.reason, "request_id": request_id}
        return {"error": error | ({"field": self.field} if self.field else {})}


def invalid(field: str, reason: str) -> Refused:
    """A field that makes no sense."""
    return Refused(422, "invalid field", f"{field}: {reason}", field=field)


def busy(reason: str) -> Refused:
    """No room now."""
    return Refused(503, "busy", reason, retry_after_s=1)
