"""Rotary positions: queries and keys turned by angles that depend on where a patch stands."""
