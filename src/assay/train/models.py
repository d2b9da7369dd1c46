"""The architectures and their Tasks: a small decoder for text, a multilayer perceptron for vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.func import functional_call

from assay.core.errors import InputError
from assay.core.keys import canonical, write_json
from assay.core.pool import Pool
from assay.core.task import Encoded, Inputs, Params, Task
from assay.numerics.project import splitmix64
from assay.numerics.readout import CHUNK, Readout
from assay.numerics.sampling import categorical, uniforms
from assay.train.labelled import Labelled, check_labels


class _Block(nn.Module):
    """Pre-norm attention and MLP, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm_attention(x_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Padding stands at the end and attention looks back only, so no mask for it is needed.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.out(mixed)
        return x_BTD + self.down(F.gelu(self.up(self.norm_mlp(x_BTD))))


class Decoder(nn.Module):
    """A causal transformer with learned positions: tokens `[b, t]` to logits `[b, t, vocab]`."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = Readout(width, vocab, bias=False)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final normalised hidden states, `[b, t, width]`."""
        # One row of positions for each example, not one for the batch: per-example gradients need it.
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        x = self.token(tokens_BT) + self.position(places)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits, or with targets the cross-entropy of each, `[b, t]`."""
        hidden = self.hidden(tokens_BT)
        return self.head(hidden) if targets_BT is None else self.head(hidden, targets_BT)


def init_params(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Initial values keyed by (seed, parameter name), so that no parameter depends on another's draw.

    Gains 1, biases 0, embeddings N(0, .02^2), matrices N(0, 1/fan_in); those that write into the residual
    stream (`out`, `down`) are smaller by sqrt(2 layers), and the readout `head` by a further 1/sqrt(fan_in) down to
    small logits. A module whose `first` is 'uniform' has what PyTorch gives linear layers: weights and biases from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """
    if getattr(module, "first", "") == "uniform":
        return _uniform(module, seed, dtype)
    depth = len(getattr(module, "blocks", ())) or 1
    values: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        draw = torch.randn(p.shape, generator=_generator(seed, name), dtype=torch.float64)
        owner = name.rpartition(".")[0]
        if p.dim() < 2:
            value = torch.ones(p.shape) if name.endswith(".weight") else torch.zeros(p.shape)
        elif isinstance(module.get_submodule(owner), nn.Embedding):
            value = draw * 0.02
        else:
            last, scale = owner.rpartition(".")[2], p[0].numel() ** -0.5
            scale *= (2 * depth) ** -0.5 if last in ("out", "down") else 1.0
            scale *= p[0].numel() ** -0.5 if last == "head" else 1.0
            value = draw * scale
        values[name] = value.to(dtype)
    return values


def _generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(canonical(list(key)).encode()) >> 1)


def _uniform(module: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a module that has linear layers alone."""
    values: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        weight = module.get_parameter(f"{name.rpartition('.')[0]}.weight")
        values[name] = uniform_weights(p.shape, weight[0].numel(), seed, name, "uniform").to(dtype)
    return values


def uniform_weights(shape: torch.Size, inputs: int, *key: Any) -> Tensor:
    """A draw of U(-1/sqrt(inputs), 1/sqrt(inputs)) in float64, decided by the key alone."""
    return (2 * torch.rand(shape, generator=_generator(*key), dtype=torch.float64) - 1) * inputs**-0.5


def first_weights(task: Task, seed: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Where training begins: the weights that the task stores, or those that the seed draws (float32 by default)."""
    stored = task.stored()
    if stored is None:
        return init_params(task.module, seed, dtype or torch.float32)
    return {n: p if dtype is None else p.to(dtype) for n, p in stored.items()}


def with_params(module: nn.Module, params: Params, function: Callable[..., Any], *args: Any) -> Any:
    """`function(module, *args)` while the module's parameters are `params`."""
    return functional_call(_Bound(module, function), {f"inner.{k}": v for k, v in params.items()}, args)


class _Bound(nn.Module):
    """Lets `functional_call` reach any function of a module."""

    def __init__(self, inner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, *args: Any) -> Any:
        return self.function(self.inner, *args)


def drawn(readout: Callable[[Tensor], Tensor], hidden: Tensor, u: Tensor) -> Tensor:
    """Tokens drawn at each position, `[b, t]`, by uniforms `[b, t]`; logits are made a few rows at a time."""
    rows, level = hidden.flatten(0, -2), u.flatten()
    some = [slice(i, i + CHUNK) for i in range(0, len(rows), CHUNK)]
    return torch.cat([categorical(readout(rows[s]), level[s]) for s in some]).view(u.shape)


def write_tokens(path: Path, documents: Iterable[list[int]], vocab: int) -> None:
    """Token ids of documents as `Tokens` reads them."""
    dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    with open(path / "tokens.bin", "wb") as file:
        for ids in documents:
            file.write(np.array(ids, dtype=dtype).tobytes())
            lengths.append(len(ids))
    np.save(path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), allow_pickle=False)
    write_json(path / "tokens.json", {"dtype": dtype.str, "documents": len(lengths)})


