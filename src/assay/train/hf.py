"""Any causal language model or sequence classifier of Hugging Face transformers as a Task, weights by safetensors only.

A model is a directory as `save_pretrained` writes it (config.json, *.safetensors, tokenizer.json), or the id of one on
the hub. No code from the directory is run and no pickle is read. Parameters have transformers' own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.core.errors import InputError, nearest
from assay.core.keys import digest, digest_file
from assay.core.pool import Pool
from assay.core.task import Encoded, Inputs, Params, Task
from assay.numerics.sampling import uniforms
from assay.train import pretrained
from assay.train.dialogue import Dialogues, checked, write_dialogues
from assay.train.labelled import Labelled, check_labels
from assay.train.models import Tokens, drawn, with_params, write_tokens
from assay.train.pretrained import (
    Form,
    build,
    check_causal,
    config_of,
    core_of,
    first_line,
    folder_of,
    form_of,
    library,
    load,
    read_json,
)


def open_model(path: str, **options: Any) -> CausalLM | SequenceClassifier:
    """The Task for a directory: what its config's `architectures` says, or, for an adapter, its `task_type`.

    A directory with an adapter and no model is opened on the model its config names.
    """
    folder = folder_of(path)
    config, lora = read_json(folder / "config.json"), read_json(folder / "adapter_config.json")
    if lora and not config:
        base = str(lora.get("base_model_name_or_path") or "")
        if not base:
            raise InputError(
                "the adapter does not say which model it is for", where=folder, fix="give the model's path"
            )
        options, path = {**options, "adapter": path}, base
        config = read_json(folder_of(base) / "config.json")
    if not config:
        raise InputError("no config.json here", where=folder, fix="give the folder that save_pretrained wrote")
    names = " ".join(config.get("architectures") or [])
    if "ForSequenceClassification" in names or lora.get("task_type") == "SEQ_CLS":
        return SequenceClassifier(path=path, **options)
    return CausalLM(path=path, **options)


DTYPES = ("float32", "float64", "bfloat16", "float16")
# What a config says about its own file, not about the model.
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


class _Marks(NamedTuple):
    """Ids of the special tokens; None where the tokenizer has no such token."""

    bos: int | None
    eos: int | None
    pad: int | None


@dataclass(frozen=True, kw_only=True)
class _Pretrained(Task):
    path: str
    """Directory of the model, or its id on the hub."""
    context: int = 512
    """Longest input, in tokens; longer texts are cut at the end."""
    dtype: str = "float32"
    adapter: str | None = None
    """Directory of a peft adapter (LoRA and others that work inside layers); its parameters alone require grad."""

    auto: ClassVar[str]
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}", fix=nearest(self.dtype, DTYPES))
        if self.context < 1:
            raise InputError(f"context = {self.context}", fix="give at least 1 token")

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def folder(self) -> Path:
        return folder_of(self.path)

    @cached_property
    def config(self) -> Any:
        """transformers' own config; `use_cache` is off."""
        library("transformers")  # a missing package is told before a missing file
        if not (self.folder / "config.json").exists():
            raise InputError("no config.json here", where=self.folder, fix="give the folder that save_pretrained wrote")
        config = config_of(self.folder, self.context)
        config.use_cache, config.return_dict = False, True
        return config

    @cached_property
    def marks(self) -> _Marks:
        """What tokenizer_config.json names, else what config.json does."""
        tokenizer = self.tokenizer()
        named = read_json(self.folder / "special_tokens_map.json") | read_json(self.folder / "tokenizer_config.json")

        def mark(kind: str) -> int | None:
            if f"{kind}_token" in named:
                token = named[f"{kind}_token"]
                text = token["content"] if isinstance(token, dict) else token
                return None if text is None else tokenizer.token_to_id(text)
            found = getattr(self.config.get_text_config(), f"{kind}_token_id", None)
            return found[0] if isinstance(found, list) else found

        return _Marks(mark("bos"), mark("eos"), mark("pad"))

    def tokenizer(self) -> Any:
        """A fresh `tokenizers.Tokenizer` of the directory, without padding and truncation."""
        from tokenizers import Tokenizer

        file = self.folder / "tokenizer.json"
        try:
            if file.exists():
                tokenizer = Tokenizer.from_file(str(file))
            else:
                slow = library("transformers").AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
                tokenizer = Tokenizer.from_str(slow.backend_tokenizer.to_str())
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                "no fast tokenizer here", where=self.folder, why=first_line(error),
                fix="write it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)",
            ) from error  # fmt: skip
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _built(self) -> tuple[nn.Module, Form]:
        if isinstance(self, CausalLM):
            check_causal(self.config)
        model = build(self.auto, self.config, getattr(torch, self.dtype), self.adapter)
        return model, form_of(model, causal=isinstance(self, CausalLM))

    @property
    def module(self) -> nn.Module:
        """The architecture in evaluation mode; its parameters are placeholders that take up no memory."""
        return self._built[0]

    @property
    def core(self) -> nn.Module:
        """The transformers model, below an adapter's wrapper."""
        return core_of(self.module)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.config.get_text_config().hidden_size

    def params(self, seed: int | None = None) -> dict[str, Tensor]:
        """The stored weights by name; tied ones once, under their first name.

        Raises `InputError` for weights that are not safetensors, are damaged, or do not cover the model. With a `seed`
        what is missing (a new classification head, say) is drawn keyed by (seed, name) instead.
        """
        folder = folder_of(self.path, weights=True)
        return load(self.auto, self.config, getattr(torch, self.dtype), folder, self.adapter, self.module, seed)

    def checkpoint_hash(self) -> str:
        """Digest of the bytes of the weights, and of the adapter's."""
        return pretrained.checkpoint_hash(self.path, self.adapter)

    def describe(self) -> dict[str, Any]:
        config = {k: v for k, v in read_json(self.folder / "config.json").items() if k not in VOLATILE}
        file = self.folder / "tokenizer.json"
        tokenizer = digest_file(file) if file.exists() else digest(self.tokenizer().to_str())
        found = {
            "task": self.kind, "context": self.context, "dtype": self.dtype, "config": digest(config),
            "tokenizer": tokenizer, "marks": list(self.marks),
        }  # fmt: skip
        if self.adapter:
            lora = read_json(folder_of(self.adapter) / "adapter_config.json")
            volatile = ("base_model_name_or_path", "inference_mode", "revision")
            found["adapter"] = digest({k: v for k, v in lora.items() if k not in volatile})
        return found

    def hidden(self, params: Params, batch: Inputs) -> Tensor:
        """Last hidden states, `[b, t, width]`."""
        form = self._built[1]

        def call(module: nn.Module, batch: Inputs) -> Tensor:
            return core_of(module).base_model(**_inputs(batch, form)).last_hidden_state  # type: ignore[operator]

        return with_params(self.module, params, call, batch)

    def positions(self, batch: Inputs) -> Tensor:
        return batch["mask"]

    def _cost(self, tokens: np.ndarray, reach: float) -> float:
        """2 x (weights of matrices but the input embedding) a token, and 4 x width x layers x (reach x length)."""
        t, config = np.asarray(tokens, dtype=np.float64), self.config.get_text_config()
        matrices = _matrix_weights(self.core, config)
        return float((2 * matrices * t + 4 * reach * config.num_hidden_layers * self.width * t * t).sum())


