"""Tables in files that users bring."""

from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from ..errors import InputError


def read_user_table(path: str | Path, where: str, schema: pa.Schema, required: list[str], fix: str) -> pa.Table:
    """
    Read those columns of a schema that a file has, Parquet or JSON lines (`.jsonl`). `where` and `fix` begin and end
    the error messages.
    """
    if not Path(path).is_file():
        raise InputError(f"{where} can't be read: there is no such file. {fix}")
    try:
        table = pyarrow.json.read_json(path) if Path(path).suffix == ".jsonl" else pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where} can't be read: {error} {fix}") from error
    for name in required:
        if name not in table.column_names:
            raise InputError(f"{where} has no column `{name}`, only {table.column_names}. {fix}")
    columns = [column for column in schema if column.name in table.column_names]
    try:
        table = table.select([column.name for column in columns])
        return table.cast(pa.schema(columns, metadata=table.schema.metadata))
    except pa.ArrowException as error:
        raise InputError(f"{where} has a value of the wrong type: {error} {fix}") from error
