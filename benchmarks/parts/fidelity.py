"""What compressing gradients costs in fidelity: scores from sketches against those from the gradients themselves.

    python -m benchmarks.parts.fidelity [--quick] [--data FILE]

A decoder of 4 layers and width 128 is trained for a while on text; targets are 24 held-out examples of each domain.
Spearman's correlation over 384 examples between sketched and exact scores, for GradDot (dot product with the mean
gradient of the target) and GradCos (mean cosine): median and tenth percentile over targets and three seeds. Times are
of the whole feature, forward and backward included, on one thread, for 64 examples at once, contestants in turns.
The text is Python's own documentation and library, or columns `text` and `domain` of a parquet file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.core import Row, Turn, row, take_turns
from torch import Tensor

from assay.core.keys import encode_ids, hash_ids
from assay.core.task import Encoded, Params
from assay.numerics.persample import flatten, gradients, layout
from assay.numerics.project import Exact, Sketch, sketch
from assay.numerics.stats import spearman
from assay.train.models import LanguageModel

TARGET, BATCH, TRAINED = 24, 64, 4000
K = 1024
KINDS = [
    ("factored", 4), ("factored", 8), ("factored", 16), ("factored", 32), ("sparse", K), ("sparse", 4 * K),
    ("sparse", 16 * K), ("masked", 4 * K), ("masked", 16 * K), ("dense", 4 * K),
]  # fmt: skip


def label(kind: str, size: int) -> str:
    return f"{kind} {size}"


@dataclass(frozen=True)
class World:
    task: LanguageModel
    params: Params
    encoded: Encoded
    pool: np.ndarray
    targets: list[np.ndarray]


def texts(data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Texts and domains in a keyed order."""
    if data is None:
        from assay.data.builtin import snippets

        pairs = [(text, domain) for text, domain, _ in snippets()]
    else:
        import pyarrow.parquet as pq

        columns = pq.read_table(data, columns=["text", "domain"])
        pairs = list(zip(columns["text"].to_pylist(), columns["domain"].to_pylist(), strict=True))
    words, domains = (np.array(column, dtype=object) for column in zip(*pairs, strict=True))
    order = np.argsort(hash_ids(encode_ids(words.tolist()), 0, "fidelity"), kind="stable")
    return words[order], domains[order]


