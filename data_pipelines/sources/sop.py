"""Stanford Online Products: `Ebay_{train,test}.txt` and twelve folders of product pictures."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from data_pipelines.sources import SourcePicture, safe_keys
from data_pipelines.sources.data_set import DataSet, OfficialCount
from data_pipelines.sources.list_files import read_rows

_HEADER = "image_id class_id super_class_id path"


class StanfordOnlineProducts(DataSet):
    data_set: Literal["sop"] = "sop"

    archive_folder: ClassVar[str] = "Stanford_Online_Products"
    official_counts: ClassVar[tuple[OfficialCount, ...]] = (
        OfficialCount("train", 59_551, 11_318),
        OfficialCount("test", 60_502, 11_316),
    )
    are_classes_disjoint: ClassVar[bool] = True

    def required_paths(self) -> list[str]:
        return ["Ebay_train.txt", "Ebay_test.txt"]

    def listed(self) -> Iterator[SourcePicture]:
        for split in ("train", "test"):
            rows = list(read_rows(self.root / f"Ebay_{split}.txt", num_columns=4, header=_HEADER))
            keys = safe_keys([name for *_, name in rows])
            for key, (_, class_id, _, name) in zip(keys, rows, strict=True):
                category = name.partition("/")[0].removesuffix("_final")
                yield SourcePicture(key, self.root / name, class_id, split, category)
