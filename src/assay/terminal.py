"""What the terminal shows: progress with the time left over all stages, tables of results and plans."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from assay.core.progress import Progress

MARKS = {"better": "▲", "worse": "▼", "unresolved": "·"}
# Failed checks that are told one by one.
SHOWN = 5
STYLES = {"better": "bold green", "worse": "red", "unresolved": "yellow", "baseline": "dim"}


def terminal_safe(text: str) -> str:
    """Control characters of file contents made visible, so that they cannot drive the terminal.

    >>> terminal_safe("news\x1b[2J")
    'news\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _safe(found: Any) -> Any:
    """What is shown, with every name and sentence in it made safe."""
    if isinstance(found, str):
        return terminal_safe(found)
    if isinstance(found, dict):
        return {_safe(key): _safe(value) for key, value in found.items()}
    return [_safe(value) for value in found] if isinstance(found, list | tuple) else found


class Bars(Progress):
    """A live line on a terminal; a line for each finished stage elsewhere. Speaks on standard error only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.expected: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._stage, self._units, self._count, self._kept, self._label = "", 0, 0, 0, ""
        self._began = self._start = self._paced = time.perf_counter()
        self._live: Live | None = None

    def expect(self, seconds: dict[str, float]) -> None:
        """Estimated seconds of each stage: what the time left is computed from."""
        self.expected = dict(seconds)

    def begin(self, stage: str, units: int, label: str = "") -> None:
        if stage != self._stage:  # a method may announce itself once for its preparation and once for its shards
            self._began = time.perf_counter()
        self._stage, self._units, self._count, self._kept, self._label = stage, units, 0, 0, label or stage
        self._paced = time.perf_counter()
        if self.console.is_terminal and self._live is None:
            self._live = Live(get_renderable=self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def advance(self, units: int = 1) -> None:
        self._count += units

    def skip(self, units: int) -> None:
        self._count, self._kept = self._count + units, self._kept + units

    def end(self) -> None:
        seconds = time.perf_counter() - self._began
        self._done[self._stage] = self._done.get(self._stage, 0.0) + seconds
        self._began, self._stage = time.perf_counter(), ""
        if seconds >= 0.5:
            parts = ("  ✓ ", "green"), _fit(self._label), (f"{duration(seconds):>12}", "dim")
            self.console.print(Text.assemble(*parts))

    def warn(self, message: str) -> None:
        self.console.print(Text.assemble(("warning: ", "yellow"), terminal_safe(message)))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def remaining(self) -> float | None:
        """Seconds left, from the estimates scaled by how long the finished stages took against theirs; without
        estimates, those of the current stage at its own pace."""
        if not self.expected:
            made = self._count - self._kept
            return (time.perf_counter() - self._paced) * (self._units - self._count) / made if made else None
        names = list(self.expected)
        reached = [i for i, name in enumerate(names) if name in self._done or name == self._stage]
        if not reached:
            return sum(self.expected.values())
        part = min(1.0, self._count / self._units) if self._units else 0.0
        current = self.expected.get(self._stage, 0.0)
        # Stages come in this order: what lies before the last one reached and never began was kept from another run.
        ahead = sum(self.expected[name] for name in names[max(reached) + 1 :]) + current * (1 - part)
        behind = sum(v for k, v in self.expected.items() if k in self._done) + current * part
        spent = sum(v for k, v in self._done.items() if k in self.expected)
        spent += time.perf_counter() - self._began if part else 0.0
        # Trust the measured pace only as far as there is work behind it.
        return ahead * min(3.0, max(0.33, (spent + 10) / (behind + 10)))

    def _line(self) -> Text:
        share = min(1.0, self._count / self._units) if self._units else 0.0
        bar = "━" * int(24 * share)
        left = self.remaining()
        eta = f", about {duration(float(round(left)))} left" if left is not None else ""
        elapsed = duration(float(round(time.perf_counter() - self._start)))
        line = Text.assemble(
            ("  ▸ ", "cyan"), _fit(self._label), (bar, "cyan"), ("─" * (24 - len(bar)), "dim"),
            f" {share:4.0%}", (f"  {elapsed}{eta}", "dim"),
        )  # fmt: skip
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


LABEL = 30


def _fit(label: str) -> str:
    """A label in its column: padded, or cut in the middle so that both ends can be read.

    >>> len(_fit("read")), _fit("features: somewhere.long.gradients (target)")
    (31, 'features: somew…ients (target) ')
    """
    label = terminal_safe(label)
    if len(label) > LABEL:
        half = (LABEL - 1) // 2
        label = label[: LABEL - 1 - half] + "…" + label[-half:]
    return f"{label:<{LABEL + 1}}"


def duration(seconds: float | None) -> str:
    """`duration(75)` is '1 min 15 s'.

    >>> duration(75), duration(3.21), duration(7300)
    ('1 min 15 s', '3.2 s', '2 h 02 min')
    """
    if seconds is None:
        return "?"
    if seconds < 59.95:
        return f"{seconds:.0f} s" if float(seconds).is_integer() else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(amount: float) -> str:
    """Bytes for people.

    >>> size(2_300_000_000)
    '2.3 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit in ("B", "kB") else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def show_result(result: dict[str, Any], console: Console | None = None) -> None:
    """The arms, the verdict in a sentence, and where things are."""
    from assay.summary import LOT

    console, result = console or Console(), _safe(result)
    whole = any("over_everything" in arm for arm in result["arms"])
    drawn = [a["name"] for a in result["arms"] if a["verdict"] != "baseline" and a.get("by_lot", 0.0) > LOT]
    title = f"{result['name']}: judged on {result['target']['judged']} held-out items"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ["arm", "loss", "gain", f"{result['study']['verify']['level']:.0%} CI", "verdict", "cost"]
    for name in names + (["over all"] if whole else []):
        table.add_column(name, justify="left" if name in ("arm", "verdict") else "right", no_wrap=True)
    for arm in result["arms"]:
        gain, ci = arm["gain_over_random"], arm["ci"]
        mark = " †" if arm["name"] in drawn else ""
        row = [
            Text(arm["name"] + mark), f"{arm['judged_loss']:.3f}", "" if gain is None else f"{gain:+.3f}",
            "" if ci is None else f"{ci[0]:+.3f} .. {ci[1]:+.3f}", Text(arm["verdict"], STYLES[arm["verdict"]]),
            f"{arm['selection_flops_share']:.1f}x",
        ]  # fmt: skip
        over = arm.get("over_everything")
        if whole:
            row.append("" if over is None else f"{over['gain']:+.3f} {MARKS[over['verdict']]}")
        table.add_row(*row)
    console.print(table)
    console.print(Text("loss: judged; gain: over random, positive = better; cost: in training runs", "dim"))
    if drawn:
        console.print(Text("†: more than half fell by lot; the luck of that draw is in the interval", "dim"))
    for arm in result["arms"]:
        aucs = {k: v["auc"] for k, v in arm["planted"].items() if v.get("auc") is not None and k == "flipped"}
        for kind, value in aucs.items():
            if not arm["name"].startswith("random"):
                console.print(Text(f"AUC of {kind} detection by {arm['name']}: {value:.3f}"))
    for pipeline in result["pipelines"]:
        left = [f"{stage['name']} {stage['out']['rows']:,}" for stage in pipeline["stages"]]
        who = ", ".join(pipeline["arms"][:4]) + (", ..." if pipeline["arms"][4:] else "")
        console.print(Text(f"rows left for {who}: {', '.join(left)} of {result['pool']['rows']:,}", "dim"))
    best = result["recommended"]
    text = (
        f"{best} beats random selection by the most; arms are not tested against each other."
        if best
        else "No gain: no arm was shown to beat random selection at this budget."
    )
    console.print(Text(text, "bold"))
    failed = [check for check in result["checks"] if check["ok"] is False]
    for check in failed[:SHOWN]:
        console.print(Text(f"check failed: {check['name']}: {check['detail']}", "bold red"))
    if failed[SHOWN:]:
        console.print(Text(f"{len(failed) - SHOWN} more checks failed: see the report", "bold red"))


