"""Weights of others in our layout and back: one file for each family, functions of flat dicts.

A flat dict maps the names of the other code base to arrays. Not here: files (see `files`), and
models.
"""
