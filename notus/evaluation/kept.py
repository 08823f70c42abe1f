"""Moved to `results` and `generation`; removed once all importers are changed."""

from notus.evaluation.generation import KeptTokens as KeptTokens
from notus.evaluation.results import append_records as keep
from notus.evaluation.results import read_records as read_kept

__all__ = ["KeptTokens", "keep", "read_kept"]
