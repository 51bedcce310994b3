"""FAISS indexes as files of a version: `index.faiss`, and beside it the memory-mapped partitions of an IVF index."""

from pathlib import Path
from typing import Any

from lookalike.errors import DamagedArtifact
from lookalike.native_libraries import load_faiss

FAISS_NAME = "index.faiss"
LISTS_NAME = "lists.ivfdata"


def write_faiss_index(index: Any, path: Path) -> None:
    """Raises OSError where the disk has no room."""
    faiss = load_faiss()
    # Writing a file by itself, faiss (1.15) only prints that the last bytes found no room, and leaves them out.
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read_faiss_index(folder: Path) -> Any:
    """The index in `folder`; labels are ids. IVF partitions are mapped read-only, nothing of them is loaded.

    Raises:
        DamagedArtifact: a file is missing, or faiss cannot read it.
    """
    faiss = load_faiss()
    path, lists_path = folder / FAISS_NAME, folder / LISTS_NAME
    if not path.exists():
        raise DamagedArtifact(f"{path} is missing. Build the index again.")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_SKIP_IVF_DATA)
        if isinstance(index, faiss.IndexIVF):
            lists = faiss.downcast_InvertedLists(index.invlists)
            # The file of the lists has a relative name in the index; faiss's own flag for that prints to stdout.
            if not lists_path.exists() or lists_path.stat().st_size < lists.totsize:
                raise DamagedArtifact(f"{lists_path} is missing or cut short. Build the index again.")
            lists.filename = str(lists_path)
            lists.do_mmap()
    except RuntimeError as error:
        raise DamagedArtifact(f"{path} cannot be read by faiss. Build the index again.") from error
    return index
