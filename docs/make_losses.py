"""Write the tables of docs/losses.md from notus/losses.py, and its figure: `python docs/make_losses.py`.

The tables stand between markers `<!-- NAME -->` and `<!-- end of NAME -->`. A loss without an entry in `WORDS` is an
error. `--figure` also draws docs/losses.svg, which needs matplotlib (requirements-bench.txt).
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from notus.losses import LOSSES, Loss, Option

PAGE = Path(__file__).with_name("losses.md")

WORDS = {
    "sigmoid": (
        "−(1−ε) log σ(m) − ε log σ(−m)",
        "you have no reason for another. It is DPO, as in Notus 7B v1. ε > 0 is for noisy labels (conservative DPO)",
        "`sigmoid`, without ε",
    ),
    "robust": (
        "(−(1−ε) log σ(m) + ε log σ(−m)) / (1−2ε)",
        "you know that a share ε of the labels is swapped",
        "`robust`",
    ),
    "hinge": ("max(0, 1 − m)", "pairs that are already told apart should stop contributing", "`hinge`"),
    "ipo": (
        "(c/n_c − r/n_r − 1/(2β))²",
        "the margin of pairs that are always won must not grow without limit. This is IPO as it is commonly used",
        "`ipo`",
    ),
    "ipo_sum": ("(c − r − 1/(2β))²", "as for `ipo`, but as the paper writes it: longer completions move further", "–"),
    "sigmoid_norm": (
        "−log σ(β(c/n_c − r/n_r))",
        "lengths differ much and length must not be rewarded. β is larger here: 2 to 10",
        "`sigmoid_norm`",
    ),
    "exo_pair": ("KL((σ(m), σ(−m)) ‖ (1−ε, ε))", "you want the reverse KL. Needs ε > 0", "`exo_pair`"),
    "nca_pair": (
        "−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)",
        "the likelihood of the chosen answers must not fall",
        "`nca_pair`",
    ),
    "bco_pair": ("−log σ(βc) − log σ(−βr)", "your pairs are made of separate thumbs up and down", "`bco_pair`"),
    "sppo_hard": (
        "(c − 1/(2β))² + (r + 1/(2β))²",
        "you train in rounds of self-play. Each side has a target",
        "`sppo_hard`",
    ),
    "apo_zero": ("1 − σ(βc) + σ(βr)", "the chosen answers are better than the model's own", "`apo_zero`"),
    "apo_down": ("σ(βc) + 1 − σ(m)", "the model is better than both answers", "`apo_down`"),
    "discopop": (
        "(1−g)(−log σ(m)) + g e^(−m), g = σ(m/τ)",
        "you want to explore. It was found by an automatic search",
        "`discopop`",
    ),
    "dpop": (
        "−log σ(m − λ max(0, −βc))",
        "both answers differ in a few tokens only, and DPO would make the chosen one less likely, too",
        "–",
    ),
    "odpo": (
        "−log σ(m − α log(rating gap))",
        "pairs have ratings, and a clear preference should count more than a narrow one",
        "–",
    ),
    "cal_dpo": (
        "−log σ(c − r) + w (c − 1/(2β))² + w (r + 1/(2β))²",
        "the values of the rewards matter, and not only their difference",
        "–",
    ),
    "simpo": (
        "−(1−ε) log σ(x) − ε log σ(−x), x = m − γ, per token",
        "you want no reference, and length must not be rewarded. β is 2 to 10",
        "`simpo` of CPOTrainer",
    ),
    "cpo": (
        "−(1−ε) log σ(m) − ε log σ(−m)",
        "you want no reference. Use it with `nll_weight` 1, which keeps the model near the chosen answers",
        "`sigmoid` of CPOTrainer",
    ),
    "orpo": (
        "−β log σ(x), x: difference of log(p/(1−p)), log p per token",
        "you want SFT and preferences in one run, from a base model. Use it with `nll_weight` 1",
        "ORPOTrainer",
    ),
    "slic": (
        "max(0, δ − m)",
        "you want no reference, and pairs that are told apart should stop contributing. Use it with an `nll_weight`",
        "`hinge` of CPOTrainer",
    ),
    "plackett_luce": (
        "Σ_k log Σ_{j not before k} e^(s_j − s_k)",
        "you have no reason for another. It is DPO on rankings. Only the order of the ratings matters",
        "–",
    ),
    "all_pairs": (
        "mean over pairs with different ratings of −log σ(s_k − s_j)",
        "you want DPO on every pair of the list at once",
        "–",
    ),
    "lipo_lambda": (
        "Σ over such pairs of Δ_kj (−log σ(s_k − s_j))",
        "the top of the list matters most. Δ is the change of the list's DCG if the two are swapped",
        "–",
    ),
    "info_nca": (
        "−Σ_k p_k log softmax(s)_k, p = softmax(ratings/α)",
        "the sizes of the ratings' gaps matter",
        "–",
    ),
    "nca": (
        "−Σ_k (p_k log σ(s_k) + 1/K log σ(−s_k))",
        "as for `info_nca`, and the likelihood of good answers must not fall",
        "–",
    ),
    "kto": (
        "λ_D σ(−β(u − z)) if good, λ_U σ(β(u − z)) if bad",
        "answers have a thumb up or down, without pairs",
        "`kto` of KTOTrainer",
    ),
    "bco": (
        "−log σ(βu − δ) if good, −log σ(δ − βu) if bad",
        "as for `kto`. It trains the reward as a classifier of good and bad",
        "–",
    ),
}
"""The loss of one row; when to use it; TRL 1.16's name for it, in DPOTrainer if none is named."""


