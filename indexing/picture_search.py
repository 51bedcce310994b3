"""Picture files -> hits with their metadata: what `lookalike search` prints."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray

from data_pipelines.decode import decode_image
from data_pipelines.transforms import EvaluationTransform
from indexing.living.live_view import LiveView
from indexing.reranking.registry import search_and_rerank
from indexing.reranking.settings import RerankSettings
from lookalike.encoder import embed_pixels
from lookalike.errors import DataError, DecodeError, SettingsError
from lookalike.records import SearchHits, SearchParameters

_BATCH_SIZE = 64


def search_with_pictures(
    view: LiveView,
    pictures: Sequence[Path],
    parameters: SearchParameters,
    *,
    rerank_by: RerankSettings | None = None,
) -> list[dict[str, Any]]:
    """One answer per picture: `{"picture", "hits": [{"id", "score", "key", "class_name", ...}]}`.

    Raises:
        DataError: a file cannot be read or is not a picture; the message names it.
        SettingsError: the filter does not go with the metadata of the index.
    """
    # However many are asked for, no more are made room for than there are.
    parameters = replace(parameters, k=min(parameters.k, max(view.num_vectors, 1)))
    encoder = view.base.load_encoder()
    transform = EvaluationTransform(encoder.settings.input)
    answers = []
    for start in range(0, len(pictures), _BATCH_SIZE):
        chunk = pictures[start : start + _BATCH_SIZE]
        pixels = [transform(_decode(path)) for path in chunk]
        batches = [np.stack(list(group)) for _, group in groupby(pixels, key=lambda picture: picture.shape)]
        vectors = [embed_pixels(encoder, torch.from_numpy(batch)).numpy() for batch in batches]
        hits = _search(view, np.concatenate(vectors), parameters, rerank_by)
        answers += _answers(view, chunk, hits)
    return answers


def _search(
    view: LiveView,
    vectors: Float32[ndarray, "pictures dim"],
    parameters: SearchParameters,
    rerank_by: RerankSettings | None,
) -> SearchHits:
    try:
        if rerank_by is not None:
            return search_and_rerank(view, vectors, parameters, rerank_by)
        return view.search(vectors, parameters)
    except ValueError as error:
        # The encoder's vectors are fit to be searched for, so it is the filter.
        raise SettingsError(f"{error}.") from error


def _answers(view: LiveView, pictures: Sequence[Path], hits: SearchHits) -> list[dict[str, Any]]:
    answers = []
    for picture, ids, scores in zip(pictures, hits.ids, hits.scores, strict=True):
        found = ids >= 0
        metadata = view.metadata_of(ids[found])
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
