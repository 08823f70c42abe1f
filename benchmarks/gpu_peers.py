"""What Notus is held against: transformers' own forward pass in a plain loop, and TRL where it is installed.

Both see the same pairs with the same lengths, take the same steps (RMSprop, clipping to 1, bf16 arithmetic over fp32
weights, full checkpointing) and are given the reference log-probs, so that nobody pays for a reference pass.
"""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, TrainerCallback

from common import synchronize, word_tokenizer
from gpu_rows import LONGEST, Row, Scale, fitting, necessary_rate, parameters, peaks, rates, release, steps_of, timed
from notus.data.packing import Example
from notus.losses import dpo_loss
from notus.training.optimizers import build_optimizer

PLAIN = "transformers' own forward in a plain loop"
BASELINE = Row("dpo", 0, "padded")


@dataclasses.dataclass(frozen=True)
class Peer:
    """One of the others, in one way of using it.

    Attributes:
        name: of its row.
        kind: "transformers" or "trl".
        pairs: of a micro-batch; halved while memory does not suffice.
        checkpointing: "full" or "none".
    """

    name: str
    kind: str
    pairs: int
    checkpointing: str


def peers(kind: str) -> list[Peer]:
    """The peers of a kind that are installed, each at its best: TRL also in the way that pads nothing."""
    if kind == "transformers":
        return [Peer(f"DPO full, {PLAIN}, padded, checkpointing full", kind, 8, "full")]
    name = "DPO full, TRL, reference given"
    found = [
        Peer(f"{name}, padded, checkpointing full", kind, 8, "full"),
        Peer(f"{name}, one pair at a time, checkpointing none", kind, 1, "none"),
    ]
    return found if all(importlib.util.find_spec(package) is not None for package in ("trl", "datasets")) else []


def measure_peer(peer: Peer, scale: Scale, device: torch.device, seconds: float, memory: int | None) -> dict[str, Any]:
    """Measure a peer.

    Raises:
        torch.OutOfMemoryError: not even one pair at a time fits.
    """
    shape, config = fitting(scale, memory, lora=False)
    steps = steps_of(BASELINE, scale, config.vocab_size)
    run = {"transformers": _transformers, "trl": _trl}[peer.kind]
    size = min(peer.pairs, scale.pairs_per_step)
    while True:
        try:
            times = run(config, steps, dataclasses.replace(peer, pairs=size), seconds, device)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            return {
                "shape": shape, "parameters": parameters(config), "pairs_per_step": scale.pairs_per_step,
                "pairs_per_micro_batch": size, "checkpointing": peer.checkpointing, **rates(times, steps),
                **peaks(device), "necessary_flops_per_second": necessary_rate(config, steps, times),
            }  # fmt: skip
        size //= 2
        release(device)


def _model(config: MistralConfig, device: torch.device, attention: str = "sdpa") -> torch.nn.Module:
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.train()


# ---- transformers in a plain loop ----


def _transformers(
    config: MistralConfig, steps: Sequence[Sequence[Example]], peer: Peer, seconds: float, device: torch.device
) -> list[tuple[int, float]]:
    """Padded batches, all logits at once, nothing shared."""
    model = _model(config, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = list(model.parameters())
    optimizer = build_optimizer(weights, name="rmsprop", learning_rate=5e-7, weight_decay=0.0)

    def step(number: int) -> None:
        examples = steps[number]
        for start in range(0, len(examples), peer.pairs):
            batch = examples[start : start + peer.pairs]
            (_plain_loss(model, batch, device, config.vocab_size) * len(batch) / len(examples)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, seconds, device)


def _plain_loss(model: torch.nn.Module, batch: Sequence[Example], device: torch.device, vocab: int) -> Tensor:
    """DPO's mean loss. Padding stands at the end, where nothing that is scored sees it, so that no mask is needed."""
    whole = [np.concatenate([item.trunk, item.branches[side]]) for side in (0, 1) for item in batch]
    scored = [(len(item.trunk), len(item.branches[side])) for side in (0, 1) for item in batch]
    ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.int64)
    mask = torch.zeros(ids.shape)
    for row, (tokens, (trunk, branch)) in enumerate(zip(whole, scored, strict=True)):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, trunk : trunk + branch] = 1.0
    ids, mask = ids.to(device), mask.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * mask[:, 1:]).sum(1).chunk(2)
    references = (-float(np.log(vocab)) * mask.sum(1)).chunk(2)
    return dpo_loss(chosen, rejected, *references)[0].mean()


# ---- TRL ----


class _Stopwatch(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(self._device)
        self.times.append(time.perf_counter() - self._start)
        control.should_training_stop = len(self.times) > 2 and sum(self.times[1:]) >= self._seconds


def _trl(
    config: MistralConfig, steps: Sequence[Sequence[Example]], peer: Peer, seconds: float, device: torch.device
) -> list[tuple[int, float]]:
    """DPOTrainer with its best options for one device: as little padding as micro-batches of `peer.pairs` leave."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):
        """DPOTrainer on pairs that are token ids already, with reference log-probs that are known."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
            return dataset

    watch, tokenizer = _Stopwatch(device, seconds), word_tokenizer()
    tokenizer.pad_token = "</s>"
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=peer.pairs, bf16=True, optim="rmsprop", learning_rate=5e-7,
            gradient_accumulation_steps=len(steps[0]) // peer.pairs, max_steps=9, max_grad_norm=1.0, max_length=LONGEST,
            gradient_checkpointing=peer.checkpointing == "full", precompute_ref_log_probs=True,
            train_sampling_strategy="sequential", use_cpu=device.type == "cpu", logging_steps=100, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Given(
            _model(config, device),
            args=args,
            train_dataset=Dataset.from_list([_columns(item, config.vocab_size) for step in steps for item in step]),
            processing_class=tokenizer,  # never asked to tokenise
            callbacks=[watch],
        )
        trainer.train()
    return [(number % len(steps), took) for number, took in enumerate(watch.times)][1:]


def _columns(item: Example, vocab: int) -> dict[str, Any]:
    chosen, rejected = item.branches
    return {
        "prompt_ids": item.trunk.tolist(), "chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist(),
        "ref_chosen_logps": -float(np.log(vocab)) * len(chosen),
        "ref_rejected_logps": -float(np.log(vocab)) * len(rejected),
    }  # fmt: skip
