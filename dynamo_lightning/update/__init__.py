"""From rollouts with advantages to a better policy: the scoring pass, then the optimizer steps."""
