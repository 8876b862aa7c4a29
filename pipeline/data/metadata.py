"""What is known of images beside their labels: a table of the user's own, joined to them by their keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.columns import KEY
from pipeline.data.formats import _files
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.workspace import tables

DATASET = "dataset"
"""Column that tells datasets apart in which keys are the same."""

MOST = 1000
"""Values of a column that images are told apart by."""

WHERE = "report.metadata"


@dataclass(frozen=True)
class Metadata:
    """A table with a row for an image; all columns are text."""

    table: pa.Table

    @property
    def columns(self) -> list[str]:
        """Names of what is known, in the order of the table."""
        return [name for name in self.table.column_names if name not in (KEY, DATASET)]

    def require_of(self, manifests: Mapping[str, Manifest]) -> None:
        """Refuse a table in which no image of some datasets has a row.

        Raises:
            UserError: names a key of either.
        """
        listed = None
        for dataset, manifest in manifests.items():
            with tables.parquet(manifest.path) as file:
                for batch in file.iter_batches(tables.ROW_GROUP, columns=[KEY]):
                    if pc.any(self._rows(dataset, batch[KEY])[1].is_valid()).as_py():
                        return
                    listed = listed or batch[KEY][0].as_py()
        if listed is not None:
            there = self.table[KEY][0] if len(self.table) else None
            raise UserError(
                f"{WHERE}: no image of {', '.join(manifests)} is in the table: an image is {listed!r}, the "
                f"first row {there}. Write {KEY} as tables of scores have it"
                + (f", and {DATASET} as the config." if DATASET in self.table.column_names else ".")
            )

    def _rows(self, dataset: str, keys: pa.Array) -> tuple[pa.Table, pa.Array]:
        """The rows of a dataset, and where in them keys are; null where they are not."""
        table = self.table
        if DATASET in table.column_names:
            table = table.filter(pc.equal(table[DATASET], dataset))
        return table, pc.index_in(keys, value_set=table[KEY].combine_chunks())

    def of(self, dataset: str, keys: pa.Array, column: str) -> list[str | None]:
        """(N,) values of a column for images of a dataset by their keys; None where it has none."""
        table, row = self._rows(dataset, keys)
        found: list[str | None] = table[column].combine_chunks().take(row).to_pylist()
        return found


def read(path: str) -> Metadata:
    """The table at a path or URI, `.csv` with a line of names or `.parquet`.

    Raises:
        UserError: no such file or table, no column `key`, none but it, a key twice, or a column of more
            than `MOST` values, or two that one file would be named after.
    """
    with _files.open_file(path, WHERE) as stream:
        try:
            table = pq.read_table(stream) if path.lower().endswith(".parquet") else _csv(stream)
            table = pa.table({name: table[name].cast(pa.string()) for name in table.column_names})
        except pa.ArrowException as error:
            raise UserError(
                f"{WHERE}: {path}: {str(error).splitlines()[0]}. Expected a .csv file with a line of names, "
                "or .parquet."
            ) from None
    found = Metadata(table)
    names = ", ".join(table.column_names)
    if KEY not in table.column_names or not found.columns:
        raise UserError(
            f"{WHERE}: {path}: expected the columns {KEY}, {DATASET} where keys repeat, and others to review "
            f"by; it has {names}."
        )
    _require_once(table, path)
    same = Counter(map(name_of, found.columns)).most_common(1)[0]
    if same[1] > 1:
        raise UserError(f"{WHERE}: {path}: {same[1]} columns are called {same[0]} in files. Rename one.")
    for column in found.columns:
        values = pc.count_distinct(table[column]).as_py()
        if values > MOST:
            raise UserError(
                f"{WHERE}: {path}: {column} has {values:,} values; images are told apart by at most "
                f"{MOST:,}. Leave the column out, or sort its values into groups."
            )
    return found


def name_of(column: str) -> str:
    """What a column is called in names of files and links."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", column)


def _csv(stream: pa.NativeFile) -> pa.Table:
    content = stream.read()
    names = pyarrow.csv.open_csv(pa.BufferReader(content)).schema.names
    texts = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    return pyarrow.csv.read_csv(pa.BufferReader(content), convert_options=texts)


def _require_once(table: pa.Table, path: str) -> None:
    by = [name for name in (DATASET, KEY) if name in table.column_names]
    counted = table.group_by(by).aggregate([([], "count_all")])
    twice = counted.filter(pc.greater(counted["count_all"], 1)).slice(0, 1).to_pylist()
    if twice:
        cure = "Drop one" if DATASET in by else f"Drop one, or add a column {DATASET}"
        raise UserError(
            f"{WHERE}: {path}: {KEY} {twice[0][KEY]!r} is there {twice[0]['count_all']} times. {cure}."
        )
