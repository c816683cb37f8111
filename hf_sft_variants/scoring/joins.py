"""Tables whose rows are found by the key of an example."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..base.example_keys import EXAMPLE_KEY


def rows_of_keys(keys: Sequence[str | None], table: pa.Table) -> pa.Array:
    """For each key, the first row of a table that has it; null for a missing key."""
    return pc.index_in(pa.array(keys, pa.string()), value_set=table[EXAMPLE_KEY].combine_chunks(), skip_nulls=True)


def find_conflict(table: pa.Table, columns: list[str]) -> tuple[dict, dict] | None:
    """The first two rows of a table that share a key but differ in a numeric column by more than rounding."""
    first = table.take(rows_of_keys(table[EXAMPLE_KEY].to_pylist(), table))
    same = [
        np.isclose(table[name].to_numpy(), first[name].to_numpy(), rtol=1e-4, atol=0, equal_nan=True)
        for name in columns
    ]
    conflicts = np.flatnonzero(~np.all(same, axis=0))
    if len(conflicts) == 0:
        return None
    return tuple(part.select([EXAMPLE_KEY, *columns]).slice(conflicts[0], 1).to_pylist()[0] for part in (first, table))
