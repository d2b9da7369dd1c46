"""The report: one run's `result.json` as one self-contained HTML file that asks the network for nothing.

Text of a dataset is treated as hostile. All of it is escaped, characters that steer or hide text are drawn as boxes
with their code, long texts are cut, and a content security policy admits no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from assay.core.errors import InputError
from assay.core.keys import without_nan
from assay.report import curves, figures, pipelines
from assay.summary import LOT

FORMAT = 1
LARGEST = 9_500_000  # bytes of the finished page


@dataclass(frozen=True)
class Limits:
    """How much of the run's lists and texts the page holds."""

    points: int = 16_000  # dots in all scatters together
    preview: int = 160  # characters shown on hover
    text: int = 4_000  # characters of an example
    examples: int = 12  # most useful and least useful, each, per arm
    rows: int = 60  # rows of any other list


LEVELS = (Limits(), Limits(6_000, 100, 1_500, 8, 30), Limits(1_500, 60, 400, 4, 15), Limits(200, 40, 120, 2, 5))

# What `result.json` must hold for the page to be drawn. A key that ends in "?" may be missing or null.
NUMBER = figures.NUMBER
SCHEMA: dict[str, Any] = {
    "name": str,
    "command?": str,
    "resume_command?": str,
    "pool": {
        "rows": int,
        "tokens?": NUMBER,
        "domains?": {"*": {"rows": NUMBER, "tokens?": NUMBER}},
        "quarantined?": {"total": int, "reasons?": {"*": NUMBER}, "examples?": [dict]},
    },
    "target": {"name": str, "measure": str, "selecting?": int, "judging?": int, "judged?": int},
    "budget": {"unit": str, "amount": NUMBER, "share?": NUMBER},
    "training": {"seeds": [NUMBER], "model?": str, "parameters?": NUMBER, "steps?": NUMBER, "repeats?": NUMBER},
    "arms": [
        {
            "name": str,
            "verdict": str,
            "judged_loss": NUMBER,
            "by_seed": [NUMBER],
            "gain_over_random?": NUMBER,
            "ci?": [NUMBER],
            "by_lot?": NUMBER,
            "domains?": {"*": NUMBER},
            "contamination?": {"hits?": NUMBER, "enrichment?": NUMBER},
            "planted?": {"*": {"selected?": NUMBER, "in_pool?": NUMBER, "enrichment?": NUMBER}},
            "dropped?": {"*": NUMBER},
            "metrics?": dict,
            "selection_flops?": NUMBER,
            "training_flops?": NUMBER,
            "selection_flops_share?": NUMBER,
            "selection_seconds?": NUMBER,
        }
    ],
    "nulls?": {"random_vs_random?": {"gain?": NUMBER, "ci?": [NUMBER], "verdict?": str}},
    "scores?": {
        "*": {
            "domains?": {"*": {"edges": [NUMBER], "counts": [NUMBER]}},
            "scatter?": {"score": list, "length?": list, "loss?": list, "domain?": list, "id?": list, "preview?": list},
            "top?": [{"text?": str}],
            "bottom?": [{"text?": str}],
        }
    },
    "curves?": {"*": [curves.SCHEMA]},
    "agreement?": {"arms": [str], "spearman": [list]},
    "contamination?": {"items?": NUMBER, "hits?": NUMBER, "by_half?": dict, "examples?": [dict]},
    "pipelines?": [pipelines.SCHEMA],
    "ledger?": [{"stage": str}],
    "checks?": [{"name": str}],
    "warnings?": [str],
    "environment?": dict,
    "files?": dict,
}


def build(run: Path) -> Path:
    """Write `run/report.html` from `run/result.json` and return its path."""
    source, target = Path(run) / "result.json", Path(run) / "report.html"
    fix = "let the run finish (repeating its command continues it), then build the report again"
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError("no result to report on", where=source, why="the file does not exist", fix=fix) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as problem:
        why = f"not complete JSON: {problem}"
        raise InputError("the result cannot be read", where=source, why=why, fix=fix) from None
    check(result, source)
    drawn = render(result)
    aside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        aside.write_text(drawn, encoding="utf-8")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def check(result: Any, where: object = "result.json") -> None:
    """Raise an `InputError` unless the result is of this format and holds what the page needs."""
    known = result.get("format") if isinstance(result, dict) else None
    if known != FORMAT:
        why = f"its format is {known!r}, this version of assay reads {FORMAT}"
        fix = "build the report with the version of assay that made the run, or repeat the run with this one"
        raise InputError("the result is of another format", where=where, why=why, fix=fix)
    fault = next(_faults(result, _schema(result), ""), None)
    if fault:
        fix = "repeat the run's command; it continues where it stopped and writes the result anew"
        raise InputError("the result is incomplete", where=where, why=fault, fix=fix)


