"""What the engine needs of an encoder. Imports no torch."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float32, UInt8
from numpy import ndarray

from lookalike.encoder_settings import InputSettings


@runtime_checkable
class Embedder(Protocol):
    """Pixels -> unit vectors; safe to use from many threads."""

    fingerprint: str
    input: InputSettings  # the pictures it expects
    batch_size: int  # of more pictures at once it embeds no more in a second

    def embed(self, pictures: Sequence[UInt8[ndarray, "3 height width"]]) -> Float32[ndarray, "pictures dim"]:
        """Of pictures of one shape."""
        ...
