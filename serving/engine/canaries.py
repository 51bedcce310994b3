"""Does a version's encoder still give the version's vectors? Canary pictures are embedded again before it serves."""

from collections.abc import Callable

import numpy as np

from data_pipelines.decode import ANY_PICTURE, decode_image
from data_pipelines.transforms import EvaluationTransform
from indexing.published_index import PublishedIndex
from lookalike.errors import DecodeError, ManifestMismatch
from serving.engine.embedder import Embedder

LEAST_COSINE = 0.999  # of one picture embedded twice: other devices and precisions stay well above


def require_same_vectors(index: PublishedIndex, encoder: Embedder, picture_of: Callable[[int], bytes | None]) -> int:
    """Embeds the canaries whose pictures are at hand, and returns how many these are.

    In a version that is as it was built from an embedding set, each of them must give its vector. After additions and
    replacements, an id may have been given another picture since: then most of them must.

    Raises:
        ManifestMismatch: the encoder, its transform or its whitening are not those that made the vectors.
    """
    is_as_embedded = "embeddings" in index.manifest.parents
    transform = EvaluationTransform(encoder.input)
    cosines: dict[int, float] = {}
    for identifier in index.manifest.details["canary_ids"]:
        picture = picture_of(identifier)
        if picture is None:
            continue
        try:
            pixels = transform(decode_image(picture, limits=ANY_PICTURE))
        except DecodeError:
            continue  # `index check` tells of damaged shards; this is about the encoder
        [vector], [stored] = encoder.embed([pixels]), index.vectors_of(np.array([identifier], np.int64))
        lengths = np.linalg.norm(vector) * np.linalg.norm(stored)
        cosines[identifier] = float(vector @ stored / lengths) if lengths else 0.0
    different = {identifier: cosine for identifier, cosine in cosines.items() if not cosine >= LEAST_COSINE}
    allowed = 0 if is_as_embedded else len(cosines) // 2
    if len(different) > allowed:
        identifier, cosine = min(different.items(), key=lambda pair: pair[1])
        made_by = str(index.manifest.details["encoder_fingerprint"])[:12]
        loaded = f"{encoder.fingerprint[:12]}, with transform {encoder.input.fingerprint[:12]}"
        raise ManifestMismatch(
            f"index {index.folder} says that encoder {made_by} made its vectors, but encoder {loaded}, loaded from it, "
            f"gives other ones: {len(different)} of {len(cosines)} canary pictures differ, id {identifier} by a cosine "
            f"of {cosine:.4f} where at least {LEAST_COSINE} is expected. Embed the pictures and build the index "
            "again, or serve another version."
        )
    return len(cosines)
