"""The ground truth of revisited Oxford and Paris as its authors' MATLAB file, where positions count from 1."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.sources.mat_files import read_mat


def read_mat_ground_truth(file: Path) -> dict[str, Any]:
    """A MATLAB file's cells and structs as the pickle's lists and dicts; lists of one arrive there as their element.

    Raises:
        DataError: it cannot be read.
        KeyError, TypeError, ValueError: it holds something else.
    """
    contents = read_mat(file)
    names = {name: [str(entry) for entry in np.ravel(contents[name])] for name in ("imlist", "qimlist")}
    structs = np.ravel(contents["gnd"])
    gnd = [
        {
            "bbx": np.ravel(struct["bbx"]).astype(np.float64).tolist(),
            **{name: _positions_from_0(struct[name]) for name in ("easy", "hard", "junk")},
        }
        for struct in structs
    ]
    return {**names, "gnd": gnd}


def _positions_from_0(positions: Any) -> list[int]:
    whole = np.ravel(positions).astype(np.int64)
    if not np.array_equal(whole, np.ravel(positions)):
        raise ValueError(f"{positions} are no whole numbers")
    return (whole - 1).tolist()
