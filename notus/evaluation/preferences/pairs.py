"""The pairs that a model is measured on: those the user names, or those that its run held out from training."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from notus.evaluation.models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from notus.data.dataset import Rows


def name_of(given: str | None, model: ModelSource) -> str:
    """What the figures call the pairs.

    Raises:
        ValueError: none are given, and the model is no run with held-out pairs.
    """
    if given is not None:
        return given
    data = model.settings.get("data", {})
    if "dpo" not in model.settings or not (data.get("eval") or data.get("eval_size")):
        raise ValueError(f"{model.name}: no DPO run that held pairs out: name held-out pairs with --pairs")
    if data.get("eval"):
        return ", ".join(source["path"] for source in data["eval"])  # a resolved config has a list
    return f"{data['eval_size']} rows held out of data.train"


def load(
    given: str | None,
    split: str | None,
    model: ModelSource,
    tokenizer: "PreTrainedTokenizerBase",
    options: Mapping[str, Any],
) -> "Rows":
    """Read and tokenise the pairs; within a process group, rank 0 first.

    Raises ValueError as `load_pairs` does, or if what the run held out is not there any more.
    """
    from notus.data.dataset import Rows
    from notus.data.tokenize import load_pairs, split_holdout
    from notus.runtime.distributed import main_first, on_main, say

    name = name_of(given, model)
    if given is not None:
        source: Any = [{"path": given, "split": split or "train"}]
        dataset, report = main_first(lambda: load_pairs(source, tokenizer, **options))
    else:
        data, seed = model.settings["data"], model.settings["training"]["seed"]
        source = data.get("eval") or data["train"]
        cached = {key: data[key] for key in ("num_workers", "cache_dir")}
        dataset, report = main_first(lambda: load_pairs(source, tokenizer, seed=seed, **options, **cached))
        if not data.get("eval"):
            dataset = split_holdout(dataset, data["eval_size"], seed)[1]
    rows = Rows(dataset)
    if given is None:
        on_main(lambda: _check_held_out(rows, model))
    say(f"{name} {report}")
    return rows


def _check_held_out(rows: "Rows", model: ModelSource) -> None:
    """From data that changed since, others would be held out, which the model may have learned from."""
    from notus.training.checkpoint import checkpoints_in, read_identity
    from notus.training.reference import digest_of_rows
    from notus.training.run_folder import CHECKPOINTS

    assert model.run is not None
    known = [read_identity(path).get("data.eval") for path in checkpoints_in(model.run / CHECKPOINTS)]
    if any(known) and digest_of_rows(rows.digests()) not in known:
        raise ValueError(
            f"{model.name}: the pairs that it held out are no longer what they were: its data, or how they become "
            "tokens, changed since; restore them, or name held-out pairs with --pairs"
        )