def _inputs(batch: Inputs, form: Form) -> Inputs:
    """What the model is called with. Classifiers have a mask of what stands where; causal models look back only, so
    padding at the end needs none."""
    tokens = batch["tokens"]
    given: Inputs = {"input_ids": tokens}
    if "y" in batch:
        given["attention_mask"] = batch["mask"].to(torch.int64)
    if form.positions:
        given["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return given


def _matrix_weights(model: nn.Module, config: Any) -> float:
    """Weights of matrices that each token meets; of experts, those it is sent to."""
    total, experts = 0.0, {getattr(config, n, None) for n in ("num_experts", "num_local_experts", "n_routed_experts")}
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            continue
        for p in layer.parameters(recurse=False):
            if p.dim() == 3 and p.shape[0] in experts:
                total += p[0].numel() * config.num_experts_per_tok
            elif p.dim() >= 2:
                total += p.numel()
    return total


@dataclass(frozen=True, kw_only=True)
class CausalLM(_Pretrained):
    """Next-token prediction by any `AutoModelForCausalLM`, on column `text`, or on a `completion` given its `prompt`.

    A text is fed as [start mark] + tokens, and its terms are its tokens and, if the tokenizer has an end mark (eos),
    one of it; all cut at `context` terms. The start mark is bos if the tokenizer has one, else eos. No other special
    tokens are added. The loss is the mean over terms, in nats per token.

    With `completion_only` the texts are columns `prompt` (written into `template`) and `completion`, each tokenised on
    its own. Only the completion's tokens and its end mark are terms. What is over `context` is cut from the end of
    the completion as far as it takes up more than half, then from the beginning of the prompt.
    """

    completion_only: bool = False
    template: str = "{prompt}\n"
    """What stands before a completion."""
    fine_tune: bool = False
    """Whether training begins from the stored weights, and not from a draw."""

    auto: ClassVar[str] = "AutoModelForCausalLM"
    kind: ClassVar[str] = "causal"
    reduction: ClassVar[str] = "mean over tokens"
    measure_unit: ClassVar[str] = "nats per token"
    countable: ClassVar[bool] = True

    @property
    def start(self) -> int:
        """Id of the token that stands before each text."""
        found = self.marks.eos if self.marks.bos is None else self.marks.bos
        if found is None:
            raise InputError(
                "the tokenizer names neither a start nor an end mark", where=self.folder,
                why="the first token of a text is predicted from one", fix="set eos_token in tokenizer_config.json",
            )  # fmt: skip
        return found

    def describe(self) -> dict[str, Any]:
        found = super().describe()
        if self.completion_only:
            found |= {"terms": "completion", "template": self.template}
        return found | ({"stored": self._hash} if self.fine_tune else {})

    @cached_property
    def _hash(self) -> str:
        return self.checkpoint_hash()

    def stored(self) -> Params | None:
        return self._weights if self.fine_tune else None

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self.params()

    def prepare(self, pool: Pool, path: Path) -> None:
        tokenizer, vocab = self.tokenizer(), self.config.get_text_config().vocab_size
        end = [] if self.marks.eos is None else [self.marks.eos]

        def documents() -> Iterator[list[int]]:
            for shard in pool.shards(2048):
                codes = tokenizer.encode_batch(shard.column("text"), add_special_tokens=False)
                cut = [(code.ids[: self.context] + end)[: self.context] for code in codes]
                yield from checked(cut, shard, vocab, "nothing to predict")

        if self.completion_only:
            write_dialogues(path, pool, tokenizer, self.template, end, self.context, vocab)
        else:
            write_tokens(path, documents(), vocab)

    def encoded(self, path: Path) -> Encoded:
        return Dialogues(path, self.start) if self.completion_only else Tokens(path, self.start)

    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        nll = with_params(self.module, params, self._nll, batch)
        return nll, batch["mask"].to(nll.dtype)

    def logits(self, params: Params, batch: Inputs) -> Tensor:
        """`[b, t, vocab]`, float32 or wider."""
        form = self._built[1]
        z = with_params(self.module, params, lambda module: core_of(module)(**_inputs(batch, form)).logits)
        return z if z.dtype == torch.float64 else z.float()

    def logits_at(self, params: Params, batch: Inputs, places: Tensor) -> Tensor:
        """Logits at one place of each row, `[b, vocab]`: where the model lets it, without those of the others."""

        def call(module: nn.Module) -> Tensor:
            model, form, rows = core_of(module), self._built[1], torch.arange(len(places))
            if form.readout is None:
                return model(**_inputs(batch, form)).logits[rows, places]
            base: Callable[..., Any] = model.base_model  # type: ignore[assignment]
            return form.readout(base(**_inputs(batch, form)).last_hidden_state[rows, places])

        z = with_params(self.module, params, call)
        return z if z.dtype == torch.float64 else z.float()

    def _nll(self, module: nn.Module, batch: Inputs) -> Tensor:
        model, form = core_of(module), self._built[1]
        if form.readout is not None:
            base: Callable[..., Any] = model.base_model  # type: ignore[assignment]
            return form.readout(base(**_inputs(batch, form)).last_hidden_state, batch["targets"])
        logits = model(**_inputs(batch, form)).logits
        exact = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(exact.transpose(1, 2), batch["targets"], reduction="none")

    @torch.no_grad()
    def resample(self, params: Params, batch: Inputs, keys: np.ndarray, seed: int) -> Inputs:
        def draw(module: nn.Module, batch: Inputs) -> Tensor:
            model, form = core_of(module), self._built[1]
            if form.readout is None:
                return drawn(lambda z: z, model(**_inputs(batch, form)).logits, u)
            base: Callable[..., Any] = model.base_model  # type: ignore[assignment]
            return drawn(form.readout, base(**_inputs(batch, form)).last_hidden_state, u)

        u = uniforms(keys, batch["targets"].shape[1], seed=seed)
        return {**batch, "targets": with_params(self.module, params, draw, batch)}

    def forward_flops(self, terms: np.ndarray) -> float:
        """2 x (weights of matrices) a token, and 4 x width x length/2 a token and layer for causal attention."""
        return self._cost(terms, 0.5)


class _Texts(Tokens):
    """Token ids and a label; one term an example."""

    def __init__(self, path: Path, pad: int) -> None:
        super().__init__(path, pad)
        self.labels = np.load(path / "labels.npy", allow_pickle=False)
        self.sizes = np.ones(len(self.labels), dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def inputs(self, rows: np.ndarray) -> Inputs:
        ids, mask = self.padded(rows, self.start)
        return {
            "tokens": torch.from_numpy(ids), "mask": torch.from_numpy(mask.astype(np.float32)),
            "y": torch.from_numpy(self.labels[rows]),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SequenceClassifier(Labelled, _Pretrained):
    """Cross-entropy of a class given a text, by any `AutoModelForSequenceClassification`; one term an example.

    Texts (column `text`) get the special tokens of the tokenizer's own post-processor. Labels (column `label`) are
    0..classes-1, or names that the config's `label2id` knows.
    """

    label: str = "label"

    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    kind: ClassVar[str] = "sequence-classifier"
    reduction: ClassVar[str] = "one term an example"
    measure_unit: ClassVar[str] = "nats per example"

    @cached_property
    def config(self) -> Any:
        config = super().config
        if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
            raise InputError(
                "the model does not tell classes apart", where=self.folder,
                why=f"num_labels {config.num_labels}, problem_type {config.problem_type!r}",
                fix="give a model with two classes or more, of which one is right",
            )  # fmt: skip
        text = config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:  # models that read off the last token must find it
            text.pad_token_id = self.pad
        return config

    @property
    def pad(self) -> int:
        """Id that fills texts up: the config's, by which models find the last token; else the tokenizer's, else the
        end mark, else 0."""
        own = read_json(self.folder / "config.json").get("pad_token_id")
        return next((i for i in (own, self.marks.pad, self.marks.eos) if i is not None), 0)

    @property
    def classes(self) -> int:
        return self.config.num_labels

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "label": self.label}

    def prepare(self, pool: Pool, path: Path) -> None:
        tokenizer, vocab = self.tokenizer(), self.config.get_text_config().vocab_size
        tokenizer.enable_truncation(self.context)

        def documents() -> Iterator[list[int]]:
            for shard in pool.shards(2048):
                codes = tokenizer.encode_batch(shard.column("text"))
                yield from checked([code.ids for code in codes], shard, vocab, "no tokens")

        write_tokens(path, documents(), vocab)
        np.save(path / "labels.npy", self._labels(pool), allow_pickle=False)

    def _labels(self, pool: Pool) -> np.ndarray:
        known = {str(name): int(i) for name, i in (self.config.label2id or {}).items()}
        found = []
        for value in pool.column(self.label):
            if isinstance(value, str) and value not in known:
                raise InputError(f"unknown label {value!r}", where=f"column {self.label}", fix=nearest(value, known))
            found.append(known[value] if isinstance(value, str) else value)
        if not all(isinstance(label, int) for label in found):
            raise InputError("labels are not whole numbers", where=f"column {self.label}", fix="number the classes")
        labels = np.array(found, dtype=np.int64)
        check_labels(labels, self.classes)
        return labels

    def encoded(self, path: Path) -> Encoded:
        return _Texts(path, self.pad)

    def logits(self, params: Params, batch: Inputs) -> Tensor:
        """`[b, classes]`, float32 or wider."""
        form = self._built[1]
        z = with_params(self.module, params, lambda module: core_of(module)(**_inputs(batch, form)).logits)
        return z if z.dtype == torch.float64 else z.float()

    def forward_flops(self, terms: np.ndarray) -> float:
        """2 x (weights of matrices) a token, and 4 x width x length a token and layer: at `context` tokens an example,
        which is the most it can have."""
        return self._cost(np.full(int(np.sum(terms)), self.context), 1.0)
