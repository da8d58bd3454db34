"""The cache changes nothing but time, batches equal single prompts, sampling controls do what they say."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.cli import UserError
from llama_lora import adapters as files
from llama_lora import merge
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend, open_base
from llama_lora.decoder import Decoder
from llama_lora.generate import (
    GREEDY,
    Choice,
    GenerateConfig,
    Stream,
    answer,
    encode,
    generate,
    load,
    main,
    penalized,
    repeating,
)
from llama_lora.verify import randomize

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200, 31, 7], [11], [40, 41, 42, 43, 44, 45, 46, 47]]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    backend = TapelmBackend()
    model = backend.load(tiny_model, Recipe("lora"), torch.float32, CPU)
    randomize(backend.adapters(model), 1.0)
    files.write(directory, backend.adapters(model), Recipe("lora"), tiny_model)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["qlora", "lora"])
def model(request, adapter: Path):
    return load(adapter, None, request.param, torch.float32, CPU)[0]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_with_and_without_cache(model, prompt) -> None:
    with_cache = generate(model, [prompt], max_new_tokens=40)
    without = generate(model, [prompt], max_new_tokens=40, use_cache=False)
    assert with_cache.ids == without.ids
    assert len(with_cache.ids[0]) == 40


def test_a_batch_equals_its_prompts(model) -> None:
    together = generate(model, PROMPTS, max_new_tokens=24)
    assert together.ids == [generate(model, [prompt], max_new_tokens=24).ids[0] for prompt in PROMPTS]
    assert together.ids == generate(model, PROMPTS, max_new_tokens=24, use_cache=False).ids


def test_greedy_tokens_are_those_of_transformers(tiny_model) -> None:
    ours, _ = load(None, tiny_model, "lora", torch.float32, CPU)
    plain = open_base(tiny_model, torch.float32).eval()
    expected = plain.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    assert generate(ours, PROMPTS[:1], max_new_tokens=32).ids[0] == expected[0, len(PROMPTS[0]) :].tolist()


def test_logits_after_several_new_tokens_at_once(model) -> None:
    """A cache that is behind by more than a token catches up in one pass."""
    slow, fast = (Decoder(model, PROMPTS[:1], 8, use_cache=True) for _ in range(2))
    fast.logits()
    for token in (3, 4, 5):
        slow.append(torch.tensor([token]))
        fast.append(torch.tensor([token]))
        if token == 3:
            fast.logits()
    torch.testing.assert_close(fast.logits(), slow.logits(), rtol=1e-4, atol=1e-4)


def test_stop_token_ends_a_row_and_is_not_returned(model) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12).ids
    stop = free[0][5]
    ended = generate(model, PROMPTS, max_new_tokens=12, stop=frozenset({stop})).ids
    assert ended[0] == free[0][: free[0].index(stop)]
    for row, other in zip(ended, free, strict=True):
        assert row == other[: len(row)]


def test_sampling_follows_its_seed(model) -> None:
    draws = [
        generate(model, PROMPTS[:1], Choice(temperature=1.0, seed=seed), max_new_tokens=20).ids
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_repetition_penalty() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalized(logits, [0, 1], Choice(repetition_penalty=2.0)).tolist() == [1.0, -4.0, 1.0]
    assert penalized(logits, [0, 1], GREEDY) is logits


def test_no_ngram_occurs_twice(model) -> None:
    assert repeating([1, 2, 3, 1, 2], 3) == [3]
    assert repeating([1, 2, 3, 1, 2], 2) == [3]
    assert repeating([1, 2], 3) == []
    assert repeating([4, 5], 1) == [4, 5]
    banned = penalized(torch.zeros(4), [1, 2, 3, 1, 2], Choice(no_repeat_ngram=3))
    assert banned.tolist() == [0.0, 0.0, 0.0, -math.inf]
    found = generate(model, PROMPTS[:1], Choice(temperature=0.0, no_repeat_ngram=2), max_new_tokens=60).ids[0]
    whole = PROMPTS[0] + found
    pairs = list(itertools.pairwise(whole))
    assert len(pairs) == len(set(pairs))


def test_answer_is_the_new_text_only(model, tokenizer) -> None:
    question = "did prices fall"
    ids = encode(tokenizer, question, chat=True)
    expected = tokenizer.decode(generate(model, [ids], max_new_tokens=8).ids[0], skip_special_tokens=True)
    assert answer(question, model, tokenizer, max_new_tokens=8) == expected


def test_program_streams_what_it_writes(adapter, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    arguments = [
        "--adapter",
        str(adapter),
        "--prompt",
        "the economy",
        "--temperature",
        "0",
    ]
    assert main([*arguments, "--max-new-tokens", "12", "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    said = capsys.readouterr()
    assert said.out.rstrip("\n") == written["texts"][0].rstrip("\n")
    assert "prefill" in said.err
    assert main([*arguments[:2], "--prompt", "the economy", "prices", "--max-new-tokens", "4"]) == 0
    assert "the economy\n  " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_an_adapter_is_used_over_what_it_was_trained_over(method, tiny_model, tokenizer, tmp_path) -> None:
    backend = TapelmBackend()
    trained = backend.load(tiny_model, Recipe(method), torch.float32, CPU)
    randomize(backend.adapters(trained), 1.0)
    files.write(tmp_path, backend.adapters(trained), Recipe(method), tiny_model)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, None, "auto", torch.float32, CPU)
    for name, adapter in backend.adapters(loaded).items():
        assert torch.equal(adapter.dense_weight(), backend.adapters(trained)[name].dense_weight())
    assert files.method_of(tmp_path, "lora") == "lora"
    assert files.method_of(None, "auto") == "lora"


def test_an_adapter_of_another_program_wants_a_method(adapter, tmp_path) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    save_file(load_file(adapter / files.WEIGHTS), tmp_path / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="pass --method qlora"):
        load(tmp_path, None, "auto", torch.float32, CPU)
    load(tmp_path, None, "qlora", torch.float32, CPU)
    tensors = load_file(adapter / files.WEIGHTS)
    save_file(tensors, tmp_path / files.WEIGHTS, metadata={"format": "pt", files.METHOD: "full"})
    with pytest.raises(UserError, match="pass --method qlora"):
        load(tmp_path, None, "auto", torch.float32, CPU)
    (tmp_path / files.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path, None, "auto", torch.float32, CPU)
    with pytest.raises(UserError, match="name the adapter directory of a run"):
        load(tmp_path.parent, None, "auto", torch.float32, CPU)


def test_a_stream_waits_for_whole_characters_but_drops_nothing(capsys) -> None:
    class Bytes:
        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", "replace")

    stream = Stream(Bytes())
    for token in "a€".encode():
        stream([token])
    assert capsys.readouterr().out == "a€"
    stream([0xE2])
    assert capsys.readouterr().out == ""
    stream.end()
    assert capsys.readouterr().out == "\ufffd\n"


def test_mistakes_are_named(model, tmp_path, tiny_model) -> None:
    with pytest.raises(UserError, match="pass --adapter, --model or both"):
        GenerateConfig(prompt=("x",))
    with pytest.raises(UserError, match="repetition_penalty"):
        Choice(repetition_penalty=0.0)
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, [[1], []], max_new_tokens=1)
    with pytest.raises(UserError, match="exceed the model's 512 positions"):
        generate(model, [[1]], max_new_tokens=512)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load(tmp_path, tiny_model, "lora", torch.float32, CPU)


def copied(model: Path, out: Path, change: Callable[[Any], Any]) -> Path:
    shutil.copytree(model, out)
    change(open_base(model, torch.float32)).save_pretrained(out)
    return out


def trained_again(step: float) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.mul_(1 + step * (-1) ** len(name))
        return model

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_may_be_a_copy_in_another_precision(dtype, adapter, tiny_model, tmp_path, capsys) -> None:
    copy = copied(tiny_model, tmp_path / "copy", lambda model: model.to(dtype))
    assert files.base_of(adapter, copy) == copy
    load(adapter, copy, "auto", torch.float32, CPU)
    assert capsys.readouterr().err == ""  # bf16 lies in both, but for the smallest numbers


def test_a_base_whose_weights_differ_by_a_rounding_is_warned_of(
    adapter, tiny_model, tmp_path, capsys
) -> None:
    copy = copied(tiny_model, tmp_path / "copy", trained_again(0.003))
    assert files.base_of(adapter, copy) == copy
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: the weights in {copy} are not those of {tiny_model}, over which {adapter}"
    )
    assert said.endswith("no further from them than a copy in another precision\n")


def test_an_adapter_over_another_base_is_refused(adapter, tiny_model, tmp_path) -> None:
    other = copied(tiny_model, tmp_path / "other", trained_again(0.03))
    message = f"the weights in {other} are not those of {tiny_model}, over which {adapter} was trained: "
    with pytest.raises(UserError, match=rf"^{message}84 of 84 compared differ; pass that base with --model$"):
        load(adapter, other, "auto", torch.float32, CPU)
    with pytest.raises(UserError, match=message):
        merge.main(["--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--model", str(other)])
    assert not (tmp_path / "merged").exists()
    larger = tmp_path / "larger"
    larger.mkdir()
    tensors = load_file(tiny_model / "model.safetensors")
    more = {name.replace("layers.2", "layers.3"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, larger / "model.safetensors")
    with pytest.raises(UserError, match="was trained: it has other layers; pass that base"):
        files.base_of(adapter, larger)
    broken = copied(tiny_model, tmp_path / "broken", trained_again(float("nan")))
    with pytest.raises(UserError, match="84 of 84 compared differ"):
        files.base_of(adapter, broken)
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    noted = {"format": "pt", files.BASE: "no hexadecimal"}
    save_file(load_file(adapter / files.WEIGHTS), damaged / files.WEIGHTS, metadata=noted)
    with pytest.raises(UserError, match=f"{damaged} is damaged: what it notes of its base is 'no hex"):
        files.base_of(damaged, tiny_model)


def test_what_cannot_be_compared_is_used_as_it_is(adapter, tiny_model, tmp_path) -> None:
    """An adapter of another program, a base of another format."""
    theirs, other = tmp_path / "theirs", copied(tiny_model, tmp_path / "other", trained_again(0.03))
    shutil.copytree(adapter, theirs)
    save_file(load_file(adapter / files.WEIGHTS), theirs / files.WEIGHTS, metadata={"format": "pt"})
    assert files.base_of(theirs, other) == other
    assert files.base_of(adapter, tmp_path) == tmp_path
