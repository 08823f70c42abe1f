"""Write tests/golden/inputs.json and trl.json: what TRL's own trainers compute, as numbers.

    pip install -r requirements-bench.txt && python tests/make_golden.py

TRL's methods run unchanged, on a stand-in for the trainer and on given log-probs per token.
`tests/test_losses_golden.py` holds ours against the stored numbers, and these against TRL where it is installed.
`authors.json`, beside them, holds what authors' own code gives for the same inputs. That code was run elsewhere and is
not part of this project.
"""

import json
import random
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("golden")
Case = dict[str, Any]


# ---- inputs: log-probs in nats ----


def make_inputs() -> dict[str, Any]:
    """Return pairs, lists and labelled completions. Drawn once, with few decimals, so that they are stored exactly."""
    draw = random.Random(0)

    def tokens(length: int, scale: float) -> list[float]:
        return [-round(0.01 + scale * draw.random(), 3) for _ in range(length)]

    lengths = [(1, 1), (3, 5), (8, 2), (11, 11), (4, 12), (12, 7)]
    # the scales move some pairs far from the reference, to both sides: margins of about -20 to 20 nats
    scales = [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (0.5, 3.0), (2.0, 0.5), (3.0, 3.0)]
    pairs = {
        "policy": [[tokens(n, s) for n, s in zip(*pair, strict=True)] for pair in zip(lengths, scales, strict=True)],
        "reference": [[tokens(n, 1.5) for n in pair] for pair in lengths],
        "log_collision": [[tokens(n, 2.0) for n in pair] for pair in lengths],
        "ratings": [[4.5, 3.0], [5.0, 1.0], [2.0, 2.0], [3.25, 3.0], [8.0, 7.5], [10.0, 1.0]],
    }
    ratings = [[5.0, 4.0, 3.0, 1.0], [4.5, 4.25, 2.0, 1.5], [3.0, 3.0, 2.0, 2.0], [5.0, 2.5, 1.0], [4.0, 3.5]]
    lists = {
        "policy": [[-round(60 * draw.random(), 3) for _ in row] for row in ratings],
        "reference": [[-round(60 * draw.random(), 3) for _ in row] for row in ratings],
        "ratings": ratings,
    }
    labels = {name: [-round(40 * draw.random(), 3) for _ in range(6)] for name in ("policy", "reference")}
    # the mismatched completions of KTO's KL term; in the second set the policy gives them less than the reference does
    kl = {name: [-round(50 + 9 * draw.random(), 3) for _ in range(6)] for name in ("less", "more")}
    kl["more"] = [round(value + 6, 3) for value in kl["more"]]
    return {"pairs": pairs, "lists": lists, "labels": labels | {"labels": [True, True, False, True, False, False]} | kl}


