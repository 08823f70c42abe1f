"""Moved to `notus.evaluation.models`; removed once all importers are changed."""

from notus.evaluation.models import DEFAULT_SHARD as DEFAULT_SHARD
from notus.evaluation.models import learned_chat as learned_chat
from notus.evaluation.models import load_unfinished as load_unfinished
from notus.evaluation.models import write_model as write_model
