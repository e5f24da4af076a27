"""The report of a run: report.html that opens offline, and report.json beside it."""

from data_pipelines.curate.report.page import write

__all__ = ["write"]
