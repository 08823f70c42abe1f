"""Moved to `notus.evaluation.models`; removed once all importers are changed."""

from notus.evaluation.models import hub_id as hub_id
from notus.evaluation.models import public_name as public_name
