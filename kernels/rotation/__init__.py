"""Rotary positions: queries and keys rotated by angles that depend on a patch's position."""
