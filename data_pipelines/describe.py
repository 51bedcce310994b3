"""What is in a shard set: counts, sizes and a look at the pictures, as text, JSON or one HTML page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
import numpy as np
from pyarrow import compute, parquet

from data_pipelines.decode import decode_image
from data_pipelines.shard_set import QUARANTINE_NAME, ShardSet

_THUMBNAIL_SIDE = 112
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class SplitDescription:
    name: str
    num_images: int
    num_classes: int
    num_shards: int
    num_bytes: int  # of the pictures


@dataclass(frozen=True, slots=True)
class Description:
    folder: str
    fingerprint: str
    splits: tuple[SplitDescription, ...]
    class_sizes: dict[str, int]  # "4-7" -> how many classes have 4 to 7 pictures
    widths: tuple[int, ...]  # pixels: smallest, quartiles, largest
    heights: tuple[int, ...]
    extensions: dict[str, int]
    quarantined: dict[str, int]  # by reason

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    caption: str
    data_uri: str


def describe_shard_set(shard_set: ShardSet) -> Description:
    """Reads the tables only."""
    samples = shard_set.samples
    return Description(
        folder=str(shard_set.folder),
        fingerprint=shard_set.fingerprint,
        splits=tuple(_describe_split(shard_set, split) for split in shard_set.splits),
        class_sizes=_class_size_histogram(shard_set),
        widths=_quantiles(samples["width"].to_numpy()),
        heights=_quantiles(samples["height"].to_numpy()),
        extensions=_counts(samples["extension"].to_pylist()),
        quarantined=_counts(parquet.read_table(shard_set.folder / QUARANTINE_NAME)["reason"].to_pylist()),
    )


def text_lines(description: Description) -> list[str]:
    """The description for a terminal."""
    largest = max(description.class_sizes.values(), default=0)
    return [
        f"{description.folder}, fingerprint {description.fingerprint[:12]}",
        *(
            f"  {split.name}: {split.num_images:,} images of {split.num_classes:,} classes, "
            f"{split.num_bytes / 2**20:,.1f} MiB in {split.num_shards} shards"
            for split in description.splits
        ),
        "images per class:",
        *(
            f"  {sizes:>11} {count:>7,} classes {'#' * math.ceil(40 * count / largest)}"
            for sizes, count in description.class_sizes.items()
        ),
        f"width  (smallest, quartiles, largest): {', '.join(map(str, description.widths))}",
        f"height (smallest, quartiles, largest): {', '.join(map(str, description.heights))}",
        f"formats: {_listed(description.extensions)}",
        f"quarantined: {_listed(description.quarantined) or 'none'}",
    ]


def html_page(description: Description, thumbnails: Sequence[Thumbnail]) -> str:
    """One self-contained page: it loads nothing from anywhere."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        description=description,
        thumbnails=thumbnails,
        formats=_listed(description.extensions),
        quarantined=_listed(description.quarantined),
        largest_count=max(description.class_sizes.values(), default=1),
        side=_THUMBNAIL_SIDE,
    )


def contact_sheet(shard_set: ShardSet, *, num_pictures: int = 60, seed: int = 0) -> list[Thumbnail]:
    """Small JPEGs of randomly chosen pictures, in row order."""
    random = np.random.default_rng(seed)
    rows = random.choice(shard_set.num_samples, min(num_pictures, shard_set.num_samples), replace=False)
    return [_thumbnail(shard_set, row) for row in sorted(rows.tolist())]


def _thumbnail(shard_set: ShardSet, row: int) -> Thumbnail:
    image = decode_image(shard_set.read_bytes(row), limits=shard_set.decode_limits)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data_uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(shard_set.samples["class_name"][row].as_py() or shard_set.key(row), data_uri)


def _describe_split(shard_set: ShardSet, split: str) -> SplitDescription:
    samples = shard_set.samples.filter(compute.equal(shard_set.samples["split"], split))
    return SplitDescription(
        name=split,
        num_images=samples.num_rows,
        num_classes=compute.count_distinct(samples["class_name"]).as_py(),
        num_shards=len(shard_set.shards_of(split)),
        num_bytes=compute.sum(samples["size"]).as_py(),
    )


def _class_size_histogram(shard_set: ShardSet) -> dict[str, int]:
    """Classes by number of pictures, in ranges that double."""
    sizes = np.bincount(shard_set.labels[shard_set.labels >= 0])
    bins: list[int] = np.bincount(np.log2(sizes[sizes > 0]).astype(np.int64)).tolist()
    return {f"{2**power}-{2 ** (power + 1) - 1}" if power else "1": count for power, count in enumerate(bins)}


def _quantiles(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in np.quantile(values, _QUANTILES))


def _counts(values: Sequence[str]) -> dict[str, int]:
    names, counts = np.unique(np.array(values, dtype=object).astype(str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ description.folder }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.1rem; margin-top: 2rem; }
  table { border-collapse: collapse; }
  th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
  th:first-child, td:first-child { text-align: left; }
  td.bar { width: 20rem; }
  td.bar div { height: .8rem; background: #4a7bd0; border-radius: 2px; }
  .sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax({{ side }}px, 1fr)); gap: .8rem; }
  figure { margin: 0; text-align: center; }
  figcaption { font-size: .75rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Shard set {{ description.folder }}</h1>
<p>Fingerprint <code>{{ description.fingerprint[:12] }}</code></p>
<h2>Splits</h2>
<table>
<tr><th>split</th><th>images</th><th>classes</th><th>shards</th><th>MiB</th></tr>
{% for split in description.splits -%}
<tr><td>{{ split.name }}</td><td>{{ "{:,}".format(split.num_images) }}</td>
<td>{{ "{:,}".format(split.num_classes) }}</td><td>{{ split.num_shards }}</td>
<td>{{ "{:,.1f}".format(split.num_bytes / 1048576) }}</td></tr>
{% endfor -%}
</table>
{% if description.class_sizes -%}
<h2>Images per class</h2>
<table>
<tr><th>images</th><th>classes</th><th></th></tr>
{% for sizes, count in description.class_sizes.items() -%}
<tr><td>{{ sizes }}</td><td>{{ "{:,}".format(count) }}</td>
<td class="bar"><div style="width: {{ 100 * count / largest_count }}%"></div></td></tr>
{% endfor -%}
</table>
{% endif -%}
<h2>Pictures</h2>
<table>
<tr><th>pixels</th><th>smallest</th><th>first quartile</th><th>median</th><th>third quartile</th><th>largest</th></tr>
<tr><td>width</td>{% for value in description.widths %}<td>{{ value }}</td>{% endfor %}</tr>
<tr><td>height</td>{% for value in description.heights %}<td>{{ value }}</td>{% endfor %}</tr>
</table>
<p>Formats: {{ formats }}. Quarantined: {{ quarantined or "none" }}.</p>
<h2>A few of them</h2>
<div class="sheet">
{% for thumbnail in thumbnails -%}
<figure><img src="{{ thumbnail.data_uri }}" alt=""><figcaption>{{ thumbnail.caption }}</figcaption></figure>
{% endfor -%}
</div>
</body>
</html>
"""
