"""Picture files -> hits with their metadata: what `lookalike search` prints."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.decode import decode_image
from data_pipelines.transforms import EvaluationTransform
from indexing.published_index import PublishedIndex
from lookalike.encoder import embed_pixels
from lookalike.errors import DataError, DecodeError
from lookalike.records import SearchHits, SearchParameters

_BATCH_SIZE = 64


def search_with_pictures(
    index: PublishedIndex, pictures: Sequence[Path], parameters: SearchParameters
) -> list[dict[str, Any]]:
    """One answer per picture: `{"picture", "hits": [{"id", "score", "key", "class_name", ...}]}`.

    Raises:
        DataError: a file cannot be read or is not a picture; the message names it.
    """
    encoder = index.load_encoder()
    transform = EvaluationTransform(encoder.settings.input)
    answers = []
    for start in range(0, len(pictures), _BATCH_SIZE):
        chunk = pictures[start : start + _BATCH_SIZE]
        pixels = [transform(_decode(path)) for path in chunk]
        batches = [np.stack(list(group)) for _, group in groupby(pixels, key=lambda picture: picture.shape)]
        vectors = [embed_pixels(encoder, torch.from_numpy(batch)).numpy() for batch in batches]
        hits = index.search(np.concatenate(vectors), parameters)
        answers += _answers(index, chunk, hits)
    return answers


def _answers(index: PublishedIndex, pictures: Sequence[Path], hits: SearchHits) -> list[dict[str, Any]]:
    answers = []
    for picture, ids, scores in zip(pictures, hits.ids, hits.scores, strict=True):
        found = ids >= 0
        metadata = index.metadata_of(ids[found])
        entries = [
            {"id": int(identifier), "score": round(float(score), 6), **row}
            for identifier, score, row in zip(ids[found], scores[found], metadata, strict=True)
        ]
        answers.append({"picture": str(picture), "hits": entries})
    return answers


def _decode(path: Path) -> Any:
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except DecodeError as error:
        raise DataError(f"{path}: {error}") from error
