"""The reference as a model: the policy as it starts, or another one, `reference.model`.

Another one is loaded like the policy, with its precision, path, kernels and quantization, but frozen. It is scored and
freed before the policy is loaded, so that no rank ever holds both. If the cache has all of its log-probs, its weights
are never read, but for their digest.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from notus.config import Config, TrainingConfig
from notus.data.chat import ChatEncoder, check_vocabulary
from notus.data.messages import Message
from notus.model import quantization
from notus.model.attention import kernel_name
from notus.model.export import load_tokenizer
from notus.model.fused import rounding
from notus.model.load import weight_files
from notus.model.new_tokens import add_tokens, enlarge
from notus.model.peft_format import read_adapter
from notus.model.policy import Policy
from notus.model.structure import own_code, text_config
from notus.model.supported import check_context
from notus.model.verify import PathChoice
from notus.runtime import distributed
from notus.training.model_folders import ModelFolders, resolve_model, starting_digest
from notus.training.parallelize import (
    COMPUTE_DTYPES,
    build_policy,
    check_adapters,
    find_path,
    free_memory,
    load_policy,
    read_model_config,
)
from notus.training.run_data import Inputs, check_rows, rule_of

_KEY = "reference.model"
_PROBED_ROWS = 32  # of the training data, which are tokenised again by both tokenizers
_TEXT = "It's 12:30 — 3.14 × 2 = 6.28!\n\n\tdef f(x): return x**2  # naïve 你好 🙂 ... <s> [INST]\r\n  end"
_TURNS: tuple[list[Message], ...] = (
    [{"role": "user", "content": _TEXT}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ],
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference model, whichever it is.

    Attributes:
        weights: digest of all that its weights follow from.
        kernel: name of what computes it, as `ReferenceKey.kernel`.
        policy: returns it with its weights, which are read at the first call; collective.
    """

    weights: str
    kernel: str
    policy: Callable[[], Policy]


def kernel_of(policy: Policy, path: PathChoice, device: torch.device, training: TrainingConfig) -> str:
    """Name the attention kernel in use, what computes the rest of the blocks, and how they are quantized."""
    suffix = quantization.describe(policy.causal_lm) + own_code(policy.causal_lm)
    if path.name == "plain":
        return path.kernel + suffix
    name = kernel_name(policy.causal_lm, device, COMPUTE_DTYPES[training.precision])
    name += "-compiled" if training.compile else rounding(device)
    return name + suffix


