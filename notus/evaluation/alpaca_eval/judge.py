"""The `alpaca_eval` package as the judge: it gets outputs, and writes its annotations where it is told."""

import difflib
import hashlib
import importlib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from notus.runtime.process import first_line

REMEDY = "pip install alpaca-eval 'setuptools<81'"
ANNOTATIONS = "annotations.json"
CHUNK = 32  # pairs between two saves of what has been judged


def find_judge(name: str) -> str:
    """An annotator's config of the package by its name, or a folder with configs.yaml, as the package takes it.

    Raises ValueError if the package is not installed, or has no such config.
    """
    package = _package()
    if (Path(name) / "configs.yaml").is_file():
        return str(Path(name).resolve())
    known = sorted(path.parent.name for path in package.constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml"))
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or give the folder of one"
    raise ValueError(f"--judge {name}: alpaca_eval has no such annotator's config; {hint}")


def judge_outputs(config: str, outputs: list[dict[str, Any]], baseline: list[dict[str, Any]], folder: Path) -> Path:
    """Have the package compare `outputs` with `baseline`; returns its annotations file in `folder`.

    Verdicts are kept in `folder`, chunk by chunk: after a failure the same call goes on, and asks again for those
    that were none.

    Args:
        config: as `find_judge` gives it.
        outputs: the model's: {instruction, output, generator, dataset}.
        baseline: the same for the baseline, in the same order.
        folder: for all files of the package.

    Raises:
        ValueError: the judge failed; says what it said.
    """
    package = _package()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _, annotations = package.evaluate(
            outputs,
            baseline,
            annotators_config=config,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            is_cache_leaderboard=False,
            fn_metric="get_winrate",
            sort_by="win_rate",
            annotation_kwargs={"chunksize": CHUNK},
            Annotator=_annotator(package),
            caching_path=folder / f"judged-{_digest(package, config)}.json",
        )
    except Exception as error:  # whatever a judge and its client raise
        raise ValueError(
            f"the judge {config} failed ({type(error).__name__}: {first_line(error)}); outputs and verdicts so far "
            f"are kept: mend the cause and run the same command again"
        ) from error
    frame = package.utils.convert_to_dataframe(annotations)
    frame.to_json(folder / ANNOTATIONS, orient="records", indent=2)
    return folder / ANNOTATIONS


def length_controlled(annotations: Path) -> dict[str, float]:
    """The package's length-controlled win rate and its standard error, in percent, for the hub's instructions in order.

    Raises ValueError if the package cannot compute it; its data come from the hub.
    """
    try:
        metrics = importlib.import_module("alpaca_eval.metrics").get_length_controlled_winrate(
            json.loads(annotations.read_text(encoding="utf-8")), save_weights_dir=annotations.parent / "weights"
        )
    except Exception as error:  # the hub's client, or the fit
        raise ValueError(f"no length-controlled win rate ({type(error).__name__}: {first_line(error)})") from error
    return {"win_rate": float(metrics["length_controlled_winrate"]), "stderr": float(metrics["lc_standard_error"])}


def _annotator(package: ModuleType) -> type:
    """The package's annotator, whose kept verdicts outlive a kill, and which asks again for those that it did not get.

    With pandas 3 the package cannot put a tie into verdicts that were read back as integers.
    """
    base: Any = package.annotators.PairwiseAnnotator

    class Annotator(base):
        df_annotations: Any

        def save(self, path: Path | None = None) -> None:
            path = path or self.caching_path
            super().save(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

        def load_(self, path: Path | None = None) -> None:
            super().load_(path)
            if self.df_annotations is not None:
                kept = self.df_annotations.astype({self.annotation_key: float})
                self.df_annotations = kept[kept[self.annotation_key] != self.TMP_MISSING_ANNOTATION]

    return Annotator


def _digest(package: ModuleType, config: str) -> str:
    """Of an annotator's config and prompts: verdicts under others are not this judge's."""
    files = sorted((package.constants.EVALUATORS_CONFIG_DIR / config).glob("*.*"))
    texts = b"".join(path.read_bytes() for path in files if path.suffix in (".yaml", ".txt"))
    return hashlib.sha256(texts).hexdigest()[:8]


def _package() -> ModuleType:
    level = logging.getLogger().level
    try:
        importlib.import_module("alpaca_eval.main")  # a folder of the name alpaca_eval has no such module
        return importlib.import_module("alpaca_eval")
    except ImportError as error:
        raise ValueError(f"a judge needs the package alpaca_eval ({first_line(error)}): {REMEDY}") from error
    finally:
        logging.getLogger().setLevel(level)  # the package has everybody talk
