"""From data sets to batches of prompts."""
