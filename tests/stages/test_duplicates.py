"""What two datasets share is found whatever lies between, in one pass over parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.stages import duplicates
from pipeline.stages.duplicates import Shared
from pipeline.workspace import tables
from tests.stored import stored


def table(folder: Path, images: list[bytes], cut: int) -> tables.Table:
    digests = pa.array(images, pa.binary(16))
    whole = pa.table({"key": [f"{folder.name}-{n}" for n in range(len(images))], "digest": digests})
    return stored(folder, [whole.slice(0, cut), whole.slice(cut)])


def test_every_shared_image_is_counted_once_however_often_it_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pool = [rng.bytes(16) for _ in range(40)]
    for number in range(8):
        own, other = ([pool[i] for i in rng.integers(0, 40, size)] for size in rng.integers(1, 30, 2))
        cuts = rng.integers(0, 2, 2) * 3
        found = duplicates._compare(
            "own",
            table(tmp_path / str(number) / "own", own, int(cuts[0])),
            {"other": table(tmp_path / str(number) / "other", other, int(cuts[1]))},
        )
        same = [n for n, image in enumerate(own) if image in other]
        expected = [Shared("own", "other", len(same), tuple(f"own-{n}" for n in same[:3]))] if same else []
        assert found == expected
