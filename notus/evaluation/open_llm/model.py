"""lm-eval's view of a model: log-likelihoods in packed rows that share prefixes, generation, chat format.

Texts become tokens exactly as lm-eval's own class for transformers models (HFLM) makes them, whose figures the
published ones are. Every rank holds the whole model, since generation needs it so: then rows need no collectives, and a
rank waits for the others at the end alone. lm-eval sees one process; requests are dealt to the ranks in here.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.evaluation.generation import generate_ids
from notus.evaluation.kept import KeptTokens
from notus.evaluation.open_llm.rows import Text
from notus.evaluation.open_llm.scores import KeptScores, score_texts
from notus.model.attention import IMPLEMENTATION
from notus.model.policy import Policy

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # (context, continuation), then both as ids
_DRAWN = {"temperature", "top_p", "top_k"}
_MAX_NEW_TOKENS = 256  # where a task names none; lm-eval's


class NotusLM(TemplateLM):
    """A causal LM for lm-eval."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_length: int,
        tokens_per_row: int | None,
        batch_size: int,
        kept: Path,
        identity: str,
        template: str | None = None,
        add_empty_system: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            causal_lm: whole on every rank, in evaluation mode.
            tokenizer: its tokenizer.
            name: for the results.
            max_length: tokens of context; longer texts lose their beginning.
            tokens_per_row: the most tokens of a forward pass; None: 4096, or the longest text's.
            batch_size: completions generated at a time.
            kept: a folder for what is done, to go on from.
            identity: says which weights these are.
            template: Jinja text of the chat template; for tasks run with one.
            add_empty_system: an empty system turn in front of conversations without one.
        """
        super().__init__()
        self.causal_lm, self.tokenizer, self.name = causal_lm, tokenizer, name
        self.max_length, self.tokens_per_row, self.batch_size = max_length, tokens_per_row, batch_size
        self.template, self.add_empty_system = template, add_empty_system
        self._device = causal_lm.device
        self._scores = KeptScores(kept / "log-likelihoods", identity)
        self._tokens = KeptTokens(kept / "generations", identity)

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @functools.cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with what the tokenizer puts around a text unless that begins with BOS itself."""
        if add_special_tokens is None and string.startswith(self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations after their contexts, and whether each is what the model would say."""
        for request in requests:
            if request.args == ("", ""):  # lm-eval would look for its first token
                raise _nothing(request.args)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        texts = [self._text(*request) for request in requests]
        with packed(self.causal_lm) as policy:
            return score_texts(policy, texts, tokens_per_row=self.tokens_per_row, kept=self._scores)

    def _text(self, strings: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Text:
        if not continuation:
            raise _nothing(strings)
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit into --max-length {self.max_length}"
            )
        # of a context of spaces nothing is left where no BOS stands: lm-eval moves them to the continuation
        ids = np.array([*(context or [self.prefix_token_id]), *continuation], dtype=np.int32)
        return Text(ids[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows that do not overlap in what they score."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, cut before the first of a task's `until`."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            found.update(zip(numbers, self._generate(contexts, requests[numbers[0]].args[1]), strict=True))
        return [found[number] for number in range(len(requests))]

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(settings, _MAX_NEW_TOKENS))
        until = handle_stop_sequences(options.pop("until"), eos=None)
        until = [text for text in until if text]
        length = options.pop("max_gen_toks")
        drawn = {}
        if options.pop("do_sample"):
            drawn = {"temperature": 1.0, **{name: options.pop(name) for name in _DRAWN & options.keys()}}
        unknown = options.keys() - _DRAWN
        if unknown:
            raise ValueError(f"generation_kwargs of a task: {sorted(unknown)} are not supported; leave them out")
        if length >= self.max_length:
            raise ValueError(f"a task generates {length} tokens, which do not fit into --max-length {self.max_length}")
        encoded = (self.tok_encode(context) or [self.prefix_token_id] for context in contexts)
        prompts = [ids[-(self.max_length - length) :] for ids in encoded]
        new = generate_ids(
            self.causal_lm,
            self.tokenizer,
            prompts,
            [length] * len(prompts),
            stop=until,
            batch_size=self.batch_size,
            kept=self._tokens,
            **drawn,
        )
        return [
            postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), until, None) for ids in new
        ]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt, one whose last turn is to be continued."""
        if self.add_empty_system and chat_history[0]["role"] != "system":
            chat_history = [{"role": "system", "content": ""}, *chat_history]
        text = self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the results."""
        return self.template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval calls requests made with a chat template."""
        return hashlib.sha256(f"{self.name} {self.template}".encode()).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """For the results."""
        return {
            "pretrained": self.name,
            "model_num_parameters": self.causal_lm.num_parameters(),
            "model_dtype": str(self.causal_lm.dtype),
        }


def _nothing(strings: tuple[str, str] | None) -> ValueError:
    return ValueError(f"a task asks for the likelihood of nothing: {strings!r} has no tokens to score; mend it")


@contextmanager
def packed(causal_lm: PreTrainedModel) -> Iterator[Policy]:
    """The model as a policy, which reads packed rows; afterwards as it was."""
    before = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(IMPLEMENTATION)
    try:
        yield Policy(causal_lm)
    finally:
        causal_lm.set_attn_implementation(before)
