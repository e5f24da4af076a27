"""Generative processes: pure functions on arrays, with the symbols of the papers."""
