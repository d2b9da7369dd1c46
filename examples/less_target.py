"""The target of less.toml: worked examples of GSM8K, BIG-Bench Hard and TyDi QA in one file, `less_target.parquet`.

Of BIG-Bench Hard the 81 examples that LESS selects by, of TyDi QA its nine, and 40 test questions of GSM8K. Column
`task` names the subtask, 37 in all.

    python examples/less_target.py [FOLDER WITH gsm8k, bbh AND tydiqa_less_dev]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
PARTS = (
    ("bbh/bbh.parquet", "dev", 81), ("tydiqa_less_dev/tydiqa_less_dev.parquet", "dev", 9),
    ("gsm8k/gsm8k.parquet", "test", 40),
)  # fmt: skip
COLUMNS = ["id", "task", "split", "prompt", "answer"]


def main(folder: Path) -> None:
    found = []
    for file, split, most in PARTS:
        rows = pq.read_table(folder / file, columns=COLUMNS).to_pylist()
        found += [row for row in rows if row["split"] == split][:most]
    pq.write_table(pa.Table.from_pylist(found), HERE / "less_target.parquet")
    print(f"{len(found)} rows in {HERE / 'less_target.parquet'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "../../shared/data")