def world(folder: Path, data: Path | None, quick: bool) -> World:
    from assay.core.pool import Pool
    from assay.core.selection import Selection
    from assay.train.loop import train
    from assay.train.models import train_tokenizer
    from assay.train.recipe import Recipe

    words, domains = texts(data)
    ranks = np.zeros(len(words), dtype=int)  # of each text within its domain
    names = sorted(set(domains))
    for name in names:
        ranks[domains == name] = np.arange((domains == name).sum())
    share = (96 if quick else 384) // len(names)
    chosen = np.flatnonzero(ranks < TARGET + max(share, TRAINED // len(names)))
    pool = Pool.from_columns({"text": words[chosen].tolist()})
    task = LanguageModel(tokenizer=train_tokenizer(pool, vocab=2048), vocab=2048, width=128, layers=4)
    task.prepare(pool, folder)
    encoded, ranks, domains = task.encoded(folder), ranks[chosen], domains[chosen]
    rest = np.flatnonzero(ranks >= TARGET)
    picked = Selection(pool.ids[rest], np.ones(len(rest)))
    made = train(task, encoded, rest, picked, Recipe(steps=10 if quick else 150))
    print(f"trained: {made.losses[0]:.2f} to {np.mean(made.losses[-10:]):.2f} nats a token", flush=True)
    targets = [np.flatnonzero((domains == name) & (ranks < TARGET)) for name in names]
    return World(task, made.params, encoded, np.flatnonzero((ranks >= TARGET) & (ranks < TARGET + share)), targets)


def features(w: World, rows: np.ndarray, made: Sketch) -> Tensor:
    return flatten(gradients(w.task.module, w.task.loss, w.params, w.encoded.inputs(rows), made)[0], made)


def scores(pool: Tensor, targets: list[Tensor]) -> dict[str, np.ndarray]:
    """`[targets, n]` of each scorer."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)

    dot = torch.stack([pool @ t.mean(0) for t in targets]).double().numpy()
    scaled = unit(pool)
    return {"graddot": dot, "gradcos": torch.stack([scaled @ unit(t).mean(0) for t in targets]).double().numpy()}


def correlations(w: World, quick: bool) -> dict[str, dict[str, np.ndarray]]:
    """Of each sketch and scorer, over targets and seeds. Sketches are taken of exact gradients, made once."""
    whole = np.concatenate([w.pool, *w.targets])
    exact = torch.cat([features(w, whole[i : i + 32], Exact()) for i in range(0, len(whole), 32)])
    cuts = np.cumsum([len(w.pool), *map(len, w.targets)])[:-1].tolist()
    shapes = {n: p.shape for n, p in w.params.items()}

    def score(rows: Tensor) -> dict[str, np.ndarray]:
        pool, *targets = torch.tensor_split(rows, cuts)
        return scores(pool, list(targets))

    truth, found = score(exact), {}
    for kind, size in KINDS:
        per: dict[str, list[float]] = {name: [] for name in truth}
        for seed in range(1 if kind == "dense" or quick else 3):
            made, at, parts = sketch(kind, size, seed), 0, {}
            for name, width in layout(w.task.module, Exact()):
                parts[name] = made.full(name, exact[:, at : at + width].reshape(-1, *shapes[name]))
                at += width
            for scorer, values in score(flatten(parts, made)).items():
                per[scorer] += [spearman(a, b) for a, b in zip(values, truth[scorer], strict=True)]
        found[label(kind, size)] = {scorer: np.array(v) for scorer, v in per.items()}
        print(label(kind, size), {s: round(float(np.median(v)), 4) for s, v in per.items()}, flush=True)
    return found


def paces(w: World, quick: bool) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Seconds an example: of each sketch, of exact gradients, and of an ordinary backward pass of the batch."""
    rows = w.pool[np.argsort(w.encoded.sizes[w.pool], kind="stable")]
    rows = rows[len(rows) // 2 - BATCH // 2 :][:BATCH]
    inputs = w.encoded.inputs(rows)

    def plain() -> float:
        leaves = {n: p.detach().requires_grad_() for n, p in w.params.items()}
        torch.autograd.grad(w.task.loss(leaves, inputs).sum(), list(leaves.values()))
        return float(len(rows))

    def turn(made: Sketch) -> Turn:
        def call() -> float:
            features(w, rows, made)
            return float(len(rows))

        return call

    turns: dict[str, Turn] = {label(kind, size): turn(sketch(kind, size, 0)) for kind, size in KINDS}
    slow = {name: call for name, call in turns.items() if name.startswith("dense")}
    rest = {"backward": plain, "exact": turn(Exact())} | {n: call for n, call in turns.items() if n not in slow}
    pace, spent = take_turns(rest, 2 if quick else 5)
    more = take_turns(slow, 1)
    return {**pace, **more[0]}, {**spent, **more[1]}


def rows(quick: bool, data: Path | None = None) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="assay-bench-") as folder:
            w = world(Path(folder), data, quick)
            (pace, spent), fidelity = paces(w, quick), correlations(w, quick)
    finally:
        torch.set_num_threads(before)
    weights = sum(p.numel() for p in w.params.values())
    case, found = f"decoder, {weights:,} parameters", []
    made = {"exact": Exact()} | {label(kind, size): sketch(kind, size, 0) for kind, size in KINDS}
    for method, values in pace.items():
        found.append(row("fidelity", case, method, "ms_per_example", 1e3 * values, spent[method]))
        if method in made:
            width = 4 * sum(n for _, n in layout(w.task.module, made[method]))
            found.append(row("fidelity", case, method, "bytes_per_row", np.array([width]), 0.0))
        for scorer, agreement in fidelity.get(method, {}).items():
            found.append(row("fidelity", case, method, f"spearman_{scorer}", agreement, 0.0))
    return found


def table(found: list[Row]) -> str:
    cells: dict[str, dict[str, Row]] = {}
    for r in found:
        cells.setdefault(r["method"], {})[r["metric"]] = r
    lines = ["| sketch | bytes a row | ms an example | GradDot | GradCos |", "|---|---|---|---|---|"]
    for method, of in cells.items():
        size = f"{of['bytes_per_row']['value']:,.0f}" if "bytes_per_row" in of else ""
        agreement = [
            f"{of[m]['value']:.3f} ({of[m]['ci'][0]:.3f})" if m in of else ""
            for m in ("spearman_graddot", "spearman_gradcos")
        ]
        lines.append(f"| {method} | {size} | {of['ms_per_example']['value']:.2f} | {' | '.join(agreement)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer examples, steps, turns and seeds")
    parser.add_argument("--data", type=Path, help="parquet file with columns text and domain")
    chosen = parser.parse_args()
    found = rows(chosen.quick, chosen.data)
    print(found[0]["case"])
    print(table(found))


if __name__ == "__main__":
    main()