def padded(rows: list[list[float]]) -> Tensor:
    """Return lists of different lengths as [len(rows), longest], with zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def trainer(**settings: Any) -> MagicMock:
    """Return a stand-in for a trainer: its settings, and an accelerator of one process."""
    made = MagicMock(aux_loss_enabled=False, precompute_ref_logps=True, is_encoder_decoder=False, **settings)
    made.accelerator.gather_for_metrics = made.accelerator.gather = lambda tensor: tensor
    made.accelerator.device = torch.device("cpu")
    return made


# ---- DPOTrainer ----

DPO = {
    "beta": 0.1, "label_smoothing": 0.0, "loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None,
    "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False, "discopop_tau": 0.05,
}  # fmt: skip


def dpo_cases() -> list[Case]:
    """Return the settings of every DPOTrainer case, and what they are called here."""

    def case(loss: str, ours: str | None = None, options: dict[str, float] | None = None, **settings: Any) -> Case:
        return {"loss": ours or loss, "options": options or {}, "settings": {"loss_types": [loss], **settings}}

    def smoothed(loss: str, epsilon: float, **settings: Any) -> Case:
        return case(loss, None, {"label_smoothing": epsilon}, label_smoothing=epsilon, **settings)

    cases = [case(loss, beta=beta) for beta in (0.05, 0.5) for loss in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm",
        "discopop", "robust",
    )]  # fmt: skip
    cases += [case("sigmoid_norm", beta=5.0)]
    for beta in (0.05, 0.5):
        cases += [smoothed("robust", epsilon, beta=beta) for epsilon in (0.1, 0.4)]
        cases += [smoothed("exo_pair", epsilon, beta=beta) for epsilon in (0.001, 0.2)]
        cases += [case("discopop", None, {"discopop_tau": tau}, discopop_tau=tau, beta=beta) for tau in (0.01, 0.5)]
    # AOT of one pair is DPO of that pair; TRL's "sigmoid" itself ignores label smoothing
    cases += [case("aot", "sigmoid", {"label_smoothing": e}, label_smoothing=e, beta=0.3) for e in (0.1, 0.5)]
    for divergence in ("forward_kl", "js_divergence"):
        options = {"f_divergence": divergence}
        for loss in ("sigmoid", "hinge", "robust", "discopop"):
            if (loss, divergence) != ("discopop", "forward_kl"):  # there TRL's exponentials overflow to NaN
                cases += [case(loss, None, options, f_divergence_type=divergence, beta=0.1)]
        cases += [
            smoothed("exo_pair", 0.1, f_divergence_type=divergence, beta=0.1)
            | {"options": {"label_smoothing": 0.1} | options}
        ]
    for alpha in (0.3, 0.7):
        options = {"f_divergence": "alpha_divergence", "f_alpha": alpha}  # the paper's α is 1 - TRL's coefficient
        settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha, "beta": 0.1}
        cases += [case("sigmoid", None, options, **settings) | {"dtype": "float32"}]  # TRL has no fp64 here
    for ld_alpha in (0.0, 0.3, 1.0):
        cases += [case(loss, ld_alpha=ld_alpha, beta=0.2) | {"ld_alpha": ld_alpha} for loss in ("sigmoid", "bco_pair")]
    cases += [
        case(loss, use_weighting=True, beta=0.2) | {"wpo": True} for loss in ("sigmoid", "sppo_hard")
    ]  # not hinge: see docs/losses.md
    sums = ({"sigmoid": 0.8, "bco_pair": 0.2}, {"sigmoid": 0.5, "apo_zero": 2.0, "hinge": 1.0})
    for weights in sums:
        settings = {"loss_types": list(weights), "loss_weights": list(weights.values()), "beta": 0.1}
        cases.append({"loss": weights, "options": {}, "settings": settings})
    return cases


def run_dpo(inputs: dict[str, Any], case: Case) -> Case:
    """Return the case with losses and gradients of each pair, by DPOTrainer._compute_loss."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    pairs, settings = inputs["pairs"], DPO | case["settings"]
    losses, gradients = [], []
    for policy, reference, collision in zip(pairs["policy"], pairs["reference"], pairs["log_collision"], strict=True):
        logps = padded(policy).to(dtype).requires_grad_()
        loss = _dpo_loss(settings, logps, reference, collision, [len(row) for row in policy])
        (gradient,) = torch.autograd.grad(loss, logps)
        losses.append(loss.item())
        gradients.append([row[: len(tokens)].tolist() for row, tokens in zip(gradient, policy, strict=True)])
    return _stored(case, "DPOTrainer", losses, gradients, per_token="ld_alpha" in case)


def _dpo_loss(
    settings: Case, logps: Tensor, reference: list[list[float]], collision: list[list[float]], lengths: list[int]
) -> Tensor:
    """Return TRL's mean loss of pairs: log-probs [2B, T], chosen completions first, after a prompt of one token."""
    from trl import DPOTrainer

    made = trainer(**settings)
    made.args.discopop_tau = settings["discopop_tau"]
    positions = torch.arange(logps.shape[1] + 1)
    mask = ((positions > 0) & (positions <= torch.tensor(lengths)[:, None])).long()
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=padded(collision).to(zeros),
    )
    batch = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    made.ref_model = lambda **_: SimpleNamespace(log_probs=padded(reference).to(logps))
    # the reference's own method, so that ld_alpha reaches it as in a run
    ref_logps = DPOTrainer.compute_ref_log_probs(made, made.ref_model, batch)
    batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref_logps, strict=True))
    return DPOTrainer._compute_loss(made, lambda **_: outputs, batch, False)


