"""`Track`: a frozen contest. It fixes the pool's recipe, the targets, the budget, the trainer and the seeds."""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from assay.bench.known import SOUND
from assay.core.errors import InputError, nearest
from assay.core.keys import decode_ids, digest, digest_file, digest_sources, encode_ids, shuffled, write_json
from assay.core.method import Count
from assay.core.pool import Pool
from assay.core.target import Target
from assay.data import builtin, gate, plant
from assay.specs import FileName, Spec, VerifySpec
from assay.study import Study, parse

TRACKS = Path(__file__).parent / "tracks"
# More documents than are needed are looked at, for those that share words with a target are passed over.
SLACK = 1.3
PART = "part"
"""The target's column of domains."""


class Track(Spec):
    """A contest that every method meets alike. One file says it all; a change of it is another contest.

    The pool has `rows` sound documents of each domain (`more` names other numbers), and word-shuffled copies of as many
    of them as `shuffled` says. `held` documents of some domains are kept out of it as targets, and no row of the pool
    shares 13 words in a row with one. Each of `tables` is a contest for the held documents of its domains.
    """

    name: FileName
    about: str
    source: Literal["domains", "python"] = "domains"
    """Documents of twelve domains in a file, or the text that comes with Python."""
    seed: int = pydantic.Field(default=0, ge=0, lt=2**31)
    rows: Count
    more: dict[str, Count] = {}
    shuffled: dict[str, Count] = {}
    held: dict[str, Count]
    tables: dict[FileName, tuple[str, ...]]
    study: dict[str, Any]
    """The rest of a Study: budget, task, proxy, train, verify."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Track:
        for table, domains in self.tables.items():
            if not domains or set(domains) - self.held.keys():
                raise ValueError(f"table {table!r} has a domain of which nothing is held out")
        fixed = {"name", "seed", "pool", "target", "methods", "arms"} & self.study.keys()
        if fixed:
            raise ValueError(f"[study] cannot have {sorted(fixed)}: the track says it")
        try:
            verify = VerifySpec.model_validate(self.study.get("verify", {}))
        except pydantic.ValidationError:
            return self  # told, with its place, where the study is parsed
        if verify.random < 2:
            raise ValueError("[study.verify] random must be 2 or more: each random row is held against the others")
        if verify.everything:
            raise ValueError("[study.verify] cannot have everything: a league compares sets of one budget")
        return self


def names() -> list[str]:
    """The tracks that come with the package."""
    return sorted(path.stem for path in TRACKS.glob("*.toml"))


def load(name: str) -> Track:
    """A track by its name, or from a TOML file of one's own."""
    path = Path(name) if name.endswith(".toml") else TRACKS / f"{name}.toml"
    if not path.is_file():
        raise InputError(f"no track {name!r}", fix=nearest(name, names()))
    try:
        return Track(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("unreadable track", where=path, why=str(error), fix="it must be a TOML file") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where or 'the track'}: {first['msg']}", where=path, fix="see docs/league.md") from error


