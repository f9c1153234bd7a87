"""Many runs: searches of settings, the paper's ablations and its tables."""
