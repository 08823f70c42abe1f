"""Tasks by name, from lm-eval's own files and the user's, and the run of lm-eval over them."""

import contextlib
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from notus.evaluation.open_llm.benchmarks import BY_TASK
from notus.evaluation.open_llm.model import NotusLM
from notus.runtime.distributed import is_main, main_first
from notus.runtime.process import first_line

_BOOTSTRAP = 100_000  # lm-eval's own number, for the standard errors of what is no mean
_SHOWN = 12


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
        manager.load(opened)  # refuses what is named twice
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
    hint = f"near it are {', '.join(near)}" if near else f"the leaderboard's are {', '.join(BY_TASK)}"
    return f"lm-eval has no task {name!r}, {hint}"


def _open(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets and task files raise errors of every kind
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"the task {name} or its data cannot be loaded ({reason})") from error
    if name in loaded.get("groups", {}):
        return [loaded["groups"][name]]
    return list(loaded["tasks"].values())


def set_shots(opened: Sequence[Task | Group]) -> None:
    """Give the seven benchmarks the number of examples that the leaderboard gave; other tasks have their own."""
    for item in opened:
        name = item.name if isinstance(item, Group) else item.task_name
        if name in BY_TASK:
            for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
                task.set_config(key="num_fewshot", value=BY_TASK[name].shots)


def evaluate(
    lm: NotusLM,
    manager: TaskManager,
    opened: list[Task | Group],
    *,
    num_fewshot: int | None,
    limit: int | None,
    chat: bool,
    multiturn: bool,
    system: str | None,
) -> dict[str, Any]:
    """Run lm-eval; collective. What it returns, on rank 0; {} on the others."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR if is_main() else logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if not is_main():  # its progress bars
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        results = simple_evaluate(
            model=lm,
            model_args={"pretrained": lm.name},
            tasks=opened,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=lm.batch_size,
            device=str(lm.device),
            bootstrap_iters=_BOOTSTRAP if is_main() else 0,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
            system_instruction=system,
        )
    return results or {}
