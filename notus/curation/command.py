"""`python -m notus curate`: UltraFeedback records from files or the hub -> a file of preference pairs, or of lists.

One record in memory at a time (a .json file is read whole), pairs and lists in the order of the records. The first
record whose prompt is more than one user turn starts the pass anew, with rows that hold conversations: so all rows have
the same form. The first one of plain text does so, too, with rows that hold it. The rule is in `ultrafeedback.py`, the
one that finds the questions of benchmarks in `decontamination.py`, the draw of rows of earlier outputs in
`old_rows.py`.
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
from notus.curation.old_rows import (
    CLEANED,
    LISTS,
    OF_TEMPLATE,
    V1,
    Drawn,
    Form,
    draw_old,
    form_of_files,
    is_plain_text,
    row_digest,
)
from notus.curation.ultrafeedback import (
    REJECTED,
    RULES,
    SCHEMAS,
    TOO_FEW,
    ConversationError,
    Curator,
    ListCurator,
    PlainTextError,
)
from notus.data.sources import SUFFIXES, Placed, is_hub_id, read_file, read_hub
from notus.runtime.command_line import called_as
from notus.runtime.files import replacing

COLUMNS = ("source", "instruction", "completions")
MORE_COLUMNS = (
    "messages",
    "tools",
    "chat_template_kwargs",
    "plain_text",
    "rated",
)  # of records that `notus rate` wrote
PROMPT_KEYS = ("prompt", "question", "instruction")
_OF_PAIRS = ("rejected", "schema", "keep_identical")  # options that have no meaning for lists
_PLAIN_KEYS = ("role", "content")
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
    parser.add_argument(
        "--by",
        choices=RULES,
        default="ratings",
        help="score that ranks: the mean of the aspects' ratings, the critique's score, or a reward model's (default: "
        "ratings)",
    )
    parser.add_argument(
        "--rejected",
        choices=REJECTED,
        help="what the rejected response is drawn from: strictly lower scores, or any other, ties included "
        "(default: lower; --by overall_score --rejected any is Zephyr's rule)",
    )
    parser.add_argument(
        "--schema",
        choices=SCHEMAS,
        help="columns of a pair (default: v1; cleaned where a prompt is not one user turn)",
    )
    parser.add_argument("--seed", type=int, help="of the draws, of rejected responses and old rows (default: 42)")
    parser.add_argument(
        "--old",
        nargs="+",
        type=os.path.expanduser,
        default=[],
        metavar="FILE",
        help="earlier outputs of this command; some of their rows are added, for training in rounds",
    )
    parser.add_argument(
        "--old-share",
        type=_share,
        metavar="S",
        help="share of the output's rows that are old ones, above 0 and below 1; drawn without replacement",
    )
    _add_filters(parser)
    parser.add_argument("--split", help="of a hub dataset (default: train)")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    """Declare what leaves records, ratings or pairs out."""
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


def run(args: argparse.Namespace) -> int:
    """Curate as `args` say, print the report, return 0.

    Raises ValueError or OSError with a message for the user; the output is then as it was before.
    """
    output = Path(args.output)
    _check_output(output, args.input, args.old)
    if args.ngram is not None and not args.decontaminate:
        raise ValueError(f"--ngram {args.ngram} has no effect without --decontaminate; give both or neither")
    if bool(args.old) != (args.old_share is not None):
        raise ValueError("--old FILE and --old-share S need each other; give both or neither")
    form = _form(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        while True:
            try:
                curator, drawn = _write(args, form, temporary, output.suffix)
                break
            except PlainTextError as error:
                form = _for_plain_text(args, form, error)
            except ConversationError as error:
                form = _for_conversations(args, error)
        report = curator.report
        if not report.made:
            print(report)
        if report.same_score is not None:
            raise ValueError(f"{args.input}: {report.same_score}; {output} is not written")
        if not report.made:
            raise ValueError(f"{args.input}: {_why_nothing(args, curator)}; {output} is not written")
    print(report)
    if form.conversations:
        print(f"  prompts are lists of messages, with tools and chat_template_kwargs: {form.name}")
    if drawn is not None:
        print(f"  {drawn}")
    print(f"wrote {output}")
    return 0


def _why_nothing(args: argparse.Namespace, curator: Curator | ListCurator) -> str:
    if not curator.report.scored and curator.report.dropped[TOO_FEW]:
        others = " or ".join(f"--by {rule}" for rule in RULES if rule != args.by)
        return (
            f"no completion has a score by {args.by}; rate the records first, as with `{called_as('rate')}`, or rank "
            f"them by another score with {others}"
        )
    return f"no {'list' if args.listwise else 'pair'} is left, for the reasons above"


def _form(args: argparse.Namespace) -> Form:
    """The form of the output, before any record asks for another: that of the old rows, if it is wider.

    Raises ValueError for old rows that the output cannot hold.
    """
    asked = Form(LISTS if args.listwise else CLEANED if args.schema == "cleaned" else V1, False)
    if not args.old:
        return asked
    old = form_of_files([Path(name) for name in args.old])
    if (old.columns == LISTS) != args.listwise:
        raise ValueError(f"--old: the old rows are {old.name}, and the new ones are {asked.name}; they do not mix")
    if args.schema == "v1" and old.columns == CLEANED:
        raise ValueError(f"--schema v1 cannot hold the old rows, which are {old.name}; leave --schema out")
    return Form(old.columns if asked.columns == V1 else asked.columns, old.conversations)


def _for_conversations(args: argparse.Namespace, found: ConversationError) -> Form:
    """The form for prompts of more than one user turn. ValueError if the user has asked for another."""
    if args.schema == "v1":
        place = str(found).partition(": ")[0]
        raise ValueError(
            f"{place}: the prompt has messages, tools or chat_template_kwargs, which --schema v1 cannot hold; choose "
            "--schema cleaned, or leave it out"
        ) from found
    if args.listwise:
        return Form(LISTS, True)
    if args.schema is None:
        print("note: prompts of more than one user turn need --schema cleaned, which is taken")
    return Form(CLEANED, True)


def _for_plain_text(args: argparse.Namespace, form: Form, found: PlainTextError) -> Form:
    """The form for prompts that were continued as text. ValueError if the user has asked for another."""
    if args.schema == "v1":
        place = str(found).partition(": ")[0]
        raise ValueError(
            f"{place}: the prompt is plain text, of which --schema v1 would make a user turn; choose --schema cleaned, "
            "or leave it out"
        ) from found
    print("note: prompts of plain text need --schema cleaned, which is taken")
    return Form(CLEANED, form.conversations)


def _write(args: argparse.Namespace, form: Form, path: Path, suffix: str) -> tuple[Curator | ListCurator, Drawn | None]:
    """Write the whole output to `path`. Returns what has counted the records, and which old rows there are.

    Raises ConversationError or PlainTextError for a prompt that `form` cannot hold.
    """
    curator = _curator(args, form)
    drawn = None

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal drawn
        new = []
        for row in curator.rows(read_records(args.input, args.split)):
            if args.old:
                new.append(row_digest(row))
            yield row
        if args.old and new:
            seed = Curator.seed if args.seed is None else args.seed
            old, drawn = draw_old([Path(name) for name in args.old], form, args.old_share, seed, new)
            yield from old()

    with path.open("wb") as file:
        write_rows(file, rows(), suffix)
    return curator, drawn


def _curator(args: argparse.Namespace, form: Form) -> Curator | ListCurator:
    """What turns records into rows. Raises ValueError for options of pairs beside --listwise."""
    decontaminate = read_prompts(Path(args.decontaminate)) if args.decontaminate else ()
    ngram = DEFAULT_NGRAM if args.ngram is None else args.ngram
    if args.listwise:
        of_pairs = [name for name in (*_OF_PAIRS, *(() if args.old else ("seed",))) if getattr(args, name) is not None]
        if of_pairs:
            option = of_pairs[0].replace("_", "-")
            raise ValueError(f"--{option} has no effect with --listwise, which keeps all scored completions")
        return ListCurator(
            by=args.by,
            decontaminate=decontaminate,
            ngram=ngram,
            drop_sources=args.drop_source,
            min_rating=args.min_rating,
            conversations=form.conversations,
        )
    return Curator(
        by=args.by,
        rejected=Curator.rejected if args.rejected is None else args.rejected,
        schema="cleaned" if form.columns == CLEANED else "v1",
        seed=Curator.seed if args.seed is None else args.seed,
        decontaminate=decontaminate,
        ngram=ngram,
        drop_sources=args.drop_source,
        min_rating=args.min_rating,
        keep_identical=args.keep_identical is not None,
        conversations=form.conversations,
    )


def _share(text: str) -> float:
    """A number above 0 and below 1, for argparse."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def read_records(source: str, split: str | None = None) -> Iterator[Placed]:
    """Yield (place, record) of every record of a file, of the files of a folder, or of a hub dataset's split.

    Raises ValueError, naming file and line, for what cannot be read and for a file without records.
    """
    path = Path(source)
    if not path.exists() and "/" in source and is_hub_id(source):
        yield from read_hub(source, split or "train", COLUMNS, also=MORE_COLUMNS)
        return
    if split is not None:
        raise ValueError(f"--split {split} chooses from a hub dataset, but {source} is a path; leave it out")
    for file in _files(path):
        empty = True
        try:
            for placed in read_file(file, COLUMNS, also=MORE_COLUMNS):
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


