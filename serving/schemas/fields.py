"""Kinds of values that several requests and answers hold."""

import base64
import binascii
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, WithJsonSchema

from indexing.reranking.settings import RerankSettings, read_rerank

LARGEST_ID = 2**63 - 1
LONGEST_VECTOR = 16_384
EXAMPLE_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAASElEQVR42mP8v8+GgRTAxEAiIFkDC6bQ5ToEW7eJkA3IqjG56BowpTEF"
    "mfCrxpSifShRoAEzBLFKMeGSwCXIhF8a0wjGwZf4AJllEhPp6PbzAAAAAElFTkSuQmCC"
)
_BYTES_PER_NUMBER = 4


class RequestModel(BaseModel):
    """What a client sends: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AnswerModel(BaseModel):
    """What a client gets. Describes answers; those of searches are written without being checked against it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


def _decode_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64: use the standard alphabet, padding, no line breaks, no data: prefix") from error


def numbers_of_bytes(content: bytes) -> list[float]:
    """Of little-endian float32. Raises ValueError where there are no such, or too many."""
    if not content or len(content) % _BYTES_PER_NUMBER:
        raise ValueError(f"float32 values take 4 bytes each; found {len(content)} bytes")
    if len(content) > _BYTES_PER_NUMBER * LONGEST_VECTOR:
        raise ValueError(f"at most {LONGEST_VECTOR} values; found {len(content) // _BYTES_PER_NUMBER}")
    # Bytes that are no vector may spell signalling NaNs, of which numpy warns; they are refused as any NaN is.
    with np.errstate(invalid="ignore"):
        return np.frombuffer(content, "<f4").astype(np.float64).tolist()


def _decode_numbers(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > 2 * _BYTES_PER_NUMBER * LONGEST_VECTOR:
        raise ValueError(f"at most {LONGEST_VECTOR} values")
    return numbers_of_bytes(_decode_base64(value))


def _method_of(value: Any) -> Any:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError("give a method's name, or an object with its name and settings")
    return read_rerank(value)


PictureBytes = Annotated[
    bytes,
    BeforeValidator(_decode_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]
VectorNumbers = Annotated[
    list[float],
    Field(min_length=1, max_length=LONGEST_VECTOR),
    BeforeValidator(_decode_numbers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": LONGEST_VECTOR},
                {"type": "string", "contentEncoding": "base64", "minLength": 8},
            ]
        }
    ),
]
Region = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
RerankMethod = Annotated[RerankSettings, BeforeValidator(_method_of, json_schema_input_type=str | RerankSettings)]
VersionName = Annotated[str, Field(pattern=r"^v\d{4,18}$", examples=["v0001"])]
ItemId = Annotated[int, Field(ge=0, le=LARGEST_ID)]
FileInForm = Annotated[bytes, WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"})]