def _schema(result: dict) -> dict[str, Any]:
    """What the result of this kind of run must hold."""
    if result.get("kind") not in ("verify", "metasmooth"):
        return SCHEMA
    from assay.report import trust

    return trust.SCHEMA if result["kind"] == "verify" else trust.SMOOTH


def _faults(value: Any, spec: Any, path: str) -> Iterator[str]:
    kind = type(spec) if isinstance(spec, (dict, list)) else spec
    if not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool)):
        yield f"{path.lstrip('.')} is {type(value).__name__}, which it cannot be"
    elif isinstance(spec, list):
        for i, item in enumerate(value):
            yield from _faults(item, spec[0], f"{path}[{i}]")
    elif isinstance(spec, dict) and "*" in spec:
        for key, item in value.items():
            yield from _faults(item, spec["*"], f"{path}.{key[:40]}")
    elif isinstance(spec, dict):
        for name, inner in spec.items():
            key = name.rstrip("?")
            if value.get(key) is not None:
                yield from _faults(value[key], inner, f"{path}.{key}")
            elif key == name:
                yield f"{path}.{key}".lstrip(".") + " is missing"


# ---------------------------------------------------------------------------------------------------- verdict


def verdict_sentences(result: dict) -> list[str]:
    """What the run found, in plain sentences; the first is the headline."""
    arms = [arm for arm in result["arms"] if arm["verdict"] != "baseline"]
    better, worse, unresolved = (
        sorted((a for a in arms if a["verdict"] == verdict), key=_gain, reverse=True)
        for verdict in ("better", "worse", "unresolved")
    )
    sentences = []
    if better:
        best = better[0]
        sentences += [f"{best['name']} beats random by {_measured(best, result)}.", _cost(best)]
        for arm in better[1:4]:
            sentences.append(f"{arm['name']} also beats random, by {_interval_text(arm, result)}.")
        if better[4:]:
            sentences.append(f"So {'do' if better[5:] else 'does'} {_listing(better[4:])}.")
    elif arms:
        sentences.append(
            f"No gain: no arm was shown to beat random on {result['target']['name']}{_over_seeds(result)}."
        )
    else:
        sentences.append("Nothing to compare: only random arms were trained.")
    if unresolved:
        verb, whose = ("are", "their intervals include") if unresolved[1:] else ("is", "its interval includes")
        sentences.append(f"{_listing(unresolved)} {verb} unresolved: {whose} zero.")
    if worse[:3]:
        each = [f"{arm['name']} by {_interval_text(arm, result, -1)}" for arm in worse[:3]]
        sentences.append(f"Worse than random: {_join(each)}{f', and {len(worse) - 3} more' if worse[3:] else ''}.")
    return sentences + _cautions(result, better)


def _cautions(result: dict, better: Sequence[dict]) -> list[str]:
    sentences = []
    null = (result.get("nulls") or {}).get("random_vs_random") or {}
    if null.get("verdict") in ("better", "worse"):
        sentences.append("Caution: random against random came out as different too, so small gains may be noise.")
    drawn = [arm for arm in better if _overlap(arm) >= 1.5]
    if drawn:
        most = figures.number(max(map(_overlap, drawn)), 2)
        sentences.append(
            f"Left alone, {_listing(drawn)} would have picked rows that overlap the target (up to {most} times as "
            "often as they occur in the pool); they were barred from every selection."
        )
    starving = _starved(result)
    if starving:
        sentences.append(
            f"Filters change the mixture of domains: {_join(starving[:3])}{' and more' if starving[3:] else ''}."
        )
    failed = _checked(result.get("checks") or [])["failed"]
    if failed:
        sentences.append(f"{len(failed)} check{'s' if failed[1:] else ''} failed: {_listing(failed)}.")
    return sentences


def _starved(result: dict) -> list[str]:
    """Which filter keeps how little of which domain, each once."""
    stages = [stage for pipeline in result.get("pipelines") or [] for stage in pipeline["stages"][1:]]
    found = [(stage["name"], one) for stage in stages for one in stage.get("starved") or []]
    return list(dict.fromkeys(f"{name} keeps {figures.percent(one['kept'])} of {one['domain']}" for name, one in found))


def _overlap(arm: dict) -> float:
    """How many times its share of the pool an arm would have taken of rows that overlap the target."""
    found = arm.get("contamination") or {}
    times = found.get("enrichment")
    return times if found.get("hits") and figures.finite(times) else 0.0


def _gain(arm: dict) -> float:
    gain = arm.get("gain_over_random")
    return gain if figures.finite(gain) else -math.inf


def _measured(arm: dict, result: dict) -> str:
    return _interval_text(arm, result, 1, f" {result['target']['measure']}") + _over_seeds(result)