@dataclasses.dataclass
class OtherReference:
    """What `reference.model` names, found and checked, but without its weights.

    Attributes:
        config: the run's.
        device: this rank's.
        folders: where it is on this machine.
        model_config: with rows for the run's new tokens.
        new_rows: how many of them its folder lacks.
        path: how its log-probs are computed.
        encoders: what makes tokens of a row for the policy, and what would with this model's tokenizer.
    """

    config: Config
    device: torch.device
    folders: ModelFolders
    model_config: PreTrainedConfig
    new_rows: int
    path: PathChoice
    encoders: tuple[ChatEncoder, ChatEncoder]

    @property
    def name(self) -> str:
        """As the config has it."""
        return str(self.config.reference.model)

    @functools.cached_property
    def weights(self) -> str:
        """Digest of the weights' content; read on rank 0. Collective."""
        return distributed.on_main(lambda: starting_digest(self.folders, new_rows=self.new_rows))

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise ValueError if the rows do not fit the model, or its tokenizer would make other tokens of them."""
        tokenizer, size = self.encoders[0].tokenizer, text_config(self.model_config).vocab_size
        for rows in filter(None, (inputs.train, inputs.eval)):
            with _naming(self.config):
                check_vocabulary(tokenizer, size)
                check_rows(rows, tokenizer, size)
            self.check_length(rows.longest_sequence)
        self._check_texts(inputs)
        reports = inputs.reports.values()
        if any(report.templated for report in reports):
            self._check_conversations()
        if any(report.kept > report.templated for report in reports):
            self._check_plain_text()

    def check_length(self, longest: int) -> None:
        """Raise ValueError if sequences of so many tokens are too long for the model."""
        check_context(self.model_config, longest, "data.max_length", model=f"{_KEY}={self.name}")

    def _check_texts(self, inputs: Inputs) -> None:
        """Compare the tokens of the texts of some training rows, and of one of ours."""
        mine, theirs = (encoder.tokenizer for encoder in self.encoders)
        rows = inputs.train(np.arange(min(_PROBED_ROWS, len(inputs.train))))
        ids = [[*row.trunk.tolist(), *branch.tolist()] for row in rows for branch in row.branches]
        for text in [_TEXT, *(str(mine.decode(each)) for each in ids)]:
            if mine(text, add_special_tokens=False).input_ids != theirs(text, add_special_tokens=False).input_ids:
                raise self._others(f"text such as {' '.join(text.split())[:40]!r}")

    def _check_conversations(self) -> None:
        answer: list[Message] = [{"role": "assistant", "content": "Yes."}]
        for turns in _TURNS:
            try:
                expected = self.encoders[0].encode([(turns, answer)])[0].ids.tolist()
            except ValueError:  # the policy's template does not take such turns
                continue
            try:
                found = self.encoders[1].encode([(turns, answer)])[0].ids.tolist()
            except ValueError:
                found = []
            if found != expected:
                raise self._others(
                    "conversations, because its chat template is another one. To have both read the policy's, name "
                    "that in data.chat_template"
                )

    def _check_plain_text(self) -> None:
        expected, found = (encoder.encode([("Once", " upon a time")])[0].ids.tolist() for encoder in self.encoders)
        if found != expected:
            raise self._others("plain text, because it begins or ends texts with another token")

    def _others(self, what: str) -> ValueError:
        return ValueError(
            f"{_KEY}={self.name}: its tokenizer makes other tokens than the policy's of {what}. The reference scores "
            "the policy's tokens: name a model that learned with the same tokenizer and template"
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[Reference]:
        """Hold the model as long as the block runs, and free it then. Collective."""
        training, model = self.config.training, self.config.model
        with _naming(self.config):
            policy = build_policy(
                self.folders.base,
                self.model_config,
                device=self.device,
                precision=training.precision,
                compile=self._compiled,
                cpu_offload=training.cpu_offload,
                adapter=self.folders.adapter,
                new_tokens=self.new_rows,
                trainable=False,
                sharding=training.sharding,
                trust_remote_code=model.trust_remote_code,
                path=self.path,
                quantization=model.quantization,
                unquantized=self.config.lora.modules_to_save,
                weights=False,
            )
        held = [policy]  # what the block keeps of the reference lets go of it, too
        del policy
        loaded = False

        def load() -> Policy:
            nonlocal loaded
            if not loaded:
                distributed.say(f"{_KEY}: scoring the rows under {self.name}, before the policy is loaded")
                with _naming(self.config):
                    load_policy(
                        held[0],
                        self.folders.base,
                        device=self.device,
                        cpu_offload=training.cpu_offload,
                        adapter=self.folders.adapter,
                        new_tokens=self.new_rows,
                    )
                loaded = True
            return held[0]

        try:
            yield Reference(self.weights, kernel_of(held[0], self.path, self.device, training), load)
        finally:
            held.clear()
            free_memory()

    @property
    def _compiled(self) -> bool:
        """The plain path is not compiled; that of the policy may be another."""
        return self.config.training.compile and self.path.name == "packed"


def find_reference(config: Config, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> OtherReference | None:
    """Find `reference.model` and check it, before any data are read; None if it is not set. Collective.

    Args:
        config: the run's.
        device: this rank's.
        tokenizer: the policy's, with the run's new tokens.

    Raises:
        ValueError: there is no such model, it cannot be computed, or its tokenizer has another vocabulary.
    """
    name = config.reference.model
    if name is None:
        return None
    training, model = config.training, config.model
    with _naming(config):
        folders = distributed.main_first(lambda: resolve_model(name, key=_KEY))
        model_config = read_model_config(folders.base, trust_remote_code=model.trust_remote_code)
        weight_files(folders.base)
        path = find_path(
            model_config,
            model.path,
            longest=config.data.max_length,
            device=device,
            trust_remote_code=model.trust_remote_code,
        )
        if training.router_aux_loss_coef:  # as for the policy, so that the same weights give the same log-probs
            path = dataclasses.replace(path, padded=False)
        own = load_tokenizer(folders.tokenizer, model.trust_remote_code)
        new_rows = _new_rows(config, folders, model_config, own)
    _check_vocabularies(name, tokenizer.get_vocab(), own.get_vocab())
    with _naming(config):
        check_adapters(
            model_config,
            path,
            precision=training.precision,
            lora=None,
            adapter=folders.adapter,
            new_tokens=new_rows,
            quantization=model.quantization,
            unquantized=config.lora.modules_to_save,
            trust_remote_code=model.trust_remote_code,
        )
        theirs = rule_of(config.data, own, config.rows).encoder
    encoders = (rule_of(config.data, tokenizer, config.rows).encoder, theirs)
    return OtherReference(config, device, folders, model_config, new_rows, path, encoders)


def _new_rows(
    config: Config, folders: ModelFolders, model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Add those of the run's new tokens that the tokenizer lacks; return how many rows the base lacks.

    As in the policy, they start as the mean of the old rows.
    """
    known = tokenizer.get_vocab()
    ids = add_tokens(tokenizer, [token for token in config.data.new_tokens if token not in known])
    held = 0 if folders.adapter is None else read_adapter(folders.adapter).vocabulary
    return enlarge(model_config, max([held, *(each + 1 for each in ids)]))


def _check_vocabularies(name: str, mine: dict[str, int], theirs: dict[str, int]) -> None:
    """Raise ValueError if a token of one tokenizer has another id, or none, in the other."""
    differing = [token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)]
    if not differing:
        return
    first = min(differing, key=lambda token: (mine.get(token, len(mine)), token))
    ids = " and ".join(
        f"{'none' if number is None else number} for the {whose}"
        for whose, number in (("policy", mine.get(first)), ("reference", theirs.get(first)))
    )
    raise ValueError(
        f"{_KEY}={name}: its tokenizer is not the policy's: {len(differing):,} tokens differ, the first is {first!r}, "
        f"whose id is {ids}. The reference scores the policy's tokens: name a model with the same tokenizer"
    )


@contextlib.contextmanager
def _naming(config: Config) -> Iterator[None]:
    """Have errors within the block say that they are of the reference."""
    try:
        yield
    except ValueError as error:
        named = str(error).startswith(_KEY)
        raise ValueError(str(error) if named else f"{_KEY}={config.reference.model}: {error}") from error
