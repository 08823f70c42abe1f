"""EleutherAI's lm-evaluation-harness (`lm_eval`): its tasks, its view of a model, and its run.

Strings become tokens exactly as lm-eval's own class for transformers models (HFLM) makes them, which measured the
published figures. Every rank holds the whole model, since generation needs it so: then rows need no collectives, and a
rank waits for the others only at the end. lm-eval sees one process; requests are dealt to the ranks in here.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notus.evaluation.decoding import Decoding, KeptTokens, generate_ids
from notus.evaluation.open_llm.scoring import KeptScores, Text, score_texts
from notus.model.policy import Policy
from notus.model.verify import PathChoice, make_policy
from notus.runtime.distributed import is_main, main_first
from notus.runtime.process import first_line

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # (context, continuation), then both as ids
_DRAWN = {"temperature", "top_p", "top_k"}
_MAX_NEW_TOKENS = 256  # where a task names none; lm-eval's
_BOOTSTRAP = 100_000  # lm-eval's own number, for the standard errors of what is no mean
_SHOWN = 12  # similar names of tasks


class NotusLM(TemplateLM):
    """A causal LM for lm-eval."""

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        path: PathChoice,
        max_length: int,
        tokens_per_row: int | None,
        batch_size: int,
        kept: Path,
        identity: str,
        template: str | None = None,
    ) -> None:
        """Wrap a model that is whole on every rank, in evaluation mode.

        `path` is how it is computed. Longer texts than `max_length` tokens lose their
        beginning. `tokens_per_row` bounds a forward pass; None: 4096,
        or the longest text's. `batch_size` completions are generated at a time. The folder `kept` holds what is done,
        and `identity` says of which weights. `template` is Jinja text, for tasks run with a chat template.
        """
        super().__init__()
        self.causal_lm, self.tokenizer, self.name, self.path = causal_lm, tokenizer, name, path
        self.max_length, self.tokens_per_row, self.batch_size = max_length, tokens_per_row, batch_size
        self.template = template
        self._device = causal_lm.device
        self._scores = KeptScores(kept / "log-likelihoods", identity)
        self._tokens = KeptTokens(kept / "generations", identity)

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a string without context: BOS, or EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @functools.cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize, with the special tokens that the tokenizer adds unless the string begins with BOS itself."""
        if add_special_tokens is None and string.startswith(self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations after their contexts, and whether each is the likeliest one."""
        for request in requests:
            if request.args == ("", ""):  # lm-eval would look for its first token
                raise _nothing(request.args)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **kwargs: Any) -> list[tuple[float, bool]]:
        texts = [self._text(*request) for request in requests]
        with as_policy(self.causal_lm, self.path) as policy:
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
        """Return log-likelihoods of whole strings, cut into windows that do not overlap in what they score.

        As in lm-eval's `HFLM`, a tokenizer that adds BOS has it twice: the first window is [BOS, BOS, text], and the
        log-prob of the second BOS is part of the sum. So the perplexities are comparable with those that others
        publish, but higher than those of the text alone.
        """
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
        """Return completions, cut before the first of a task's `until`."""
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
            Decoding(batch_size=self.batch_size, **drawn),
            stop=until,
            kept=self._tokens,
        )
        return [
            postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), until, None) for ids in new
        ]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt, one whose last turn is to be continued."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template, for the results."""
        return self.template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Return what lm-eval calls requests made with a chat template."""
        return hashlib.sha256(f"{self.name} {self.template}".encode()).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model."""
        return {
            "pretrained": self.name,
            "model_num_parameters": self.causal_lm.num_parameters(),
            "model_dtype": str(self.causal_lm.dtype),
        }


def _nothing(strings: tuple[str, str] | None) -> ValueError:
    return ValueError(
        f"a task asks for the likelihood of nothing: {strings!r} has no tokens to score; correct the task"
    )


@contextlib.contextmanager
def as_policy(causal_lm: PreTrainedModel, path: PathChoice) -> Iterator[Policy]:
    """The model as a policy, which reads packed rows; afterwards as it was."""
    before = causal_lm.config._attn_implementation
    causal_lm.set_attn_implementation(path.implementation)
    try:
        yield make_policy(causal_lm, path)
    finally:
        causal_lm.set_attn_implementation(before)


def open_tasks(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[Task | Group]]:
    """Load tasks and groups, each with its data; a wildcard stands for many.

    Raises:
        ValueError: a name that nothing has, with those near it; or a task whose files or data cannot be loaded.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path}: there is no such folder; name the one of your task files")
    manager = _manager(names, include_path)
    matches = {name: sorted(manager.match_tasks([name])) for name in names}
    wrong = [_near(manager, name) for name, found in matches.items() if not found]
    if wrong:
        raise ValueError(
            f"--tasks: {'; '.join(wrong)}; `lm-eval ls tasks` lists all {len(manager.all_tasks)}, --include-path names "
            "a folder of your own"
        )
    found = list(dict.fromkeys(task for name in names for task in matches[name]))
    opened = main_first(lambda: [task for name in found for task in _open(manager, name)])
    try:
        manager.load(opened)  # raises for what is named twice
    except ValueError as error:
        raise ValueError(f"--tasks: {error}") from error
    return manager, opened


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """The user's files alone if all tasks are there: lm-eval's own are many thousand, and take a while to read."""
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _near(manager: TaskManager, name: str) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=_SHOWN, cutoff=0.6)
    return f"lm-eval has no task {name!r}" + (f", near it are {', '.join(near)}" if near else "")


def _open(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets and task files raise errors of every kind
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"the task {name} or its data cannot be loaded ({reason})") from error
    if name in loaded.get("groups", {}):
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


def set_shots(opened: Sequence[Task | Group], shots: Mapping[str, int]) -> None:
    """Set the number of examples in the prompt of the tasks and groups that `shots` names."""
    for item in opened:
        number = shots.get(name_of(item))
        if number is not None:
            for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
                task.set_config(key="num_fewshot", value=number)


def name_of(item: Task | Group) -> str:
    """Return lm-eval's name of a task or group."""
    return str(item.name if isinstance(item, Group) else item.task_name)


def evaluate(lm: NotusLM, manager: TaskManager, opened: list[Task | Group], args: argparse.Namespace) -> dict[str, Any]:
    """Run lm-eval as the suite's `args` say, a collective, and return its results on rank 0; {} on the others."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR if is_main() else logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if not is_main():  # its progress bars
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        results = simple_evaluate(
            model=lm,
            model_args={"pretrained": lm.name},
            tasks=opened,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=lm.batch_size,
            device=str(lm.device),
            bootstrap_iters=_BOOTSTRAP if is_main() else 0,
            log_samples=False,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.fewshot_as_multiturn is not False,
            system_instruction=args.system_instruction,
        )
    return results or {}
