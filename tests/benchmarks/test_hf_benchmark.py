"""The step of a model of transformers: what is compared computes the same, what is printed was measured."""

import pytest
import torch
import transformers

import tapelm
from benchmarks import hf
from gpt.cli import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    for name, size in sizes.items():
        monkeypatch.setitem(hf.SIZES, name, size)
    monkeypatch.setitem(hf.SIZES, "num_attention_heads", 4)
    monkeypatch.setitem(hf.SIZES, "num_key_value_heads", 2)
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SHAPES", ((64, 64, 64),))
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 16)


def test_rows_of_all_variants() -> None:
    rows, skipped = hf.measure(hf.config_of(None, 1), 2, 32, CPU, 1)
    assert [row.variant for row in rows] == ["transformers", "tapelm.hf", "tapelm.hf, tapelm.AdamW"]
    assert skipped == ["Liger: its kernels run on GPUs alone"]
    for row in rows:
        assert row.ratio_vs["transformers"] == pytest.approx(rows[0].median_ms / row.median_ms)
        assert row.extra["tokens_per_second"] == pytest.approx(64e3 / row.median_ms)


def test_liger_has_a_process_of_its_own(monkeypatch) -> None:
    """It exchanges functions of transformers' modules, so that in this process it would change the others."""
    places, closed = {}, []

    class Here:
        shape, dtype, flops, tokens = "", torch.bfloat16, 1.0, 1.0

        def __init__(self, kind: str, **options: object) -> None:
            places[kind] = "here"

    class There:
        def __init__(self, build) -> None:
            build()
            places[build.args[0]] = "there"

        def close(self) -> None:
            closed.append(self)

    for name, stub in {"Step": Here, "Elsewhere": There, "agree": id, "interleaved": lambda *_: []}.items():
        monkeypatch.setattr(hf, name, stub)
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: object())
    assert hf.measure(hf.config_of(None, 1), 2, 32, torch.device("cuda"), 1) == ([], [])
    assert places == {hf.STOCK: "here", hf.OURS: "here", hf.LIGER: "there"} and len(closed) == 1


def test_a_step_trains_and_is_ours() -> None:
    ours, stock = (hf.Step(kind, hf.config_of(None, 1), 2, 32, CPU) for kind in (hf.OURS, hf.STOCK))
    assert type(ours.model.lm_head) is tapelm.nn.LMHead
    assert type(stock.model.lm_head) is torch.nn.Linear
    for step in (ours, stock):
        for _ in range(4):
            step()
        assert step.losses[3] < step.losses[0]  # of the first batch again
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(stock.losses), rtol=2e-3, atol=0.0)


def test_nothing_is_timed_when_the_models_disagree() -> None:
    steps = {kind: hf.Step(kind, hf.config_of(None, 1), 2, 32, CPU) for kind in (hf.STOCK, hf.OURS)}
    hf.agree(steps)
    with torch.no_grad():
        steps[hf.OURS].model.model.norm.weight.mul_(1.5)
    with pytest.raises(UserError, match="disagree, nothing was timed"):
        hf.agree(steps)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_sizes_of_a_model_of_ones_own(kind, tmp_path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 100, "num_hidden_layers": 3}
    if kind == "qwen3":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    made = transformers.AutoConfig.for_model(kind, **sizes)
    made.save_pretrained(tmp_path)
    assert hf.config_of(tmp_path, None).num_hidden_layers == 3
    rows, _ = hf.measure(hf.config_of(tmp_path, 2), 2, 16, CPU, 1)
    assert rows[0].subject == f"hf {kind}" and rows[0].shape == "2 layers, 2 x 16"


def test_a_directory_that_holds_no_model_or_none_of_ours_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--model .*: there is no config\.json in it"):
        hf.config_of(tmp_path, None)
    with pytest.raises(UserError, match="--layers 0: a model has at least one"):
        hf.config_of(None, 0)
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(UserError, match=r"--model .*no such model"):
        hf.config_of(tmp_path, None)
    with pytest.raises(UserError, match="--length 4096: the model has positions for 2048 tokens"):
        hf.measure(hf.config_of(None, 1), 1, 4096, CPU, 1)
    transformers.AutoConfig.for_model("opt", num_attention_heads=2, hidden_size=16).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"optimize: OPTForCausalLM .* is not supported"):
        hf.measure(hf.config_of(tmp_path, None), 1, 8, CPU, 1)
