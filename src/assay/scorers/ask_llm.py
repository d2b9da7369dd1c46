"""Judgement of a language model: is this text good to learn from, yes or no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from assay.core.errors import InputError
from assay.core.keys import digest, shuffled
from assay.core.method import Batch, Bounds, Context, Cost, Count, ModelPath, Scorer
from assay.core.pool import Pool

TEMPLATE = (
    "Text:\n{text}\n\nWould a language model that is trained on the text above learn something useful from it: facts, "
    "reasoning, or good writing? Answer yes or no.\nAnswer:"
)
# Padded tokens (rows x longest) of one batch.
AREA = 2048
# Texts whose lengths stand for the pool's in the ledger.
COUNTED = 512


class AskLLM(Scorer):
    """Log-odds of the answer yes against no, when a language model is asked whether a text is worth training on.

    Formula: score_i = log P(yes | prompt_i) - log P(no | prompt_i), P the sum over the words of `yes` (`no`) of the
        probability of their first tokens; p_yes_i = P(yes | prompt_i); answered_i = P(yes) + P(no)
    Reference: Sachdeva et al. 2024, arXiv:2402.09668 (Ask-LLM ranks by p_yes)
    Note: `llm` is a folder or hub id of any causal model of transformers (safetensors only, no code of its own is run),
        else the scoring models are asked, which is of use where the study's task is a model that follows instructions.
        A text that is too long loses its end, never the question; special tokens that stand in a text are read as plain
        characters, in the template they are what they are. Where `answered` is small the model did not take the
        question up and the score says little. Not a measure of utility
    """

    llm: ModelPath = ""
    template: str = TEMPLATE
    yes: tuple[str, ...] = (" yes", " Yes")
    no: tuple[str, ...] = (" no", " No")
    context: Count = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"

    cost: ClassVar[Cost] = "forward"
    unit: ClassVar[str] = "log-odds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.count("{text}") != 1:
            raise InputError(
                "ask_llm: the template must name {text} once", where="template", why=f"it is {self.template!r}",
                fix="write {text} where the text is to stand",
            )  # fmt: skip

    @property
    def uses_models(self) -> bool:
        return not self.llm

    @property
    def presets(self) -> Mapping[str, Bounds]:
        return {"yes": {"score": (0.0, None)}}

    def code(self) -> str:
        """As of any method, and of the model that is named."""
        return digest(Scorer.code(self), self._named) if self.llm else Scorer.code(self)

    @cached_property
    def _named(self) -> Any:
        return self._task.describe(), self._task.checkpoint_hash()

    @cached_property
    def _task(self) -> Any:
        from assay.train.hf import CausalLM

        return CausalLM(path=self.llm, context=self.context, dtype=self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_task"}

    def columns(self, state: Any) -> tuple[str, ...]:
        return "score", "p_yes", "answered"

    def init(self, context: Context) -> _Asker:
        task = self._task if self.llm else context.task
        if not hasattr(task, "logits_at"):
            raise InputError(
                "ask_llm: the study's task is no language model", where="ask_llm",
                why="it cannot be asked", fix="name a causal model in `llm`",
            )  # fmt: skip
        before, after = self.template.split("{text}")
        asker = _Asker(
            task, None if self.llm else list(context.models), before, after, self.yes, self.no,
            min(self.context, getattr(task, "context", self.context)),
        )  # fmt: skip
        asker.check()
        return asker

    def score(self, state: _Asker, batch: Batch) -> Any:
        return state.ask(batch.column("text"))


@dataclass(frozen=True)
class _Asker:
    """A model, and what it is asked."""

    task: Any
    given: list[Any] | None
    """Weights; None: those that the task has stored, read where they are needed."""
    before: str
    after: str
    yes: tuple[str, ...]
    no: tuple[str, ...]
    longest: int

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def passes(self) -> float:
        """None over the texts as they stand: `flops` counts the prompts."""
        return 0.0

    def flops(self, pool: Pool) -> float:
        """Operations that a pool takes, by the prompts of some of it."""
        rows = np.sort(shuffled(pool.ids, "ask_llm")[:COUNTED])
        lengths = np.array([len(prompt) for prompt in self.prompts(pool.at(rows).column("text"))])
        return len(self.weights) * self.task.forward_flops(lengths) * len(pool) / len(rows)

    @cached_property
    def weights(self) -> list[Any]:
        return self.given if self.given is not None else [self.task.params()]

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        held = self.task.tokenizer
        return held() if callable(held) else Tokenizer.from_str(held)

    @cached_property
    def reader(self) -> Any:
        """Of texts: a special token in one is plain characters."""
        tokenizer = self._tokenizer()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Tokens before the text and after it."""
        tokenizer = self._tokenizer()
        before, after = (
            tokenizer.encode(part, add_special_tokens=False).ids if part else [] for part in (self.before, self.after)
        )
        return [getattr(self.task, "start", 0), *before], after

    @cached_property
    def answers(self) -> tuple[list[int], list[int]]:
        """First tokens of the words for yes and for no."""
        tokenizer = self._tokenizer()

        def firsts(words: tuple[str, ...]) -> list[int]:
            return sorted({i for w in words for i in tokenizer.encode(w, add_special_tokens=False).ids[:1]})

        return firsts(self.yes), firsts(self.no)

    def check(self) -> None:
        """Raises `InputError` for a question that cannot be asked."""
        (yes, no), (before, after) = self.answers, self.frame
        if not yes or not no or set(yes) & set(no):
            raise InputError(
                f"ask_llm: the words {list(self.yes)} and {list(self.no)} cannot be told apart", where="yes, no",
                why=f"their first tokens are {yes} and {no}", fix="give words that begin with different tokens",
            )  # fmt: skip
        if len(before) + len(after) >= self.longest:
            raise InputError(
                f"ask_llm: the template leaves no room for a text in {self.longest} tokens", where="template",
                why=f"it has {len(before) + len(after)}", fix="shorten it, or raise `context` if the model has more",
            )  # fmt: skip

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each prompt, its text cut at the end where it is too long."""
        before, after = self.frame
        room = self.longest - len(before) - len(after)
        codes = self.reader.encode_batch(texts, add_special_tokens=False)
        return [before + code.ids[:room] + after for code in codes]

    def ask(self, texts: list[str]) -> np.ndarray:
        """Log-odds, P(yes) and P(yes) + P(no), averaged over the models, `[n, 3]`."""
        import torch

        from assay.train.loop import blocks

        prompts = self.prompts(texts)
        lengths = np.array([len(p) for p in prompts], dtype=np.int64)
        found = np.zeros((len(texts), 3))
        yes, no = self.answers
        for rows in blocks(lengths, AREA):
            tokens = torch.zeros(len(rows), int(lengths[rows].max()), dtype=torch.int64)
            for line, row in enumerate(rows.tolist()):
                tokens[line, : lengths[row]] = torch.tensor(prompts[row])
            last = torch.from_numpy(lengths[rows] - 1)
            for params in self.weights:
                with torch.no_grad():
                    z = self.task.logits_at(params, {"tokens": tokens}, last).double()
                agree, refuse, all_ = z[:, yes].logsumexp(1), z[:, no].logsumexp(1), z.logsumexp(1)
                p = (agree - all_).exp()
                values = torch.stack([agree - refuse, p, p + (refuse - all_).exp()], dim=1)
                found[rows] += values.numpy() / len(self.weights)
        return found
