"""The report: complete, offline, small, and unmoved by whatever text a dataset holds."""

from __future__ import annotations

import copy
import doctest
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from assay.core.errors import InputError
from assay.report import curves, figures, page

DOMAINS = {"arithmetic": 3200, "wikipedia": 5200, "code": 2600, "forum": 1400, "boilerplate": 900}
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "</script><script>alert(3)</script>",
    '"><svg onload=alert(4)><a href="https://evil.example/x">click</a>',
    "' onmouseover='alert(5)' style='position:fixed",
    "w" * 10_000,
    "\u202eright to left override\u202c and \u2066isolate\u2069",
    "zero\u200bwidth\u200d\ufeff and \x00\x1b[31m\x07 controls \x7f\x85",
    "Z" + "\u0300\u0301\u0489" * 60 + "algo",
    "🫠" * 300 + "👩‍👩‍👧‍👦",
    "﷽" * 120,
    "lone \ud800 surrogate \u2028 separator \u2029",
    "{{ 7 * 7 }} {% raw %} <!-- --> ]]> &lt;b&gt; &#60;",
    "<b>bold</b><br>%{x} javascript:alert(6) http://evil.example/a.png",
    "سلام دنیا این یک متن فارسی است و می‌خواهیم ببینیم",
    "line\n" * 200,
    "",
]
ARMS = [  # name, class, gain, half of the interval, verdict, cost share, seconds
    ("trak", "gradient", 0.21, 0.04, "better", 3.1, 412.0),
    ("less", "gradient", 0.13, 0.05, "better", 1.4, 260.0),
    ("bm25", "text", 0.018, 0.045, "unresolved", 0.0, 3.2),
    ("perplexity", "forward", -0.09, 0.03, "worse", 0.33, 41.0),
    ("random-1", "none", 0.004, 0.03, "baseline", 0.0, 0.0),
    ("random-2", "none", -0.011, 0.03, "baseline", 0.0, 0.0),
    ("random-3", "none", 0.007, 0.03, "baseline", 0.0, 0.0),
]


def histogram(values: list[float], bins: int = 30) -> dict[str, Any]:
    lo, hi = min(values), max(values)
    edges = [lo + (hi - lo) * i / bins for i in range(bins + 1)]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - lo) / (hi - lo) * bins))] += 1
    return {"edges": edges, "counts": counts}


def scored(rng: random.Random, domains: list[str], texts: list[str], count: int = 700) -> dict[str, Any]:
    rows = []
    for i in range(count):
        domain = rng.choice(domains)
        score = rng.gauss(0.4 - 0.25 * domains.index(domain), 0.5 + 0.1 * domains.index(domain)) * 1e-3
        length, loss = int(rng.lognormvariate(4.6, 0.9)) + 3, abs(rng.gauss(3.1, 0.6))
        rows.append((score, length, loss, domain, f"{i:016x}", rng.choice(texts)))
    rows.sort(reverse=True)

    def card(row: tuple, place: int) -> dict[str, Any]:
        facts = {"percentile": 100 * (1 - place / count), "planted": "copies" if place % 5 == 1 else None}
        return {"score": row[0], "length": row[1], "domain": row[3], "id": row[4], "text": row[5], **facts}

    columns = [list(column) for column in zip(*rows, strict=True)]
    keys = ("score", "length", "loss", "domain", "id", "preview")
    present = [d for d in domains if sum(row[3] == d for row in rows) > 1]
    return {
        "domains": {d: histogram([row[0] for row in rows if row[3] == d]) for d in present},
        "scatter": dict(zip(keys, columns, strict=True)),
        "spearman_length": rng.uniform(-0.5, 0.5),
        "spearman_loss": rng.uniform(-0.5, 0.5),
        "top": [card(row, i) for i, row in enumerate(rows[:8])],
        "bottom": [card(row, count - 1 - i) for i, row in enumerate(rows[: -len(texts) - 1 : -1])],
    }


