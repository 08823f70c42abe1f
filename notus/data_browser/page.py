"""One HTML file to browse the rows: search, filter, compare, mark. It loads nothing and needs no network.

The page holds the rows as token ids, and the bytes of each token once, from which the browser makes the texts: so text
and tokens cannot disagree, and a row takes about as much as its text does when it is compressed. Each of these is
gzip, in base64, in a script element of its own that no browser runs:

    columns   JSON: what is known of every row, column by column
    pieces    JSON: {ids, special, bytes}: for each token that occurs, its id, whether it is special, and its bytes
    block-N   rows N·BLOCK_ROWS and following: their token ids, uint16 or uint32, trunk and branches end to end; then a
              byte for each token of a branch, 1 where it is learned

A block is read when one of its rows is shown or searched. All that a row says reaches the page as text.
"""

import base64
import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from notus.data.display import Pieces
from notus.data.formats import Task
from notus.data_browser.rows import Data, Row, digest
from notus.data_browser.terminal import report_lines
from notus.evaluation import html
from notus.runtime.files import replacing

GENERATOR = '<meta name="generator" content="notus data">'  # marks a file as an earlier page
HERE = Path(__file__).parent
BLOCK_ROWS = 256
PREVIEW = 140  # characters of a row in the list
_PREVIEW_TOKENS = 64
_KINDS: dict[Task, str] = {
    "dpo": "preference pairs",
    "sft": "demonstrations",
    "lists": "lists of rated completions",
    "labels": "labelled completions",
}
_JUDGED_BY = 200  # the first rows show what the template writes in all of them


def check_page(path: Path, config: str) -> None:
    """Make the folder of a page, before the work that fills it. Raises ValueError and OSError as `html.check_page`."""
    remedy = "choose another place with --html"
    html.check_page(path, kind="page of rows", generator=GENERATOR, not_over=config, remedy=remedy)


def write_page(path: Path, data: Data, shown: Sequence[int]) -> int:
    """Write a page of these rows, in this order, and return its size in bytes. Raises OSError; see `disk_error`."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        for part in render(data, shown):
            file.write(part)
    return path.stat().st_size


def render(data: Data, shown: Sequence[int]) -> Iterator[str]:
    """Yield the page in parts, of which the last holds what is known only once all rows were seen."""
    rows, used = _Columns(data), np.zeros(0, bool)
    script = html.script((HERE / "page.js").read_text(encoding="utf-8"))
    yield (
        html.environment(HERE)
        .get_template("page.html.j2")
        .render(
            generator=Markup(GENERATOR),
            policy=html.security_policy([script]),
            style=html.style(HERE / "page.css"),
            data=data,
            report="\n".join(report_lines(data, bars=False)),
            names=data.names,
            kind=_KINDS[data.task],
            shown=len(shown),
        )
    )
    width = np.uint16 if len(data.tokenizer) <= 1 << 16 and _largest_id(data) < 1 << 16 else np.uint32
    for number, start in enumerate(range(0, len(shown), BLOCK_ROWS)):
        block = [data.row(index) for index in shown[start : start + BLOCK_ROWS]]
        ids = np.concatenate([part for row in block for part in (row.trunk, *(branch.ids for branch in row.branches))])
        masks = np.concatenate([branch.mask for row in block for branch in row.branches])
        for row in block:
            rows.add(row)
        used = _union(used, ids)
        yield _element(f"block-{number}", ids.astype(width).tobytes() + masks.astype(np.uint8).tobytes())
    yield _element("pieces", _json(_pieces(data.pieces, np.flatnonzero(used))))
    yield _element("columns", _json(rows.columns))
    yield f'<script type="application/json" id="head">{_escaped(_head(data, rows, width().itemsize))}</script>\n'
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _largest_id(data: Data) -> int:
    return max(data.tokenizer.get_vocab().values())


def _union(used: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mark `ids` in a table of those that occur."""
    size = int(ids.max(initial=0)) + 1
    if size > len(used):
        used = np.concatenate([used, np.zeros(size - len(used), bool)])
    used[ids] = True
    return used


