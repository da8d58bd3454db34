"""Models of transformers with our modules compute what they did without, forward and backward."""

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import tapelm
from tapelm._hf_modules import attention_forward
from tapelm.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))
from hf_models import BATCHES, FAMILIES, ONE_LAYER, T, batch, make, pair

pytestmark = pytest.mark.usefixtures("one_thread")


def step(model, ids, labels, given, **more):
    """[loss, logits where there is a token, gradients of all parameters]."""
    model.train().zero_grad()
    # Packed documents see each other in transformers while it makes a cache.
    more = {"use_cache": False, **more} if model.config._attn_implementation == "sdpa" else more
    loss = model(ids, labels=labels, **given, **more).loss
    loss.backward()
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False, **given).logits
    if "attention_mask" in given:
        logits = logits[given["attention_mask"].bool()]
    return [loss.detach(), logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients(family, kind, dtype):
    """Float32: each to rounding. Bfloat16: all together at most twice as far from float64 as transformers.

    Alone some small gradient errs more by chance, as errors of all layers have gone into it.
    """
    stock, ours = pair(family, dtype)
    exact = step(copy.deepcopy(stock).double(), *batch(kind))
    found, theirs = step(ours, *batch(kind)), step(stock, *batch(kind))
    scales = [value.square().mean().sqrt() for value in exact]
    together = (
        torch.cat([(x.double() / scale).flatten() for x, scale in zip(values, scales, strict=True)])
        for values in (found, theirs, exact)
    )
    assert_close(family, dtype, *together)
    for a, b, scale in zip(found, theirs, scales, strict=True):
        assert a.dtype == b.dtype
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_state_dict_stay(family):
    stock = make(family)
    parameters, before, config = dict(stock.named_parameters()), stock.state_dict(), stock.config.to_dict()
    ours = tapelm.hf.optimize(stock)
    assert ours is stock
    assert [*ours.state_dict()] == [*before]
    assert all(parameters[name] is parameter for name, parameter in ours.named_parameters())
    assert ours.config.to_dict() == config
    assert type(ours.lm_head) is tapelm.nn.LMHead
    left = {
        type(module).__name__ for module in ours.modules() if not type(module).__module__.startswith("tapelm")
    }
    assert not [name for name in left if name.endswith(("RMSNorm", "MLP", "Linear", "LayerNorm"))]
    assert [name for name in left if name.endswith("Attention")] == (
        ["GPT2Attention"] if family == "gpt2" else []
    )


def test_no_other_model_changes():
    tapelm.hf.optimize(make("llama"))
    other = make("llama")
    assert not [m for m in other.modules() if type(m).__module__.startswith("tapelm")]
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_options_of_the_loss(family):
    """Trainer's mean over several batches, given targets, another ignored index, no target at all."""
    stock, ours = pair(family)
    ids, labels, _ = batch("full")
    for more in (
        {"num_items_in_batch": 77},
        {"num_items_in_batch": torch.tensor(77)},
        {"shift_labels": labels.roll(-1, 1)},
        {"ignore_index": 5},
        {"logits_to_keep": T},
    ):
        labels = labels.clamp(min=0) if "ignore_index" in more else labels
        torch.testing.assert_close(
            step(ours, ids, labels, {}, **more), step(stock, ids, labels, {}, **more), rtol=1e-3, atol=1e-5
        )
    ours.zero_grad()
    loss = ours.train()(ids, labels=torch.full_like(ids, -100), num_items_in_batch=77).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in ours.parameters())


