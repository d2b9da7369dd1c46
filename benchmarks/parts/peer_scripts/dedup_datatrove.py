"""datatrove's blocks for copies, from Parquet files to the documents to remove: exact_dup or minhash.

Its last block, which reads all documents again and writes those that stay, is left out, which favours it: a scorer
writes verdicts alone, too. Imports come before the clock starts. Its hash is given bytes: xxhash 4 takes no
strings, which datatrove 0.10.1 does not know.
"""

import argparse
import json
import time
from pathlib import Path

import xxhash
from datatrove.data import Document  # pyright: ignore[reportMissingImports]
from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.dedup import (  # pyright: ignore[reportMissingImports]
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.dedup.minhash import MinhashConfig  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.readers import ParquetReader  # pyright: ignore[reportMissingImports]
from datatrove.utils.hashes import xxhash as hashes  # pyright: ignore[reportMissingImports]
from datatrove.utils.hashing import HashConfig  # pyright: ignore[reportMissingImports]


def xxhash64(data: str | bytes) -> int:
    return xxhash.xxh64_intdigest(data.encode() if isinstance(data, str) else data)


hashes.xxhash64 = xxhash64


def content(document: Document) -> bytes:  # datatrove looks at this annotation, so it must not be a string
    """The same normal form as on the other side."""
    return " ".join(document.text.lower().split()).encode()


def reader(pool: Path) -> ParquetReader:
    return ParquetReader(str(pool), glob_pattern="rows-*.parquet", read_metadata=False)


def exact_dup(pool: Path, out: Path, threads: int) -> int:
    config = ExactDedupConfig(content_getter=content, only_dedup_in_index=False)
    run([reader(pool), ExactDedupSignature(str(out / "signatures"), config=config)], threads)
    run([ExactFindDedups(str(out / "signatures"), str(out / "removed"), config=config)], 1)
    return sum(file.stat().st_size for file in (out / "removed").rglob("*") if file.is_file())


def minhash(pool: Path, out: Path, threads: int) -> int:
    config = MinhashConfig(hash_config=HashConfig(precision=64))
    run([reader(pool), MinhashDedupSignature(str(out / "signatures"), config=config)], threads)
    buckets = MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config)
    run([buckets], config.num_buckets, threads)
    run([MinhashDedupCluster(str(out / "buckets"), str(out / "removed"), config=config)], 1)
    return sum(file.stat().st_size for file in (out / "removed").rglob("*.remove")) // 4


def run(pipeline: list, tasks: int, workers: int | None = None) -> None:
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers or tasks).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("method", choices=("exact_dup", "minhash"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    start, spent = time.perf_counter(), time.process_time()
    removed = {"exact_dup": exact_dup, "minhash": minhash}[chosen.method](chosen.pool, chosen.out, chosen.threads)
    said = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - spent, "removed": removed}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
