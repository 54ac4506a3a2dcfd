"""Without the command line: Lightning's Trainer and Lightning's own callbacks."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dynamo_lightning.callbacks import GradientStabilityMonitor, VarianceReductionMonitor
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import ScoringConfig
from dynamo_lightning.update.config import UpdateConfig


@pytest.fixture
def parts(tiny_policy, prompt_file, tmp_path, monkeypatch):
    """A module and a data module; the reward is importable in the reward processes."""
    (tmp_path / "starts_with_digit.py").write_text(
        "def f(prompt, response, answer):\n    return response[:1].isdigit()*1.\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    L.seed_everything(0)

    def make(**settings):
        module = PolicyModule(
            tiny_policy,
            sampling=SamplingConfig(max_response_length=6),
            scoring=ScoringConfig(num_workers=1, time_limit=60.0),
            reward=FunctionReward("starts_with_digit.f"),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            **settings,
        )
        source = PromptSource(prompt_file, template="{prompt}")
        data = RolloutDataModule(
            train=source,
            val=[source],
            tokenizer_name=tiny_policy,
            prompts_per_batch=4,
            rollouts_per_prompt=4,
            eval_rollouts_per_prompt=2,
        )
        return module, data

    return make


def make_trainer(tmp_path, callbacks=(), **settings):
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    return L.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        logger=CSVLogger(tmp_path), callbacks=list(callbacks), **settings,
    )  # fmt: skip


def test_lightnings_own_callbacks_work(parts, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val/sums/pass@1", mode="max")
    stopping = EarlyStopping("val/sums/pass@1", mode="max", patience=5)
    monitors = [LearningRateMonitor(), VarianceReductionMonitor(), GradientStabilityMonitor()]
    trainer = make_trainer(tmp_path, [checkpoint, stopping, *monitors])
    warm_up = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)  # noqa: E731
    module, data = parts(lr_scheduler=warm_up)
    trainer.fit(module, data)
    assert checkpoint.best_model_path and checkpoint.best_model_score is not None
    assert trainer.global_step == 6
    assert trainer.callback_metrics["lr-AdamW"] == pytest.approx(1e-2)
    assert "alloc/predicted_variance_ratio" in trainer.callback_metrics


def test_entropy_is_that_of_all_tokens_whoever_takes_it(parts, tmp_path):
    """All of it is computed before several updates, and some of it before a single one."""
    entropy = []
    for num_epochs in (1, 2):
        L.seed_everything(0)
        module, data = parts(loss=PolicyLoss(modulation=None), updates=UpdateConfig(num_epochs=num_epochs))
        module.optimizer = lambda params: torch.optim.SGD(params, lr=0.0)
        trainer = make_trainer(tmp_path)
        trainer.fit(module, data)
        assert 0 < float(trainer.callback_metrics["frac_reward_zero_std"]) < 1
        entropy.append(float(trainer.callback_metrics["entropy"]))
    assert entropy[0] == pytest.approx(entropy[1], rel=1e-5)


def test_early_stopping_stops(parts, tmp_path):
    stopping = EarlyStopping("val/sums/pass@1", mode="max", patience=1, min_delta=2.0)
    trainer = make_trainer(tmp_path, [stopping], max_epochs=20)
    trainer.fit(*parts())
    assert trainer.current_epoch < 5


def test_trainer_flags_that_do_not_apply_name_ours(parts, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.gradient_clip_val=0\.5 .* use model\.gradient_clip_val"):
        make_trainer(tmp_path, gradient_clip_val=0.5).fit(*parts())


def test_what_was_started_is_closed_when_a_run_ends_by_an_exception(parts, tmp_path, monkeypatch):
    class Failing(L.Callback):
        def on_train_batch_end(self, *arguments):
            raise OSError("the log is gone")

    closed = []
    module, data = parts()
    monkeypatch.setattr(module.collector.generator, "close", lambda: closed.append("generator"))
    monkeypatch.setattr(module.collector.scorer, "close", lambda: closed.append("scorer"))
    with pytest.raises(OSError, match="the log is gone"):
        make_trainer(tmp_path, [Failing()]).fit(module, data)
    assert closed == ["scorer", "generator"]


def test_several_updates_per_batch_count_as_optimizer_steps(parts, tmp_path):
    module, data = parts(
        updates=UpdateConfig(num_mini_batches=2, num_epochs=3), loss=PolicyLoss(entropy_coefficient=0.01)
    )
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert trainer.global_step == 3 * 2 * 3
    assert float(trainer.callback_metrics["clip_ratio/region_mean"]) > 0


def test_a_kl_term_keeps_the_policy_near_its_start(parts, tmp_path):
    divergence = {}
    for coefficient in (1e-6, 10.0):
        module, data = parts(loss=PolicyLoss(kl_coefficient=coefficient))
        trainer = make_trainer(tmp_path, max_epochs=4)
        trainer.fit(module, data)
        divergence[coefficient] = float(trainer.callback_metrics["kl"])
        assert not any(name.startswith("_reference") for name in module.state_dict())
    assert divergence[10.0] < 0.5 * divergence[1e-6]


def test_an_iteration_that_teaches_nothing_moves_nothing(parts, tmp_path, monkeypatch):
    (tmp_path / "starts_with_digit.py").write_text("def f(prompt, response, answer):\n    return 1.0\n")
    module, data = parts()
    module.configure_model()
    before = [parameter.detach().clone() for parameter in module.policy.parameters()]
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert trainer.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    assert data.state_dict()["stream"]["iteration"] == 3
    assert "grad_norm" not in trainer.callback_metrics


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_trains(parts, tmp_path, precision):
    module, data = parts()
    trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
    trainer.fit(module, data)
    assert trainer.global_step == 3
    assert all(torch.isfinite(parameter).all() for parameter in module.policy.parameters())
