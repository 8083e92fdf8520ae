"""The demo's training loop on a tiny random model."""

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from demo import checks, models, train  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402


class Tiny(models.Sentiment):
    """The demo's classification task with a random encoder and random batches."""

    lr = 5e-3

    def __init__(self):
        pass

    def load(self, dtype):
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return models.SentenceClassifier(BertModel(config, add_pooling_layer=False).to(dtype))

    def batches(self, steps, seed):
        rng = torch.Generator().manual_seed(seed)
        return [self.batch_of(torch.randint(1, 50, (6, 9), generator=rng)) for _ in range(steps)]

    @staticmethod
    def batch_of(ids):
        mask = torch.ones_like(ids)
        mask[::2, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 0] > 25).long()}


TASK = Tiny()


def model(dtype=torch.float32, seed=0):
    return models.adapted(TASK, "hra", 4, dtype, seed)


def test_adapters_sit_on_every_linear_layer_of_the_encoder_and_the_classifier_trains():
    adapted = model()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    linears = [n for n, m in TASK.load(torch.float32).encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 12
    assert trained == {f"base_model.model.encoder.{name}.hra_u.default" for name in linears} | {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapters_and_classifier_are_at_least_float32(dtype):
    adapted = model(dtype)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.promote_types(dtype, torch.float32)}


def test_one_seed_gives_one_curve():
    curves = [train.train(TASK, model(seed=seed), TASK.batches(5, 0)).losses for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_training_lowers_the_loss():
    batch = TASK.batches(1, 0) * 60
    losses = train.train(TASK, model(), batch).losses
    assert losses[-1] < 0.5 * losses[0]


def test_every_step_is_reported():
    seen = []
    curve = train.train(TASK, model(), TASK.batches(4, 0), lambda *step: seen.append(step))
    assert seen == list(zip(range(4), curve.losses, curve.seconds, strict=True))


def test_the_schedule_warms_up_and_ends_near_zero():
    factors = [train.schedule(step, 100) for step in range(100)]
    assert factors[0] == 0.1 and max(factors) == factors[9] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.02
    assert train.schedule(0, 1) == 1.0


def test_accelerated_training_follows_peft_in_float64():
    import peftkern

    batches = TASK.batches(12, 0)
    plain = train.train(TASK, model(torch.float64), batches).losses
    accelerated = model(torch.float64)
    assert len(peftkern.accelerate(accelerated).replaced) == 12
    assert max(checks.gaps(plain, train.train(TASK, accelerated, batches).losses)) < 1e-9


def test_a_saved_adapter_scores_the_same_when_loaded(tmp_path):
    trained = model()
    train.train(TASK, trained, TASK.batches(5, 0))
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(TASK.load(torch.float32), tmp_path)
    held_out = TASK.batches(3, 7)
    with torch.no_grad():
        for batch in held_out:
            torch.testing.assert_close(TASK.loss(loaded.eval(), batch), TASK.loss(trained.eval(), batch))
    assert train.score(TASK, loaded, held_out) == train.score(TASK, trained, held_out)


def test_the_score_counts_right_answers():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, attention_mask):
            return torch.stack([self.zero.expand(len(input_ids)), self.zero + 1 - 2.0 * (input_ids[:, 0] < 9)], 1)

    ids = torch.tensor([[3], [9], [12], [5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 0])}
    assert train.score(TASK, Fixed(), [batch, batch]) == checks.Score(total=8, correct=6)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    class Task:
        @staticmethod
        def loss(model, batch):
            hidden = model(batch["x"])  # saves x [5, 3] and the weight
            return (hidden.exp() * hidden[1:].sum()).sum()  # saves exp(hidden) [5, 4] and the sum

    x = torch.randn(5, 3)
    assert train.saved_bytes(Task, torch.nn.Linear(3, 4), {"x": x}) == 4 * (15 + 20 + 1)


def test_alternating_returns_a_median_for_each_model():
    times = train.alternate(TASK, [model(), model()], TASK.batches(3, 0))
    assert len(times) == 2 and all(seconds > 0 for seconds in times)
