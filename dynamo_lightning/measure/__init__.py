"""What is measured of the policy gradient while it trains: its variance, from scores of rollouts."""
