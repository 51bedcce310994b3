"""The data sets that can be chosen by name: one line for each."""

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.sources.cars196 import Cars196
from data_pipelines.sources.cub200 import Cub200
from data_pipelines.sources.data_set import DataSet
from data_pipelines.sources.gldv1 import GoogleLandmarksV1
from data_pipelines.sources.gldv2 import GoogleLandmarksV2
from data_pipelines.sources.inat2018 import INaturalist2018
from data_pipelines.sources.r1m import RevisitedDistractors
from data_pipelines.sources.revisited import RevisitedOxford, RevisitedParis
from data_pipelines.sources.sop import StanfordOnlineProducts
from data_pipelines.sources.vehicleid import VehicleId
from data_pipelines.sources.webdataset_tars import WebDatasetTars
from lookalike.errors import SettingsError
from lookalike.settings import apply_overrides, validate_settings

_CLASSES: tuple[type[DataSet], ...] = (
    StanfordOnlineProducts,
    Cars196,
    Cub200,
    INaturalist2018,
    VehicleId,
    GoogleLandmarksV1,
    GoogleLandmarksV2,
    RevisitedOxford,
    RevisitedParis,
    RevisitedDistractors,
    WebDatasetTars,
)
DATA_SETS = {data_set.name(): data_set for data_set in _CLASSES}


def open_data_set(name: str, folder: Path, overrides: Sequence[str] = ()) -> DataSet:
    """The data set `name` in `folder`, with `key=value` for each setting that differs from its default.

    Raises:
        SettingsError: there is no such data set, or it has no such setting.
    """
    if name not in DATA_SETS:
        raise SettingsError(f"there is no data set {name!r}: choose from {', '.join(DATA_SETS)}.")
    return validate_settings(DATA_SETS[name], apply_overrides({"folder": folder}, overrides), where=f"data set {name}")
