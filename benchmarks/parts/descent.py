"""Metagradient descent beside other ways to choose: paired trainings on what each selects, and how much it gains.

    python -m benchmarks.parts.descent [--quick] [--threads N] [--worlds digits,noisy,mixture]

mgd-noisy-domain  documents of twelve domains; of the target's own domain as many have their words shuffled as are
    clean, and the budget is as many as are clean. Clean ones alone are the oracle; words cannot tell them apart.
mgd-mixture  the same documents without noise, for a target of three domains in equal parts, as many of each in the pool
    as the budget holds: any one of the three alone would fill it, and is an arm. Equal parts are the oracle.
mgd-digits  handwritten digits, a fifth of the labels wrong; the budget is seven tenths of them.

Every arm is trained at the same seeds on the same number of terms, and judged on targets that chose nothing. Gains are
of judged loss: `gain_over_random` over three random draws, `gain_over_best_null` over the best of what looks at no
gradient (random, words, loss, one domain), `gain_over_METHOD` over another arm; intervals treat draws, seeds and
targets as crossed random factors. `metagrad-1e-8` has that eps_root. Descent through documents goes on from the scoring
model, with a seed of its own for every metastep. `flips_removed`: the share of wrong labels that descent does not end
with, the mean over three descents whose starts, draws, held targets and trainings are their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from assay.core.keys import digest, encode_ids, shuffled
from assay.core.method import Mark, Scorer, Selector, make
from assay.core.pool import Pool, positions
from assay.core.run import Run
from assay.core.selection import Budget, Selection
from assay.core.table import Table
from assay.core.task import Task
from assay.measure import Measurer
from assay.train.recipe import Recipe

Row = dict[str, Any]
DATA = Path(__file__).parents[3] / "shared" / "data"
DRAWS, LEVEL = 3, 0.95


@dataclass(frozen=True)
class Scale:
    """Of the documents: from each other domain; clean ones of the target's, and as many shuffled; targets that select
    and that judge; steps of a training; metasteps; judged seeds."""

    each: int = 80
    clean: int = 100
    select: int = 192
    judge: int = 300
    steps: int = 60
    metasteps: int = 8
    seeds: int = 5


FULL, QUICK = Scale(), Scale(each=20, clean=25, select=16, judge=24, steps=12, metasteps=1, seeds=2)
MIXED = ("biomed", "code", "legal")
# Seeds of judged trainings are recipe.seed * 1000 + k: those of descent and of scoring models are others.
OWN = 77


@dataclass
class World:
    """A pool, both halves of a target, and how every arm trains on its budget of terms."""

    case: str
    task: Task
    pool: Pool
    selecting: Pool
    judging: Pool
    recipe: Recipe
    budget: int
    good: np.ndarray
    """Of the pool: what an oracle takes."""
    scoring: int
    """Steps of the scoring model, on the whole pool."""
    arms: dict[str, Any]
    """Name -> method, or a function of the world that scores the pool."""
    nulls: tuple[str, ...]
    seeds: int
    folder: Path
    sizes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.encodings = {}
        for part in (self.pool, self.selecting, self.judging):
            path = self.folder / part.fingerprint
            path.mkdir(parents=True, exist_ok=True)
            self.task.prepare(part, path)
            self.encodings[part.fingerprint] = path
        self.sizes = self.task.encoded(self.encodings[self.pool.fingerprint]).sizes


# The worlds.


def noisy(folder: Path, quick: bool) -> World:
    from assay.scorers.loss_diff import shuffle_words

    scale = QUICK if quick else FULL
    clean, held = scale.clean, scale.select + scale.judge
    own = _documents()
    target = own.pop("biomed")
    rest = target[held:]
    texts = [*rest[:clean], *(row for rows in own.values() for row in rows[: scale.each])]
    noise = shuffle_words(_pool(rest[clean : 2 * clean]), 0)
    shuffled_ones = [
        {"id": i.decode(), "text": text, "domain": "shuffled"}
        for i, text in zip(noise.ids.tolist(), noise.column("text"), strict=True)
    ]
    return _read("mgd-noisy-domain", [*texts, *shuffled_ones], target[:held], {"biomed"}, {}, scale, folder)


def mixture(folder: Path, quick: bool) -> World:
    scale = QUICK if quick else FULL
    own, part, judge = _documents(), scale.select // 3, scale.judge // 3
    targets = [own.pop(name) for name in MIXED]
    select = [row for rows in targets for row in rows[:part]]
    judged = [row for rows in targets for row in rows[part : part + judge]]
    texts = [row for rows in targets for row in rows[part + judge : part + judge + scale.clean]]
    texts += [row for rows in own.values() for row in rows[: scale.each]]
    alone = {f"only-{name}": partial(only, domain=name) for name in MIXED}
    sized = replace(scale, select=len(select), judge=len(judged))
    return _read("mgd-mixture", texts, [*select, *judged], set(MIXED), alone, sized, folder)


def _documents() -> dict[str, list[dict[str, str]]]:
    """Rows by domain, in a keyed order; each fills the context."""
    import pyarrow.parquet as pq

    table = pq.read_table(DATA / "domains" / "domains.parquet", columns=["id", "text", "domain"]).to_pylist()
    own: dict[str, list[dict[str, str]]] = {}
    for row in shuffled(encode_ids(one["id"] for one in table), "descent", "documents").tolist():
        if len(table[row]["text"]) >= 600:
            own.setdefault(table[row]["domain"], []).append(table[row])
    return own


def _pool(rows: list[dict[str, str]]) -> Pool:
    return Pool.from_columns({name: [row[name] for row in rows] for name in ("id", "text", "domain")})


def _read(
    case: str, documents: list[dict[str, str]], target: list[dict[str, str]], good: set[str], alone: dict[str, Any],
    scale: Scale, folder: Path,
) -> World:  # fmt: skip
    """A world of documents; the budget holds as many as there are clean ones of a target's domain."""
    from assay.train.models import LanguageModel, train_tokenizer

    pool, context, vocab = _pool(documents), 96, 1024
    task = LanguageModel(
        tokenizer=train_tokenizer(pool, vocab=vocab), vocab=vocab, width=64, layers=2, heads=4, context=context
    )
    recipe = Recipe(steps=scale.steps, terms_per_step=16 * (context + 1), lr=5e-3, final=0.05)
    late = {"recipe": {"seed": OWN}, "window": recipe.steps // 4, "insert": 3}
    once = {"name": "metagrad", "check": 0, **late}
    rough = {**once, "recipe": {"seed": OWN, "eps_root": 1e-8}}
    # A third of a training, from a model of the pool: from first weights on, whatever is not learnt by heart helps.
    short = {"seed": OWN, "steps": recipe.steps // 3, "lr": 2e-3}
    descent: dict[str, Any] = {
        "name": "mgd", "begin": "model", "recipe": short, "window": short["steps"], "insert": 3, "vary": True,
        "metasteps": scale.metasteps, "patience": 3, "rate": 0.3, "memory": 0.8, "hold": 0.33,
    }  # fmt: skip
    nulls = {"bm25": {"name": "bm25"}, "n-grams": ngrams, **alone}
    arms = {
        **nulls, "loss_diff": {"name": "loss_diff"}, "influence": {"name": "influence", "solver": "ekfac"},
        "metagrad": once, "metagrad-1e-8": rough, "mgd": {**descent, "start": once},
        "mgd-from-random": descent,
    }  # fmt: skip
    inside = np.array([row["domain"] in good for row in documents])
    world = World(
        case, task, pool, _pool(target[: scale.select]), _pool(target[scale.select :]), recipe, 0, inside, recipe.steps,
        arms, tuple(nulls), scale.seeds, folder,
    )  # fmt: skip
    world.budget = int(world.sizes[: scale.clean].sum())
    for name in ("mgd", "mgd-from-random"):
        arms[name]["share"] = world.budget / float(world.sizes.sum())
    return world


def only(world: World, domain: str) -> np.ndarray:
    """Documents of one domain, whichever."""
    return np.array([float(name == domain) for name in world.pool.column("domain")])


def ngrams(world: World) -> np.ndarray:
    """Odds of a document to be of the target and not of the pool, by a logistic law of hashed words and pairs."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    pool, target = world.pool.column("text"), world.selecting.column("text")
    read = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), alternate_sign=False)
    x, label = read.transform([*pool, *target]), np.repeat([0, 1], [len(pool), len(target)])
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300).fit(x, label)
    return model.decision_function(x[: len(pool)])


def digits(folder: Path, quick: bool) -> World:
    from assay.data import toys
    from assay.train.models import Classifier

    count = 300 if quick else 1000
    train, test, truth = toys.digits(flip=0.2, train=count, test=300 if quick else 700)
    pool, target = Pool.from_columns(train), Pool.from_columns(test)
    order = shuffled(target.ids, "descent", "halves")
    half = len(order) // 2
    wrong = np.isin(pool.ids, encode_ids(truth["id"].to_pylist()))
    task = Classifier(inputs=64, hidden=(64,), classes=10)
    recipe = Recipe(
        steps=60 if quick else 300, terms_per_step=50, optimiser="sgd", lr=0.5, schedule="linear", warmup=0.0,
        final=0.0, weight_decay=1e-3, clip=0.0,
    )  # fmt: skip
    own = {"seed": OWN}
    descent = {
        "name": "mgd", "recipe": own, "share": 0.7, "rate": 0.4, "metasteps": 2 if quick else 10, "patience": 10,
        "window": recipe.steps, "insert": 8, "memory": 0.8, "vary": True,
    }  # fmt: skip
    once = {"name": "metagrad", "check": 0, "recipe": own, "insert": 4}
    arms = {"loss": {"name": "loss"}, "metagrad": once, "mgd": descent}
    return World(
        "mgd-digits", task, pool, target.at(np.sort(order[:half])), target.at(np.sort(order[half:])), recipe,
        int(0.7 * count), ~wrong, recipe.steps, arms, ("loss",), 2 if quick else 5, folder,
    )  # fmt: skip


# Who chooses what.


@dataclass
class Chosen:
    selections: dict[str, Selection] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def choose(world: World, run: Run) -> Chosen:
    """What every arm selects, by one scoring model."""
    from assay.train import loop

    encoded = world.task.encoded(world.encodings[world.pool.fingerprint])
    recipe = world.recipe.with_seed(OWN)
    trained = loop.train(
        world.task, encoded, np.arange(len(encoded)), Selection.everything(world.pool.ids),
        recipe.model_copy(update={"steps": world.scoring}),
    )  # fmt: skip
    mark = Mark(trained.params, {})
    measurer = Measurer(
        run, world.pool, world.selecting, task=world.task, models=[mark.params], trajectories=[[mark]],
        encodings=dict(world.encodings), key=digest(world.task.describe(), OWN), recipe=recipe,
    )  # fmt: skip
    unit = "tokens" if world.task.countable else "examples"
    cut, chosen = make(Selector, "cut"), Chosen()
    arms: dict[str, Any] = {**{f"random-{k}": {"name": "random", "seed": k} for k in range(1, DRAWS + 1)}, **world.arms}
    for name, arm in arms.items():
        start = time.perf_counter()
        if callable(arm):
            table = Table(world.pool.ids, ("score",), np.asarray(arm(world))[:, None])
        else:
            table = measurer.table(make(Scorer, arm))
        chosen.tables[name], chosen.seconds[name] = table, time.perf_counter() - start
        chosen.selections[name] = cut.select(table, world.sizes, Budget(world.budget, unit), barred={})
    oracle = Table(world.pool.ids, ("score",), world.good[:, None].astype(np.float64))
    chosen.selections["oracle"] = cut.select(oracle, world.sizes, Budget(world.budget, unit), barred={})
    return chosen


def measured(world: World, workers: int) -> tuple[list[Row], Chosen, dict[str, np.ndarray]]:
    """Rows of one world."""
    from assay.verify import compare, paired_training, verify

    run = Run.open(world.folder / "run", {"name": world.case})
    run.close()
    chosen = choose(world, run)
    found = paired_training(
        run, world.task, world.pool, world.encodings, world.judging, chosen.selections, world.recipe, seeds=world.seeds,
        workers=workers,
    )  # fmt: skip
    losses = {arm: np.stack([seed["loss"] for seed in seeds]) for arm, seeds in found.items()}
    rows = []
    for name, entry in verify(losses, level=LEVEL).items():
        seconds = chosen.seconds.get(name, 0.0)
        rows.append(_row(world, name, "judged_loss", entry["judged_loss"], entry["judged_loss_ci"], seconds))
        if not name.startswith("random-"):
            rows.append(_row(world, name, "gain_over_random", entry["gain"], entry["ci"], seconds))
        inside = np.isin(world.pool.ids, chosen.selections[name].ids)
        rows.append(_row(world, name, "share_of_good", float(world.good[inside].mean()), None, seconds))
    nulls = [n for n in losses if n in world.nulls or n.startswith("random-")]
    best = min(nulls, key=lambda n: float(losses[n].mean()))
    others = {"best_null": best, **{n: n for n in losses if n in (*world.arms, "oracle") and n != "mgd"}}
    for metric, other in others.items():
        gain = compare(losses["mgd"], losses[other][None], level=LEVEL)
        rows.append(
            _row(world, "mgd", f"gain_over_{metric}", gain["gain"], gain["ci"], chosen.seconds["mgd"], against=other)
        )
    return rows, chosen, losses


def _row(
    world: World, method: str, metric: str, value: float, ci: list[float] | None, seconds: float, **options: Any
) -> Row:  # fmt: skip
    return {
        "bench": "metagrad", "case": world.case, "tool": "assay", "method": method, "metric": metric, "value": value,
        "ci": ci, "seconds": seconds, "options": options,
    }  # fmt: skip


def removed(world: World, table: Table) -> float:
    """The share of what an oracle would not take that descent does not end with."""
    bad = positions(table.ids, world.pool.ids[~world.good])
    return 1 - float((table.values[bad, 0] >= 1).mean())


def again(world: World, seed: int) -> float:
    """What another descent removes."""
    run = Run.open(world.folder / "run", {"name": world.case})
    run.close()
    measurer = Measurer(
        run, world.pool, world.selecting, seed=seed, task=world.task, models=[], trajectories=[],
        encodings=dict(world.encodings), key=digest(world.task.describe(), seed), recipe=world.recipe,
    )  # fmt: skip
    return removed(world, measurer.table(make(Scorer, {**world.arms["mgd"], "recipe": {"seed": seed}})))


WORLDS: dict[str, Callable[[Path, bool], World]] = {"digits": digits, "noisy": noisy, "mixture": mixture}


def rows(quick: bool, workers: int, worlds: Sequence[str] = tuple(WORLDS)) -> list[Row]:
    """The rows of some worlds."""
    found: list[Row] = []
    for maker in (WORLDS[name] for name in worlds):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            world = maker(Path(folder), quick)
            own, chosen, _ = measured(world, workers)
            notes = chosen.tables["mgd"].meta["notes"]["descent"]
            if world.case == "mgd-digits":
                each = [removed(world, chosen.tables["mgd"]), *(again(world, OWN + k) for k in (1, 2))]
                own.append(_row(world, "mgd", "flips_removed", float(np.mean(each)), None, chosen.seconds["mgd"],
                                each=each, metasteps=len(notes["trajectory"]) - 1))  # fmt: skip
            print(f"{world.case}: {notes['detail']}; {time.perf_counter() - start:.0f} s", file=sys.stderr)
            found += own
    return found


def main() -> None:
    from benchmarks.influence import table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller worlds, two seeds")
    parser.add_argument("--threads", type=int, default=2, help="processes of judged trainings")
    parser.add_argument("--worlds", type=lambda text: text.split(","), default=list(WORLDS), help=",".join(WORLDS))
    chosen = parser.parse_args()
    if unknown := set(chosen.worlds) - set(WORLDS):
        parser.error(f"no such worlds: {', '.join(sorted(unknown))}; choose from {', '.join(WORLDS)}")
    print(table(rows(chosen.quick, chosen.threads, chosen.worlds)))


if __name__ == "__main__":
    main()
