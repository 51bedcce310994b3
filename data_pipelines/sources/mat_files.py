"""MATLAB files, which some publishers use for annotations and features."""

from pathlib import Path
from typing import Any

from lookalike.errors import DataError


def read_mat(file: Path) -> dict[str, Any]:
    """The variables of a MATLAB file before version 7.3, axes of length 1 removed.

    Raises:
        DataError: it cannot be read, or is of version 7.3, which is HDF5.
    """
    from scipy.io import loadmat  # takes a quarter of a second that other sources need not wait

    try:
        contents: dict[str, Any] = loadmat(file, squeeze_me=True)
    except NotImplementedError as error:
        raise DataError(f"{file} is of MATLAB's version 7.3. Save it with the option -v7, or as .npy.") from error
    except Exception as error:
        # The reader raises anything from TypeError to zlib.error on damaged files.
        raise DataError(f"{file} cannot be read as a MATLAB file: {error}") from error
    return {name: value for name, value in contents.items() if not name.startswith("__")}