TEXTS = [
    "Twelve plus thirty is forty-two. Add the tens first, one ten and three tens make forty, then the two ones.",
    "The river rises in the southern hills and reaches the sea after 214 km, passing three towns and a dam that was "
    "finished in 1936. Its lower course has been straightened twice, and floods are now rare. " * 3,
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\n\nprint(gcd(84, 36))\n",
    "Has anyone managed to get the old driver to work? I tried everything in the first post and it still hangs.",
    "Accept cookies. Accept cookies. Terms of service. Privacy. Contact. Home. Accept cookies.",
]


def measured(rng: random.Random, domains: dict[str, int]) -> list[dict[str, Any]]:
    arms = []
    for name, cost, gain, half, verdict, share, seconds in ARMS:
        tilt = [rng.uniform(0.3, 1.9) if gain > 0.01 else 1.0 for _ in domains]
        picked = {d: int(domains[d] * t * 0.1) for d, t in zip(domains, tilt, strict=True)}
        noise = [rng.gauss(0, half / 2) for _ in range(4)]
        losses = [2.31 - gain + by - sum(noise) / 4 for by in noise] if gain else [2.31] * 4
        arms.append(
            {
                "name": name,
                "label": {"trak": "TRAK, 4 checkpoints, 4,096 dimensions"}.get(name, name),
                **{"cost_class": cost, "judged_loss": 2.31 - gain, "by_seed": losses, "verdict": verdict},
                **{"gain_over_random": gain, "ci": [gain - half, gain + half], "selection_seconds": seconds},
                **{"selection_flops": share * 4.1e14, "training_flops": 4.1e14, "selection_flops_share": share},
                **{"selected": sum(picked.values()), "tokens": sum(picked.values()) * 101},
                "domains": picked,
                "contamination": {"hits": int(10 * max(gain, 0)), "enrichment": 1.0 + gain},
                "planted": {
                    "copies of target": {"selected": 40, "in_pool": 60, "enrichment": 1 + 20 * max(gain, 0)},
                    "noise": {"selected": 2, "in_pool": 300, "enrichment": max(0.0, 0.9 - 4 * gain)},
                },
                "dropped": {"below the cut": 11970, "near duplicate": rng.randint(10, 90), "too short": 12},
            }
        )
    return arms


