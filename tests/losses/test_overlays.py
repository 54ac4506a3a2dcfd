"""Each baseline's overlay sets what its header says, whatever the config beneath has chosen."""

import pytest

from dynamo_lightning.cli import DynamoCLI, main

LOSSES = "dynamo_lightning.losses"


@pytest.fixture
def loss_of(monkeypatch, tmp_path):
    """The configuration of a run on Qwen with GRPO and then the overlay."""

    def parse(overlay, base="grpo"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
        monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
        overlays = [f"--config=overlays/{name}.yaml" for name in (base, overlay) if name]
        return main(["fit", "--config=qwen.yaml", *overlays]).config["fit"]

    return parse


@pytest.mark.parametrize(
    ("overlay", "part", "class_name", "options"),
    [
        ("clip_higher", "surrogate", "surrogate.ClippedSurrogate", {"clip_low": 0.2, "clip_high": 0.28}),
        ("dual_clip", "surrogate", "surrogate.ClippedSurrogate", {"clip_high": 0.2, "dual_clip": 3.0}),
        ("fork_tokens", "modulation", "fork_tokens.ForkTokens", {"fork_share": 0.2}),
        ("entropy_advantages", "modulation", "entropy_advantages.EntropyAdvantages", {"alpha": 0.4, "kappa": 2.0}),
        (
            "clip_cov", "modulation", "covariance.ClipCov",
            {"clipped_share": 2e-4, "covariance_low": 1.0, "covariance_high": 5.0},
        ),
        ("clip_cov", "surrogate", "surrogate.ClippedSurrogate", {"clip_low": 1.0, "clip_high": 1.0}),
        ("kl_cov", "penalty", "covariance.KLCov", {"penalised_share": 2e-3, "coefficient": 1.0}),
        ("kl_cov", "surrogate", "surrogate.UnclippedSurrogate", {}),
        ("w_reinforce", "advantage", "advantages.WReinforce", {"positive_weight": 0.1}),
        ("entropy_budget", "modulation", "entropy_budget.EntropyBudget", {"budget": 0.001, "probe_every": 4}),
        ("steer", "modulation", "steer.Steer", {"min_weight": 0.8, "exponent": 2}),
        ("gspo", "surrogate", "gspo.GSPO", {"sequence_clip_low": 3e-4, "sequence_clip_high": 4e-4}),
        ("cispo", "surrogate", "cispo.CISPO", {"max_ratio": 5.0, "min_ratio": 0.0}),
        ("dr_grpo", "advantage", "advantages.DrGRPO", {}),
        ("dapo", "surrogate", "surrogate.ClippedSurrogate", {"clip_low": 0.2, "clip_high": 0.28}),
    ],
)  # fmt: skip
def test_overlay_over_grpo(loss_of, overlay, part, class_name, options):
    loss = loss_of(overlay).model.loss
    assert loss[part].class_path == f"{LOSSES}.{class_name}"
    given = vars(loss[part].get("init_args") or {}) if options else {}
    assert {name: given[name] for name in options} == options
    if part != "modulation" and overlay != "clip_cov":
        assert loss.modulation is None  # GRPO's


def test_the_optimal_baseline_comes_with_its_rule_and_groups_of_one(loss_of):
    config = loss_of("optimal_baseline", base="")
    assert config.model.loss.advantage.class_path == f"{LOSSES}.optimal_baseline.OptimalBaseline"
    assert config.model.loss.advantage.init_args.half_life == 100
    assert config.data.rule.init_args.baseline == "history" and config.data.min_rollouts == 1


def test_entropy_loss_has_its_coefficient(loss_of):
    assert loss_of("entropy_loss").model.loss.entropy_coefficient == 0.001


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("dapo", ("token_mean", "max_response_length")),
        ("w_reinforce", ("token_mean", "max_response_length")),
        ("fork_tokens", ("token_mean", "max_response_length")),
        ("cispo", ("token_mean", "max_response_length")),
        ("gspo", ("sequence_mean", "response_length")),
        ("dr_grpo", ("sequence_mean", "max_response_length")),
        ("paper_code", ("token_mean", "max_response_length")),
    ],
)
def test_who_shares_the_denominator(loss_of, overlay, expected):
    loss = loss_of(overlay).model.loss
    assert (loss.aggregation, loss.length_normalisation) == expected


def test_dapo_shapes_the_reward_of_the_answer(loss_of):
    reward = loss_of("dapo").model.reward
    assert reward.class_path == "dynamo_lightning.rewards.shaping.OverlongShaping"
    assert reward.init_args.reward.class_path.endswith("MathReward")
    assert reward.init_args.weight == 0.5  # DAPO's rewards are ±1


def test_paper_code_has_the_settings_of_the_authors_script(loss_of):
    config = loss_of("paper_code", base=None)
    modulation = config.model.loss.modulation.init_args
    assert (modulation.compensation_alpha, modulation.stabilisation_alpha) == (0.2, 0.4)
    assert (modulation.gamma, modulation.tau) == (50, 0.99)
    assert (modulation.normaliser, modulation.scope) == ("max", "micro_batch")
    surrogate = config.model.loss.surrogate.init_args
    assert (surrogate.clip_low, surrogate.clip_high, surrogate.dual_clip) == (0.2, 0.28, 10.0)
    assert config.data.rule.class_path.endswith("ProportionalRule")
    assert config.data.estimator.class_path.endswith("PaperBernoulli")
    assert (config.data.min_rollouts, config.data.rollouts_per_prompt, config.data.max_rollouts) == (8, 16, 24)


def test_only_the_class_changed_on_the_command_line_gets_its_own_bounds(monkeypatch, tmp_path):
    """Options of the same name would be carried over from the clip: GSPO's have names of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main(["fit", "--config=quickstart.yaml", f"--model.loss.surrogate={LOSSES}.gspo.GSPO"])
    assert (cli.model.loss.surrogate.clip_low, cli.model.loss.surrogate.clip_high) == (3e-4, 4e-4)
