"""`python -m notus curate`: UltraFeedback records from files or the hub -> a file of preference pairs, or of lists.

One pass, one record in memory at a time (a .json file is read whole), pairs and lists in the order of the records.
The rule is in `ultrafeedback.py`, the one that finds the questions of benchmarks in `decontamination.py`.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from notus.curation.decontamination import DEFAULT_NGRAM
from notus.curation.ultrafeedback import REJECTED, RULES, SCHEMAS, Curator, ListCurator
from notus.data.sources import SUFFIXES, Placed, is_hub_id, read_file, read_hub
from notus.runtime.files import replacing

COLUMNS = ("source", "instruction", "completions")
PROMPT_KEYS = ("prompt", "question", "instruction")
_OF_PAIRS = ("rejected", "schema", "seed", "keep_identical")  # options that have no meaning for lists
_OR_KEYS = " or ".join(PROMPT_KEYS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "input", type=os.path.expanduser, help="records: .jsonl, .json or .parquet, a folder of them, or a hub id"
    )
    parser.add_argument(
        "output", type=os.path.expanduser, help="the pairs or lists: a .jsonl or .parquet file, replaced when complete"
    )
    parser.add_argument(
        "--listwise",
        action="store_true",
        help="write all scored completions of a record with their ratings, as one row, for losses of lists",
    )
    parser.add_argument("--by", choices=RULES, default="ratings", help="score that ranks (default: ratings)")
    parser.add_argument(
        "--rejected",
        choices=REJECTED,
        help="what the rejected response is drawn from: strictly lower scores, or any other, ties included "
        "(default: lower; --by overall_score --rejected any is Zephyr's rule)",
    )
    parser.add_argument("--schema", choices=SCHEMAS, help="columns of a pair (default: v1)")
    parser.add_argument("--seed", type=int, help="of the rejected response's draw (default: 42)")
    parser.add_argument(
        "--decontaminate",
        type=os.path.expanduser,
        metavar="PROMPTS_FILE",
        help="drop the prompts that are, or contain, a question on this list: a .txt file, one a line, or a .jsonl, "
        f".json or .parquet file of strings or of objects with {_OR_KEYS}",
    )
    parser.add_argument(
        "--ngram",
        type=int,
        metavar="N",
        help="find a question of N or more words in a prompt by the N-grams they share, which must cover more than "
        f"half of it; shorter ones as a whole (default: {DEFAULT_NGRAM}; needs --decontaminate)",
    )
    parser.add_argument(
        "--drop-source",
        metavar="SOURCE",
        action="append",
        default=[],
        help="drop the records of this source; may be given again (the cleaned release dropped truthful_qa)",
    )
    parser.add_argument(
        "--min-rating",
        type=int,
        choices=(0, 1),
        default=1,
        help="lowest valid rating (default: 1; openbmb/UltraFeedback as published holds a few zeros)",
    )
    parser.add_argument(
        "--keep-identical",
        action="store_const",
        const=True,
        help="keep pairs whose two responses are the same text, as the original rule does; training drops them",
    )
    parser.add_argument("--split", help="of a hub dataset (default: train)")


def run(args: argparse.Namespace) -> int:
    """Curate as `args` say, print the report, return 0.

    Raises ValueError or OSError with a message for the user; the output is then as it was before.
    """
    output = Path(args.output)
    _check_output(output, args.input)
    if args.ngram is not None and not args.decontaminate:
        raise ValueError(f"--ngram {args.ngram} has no effect without --decontaminate; give both or neither")
    curator = _curator(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        with temporary.open("wb") as file:
            write_rows(file, curator.rows(read_records(args.input, args.split)), output.suffix)
        if not curator.report.made:
            print(curator.report)
            kind = "list" if args.listwise else "pair"
            raise ValueError(f"{args.input}: no {kind} is left, for the reasons above; {output} is not written")
    print(curator.report)
    print(f"wrote {output}")
    return 0


def _curator(args: argparse.Namespace) -> Curator | ListCurator:
    """What turns records into rows. Raises ValueError for options of pairs beside --listwise."""
    decontaminate = read_prompts(Path(args.decontaminate)) if args.decontaminate else ()
    ngram = DEFAULT_NGRAM if args.ngram is None else args.ngram
    if args.listwise:
        of_pairs = [name for name in _OF_PAIRS if getattr(args, name) is not None]
        if of_pairs:
            option = of_pairs[0].replace("_", "-")
            raise ValueError(f"--{option} has no effect with --listwise, which keeps all scored completions")
        return ListCurator(
            by=args.by,
            decontaminate=decontaminate,
            ngram=ngram,
            drop_sources=args.drop_source,
            min_rating=args.min_rating,
        )
    return Curator(
        by=args.by,
        rejected=Curator.rejected if args.rejected is None else args.rejected,
        schema=Curator.schema if args.schema is None else args.schema,
        seed=Curator.seed if args.seed is None else args.seed,
        decontaminate=decontaminate,
        ngram=ngram,
        drop_sources=args.drop_source,
        min_rating=args.min_rating,
        keep_identical=args.keep_identical is not None,
    )


def read_records(source: str, split: str | None = None) -> Iterator[Placed]:
    """Yield (place, record) of every record of a file, of the files of a folder, or of a hub dataset's split.

    Raises ValueError, naming file and line, for what cannot be read and for a file without records.
    """
    path = Path(source)
    if not path.exists() and "/" in source and is_hub_id(source):
        yield from read_hub(source, split or "train", COLUMNS)
        return
    if split is not None:
        raise ValueError(f"--split {split} chooses from a hub dataset, but {source} is a path; leave it out")
    for file in _files(path):
        empty = True
        try:
            for placed in read_file(file, COLUMNS):
                empty = False
                yield placed
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error
        if empty:
            raise ValueError(f"{file}: the file holds no records; give UltraFeedback records, or remove it")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; check the path")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file; name another")
    return files


def read_prompts(path: Path) -> list[str]:
    """The prompts of a list: a text file with one a line, or entries of a data file, strings or objects.

    Raises ValueError, naming file and line, for an entry that is neither, and for an empty list.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; --decontaminate takes a list of prompts")
    if path.suffix in SUFFIXES:
        prompts = [_prompt(value, place) for place, value in read_file(path)]
    elif path.suffix in ("", ".txt"):
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
        prompts = [line for line in lines if line.strip()]
    else:
        raise ValueError(f"{path}: a list of prompts is a .txt, {', '.join(SUFFIXES)} file; convert it")
    if not prompts:
        raise ValueError(f"{path}: the list holds no prompts; leave --decontaminate out, or fill it")
    return prompts


