"""Measurements that somebody runs by hand, each with a --help; see README.md beside this file."""