def build(track: Track, data: Path, folder: Path) -> Path:
    """The track's files in a folder below `folder`, made unless they are there: pool.parquet, truth.parquet, and
    held-DOMAIN.parquet for each domain of a target. Tracks of one recipe share them."""
    path = data / "domains" / "domains.parquet"
    source = sys.version if track.source == "python" else _digest(path)
    recipe = track.model_dump(mode="json", include={"source", "seed", "rows", "more", "shuffled", "held"})
    code = digest_sources(Path(__file__), Path(plant.__file__), Path(gate.__file__))
    final = folder / f"{track.source}-{digest(recipe, source, code)[:16]}"
    if final.is_dir():
        return final
    part = final.with_name(final.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write(track, part, *_drawn(track, *_documents(track, path)))
    write_json(part / "made.json", {"recipe": recipe, "source": source})
    os.replace(part, final)
    return final


def _digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(
            "the documents of the track are not there", where=path,
            fix="give the folder that has domains/domains.parquet as --data, or in $ASSAY_DATA",
        )  # fmt: skip
    return digest_file(path)


def _documents(track: Track, path: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids, texts and domains of all documents."""
    if track.source == "python":
        rows = list(builtin.snippets())
        ids = encode_ids(plant.opaque(track.seed, "clean", text) for text, _, _ in rows)
        return ids, [text for text, _, _ in rows], np.array([domain for _, domain, _ in rows])
    try:
        table = pq.read_table(path, columns=["id", "text", "domain"])
    except Exception as error:
        fix = "it must be Parquet with the columns id, text and domain"
        raise InputError(
            "the documents of the track cannot be read", where=path, why=str(error).splitlines()[0], fix=fix
        ) from error
    return encode_ids(table["id"].to_pylist()), table["text"].to_pylist(), np.array(table["domain"])


def _drawn(
    track: Track, ids: np.ndarray, texts: list[str], domains: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Rows of the pool, and held rows by domain; every choice is keyed by the document's id."""
    order, names = shuffled(ids, "track", track.seed), decode_ids(ids)
    held: dict[str, list[dict[str, Any]]] = {}
    candidates: dict[str, np.ndarray] = {}
    for domain in sorted(set(domains.tolist())):
        own = order[domains[order] == domain]
        aside, wanted = track.held.get(domain, 0), track.more.get(domain, track.rows)
        held[domain] = [{"id": names[k], "text": texts[k], PART: domain} for k in own[:aside].tolist()]
        candidates[domain] = own[aside : aside + int(SLACK * wanted) + 10]
    unknown = sorted((track.held.keys() | track.more.keys() | track.shuffled.keys()) - candidates.keys())
    if unknown:
        raise InputError(f"there is no domain {unknown[0]!r}", where=track.name, fix=nearest(unknown[0], candidates))
    apart = _apart([row for rows in held.values() for row in rows], ids, texts, np.concatenate([*candidates.values()]))
    rows = []
    for domain, own in candidates.items():
        wanted = track.more.get(domain, track.rows)
        chosen = [k for k in own.tolist() if k in apart][:wanted]
        if len(chosen) < max(wanted, track.shuffled.get(domain, 0)):
            raise InputError(
                f"there are {len(chosen)} documents of {domain!r}, {wanted} are wanted", where=track.name,
                fix="ask for fewer, or give more documents",
            )  # fmt: skip
        for place, k in enumerate(chosen):
            rows.append({"id": names[k], "text": texts[k], "domain": domain, SOUND: True})
            if place < track.shuffled.get(domain, 0):
                copy = plant.opaque(track.seed, "shuffled", names[k])
                text = plant.word_shuffle(texts[k], track.seed)
                rows.append({"id": copy, "text": text, "domain": domain, SOUND: False})
    return sorted(rows, key=lambda row: plant.key(track.seed, "order", row["id"])), held


def _apart(held: list[dict[str, Any]], ids: np.ndarray, texts: list[str], candidates: np.ndarray) -> set[int]:
    """Candidates that share no long run of words with a held document."""
    pool = Pool.from_columns({"id": ids[candidates].tolist(), "text": [texts[k] for k in candidates.tolist()]})
    target = Pool.from_columns({"text": [row["text"] for row in held]})
    hits = gate.contamination(pool, Target("held", target, target.at([])), examples=0)
    return set(candidates[~np.isin(pool.ids, hits.ids)].tolist())


def _write(track: Track, folder: Path, rows: list[dict[str, Any]], held: dict[str, list[dict[str, Any]]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "pool.parquet")
    damaged = [row["id"] for row in rows if not row[SOUND]]
    truth = {"id": pa.array(damaged, pa.string()), "kind": pa.array(["shuffled"] * len(damaged), pa.string())}
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    for domain in track.held:
        pq.write_table(pa.Table.from_pylist(held[domain]), folder / f"held-{domain}.parquet")


def studies(track: Track, folder: Path, entries: list[Any]) -> Iterator[tuple[str, Study]]:
    """The study of each table: the entries and the random arms on the files of `build`."""
    for table, domains in track.tables.items():
        data = {
            "name": f"{track.name}-{table}" if table != track.name else table, "seed": track.seed,
            "pool": {
                "path": str(folder / "pool.parquet"), "id": "id", "domain": "domain", "keep": [SOUND],
                **({"truth": str(folder / "truth.parquet")} if track.shuffled else {}),
            },
            "target": {
                "name": ", ".join(domains), "path": [str(folder / f"held-{domain}.parquet") for domain in domains],
                "id": "id", "keep": [PART],
            },
            "methods": ["random"], "arms": [*entries, oracle(track, table)], **track.study,
        }  # fmt: skip
        yield table, parse(data, where=track.name)


ORACLE = "oracle"


def oracle(track: Track, table: str) -> dict[str, Any]:
    """The arm that reads the truth of the pool."""
    method = {"name": "assay.bench.known", "domains": list(track.tables[table]), "seed": track.seed}
    return {"name": ORACLE, "method": method}