def _prompt(value: Any, place: str) -> str:
    if isinstance(value, dict):
        value = next((value[key] for key in PROMPT_KEYS if key in value), None)
    if not isinstance(value, str):
        raise ValueError(f"{place}: not a prompt; give a string or an object with {_OR_KEYS}")
    return value


def _check_output(output: Path, source: str) -> None:
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{output}: the output's form follows its suffix; name it .jsonl or .parquet")
    if output.is_dir():
        raise ValueError(f"{output}: there is a folder of that name; choose another")
    taken = [path for path in (output, output.parent) if path.exists()]
    if Path(source).exists() and any(path.samefile(source) for path in taken):
        raise ValueError(f"{output}: the output would be part of the input {source}; choose another place")


def write_rows(file: IO[bytes], rows: Iterable[dict[str, Any]], suffix: str) -> None:
    """Write `rows`, all with the same keys, to a binary file as JSON lines or, for `.parquet`, Parquet."""
    if suffix == ".parquet":
        _write_parquet(file, iter(rows))
        return
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_parquet(file: IO[bytes], rows: Iterator[dict[str, Any]]) -> None:
    parts = iter(lambda: list(islice(rows, 4096)), [])
    tables = (pyarrow.Table.from_pylist(part) for part in parts)  # no column is ever null: all have the same types
    if (first := next(tables, None)) is None:
        return
    with pyarrow.parquet.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
