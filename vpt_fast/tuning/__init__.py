"""Tuning methods other than prompts, mostly one per module."""
