"""The other ways to tune, beside prompts: a module each."""
