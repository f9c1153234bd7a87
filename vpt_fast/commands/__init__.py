"""The vpt-fast command."""
