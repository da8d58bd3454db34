"""Trainer, peft and checkpoints of transformers work on models with our modules."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tapelm

sys.path.insert(0, str(Path(__file__).parent))
from hf_models import make

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(rows=2, length=16):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def collate(texts):
    """Texts of different lengths, padded at their ends."""
    length = max(len(text) for text in texts)
    padded = torch.stack([F.pad(text, (0, length - len(text))) for text in texts])
    mask = (torch.arange(length) < torch.tensor([[len(text)] for text in texts])).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def train(model, folder, packed=False, **options):
    """Losses of four steps of Trainer, each of three batches, and of two evaluations."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4,
        logging_steps=1, eval_strategy="steps", eval_steps=2, save_strategy="no", learning_rate=1e-3,
        report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    texts = [ids(1, length)[0] for length in range(5, 21)]
    if packed:
        texts = [{"input_ids": text.tolist()} for text in texts]
    trainer = Trainer(
        model, arguments, train_dataset=texts, eval_dataset=texts,
        data_collator=DataCollatorWithFlattening() if packed else collate,
    )  # fmt: skip
    trainer.train()
    return [
        entry.get("loss", entry.get("eval_loss"))
        for entry in trainer.state.log_history
        if {"loss", "eval_loss"} & entry.keys()
    ]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"packed": True}, {"packed": True, "bf16": True}],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_trainer_has_the_same_losses(family, options, tmp_path):
    stock = make(family)
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    expected = train(stock, tmp_path, **options)
    assert len(expected) == 6
    assert train(ours, tmp_path, **options) == pytest.approx(
        expected, rel=1e-2 if "bf16" in options else 1e-4
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_saved_models_load_in_transformers_and_back(family, tmp_path):
    stock = make(family)
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    ours.save_pretrained(tmp_path)
    read = type(stock).from_pretrained(tmp_path)
    assert type(read.lm_head) is torch.nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), stock.parameters(), strict=True))
    assert "tapelm" not in (tmp_path / "config.json").read_text()
    again = tapelm.hf.optimize(read)
    torch.testing.assert_close(again.eval()(ids()).logits, ours.eval()(ids()).logits)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_peft_before_and_after(family):
    import peft

    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else "all-linear"

    def adapted(model):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    stock = make(family)
    models = [
        adapted(copy.deepcopy(stock)),
        adapted(tapelm.hf.optimize(copy.deepcopy(stock))),
        tapelm.hf.optimize(adapted(copy.deepcopy(stock))),
    ]
    found = []
    for model in models:
        out = model.train()(input_ids=ids(), labels=ids())
        out.loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((out, trained))
    (expected, gradients), *ours = found
    for out, trained in ours:
        assert out.logits is None
        assert trained.keys() == gradients.keys()
        torch.testing.assert_close(out.loss, expected.loss)
        for name, gradient in trained.items():
            torch.testing.assert_close(
                gradient, gradients[name], rtol=1e-3, atol=1e-4 * float(gradients[name].abs().max())
            )
    merged = [model.eval().merge_and_unload()(ids()).logits for model in models]
    for logits in merged[1:]:
        torch.testing.assert_close(logits, merged[0], rtol=1e-3, atol=1e-3)


def test_an_adapted_head_keeps_its_logits():
    """linear_cross_entropy would know nothing of the adapter."""
    import peft

    stock = make("llama", tie_word_embeddings=False)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    torch.manual_seed(2)
    expected = peft.get_peft_model(copy.deepcopy(stock), config).train()(input_ids=ids(), labels=ids())
    torch.manual_seed(2)
    ours = peft.get_peft_model(tapelm.hf.optimize(stock), config).train()(input_ids=ids(), labels=ids())
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_a_copy_computes_by_its_own_weights():
    ours = tapelm.hf.optimize(make("llama"))
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    losses = [model(ids(), labels=ids()).loss.item() for model in (ours, other)]
    assert losses[0] != losses[1]


def test_trains_after_a_move():
    """Moved after it was optimized, to another dtype."""
    ours = tapelm.hf.optimize(make("qwen2")).to(torch.bfloat16)
    ours(ids(), labels=ids()).loss.backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_unpickled_model_goes_on(family, tmp_path):
    """In a process that has optimized none, with our attention, masks and loss."""
    ours = tapelm.hf.optimize(make(family))
    mask = (torch.arange(16) >= torch.tensor([[0], [5]])).long()
    torch.save(ours, tmp_path / "model.pt")
    code = (
        "import sys, torch; ids, mask = torch.load(sys.argv[2]);"
        "model = torch.load(sys.argv[1], weights_only=False);"
        "out = model(ids, labels=ids); assert out.logits is None;"
        "torch.save((out.loss.detach(), model.eval()(ids, attention_mask=mask).logits.detach()), sys.argv[2])"
    )
    torch.save((ids(), mask), tmp_path / "found.pt")
    arguments = [str(tmp_path / "model.pt"), str(tmp_path / "found.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    found = torch.load(tmp_path / "found.pt")
    loss = ours(ids(), labels=ids()).loss.detach()
    torch.testing.assert_close(found, (loss, ours.eval()(ids(), attention_mask=mask).logits.detach()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_keeps_the_loss(tied):
    stock = make("llama", tie_word_embeddings=tied)
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    found = []
    for model in (stock, ours):
        torch.manual_seed(2)
        model.resize_token_embeddings(105)
        out = model(ids(), labels=ids() + 8)
        out.loss.backward()
        found.append((out.loss, [p.grad for p in model.parameters()]))
    assert out.logits is None
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_accelerate_wraps_and_unwraps_forward():
    from accelerate import Accelerator

    stock = make("llama")
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    wrapped = accelerator.prepare(ours)
    expected = stock(ids(), labels=ids()).loss
    torch.testing.assert_close(wrapped(ids(), labels=ids()).loss, expected, rtol=1e-2, atol=0.0)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    out = unwrapped(ids(), labels=ids())
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    assert inspect.signature(unwrapped.forward) == inspect.signature(stock.forward)


@pytest.mark.network
def test_smollm2_has_the_same_loss_and_text(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_lora.fetch import fetch

    path = fetch(tmp_path / "smollm2")
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    tokens = AutoTokenizer.from_pretrained(path)("The Federal Reserve raised", return_tensors="pt")
    losses = [model(**tokens, labels=tokens["input_ids"]).loss.item() for model in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    texts = [model.eval().generate(**tokens, max_new_tokens=20, do_sample=False) for model in (ours, stock)]
    assert torch.equal(*texts)