def stages(domains: dict[str, int]) -> list[dict[str, Any]]:
    """A gate that takes nothing, and a filter that keeps a fifth of the smallest domain and nine tenths of the rest."""
    least = min(domains, key=lambda name: domains[name])
    out = {name: count // 5 if name == least else count * 9 // 10 for name, count in domains.items()}
    total, left = sum(domains.values()), sum(out.values())
    rows = lambda count: {"rows": count, "tokens": count * 101}  # noqa: E731
    whole = {name: {"in": count, "out": count} for name, count in domains.items()}
    some = {name: {"in": count, "out": out[name]} for name, count in domains.items()}
    told = {"reasons": {"gopher: words outside [50, 100000]": total - left}}
    flagged = [{"domain": least, "kept": out[least] / domains[least], "others": 0.9}]
    return [
        {"name": "contamination gate", "in": rows(total), "out": rows(total), "domains": whole, "reasons": {}},
        {"name": "gopher", "in": rows(total), "out": rows(left), "domains": some, "starved": flagged, **told},
    ]


def realistic(domains: dict[str, int] = DOMAINS, texts: list[str] = TEXTS) -> dict[str, Any]:
    rng = random.Random(0)
    names, total = list(domains), sum(domains.values())
    scored_arms = ["trak", "less", "bm25", "perplexity"]
    return {
        "format": 1,
        "assay": "0.1.0",
        **{"name": "words: which documents teach arithmetic", "created": "2025-01-31T12:00:00Z"},
        **{"command": "assay run studies/words.toml", "resume_command": "assay run runs/words-6f2c91"},
        "pool": {
            "source": "data/words/*.jsonl.zst",
            "rows": total,
            "tokens": total * 101,
            "domains": {d: {"rows": n, "tokens": n * 101} for d, n in domains.items()},
            "fingerprint": "xxh128:9d1c0a7f3be2",
            "quarantined": {
                **{"total": 7, "reasons": {"not valid JSON": 4, "no column 'text'": 3}},
                "examples": [
                    {"where": "03.jsonl.zst", "row": 8112, "reason": "not valid JSON", "preview": text}
                    for text in texts
                ],
            },
        },
        "target": {"name": "sums-dev", "selecting": 256, "judging": 256, "judged": 256, "measure": "nats per token"},
        "budget": {"unit": "tokens", "amount": 134_000, "share": 0.1},
        "training": {
            **{"model": "decoder, 4 layers, width 192", "parameters": 2_413_000, "steps": 600, "tokens": 1_228_800},
            **{"repeats": 4.0, "seeds": [0, 1, 2, 3], "loss": "mean over tokens"},
        },
        "arms": measured(rng, domains),
        "nulls": {"random_vs_random": {"gain": 0.002, "ci": [-0.028, 0.032], "verdict": "unresolved"}},
        "scores": {arm: scored(rng, names, texts) for arm in scored_arms},
        "curves": {
            "less": [
                {
                    **{"title": "Loss along the descent", "x": "metastep", "y": "loss", "best": 2, "at": [0, 1, 2, 3]},
                    "lines": {"selects": [2.0, 1.8, 1.75, 1.7], "held out": [2.1, 1.95, 1.9, 1.92]},
                    "columns": {"terms": [900, 901, 899, 900]},
                }
            ]
        },
        "pipelines": [{"arms": ["random-1", "trak"], "filters": [], "stages": stages(domains)}],
        "agreement": {
            "arms": scored_arms,
            "spearman": [[1, 0.71, 0.22, -0.35], [0.71, 1, 0.3, -0.2], [0.22, 0.3, 1, 0.05], [-0.35, -0.2, 0.05, 1]],
        },
        "contamination": {
            **{"items": 512, "hits": 9, "by_half": {"selecting": 5, "judging": 4}, "ngram": 13},
            "examples": [{"pool_id": "00ab", "target_id": "dev-17", "text": text[:600]} for text in texts[:6]],
            "planted_recall": 1.0,
        },
        "ledger": [
            {"stage": "tokenize", "wall": 12.1, "cpu": 22.0, "flops": None, "peak_rss": 610 * 2**20},
            {"stage": "score trak", "wall": 412.0, "cpu": 799.5, "flops": 1.27e15, "peak_rss": 2.1 * 2**30},
            {"stage": "train 28 models", "wall": 1900.0, "cpu": 3720.0, "flops": 1.15e16, "peak_rss": 1.9 * 2**30},
        ],
        **{"peak_rss": int(2.1 * 2**30), "wall": 2604.0},
        "checks": [{"name": "halves are disjoint", "ok": True, "detail": "256 and 256 items, none shared"}],
        "warnings": ["less: 3 rows are longer than the context and were cut at 256 tokens"],
        "study": {"pool": {"path": "data/words/*.jsonl.zst"}, "arms": [{"name": "trak", "dim": 4096}], "seeds": 4},
        "environment": {"python": "3.11.9", "torch": "2.6.0", "device": "cpu, 2 threads"},
        "files": {"dataset": "selected/trak.jsonl", "scores": "scores/"},
    }


def hostile() -> dict[str, Any]:
    """Every text, name, key and path of the result is an attack."""
    result = realistic({text or "empty": 100 * (20 - i) for i, text in enumerate(HOSTILE)}, HOSTILE)
    renamed = {}
    for i, arm in enumerate(result["arms"]):
        if not arm["name"].startswith("random"):
            renamed[arm["name"]] = arm["name"] = HOSTILE[i] + str(i)
        arm["label"] = HOSTILE[-2 - i]
        arm["cost_class"] = HOSTILE[i]
        arm["planted"] = {text: {"selected": 1, "in_pool": 2, "enrichment": 2.0} for text in HOSTILE[:7]}
        arm["dropped"] = {text: 3 for text in HOSTILE}
        arm["metrics"] = {HOSTILE[0]: 0.5, HOSTILE[4]: float("nan")}
        arm["contamination"] = {"hits": 3, "enrichment": float("inf")}
    originals = dict(zip(("trak", "less", "bm25", "perplexity"), renamed.values(), strict=True))
    result["scores"] = {originals[name]: entry for name, entry in result["scores"].items()}
    result["scores"][originals["trak"]]["scatter"]["score"][3] = float("nan")
    result["agreement"]["arms"] = list(originals.values())
    for stage, name in zip(result["pipelines"][0]["stages"], HOSTILE, strict=False):
        stage["name"], stage["reasons"] = name, {text: 3 for text in HOSTILE}
        stage["starved"] = [{"domain": text, "kept": float("nan"), "others": 1.0} for text in HOSTILE]
    result["pipelines"][0]["arms"] = HOSTILE
    entry = {text: HOSTILE[0] for text in ("title", "x", "y")}
    result["curves"] = {HOSTILE[1]: [{**entry, "at": [0, 1], "lines": {text: [1.0, float("nan")] for text in HOSTILE}}]}
    for key in ("name", "command", "resume_command", "created", "assay"):
        result[key] = " ".join(HOSTILE[:4]) + HOSTILE[6]
    result["target"]["name"] = HOSTILE[0] + HOSTILE[4]
    result["pool"]["source"] = result["pool"]["fingerprint"] = HOSTILE[2]
    result["pool"]["quarantined"]["reasons"] = {text: 1 for text in HOSTILE}
    result["contamination"]["by_half"] = {text: 1 for text in HOSTILE[:4]}
    result["ledger"] += [{"stage": text, "wall": 3.0, "cpu": float("nan")} for text in HOSTILE]
    result["checks"] = [{"name": text, "ok": False, "detail": text} for text in HOSTILE]
    result["warnings"] = HOSTILE
    result["study"] = {text: HOSTILE for text in HOSTILE}
    result["environment"] = result["files"] = {text: text for text in HOSTILE}
    return result


def minimal() -> dict[str, Any]:
    return {
        "format": 1,
        "name": "m",
        "pool": {"rows": 10},
        "target": {"name": "t", "measure": "nats per example"},
        "budget": {"unit": "examples", "amount": 5},
        "training": {"seeds": [0]},
        "arms": [{"name": "random-1", "verdict": "baseline", "judged_loss": 1.0, "by_seed": [1.0]}],
    }


class Seen(HTMLParser):
    """What a browser would make of the page: its elements with their attributes; every element must close."""

    VOID = {"meta", "link", "br", "img", "input", "hr", "col", "circle", "line", "rect", "path"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag, f"</{tag}> closes another element"


VARIANTS = {"realistic": realistic, "hostile": hostile, "minimal": minimal}


@pytest.fixture(scope="module", params=VARIANTS)
def rendered(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    result = VARIANTS[request.param]()
    return result, page.render(result)


def test_nothing_hostile_is_live(rendered):
    _, text = rendered
    seen = Seen(text)
    scripts = [attributes for tag, attributes in seen.elements if tag == "script"]
    assert scripts == [{}, {"type": "application/json", "id": "data"}]
    assert not {"img", "iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in seen.elements}
    for tag, attributes in seen.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        assert "position" not in str(attributes.get("style"))
    assert seen.open == []


def test_no_request_leaves_the_page(rendered):
    _, text = rendered
    for tag, attributes in Seen(text).elements:
        assert not {"src", "srcset", "data", "action", "poster"} & set(attributes), (tag, attributes)
        assert str(attributes.get("href", "#")).startswith("#"), (tag, attributes)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in Seen(text).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy


def test_the_page_is_small_and_encodable(rendered):
    _, text = rendered
    assert len(text.encode("utf-8")) < 10_000_000
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", text)


def test_embedded_data_parses_and_cannot_close_its_element(rendered):
    _, text = rendered
    raw = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(raw) == 1 and not set("<>&\u2028\u2029") & set(raw[0])
    data = json.loads(raw[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for arm in data["arms"]:
        assert len(arm["y"]) == len(arm["score"]) == len(arm["text"]) == len(arm["xs"][0])
        assert max(arm["text"]) < len(data["texts"])


def test_headings_ids_and_table_captions(rendered):
    _, text = rendered
    seen = Seen(text)
    levels = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for tag, a in seen.elements if tag == "a"]
    assert set(links) <= set(ids)
    sections = [a["id"] for tag, a in seen.elements if tag == "section"]
    assert links == sections
    assert text.count("<table") == text.count("<caption>")


def test_all_arms_are_in_the_table():
    result = realistic()
    text = page.render(result)
    table = text[text.index('id="arm-table"') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == len(result["arms"]) + 1
    for arm in result["arms"]:
        assert f">{arm['name']}</bdi>" in table
    for expected in ("+0.21", "0.17 to 0.25", "−0.09", "3.1×", "33%", "▲", "▼", "◇", "○"):
        assert expected in table, expected


def test_numbers_that_cannot_be_drawn_are_no_trouble():
    result = realistic()
    for value in (float("nan"), float("inf"), 10**400, 0, -0.0):
        for arm in result["arms"]:
            arm.update(gain_over_random=value, judged_loss=value, ci=[value, value], selection_flops_share=value)
            arm["planted"]["noise"]["enrichment"] = value
        result["curves"]["less"][0]["lines"]["selects"][1:3] = [value] * 2
        result["curves"]["less"][0]["at"][0] = value
        result["wall"] = result["peak_rss"] = result["ledger"][0]["wall"] = result["ledger"][0]["flops"] = value
        result["scores"]["trak"]["scatter"]["score"][:4] = [value] * 4
        assert Seen(page.render(result)).elements


def test_every_section_of_a_full_run_is_there_and_none_of_a_minimal_one():
    def sections(result: dict) -> list[Any]:
        return [a["id"] for tag, a in Seen(page.render(result)).elements if tag == "section"]

    assert sections(realistic()) == [
        *("arms", "domains", "filters", "scores", "curves", "agreement", "examples", "planted", "drops"),
        *("contamination", "quarantine", "checks", "ledger", "replay", "study", "environment", "glossary"),
    ]
    assert sections(minimal()) == ["arms", "glossary"]


@pytest.mark.parametrize("part", [key for key in realistic() if key not in minimal()])
def test_optional_parts_may_be_missing_or_null(part):
    for value in ({}, {part: None}):
        result = {key: item for key, item in realistic().items() if key != part}
        assert Seen(page.render({**result, **value})).elements


def test_steering_characters_are_shown():
    text = page.render(hostile())
    assert '<span class="cc" title="U+202E">U+202E</span>' in text
    assert '<span class="cc" title="U+0000">␀</span>' in text
    assert '<span class="cc" title="U+D800">U+D800</span>' in text
    assert re.search(r"\+\d+ marks", text)
    assert "👩‍👩‍👧‍👦" in text and "می‌خواهیم" in text  # joiners inside an emoji or a script are left alone
    assert str(page.rich("a<b>\u202e")) == 'a&lt;b&gt;<span class="cc" title="U+202E">U+202E</span>'


def test_a_huge_run_still_fits():
    result = realistic()
    entry = result["scores"]["trak"]
    for key, values in entry["scatter"].items():
        entry["scatter"][key] = values * 20
    entry["scatter"]["preview"] = [chr(0x1F600 + i % 60) * 600 + str(i) for i in range(14_000)]
    for side in ("top", "bottom"):
        entry[side] = [{**entry[side][0], "text": "🫠\u202e" * 50_000} for _ in range(40)]
    result["scores"] = {f"{name} {i}": copy.copy(e) for i in range(6) for name, e in result["scores"].items()}
    result["arms"] = [{**result["arms"][0], "name": name} for name in result["scores"]] + result["arms"]
    text = page.render(result)
    assert len(text.encode()) < 10_000_000
    Seen(text)


def with_arms(*names: str, **changes: Any) -> dict[str, Any]:
    result = realistic()
    result["arms"] = [{**arm, **changes} for arm in result["arms"] if arm["name"] in names]
    return result


def test_verdict_better():
    sentences = page.verdict_sentences(realistic())
    assert sentences[0] == "trak beats random by 0.21 nats per token (95% CI 0.17 to 0.25) over 4 paired seeds."
    assert sentences[1] == "Selecting cost 3.1 training runs."
    assert sentences[2] == "less also beats random, by 0.13 (95% CI 0.08 to 0.18)."
    assert sentences[3] == "bm25 is unresolved: its interval includes zero."
    assert sentences[4] == "Worse than random: perplexity by 0.09 (95% CI 0.06 to 0.12)."
    assert sentences[5:] == ["Filters change the mixture of domains: gopher keeps 20% of boilerplate."]


def test_verdict_no_gain():
    sentences = page.verdict_sentences(with_arms("bm25", "perplexity", "random-1"))
    assert sentences[0] == "No gain: no arm was shown to beat random on sums-dev over 4 paired seeds."
    assert "bm25 is unresolved: its interval includes zero." in sentences
    assert not any("cost" in sentence for sentence in sentences)
    assert "No gain shown" in page.render(with_arms("bm25", "perplexity", "random-1"))


def test_an_arm_that_fell_by_lot_is_marked_and_explained() -> None:
    result = with_arms("bm25", "perplexity", "random-1")
    plain = page.render(result)
    for arm, lot in zip(result["arms"], (0.9, 0.1, 1.0), strict=True):
        arm["by_lot"] = lot
    marked = page.render(result)
    assert "†" not in plain and "fell by lot" not in plain and "fell by lot" in marked
    named = re.findall(r">([\w-]+)(?:</bdi> †| †</bdi>)", marked)
    assert named == ["bm25"] * (marked.count("†") - 1), "random arms need no mark"


def test_verdict_only_random():
    assert page.verdict_sentences(minimal()) == ["Nothing to compare: only random arms were trained."]
    assert "No comparison" in page.render(minimal())


def test_verdict_several_unresolved():
    result = with_arms("bm25", "trak", verdict="unresolved")
    assert page.verdict_sentences(result)[1] == "trak and bm25 are unresolved: their intervals include zero."


@pytest.mark.parametrize(
    ("flops", "seconds", "expected"),
    [
        (0.0, 3.2, "Selecting cost no training compute, only 3.2 s of other work."),
        (0.0, 0.0, "Selecting cost no training compute."),
        (1.27e14, 9.0, "Selecting cost 31% of one training run."),
        (4.1e14, 9.0, "Selecting cost 1 training run."),
    ],
)
def test_verdict_cost(flops, seconds, expected):
    result = with_arms("trak", selection_flops=flops, selection_seconds=seconds)
    assert page.verdict_sentences(result)[1] == expected


def test_verdict_without_interval_and_with_cautions():
    result = with_arms("trak", ci=None, gain_over_random=0.0042, contamination={"hits": 12, "enrichment": 3.2})
    result["training"]["seeds"] = [0]
    result["nulls"]["random_vs_random"]["verdict"] = "better"
    result["checks"] = [{"name": "coverage is 1", "ok": False, "detail": "0.97"}]
    sentences = page.verdict_sentences(result)
    assert sentences[0] == "trak beats random by 0.004 nats per token with a single seed."
    assert any("3.2 times as often" in sentence for sentence in sentences)
    assert any(sentence.startswith("Caution: random against random") for sentence in sentences)
    assert sentences[-1] == "1 check failed: coverage is 1."


def test_build_writes_one_file_and_leaves_nothing_aside(tmp_path: Path):
    (tmp_path / "result.json").write_text(json.dumps(hostile()), encoding="utf-8")
    written = page.build(tmp_path)
    assert written == tmp_path / "report.html"
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "result.json"]
    assert page.build(tmp_path).read_bytes() == written.read_bytes()


def broken(**changes: Any) -> str:
    result = minimal()
    result.update(changes)
    return json.dumps({key: value for key, value in result.items() if value is not ...})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (broken()[:200], "not complete JSON"),
        ("", "not complete JSON"),
        ("[1, 2]", "its format is None"),
        (broken(format=2), "its format is 2"),
        (broken().replace('"arms"', '"limbs"'), "arms is missing"),
        (broken(pool={"rows": "ten"}), "pool.rows is str"),
        (broken(arms=[{"name": "a"}]), "arms[0].verdict is missing"),
        (broken(scores={"a": {"domains": {"d": {"edges": [1]}}}}), "scores.a.domains.d.counts is missing"),
    ],
)
def test_a_result_that_cannot_be_used_says_why(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        page.build(tmp_path)
    assert message in caught.value.why
    assert str(tmp_path / "result.json") == caught.value.where and caught.value.fix
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("module", [page, figures])
def test_examples_in_docstrings(module):
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_seeds_are_drawn_only_where_they_agree_with_the_stated_gain():
    arms = [
        {"name": "random-1", "verdict": "baseline", "by_seed": [1.0, 1.2], "judged_loss": 1.1},
        {"name": "a", "verdict": "better", "by_seed": [0.9, 1.0], "gain_over_random": 0.15, "judged_loss": 0.95},
        {"name": "b", "verdict": "better", "by_seed": [0.9, 1.0], "gain_over_random": 0.5, "judged_loss": 0.95},
    ]
    gains = figures.paired_gains(arms)
    assert list(gains) == ["a"] and gains["a"] == pytest.approx([0.1, 0.2])


def test_a_heavy_tail_does_not_flatten_the_figures():
    edges = [float(i) for i in range(101)]
    counts = [500, 400, 300, 100, *[0] * 95, 1]
    names = figures.Domains(["d"])
    drawn = figures.histograms({"domains": {"d": {"edges": edges, "counts": counts}}}, names)
    assert drawn is not None and drawn["outside"] == 1 and drawn["ticks"][-1]["value"] <= 5
    values = [random.Random(i).gauss(0, 1) for i in range(1000)]
    lo, hi = figures.robust([*values, 1e6])
    assert -10 < lo < hi < 10


def test_many_domains_share_the_last_colour():
    names = figures.Domains([f"d{i}" for i in range(20)])
    assert [names.colour(f"d{i}") for i in (0, 7, 8, 19)] == [0, 7, 8, 8]
    assert names.legend()[-1] == {"name": "12 smaller domains", "colour": 8}


def test_a_curve_goes_through_its_points_and_breaks_where_there_is_none():
    entry = realistic()["curves"]["less"][0]
    drawn = curves.curve(entry)
    assert drawn
    first, second = (line["path"] for line in drawn["lines"])
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", second)[1:]]
    assert second.count("M") == 1 and second.count("L") == 3 and first != second
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places].index(min(y for _, y in places)) == 0, "the greatest loss stands highest"
    assert drawn["best_at"] == 2 and 60 < drawn["best"] < 70
    assert drawn["rows"][2] == [2, 1.75, 1.9, 899] and drawn["heads"] == ["metastep", "selects", "held out", "terms"]

    entry["lines"]["selects"][1] = float("nan")
    broken = curves.curve(entry)
    assert broken and broken["lines"][0]["path"].count("M") == 2
    entry["lines"] = {"selects": [float("inf")] * 4, "short": [1.0]}
    assert curves.curve(entry) is None, "nothing to draw"
    drawn = curves.curve({**realistic()["curves"]["less"][0], "best": None})
    assert drawn and drawn["best"] is None


def test_the_curve_is_in_the_page():
    text = page.render(realistic())
    text = text[text.index('<section id="curves"') :]
    text = text[: text.index("</section>")]
    assert text.count('class="curve') == 2 and "held out" in text and "Dashed: what was kept, metastep 2." in text


def test_filters_are_shown_stage_by_stage():
    """Rows left, what was dropped and kept, the share of each domain, and a mark where a domain is starved."""
    shown_page = page.render(realistic())
    section = shown_page.split('id="filters"')[1].split("</section>")[0]
    least = min(DOMAINS, key=lambda name: DOMAINS[name])
    total = sum(DOMAINS.values())
    left = sum(n // 5 if name == least else n * 9 // 10 for name, n in DOMAINS.items())
    for shown in (f"{total:,}", f"{left:,}", f"{total - left:,}", "gopher: words outside [50, 100000]", "<b>! 20%</b>"):
        assert shown in section, shown
    assert section.count("<b>!") == 1
    assert f"Filters change the mixture of domains: gopher keeps 20% of {least}" in shown_page
    result = realistic()
    result["pipelines"] = []
    assert 'id="filters"' not in page.render(result)
