"""Real text that every machine with CPython already has: the language reference and the standard library.

Four domains: "docs" (the topics of `help()`), "docstring", "comment" and "code" (modules of the standard
library, read as text and never imported). `python_text` makes a pool and a target from them, with planted
duplicates, garbled copies and leaks whose truth is known.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from assay.core.errors import InputError, nearest
from assay.data.plant import LEAKS, Planted, Row, assemble, grams, key, opaque, plant, quota, words

__all__ = ["Planted", "python_text", "snippets"]

DOMAINS = ("docs", "docstring", "comment", "code")
LOW, HIGH = 120, 420  # characters in a snippet
TARGETS, PER_GROUP, HELD_OUT = 400, 40, 0.35  # items in a target, items of one group, share of the groups
SMALLEST = 500
SKIPPED = frozenset(
    "site-packages dist-packages test tests idlelib lib2to3 tkinter turtledemo ensurepip pydoc_data encodings "
    "__pycache__".split()
)
STOP_WORDS = frozenset("the a an of to are be it this that which by can may".split())

Snippet = tuple[str, str, str]  # text, domain, group


def snippets(root: Path | None = None) -> Iterator[Snippet]:
    """All (text, domain, group) of the standard library, without exact or near repeats.

    Texts have 120 to 420 characters; the group is the documentation topic or the module's path. `root` is the
    directory of the standard library, by default the running interpreter's.
    """
    home = _home(root)
    seen: set[int] = set()
    topics = _topics(home)
    for group in [*sorted(topics), *_modules(home)]:
        for text, kind in _read(home, topics, group):
            if _fresh(text, seen):
                yield text, kind, group


def python_text(*, target: str = "docs", size: int = 12_000, seed: int = 0, root: Path | None = None) -> Planted:
    """A pool of about `size` rows with known faults, and a target of held-out documents of one domain.

    A tenth of the pool is clean text of the target's domain (or all there is), as much is the same text with its
    words shuffled, and the rest is spread over the other domains. Planted: exact duplicates (4%), near duplicates
    (4%), other garbled copies (2%) and 40 verbatim copies of target items. No other row of the pool shares 13
    consecutive words with the target. The pool is smaller when the library has no more text. The text, and so
    the numbers, differ between versions of Python.
    """
    if target not in DOMAINS:
        raise InputError(f"no target {target!r} in the built-in text", fix=nearest(target, DOMAINS))
    if size < SMALLEST:
        raise InputError(f"size={size} is too small", why="the planted rows need room", fix=f"size >= {SMALLEST}")
    others = [domain for domain in DOMAINS if domain != target]
    held, found = _gather(_home(root), target, size // 10, -(-size // len(others)), seed)
    targets = [(opaque(seed, "target", text), text, group) for text, group in held]
    wanted = {target: min(len(found[target]), size // 10)}
    room = size - 2 * wanted[target] - sum(quota(size, min(LEAKS, len(targets))).values())
    wanted |= _level(room, {domain: len(found[domain]) for domain in others})
    clean = [
        Row(opaque(seed, "clean", text), text, domain)
        for domain in DOMAINS
        for text in sorted(found[domain], key=lambda text: key(seed, "keep", text))[: wanted[domain]]
    ]
    rows, truth = plant(clean, targets, target, size, seed)
    return assemble(clean + rows, targets, truth, seed)


def _gather(
    home: Path, target: str, enough: int, even: int, seed: int
) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """The held-out (text, group) of the target, and the texts of each domain that may go into the pool."""
    topics, modules = _topics(home), _modules(home)
    own = list(topics) if target == "docs" else modules
    queue = sorted([*topics, *modules], key=lambda group: (group not in own, key(seed, "group", group)))
    limit = round(HELD_OUT * len(own))
    seen: set[int] = set()
    held: list[tuple[str, str]] = []
    groups = 0
    while queue and groups < limit and len(held) < TARGETS:
        group = queue.pop(0)
        texts = [text for text, kind in _read(home, topics, group) if kind == target and _fresh(text, seen)]
        texts = sorted(texts, key=lambda text: key(seed, "hold", text))[: min(PER_GROUP, TARGETS - len(held))]
        held += [(text, group) for text in texts]
        groups += bool(texts)

    banned = {gram for text, _ in held for gram in grams(text, 13)}
    found: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    # Topics are few: all of them come before the modules, which are read until every domain has enough.
    for group in sorted(queue, key=lambda group: group not in topics):
        lacking = {d for d in DOMAINS[1:] if len(found[d]) < (enough if d == target else even)}
        if group not in topics and not lacking:
            break
        for text, kind in _read(home, topics, group):
            if _fresh(text, seen) and grams(text, 13).isdisjoint(banned):
                found[kind].append(text)
    return held, found


def _level(total: int, have: dict[str, int]) -> dict[str, int]:
    """`total` spread evenly; what a short domain lacks is given to the others."""
    out: dict[str, int] = {}
    for left, domain in zip(range(len(have), 0, -1), sorted(have, key=lambda d: (have[d], d)), strict=True):
        out[domain] = min(have[domain], (total - sum(out.values())) // left)
    return out


def _fresh(text: str, seen: set[int]) -> bool:
    """Whether under half of the word 5-grams were seen in the texts kept so far; if so, the text is kept."""
    own = grams(text, 5)
    if 2 * len(own & seen) >= len(own):
        return False
    seen |= own
    return True


def _home(root: Path | None) -> Path:
    home = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    if not home.is_dir():
        raise InputError("no source of the standard library", where=str(home), fix="give its directory as root")
    return home


def _modules(home: Path) -> list[str]:
    paths = (path.relative_to(home) for path in home.rglob("*.py"))
    return sorted(path.as_posix() for path in paths if not SKIPPED.intersection(path.parts[:-1]))


def _topics(home: Path) -> dict[str, str]:
    """The topics of `help()`, read as a literal."""
    path = home / "pydoc_data" / "topics.py"
    tree = _parse(path)
    for node in tree[1].body if tree else []:
        name = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(name, ast.Name) and name.id == "topics":
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise InputError(
        "the documentation topics of Python are missing",
        where=str(path),
        why="some systems put them in a package of their own",
        fix="install the full standard library, or give the directory of another one as root",
    )


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Source and tree, or None for a file that is unreadable, not UTF-8 or not of this version of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like, in files that are not ours
        try:
            source = path.read_text(encoding="utf-8")
            return source, ast.parse(source)
        except (OSError, ValueError, SyntaxError, RecursionError):
            return None


def _read(home: Path, topics: dict[str, str], group: str) -> list[tuple[str, str]]:
    """(text, domain) of the snippets of one topic or module."""
    if group in topics:
        return [(text, "docs") for text in _cut(_prose(topics[group]), "\n", _sentences)]
    parsed = _parse(home / group)
    if parsed is None:
        return []
    docstrings, comments, code = _dissect(*parsed)
    return [
        *((text, "docstring") for text in _cut(docstrings, "\n", _sentences)),
        *((text, "comment") for text in _cut(comments, "\n", _sentences)),
        *((text, "code") for text in _cut(code, "\n\n", str.splitlines)),
    ]


def _prose(text: str) -> list[str]:
    """The paragraphs of running text; titles, examples, tables and grammar are left out."""
    out = []
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"(?m)^([*=\-~^\"'`#+])\1{2,}$", "", block)  # underlines of titles
        tokens = words(block)
        common = sum(token in STOP_WORDS for token in tokens)
        coded = "::=" in block or ">>>" in block or re.search(r"\|\s*\n\s*\||[-=+]{5,}", block)
        if not coded and common >= 2 and common >= 0.08 * len(tokens) and _lettered(block):
            out.append(" ".join(block.split()))
    return out


def _lettered(text: str, share: float = 0.75) -> bool:
    solid = re.sub(r"\s", "", text)
    return bool(solid) and sum(map(str.isalpha, solid)) >= share * len(solid)


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.;:!?])\s+", paragraph)


def _dissect(source: str, tree: ast.Module) -> tuple[list[str], list[str], list[str]]:
    """Paragraphs of docstrings, blocks of comments, and chunks of code without either.

    Found by line from the syntax tree: the tokenizer says the same and takes several times as long.
    """
    lines = source.split("\n")
    docstrings: list[str] = []
    documented: set[int] = set()  # lines of docstrings
    inside: set[int] = set()  # lines that begin inside a string
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    docstrings += _prose(inspect.cleandoc(first.value.value))
                    documented.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        elif isinstance(node, ast.expr) and _long_string(node, lines):
            inside.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    comments, code, chunk = [], [], []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        line = line.expandtabs()
        bare = line.strip()
        remark = bare.startswith("#") and number not in inside
        if remark and any(map(str.isalnum, bare)):
            block.append(bare.lstrip("#!: \t"))
        else:
            comments += _remark(block)
            block = []
        if number in inside and number not in documented:
            chunk.append(line.rstrip())
        elif bare and not remark and number not in documented:
            chunk.append(_uncommented(line))
        elif chunk and not bare:
            code.append("\n".join(chunk))
            chunk = []
    return docstrings, comments, [text for text in code if _lettered(text, 0.5)]  # not tables of numbers


def _long_string(node: ast.expr, lines: list[str]) -> bool:
    """Whether it is one triple-quoted string; between parts of other strings there may be comments."""
    if type(node).__name__ not in {"Constant", "JoinedStr", "TemplateStr"} or node.lineno == node.end_lineno:
        return False
    start = lines[node.lineno - 1].encode()[node.col_offset :]
    return re.match(rb"[a-zA-Z]{0,2}(\"{3}|'{3})", start) is not None


def _remark(block: list[str]) -> list[str]:
    text = " ".join(" ".join(block).split())
    return [text] if len(text) >= 80 and _lettered(text) else []


def _uncommented(line: str) -> str:
    """The line without a comment at its end."""
    if "#" not in line:
        return line.rstrip()
    code = re.match(r"""(?:[^'"#]|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")*""", line)
    at = code.end() if code else 0
    return line[:at].rstrip() if line[at : at + 1] == "#" else line.rstrip()


def _cut(paragraphs: list[str], glue: str, split: Callable[[str], list[str]]) -> Iterator[str]:
    """Texts of LOW to HIGH characters: short paragraphs are joined, long ones cut."""
    held = ""
    for paragraph in paragraphs:
        inner = "\n" if glue == "\n\n" else " "
        for piece in [paragraph] if len(paragraph) <= HIGH else _packed(split(paragraph), inner):
            joined = f"{held}{glue}{piece}" if held else piece
            if len(joined) > HIGH:
                joined = piece
            held = joined
            text = textwrap.dedent(held).strip("\n").rstrip()
            if LOW <= len(text) <= HIGH and text.replace("\n", "").isprintable():
                yield text
            if len(text) >= LOW:
                held = ""


def _packed(pieces: list[str], glue: str) -> list[str]:
    """Neighbours joined while they fit."""
    out: list[str] = []
    for piece in pieces:
        if out and len(out[-1]) + len(glue) + len(piece) <= HIGH:
            out[-1] += glue + piece
        else:
            out.append(piece)
    return out
