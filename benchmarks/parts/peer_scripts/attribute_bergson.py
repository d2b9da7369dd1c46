"""Attribution of a decoder by bergson: EK-FAC, K-FAC, TrackStar, TRAK, GradDot, GradCos.

A folder as in attribute_common.py, but `tokens.npz` holds the token ids (`pool`, `targets`, with `pool_offsets` and
`targets_offsets`; each document begins with the start token, which is not predicted) and world.json gives `vocab`,
`width`, `layers`, `heads` and `context`. The decoder is made known to transformers as an architecture of its own, so
that bergson's pipelines load the same weights. Losses are summed over a document's tokens, as bergson does unless told
otherwise: a document of weight 1 counts as often as it has tokens. bergson takes the linear layers without the head.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import datasets  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from bergson.build import build_query  # pyright: ignore[reportMissingImports]
from bergson.cli.commands import Ekfac, Trackstar  # pyright: ignore[reportMissingImports]
from bergson.config.config import (  # pyright: ignore[reportMissingImports]
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
)  # fmt: skip
from bergson.data import load_scores  # pyright: ignore[reportMissingImports]
from bergson.score.score import score_dataset  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.modeling_outputs import CausalLMOutput

TOKENS = 4096  # of a batch


class Config(PretrainedConfig):
    model_type = "small_decoder"

    def __init__(self, vocab: int = 260, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64, **rest):
        self.vocab, self.width, self.layers, self.heads, self.context = vocab, width, layers, heads, context
        self.max_position_embeddings, self.vocab_size, self.hidden_size = TOKENS, vocab, width
        super().__init__(**rest)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(*shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(shape))
        return x + self.down(gelu(self.up(self.norm_mlp(x))))


class Trunk(PreTrainedModel):
    config_class = Config  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token

    def forward(self, tokens: Tensor) -> Tensor:
        # The last token of a document is fed too, but predicts nothing: it has no place of its own to need.
        places = torch.arange(tokens.shape[1], device=tokens.device).clamp(max=self.config.context - 1)
        x = self.token(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(PreTrainedModel, GenerationMixin):
    config_class = Config  # type: ignore[assignment]
    base_model_prefix = "model"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model, self.head = Trunk(config), nn.Linear(config.width, config.vocab, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.token

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.model(input_ids)))  # type: ignore[arg-type]


AutoConfig.register("small_decoder", Config)
AutoModelForCausalLM.register(Config, Decoder)


def write(folder: Path, out: Path) -> dict[str, Any]:
    """Checkpoints and documents as bergson reads them."""
    about = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    shape = {name: about[name] for name in ("vocab", "width", "layers", "heads", "context")}
    for k in range(about["models"]):
        model, held = Decoder(Config(**shape)), load_file(folder / f"model-{k}.safetensors")
        states = {(n if n.startswith("head.") else f"model.{n}"): p for n, p in held.items()}
        model.load_state_dict(states)
        model.save_pretrained(out / f"model-{k}")
        tokenizer = Tokenizer(models.WordLevel({"<|end|>": 0}, unk_token="<|end|>"))  # asked for, and never used
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_max_length=TOKENS, pad_token="<|end|>"
        ).save_pretrained(out / f"model-{k}")
    held = np.load(folder / "tokens.npz")
    for name in ("pool", "targets"):
        ids, offsets = held[name], held[f"{name}_offsets"]
        rows = [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
        made = datasets.Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
        made.save_to_disk(out / name)
    return about


def data(out: Path, name: str) -> dict[str, Any]:
    return {"dataset": str(out / name)}


def index(kind: Any, out: Path, run: Path, model: int, dim: int) -> Any:
    return kind(
        run_path=str(run), model=str(out / f"model-{model}"), data=DataConfig(**data(out, "pool")), projection_dim=dim,
        token_batch_size=TOKENS, precision="fp32", overwrite=True,
    )  # fmt: skip


def run(job: dict[str, Any], out: Path, place: Path) -> None:
    """Options: `damping` times the mean eigenvalue; `dim`, the side of the two-sided projection; 0 is none."""
    method, options, (model,) = job["method"], job["options"], job["models"]
    queries = QuerySetConfig(**data(out, "targets"), aggregation="none")
    inversion = InversionConfig(damping_factor=options.get("damping", 0.1), apply_batch_size=64)
    if method in ("ekfac", "kfac"):
        hessian = HessianConfig(method="kfac", ev_correction=method == "ekfac")
        pipeline = HessianPipelineConfig(query=queries, inversion_cfg=inversion)
        Ekfac(index(IndexConfig, out, place, model, 0), hessian, ScoreConfig(), PreprocessConfig(), pipeline).execute()
    elif method == "trackstar":
        config = TrackstarConfig(
            query=queries, preprocess_cfg=PreprocessConfig(unit_normalize=True, inversion_cfg=inversion),
            target_downweight_components=options.get("components", 1000), mix_hessians=options.get("mix", True),
        )  # fmt: skip
        Trackstar(index(TrackstarIndexConfig, out, place, model, options.get("dim", 16)), config).execute()
    else:
        prepared = PreprocessConfig(unit_normalize=method == "gradcos")
        dim = options.get("dim", 0)
        build_query(index(IndexConfig, out, place / "query", model, dim), queries, PreprocessConfig())
        asked = ScoreConfig(query_path=str(place / "query"), higher_is_better=True)
        score_dataset(index(IndexConfig, out, place / "scores", model, dim), asked, prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    about, seconds = write(chosen.folder, chosen.out), []
    for number, job in enumerate(about["jobs"]):
        place = chosen.out / f"run-{number}"
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run(job, chosen.out, place)
        scores = load_scores(place / "scores")
        found = scores[np.arange(len(scores))].T
        seconds.append(time.perf_counter() - start)
        np.save(chosen.out / f"scores-{number}.npy", found.astype(np.float32))
    (chosen.out / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    datasets.disable_progress_bars()
    main()