class Tokens(Encoded):
    """Token ids of all documents end to end in one memory-mapped file, with offsets. The model is fed `start` and all
    targets but the last.
    """

    def __init__(self, path: Path, start: int) -> None:
        info = json.loads((path / "tokens.json").read_text())
        self.offsets = np.load(path / "offsets.npy", mmap_mode="r", allow_pickle=False)
        self.sizes = np.diff(self.offsets)
        self.path, self.dtype = path / "tokens.bin", info["dtype"]
        self.start = start

    def padded(self, rows: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of these rows, filled up at the end, `[b, t]`, and where they stand, `[b, t]`."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        longest = int(lengths.max(initial=1))
        # Mapped anew for each batch: pages that were read once do not stay with this process.
        flat = np.memmap(self.path, self.dtype, "r") if lengths.any() else np.zeros(0, np.int64)
        ids = np.full((len(rows), longest), fill, dtype=np.int64)
        for line, row in enumerate(rows):
            ids[line, : lengths[line]] = flat[self.offsets[row] : self.offsets[row + 1]]
        return ids, np.arange(longest)[None, :] < lengths[:, None]

    def inputs(self, rows: np.ndarray) -> Inputs:
        targets, mask = self.padded(rows, self.start)
        tokens = np.concatenate([np.full((len(rows), 1), self.start), targets[:, :-1]], axis=1)
        return {
            "tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets),
            "mask": torch.from_numpy(mask.astype(np.float32)),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Task):
    """Next-token prediction by the built-in decoder. An example's terms are its tokens and one end mark, cut at
    `context`; its loss is their mean, in nats per token.
    """

    tokenizer: str
    """JSON text of a `tokenizers` tokenizer whose id 0 is the end mark."""
    vocab: int
    width: int = 64
    layers: int = 3
    heads: int = 4
    context: int = 160

    reduction: ClassVar[str] = "mean over tokens"
    measure_unit: ClassVar[str] = "nats per token"
    countable: ClassVar[bool] = True

    @cached_property
    def module(self) -> nn.Module:
        return Decoder(self.vocab, self.width, self.layers, self.heads, self.context)

    def describe(self) -> dict[str, Any]:
        fields = {k: v for k, v in asdict(self).items() if k != "tokenizer"}
        return {"task": "text", **fields, "tokenizer": xxhash.xxh3_128_hexdigest(self.tokenizer.encode())}

    def prepare(self, pool: Pool, path: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.tokenizer)

        def documents() -> Iterator[list[int]]:
            for shard in pool.shards(2048):
                for code in tokenizer.encode_batch(shard.column("text"), add_special_tokens=False):
                    yield (code.ids[: self.context] + [0])[: self.context]

        write_tokens(path, documents(), self.vocab)

    def encoded(self, path: Path) -> Encoded:
        return Tokens(path, 0)

    def terms(self, params: Params, batch: Inputs) -> tuple[Tensor, Tensor]:
        nll = functional_call(self.module, dict(params), (batch["tokens"], batch["targets"]))
        return nll, batch["mask"].to(nll.dtype)

    def logits(self, params: Params, batch: Inputs) -> Tensor:
        """`[b, t, vocab]`."""
        return functional_call(self.module, dict(params), (batch["tokens"],))

    def hidden(self, params: Params, batch: Inputs) -> Tensor:
        """Final hidden states, `[b, t, width]`."""
        return with_params(self.module, params, Decoder.hidden, batch["tokens"])

    def logits_at(self, params: Params, batch: Inputs, places: Tensor) -> Tensor:
        """Logits at one place of each row, `[b, vocab]`, without those of the others."""

        def call(module: Decoder, tokens: Tensor) -> Tensor:
            return module.head(module.hidden(tokens)[torch.arange(len(tokens)), places])

        return with_params(self.module, params, call, batch["tokens"])

    def positions(self, batch: Inputs) -> Tensor:
        return batch["mask"]

    @torch.no_grad()
    def resample(self, params: Params, batch: Inputs, keys: np.ndarray, seed: int) -> Inputs:
        def draw(module: Decoder, batch: Inputs) -> Tensor:
            return drawn(module.head, module.hidden(batch["tokens"]), u)

        u = uniforms(keys, batch["targets"].shape[1], seed=seed)
        return {**batch, "targets": with_params(self.module, params, draw, batch)}

    def forward_flops(self, terms: np.ndarray) -> float:
        """2 x (weights of matrices) a token, and 4 x width x length/2 a token and layer for causal attention."""
        t = np.asarray(terms, dtype=np.float64)
        matrices = self.layers * 12 * self.width**2 + self.width * self.vocab
        return float((2 * matrices * t + 2 * self.layers * self.width * t * t).sum())


class Perceptron(nn.Module):
    """Linear layers with GELU or ReLU between; `hidden=()` is multinomial logistic regression."""

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], classes: int, activation: str = "gelu", dropout: float = 0.0,
        first: str = "normal",
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = (inputs, *hidden, classes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation, self.dropout = {"gelu": F.gelu, "relu": F.relu}[activation], dropout
        self.first = first

    def forward(self, x: Tensor, *kept: Tensor) -> Tensor:
        """Logits; with `kept`, one `[b, width]` of zeros and ones for each hidden layer, the others drop out."""
        for index, layer in enumerate(self.layers[:-1]):
            x = self.activation(layer(x))
            if kept:
                x = x * kept[index] / (1 - self.dropout)
        return self.layers[-1](x)


class _Vectors(Encoded):
    def __init__(self, path: Path) -> None:
        self.pixels, self.labels = np.load(path / "pixels.npy", mmap_mode="r"), np.load(path / "labels.npy")
        self.sizes = np.ones(len(self.labels), dtype=np.int64)

    def inputs(self, rows: np.ndarray) -> Inputs:
        return {"x": torch.from_numpy(self.pixels[rows]), "y": torch.from_numpy(self.labels[rows])}


@dataclass(frozen=True, kw_only=True)
class Classifier(Labelled):
    """Cross-entropy of a class given a vector (columns `pixels` and `label`); one term an example."""

    inputs: int = 64
    hidden: tuple[int, ...] = ()
    classes: int = 10
    activation: Literal["gelu", "relu"] = "gelu"
    dropout: float = 0.0
    """Share of each hidden layer that is dropped while training; scoring and evaluation never drop any."""
    first: Literal["normal", "uniform"] = "normal"
    """First weights: 'normal', N(0, 1/fan_in) and biases 0; 'uniform', PyTorch's own, a third of that variance."""

    reduction: ClassVar[str] = "one term an example"
    measure_unit: ClassVar[str] = "nats per example"

    @cached_property
    def module(self) -> nn.Module:
        return Perceptron(self.inputs, self.hidden, self.classes, self.activation, self.dropout, self.first)

    def describe(self) -> dict[str, Any]:
        # At these values a task keeps the key that it always had.
        later = {"activation": "gelu", "dropout": 0.0, "first": "normal"}
        fields = {k: v for k, v in asdict(self).items() if v != later.get(k)}
        return {"task": "classifier", **fields, "hidden": list(self.hidden)}

    def prepare(self, pool: Pool, path: Path) -> None:
        pixels = np.array(pool.column("pixels"), dtype=np.float32).reshape(len(pool), -1)
        labels = np.array(pool.column("label"), dtype=np.int64)
        if pixels.shape[1] != self.inputs:
            raise InputError(
                f"vectors have {pixels.shape[1]} numbers, the task says {self.inputs}", fix="set task.inputs"
            )
        check_labels(labels, self.classes)
        for name, array in (("pixels", pixels), ("labels", labels)):
            np.save(path / f"{name}.npy", array, allow_pickle=False)

    def encoded(self, path: Path) -> Encoded:
        return _Vectors(path)

    @property
    def stochastic(self) -> bool:
        return self.dropout > 0 and bool(self.hidden)

    def noise(self, keys: np.ndarray) -> Inputs:
        """Which entries stay, uint8 `[..., width]` for each hidden layer: keyed by example and step, layer, place."""
        least, found = np.uint64(int(self.dropout * 2.0**64)), {}
        for layer, width in enumerate(self.hidden):
            place = splitmix64(np.arange(width, dtype=np.uint64) + np.uint64(layer << 32))
            found[f"kept.{layer}"] = torch.from_numpy((splitmix64(keys[..., None] ^ place) >= least).astype(np.uint8))
        return found

    def logits(self, params: Params, batch: Inputs) -> Tensor:
        """`[b, classes]`; of a batch with `noise`, as training has them."""
        kept = [batch[f"kept.{layer}"] for layer in range(len(self.hidden)) if f"kept.{layer}" in batch]
        x = batch["x"].to(next(iter(params.values())).dtype)
        return functional_call(self.module, dict(params), (x, *kept))

    def forward_flops(self, terms: np.ndarray) -> float:
        """2 x (weights of matrices) an example."""
        sizes = (self.inputs, *self.hidden, self.classes)
        return float(np.sum(terms)) * 2 * sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))


TASKS: tuple[type[LanguageModel] | type[Classifier], ...] = (LanguageModel, Classifier)


def write_task(path: Path, task: Task) -> None:
    """A built-in task as JSON, tokenizer and all: what a checkpoint needs beside it to be used elsewhere."""
    if isinstance(task, TASKS):
        write_json(path, {"task": task.describe()["task"], **asdict(task)})


def read_task(path: Path) -> Task:
    """What `write_task` wrote. Raises `InputError` when it is no such file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        from assay.train.vision import ImageClassifier

        kinds = {"text": LanguageModel, "classifier": Classifier, "convnet": ImageClassifier}
        kind = kinds[fields.pop("task")]
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error) or type(error).__name__
        raise InputError("not a task that assay wrote", where=path, why=why, fix="run the study again") from error


def train_tokenizer(pool: Pool, *, vocab: int, sample: int = 20_000, seed: int = 0) -> str:
    """Byte-level BPE (Sennrich 2016) on a keyed sample of the pool's texts; JSON. Independent of the pool's order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from assay.core.keys import shuffled

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]
    order = shuffled(pool.contents, "tokenizer", seed)[:sample]
    chosen = pool.at(np.sort(order))
    texts = sorted(chosen.column("text"))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
