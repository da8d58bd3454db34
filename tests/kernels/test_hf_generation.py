"""Generation of models of transformers with our modules: the same texts, by our attention."""

import inspect
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tapelm._hf_modules import attention_mask

sys.path.insert(0, str(Path(__file__).parent))
from hf_models import FAMILIES, ONE_LAYER, T, batch, pair

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = [family for family in FAMILIES if family != "mistral with a window"]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def without_sdpa(monkeypatch):
    """A context in which PyTorch's attention cannot be called."""

    def refuse(*arguments, **options):
        raise AssertionError("PyTorch's attention was called")

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", refuse)
            yield

    return context


def logits_in_parts(model, ids, mask=None, parts=(9, 1, 5, 6)):
    """Logits of queries that continue a cache, of several lengths."""
    assert sum(parts) == T
    found, cache, end = [], None, 0
    with torch.no_grad():
        for part in ids.split(parts, 1):
            end += part.shape[1]
            out = model.eval()(
                part,
                attention_mask=mask if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            found.append(out.logits)
            cache = out.past_key_values
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", ["full", "padded left", "padded at both ends"])
@pytest.mark.parametrize("family", FULL)
def test_queries_that_continue_a_cache(family, kind, without_sdpa):
    stock, ours = pair(family)
    stock.set_attn_implementation("eager")
    ids, _, given = batch(kind)
    mask = given.get("attention_mask")
    with torch.no_grad():
        expected = stock.eval()(ids, use_cache=False, **given).logits
    with nullcontext() if kind == "padded at both ends" else without_sdpa():
        found = logits_in_parts(ours, ids, mask)
    read = torch.ones_like(ids).bool() if mask is None else mask.cumsum(-1) > 0  # text, and padding behind it
    torch.testing.assert_close(found[read], expected[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["padded right", "padded at both ends"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_are_padded_behind_the_text(family, kind):
    """The first token is predicted from padding there, which sees the text."""
    stock, ours = (model.eval() for model in pair(family))
    ids, _, given = batch(kind)
    with torch.no_grad():
        expected, found = stock(ids, **given).logits, ours(ids, **given).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    for more in ({}, {"num_beams": 3}):
        options = {**GREEDY, **given, **more}
        assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_token_is_predicted_from_in_a_hole(family, without_sdpa):
    """There PyTorch's attention says what comes out; behind it ours does."""
    stock, ours = pair(family)
    ids, _, given = batch("hole")
    with torch.no_grad():
        expected = stock.eval()(ids, use_cache=False, **given).logits
    found = logits_in_parts(ours, ids, given["attention_mask"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    first = ours(ids[:, :9], attention_mask=given["attention_mask"][:, :9], use_cache=True)
    with without_sdpa():
        second = ours(
            ids[:, 9:], attention_mask=given["attention_mask"], past_key_values=first.past_key_values
        )
    torch.testing.assert_close(second.logits, expected[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral with a window", "qwen3"])
def test_padding_at_the_left_has_the_logits_of_sdpa(family):
    """Also where there is no text yet: what the first token is predicted from sees nothing."""
    stock, ours = pair(family)
    ids, _, given = batch("padded at both ends")
    before = given["attention_mask"].cumsum(-1) == 0
    with torch.no_grad():
        expected = stock.eval()(ids, **given).logits[before]
        torch.testing.assert_close(ours.eval()(ids, **given).logits[before], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same(family, cache, without_sdpa):
    stock, ours = pair(family)
    ids, _, given = batch("padded left")
    for more in ({}, given, {"num_beams": 3, **given}):
        options = {"cache_implementation": cache, **GREEDY, **more}
        expected = stock.eval().generate(ids, **options)
        assert torch.equal(ours.eval().generate(ids, **options), expected)
        if cache is None and family in FULL:
            with without_sdpa():
                ours.generate(ids, **options)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup", "chunks"])
@pytest.mark.parametrize("family", FULL)
def test_several_tokens_at_once(family, how, without_sdpa):
    stock, ours = pair(family)
    ids = 1 + batch("full")[0][:1].repeat(1, 2) % 96
    options = {
        "assistant": [{"assistant_model": model.eval()} for model in pair(family, initializer_range=0.21)],
        "prompt lookup": [{"prompt_lookup_num_tokens": 3, "eos_token_id": 0}] * 2,
        "chunks": [{"prefill_chunk_size": 5, "max_new_tokens": 1}] * 2,
    }[how]
    expected = stock.eval().generate(ids, **(GREEDY | options[0]))
    with without_sdpa():
        assert torch.equal(ours.eval().generate(ids, **(GREEDY | options[1])), expected)


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gpt2"])
def test_a_conversation_goes_on_behind_its_cache(family):
    """Rows of different lengths, whose second turn continues the cache of the first."""
    ids, _, given = batch("padded left")
    texts = []
    for model in pair(family):
        first = model.eval().generate(ids, return_dict_in_generate=True, **given, **GREEDY)
        turn = torch.cat([first.sequences, ids[:, :7]], 1)
        mask = F.pad(given["attention_mask"], (0, turn.shape[1] - T), value=1)
        texts.append(
            model.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        )
    assert torch.equal(*texts)


def test_a_token_sees_the_whole_of_a_cache_that_is_cut_to_a_window(without_sdpa):
    stock, ours = pair("mistral with a window")
    ids, _, given = batch("padded left")
    with torch.no_grad():
        expected = stock.eval()(ids, use_cache=False, **given).logits[:, -1]
        for mask in (None, given["attention_mask"]):
            first = ours.eval()(ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1])
            with without_sdpa():
                last = ours(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(last.logits[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_masks_where_queries_have_places():
    """As releases of transformers ask for them whose masks begin with cache_position."""

    def mask(first, end, keys, **more):
        places = torch.arange(first, end)
        return attention_mask(
            batch_size=1, cache_position=places, kv_length=keys, attention_mask=None, **more
        )

    assert mask(0, 5, 5) is None
    assert mask(4, 9, 9) is None
    assert mask(9, 10, 8, kv_offset=2, local_size=8) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decodes_in_a_graph(family, without_sdpa):
    """That of a padded batch has PyTorch's attention, any other ours, where places of queries are known."""
    from transformers.masking_utils import sdpa_mask

    known = "q_offset" in inspect.signature(sdpa_mask).parameters
    torch.compiler.reset()
    stock, ours = pair(family, **ONE_LAYER[family])
    whole = torch.compile(ours.eval(), fullgraph=True, backend="aot_eager")
    for kind in ("full", "padded left"):
        ids, _, given = batch(kind)
        mask = given.get("attention_mask", torch.ones_like(ids))
        with torch.no_grad():
            expected = stock.eval()(ids, **given).logits[mask.bool()]
        with without_sdpa() if kind == "full" and known else nullcontext():
            found = logits_in_parts(whole, ids, given.get("attention_mask"), (9, 4, 4, 1, 1, 1, 1))
        torch.testing.assert_close(found[mask.bool()], expected, rtol=1e-4, atol=1e-4)
