"""How large the house is, for one checkout or two side by side: `python tools/house.py [OLD_CHECKOUT] [NEW_CHECKOUT]`.

Prints a table: files and lines of each package under notus/, of benchmarks/ and of tests/; the median and the 90th
percentile of the lines of a function in notus/; how many files of notus/ a run of `train_dpo.py` imports, and how many
of them execute in one steady step. The last two come from a tiny run in a process of its own, with the checkout on the
path. The new checkout is by default the one of this file, which also makes the model and the pairs.
"""

import argparse
import ast
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIRST, STEPS = 3, 5  # the step that is watched begins after this many; steps of the run
TOGETHER = ("benchmarks", "tests")

Rows = dict[str, str]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT", help="the old one, and the new one")
    parser.add_argument("--watch", nargs=2, type=Path, help=argparse.SUPPRESS)  # config and output of the tiny run
    args = parser.parse_args(arguments)
    if args.watch:
        watch(Path.cwd(), *args.watch)
        return
    if len(args.checkouts) > 2:
        parser.error("at most two checkouts")
    checkouts = args.checkouts if len(args.checkouts) == 2 else [*args.checkouts, ROOT]
    print(table([measure(checkout.resolve()) for checkout in checkouts], [str(checkout) for checkout in checkouts]))


def measure(checkout: Path) -> Rows:
    """Every figure of a checkout, by its name."""
    if not (checkout / "train_dpo.py").is_file():
        raise SystemExit(f"{checkout} has no train_dpo.py: name a checkout of this project")
    rows = {f"{name}: files, lines": size(files) for name, files in packages(checkout).items()}
    lengths = sorted(length for file in files_of(checkout / "notus") for length in function_lengths(file))
    for name, share in (("median", 0.5), ("90th percentile", 0.9)):
        rows[f"notus: lines of a function, {name}"] = str(lengths[int(share * (len(lengths) - 1))])
    found = run(checkout)
    rows["train_dpo.py: files of notus imported"] = str(len(found["imported"]))
    rows["train_dpo.py: files of notus executed in a steady step"] = str(len(found["executed"]))
    return rows


def table(columns: list[Rows], names: list[str]) -> str:
    """A Markdown table with a column per checkout; a package that a checkout lacks has an empty cell."""
    keys = sorted({key for rows in columns for key in rows}, key=lambda key: (key.startswith("train_dpo"), key))
    lines = [
        ["", *names],
        ["---"] * (1 + len(names)),
        *([key, *(rows.get(key, "") for rows in columns)] for key in keys),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- files, lines, functions ----


def packages(checkout: Path) -> dict[str, list[Path]]:
    """Python files by package: each below notus/, the modules right in it, all of notus/, benchmarks/ and tests/."""
    notus = checkout / "notus"
    found = {"notus": files_of(notus), "notus/*.py": sorted(notus.glob("*.py"))}
    found |= {f"notus/{path.name}": files for path in sorted(notus.iterdir()) if (files := files_of(path))}
    return found | {name: files_of(checkout / name) for name in TOGETHER}


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.is_dir() else []


def size(files: list[Path]) -> str:
    return f"{len(files)}, {sum(len(file.read_text(encoding='utf-8').splitlines()) for file in files):,}"


def function_lengths(file: Path) -> Iterator[int]:
    """Lines of each function and method, nested ones too, without decorators."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


# ---- what a run imports and executes ----


def run(checkout: Path) -> dict[str, list[str]]:
    """Files of notus/ that a tiny DPO run imports, and those that execute in one of its later steps."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--watch", str(folder / "config.yaml"), str(folder / "found.json")]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if not (folder / "found.json").exists():
            raise SystemExit(f"{checkout}: the run ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
        found: dict[str, list[str]] = json.loads((folder / "found.json").read_text())
    return found


def make_inputs(folder: Path) -> None:
    """Write a toy model, a few pairs and a config."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from runs import settings, write_pairs
    from toys import toy_model_folder

    toy_model_folder(folder / "model")
    pairs = write_pairs(folder / "pairs.jsonl", 4 * STEPS)
    tree = settings(folder / "run", folder / "model", pairs, training__max_steps=STEPS)
    (folder / "config.yaml").write_text(json.dumps(tree))  # JSON is YAML


class Watcher:
    """Notes which files of a folder execute, in every thread, between two optimizer steps."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._steps, self._on = f"{folder}{os.sep}", 0, False
        self.files: set[str] = set()
        # Threads take a profiling function at their start only, so all have it from the beginning.
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def step(self, *_: Any) -> None:
        """An optimizer step has ended."""
        self._steps += 1
        self._on = self._steps == FIRST

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if not self._on:
            return
        self._add(frame)
        if event == "call" and frame.f_back is not None:  # the caller runs too, and may have begun before the watch
            self._add(frame.f_back)

    def _add(self, frame: FrameType) -> None:
        if frame.f_code.co_filename.startswith(self._folder):
            self.files.add(frame.f_code.co_filename)


def watch(checkout: Path, config: Path, output: Path) -> None:
    """Run `train_dpo.py` of the checkout here, and write what it imported and executed to `output`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    watcher, leave = Watcher(checkout / "notus"), os._exit
    register_optimizer_step_post_hook(watcher.step)

    def finish(code: int = 0) -> None:
        sys.setprofile(None)
        files = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
        imported = sorted({file for file in files if file.startswith(f"{checkout / 'notus'}{os.sep}")})
        if watcher.files:
            output.write_text(json.dumps({"imported": imported, "executed": sorted(watcher.files)}))
        leave(code)

    os._exit = finish  # type: ignore[assignment]  # runs may end so
    sys.path[:0] = [str(checkout)]
    sys.argv = ["train_dpo.py", str(config)]
    try:
        runpy.run_path(str(checkout / "train_dpo.py"), run_name="__main__")
    finally:
        finish()


if __name__ == "__main__":
    main()