class _Columns:
    """What is known of every row, as the page's script reads it."""

    def __init__(self, data: Data) -> None:
        self._data, self._sources, self._flags = data, dict[str, int](), dict[str, int]()
        self._ending, self._opening = _common_ending(data), ""
        self._opening = self._common_opening()
        names = ("index", "id", "place", "source", "ratings", "label", "margin", "lengths", "cut", "flags", "preview")
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    @property
    def sources(self) -> list[str]:
        """Their names, by the number that stands in the column."""
        return list(self._sources)

    @property
    def flags(self) -> list[str]:
        """Their names, by the bit that stands in the column."""
        return list(self._flags)

    def add(self, row: Row) -> None:
        """Add a row after the others."""
        values = {
            "index": row.index,
            "id": row.id,
            "place": row.place,
            "source": -1 if row.source is None else self._sources.setdefault(row.source, len(self._sources)),
            "ratings": row.ratings or 0,
            "label": row.label,
            "margin": row.margin,
            "lengths": [len(row.trunk), *(len(branch.ids) for branch in row.branches)],
            "cut": row.cut if any(row.cut) else 0,
            "flags": sum(1 << self._flags.setdefault(flag, len(self._flags)) for flag in set(row.flags)),
            "preview": self._preview(row.trunk),
        }
        for name, value in values.items():
            self.columns[name].append(value)

    def _preview(self, trunk: np.ndarray) -> str:
        """The beginning of a prompt's last turn."""
        return " ".join(self._last_turn(trunk).removeprefix(self._opening).split())[:PREVIEW]

    def _last_turn(self, trunk: np.ndarray) -> str:
        """What follows the prompt's last special token, but for the common ending; of a long turn the beginning."""
        turn = trunk[: len(trunk) - self._ending]
        special = np.flatnonzero(self._data.pieces.are_special(turn))
        turn = turn[special[-1] + 1 :] if len(special) and special[-1] + 1 < len(turn) else turn
        return self._data.pieces.text(turn[:_PREVIEW_TOKENS]).lstrip()

    def _common_opening(self) -> str:
        """The line that most last turns begin with, as the template names the user; "" if there is none."""
        examples = self._data.rows(np.arange(min(_JUDGED_BY, len(self._data))))
        lines = [self._last_turn(example.trunk).partition("\n") for example in examples]
        counted = Counter(line + end for line, end, _ in lines if end).most_common(1)
        return counted[0][0] if counted and len(lines) > 1 and counted[0][1] > len(lines) / 2 else ""


def _common_ending(data: Data) -> int:
    """How many tokens the template puts behind the last turn of a prompt, to judge by what the first ones end with.

    It begins with a special token, which closes the turn; what the users themselves write last is none.
    """
    trunks = [example.trunk[::-1] for example in data.rows(np.arange(min(_JUDGED_BY, len(data))))]
    length = min(map(len, trunks)) - 1  # of each prompt something is left
    if length < 1 or len(trunks) < 2:
        return 0
    differs = np.any([trunk[:length] != trunks[0][:length] for trunk in trunks], axis=0)
    shared = int(differs.argmax()) if differs.any() else length
    special = np.flatnonzero(data.pieces.are_special(trunks[0][:shared]))
    return int(special[-1]) + 1 if len(special) else 0


def _pieces(pieces: Pieces, used: np.ndarray) -> dict[str, list[Any]]:
    ids = used.tolist()
    return {
        "ids": ids,
        "special": [int(token in pieces.special) for token in ids],
        "bytes": [base64.b64encode(pieces[token]).decode() for token in ids],
    }


def _head(data: Data, rows: _Columns, id_bytes: int) -> dict[str, Any]:
    return {
        "digest": digest(data),
        "name": f"{Path(data.name).stem}-{data.split}",
        "branches": data.names,
        "sources": rows.sources,
        "flags": rows.flags,
        "idBytes": id_bytes,
        "blockRows": BLOCK_ROWS,
        "histograms": data.histograms,
        "ranked": data.margins is not None,
    }


def _element(name: str, content: bytes) -> str:
    packed = base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{packed}</script>\n'


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _escaped(tree: Any) -> str:
    """JSON in which no text can end the script element that holds it."""
    return json.dumps(tree).replace("<", "\\u003c")
