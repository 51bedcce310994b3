"""A small real index, made by the real chain: pictures -> shards -> embeddings -> index."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.sources.embeddings import EmbeddingSource
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings

COLOURS = ("tomato", "gold", "teal", "orchid", "black", "silver")
SHAPES = ("disc", "square", "ring", "triangle")
NUM_PICTURES = len(COLOURS) * len(SHAPES)
LOCAL = "http://localhost"  # How clients address a server that listens on this machine only.


@dataclass(frozen=True, slots=True)
class SmallIndex:
    pictures: Path
    shards: Path
    index: Path


def draw(shape: str, colour: str, *, side: int = 96) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    pen, low, high = ImageDraw.Draw(picture), side // 5, side - side // 5
    match shape:
        case "disc":
            pen.ellipse((low, low, high, high), fill=colour)
        case "square":
            pen.rectangle((low, low, high, high), fill=colour)
        case "ring":
            pen.ellipse((low, low, high, high), outline=colour, width=side // 8)
        case "triangle":
            pen.polygon(((side // 2, low), (low, high), (high, high)), fill=colour)
    return picture


def make_small_index(folder: Path) -> SmallIndex:
    """One class per shape, one picture per colour; weights are random but always the same."""
    made = SmallIndex(folder / "pictures", folder / "shards", folder / "index")
    for shape in SHAPES:
        (made.pictures / shape).mkdir(parents=True)
        for colour in COLOURS:
            # Two formats, so that media types are told apart.
            suffix = "jpg" if colour == "gold" else "png"
            draw(shape, colour).save(made.pictures / shape / f"{colour}.{suffix}")
    write_shards(ClassFolders(ClassFoldersSettings(folder=made.pictures)), made.shards, ShardSettings()).close()
    add_version(made, folder / "embeddings", seed=0)
    return made


def add_version(made: SmallIndex, embeddings: Path, *, seed: int) -> None:
    """The next version of the index, by an encoder of random weights; `embeddings` is made for them."""
    torch.manual_seed(seed)
    encoder = create_encoder(EncoderSettings(backbone="resnet10t", input=InputSettings(size=32)))
    with ShardSet.open(made.shards) as shard_set:
        build_index(EmbeddingSource(embed_shards(encoder, shard_set, embeddings)), made.index)
