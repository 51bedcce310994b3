"""The one shape of every error."""

from serving.schemas.fields import AnswerModel


class FieldError(AnswerModel):
    """One refused field."""

    field: str
    """Its name."""
    message: str
    """What was wrong with it."""


class ProblemDetails(AnswerModel):
    """RFC 9457 problem details; the type is about:blank, `code` tells kinds apart."""

    title: str
    """The status in words."""
    status: int
    """The HTTP status."""
    detail: str
    """What was wrong with this request."""
    code: str
    """Stable; branch on it."""
    fix: str
    """What to do next."""
    request_id: str
    """Also in the server's log."""
    errors: list[FieldError] | None = None
    """With `request.invalid`: the refused fields, at most 20 of them."""
