"""Accelerated models under the compiler, activation checkpointing and transformers, and the counters."""

import copy
import warnings

import pytest
import torch
from peft import HRAConfig, PeftModel, get_peft_model
from peft_models import ConvNet, Net, config, inputs, relative, twins, unpatched
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import dispatch
from peftkern.integrations.peft.hra import Accelerated

transformers = pytest.importorskip("transformers")

__all__ = ["unpatched"]


def _grads(model, output):
    model.zero_grad(set_to_none=True)
    output.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gs", [False, True], ids=["product", "gs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_has_one_graph_and_the_outputs_and_gradients_of_the_eager_one(dtype, gs):
    torch._dynamo.reset()
    _, fast = twins(dtype=dtype, apply_GS=gs)
    x = inputs(dtype)
    y = fast(x)
    grads = _grads(fast, y)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    for name, grad in _grads(fast, compiled(x)).items():
        assert torch.equal(grad, grads[name]), name


def test_batch_sizes_cost_at_most_one_recompilation_and_count_once_per_trace():
    torch._dynamo.reset()
    _, fast = twins(dtype=torch.float32)
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    peftkern.stats(reset=True)
    compiled(inputs(torch.float32, rows=(2,)))
    assert peftkern.stats()["hra"]["accelerated"] == 2
    for rows in (2, 3, 7, 16):
        compiled(inputs(torch.float32, rows=(rows,)))
    assert len(graphs) <= 2
    assert peftkern.stats()["hra"]["accelerated"] == 2 * len(graphs)


def test_a_compiled_convolution_has_one_graph():
    torch._dynamo.reset()
    _, fast = twins(ConvNet(), target_modules=["conv"], dtype=torch.float32)
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


def test_a_compiled_model_follows_switching_disabling_and_accelerating():
    torch._dynamo.reset()
    plain, fast = twins(second=config(r=3), dtype=torch.float32)
    fast = peftkern.restore(fast) and fast
    compiled, x = torch.compile(fast, fullgraph=True, backend="aot_eager"), inputs(torch.float32)
    compiled(x)
    peftkern.accelerate(fast)
    for step in (
        lambda model: None,
        lambda model: model.set_adapter("other"),
        lambda model: model.base_model.set_adapter(["default", "other"]),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.merge_adapter(),
    ):
        step(plain)
        step(fast)
        assert relative(compiled(x), plain(x)) < 1e-5


class _Checkpointed(torch.nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit(dtype, reentrant):
    _, fast = twins(dtype=dtype, second=config(r=3, apply_GS=True))
    fast.base_model.set_adapter(["default", "other"])
    x = inputs(dtype).requires_grad_(True)
    wrapped = _Checkpointed(fast, reentrant)
    grads, checked = _grads(fast, fast(x)), _grads(fast, wrapped(x))
    assert len(grads) == 4 and all(torch.equal(checked[name], grad) for name, grad in grads.items())


def test_two_runs_are_bitwise_equal():
    _, fast = twins(dtype=torch.bfloat16)
    x = inputs(torch.bfloat16)
    first, second = _grads(fast, fast(x)), _grads(fast, fast(x))
    assert all(torch.equal(second[name], grad) for name, grad in first.items())


def test_stats_count_calls_and_the_reasons_for_leaving_them_to_peft():
    _, fast = twins(second=config(target_modules=["c"]))
    x = inputs()
    peftkern.stats(reset=True)
    fast(x)
    with fast.disable_adapter():
        fast(x)
    fast.merge_adapter()
    fast(x)
    counts = peftkern.stats(reset=True)["hra"]
    # b and a carry "default", c only "other", which is not active.
    assert counts["accelerated"] == 2
    assert counts["reasons"] == {"adapters disabled": 3, "adapters merged": 2, "no active adapter": 2}
    assert counts["to_peft"] == 7
    assert all(counts == {"accelerated": 0, "to_peft": 0, "reasons": {}} for counts in peftkern.stats().values())


def test_a_backend_that_fails_at_its_first_use_is_left_once_and_aloud(monkeypatch):
    plain, fast = twins(dtype=torch.float32)
    operation = dispatch.operations()["rotate"]
    served = operation.explain(torch.zeros(1, 24), torch.zeros(24, 4), torch.zeros(4, 4).double(), False)
    if served[0][0] == "reference" or not served[0][1]:
        pytest.skip(f"only the reference backend is here: {served[0][2]}")
    module = operation.backend(served[0][0])[0]

    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(module, "rotate", broken)
    monkeypatch.setattr(operation, "_serving", {})
    monkeypatch.setattr(operation, "_broken", {})
    x = inputs(torch.float32)
    with pytest.warns(UserWarning, match="failed at its first use .RuntimeError: no such instruction"):
        y = fast(x)
    assert relative(y, plain(x)) < 1e-6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*failed at its first use")
        fast(x)


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )


LLAMA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False}


def _tokens(rows=2):
    return {"input_ids": torch.randint(0, 64, (rows, 7)), "labels": torch.randint(0, 64, (rows, 7))}


def test_a_causal_language_model_has_pefts_loss_gradients_and_generation():
    plain = get_peft_model(_llama().double(), HRAConfig(**LLAMA))
    fast = copy.deepcopy(plain)
    assert len(peftkern.accelerate(fast).replaced) == 14
    batch, losses = _tokens(), []
    for model in (plain, fast):
        model.train()
        losses.append(model(**batch).loss)
        losses[-1].backward()
    assert relative(losses[1], losses[0]) < 1e-13
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if p.requires_grad:
            assert relative(q.grad, p.grad) < 1e-10, name
    texts = [
        model.eval().generate(input_ids=batch["input_ids"], max_new_tokens=8, do_sample=False)
        for model in (plain, fast)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_of_transformers_changes_no_bit(reentrant):
    model = get_peft_model(_llama(), HRAConfig(**LLAMA))
    peftkern.accelerate(model)
    model.train()
    batch, grads = _tokens(), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_trainer_that_builds_its_own_model_trains_it_accelerated_and_peft_reads_the_result(unpatched, tmp_path):
    base = _bert()
    data = [{"input_ids": torch.randint(0, 64, (9,)), "labels": i % 2} for i in range(16)]
    losses, options = [], {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    for patch in (False, True):
        if patch:
            peftkern.patch_peft()
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), HRAConfig(**options))
        assert any(isinstance(m, Accelerated) for m in model.modules()) == patch
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    peftkern.unpatch_peft()
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(isinstance(m, Accelerated) for m in reloaded.modules())
    batch = {"input_ids": torch.randint(0, 64, (3, 9))}
    assert relative(reloaded(**batch).logits, model.eval()(**batch).logits) < 1e-5


def test_an_adapter_added_by_transformers_itself_is_accelerated():
    model = _llama()
    model.add_adapter(HRAConfig(r=2, target_modules=["q_proj"]))
    assert len(peftkern.accelerate(model).replaced) == 2
    assert model(**_tokens()).loss.isfinite()


def test_base_models_shared_by_two_names_are_accelerated_once():
    net = Net().double()
    net.again = net.a
    model = get_peft_model(net, config(target_modules=["a"]))
    assert peftkern.accelerate(model).replaced == ["base_model.model.a"]
