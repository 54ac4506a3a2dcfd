"""One of two processes that sample a batch together; prints this process's scores, or the error that ended it."""

import sys


def main(rank, store):
    # Imported here: the reward workers import this file again, and need none of it.
    import team_rewards as team
    import torch.distributed as dist
    from text_engine import Characters, NoPolicy, TextEngine

    from dynamo_lightning.engines.engine import SamplingConfig
    from dynamo_lightning.environments import SingleTurn
    from dynamo_lightning.errors import RunError
    from dynamo_lightning.rewards import GroupFunctionReward
    from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
    from dynamo_lightning.rollout.collect import RolloutCollector
    from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    prompts = tuple(Prompt(i, "q", "q", (1,), "5", "sums") for i in range(3))
    batch = PromptBatch(0, [GroupPlan(prompt, size) for prompt, size in zip(prompts, (3, 1, 2), strict=True)])
    # Only one of the two processes hangs: the other one must not wait for it.
    for reward in (GroupFunctionReward("team_rewards.rank_by_length"), team.hang if rank == 0 else team.length):
        with RewardScorer(reward, ScoringConfig(num_workers=1, time_limit=0.5)) as scorer:
            engine = TextEngine(lambda request: "a" * (request.sample_index + 1), batch)
            collector = RolloutCollector(engine, SingleTurn(), scorer, SamplingConfig(), (4, 1))
            rollouts, _ = collector.sample(NoPolicy(), Characters(), batch, "train", temperature=1.0)
            try:
                outcomes = collector.score(batch, rollouts)
                print([(outcome.key, outcome.score.reward) for outcome in outcomes], flush=True)
            except RunError as error:
                print(" ".join(str(error).split()), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
