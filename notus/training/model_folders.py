"""Which folders a run's starting model comes from: a base, and perhaps an adapter of it.

`model.name_or_path` may name a model, an adapter, or another run; `model.adapter` an adapter, or a run that trained
one.
"""

import dataclasses
import hashlib
from pathlib import Path

from notus.model.load import find_folder, resolve_model_folder, weights_digest
from notus.model.peft_format import ADAPTER_CONFIG, adapter_digest, read_adapter_settings
from notus.training.run_folder import CONFIG_FILE, MODEL

_TOKENIZER = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """Names of a base and an adapter: a local folder, or a hub id; `adapter` is None if there is none."""

    base: str
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelFolders:
    """The folders on this machine of what a run starts from.

    Attributes:
        base: a model in Hugging Face layout.
        adapter: a PEFT adapter folder, or None.
        name: the base's name, as the user or the adapter's config gives it.
    """

    base: Path
    adapter: Path | None = None
    name: str = ""

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is: with the adapter, if that brings one, since it has what the adapter learned with."""
        brings = self.adapter is not None and (self.adapter / _TOKENIZER).is_file()
        return self.adapter if brings and self.adapter is not None else self.base


def local_names(name_or_path: str, adapter: str | None = None, *, key: str = "model.name_or_path") -> ModelNames:
    """Look through runs and adapters that are folders on this machine; a hub id is taken for a model. No network.

    Args:
        name_or_path: a model, an adapter or a run, as in `model.name_or_path`.
        adapter: an adapter or a run that trained one, as in `model.adapter`.
        key: of the config, which has `name_or_path`; for messages.

    Raises:
        ValueError: a run has not finished; both name an adapter; `adapter` is none.
    """
    if adapter is not None:
        own = _of_run(Path(adapter).expanduser(), "model.adapter")
        if own is not None and own.is_dir() and not (own / ADAPTER_CONFIG).is_file():
            kind = "a whole model: name it as model.name_or_path" if (own / "config.json").is_file() else "no adapter"
            raise ValueError(f"model.adapter={adapter}: no {ADAPTER_CONFIG} in {own}, which holds {kind}")
        adapter = str(own) if own is not None else adapter
    folder = _of_run(Path(name_or_path).expanduser(), key)
    if folder is None or not _is_adapter(folder):
        return ModelNames(name_or_path if folder is None else str(folder), adapter)
    if adapter is not None:
        raise ValueError(
            f"{key}={name_or_path} is an adapter already, beside model.adapter={adapter}: merge it with "
            "`notus export --merge`, and name the merged model, or remove model.adapter"
        )
    return ModelNames(_base_of(folder), str(folder))


def resolve_model(name_or_path: str, adapter: str | None = None, *, key: str = "model.name_or_path") -> ModelFolders:
    """Find the folders of a starting model; what is on the hub is downloaded if it is not cached.

    Arguments and errors as in `local_names`; also ValueError where there is no such folder or hub id.
    """
    names = local_names(name_or_path, adapter, key=key)
    found = find_folder(names.base)
    if _is_adapter(found) and names.adapter is None:  # an adapter on the hub
        names = ModelNames(_base_of(found), str(found))
    base = resolve_model_folder(names.base)
    if names.adapter is None:
        return ModelFolders(base, None, names.base)
    try:
        held = find_folder(names.adapter)
    except ValueError as error:
        raise ValueError(f"model.adapter={error}") from error
    if not _is_adapter(held):
        raise ValueError(f"model.adapter={names.adapter}: no {ADAPTER_CONFIG} there; name the folder of an adapter")
    return ModelFolders(base, held, names.base)


def _of_run(folder: Path, key: str) -> Path | None:
    """A local folder, or a run's model in place of the run; None for what is no folder here."""
    if not folder.is_dir():
        return None
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file() or _is_adapter(folder):
        return folder
    model = folder / MODEL
    if not _is_adapter(model) and not (model / "config.json").is_file():
        raise ValueError(
            f"{key}={folder}: this run has not finished; finish it, or write its newest checkpoint with `notus export` "
            "and name that"
        )
    return model


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _base_of(folder: Path) -> str:
    return str(read_adapter_settings(folder)["base_model_name_or_path"])


def starting_digest(folders: ModelFolders, *, continues: bool = False, new_rows: int = 0) -> str:
    """sha256 (hex) of all that the starting weights follow from; the same wherever the folders lie.

    Of a model alone, it is `weights_digest`.

    Args:
        folders: base and adapter.
        continues: the adapter is trained further, and so not merged, which rounds otherwise.
        new_rows: rows of the vocabulary beyond the base's.
    """
    digest = weights_digest(folders.base)
    if folders.adapter is None and not new_rows:
        return digest
    held = "" if folders.adapter is None else adapter_digest(folders.adapter)
    return hashlib.sha256(f"{digest}:{held}:{continues}:{new_rows}".encode()).hexdigest()