def run_sums(inputs: dict[str, Any]) -> list[Case]:
    """Return losses of the whole batch: with the likelihood of the chosen tokens, as MPO has it, by DPOTrainer."""
    pairs, cases = inputs["pairs"], []
    for weights, nll_weight in (({"sigmoid": 0.8, "bco_pair": 0.2}, 1.0), ({"sigmoid": 1.0}, 0.25)):
        settings = {"loss_types": [*weights, "sft"], "loss_weights": [*weights.values(), nll_weight], "beta": 0.1}
        flat = {name: [pair[side] for side in (0, 1) for pair in pairs[name]] for name in ("policy", "reference")}
        logps = padded(flat["policy"]).requires_grad_()
        lengths = [len(row) for row in flat["policy"]]
        loss = _dpo_loss(DPO | settings, logps, flat["reference"], flat["reference"], lengths)
        (gradient,) = torch.autograd.grad(loss, logps)
        cases.append({
            "trainer": "DPOTrainer", "loss": weights, "nll_weight": nll_weight, "options": {}, "settings": settings,
            "mean": loss.item(), "gradients": torch.stack(gradient[:, 0].chunk(2), 1).tolist(),
        })  # fmt: skip
    return cases


# ---- CPOTrainer and ORPOTrainer: experimental in TRL ----


def cpo_cases() -> list[Case]:
    """Return the settings of every CPOTrainer and ORPOTrainer case, and what they are called here."""
    cases: list[Case] = []
    base = {"simpo_gamma": 0.5, "label_smoothing": 0.0, "cpo_alpha": 0.0, "alpha": 0.0}
    for beta in (0.1, 2.0):
        cases += [
            {"loss": ours, "options": {}, "settings": base | {"loss_type": theirs, "beta": beta}}
            for theirs, ours in (("sigmoid", "cpo"), ("hinge", "slic"))
        ]
        smoothing = base | {"loss_type": "sigmoid", "beta": beta, "label_smoothing": 0.2}
        cases.append({"loss": "cpo", "options": {"label_smoothing": 0.2}, "settings": smoothing})
        for gamma in (0.0, 1.4):
            settings = base | {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma}
            cases.append({"loss": "simpo", "options": {"simpo_gamma": gamma}, "settings": settings})
        settings = base | {"loss_type": "simpo", "beta": beta, "label_smoothing": 0.1}
        cases.append({"loss": "simpo", "options": {"simpo_gamma": 0.5, "label_smoothing": 0.1}, "settings": settings})
    cases.append({
        "loss": "cpo", "options": {}, "nll_weight": 1.0,
        "settings": base | {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    })  # fmt: skip
    return cases + [
        {"loss": "orpo", "options": {}, "nll_weight": 1.0, "settings": {"beta": beta}, "dtype": "float32"}
        for beta in (0.1, 1.0)  # TRL computes ORPO's odds in fp32
    ]


def run_reference_free(inputs: dict[str, Any], case: Case) -> Case:
    """Return the case with losses and gradients of each pair, by CPOTrainer's or ORPOTrainer's own methods."""
    name = "ORPOTrainer" if case["loss"] == "orpo" else "CPOTrainer"
    losses, gradients = [], []
    for policy in inputs["pairs"]["policy"]:
        logps = padded(policy).requires_grad_()
        loss = _reference_free_loss(name, case["settings"], logps, [len(row) for row in policy])
        (gradient,) = torch.autograd.grad(loss, logps)
        losses.append(loss.item())
        gradients.append([row[: len(tokens)].tolist() for row, tokens in zip(gradient, policy, strict=True)])
    return _stored(case, name, losses, gradients)


def _reference_free_loss(name: str, settings: Case, logps: Tensor, lengths: list[int]) -> Tensor:
    """Return TRL's loss of a pair from logits of two tokens: one has the given log-prob, the other has the rest.

    These logits are normalised already, so the gradient with respect to the given log-prob is that of TRL's log-prob.
    """
    if name == "ORPOTrainer":
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOTrainer as Trainer

    made = trainer(**settings)
    made.get_batch_logps = Trainer.get_batch_logps
    positions = torch.arange(logps.shape[1] + 1)
    present = positions <= torch.tensor(lengths)[:, None]
    labels = torch.where((positions > 0) & present, 0, -100)
    batch = {"concatenated_input_ids": torch.zeros_like(labels), "concatenated_labels": labels}
    made.concatenated_inputs = lambda *_, **__: batch | {"concatenated_attention_mask": present.long()}
    rest = torch.log1p(-logps.clamp(max=-1e-3).exp())  # behind a completion stand zeros, which are masked
    logits = torch.stack([logps, rest], dim=-1)
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)  # of the last position, which predicts nothing
    for method in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(Trainer, method):
            setattr(made, method, partial(getattr(Trainer, method), made))
    model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
    loss, _ = Trainer.get_batch_loss_metrics(made, model, {"chosen_labels": labels[:1]})
    return loss


