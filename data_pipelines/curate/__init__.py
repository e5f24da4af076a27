"""From a folder of raw videos to captioned, bucketed, deduplicated clips: `python -m` this package.

Read `stage` first (what a stage is), then `config` (which there are, in order) and `run` (how their
work is cut up, committed and taken up again).
"""
