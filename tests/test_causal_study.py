"""Studies of a transformers model: prompts and completions, an architecture from a config, fine-tuning from weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from assay import study as studies
from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.core.table import Table
from assay.data.readers import Source, read
from assay.job import run_study
from assay.train import loop
from assay.train.models import init_params, train_tokenizer
from assay.train.recipe import Recipe
from helpers import WORDS, prepared, text_pool

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
pytest.importorskip("peft", reason="needs the extra: pip install 'assay-data[hf]'")

from assay.train.fresh import write_model, write_weights  # noqa: E402
from assay.train.hf import CausalLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def dialogues(n: int, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    words = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2 * n)]
    return [{"ask": f"{i} {words[i]}", "reply": f"{words[n + i]} {seed}"} for i in range(n)]


def pool_of(rows: list[dict[str, str]]) -> Pool:
    prompts, completions = [r["ask"] for r in rows], [r["reply"] for r in rows]
    text = [f"{p}\n{c}" for p, c in zip(prompts, completions, strict=True)]
    return Pool.from_columns({"text": text, "prompt": prompts, "completion": completions})


def model(folder: Path, **options: Any) -> CausalLM:
    folder.mkdir()
    write_model(folder, LLAMA, train_tokenizer(text_pool(40), vocab=280), context=24)
    task = CausalLM(path=str(folder), context=24)
    write_weights(folder, folder, init_params(task.module, 5))
    return CausalLM(path=str(folder), context=24, **options)


def test_the_loss_is_that_of_the_completion_given_the_prompt(tmp_path: Path) -> None:
    task = model(tmp_path / "m", completion_only=True, template="Q: {prompt}\nA: ")
    pool = pool_of(dialogues(12))
    encoded, tokenizer, params = prepared(task, pool, tmp_path / "e"), task.tokenizer(), task.params()
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    found = task.loss(params, encoded.inputs(np.arange(12)))
    cut = 0
    for row, (prompt, completion) in enumerate(zip(pool.column("prompt"), pool.column("completion"), strict=True)):
        head = tokenizer.encode(f"Q: {prompt}\nA: ").ids
        tail = [*tokenizer.encode(completion).ids, 0]
        cut += len(head) + len(tail) > 24
        tail = tail[: 24 - min(len(head), 12)]
        head = head[len(head) + len(tail) - 24 :] if len(head) + len(tail) > 24 else head
        assert encoded.sizes[row] == len(tail) and encoded.lengths[row] == len(head) + len(tail) <= 24
        ids = torch.tensor([[0, *head, *tail]])
        with torch.no_grad():
            logits = whole(input_ids=ids).logits[0, :-1]
        truth = F.cross_entropy(logits[len(head) :], ids[0, 1 + len(head) :])
        assert float(found[row]) == pytest.approx(float(truth), rel=1e-5)
    assert 0 < cut < 12, "some are cut and some are not"


def test_a_prompt_may_be_empty_and_a_completion_may_not(tmp_path: Path) -> None:
    rows = [{"ask": "", "reply": "yes"}, {"ask": "a", "reply": ""}, {"ask": None, "reply": "no"}, {"reply": "x"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    batches = list(read(Source(paths=str(tmp_path / "p.jsonl"), prompt="ask", completion="reply")))
    (batch, rejected) = batches[0]
    assert batch.column("completion").to_pylist() == ["yes", "no"] and batch.column("prompt").to_pylist() == ["", ""]
    assert batch.column("text").to_pylist() == ["\nyes", "\nno"]
    assert {r.reason for r in rejected} == {"empty text", "no column 'ask'"}


def test_chats_are_prompts_and_completions(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "why?"), ("assistant", "so"),
             ("user", "bye")]  # fmt: skip
    chat = [{"role": r, "content": c} for r, c in turns]
    rows = [{"m": chat}, {"m": json.dumps(chat[1:3])}, {"m": chat[:2]}, {"m": [{"role": "user"}]}, {"m": "hi"}, {}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "p.parquet")
    ((batch, rejected),) = read(Source(paths=str(tmp_path / "p.jsonl"), messages="m"))
    assert batch.column("completion").to_pylist() == ["so", "hello"]
    first = "system: be brief\nuser: hi\nassistant: hello\nuser: why?"
    assert batch.column("prompt").to_pylist() == [first, "user: hi"]
    assert batch.column("text").to_pylist()[1] == "user: hi\nhello"
    reasons = [r.reason for r in rejected]
    assert reasons[0] == "no turn of the assistant" and reasons[1] == "not a chat: turns are {role, content}"
    assert reasons[2] == "not a chat" and reasons[3] == "no column 'm'"
    ((batch, rejected),) = read(Source(paths=str(tmp_path / "p.parquet"), messages="m"))
    assert batch.column("prompt").to_pylist() == [first] and not rejected


def test_training_begins_at_the_stored_weights(tmp_path: Path) -> None:
    task = model(tmp_path / "m", fine_tune=True)
    pool = text_pool(6)
    encoded = prepared(task, pool, tmp_path / "e")
    recipe = Recipe(steps=2, terms_per_step=20, lr=1e-12, optimiser="sgd")
    stored = task.params()
    for seed in (0, 1):
        made = loop.train(task, encoded, np.arange(6), Selection.everything(pool.ids), recipe.with_seed(seed)).params
        assert all(torch.allclose(made[n], p, rtol=0, atol=1e-9) for n, p in stored.items())
    key = task.describe()
    write_weights(tmp_path / "m", tmp_path / "m", init_params(task.module, 6))
    again = CausalLM(path=str(tmp_path / "m"), context=24, fine_tune=True)
    assert again.describe() != key, "results are keyed by the weights that training begins from"
    assert CausalLM(path=str(tmp_path / "m"), context=24).stored() is None


def files(folder: Path) -> dict[str, Any]:
    for name, rows in (("p", dialogues(40)), ("t", dialogues(12, seed=1))):
        for k, row in enumerate(rows):
            row["task"] = f"task {k % 2}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    columns = {"prompt": "ask", "completion": "reply"}
    recipe = {"terms_per_step": 64}
    return {
        "budget": "40%", "methods": ["random", {"name": "less", "subtask": "task", "share": 0.3, "epochs": 2}],
        "pool": {"path": str(folder / "p.jsonl"), **columns},
        "target": {"path": str(folder / "t.jsonl"), "keep": ["task"], **columns},
        "task": {
            "kind": "causal", "config": LLAMA, "vocab": 280, "context": 24,
            "pretrain": {"passes": 1.0, "recipe": recipe},
        },
        "proxy": {"steps": 3, "recipe": recipe}, "train": {"steps": 3, "recipe": recipe},
        "verify": {"seeds": 2, "random": 1},
    }  # fmt: skip


def test_a_study_end_to_end(tmp_path: Path) -> None:
    """A Llama from a config, trained on the pool's text first; arms begin there; LESS's subtasks are a kept column."""
    spec = files(tmp_path)
    result = run_study(studies.parse(spec), tmp_path / "run", workers=1)
    assert [a["name"] for a in result["arms"]] == ["random-1", "less"]
    steps = tmp_path / "run" / "steps"
    (first,) = steps.glob("pretrain-*")
    begun = transformers.AutoModelForCausalLM.from_pretrained(first)
    assert begun.config.model_type == "llama" and not list(first.glob("*/"))
    stored = {n: p.detach() for n, p in begun.named_parameters()}
    for folder in steps.glob("train-*"):
        moved = loop.load(folder / "checkpoint.safetensors").params
        apart = max(float((moved[n] - p).abs().max()) for n, p in stored.items())
        assert 0 < apart < 0.02, "three steps from the stored weights, and not from others"
    (scores,) = steps.glob("scores-less-*")
    assert "less: common part of Adam's steps" in Table.open(scores).meta["notes"]
    before = {p.name for p in steps.iterdir()}
    run_study(studies.parse(spec), tmp_path / "run", workers=1)
    assert {p.name for p in steps.iterdir()} == before, "nothing is done again"
    spec["task"] = {"kind": "causal", "model": str(first), "context": 24}
    spec["methods"] = ["random"]
    other = run_study(studies.parse(spec), tmp_path / "other", workers=1)
    same = {a["name"]: a["judged_loss"] for a in result["arms"]}["random-1"]
    assert other["arms"][0]["judged_loss"] == pytest.approx(same, rel=1e-9), "the folder is a model like any other"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": {"kind": "causal"}}, "exactly one of task.model and task.config"),
        ({"task": {"kind": "causal", "model": "m", "config": LLAMA}}, "exactly one of task.model and task.config"),
        ({"task": {"kind": "causal", "model": "m", "vocab": 300}}, "task.vocab does nothing here"),
        ({"task": {"kind": "causal", "model": "m", "pretrain": {"passes": 1.0}}}, "task.pretrain does nothing here"),
        ({"task": {"kind": "causal", "config": LLAMA, "weights": "random"}}, "task.weights does nothing here"),
        ({"task": {"kind": "causal", "config": LLAMA, "width": 32}}, "task.width does nothing here"),
        ({"task": {"kind": "causal", "config": LLAMA, "template": "{p}"}}, "has no {prompt}"),
        ({"task": {"kind": "text"}}, "completions are for causal models"),
        ({"task": {"kind": "text", "model": "m"}}, "task.model does nothing here"),
        ({"target": {"path": "t.jsonl"}}, "must both have completions"),
        ({"target": {"path": "t.jsonl", "prompt": "ask"}}, "target.prompt and target.completion go together"),
        ({"task": {"kind": "causal", "config": LLAMA, "pretrain": {"recipe": {"steps": 3}}}}, "steps does nothing"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        studies.parse({**files(tmp_path), **changes})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "lama"}, "model_type = 'lama' is no causal model"),
        ({**LLAMA, "hidden_size": "wide"}, "transformers refuses this config"),
        ("nowhere.json", "no such config"),
    ],
)
def test_configs_that_cannot_be(tmp_path: Path, config: Any, says: str) -> None:
    spec = files(tmp_path)
    spec["task"]["config"] = config
    with pytest.raises(InputError, match=says):
        run_study(studies.parse(spec), tmp_path / "run", workers=1)
