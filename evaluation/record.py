"""The protocol record: all that decides a score besides the vectors, stored with every result.

Numbers of two papers often differ by a crop, a size or a lost picture that neither mentions. So every field is always
there; what nobody told us is "unknown".
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from indexing.searching.recall_curve import effort_to_tree, measured_depths, measured_for
from lookalike.api_answers import ServerInfo
from lookalike.artifacts import Manifest, versions
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ManifestMismatch
from lookalike.records import SearchParameters

UNKNOWN = "unknown"
NONE = "none"
FLOAT32_INNER_PRODUCT = "inner product in float32"

Role = Literal["queries", "gallery", "distractors"]


@dataclass(frozen=True)
class PictureCounts:
    """Of one role; None where nobody can know."""

    expected: int | None  # by the benchmark's definition
    found: int  # have a vector
    failed: int | None  # were there and got no vector; of bare descriptors it is not known


@dataclass(frozen=True)
class ProtocolRecord:
    """How a score came about. Fingerprints and checksums are SHA-256 in hexadecimal."""

    benchmark: str
    protocol: str  # a sentence: who searches where, and what counts as found
    ground_truth: str  # checksum of its file, or fingerprint of the shard set whose classes are the truth
    counts: Mapping[Role, PictureCounts]
    vector_dtypes: Mapping[Role, str]  # as stored; "mixed" where files differ
    similarity: str
    ties: str
    num_distractors: int
    crop: str  # which region of a query's picture is the query
    scales: Sequence[float] | str
    scale_pooling: str  # how the vectors of several scales became one
    input_size: str
    interpolation: str
    whitening: str
    encoder_fingerprint: str
    transform_fingerprint: str
    index_fingerprint: str  # "none" where every vector was compared
    index_type: str
    search_parameters: Mapping[str, Any] | str
    shards: Mapping[Role, str] | str  # fingerprints
    files: Sequence[Mapping[str, Any]]  # where the vectors came from
    versions: Mapping[str, str]  # of this code and its libraries, when the score was computed

    def as_json(self) -> dict[str, Any]:
        tree = asdict(self)
        for counts in tree["counts"].values():
            counts.update({name: UNKNOWN for name, value in counts.items() if value is None})
        return {name: list(value) if isinstance(value, tuple) else value for name, value in tree.items()}


def record_of_files(
    benchmark: str,
    protocol: str,
    files: Mapping[Role, Sequence[Mapping[str, Any]]],
    *,
    ground_truth: str,
    ties: str,
    expected: Mapping[Role, int] | None = None,
    similarity: str = FLOAT32_INNER_PRODUCT,
) -> ProtocolRecord:
    """Of bare descriptors: what made them is unknown.

    Args:
        files: What identifies each file of a role, with at least `dtype` and `shape` of its rows.
        ground_truth: Checksum of its file.
        expected: Pictures that the benchmark prescribes, per role.
    """
    rows = {role: sum(int(file["shape"][0]) for file in own) for role, own in files.items()}
    dtypes = {role: sorted({str(file["dtype"]) for file in own}) for role, own in files.items()}
    return ProtocolRecord(
        benchmark=benchmark,
        protocol=protocol,
        ground_truth=ground_truth,
        counts={role: PictureCounts((expected or {}).get(role), found, None) for role, found in rows.items()},
        vector_dtypes={role: _one_of(found) for role, found in dtypes.items()},
        similarity=similarity,
        ties=ties,
        num_distractors=rows.get("distractors", 0),
        crop=UNKNOWN,
        scales=UNKNOWN,
        scale_pooling=UNKNOWN,
        input_size=UNKNOWN,
        interpolation=UNKNOWN,
        whitening=UNKNOWN,
        encoder_fingerprint=UNKNOWN,
        transform_fingerprint=UNKNOWN,
        index_fingerprint=NONE,
        index_type=NONE,
        search_parameters=NONE,
        shards=UNKNOWN,
        files=[{"role": role, **file} for role, own in files.items() for file in own],
        versions=versions(),
    )


def record_of_embeddings(
    benchmark: str,
    protocol: str,
    embeddings: Mapping[Role, Manifest],
    encoder: EncoderSettings,
    *,
    ground_truth: str,
    ties: str,
    crop: str,
    expected: Mapping[Role, int] | None = None,
    index: Manifest | None = None,
    search: SearchParameters | None = None,
    similarity: str = FLOAT32_INNER_PRODUCT,
) -> ProtocolRecord:
    """Of embedding sets made here, ranked by brute force or by an index.

    Args:
        embeddings: Manifest of the embedding set of each role.
        encoder: What made all of them.
        crop: Which region of a query's picture was embedded, a sentence.
        index: Manifest of the index that ranked; `search` says how it was asked.

    Raises:
        ManifestMismatch: sets, index and encoder do not belong together.
        ValueError: `search` without `index`, or the other way round; or no set at all.
    """
    if (index is None) != (search is None):
        raise ValueError("an index and its search parameters are recorded together")
    if index is not None and index.parents["embeddings"] != embeddings["gallery"].fingerprint:
        raise ManifestMismatch(
            f"the index holds embedding set {index.parents['embeddings'][:12]}, the gallery is "
            f"{embeddings['gallery'].fingerprint[:12]}. Build the index from the gallery."
        )
    made_of = {str(role): manifest.details for role, manifest in embeddings.items()}
    if index is not None:
        made_of["index"] = index.details
    encoder_fingerprint = _common("encoder_fingerprint", made_of)
    transform_fingerprint = _common("transform_fingerprint", made_of)
    if transform_fingerprint != encoder.input.fingerprint:
        raise ManifestMismatch(
            f"the vectors were made with transform {transform_fingerprint[:12]}, the encoder's settings describe "
            f"{encoder.input.fingerprint[:12]}. Read the settings stored with the embedding set."
        )
    return ProtocolRecord(
        benchmark=benchmark,
        protocol=protocol,
        ground_truth=ground_truth,
        counts={
            role: PictureCounts(
                (expected or {}).get(role), manifest.details["num_vectors"], manifest.details["num_skipped"]
            )
            for role, manifest in embeddings.items()
        },
        vector_dtypes={role: manifest.settings["storage"] for role, manifest in embeddings.items()},
        similarity=similarity,
        ties=ties,
        num_distractors=embeddings["distractors"].details["num_vectors"] if "distractors" in embeddings else 0,
        crop=crop,
        scales=list(encoder.input.scales),
        scale_pooling=encoder.input.scale_pooling if len(encoder.input.scales) > 1 else NONE,
        input_size=input_size_rule(encoder.input),
        interpolation=f"{encoder.input.interpolation}, antialiased",
        whitening=whitening_rule(embeddings["gallery"].details.get("whitening"), encoder),
        encoder_fingerprint=encoder_fingerprint,
        transform_fingerprint=transform_fingerprint,
        index_fingerprint=index.fingerprint if index else NONE,
        index_type=index.details["type"] if index else NONE,
        search_parameters=_resolved(search, index) if search and index else NONE,
        shards={role: manifest.parents["shards"] for role, manifest in embeddings.items()},
        files=[{"role": role, "embedding_set": manifest.fingerprint} for role, manifest in embeddings.items()],
        versions=versions(),
    )


def input_size_rule(settings: InputSettings) -> str:
    """A sentence for `size`, `resize_to` and `max_side`."""
    if settings.max_side is not None:
        return f"longer side reduced to {settings.max_side} pixels, shape kept, never enlarged"
    if settings.resize_to is not None:
        return f"shorter side resized to {settings.resize_to} pixels, centre square of {settings.size}"
    return f"resized to a square of {settings.size} pixels"


def whitening_rule(settings: Mapping[str, Any] | None, encoder: EncoderSettings) -> str:
    """A sentence for the whitening that an embedding set names, None where it names none."""
    if settings is not None:
        kept = "all that vary" if settings["dim"] is None else settings["dim"]
        return (
            f"{settings['method']}, dimensions kept: {kept}, shrinkage {settings['shrinkage']}, variance to the power "
            f"{settings['power']}"
        )
    return "none after the encoder" + (", whose last layer is linear" if encoder.projection_dim else "")


def _resolved(search: SearchParameters, index: Manifest) -> dict[str, Any]:
    """What a search came to, as `SearchParameters` and the measured curve of the index decide it.

    Raises:
        ValueError: the search looks at parts of the index only.
    """
    if search.filter is not None or search.among is not None:
        raise ValueError("a benchmark ranks the whole gallery; filters and selections have no place in its record")
    measured = measured_for(search.k, measured_depths(index.details))
    effort = search.effort or measured.default_effort
    is_exact = search.exact
    if search.effort is None and search.recall is not None and not is_exact:
        wished = measured.curve.effort_for(search.recall)
        is_exact, effort = wished is None, wished or effort
    return {"k": search.k, "exact": is_exact, **({} if is_exact else {"effort": effort_to_tree(effort)})}


def _one_of(dtypes: Sequence[str]) -> str:
    return "mixed" if len(dtypes) > 1 else next(iter(dtypes), NONE)


def _common(name: str, made_of: Mapping[str, Mapping[str, Any]]) -> str:
    if not made_of:
        raise ValueError("a record needs an embedding set")
    found = {role: str(details[name]) for role, details in made_of.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{role} {value[:12]}" for role, value in found.items())
        raise ManifestMismatch(
            f"vectors that are compared need one {name.replace('_', ' ')}, found {listed}. Embed all with one encoder."
        )
    return next(iter(found.values()))


def record_of_server(
    benchmark: str,
    protocol: str,
    info: ServerInfo,
    *,
    url: str,
    num_queries: int,
    ground_truth: str,
    crop: str,
    k: int,
    is_exact: bool,
    num_distractors: int,
) -> ProtocolRecord:
    """Of a running server: what it says of itself, and how it was asked."""
    gallery = PictureCounts(None, info.num_vectors - num_distractors, None)
    return ProtocolRecord(
        benchmark=benchmark,
        protocol=protocol,
        ground_truth=ground_truth,
        counts={"queries": PictureCounts(None, num_queries, 0), "gallery": gallery},
        vector_dtypes={},
        similarity="cosine, computed by the server",
        ties="by id, as the server orders them",
        num_distractors=num_distractors,
        crop=crop,
        scales=UNKNOWN,
        scale_pooling=UNKNOWN,
        input_size=UNKNOWN,
        interpolation=UNKNOWN,
        whitening=UNKNOWN,
        encoder_fingerprint=info.encoder_fingerprint or UNKNOWN,
        transform_fingerprint=UNKNOWN,
        index_fingerprint=info.index_fingerprint,
        index_type=info.index_type,
        search_parameters={"k": k, "exact": is_exact},
        shards=UNKNOWN,
        files=[{"url": url, "index_version": info.index_version}],
        versions=versions(),
    )
