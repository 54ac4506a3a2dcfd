"""The check before a run: one module per check, all on a few prompts and without any file left behind."""
