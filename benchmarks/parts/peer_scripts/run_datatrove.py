"""datatrove's filters of text in the peers' environment: their verdicts and statistics, or their speed.

    python run_datatrove.py {statistics,speed} documents.jsonl out [--processes N] [--filters NAME,...]

`statistics` writes statistics.npz, a row a document: what datatrove's own functions of words, lines and repeats give,
and the verdict of each filter. `speed` writes speed.json: wall-clock and CPU seconds of each filter over all
documents, in N processes that have read the documents and run the filter on a few of them before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from datatrove.data import Document  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.filters import (  # pyright: ignore[reportMissingImports]
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)  # fmt: skip
from datatrove.pipeline.filters import gopher_repetition_filter as repetition  # pyright: ignore[reportMissingImports]
from datatrove.utils.text import (  # pyright: ignore[reportMissingImports]
    PUNCTUATION_SET,
    TERMINAL_PUNCTUATION,
    split_into_sentences,
    split_into_words,
)  # fmt: skip


def language():
    """datatrove's LanguageFilter, which asks py3langid in the place of a model that would have to be downloaded."""
    from datatrove.pipeline.filters import LanguageFilter  # pyright: ignore[reportMissingImports]
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    class Asked:
        def predict(self, document):
            ranked = dict(identifier.rank(document.text.replace("\n", " ")))
            best = next(iter(ranked.items()))
            return best, {"en": ranked["en"]}

    LanguageFilter._requires_dependencies = []  # packages that fetch and lock the model's file
    made = LanguageFilter(languages=["en"])
    made.model = Asked()
    return made


# C4's filter is the last of all, for it edits what it is given.
FILTERS = {
    "gopher": (GopherQualityFilter, GopherRepetitionFilter),
    "c4": (C4QualityFilter,),
    "fineweb": (FineWebQualityFilter,),
    "rules": (GopherQualityFilter, GopherRepetitionFilter, FineWebQualityFilter, C4QualityFilter),
    "language": (language,),
}
VERDICTS = ("gopher", "c4", "fineweb")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
WARM = 20


def read(documents: Path) -> list[str]:
    with open(documents, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def verdict(made: list, text: str) -> bool:
    """Whether a document passes all; each filter is given the document as it came, for C4's edits it."""
    passed = True
    for one in made:
        result = one.filter(Document(text=text, id="0"))
        passed &= result[0] if isinstance(result, tuple) else result
    return passed


def statistics(text: str) -> dict[str, float]:
    words = split_into_words(text)
    plain = [w for w in words if any(c not in PUNCTUATION_SET for c in w)]
    lines, size, number = text.splitlines(), len(text), max(len(words), 1)
    found = {
        "words": len(plain), "word_length": float(np.mean([len(w) for w in plain])) if plain else 0.0,
        "hashes": text.count("#") / number, "ellipses": (text.count("...") + text.count("\u2026")) / number,
        "bullet_lines": sum(s.lstrip().startswith(("\u2022", "-")) for s in lines) / max(len(lines), 1),
        "ellipsis_lines": sum(s.rstrip().endswith(("...", "\u2026")) for s in lines) / max(len(lines), 1),
        "alpha_words": sum(any(c.isalpha() for c in w) for w in words) / number,
        "stop_words": len(STOP_WORDS & set(words)),
    }  # fmt: skip
    for name, parts in (("line", re.split("\n+", text)), ("paragraph", re.split("\n{2,}", text.strip()))):
        copies, characters = repetition.find_duplicates(parts)
        found[f"dup_{name}s"], found[f"dup_{name}_chars"] = copies / len(parts), characters / size
    for n in (2, 3, 4):
        grams = repetition.get_n_grams(words, n)
        found[f"top_{n}"] = repetition.find_top_duplicate(grams) / size if grams else 0.0
    for n in range(5, 11):
        found[f"dup_{n}"] = repetition.find_all_duplicate(words, n) / size
    filled = [line for line in text.split("\n") if line.strip()]
    found["ended_lines"] = sum(x.endswith(tuple(TERMINAL_PUNCTUATION)) for x in filled) / len(filled)
    found["short_lines"] = sum(len(x) <= 30 for x in filled) / len(filled)
    found["fineweb_dup"] = repetition.find_duplicates(filled)[1] / len(text.replace("\n", ""))
    found["newlines"] = text.count("\n") / number
    found["all_sentences"] = sum(len(split_into_sentences(x.strip())) for x in lines if x.strip())
    return found


def write_statistics(texts: list[str], out: Path) -> None:
    rows = [statistics(text) for text in texts]
    arrays = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    for name in VERDICTS:
        made = [kind() for kind in FILTERS[name]]
        arrays[f"passes_{name}"] = np.array([verdict(made, text) for text in texts], dtype=np.float64)
    np.savez(out / "statistics.npz", **arrays)  # pyright: ignore[reportArgumentType]


def work(task: tuple[str, list[str]]) -> tuple[float, float, float]:
    """Start and end on the wall clock, and CPU seconds of one process."""
    name, texts = task
    made = [kind() for kind in FILTERS[name]]
    for text in texts[:WARM]:
        verdict(made, text)
    start, cpu = time.time(), time.process_time()
    for text in texts:
        document = Document(text=text, id="0")
        for one in made:
            one.filter(document)
    return start, time.time(), time.process_time() - cpu


def write_speed(texts: list[str], out: Path, processes: int, names: list[str]) -> None:
    found = {}
    for name in names:
        # A new process for each filter and share: words that the last one cut are not kept.
        with get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
            done = pool.map(work, [(name, texts[k::processes]) for k in range(processes)], chunksize=1)
        seconds = max(end for _, end, _ in done) - min(start for start, _, _ in done)
        found[name] = {"seconds": seconds, "cpu": sum(cpu for *_, cpu in done), "documents": len(texts)}
    (out / "speed.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("statistics", "speed"))
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--filters", default=",".join(FILTERS))
    chosen = parser.parse_args()
    texts = read(chosen.documents)
    if chosen.what == "statistics":
        write_statistics(texts, chosen.out)
    else:
        write_speed(texts, chosen.out, chosen.processes, chosen.filters.split(","))


if __name__ == "__main__":
    main()
