"""What is measured of each family of models: this project against plain transformers, torch and PEFT.

The yardstick is the model's class in transformers, each sequence by itself, with its own `eager` attention, and a plain
training loop with `torch.optim`. The measures of a family depend on each other only through its folder.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from families import FAMILIES, Family, make_family
from torch import Tensor
from toys import toy_example, toy_tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from notus.config import LoraConfig
from notus.data.packing import Batch, Example, collate
from notus.losses import dpo_loss
from notus.model.export import export_adapter, export_model, load_tokenizer
from notus.model.lora import OF_EXPERTS
from notus.model.policy import Policy
from notus.model.structure import matches, text_parameters
from notus.model.verify import PathChoice, make_policy
from notus.runtime.process import first_line
from notus.training.optimizers import build_optimizer
from notus.training.parallelize import build_policy, find_path, read_model_config, reshard

T = TypeVar("T")
STEPS, LEARNING_RATE = 3, 3e-4
# Nats. A loss after steps of Adam, and adapters, magnify rounding.
LOSS_TOLERANCE, LORA_TOLERANCE = 1e-3, 5e-4
NEW_TOKENS = 6
LAST_TEXT_TOKEN = 390  # those above stand for images in some families


@dataclasses.dataclass(frozen=True)
class Measures:
    """One family's row of the table: numbers, or what failed.

    Attributes:
        name: the family.
        path, reason: how it is computed, and why not packed; or "refused", where nothing is measured.
        logprobs: the largest difference of a completion token's log-prob from transformers', in nats.
        loss: the largest difference of the DPO loss in three training steps from a plain loop's.
        lora: the largest difference of a log-prob between a trained adapter here and in PEFT, in nats; None where a
            model has no linear layers.
        export: the same between the trained model here and its export in transformers, with a clean loading report.
        generated: how many of the tokens that transformers generates greedily from the export are the likeliest here.
    """

    name: str
    path: str
    reason: str | None
    logprobs: float | str
    loss: float | str
    lora: float | str | None
    export: float | str
    generated: float | str

    @property
    def faults(self) -> list[str]:
        """What is not as it must be."""
        family = FAMILIES[self.name]
        if self.path != family.expected_path:
            return [f"{self.name}: {self.path} ({self.reason}), not {family.expected_path}", *self._wrong(family)]
        return [] if self.path == "refused" else self._wrong(family)

    def _wrong(self, family: Family) -> list[str]:
        limits = {
            "logprobs": family.tolerance,
            "loss": LOSS_TOLERANCE,
            "lora": LORA_TOLERANCE,
            "export": family.tolerance,
        }
        values = {name: getattr(self, name) for name in limits}
        found = [
            f"{self.name}: {name} {values[name]}" for name, most in limits.items() if not _within(values[name], most)
        ]
        if isinstance(self.generated, str):
            found.append(f"{self.name}: generation {self.generated}")
        return found


def _within(value: float | str | None, most: float) -> bool:
    return value is None or (isinstance(value, float) and value <= most)


def measure(name: str, device: torch.device) -> Measures:
    """Measure one family; within a process group."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject = Subject.make(name, Path(folder), device)
        except ValueError as error:
            return Measures(name, "refused", first_line(error), *["-"] * 5)
        logprobs = _cell(subject.logprob_difference)
        lora = _cell(subject.lora_difference)
        loss = _cell(subject.loss_difference)
        export = _cell(subject.export_difference)
        generated = _cell(subject.generated)
    return Measures(name, subject.path.name, subject.path.reason, logprobs, loss, lora, export, generated)


def _cell(measurement: Callable[[], T]) -> T | str:
    try:
        return measurement()
    except Exception as error:  # of every kind: the table shows it, and --check fails
        return _failed(error)


def _failed(error: Exception) -> str:
    return f"error: {type(error).__name__}: {first_line(error)}"


