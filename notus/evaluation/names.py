"""What others may be told of a model or a dataset: the hub's name of it, or a local one without the way to it."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from notus.data.sources import SUFFIXES
from notus.evaluation.models import is_run
from notus.training.run_folder import MODEL


def hub_id(name: str) -> str | None:
    """A model's or dataset's name, if it is one of the hub and no file or folder here; else None."""
    if Path(name).expanduser().exists() or name.endswith(SUFFIXES):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str) -> str:
    """A name without the way to it: the hub id, or a local folder's or file's last part; a run's model by its run."""
    if hub_id(name):
        return name
    path = Path(name).expanduser()
    return path.parent.name if path.name == MODEL and is_run(path.parent) else path.name