def _check_output(output: Path, source: str, old: list[str]) -> None:
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{output}: the output's form follows its suffix; name it .jsonl or .parquet")
    if output.is_dir():
        raise ValueError(f"{output}: there is a folder of that name; choose another")
    taken = [path for path in (output, output.parent) if path.exists()]
    if Path(source).exists() and any(path.samefile(source) for path in taken):
        raise ValueError(f"{output}: the output would be part of the input {source}; choose another place")
    if output.exists() and any(Path(name).exists() and output.samefile(name) for name in old):
        raise ValueError(f"{output}: the output is one of the files of --old; choose another place")


def write_rows(file: IO[bytes], rows: Iterable[dict[str, Any]], suffix: str) -> None:
    """Write `rows`, all with the same keys, to a binary file as JSON lines or, for `.parquet`, Parquet.

    Parquet has one type for a column. So it gets `tools` and `chat_template_kwargs` as JSON, which training reads as
    well. Raises ValueError for a message that has more than role and content, and for plain text beside messages.
    """
    if suffix == ".parquet":
        _write_parquet(file, map(_for_parquet, _of_one_type(rows)))
        return
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _of_one_type(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    first = None
    for row in rows:
        is_text = is_plain_text(row)
        first = is_text if first is None else first
        if is_text != first:
            raise ValueError(
                "some rows are plain text and some are messages, for which Parquet has no common type; name the output "
                ".jsonl"
            )
        yield row


def _for_parquet(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    for turn in prompt if isinstance(prompt, list) else ():
        more = [key for key, value in turn.items() if key not in _PLAIN_KEYS and value is not None]
        if more or not isinstance(turn.get("content"), str):
            what = f"'{more[0]}'" if more else "content that is no string"
            raise ValueError(f"a prompt has a turn with {what}, for which Parquet has no type; name the output .jsonl")
    as_json = {key: json.dumps(row[key], ensure_ascii=False) for key in OF_TEMPLATE if row.get(key) is not None}
    return {**row, **as_json}


def _write_parquet(file: IO[bytes], rows: Iterator[dict[str, Any]]) -> None:
    parts = iter(lambda: list(islice(rows, 4096)), [])
    if (first := next(parts, None)) is None:
        return
    schema = pyarrow.Table.from_pylist(first).schema
    for number, field in enumerate(schema):
        if pyarrow.types.is_null(field.type):  # a column of strings that is null so far
            schema = schema.set(number, field.with_type(pyarrow.string()))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for part in (first, *parts):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