# ---- KTOTrainer ----


def kto_cases() -> list[Case]:
    """Return the settings of every KTOTrainer case, and what they are called here."""
    base = {"loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    cases: list[Case] = []
    for beta in (0.1, 0.5):
        for kl in ("less", "more"):
            cases.append({"loss": "kto", "options": {}, "kl": kl, "settings": base | {"beta": beta}})
        weights = {"desirable_weight": 1.33, "undesirable_weight": 0.5}
        cases.append({"loss": "kto", "options": weights, "kl": "more", "settings": base | {"beta": beta} | weights})
        unpaired = base | {"beta": beta, "loss_type": "apo_zero_unpaired"}
        cases.append({"loss": "kto", "options": {}, "shift": 0.0, "settings": unpaired})  # KTO without its KL term
    return cases


def run_kto(inputs: dict[str, Any], case: Case) -> Case:
    """Return the case with losses and gradients of each completion, by KTOTrainer._compute_loss.

    Each completion runs alone, with the KL term of all mismatched ones.
    """
    from trl import KTOTrainer

    rows, losses, gradients = inputs["labels"], [], []
    ids = torch.zeros(1, 2, dtype=torch.long)
    for policy, reference, label in zip(rows["policy"], rows["reference"], rows["labels"], strict=True):
        logps = torch.tensor([[policy]], requires_grad=True)
        made = trainer(**case["settings"], calculate_KL="kl" in case)
        made._compute_kl_logps = lambda *_: torch.tensor(rows[case.get("kl", "more")])
        zeros = torch.zeros(1, 1)
        outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        batch = {"label": torch.tensor([label]), "input_ids": ids, "completion_mask": ids, "attention_mask": ids}
        # the reference gives every mismatched completion -52: so the KL term is the mean plus 52
        batch |= {"ref_logps": torch.tensor([reference]), "ref_KL_logps": torch.full((6,), -52.0)}
        loss = KTOTrainer._compute_loss(made, lambda outputs=outputs, **_: outputs, batch, False)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, logps)[0].item())
    return case | {"trainer": "KTOTrainer", "losses": losses, "gradients": gradients}


# ---- files ----


def _stored(
    case: Case, name: str, losses: list[float], gradients: list[list[list[float]]], per_token: bool = False
) -> Case:
    """Return the case with its numbers. The gradient is that of every token alike, unless `per_token`."""
    if not per_token:
        for branch in (branch for pair in gradients for branch in pair):
            torch.testing.assert_close(torch.tensor(branch), torch.full((len(branch),), branch[0]))
        return case | {"trainer": name, "losses": losses, "gradients": [[b[0] for b in pair] for pair in gradients]}
    return case | {"trainer": name, "losses": losses, "token_gradients": gradients}


def make_cases(inputs: dict[str, Any]) -> list[Case]:
    """Return every case with TRL's numbers. Tensors are fp64 where TRL does not round them itself."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        cases = [run_dpo(inputs, case) for case in dpo_cases()] + run_sums(inputs)
        cases += [run_reference_free(inputs, case) for case in cpo_cases()]
        return cases + [run_kto(inputs, case) for case in kto_cases()]
    finally:
        torch.set_default_dtype(default)


def write(path: Path, head: dict[str, Any], cases: list[Case]) -> None:
    """Write a file of cases, one on a line."""
    lines = ",\n".join(json.dumps(case) for case in cases)
    path.write_text(json.dumps(head)[:-1] + f', "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    inputs = make_inputs()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "inputs.json").write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
    write(FOLDER / "trl.json", {"trl": version("trl"), "made_by": "python tests/make_golden.py"}, make_cases(inputs))


if __name__ == "__main__":
    main()
