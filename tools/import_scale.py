"""How much memory and time import, check and describe take for a wide modality: JSON on stdout.

Makes a wide Parquet file of random values in a temporary folder (rows x features x 4 bytes, twice) and runs each
command in a process of its own: `python tools/import_scale.py --rows 100000 --features 20000 --folder /scratch`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = 10


def make_source(path: Path, *, rows: int, features: int, row_group_rows: int) -> None:
    """A wide table with 20 % zeros, written one row group at a time."""
    rng = np.random.default_rng(0)
    columns = [pa.field(f"g{number}", pa.float32()) for number in range(features)]
    schema = pa.schema([pa.field("sample_id", pa.string()), pa.field("label", pa.string()), *columns])
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        for start in range(0, rows, row_group_rows):
            numbers = range(start, min(rows, start + row_group_rows))
            values = rng.standard_normal((features, len(numbers)), dtype=np.float32)
            values[rng.random(values.shape, dtype=np.float32) < 0.2] = 0
            meta = [pa.array([f"s{i}" for i in numbers]), pa.array([f"c{i % CLASSES}" for i in numbers])]
            table = pa.Table.from_arrays([*meta, *(pa.array(row) for row in values)], schema=schema)
            writer.write_table(table, row_group_size=len(numbers))


def measured(*arguments: str | Path) -> dict[str, float]:
    """Seconds and peak resident memory of one `modis-dist data` command."""
    code = "from modis_dist.cli.data import app; app()"
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}")
    seconds = round(time.monotonic() - start, 1)
    return {
        "seconds": seconds,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_MiB": usage.ru_maxrss // 1024,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=20_000)
    parser.add_argument("--row-group-rows", type=int, default=5_000, help="of the source")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, store = Path(name) / "source", Path(name) / "store"
        source.mkdir()
        file = source / "wide.parquet"
        size = {"rows": options.rows, "features": options.features, "row_group_rows": options.row_group_rows}
        # In a process of its own: a child's peak counts from what its parent held at the fork.
        maker = get_context("spawn").Process(target=make_source, args=(file,), kwargs=size)
        maker.start()
        maker.join()
        report: dict[str, object] = {
            **size,
            "raw_MiB": 4 * options.rows * options.features >> 20,
            "source_MiB": file.stat().st_size >> 20,
            "import": measured("import", source, "--out", store),
            "check": measured("check", store),
            "describe": measured("describe", store),
        }
        report["store_MiB"] = sum(path.stat().st_size for path in store.rglob("*.parquet")) >> 20
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
