"""Moved to `notus.evaluation.generate`; removed once all importers are changed."""

from notus.evaluation.generate import Answers as Answers
from notus.evaluation.generate import add_answer_arguments as add_answer_arguments
from notus.evaluation.generate import answer as answer
from notus.evaluation.generate import answer_settings as answer_settings