@dataclasses.dataclass
class Subject:
    """A family's model in a folder, and how this project computes it."""

    family: Family
    folder: Path
    device: torch.device
    model_class: Any
    config: PreTrainedConfig
    path: PathChoice
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def make(cls, name: str, folder: Path, device: torch.device) -> "Subject":
        """Write a family's model to a folder, and choose its path."""
        model = make_family(name)
        model.save_pretrained(folder / "model")
        toy_tokenizer(vocab_size=360).save_pretrained(folder / "model")
        config = read_model_config(folder / "model")
        tokenizer = load_tokenizer(folder / "model", False)  # as a run does
        path = find_path(config, "auto", longest=longest_sequence(), device=device)
        return cls(FAMILIES[name], folder, device, type(model), config, path, tokenizer)

    def logprob_difference(self) -> float:
        """Return the largest difference of a token's log-prob from transformers' own forward pass."""
        plain = self.plain()
        found = [self.policy().token_logprobs(batch).detach() for batch in self.batches]
        return _largest(found, [own_logprobs(plain, examples) for examples in pairs()])

    def loss_difference(self) -> float:
        """Return the largest difference of the loss in `STEPS` steps of AdamW from a plain loop's."""
        return max(abs(ours - theirs) for ours, theirs in zip(self._trained[1], self._plain_losses(), strict=True))

    def export_difference(self) -> float:
        """Export the trained model; return the largest difference of a log-prob after transformers has loaded it.

        Raises:
            ValueError: transformers misses a tensor, or finds one too many.
        """
        policy, target = self._trained[0], self.folder / "exported"
        expected = [policy.token_logprobs(batch).detach() for batch in self.batches]
        reshard(policy)
        options: dict[str, Any] = {"hf_config": self.config, "tokenizer": self.tokenizer, "dtype": torch.float32}
        export_model(policy.causal_lm, target, **options)
        loaded, report = self.model_class.from_pretrained(
            target, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if report.get(kind):
                raise ValueError(f"{kind} after export: {sorted(report[kind])[:3]}")
        return _largest(expected, [own_logprobs(loaded.eval(), examples) for examples in pairs()])

    def lora_difference(self) -> float | None:
        """Train an adapter and return the largest difference of a log-prob after PEFT has loaded it.

        None for a model without linear layers.

        Raises:
            ValueError: training left the adapter without effect.
        """
        from peft import PeftModel

        targets = lora_targets(self.plain(), self.path.idle)
        if not targets:
            return None
        policy, target = self.policy(LoraConfig(rank=2, alpha=4.0, target_modules=targets)), self.folder / "adapter"
        before = policy.token_logprobs(self.batches[0]).detach()
        reshard(policy)
        self._train(policy)
        expected = [policy.token_logprobs(batch).detach() for batch in self.batches]
        if torch.equal(before, expected[0]):
            raise ValueError("training the adapter changed nothing")
        reshard(policy)
        export_adapter(
            policy.causal_lm,
            target,
            base_model_name_or_path=str(self.folder / "model"),
            tokenizer=self.tokenizer,
        )
        loaded: Any = PeftModel.from_pretrained(self.plain(), target)
        return _largest(expected, [own_logprobs(loaded.eval(), examples) for examples in pairs()])

    def generated(self) -> float:
        """Return which share of the tokens that transformers generates from the export are the likeliest here."""
        exported = self.folder / "exported"
        loaded = self.model_class.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
        prompt = pairs()[0][0].trunk
        ids = loaded.generate(
            torch.tensor(prompt)[None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].numpy()
        example = Example(0, prompt, (ids,), (np.ones(len(ids), dtype=bool),))
        with_path = self.model_class.from_pretrained(
            exported, dtype=torch.float32, attn_implementation=self.path.implementation
        )
        _, likeliest = make_policy(with_path.eval(), self.path).token_scores(collate([example], 1))
        return likeliest.float().mean().item()

    @functools.cached_property
    def batches(self) -> list[Batch]:
        """The steps' pairs, packed."""
        return [collate(examples, 2).to(self.device) for examples in pairs()]

    def policy(self, lora: LoraConfig | None = None) -> Policy:
        """Build the policy as a run does."""
        return build_policy(
            self.folder / "model", self.config, device=self.device, precision="fp32", path=self.path, lora=lora
        )

    def plain(self) -> PreTrainedModel:
        """Load the model with transformers alone."""
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        loaded: PreTrainedModel = self.model_class.from_pretrained(self.folder / "model", **options)
        return loaded.eval()

    @functools.cached_property
    def _trained(self) -> tuple[Policy, list[float]]:
        policy = self.policy()
        return policy, self._train(policy)

    def _train(self, policy: Policy) -> list[float]:
        """DPO with this project's optimizer; returns the losses."""
        options: dict[str, Any] = {"learning_rate": LEARNING_RATE, "weight_decay": 0.0}
        optimizer = build_optimizer(policy.parameters(), name="adamw", **options)
        references = [policy(batch).detach() for batch in self.batches]
        reshard(policy)  # a forward pass without a backward leaves gathered copies where the parameters were
        losses = []
        for batch, reference in zip(self.batches, references, strict=True):
            loss = _loss(policy(batch), reference)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def _plain_losses(self) -> list[float]:
        """The same with transformers and torch alone, one sequence at a time."""
        model = self.plain()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        with torch.no_grad():
            references = [_sums(model, examples) for examples in pairs()]
        losses = []
        for examples, reference in zip(pairs(), references, strict=True):
            loss = _loss(_sums(model, examples), reference)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def lora_targets(model: PreTrainedModel, idle: Set[str]) -> list[str]:
    """Return the linear layers that get adapters, by the last components of their names.

    All of them that read text but the head, but not those that PEFT takes for parts of routed experts, nor those that
    it leaves alone beside a state-space model's convolution, nor those that are idle.
    """
    head = model.get_output_embeddings()
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    fused = any(parameter.dim() == 3 and "experts" in name.split(".") for name, parameter in model.named_parameters())
    excluded = (OF_EXPERTS if fused else set()) | ({"out_proj"} if "conv1d" in names else set())
    of_text = text_parameters(model)
    linears = [
        (name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and type(module).forward is torch.nn.Linear.forward
        and f"{name}.weight" in of_text
        and not matches(name, idle)
    ]
    small = {name for name, module in linears if min(module.in_features, module.out_features) < 2}
    return sorted({name for name, module in linears if module is not head} - excluded - small)


@functools.cache
def pairs() -> list[list[Example]]:
    """Each step's pairs: prompts and completions shorter and longer than a sliding window of 8."""
    rng = np.random.default_rng(0)
    shapes = [[(14, (11, 16)), (3, (2, 12))], [(20, (4, 9)), (6, (13, 1))], [(9, (10, 10)), (12, (5, 21))]]
    steps = []
    for number, step in enumerate(shapes):
        examples = [toy_example(rng, number, *lengths) for lengths in step]
        steps.append([_text_only(example) for example in examples])
    return steps


def _text_only(example: Example) -> Example:
    branches = tuple(np.minimum(branch, LAST_TEXT_TOKEN) for branch in example.branches)
    return dataclasses.replace(example, trunk=np.minimum(example.trunk, LAST_TEXT_TOKEN), branches=branches)


def longest_sequence() -> int:
    """Return the most tokens of a sequence in `pairs`."""
    return max(len(example.trunk) + len(branch) for step in pairs() for example in step for branch in example.branches)


def own_logprobs(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """The log-prob of every completion token [M], each sequence by itself through the model's own forward pass."""
    with torch.no_grad():
        return torch.cat(_per_sequence(model, examples))


def _per_sequence(model: PreTrainedModel, examples: Sequence[Example]) -> list[Tensor]:
    found = []
    for example in examples:
        for branch in example.branches:
            ids = torch.tensor(np.concatenate([example.trunk, branch]))
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            predicting = logits[len(example.trunk) - 1 : len(ids) - 1].log_softmax(-1)
            found.append(predicting.gather(1, ids[len(example.trunk) :, None]).squeeze(1))
    return found


def _sums(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """[E, 2]: the log-prob of each completion."""
    return torch.stack([each.sum() for each in _per_sequence(model, examples)]).view(len(examples), 2)


def _loss(logps: Tensor, reference: Tensor) -> Tensor:
    losses, *_ = dpo_loss(*logps.unbind(1), *reference.unbind(1), beta=0.1)
    return losses.mean()


def _largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
