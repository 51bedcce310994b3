"""An encoder of known speed, whose vectors tell the mean colour of a picture."""

import io
import threading
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image

from lookalike.encoder_settings import InputSettings


class FakeEncoder:
    """Takes the same time for every batch, whatever its size."""

    def __init__(self, *, seconds_per_batch: float = 0.0, fingerprint: str = "fake") -> None:
        self.fingerprint = fingerprint
        self.batch_size = 64
        self.input = InputSettings(size=16)
        self.seconds_per_batch = seconds_per_batch
        self.batch_sizes: list[int] = []
        self.threads: set[threading.Thread] = set()

    def embed(self, pictures: Sequence[UInt8[ndarray, "3 height width"]]) -> Float32[ndarray, "pictures dim"]:
        self.batch_sizes.append(len(pictures))
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds_per_batch)
        return np.stack([unit(picture.mean(axis=(1, 2))) for picture in pictures])


def unit(colour: Sequence[float] | ndarray) -> Float32[ndarray, "dim"]:
    vector = np.array([*colour, 128.0])  # or shades of grey would be alike
    result: ndarray = (vector / np.linalg.norm(vector)).astype(np.float32)
    return result


def picture_of(colour: tuple[int, int, int], *, side: int = 16, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, format=file_format)
    return file.getvalue()