def show_league(record: dict[str, Any], console: Console | None = None) -> None:
    """The tables of a track, the largest gain first."""
    from assay.summary import LOT

    console, record = console or Console(), _safe(record)
    for name, found in record["tables"].items():
        family = found["family"]
        table = Table(
            title=Text(f"{record['track']['name']}: {name}"), title_justify="left", box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )  # fmt: skip
        for column in ("method", "loss", "gain", f"{found['level']:.0%} CI", "together", "verdict", "best", "cost"):
            left = column in ("method", "verdict", "best")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row in sorted(found["entries"], key=lambda row: -row["gain"]):
            both = family["entries"].get(row["name"])
            verdict, ci = (row["verdict"], None) if both is None else (both["verdict"], both["ci"])
            mark = "=" if row["name"] in (family["best"], *family["tied"]) else ""
            cells = [f"{a:+.3f} .. {b:+.3f}" for a, b in (row["ci"], *([ci] if ci else []))]
            shown = row["name"] + (" †" if row["by_lot"] > LOT else "")
            table.add_row(
                Text(shown, "italic" if row["oracle"] else ""), f"{row['judged_loss']:.3f}",
                f"{row['gain']:+.3f}", cells[0], cells[1] if ci else "", Text(verdict, STYLES[verdict]), mark,
                f"{row['cost']:.1f}x",
            )  # fmt: skip
        console.print(table)
    text = "together: intervals that hold for all methods of a table at once; =: not told from the best; oracle: knows;"
    text += " †: fell by lot, its luck is in the intervals"
    console.print(Text(text, "dim"))