def _over_seeds(result: dict) -> str:
    count = len(result["training"]["seeds"])
    return f" over {count} paired seeds" if count > 1 else " with a single seed" if count else ""


def level_of(result: dict) -> str:
    """The level of the intervals, as people write it.

    >>> level_of({"study": {"verify": {"level": 0.9}}})
    '90%'
    """
    verify = (result.get("study") or {}).get("verify")
    level = verify.get("level") if isinstance(verify, dict) else None
    return f"{100 * level:g}%" if isinstance(level, float) and 0 < level < 1 else "95%"


def _interval_text(arm: dict, result: dict, sign: int = 1, unit: str = "") -> str:
    gain, ci = arm.get("gain_over_random"), arm.get("ci") or ()
    if not figures.finite(gain):
        return "an unknown amount"
    if len(ci) != 2 or not all(map(figures.finite, ci)):
        return f"{figures.fixed(sign * gain, figures.decimals([gain]))}{unit}"
    places = figures.decimals([gain, *ci])
    middle, lo, hi = (figures.fixed(value, places) for value in (sign * gain, *sorted(sign * end for end in ci)))
    return f"{middle}{unit} ({level_of(result)} CI {lo} to {hi})"


def _cost(arm: dict) -> str:
    flops, training, share = (arm.get(k) for k in ("selection_flops", "training_flops", "selection_flops_share"))
    if figures.finite(flops) and figures.finite(training) and training:
        share = flops / training
    seconds = arm.get("selection_seconds")
    took = f", only {figures.duration(seconds)} of other work" if figures.finite(seconds) and seconds else ""
    if not figures.finite(share):
        return "What selecting cost is not known."
    if share <= 0:
        return f"Selecting cost no training compute{took}."
    if share >= 0.995:
        runs = figures.number(float(share), 2 if share < 100 else 3)
        return f"Selecting cost {runs} training run{'' if runs == '1' else 's'}."
    return f"Selecting cost {figures.ratio_text(share)} of one training run."


def _listing(items: Sequence[dict]) -> str:
    names = [item["name"] for item in items]
    return _join([*names[:5], f"{len(names) - 5} more"] if names[6:] else names)


def _join(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if items[1:] else items)


# ------------------------------------------------------------------------------------------------ hostile text

_STEERING = (  # controls, invisible characters and what changes the direction of text
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    r"\U000e0000-\U000e01ef\U000f0000-\U0010ffff]"
    r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"  # joiners, but within a script or an emoji
)
_MARK = (
    r"[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    r"\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]"
)
_SPECIAL = re.compile(rf"(?P<steer>{_STEERING})|(?<={_MARK}{{4}})(?P<tower>{_MARK}+)")


def _name(match: re.Match[str]) -> tuple[str, str]:
    """What to show for a character that would be invisible or do harm, and what it is."""
    if match["tower"]:
        return f"+{len(match['tower'])} marks", "combining marks left out"
    code = ord(match["steer"])
    title = f"U+{code:04X}"
    return (chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else title), title


def plain(text: str) -> str:
    """The text with invisible and steering characters named in brackets; for places that hold no markup.

    >>> plain("a\\u202eb\\x00")
    'a[U+202E]b␀'
    """

    def show(match: re.Match[str]) -> str:
        shown = _name(match)[0]
        return shown if len(shown) == 1 else f"[{shown}]"

    return _SPECIAL.sub(show, text.replace("\r\n", "\n"))


