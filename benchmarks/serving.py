"""What an answer costs over HTTP: searches by vector, and by picture with many clients, on loopback.

python benchmarks/serving.py            # 100,000 x 512, some minutes
python benchmarks/serving.py --save     # and writes it to benchmarks/results/serving_cpu.md
python benchmarks/serving.py --vectors 20000 --requests 2000 --backbone resnet18     # a quick look
python benchmarks/serving.py --views 20         # hits beyond the 20th are mere noise: to find them is most of the work

The server is a process of its own, and its CPU time is what the kernel says; the clients are this process. Where both
share few cores, clients take theirs from the server: CPU time per request stays what it is, requests per second do not.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lookalike.native_libraries import num_cores, set_thread_policy

set_thread_policy()  # before numpy and torch: threads that wait would spin, and count as work

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from frozen_backbone import footer
from live_index import views_of
from numpy import ndarray
from PIL import Image

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from indexing.sources.embeddings import EmbeddingSource
from lookalike.encoder import create_encoder, embed_pixels
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.native_libraries import load_torch

RESULT = Path(__file__).parent / "results" / "serving_cpu.md"
NUM_HITS = 100
NUM_WARM_UP = 12_500  # after some 10,000 the allocator has all it will ever have for its threads
PICTURE_CLIENTS = 32
NUM_PICTURES = 64
PICTURE_ROUNDS = 5
SIZES_ALONE, PICTURES_ALONE = (8, 32), 128  # processors prefer small batches; the better of the two counts
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--views", type=int, default=200, help="vectors of each landmark, as many as deserve a hit")
    parser.add_argument("--type", default="IVF1024,SQ8")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--pictures", type=int, default=640, help="picture queries")
    parser.add_argument("--save", action="store_true", help=f"write to {RESULT.parent.name}/{RESULT.name} too")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lines = ["# Serving on loopback", ""]
        lines += by_vector(
            Path(folder), (arguments.vectors, arguments.dim), arguments.views, arguments.type, arguments.requests
        )
        lines += ["", *by_picture(Path(folder), arguments.backbone, arguments.pictures)]
    lines += ["", *footer(time.perf_counter() - started, threads=num_cores())]
    print("\n".join(lines))
    if arguments.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def by_vector(folder: Path, shape: tuple[int, int], views: int, index_type: str, num_requests: int) -> list[str]:
    num_vectors, dim = shape
    queries = build_vectors(folder, num_vectors, dim, views, index_type)
    as_json = [json_request(query) for query in queries]
    as_bytes = [bytes_request(query) for query in queries]
    with serving(folder / "vectors") as server:
        warm_up = asyncio.run(ask(server, as_json, num_requests=NUM_WARM_UP, num_clients=16))
        warm_bytes = server.resident_bytes()
        rows = [
            ("JSON, 1 client", asyncio.run(ask(server, as_json, num_requests=num_requests // 5, num_clients=1))),
            ("JSON, 16 clients", asyncio.run(ask(server, as_json, num_requests=num_requests, num_clients=16))),
        ]
        grown_bytes = server.resident_bytes() - warm_bytes
        load = asyncio.run(ask(server, as_bytes, num_requests=num_requests // 2, num_clients=16))
        rows += [("bytes, 16 clients", load)]
        answer_bytes = warm_up.answer_bytes
    lines = [
        f"## By vector: {num_vectors:,} x {dim}, {index_type}, {NUM_HITS} hits with 6 columns of metadata",
        "",
        f"One server process. {views} vectors of each landmark. An answer has {answer_bytes / 1024:.0f} KiB.",
        "",
        "| | requests | CPU ms per request | requests/s per core | requests/s | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
        *(row_of(name, load) for name, load in rows),
        "",
        f"Memory of the server after {NUM_WARM_UP:,} requests: {warm_bytes / 2**20:.0f} MiB; after "
        f"{sum(load.num_requests for _, load in rows[:2]):,} more: {grown_bytes / 2**20:+.1f} MiB.",
    ]
    return lines


def by_picture(folder: Path, backbone: str, num_requests: int) -> list[str]:
    pictures = build_pictures(folder, backbone)
    requests = [picture_request(picture) for picture in pictures]
    with serving(folder / "pictures") as server:
        asyncio.run(ask(server, requests, num_requests=2 * PICTURE_CLIENTS, num_clients=PICTURE_CLIENTS))
        # In turns, so that other work on the machine holds up both.
        alone, loads = [], []
        for _ in range(PICTURE_ROUNDS):
            alone += [embed_alone(backbone, size) for size in SIZES_ALONE]
            num_asked = num_requests // PICTURE_ROUNDS
            loads.append(asyncio.run(ask(server, requests, num_requests=num_asked, num_clients=PICTURE_CLIENTS)))
    by_size = [median_of([load for load in alone if len(load.latencies) == PICTURES_ALONE // n]) for n in SIZES_ALONE]
    encoder, served = max(by_size, key=lambda load: load.rate), median_of(loads)
    rows = (
        (f"the encoder alone, in batches of {PICTURES_ALONE // len(encoder.latencies)}", encoder),
        ("the server, with decoding, searching and HTTP", served),
    )
    return [
        f"## By picture: {backbone} at 224 pixels, JPEGs of 320 x 320 pixels, {PICTURE_CLIENTS} clients",
        "",
        f"The medians of {PICTURE_ROUNDS} rounds, in turns; the encoder in the better of batches of {SIZES_ALONE}.",
        "",
        "| | pictures/s | CPU ms per picture | p50 ms | p99 ms |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {load.rate:.1f} | {1000 * load.cpu_seconds / load.num_requests:.1f} | "
            f"{load.percentile(50):.0f} | {load.percentile(99):.0f} |"
            for name, load in rows
        ),
        "",
        f"The server reaches {served.rate / encoder.rate:.0%} of the encoder's own rate. The clients are this program,",
        "on the same cores.",
    ]


# What is measured


@dataclass(frozen=True, slots=True)
class Load:
    num_requests: int
    seconds: float
    cpu_seconds: float  # of the server
    latencies: ndarray  # in seconds
    answer_bytes: int  # of the last answer

    @property
    def rate(self) -> float:
        return self.num_requests / self.seconds

    def percentile(self, share: float) -> float:
        """In milliseconds."""
        return 1000 * float(np.percentile(self.latencies, share))


def median_of(loads: Sequence[Load]) -> Load:
    return sorted(loads, key=lambda load: load.rate)[len(loads) // 2]


def row_of(name: str, load: Load) -> str:
    per_request = load.cpu_seconds / load.num_requests
    return (
        f"| {name} | {load.num_requests:,} | {1000 * per_request:.2f} | {1 / per_request:,.0f} | {load.rate:,.0f} | "
        f"{load.percentile(50):.1f} | {load.percentile(99):.1f} |"
    )


@dataclass(frozen=True, slots=True)
class Server:
    process_id: int
    port: int

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def resident_bytes(self) -> int:
        """Without what is mapped from files: the index, which lies in the page cache."""
        _, resident, shared, *_ = map(int, Path(f"/proc/{self.process_id}/statm").read_text().split())
        return (resident - shared) * _PAGE_BYTES


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    settings = folder / "serving.json"  # JSON is YAML
    tree: dict[str, Any] = {"index": str(folder / "index"), "port": 0, "observability": {"canary_seconds": None}}
    settings.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "lookalike", "serve", "--settings", str(settings), "--json"]
    # From there, because in this folder `serving` is this script.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        yield Server(process.pid, json.loads(process.stdout.readline())["port"])
        process.terminate()


async def ask(server: Server, requests: Sequence[bytes], *, num_requests: int, num_clients: int) -> Load:
    """Each client keeps one connection, and asks again as soon as it is answered."""
    latencies: list[float] = []
    remaining = iter(range(num_requests))
    sizes: list[int] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for number in remaining:
            started = time.perf_counter()
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - started)
            sizes.append(length)
        writer.close()

    cpu_before, started = server.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*[client() for _ in range(num_clients)])
    seconds = time.perf_counter() - started
    return Load(num_requests, seconds, server.cpu_seconds() - cpu_before, np.array(latencies), sizes[-1])


def json_request(vector: ndarray) -> bytes:
    encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return request("/v1/search", "application/json", json.dumps({"vector": encoded, "k": NUM_HITS}).encode())


def bytes_request(vector: ndarray) -> bytes:
    return request(f"/v1/search?k={NUM_HITS}", "application/octet-stream", vector.astype("<f4").tobytes())


def picture_request(picture: bytes) -> bytes:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    return request("/v1/search", "multipart/form-data; boundary=x", part)


def request(path: str, media_type: str, body: bytes) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {media_type}", f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


# What is served


def build_vectors(folder: Path, num_vectors: int, dim: int, views: int, index_type: str) -> ndarray:
    """Returns queries."""
    folder = folder / "vectors"
    folder.mkdir()
    generator = np.random.default_rng(0)
    landmarks = generator.standard_normal((num_vectors // views, dim), dtype=np.float32)
    numbers = np.arange(num_vectors) // views
    np.save(folder / "vectors.npy", views_of(landmarks, numbers, generator))
    table = {
        "key": [f"landmark_{number}/view_{row}" for row, number in enumerate(numbers.tolist())],
        "class_name": [f"landmark {number}" for number in numbers.tolist()],
        "label": numbers,
        "split": ["index"] * num_vectors,
        "width": np.full(num_vectors, 640),
        "height": np.full(num_vectors, 480),
    }
    pq.write_table(pa.table(table), folder / "metadata.parquet")
    source = ArraySource(folder / "vectors.npy", metadata=folder / "metadata.parquet")
    build_index(source, folder / "index", IndexSettings(type=index_type))
    return views_of(landmarks, generator.integers(0, len(landmarks), 1000), generator)


def build_pictures(folder: Path, backbone: str) -> list[bytes]:
    """Returns pictures."""
    folder = folder / "pictures"
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(NUM_PICTURES):
        noise = generator.integers(0, 256, (20, 20, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
        place = folder / "files" / f"class_{number % 4}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.getvalue())
        pictures.append(file.getvalue())
    source = ClassFolders(ClassFoldersSettings(folder=folder / "files"))
    shards = write_shards(source, folder / "shards", ShardSettings())
    load_torch()
    encoder = create_encoder(EncoderSettings(backbone=backbone, input=InputSettings(size=224)))
    with ShardSet.open(shards.folder) as shard_set:
        embeddings = embed_shards(encoder, shard_set, folder / "embeddings")
    build_index(EmbeddingSource(embeddings), folder / "index", IndexSettings(type="Flat"))
    return pictures


def embed_alone(backbone: str, batch_size: int) -> Load:
    """By the encoder alone, in this process; latencies are those of whole batches."""
    torch = load_torch()
    encoder = create_encoder(EncoderSettings(backbone=backbone, input=InputSettings(size=224)))
    pixels = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8)
    embed_pixels(encoder, pixels)
    cpu_before, latencies = time.process_time(), []
    for _ in range(PICTURES_ALONE // batch_size):
        started = time.perf_counter()
        embed_pixels(encoder, pixels)
        latencies.append(time.perf_counter() - started)
    return Load(PICTURES_ALONE, sum(latencies), time.process_time() - cpu_before, np.array(latencies), 0)


if __name__ == "__main__":
    main()