def test_outputs_in_training():
    stock, ours = pair("llama")
    ids, labels, _ = batch("full")
    out = ours(ids, labels=labels, output_hidden_states=True)
    assert (out.logits, out.past_key_values) == (None, None)
    expected = stock(ids, labels=labels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.hidden_states, expected, rtol=1e-4, atol=1e-4)
    for more in ({}, {"output_hidden_states": True}):  # by place, as a tuple in which logits keep theirs
        loss, logits, *rest = ours(ids, None, None, None, None, labels, return_dict=False, **more)
        torch.testing.assert_close(loss, out.loss)
        assert logits is None
        assert len(rest) == len(more)
    assert ours(ids, labels=labels, use_cache=True).past_key_values.get_seq_length() == T
    assert ours(ids).logits.shape == (3, T, 97)
    assert ours.eval()(ids, labels=labels).logits.shape == (3, T, 97)
    kept = tapelm.hf.optimize(make("llama"), fused_loss=False)
    torch.testing.assert_close(kept(ids, labels=labels).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_another_loss_function_gets_logits():
    ours = pair("llama")[1]
    ours.loss_function = lambda logits, labels, **_: logits.sum()
    ids, labels, _ = batch("full")
    assert ours(ids, labels=labels).logits.shape == (3, T, 97)


def test_packed_documents_do_not_see_each_other_by_default():
    """transformers makes a cache by default and then lets them; with labels ours makes none."""
    ours = pair("llama")[1]
    ids, labels, given = batch("packed")
    other = ids.clone()
    other[:, :8] = 1 + other[:, :8] % 96
    labels[:, :9] = -100
    losses = [ours(x, labels=labels, **given).loss.item() for x in (ids, other)]
    assert losses[0] == losses[1]
    evaluated = ours.eval()(ids, labels=labels, **given)
    torch.testing.assert_close(evaluated.loss.item(), losses[0])
    assert evaluated.past_key_values is None


@pytest.mark.parametrize("length", [T - 6, T + 9])
def test_a_mask_of_another_length_is_cut_or_filled_up(length):
    """As in transformers where a cache is made, which it is by default."""
    stock, ours = pair("llama")
    ids, labels, _ = batch("full")
    labels[:, T - 6 :] = -100
    for mask in (
        torch.ones(3, length).long(),
        (torch.arange(length) >= torch.tensor([[0], [3], [9]])).long(),
    ):
        expected = stock(ids, labels=labels, attention_mask=mask).loss
        torch.testing.assert_close(ours.train()(ids, labels=labels, attention_mask=mask).loss, expected)
        torch.testing.assert_close(ours.eval()(ids, labels=labels, attention_mask=mask).loss, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_drawn_in_training_alone(family):
    changes = {"attn_pdrop": 0.3, "resid_pdrop": 0.3} if family == "gpt2" else {"attention_dropout": 0.3}
    stock, ours = pair(family, **changes)
    ids, labels, _ = batch("full")
    torch.manual_seed(0)
    first, second = (ours(ids, labels=labels).loss.item() for _ in range(2))
    torch.manual_seed(0)
    assert ours(ids, labels=labels).loss.item() == first != second
    torch.testing.assert_close(ours.eval()(ids).logits, stock.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    losses = [
        torch.stack([model.train()(ids, labels=labels).loss.detach() for _ in range(40)]).mean()
        for model in (ours, stock)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gpt2"])
def test_compiles_without_a_graph_break(family):
    torch.compiler.reset()
    stock, ours = pair(family, **ONE_LAYER[family])
    inner = torch.compile(ours.base_model, fullgraph=True, backend="aot_eager")
    ids, labels, given = batch("padded right")
    expected = stock.base_model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(inner(ids, use_cache=False).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    whole = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for more in ({}, given, BATCHES["packed"]):
        found = whole(ids, labels=labels, **more).loss
        torch.testing.assert_close(found, stock(ids, labels=labels, use_cache=False, **more).loss)


UNSUPPORTED = {
    "activation": (lambda: make("llama", hidden_act="gelu"), "activation 'gelu' is not supported"),
    "activation of GPT-2": (
        lambda: make("gpt2", activation_function="relu"),
        "be the tanh form of GELU",
    ),
    "wide heads": (lambda: make("qwen3", head_dim=320), "heads of 320 elements"),
    "cross-attention": (lambda: make("gpt2", add_cross_attention=True), "cross-attention is not supported"),
    "no model of transformers": (
        lambda: torch.nn.Linear(2, 2),
        r"Linear \(model_type None\) is not supported",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_named(name):
    build, message = UNSUPPORTED[name]
    model = build()
    with pytest.raises(ValueError, match=message):
        tapelm.hf.optimize(model)
    assert not [m for m in model.modules() if type(m).__module__.startswith("tapelm")]


def test_attention_weights_are_refused_where_they_are_asked_for():
    ours = pair("llama")[1].eval()
    ids = batch("full")[0]
    for ask in (ours, partial(ours.generate, return_dict_in_generate=True)):
        with pytest.raises(ValueError, match="attention weights are never stored"):
            ask(ids, output_attentions=True)


def test_unsupported_families_and_changed_models_are_named():
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"'gpt_neox'\) is not supported; .* llama, mistral, qwen2"):
        tapelm.hf.optimize(transformers.GPTNeoXForCausalLM(config))
    model = make("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="fewer than 2 modules are LlamaMLP"):
        tapelm.hf.optimize(model)
    model = make("llama")
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward of the model has been replaced"):
        tapelm.hf.optimize(model)


def test_optimized_again_with_another_loss():
    ours = pair("llama")[1]
    ids, labels, _ = batch("full")
    attention = ours.model.layers[0].self_attn
    assert tapelm.hf.optimize(ours)(ids, labels=labels).logits is None
    assert tapelm.hf.optimize(ours, fused_loss=False)(ids, labels=labels).logits is not None
    assert tapelm.hf.optimize(ours)(ids, labels=labels).logits is None
    assert ours.model.layers[0].self_attn is attention


def test_attention_names_what_it_does_not_compute():
    q = torch.randn(1, 2, 4, 8)
    for options, message in (({"softcap": 30.0}, "no softcap"), ({"is_causal": False}, "is causal")):
        with pytest.raises(ValueError, match=message):
            attention_forward(torch.nn.Module(), q, q, q, None, **options)


def test_masks_of_another_implementation_are_named():
    ours = pair("llama")[1]
    ours.set_attn_implementation("flex_attention")
    with pytest.raises(
        ValueError, match=r"'flex_attention' has other masks; call .*implementation\('tapelm'\)"
    ):
        ours(batch("full")[0])


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "Model"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_without_our_loss(family, head):
    import transformers

    config = make(family).config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    kind = getattr(transformers, FAMILIES[family][0] + head)
    stock = kind._from_config(config, attn_implementation="sdpa").eval()
    ours = tapelm.hf.optimize(copy.deepcopy(stock))
    ids, _, given = batch("padded right")
    ids = ids * given["attention_mask"]
    found, expected = (model(ids, **given)[0] for model in (ours, stock))
    if found.ndim == 3:
        found, expected = found[ids != 0], expected[ids != 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()


def test_importing_tapelm_does_not_import_transformers():
    import subprocess

    code = "import sys, tapelm; assert tapelm.hf.optimize; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.util.find_spec("transformers")


@pytest.mark.parametrize(("family", "kind"), [("llama", "full"), ("llama", "padded right"), ("gpt2", "full")])
def test_a_step_and_generation_on_every_device(family, kind, device):
    """On a GPU, and in the interpreter, by the Triton kernels."""
    stock, ours = (model.to(device) for model in pair(family, **ONE_LAYER[family]))
    ids, labels, given = batch(kind)
    ids, labels = ids.to(device), labels.to(device)
    given = {name: value.to(device) for name, value in given.items()}
    found, expected = (step(model, ids, labels, given) for model in (ours, stock))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
    if kind == "full":
        texts = [model.generate(ids, max_new_tokens=3, do_sample=False) for model in (ours, stock)]
        assert torch.equal(*texts)
