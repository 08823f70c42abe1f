"""How long a run's examples are: as tokenised, or drawn from statistics."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # it needs `datasets`, which a machine that checks a GPU may lack
    from notus.data.dataset import Rows

# UltraFeedback through Zephyr's template: means of trunk, chosen and rejected; the spread of their logarithms is an
# assumption. SFT sees the trunk and the chosen branch.
TYPICAL = (176.0, 300.0, 280.0)
SPREAD = 0.8
SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Examples of a data set, or a sample of them.

    Attributes:
        trunks: int64 [n], tokens.
        branches: int64 [n, K], tokens, all of them scored.
        source: where they come from, to be told.
    """

    trunks: np.ndarray
    branches: np.ndarray
    source: str

    @property
    def totals(self) -> np.ndarray:
        """int64 [n], tokens of each example, the trunk once."""
        return self.trunks + self.branches.sum(axis=1)

    @property
    def key_ratio(self) -> float:
        """Keys that attention gathers, over tokens."""
        return float((self.branches.shape[1] * self.trunks + self.branches.sum(axis=1)).sum() / self.totals.sum())


def parse_means(text: str, branches: int) -> tuple[float, ...]:
    """ "176,300,280": means of trunk and branches. Raises ValueError for anything else."""
    try:
        means = tuple(float(part) for part in text.split(","))
    except ValueError:
        means = ()
    if len(means) != branches + 1 or not all(0 < mean < 1e6 for mean in means):
        raise ValueError(
            f"--lengths {text}: give {branches + 1} mean numbers of tokens, of the trunk and of each branch, as in "
            f"{','.join(f'{mean:g}' for mean in TYPICAL[: branches + 1])}"
        )
    return means


def draw(means: tuple[float, ...], *, max_length: int, max_prompt_length: int, seed: int = 0) -> Lengths:
    """Log-normal lengths, cut as the data would be, of these means after the cut: the trunk's, then each branch's."""
    normal = np.random.default_rng(seed).standard_normal((SAMPLE, len(means)))
    scale = np.asarray(means)
    for _ in range(8):  # cutting shortens: start from longer ones
        drawn = np.exp(np.log(scale) + SPREAD * normal).round().astype(np.int64).clip(1)
        trunks = drawn[:, 0].clip(max=max_prompt_length)
        branches = np.minimum(drawn[:, 1:], max_length - trunks[:, None])
        scale = scale * means / np.array([trunks.mean(), *branches.mean(axis=0)])
    told = ", ".join(f"{mean:.0f}" for mean in (trunks.mean(), *branches.mean(axis=0)))
    return Lengths(
        trunks,
        branches,
        f"drawn: log-normal, mean tokens {told} (trunk, branches), spread {SPREAD}, cut at {max_length}",
    )


def tokenised(rows: "Rows") -> Lengths:
    """The true lengths."""
    return Lengths(rows.trunk_lengths, rows.branch_lengths, f"{len(rows)} examples of the data, tokenised")
