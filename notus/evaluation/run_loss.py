"""The preference loss of a run, from its saved settings: what it learned from, and what its rewards are."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from notus.losses import Loss, Rows, loss_components

DPO_PAPER = "2305.18290"
_ARXIV = re.compile(r"\d{4}\.\d{5}")
ROW_NAMES: dict[str, str] = {"pairs": "pairs", "lists": "lists", "labels": "labelled completions"}


@dataclasses.dataclass(frozen=True)
class RunLoss:
    """What a run minimised.

    Attributes:
        components: the losses of the sum, with their weights; of one loss alone, its weight is 1.
        dpo: the run's section `dpo`. A run of an earlier version lacks some keys.
    """

    components: Mapping[Loss, float]
    dpo: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The loss in words: its name, or the sum as "0.8 sigmoid + 0.2 bco_pair"."""
        if self.is_sum:
            return " + ".join(f"{weight:g} {loss.name}" for loss, weight in self.components.items())
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """The names of its losses."""
        return [loss.name for loss in self.components]

    @property
    def is_sum(self) -> bool:
        """Whether it is a weighted sum, even of one loss."""
        return not isinstance(self.dpo.get("loss_type", "sigmoid"), str)

    @property
    def beta(self) -> float:
        """β of the run."""
        return float(self.dpo["beta"])

    @property
    def rows(self) -> Rows:
        """Which rows of data it learned from."""
        return next(iter(self.components)).rows

    @property
    def unit(self) -> str:
        """What a row is called, in the plural."""
        return ROW_NAMES[self.rows]

    @property
    def reference(self) -> bool:
        """Whether any of its losses compares with a reference, so that rewards are β·(policy - reference)."""
        return any(loss.reference for loss in self.components)

    @property
    def per_token(self) -> bool:
        """Whether it has no reference, and its rewards are β times the log-prob per token: those of its first loss."""
        return not self.reference and next(iter(self.components)).per_token

    @property
    def options(self) -> dict[str, float | str]:
        """The options of its losses by name: those that are set, and the others' defaults where these do something."""
        given = dict(self.dpo.get("options") or {})
        if self.dpo.get("label_smoothing"):
            given["label_smoothing"] = self.dpo["label_smoothing"]
        known = {option.name: option for loss in self.components for option in loss.options}
        defaults = {
            name: option.default
            for name, option in known.items()
            if option.default and not option.choices and option.only_with is None
        }
        return {**defaults, **given}

    @property
    def additions(self) -> dict[str, str]:
        """What the run's settings add to the losses: "NLL weight", "LD-DPO α" and "WPO"; nothing for what is off."""
        dpo, found = self.dpo, {}
        if dpo.get("nll_weight"):
            mean = f", mean over {dpo['nll_mean']}" if "nll_mean" in dpo else ""
            found["NLL weight"] = f"{dpo['nll_weight']:g}{mean}"
        if dpo.get("ld_alpha") is not None:
            found["LD-DPO α"] = f"{dpo['ld_alpha']:g}"
        if dpo.get("wpo"):
            found["WPO"] = "on"
        return found

    @property
    def papers(self) -> list[str]:
        """The arXiv ids of what it was published in: DPO, if it has a reference, its losses, and what is added."""
        dpo, found = self.dpo, [DPO_PAPER] if self.reference else []
        found += [paper for loss in self.components for paper in _ARXIV.findall(loss.source)]
        if self.options.get("f_divergence", "reverse_kl") != "reverse_kl":
            found.append("2309.16240")
        if dpo.get("nll_weight") and dpo.get("nll_mean") == "completions":
            found.append("2404.19733")
        found += ["2409.06411"] * (dpo.get("ld_alpha") is not None) + ["2406.11827"] * bool(dpo.get("wpo"))
        return list(dict.fromkeys(found))


def read_loss(settings: Mapping[str, Mapping[str, Any]], source: str) -> RunLoss | None:
    """Return the preference loss of a run's settings; None for a run of SFT, and for what is no run.

    Raises ValueError, naming `source`, for a loss that this version does not have.
    """
    if "dpo" not in settings:
        return None
    dpo = settings["dpo"]
    try:
        return RunLoss(loss_components(dpo.get("loss_type", "sigmoid")), dpo)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
