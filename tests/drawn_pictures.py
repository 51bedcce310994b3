"""Small pictures drawn by seed: a class is a shape in a colour; its pictures differ in place, size and background."""

import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 48


def draw_picture(label: int, variant: int) -> Image.Image:
    style = random.Random(label)
    own = random.Random(label * 1000 + variant)
    colour = tuple(style.randrange(256) for _ in range(3))
    num_corners, turn = style.randrange(3, 9), style.randrange(360)
    image = Image.new("RGB", (SIDE, SIDE), tuple(own.randrange(200, 256) for _ in range(3)))
    centre = (own.randrange(18, 30), own.randrange(18, 30))
    ImageDraw.Draw(image).regular_polygon((*centre, own.randrange(12, 18)), num_corners, rotation=turn, fill=colour)
    return image


def draw_class_folders(folder: Path, labels: Iterable[int], *, pictures_per_class: int) -> None:
    for label in labels:
        (folder / f"class{label:02d}").mkdir(parents=True)
        for variant in range(pictures_per_class):
            draw_picture(label, variant).save(folder / f"class{label:02d}" / f"{variant}.png")
