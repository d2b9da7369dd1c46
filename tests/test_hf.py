"""Models of transformers as Tasks, against transformers itself; models are small, made from a config, and offline."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from assay.core.errors import InputError
from assay.core.pool import Pool
from assay.core.selection import Selection
from assay.numerics.persample import covered, gradients
from assay.numerics.readout import Readout
from assay.train import loop
from assay.train.models import init_params, train_tokenizer
from assay.train.moments import estimate_moments, load_moments
from assay.train.recipe import Recipe
from helpers import looped, prepared, text_pool

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'assay-data[hf]'")
pytest.importorskip("peft", reason="needs the extra: pip install 'assay-data[hf]'")

from assay.train.hf import CausalLM, SequenceClassifier, open_model  # noqa: E402
from assay.train.pretrained import checkpoint_hash  # noqa: E402

VOCAB = 280
pytestmark = pytest.mark.usefixtures("one_thread")


def save_tokenizer(folder: Path, pool: Pool, *, bert: bool = False, **marks: Any) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(train_tokenizer(pool, vocab=VOCAB - 4))
    tokenizer.add_special_tokens(["<s>", "[CLS]", "[SEP]", "[PAD]"])
    if bert:
        ids = [(t, tokenizer.token_to_id(t)) for t in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = processors.BertProcessing(*ids)  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    fast.save_pretrained(folder)


def randomised(model: Any, seed: int = 0) -> Any:
    """Keyed weights that are far from zero, so that nothing agrees by chance."""
    for name, p in init_params(model, seed).items():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        model.get_parameter(name).data.copy_(p + 0.15 * noise)
    return model


def llama(**options: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**sizes, **options})


def gpt2(**options: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **options})


def bert(**options: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3, **options,
    )  # fmt: skip


def capped(**options: Any) -> Any:
    """Gemma 2 caps its logits: they are not the readout of its hidden states."""
    return transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=3.0,
        bos_token_id=1, eos_token_id=0, **options,
    )  # fmt: skip


def opt(**options: Any) -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=True, **options,
    )  # fmt: skip


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some norms compute in float32 whatever they are given, and turn a last bit of float64 into one of float32."""

    def root(x: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(
        modeling_llama.LlamaRMSNorm, "forward", lambda norm, x: norm.weight * root(x, norm.variance_epsilon)
    )
    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", lambda norm, x: (1 + norm.weight) * root(x, norm.eps))


FAMILIES = {"llama": llama, "gpt2": gpt2, "gemma2": capped, "opt": opt}


def beginning(family: str) -> dict[str, Any]:
    return {"bos_token": "<s>"} if family == "llama" else {}


def causal(folder: Path, family: str, **options: Any) -> CausalLM:
    folder.mkdir()
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    randomised(model).save_pretrained(folder)
    save_tokenizer(folder, text_pool(40), eos_token="<|end|>", **beginning(family))
    return CausalLM(path=str(folder), context=16, **options)


def double(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p.double() for n, p in params.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_is_that_of_transformers(family: str, tmp_path: Path, exact_norms: None) -> None:
    task = causal(tmp_path / "m", family)
    encoded = prepared(task, text_pool(9), tmp_path / "e")
    params = task.params()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert list(params) == [n for n, _ in task.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    found = task.loss(params, encoded.inputs(np.arange(9)))
    exact = task.loss(double(params), encoded.inputs(np.arange(9)))
    for row in range(9):
        batch = encoded.inputs(np.array([row]))
        ids = torch.cat([batch["tokens"], batch["targets"][:, -1:]], dim=1)
        with torch.no_grad():
            assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(float(found[row]), rel=1e-6)
            logits = model.double()(input_ids=ids).logits[:, :-1]
            model.float()
        loss = F.cross_entropy(logits[0], ids[0, 1:])
        assert float(loss) == pytest.approx(float(exact[row]), abs=1e-7 if family == "gemma2" else 1e-12)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_padding_and_company_change_nothing(family: str, tmp_path: Path, exact_norms: None) -> None:
    task = causal(tmp_path / "m", family)
    encoded, params = prepared(task, text_pool(9), tmp_path / "e"), double(task.params())
    together = task.loss(params, encoded.inputs(np.arange(9)))
    assert len(set(encoded.sizes.tolist())) > 2
    alone = torch.cat([task.loss(params, encoded.inputs(np.array([row]))) for row in range(9)])
    # The softmax of eager attention, which capping needs, computes in float32 too.
    assert torch.allclose(together, alone, rtol=0, atol=1e-7 if family == "gemma2" else 1e-12)


def test_which_models_take_the_short_way(tmp_path: Path) -> None:
    """Logits are made in chunks where they are the readout, and whole where the model caps them."""
    for family, short, positions in [("llama", True, False), ("gpt2", True, True), ("gemma2", False, False)]:
        task = causal(tmp_path / family, family)
        head = task.core.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, Readout) == short == (task._built[1].readout is not None), family
        assert task._built[1].positions == positions, family
    tied = causal(tmp_path / "again", "gpt2").module
    assert tied.lm_head.weight is tied.transformer.wte.weight  # type: ignore[union-attr]
    assert all(p.untyped_storage().nbytes() == 4 for p in tied.parameters()), "placeholders take up memory"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """With weights that require grad and with hidden states that do: the two ways of the readout."""
    task = causal(tmp_path / "m", family)
    encoded, params = prepared(task, text_pool(4), tmp_path / "e"), double(task.params())
    batch = encoded.inputs(np.arange(4))
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    found = torch.autograd.grad(task.loss(leaves, batch).sum(), list(leaves.values()), allow_unused=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").double().eval()
    nll = F.cross_entropy(model(input_ids=batch["tokens"]).logits.transpose(1, 2), batch["targets"], reduction="none")
    ((nll * batch["mask"]).sum(dim=1) / batch["mask"].sum(dim=1)).sum().backward()
    for (name, p), grad in zip(model.named_parameters(), found, strict=True):
        assert torch.allclose(torch.zeros_like(p) if grad is None else grad, p.grad, rtol=0, atol=1e-9), name


def test_documents_have_a_start_and_an_end(tmp_path: Path) -> None:
    pool = Pool.from_columns({"text": ["the cat", "dog " * 40, ""]})
    task = causal(tmp_path / "m", "llama")
    encoded, tokenizer = prepared(task, pool, tmp_path / "e"), task.tokenizer()
    ids = tokenizer.encode("the cat", add_special_tokens=False).ids
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<|end|>")
    batch = encoded.inputs(np.array([0]))
    assert batch["tokens"][0].tolist() == [bos, *ids] and batch["targets"][0].tolist() == [*ids, eos]
    assert encoded.sizes.tolist() == [len(ids) + 1, 16, 1]
    assert eos not in encoded.inputs(np.array([1]))["targets"][0].tolist(), "a text that was cut has no end"
    task = causal(tmp_path / "g", "gpt2")
    assert task.start == task.marks.eos == eos and task.marks.bos in (None, eos)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    task = causal(tmp_path / "m", "gpt2")
    pool = text_pool(30)
    encoded = prepared(task, pool, tmp_path / "e")
    recipe = Recipe(steps=12, terms_per_step=200, lr=3e-3)
    trained = loop.train(task, encoded, np.arange(30), Selection(pool.ids, np.ones(30)), recipe, start=task.params())
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    again = loop.train(task, encoded, np.arange(30), Selection(pool.ids, np.ones(30)), recipe, start=task.params())
    assert loop.fingerprint(again.params) == loop.fingerprint(trained.params)
    scratch = loop.train(task, encoded, np.arange(30), Selection(pool.ids, np.ones(30)), recipe)
    assert scratch.losses[0] == pytest.approx(np.log(VOCAB), rel=0.2) and scratch.losses[-1] < scratch.losses[0]


def test_a_task_is_a_value(tmp_path: Path) -> None:
    task = causal(tmp_path / "m", "llama")
    params, batch = task.params(), prepared(task, text_pool(3), tmp_path / "e").inputs(np.arange(3))
    before, size = task.loss(params, batch), len(pickle.dumps(task))
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task and size < 1000, "a built module travels along"
    assert torch.equal(copy.loss(params, batch), before) and copy.describe() == task.describe()
    about = json.loads(json.dumps(task.describe()))
    moved = tmp_path / "elsewhere"
    (tmp_path / "m").rename(moved)
    same = CausalLM(path=str(moved), context=16)
    assert same.describe() == about, "the path is in the key"
    assert CausalLM(path=str(moved), context=15).describe() != about
    hashed = checkpoint_hash(str(moved))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert CausalLM(path=str(moved), context=16).describe() != about
    assert checkpoint_hash(str(moved)) == hashed == same.checkpoint_hash()
    save_file({"x": torch.zeros(1)}, moved / "model.safetensors")
    assert checkpoint_hash(str(moved)) != hashed


def test_hidden_states(tmp_path: Path) -> None:
    task = causal(tmp_path / "m", "gpt2")
    batch = prepared(task, text_pool(3), tmp_path / "e").inputs(np.arange(3))
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    expected = model.transformer(batch["tokens"]).last_hidden_state
    assert task.width == 32 and torch.allclose(task.hidden(task.params(), batch), expected, atol=1e-5)


def test_the_price_of_a_pass(tmp_path: Path) -> None:
    """Against torch's counter, which counts all of the square that causal attention leaves half of."""
    from torch.utils.flop_counter import FlopCounterMode

    task = causal(tmp_path / "m", "llama")
    matrices = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 32 * VOCAB
    assert task.forward_flops(np.array([5, 7])) == 2 * matrices * 12 + 2 * 2 * 32 * (25 + 49)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(llama(), attn_implementation="eager")
        model(input_ids=torch.zeros(1, 7, dtype=torch.int64))
    assert counter.get_total_flops() == task.forward_flops(np.array([7])) + 2 * 2 * 32 * 49


# Classifiers.


def labelled(n: int, **columns: Any) -> Pool:
    pool = text_pool(n)
    return Pool.from_columns({"text": pool.column("text"), "label": [i % 3 for i in range(n)], **columns})


def sequences(folder: Path, config: Any) -> SequenceClassifier:
    folder.mkdir()
    randomised(transformers.AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    save_tokenizer(folder, text_pool(40), bert=True, pad_token="[PAD]", eos_token="<|end|>")
    return SequenceClassifier(path=str(folder), context=16)


CLASSIFIERS = {
    "bert": bert,
    "roberta": lambda: transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=66, num_labels=3, pad_token_id=1,
    ),
    "llama": lambda: llama(num_labels=3),
    "gpt2": lambda: gpt2(num_labels=3),
}  # fmt: skip


@pytest.mark.parametrize("family", list(CLASSIFIERS))
def test_classifiers_are_those_of_transformers(family: str, tmp_path: Path, exact_norms: None) -> None:
    task = sequences(tmp_path / "m", CLASSIFIERS[family]())
    pool = labelled(8)
    encoded, params = prepared(task, pool, tmp_path / "e"), task.params()
    assert encoded.sizes.tolist() == [1] * 8 and len(set(encoded.lengths.tolist())) > 2
    found, exact = (
        task.loss(params, encoded.inputs(np.arange(8))),
        task.loss(double(params), encoded.inputs(np.arange(8))),
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    for row, text in enumerate(pool.column("text")):
        given = fast(text, truncation=True, max_length=16, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            one = model(**given, labels=torch.tensor([row % 3])).loss
        assert float(one) == pytest.approx(float(found[row]), abs=1e-6)
        alone = task.loss(double(params), encoded.inputs(np.array([row])))
        assert float(alone[0]) == pytest.approx(float(exact[row]), abs=1e-12)
    batch = encoded.inputs(np.arange(8))
    p = task.logits(double(params), batch).softmax(dim=1).gather(1, batch["y"][:, None])[:, 0]
    assert torch.allclose(task.margin(double(params), batch), p.log() - (1 - p).log())


@pytest.mark.parametrize("family", list(CLASSIFIERS))
def test_gradients_by_hooks_are_those_of_each_example(family: str, tmp_path: Path, exact_norms: None) -> None:
    """Nothing in the model adds examples up before their gradients are told apart."""
    task = sequences(tmp_path / "m", CLASSIFIERS[family]())
    encoded, params, rows = prepared(task, labelled(5), tmp_path / "e"), double(task.params()), np.arange(5)
    found, _ = gradients(task.module, task.loss, params, encoded.inputs(rows))
    assert covered(task.module) == set(params), "all layers of these families have rules"
    for name, grad in looped(task, params, encoded, rows).items():
        assert torch.allclose(found[name], grad.flatten(1), rtol=0, atol=1e-10), name


def test_a_classifier_learns(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    task, pool = sequences(folder, bert()), labelled(24)
    encoded = prepared(task, pool, tmp_path / "e")
    recipe = Recipe(steps=25, terms_per_step=24, lr=2e-3)
    trained = loop.train(task, encoded, np.arange(24), Selection(pool.ids, np.ones(24)), recipe, start=task.params())
    assert trained.losses[-1] < 0.7 * trained.losses[0]
    after = loop.evaluate(task, trained.params, encoded)
    assert after["accuracy"].mean() > 0.6
    assert [len(b) for b in loop.blocks(encoded.lengths, 32)] != [24], "batches ignore how long texts are"


def test_a_new_head_is_drawn_only_when_asked_for(tmp_path: Path) -> None:
    task = sequences(tmp_path / "m", bert())
    whole = task.params()
    transformers.BertModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")
    bare = SequenceClassifier(path=str(tmp_path / "m"), context=16)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "id2label": {0: "a", 1: "b", 2: "c"}}))
    with pytest.raises(InputError, match="'classifier.weight'"):
        bare.params()
    state = torch.random.get_rng_state()
    a, b, c = bare.params(seed=0), bare.params(seed=0), bare.params(seed=1)
    assert torch.equal(state, torch.random.get_rng_state()), "loading moves torch's generator"
    changed = {n for n in a if not torch.equal(a[n], whole[n])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert loop.fingerprint(a) == loop.fingerprint(b) != loop.fingerprint(c)


def test_labels(tmp_path: Path) -> None:
    task = sequences(
        tmp_path / "m", bert(id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    )
    named = labelled(3, verdict=["yes", "no", "maybe"])
    by_name = SequenceClassifier(path=task.path, context=16, label="verdict")
    assert prepared(by_name, named, tmp_path / "a").inputs(np.arange(3))["y"].tolist() == [1, 0, 2]
    with pytest.raises(InputError, match="unknown label 'maybee'\n.*\n.*did you mean 'maybe'"):
        prepared(by_name, labelled(1, verdict=["maybee"]), tmp_path / "b")
    with pytest.raises(InputError, match="labels run from 0 to 3"):
        prepared(by_name, labelled(2, verdict=[0, 3]), tmp_path / "c")
    with pytest.raises(InputError, match="not whole numbers"):
        prepared(by_name, labelled(2, verdict=[0.0, 1.5]), tmp_path / "d")
    with pytest.raises(InputError, match="no column 'verdict'"):
        prepared(by_name, labelled(2), tmp_path / "f")


# Adapters.


def adapted(folder: Path, base: Path, **options: Any) -> Any:
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(model, config)
    randomised(model).save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
def test_an_adapter(tmp_path: Path) -> None:
    causal(tmp_path / "m", "llama")
    adapted(tmp_path / "a", tmp_path / "m", lora_dropout=0.5)
    task = open_model(str(tmp_path / "a"), context=16)
    assert isinstance(task, CausalLM) and task.path == str(tmp_path / "m") and task.adapter == str(tmp_path / "a")
    params = task.params()
    trainable = {n for n, p in task.module.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in n for n in trainable)
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    assert list(params) == [n for n, _ in model.named_parameters()]
    encoded = prepared(task, text_pool(3), tmp_path / "e")
    for row in range(3):
        batch = encoded.inputs(np.array([row]))
        with torch.no_grad():
            z = model(input_ids=batch["tokens"]).logits
        assert float(F.cross_entropy(z[0], batch["targets"][0])) == pytest.approx(
            float(task.loss(params, batch)), abs=1e-6
        )
    plain = CausalLM(path=task.path, context=16)
    batch = encoded.inputs(np.arange(3))
    assert not torch.allclose(plain.loss(plain.params(), batch), task.loss(params, batch), atol=1e-3)
    assert plain.describe() != task.describe() and plain.checkpoint_hash() != task.checkpoint_hash()
    assert pickle.loads(pickle.dumps(task)).loss(params, batch).tolist() == task.loss(params, batch).tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    causal(tmp_path / "m", "llama")
    adapted(tmp_path / "a", tmp_path / "m")
    task, pool = open_model(str(tmp_path / "a"), context=16), text_pool(20)
    encoded, selection, start = prepared(task, pool, tmp_path / "e"), Selection(pool.ids, np.ones(20)), task.params()
    recipe = Recipe(steps=10, terms_per_step=150, lr=1e-2, weight_decay=0.1)
    trained = loop.train(task, encoded, np.arange(20), selection, recipe, tmp_path / "run", start=start)
    assert trained.losses[-1] < trained.losses[0]
    moved = {n for n, p in trained.params.items() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if "lora_" in n} == set(trained.state["square"])
    found = load_moments(tmp_path / "run", task.module)
    assert all(torch.equal(found.state["mean"][n], p) for n, p in trained.state["mean"].items()) and found.steps == 10
    estimated = estimate_moments(task, start, encoded, np.arange(20), pool.ids, terms_per_step=150, steps=2)
    assert set(estimated.state["square"]) == moved


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_adapters_are_refused(tmp_path: Path) -> None:
    import peft

    causal(tmp_path / "m", "llama")
    adapted(tmp_path / "a", tmp_path / "m")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle"):
        _ = CausalLM(path=str(tmp_path / "m"), context=16, adapter=str(tmp_path / "a")).module
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)  # type: ignore[arg-type]
    peft.get_peft_model(base, prompt).save_pretrained(str(tmp_path / "p"))
    with pytest.raises(InputError, match="adds tokens, not weights"):
        _ = CausalLM(path=str(tmp_path / "m"), context=16, adapter=str(tmp_path / "p")).module


# What is refused.


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    task = causal(tmp_path / "m", "gpt2")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="there is no"):
        task.params()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    for call in (task.params, task.checkpoint_hash):
        with pytest.raises(
            InputError, match=r"(?s)no safetensors weights.*pytorch_model.bin is a pickle.*save_pretrained"
        ):
            call()


def test_bad_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        CausalLM(path=str(tmp_path / "none")).describe()
    (tmp_path / "empty").mkdir()
    for call in (lambda: open_model(str(tmp_path / "empty")), lambda: CausalLM(path=str(tmp_path / "empty")).module):
        with pytest.raises(InputError, match="no config.json"):
            call()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = causal(tmp_path / "m", "llama")
    with pytest.raises(InputError, match=r"(?s)context = 65.*64 positions"):
        _ = CausalLM(path=task.path, context=65).module
    with pytest.raises(InputError, match="did you mean 'float32'"):
        CausalLM(path=task.path, dtype="float23")
    whole = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        task.params()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "model.safetensors").write_bytes(whole)
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(InputError, match="cannot be loaded"):
        CausalLM(path=task.path, context=16).params()
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(own))
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match="code that comes with a model is never run"):
        _ = CausalLM(path=task.path, context=16).module
    assert not (tmp_path / "ran").exists()


def test_encoders_are_not_causal(tmp_path: Path) -> None:
    sequences(tmp_path / "m", bert())
    assert isinstance(open_model(str(tmp_path / "m")), SequenceClassifier)
    with pytest.raises(InputError, match="a bert model is not causal"):
        _ = CausalLM(path=str(tmp_path / "m"), context=16).module


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    task = causal(tmp_path / "m", "gpt2")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))
    with pytest.raises(InputError, match="the model knows 90"):
        prepared(CausalLM(path=task.path, context=16), text_pool(3), tmp_path / "e")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no fast tokenizer"):
        prepared(task, text_pool(3), tmp_path / "f")


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = causal(tmp_path / "m", "gpt2")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"(?s)needs the package 'transformers'.*assay-data\[hf\]"):
        _ = task.module