def render(page: str) -> str:
    """Return the page with its tables made anew.

    Raises:
        ValueError: a loss has no entry in WORDS, or an entry has no loss.
    """
    if set(WORDS) != set(LOSSES):
        raise ValueError(f"WORDS in docs/make_losses.py must describe: {sorted(set(WORDS) ^ set(LOSSES))}")
    groups: dict[str, Callable[[Loss], bool]] = {
        "pairs": lambda loss: loss.rows == "pairs" and loss.reference,
        "reference-free": lambda loss: loss.rows == "pairs" and not loss.reference,
        "lists": lambda loss: loss.rows == "lists",
        "labels": lambda loss: loss.rows == "labels",
    }
    for name, holds in groups.items():
        page = _replaced(page, name, _losses([loss for loss in LOSSES.values() if holds(loss)]))
    return _replaced(page, "options", _options())


def _replaced(page: str, name: str, table: str) -> str:
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    found = re.subn(re.escape(start) + ".*?" + re.escape(end), lambda _: start + table + end, page, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"the page must have one {start.strip()} with its end")
    return found[0]


def _losses(losses: list[Loss]) -> str:
    lines = ["| `loss_type` | loss | use it when | needs, options | TRL 1.16 | source |", "|---|---|---|---|---|---|"]
    for loss in losses:
        formula, use, theirs = WORDS[loss.name]
        needs = ["lengths"] * loss.per_token + ["ratings"] * loss.ratings
        options = ", ".join([*needs, *(f"`{option.name}`" for option in loss.options)])
        lines.append(f"| `{loss.name}` | {formula} | {use} | {options} | {theirs} | {_linked(loss.source)} |")
    return "\n".join(lines) + "\n"


def _linked(source: str) -> str:
    """Return a source with its arXiv numbers as links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", source)


def _options() -> str:
    """Return a row for each option. Losses that limit it otherwise have a row of their own."""
    takers: dict[Option, list[str]] = {}
    for loss in LOSSES.values():
        for option in loss.options:
            takers.setdefault(option, []).append(loss.name)
    lines = ["| option | default | value | meaning | losses |", "|---|---|---|---|---|"]
    for option in sorted(takers, key=lambda option: option.name):
        default = f"{option.default:g}" if isinstance(option.default, float) else option.default
        names = ", ".join(f"`{name}`" for name in takers[option])
        only = f"; only with `{option.only_with[0]}` {option.only_with[1]}" if option.only_with else ""
        lines.append(f"| `{option.name}` | {default} | {option.limits}{only} | {option.meaning} | {names} |")
    return "\n".join(lines) + "\n"


# Highest at the left first, as in the legend: the loss, its options, its label, colour and line.
CURVES: list[tuple[str, dict[str, float], str, str, str]] = [
    ("hinge", {}, "hinge, slic (δ = 1)", "#bc5090", "-"),
    ("robust", {"label_smoothing": 0.1}, "robust, ε = 0.1", "#7a5195", "-"),
    ("simpo", {"simpo_gamma": 0.5}, "simpo, γ = 0.5; odpo", "#a08000", "-"),
    ("sigmoid", {}, "sigmoid, sigmoid_norm, cpo", "#1f4e79", "-"),
    ("discopop", {}, "discopop", "#e8590c", "--"),
    ("sigmoid", {"label_smoothing": 0.1}, "sigmoid, ε = 0.1", "#6fa8dc", "-"),
    ("exo_pair", {"label_smoothing": 0.1}, "exo_pair, ε = 0.1", "#2f9e44", "-"),
]


def missing_curves() -> list[str]:
    """Return the losses of the margin that the figure does not show."""
    labels = " ".join(label for _, _, label, _, _ in CURVES)
    return [name for name, loss in LOSSES.items() if loss.takes == "margin" and not re.search(rf"\b{name}\b", labels)]


def draw(path: Path) -> None:
    """Draw every loss that is a function of the margin alone, and its gradient, to an SVG file.

    The same matplotlib draws the same file, byte for byte.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if missing_curves():
        raise ValueError(f"CURVES in docs/make_losses.py lacks {', '.join(missing_curves())}")
    # text stays text, and the ids in the file follow from a fixed salt
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "notus", "font.size": 10}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        values, gradients = figure.subplots(1, 2)
        margin = torch.linspace(-4, 6, 251, dtype=torch.float64, requires_grad=True)
        for name, options, label, colour, line in CURVES:
            losses = LOSSES[name].function(margin, **options)
            (gradient,) = torch.autograd.grad(losses.sum(), margin)
            values.plot(margin.detach(), losses.detach(), color=colour, linestyle=line, label=label)
            gradients.plot(margin.detach(), gradient, color=colour, linestyle=line)
        values.set_title("loss")
        gradients.set_title("gradient")
        values.legend(frameon=False, fontsize=9)
        for panel in (values, gradients):
            panel.set_xlabel("margin β(c − r)")
            panel.grid(color="#dddddd", linewidth=0.6)
            for edge in ("top", "right"):
                panel.spines[edge].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="draw docs/losses.svg too")
    args = parser.parse_args()
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if args.figure:
        draw(PAGE.with_suffix(".svg"))


if __name__ == "__main__":
    main()