def show_intent(trust: Any) -> None:
    """What a verification is about to do, on standard error, before it takes time."""
    spec, job = trust.spec, trust.job
    subset, names = round(spec.share * len(job.pool)), ", ".join(e.name for e in trust.entries)
    tried = sum(len(e.variants) for e in trust.entries)
    halves = f"{len(trust.select)} choose options, {len(trust.judge)} are reported"
    lines = [
        f"{len(job.pool):,} examples, {len(trust.target)} targets: {halves}",
        f"{spec.subsets} subsets of {subset:,} x {spec.seeds} seed{'s' if spec.seeds > 1 else ''} = "
        f"{spec.subsets * spec.seeds} trainings of "
        f"{trust.recipe.steps} steps, then the checks",
        f"methods: {names} ({tried} variants)",
        _outlook(trust),
    ]  # fmt: skip
    console = Console(stderr=True)
    for line in lines:
        console.print(Text("  " + terminal_safe(line), "dim"))


def _outlook(trust: Any) -> str:
    """How long the trainings will take, from a few steps of them."""
    from assay.trust.cost import pace, trainings
    from assay.trust.run import wanted

    job = trust.job
    encoded = job.task.encoded(job.encodings[job.pool.fingerprint])
    one = pace(job.task, encoded, job.pool.ids, trust.recipe, trust.spec) * trust.recipe.steps / job.workers
    own = sum(not e.null for e in trust.entries)
    counts = trainings(trust.spec, own + 1, wanted(trust))
    parts = [f"{name.replace('_', '-')} {duration(max(1, round(one * n)))}" for name, n in counts.items()]
    return f"retraining takes about {duration(max(1, round(one * sum(counts.values()))))}: {', '.join(parts)}"


def show_smooth_intent(trust: Any) -> None:
    """What measuring metasmoothness is about to do."""
    from assay.trust.smooth import listed

    job, spec, count = trust.job, trust.job.study.smooth, len(listed(trust, root=1.0))
    lines = [
        f"{len(job.pool):,} examples, {len(trust.target)} targets, trainings of {trust.recipe.steps} steps",
        f"{count} kind{'s' if count > 1 else ''} of training x (1 + 2 x {spec.directions} directions) = "
        f"{count * (1 + 2 * spec.directions)} trainings",
    ]  # fmt: skip
    for line in lines:
        Console(stderr=True).print(Text("  " + terminal_safe(line), "dim"))


def show_smooth(result: dict[str, Any], console: Console | None = None) -> None:
    """Metasmoothness of the training as it is and with each change, and what it means."""
    console, result = console or Console(), _safe(result)
    found = result["smooth"]
    count = found["directions"]
    title = f"{result['name']}: data weights {found['center']:g} moved by {2 * found['h']:.0%} in {count} directions"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    read = "-margin" if result["target"]["measure"] == "margin" else "loss"
    own = any(row.get("metric") is not None for row in found["rows"])
    for name in ("training", "linearity", "S", "S'", "curvature", *(["S, metric"] if own else []), read):
        table.add_column(name, justify="left" if name == "training" else "right", no_wrap=name != "training")
    for row in found["rows"]:
        if row.get("error"):
            table.add_row(Text(row["name"]), "-")
            continue
        names = ("agreement", "mended", "curvature", *(["metric"] if own else []))
        numbers = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
        value = Text("-" if row["linearity"] is None else f"{row['linearity']:.3f}", SMOOTH[row["verdict"]])
        table.add_row(Text(row["name"]), value, *numbers, f"{row['loss']:.3f}")
    console.print(table)
    for number, sentence in enumerate(result["findings"]):
        console.print(Text(sentence, "bold" if number == 0 else ""))


SMOOTH = {"usefully": "bold green", "with care": "yellow", "not usefully": "red", "unknown": "dim"}