def rich(text: Any) -> Markup:
    """The text, escaped, with invisible and steering characters as boxes."""
    text, parts, end = str(text).replace("\r\n", "\n"), [], 0
    for match in _SPECIAL.finditer(text):
        shown, title = _name(match)
        parts += [
            escape(text[end : match.start()]),
            Markup('<span class="cc" title="{}">{}</span>').format(title, shown),
        ]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def cut(text: Any, limit: int) -> str:
    """At most `limit` characters, the cut marked."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def embedded(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(without_nan(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _shortened(value: Any, limit: int) -> Any:
    """The result with every string cut to `limit` characters, keys and names to 200."""
    if isinstance(value, dict):
        names = ("name", "domain", "arms")
        return {cut(k, 200): _shortened(item, min(limit, 200) if k in names else limit) for k, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item, limit) for item in value]
    return cut(value, limit) if isinstance(value, str) else value


# -------------------------------------------------------------------------------------------------------- page


def render(result: dict) -> str:
    """The page as text, under ten megabytes whatever the run holds."""
    page = ""
    if result.get("kind") in ("verify", "metasmooth"):
        from assay.report import trust

        held, view = _shortened(result, Limits.text), trust.view if result["kind"] == "verify" else trust.smooth
        return _environment().get_template("trust.html").render(view(held)).lstrip()
    for limits in LEVELS:
        page = _environment().get_template("template.html").render(_view(result, limits)).lstrip()
        if len(page.encode()) < LARGEST:
            break
    return page


def _view(result: dict, limits: Limits) -> dict[str, Any]:
    sentences = verdict_sentences(_shortened(result, 80))
    result = _shortened(result, limits.text)
    arms = sorted(result["arms"], key=figures.place)
    domains = figures.Domains.of(result)
    panels, data = _panels(result, arms, domains, limits)
    widths = [ci[1] - ci[0] for ci in (arm.get("ci") or () for arm in arms) if len(ci) == 2]
    verdicts = {arm["verdict"] for arm in arms}
    losses = [arm["judged_loss"] for arm in arms if figures.finite(arm["judged_loss"])]
    spread = max(losses, default=1) - min(losses, default=0)
    return {
        "r": result,
        "limits": limits,
        "level": level_of(result),
        "arms": arms,
        "drawn": [a["name"] for a in arms if a["verdict"] != "baseline" and (a.get("by_lot") or 0) > LOT],
        "sentences": sentences,
        "outcome": "gain" if "better" in verdicts else "none" if verdicts - {"baseline"} else "empty",
        "places": figures.decimals(widths or [arm.get("gain_over_random") for arm in arms]),
        "loss_places": max(3, min(6, figures.decimals([spread]) + 1)),
        "forest": figures.forest(result["arms"], (result.get("nulls") or {}).get("random_vs_random")),
        "domains": domains,
        "composition": figures.composition(result, domains),
        "panels": panels,
        "curves": curves.view(result),
        "checks": _checked(result.get("checks") or []),
        "pipelines": pipelines.view(result, domains),
        "data": data,
        "kinds": _keys(arms, "planted"),
        "metrics": _keys(arms, "metrics"),
        "drops": _keys(arms, "dropped"),
        "ledger": figures.ledger(result.get("ledger") or []),
        "study": json.dumps(result.get("study"), indent=2, ensure_ascii=False) if result.get("study") else "",
    }


def _checked(checks: Sequence[dict]) -> dict[str, list[dict]]:
    """By how they ended; what has no bound was only measured."""
    ended: dict[str, list[dict]] = {"failed": [], "measured": [], "passed": []}
    for one in checks:
        ok = one.get("ok")
        ended["passed" if ok is True else "failed" if ok is False else "measured"].append(one)
    return ended


def _keys(arms: Sequence[dict], field: str) -> list[str]:
    return list(dict.fromkeys(key for arm in arms for key in arm.get(field) or {}))[:40]


def _panels(result: dict, arms: Sequence[dict], domains: figures.Domains, limits: Limits) -> tuple[list[dict], dict]:
    """Per arm with scores: figures and examples for the template, and what the dots of its scatters stand for."""
    scores = {arm["name"]: (result.get("scores") or {}).get(arm["name"]) for arm in arms}
    scored = {name: entry for name, entry in scores.items() if entry}
    panels, packed, texts = [], [], {}
    for name, entry in scored.items():
        scatter = figures.scatters(entry, domains, max(50, limits.points // (2 * len(scored))))
        packed.append(_points(entry, scatter, limits, texts) if scatter else None)
        examples = {side: (entry.get(side) or [])[: limits.examples] for side in ("top", "bottom")}
        histogram = figures.histograms(entry, domains)
        panels.append({"name": name, "scatter": scatter, "histogram": histogram, **examples})
    return panels, {"arms": packed, "texts": list(texts), "domains": [plain(cut(name, 80)) for name in domains.names]}


def _points(entry: dict, scatter: dict, limits: Limits, texts: dict[str, int]) -> dict[str, Any]:
    raw, rows = entry["scatter"], scatter["rows"]

    def column(key: str) -> list:
        values = raw.get(key) or []
        return [values[i] if i < len(values) else None for i in rows]

    def text(value: Any, limit: int) -> int:
        return texts.setdefault(plain(cut(value if value is not None else "", limit)), len(texts))

    return {
        "xs": [plot["xs"] for plot in scatter["plots"]],
        "y": scatter["ys"],
        "score": column("score"),
        "length": column("length"),
        "loss": column("loss"),
        "domain": [text(value, 80) for value in column("domain")],
        "id": [text(value, 60) for value in column("id")],
        "text": [text(value, limits.preview) for value in column("preview")],
    }


def _environment() -> jinja2.Environment:
    def finalize(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def csp_hash(script: str) -> str:
        return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("assay.report", "."),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    for function in (rich, cut, embedded, csp_hash):
        environment.filters[function.__name__] = function
    for name in ("number", "fixed", "percent", "duration", "scaled", "ratio_text", "ratio_fixed", "tint"):
        environment.filters[name] = getattr(figures, name)
    return environment
