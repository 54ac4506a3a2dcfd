"""From rollouts with advantages to a better policy: their log-probabilities, then the optimizer steps."""