def show_trust(result: dict[str, Any], console: Console | None = None) -> None:
    """LDS of every method with interval and cost, the checks, and what was found in sentences."""
    console, result = console or Console(), _safe(result)
    level, bank = f"{result['level']:.0%} CI", result["bank"]
    title = f"{result['name']}: LDS on {result['target']['judging']} reported targets, {bank['trainings']} retrainings"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "LDS", level, "one seed", "verdict", "seconds", "FLOPs"):
        table.add_column(name, justify="left" if name in ("method", "verdict") else "right", no_wrap=name != "verdict")
    for row in sorted(result["methods"], key=_rank):
        if row.get("error"):
            table.add_row(Text(row["name"]), "-", "", "", Text("cannot be measured", "yellow"), "", "")
            continue
        found = row[row["label"]]
        table.add_row(
            Text(row["name"], "dim" if row["null"] else ""), f"{found['value']:.3f}",
            f"{found['ci'][0]:+.2f} .. {found['ci'][1]:+.2f}", f"{row['lds_fixed']['value']:.3f}",
            Text(row["verdict"], TRUST[row["verdict"]]), f"{row['seconds']:.1f}", f"{row['flops']:.1e}",
        )  # fmt: skip
    console.print(table)
    top = bank["ceiling"]
    if top["average"] is not None:
        text = f"ceiling: {top['average']:.3f} (one seed {top['one']:.3f}), what perfect scores could reach"
        console.print(Text(text, "dim"))
    for number, sentence in enumerate(result["findings"]):
        console.print(Text(sentence, "bold" if number == 0 else ""))


TRUST = {
    "beats the nulls": "bold green", "better than random": "green", "no better than random": "yellow",
    "misleading": "red", "null": "dim",
}  # fmt: skip


def _rank(row: dict[str, Any]) -> float:
    return 2.0 if row.get("error") else -row[row["label"]]["value"]


def show_store(facts: dict[str, Any], console: Console | None = None) -> None:
    """What writing a store took."""
    console, facts = console or Console(), _safe(facts)
    number, count = facts["part"]
    part = f" (part {number} of {count})" if count > 1 else ""
    made, rows = facts["computed"], facts["rows"]
    console.print(f"{rows:,} examples x {facts['columns']:,} features{part}, {size(facts['bytes'])} on disk")
    if made:
        kept = ", the others were there" if made < rows else ""
        pace = f"{facts['rows_per_second']:,.0f} examples/s, {facts['tokens_per_second']:,.0f} tokens/s"
        console.print(f"{made:,} computed in {duration(facts['seconds'])}{kept}: {pace}")
    else:
        console.print("nothing to compute: all of them were there, and are what their checksums say")
    if facts["zero_rows"] or facts["underflow"]:
        console.print(f"{facts['zero_rows']:,} rows are zero; {facts['underflow']:,} entries are too small for float16")
    console.print(f"{duration(facts['wall'])}, {size(facts['peak_rss'])} of memory\nstore: {facts['store']}")


def show_scores(found: dict[str, Any], console: Console | None = None) -> None:
    """The spread of each method's scores, and the best examples."""
    console, found = console or Console(), _safe(found)
    title = f"{found['rows']:,} examples scored for {found['target']:,} of the target"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "lowest", "median", "highest", "above zero"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name, spread in found["methods"].items():
        numbers = [f"{spread[k]:+.3g}" for k in ("lowest", "median", "highest")]
        table.add_row(Text(name), *numbers, f"{spread['positive']:.0%}")
    console.print(table)
    for name, spread in found["methods"].items():
        console.print(Text(f"best by {name}: " + ", ".join(one["id"] for one in spread["top"][:3])))
    console.print(
        Text("positive = adding the example lowers the target's loss; methods have units of their own", "dim")
    )
    console.print(f"{duration(found['wall'])}, {size(found['peak_rss'])} of memory\nscores: {found['out']}")


def show_methods(entries: list[dict[str, Any]], console: Console | None = None) -> None:
    """All methods by kind, with their options."""
    console = console or Console()
    for kind in ("scorer", "featurizer", "selector"):
        table = Table(title=f"{kind}s", title_justify="left", show_lines=True)
        for name in ("name", "what it does", "cost", "options"):
            table.add_column(name, overflow="fold")
        for entry in entries:
            if entry["kind"] == kind:
                options = ", ".join(f"{o['name']}={o['default']!r}" for o in entry["options"])
                what = Text.assemble(
                    entry["summary"], ("\n" + entry["formula"], "cyan"), ("\n" + entry["reference"], "dim")
                )
                table.add_row(Text(entry["name"], "bold"), what, entry["cost"], options)
        console.print(table)
