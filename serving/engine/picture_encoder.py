"""The encoder that travels inside an index, ready to embed. The only file of the engine that needs torch."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray

from indexing.published_index import PublishedIndex
from lookalike.encoder import available_device, embed_pixels
from lookalike.encoder_settings import InputSettings
from lookalike.native_libraries import keep_freed_memory

# A processor is busy with few pictures, and others can be decoded meanwhile.
_BATCH_OF_DEVICE = {"cpu": 8}
_LARGE_BATCH = 64


class PictureEncoder:
    """Safe to use from many threads."""

    def __init__(self, index: PublishedIndex) -> None:
        """Raises ArtifactError where the encoder in the version is missing, damaged, or not the one of its vectors."""
        device = available_device()
        if device.type == "cpu":
            keep_freed_memory()
        self._encoder = index.load_encoder().to(device)
        self.batch_size = _BATCH_OF_DEVICE.get(device.type, _LARGE_BATCH)
        self.fingerprint: str = self._encoder.fingerprint
        self.input: InputSettings = self._encoder.settings.input

    def embed(self, pictures: Sequence[UInt8[ndarray, "3 height width"]]) -> Float32[ndarray, "pictures dim"]:
        """Unit vectors of pictures of one shape, together; a picture's vector depends on the others by rounding."""
        return embed_pixels(self._encoder, torch.from_numpy(np.stack(pictures))).numpy()
