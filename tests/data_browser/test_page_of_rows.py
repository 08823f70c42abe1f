"""The page as a file: what it holds is the rows, exactly, and none of it can run."""

import base64
import gzip
import hashlib
import html
import json
import re

import numpy as np
import pytest
from rows_of_data import LABELLED, LISTS, PAIR, load_data, write_config

from notus import __main__ as entry
from notus.data_browser.page import BLOCK_ROWS, render

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def numbered(count, **more):
    return [{**PAIR, "prompt": f"Sea {number}", **more} for number in range(count)]


@pytest.mark.usefixtures("device")
def test_lists_of_different_lengths_and_labels_reach_the_page(tmp_path, model_folder):
    data, page = page_of(write_config(tmp_path, model_folder, LISTS, dpo__loss_type="plackett_luce"))
    columns, head = json.loads(element(page, "columns")), head_of(page)
    assert head["branches"] == ["completion 1", "completion 2", "completion 3"]
    assert [len(lengths) for lengths in columns["lengths"]] == [4, 3]
    assert columns["ratings"] == [[4.2, 3, 1], [2, 2]]
    assert columns["label"] == [None, None]
    content = element(page, "block-0")
    lengths = [[len(row.trunk), *(len(branch.ids) for branch in row.branches)] for row in map(data.row, range(2))]
    ids = np.frombuffer(content[: sum(map(sum, lengths)) * head["idBytes"]], np.uint16)
    parts = [part for row in map(data.row, range(2)) for part in (row.trunk, *(branch.ids for branch in row.branches))]
    assert np.array_equal(ids, np.concatenate(parts))
    assert "lists of rated completions" in page
    _, page = page_of(write_config(tmp_path, model_folder, LABELLED, dpo__loss_type="kto"))
    assert json.loads(element(page, "columns"))["label"] == [True, False]
    assert "labelled completions" in page


def page_of(config, shown=None):
    data = load_data(config)
    return data, "".join(render(data, range(len(data)) if shown is None else shown))


def element(page, name):
    packed = re.search(rf'<script type="application/gzip" id="{name}">([^<]*)</script>', page)[1]
    return gzip.decompress(base64.b64decode(packed))


def head_of(page):
    return json.loads(re.search(r'<script type="application/json" id="head">(.*?)</script>', page)[1])


@pytest.mark.usefixtures("device")
def test_it_holds_every_token_and_mask(tmp_path, model_folder):
    count = BLOCK_ROWS + 3
    data, page = page_of(write_config(tmp_path, model_folder, numbered(count)))
    columns, head = json.loads(element(page, "columns")), head_of(page)
    row = 0
    for number in range(2):
        content = element(page, f"block-{number}")
        lengths = columns["lengths"][number * BLOCK_ROWS : (number + 1) * BLOCK_ROWS]
        tokens = sum(map(sum, lengths))
        ids = np.frombuffer(content[: tokens * head["idBytes"]], np.uint16)
        masks = np.frombuffer(content[tokens * head["idBytes"] :], np.uint8)
        for trunk, *branches in lengths:
            expected = data.row(row)
            parts = [expected.trunk, *(branch.ids for branch in expected.branches)]
            assert np.array_equal(ids[: trunk + sum(branches)], np.concatenate(parts))
            expected_mask = np.concatenate([branch.mask for branch in expected.branches])
            assert np.array_equal(masks[: sum(branches)], expected_mask)
            ids, masks, row = ids[trunk + sum(branches) :], masks[sum(branches) :], row + 1
        assert len(ids) == len(masks) == 0
    assert row == count


@pytest.mark.usefixtures("device")
def test_the_pieces_are_the_bytes_of_every_token_that_occurs(tmp_path, model_folder):
    data, page = page_of(write_config(tmp_path, model_folder, [{**PAIR, "prompt": "héllo 🙂"}]))
    pieces = json.loads(element(page, "pieces"))
    text = dict(zip(pieces["ids"], map(base64.b64decode, pieces["bytes"]), strict=True))
    row = data.row(0)
    assert b"".join(text[token] for token in row.trunk.tolist()).decode() == "<s>héllo 🙂"
    special = {token for token, is_special in zip(pieces["ids"], pieces["special"], strict=True) if is_special}
    assert special == {1, 2}


@pytest.mark.usefixtures("device")
def test_a_large_vocabulary_takes_four_bytes(tmp_path, model_folder, monkeypatch):
    config = write_config(tmp_path, model_folder, [PAIR])
    monkeypatch.setattr("notus.data_browser.page._largest_id", lambda data: 1 << 16)
    data, page = page_of(config)
    row = data.row(0)
    ids = np.concatenate([row.trunk, *(branch.ids for branch in row.branches)])
    assert element(page, "block-0")[: 4 * len(ids)] == ids.astype("<u4").tobytes()
    assert head_of(page)["idBytes"] == 4


@pytest.mark.usefixtures("device")
def test_what_rows_say_stays_text(tmp_path, model_folder):
    _, page = page_of(write_config(tmp_path, model_folder, numbered(2, source=EVIL, chosen=EVIL)))
    assert EVIL not in page
    assert head_of(page)["sources"] == [EVIL]
    # one script that runs, allowed by its digest
    assert len(re.findall(r"<script>", page)) == 1
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = html.unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1])
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_it_holds_the_rows_that_were_asked_for(tmp_path, model_folder, capsys, monkeypatch):
    write_config(tmp_path, model_folder, numbered(5))
    path = tmp_path / "pages" / "rows.html"
    monkeypatch.setenv("HOME", str(tmp_path))
    for words, count in (([], 5), (["-n", "2"], 2), (["-n", "0"], 5)):  # an earlier page is replaced
        assert entry.main(["data", "~/config.yaml", "--html", "~/pages/rows.html", *words]) == 0
        assert f"({count} rows" in capsys.readouterr().out
        assert len(json.loads(element(path.read_text(), "columns"))["id"]) == count


@pytest.mark.usefixtures("device")
def test_previews_leave_out_what_the_template_writes_in_all_rows(tmp_path, model_folder):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for number in range(5)
    ]
    rows[3]["prompt"][:0] = [{"role": "system", "content": "Be kind."}]
    _, page = page_of(write_config(tmp_path, model_folder, rows))
    assert json.loads(element(page, "columns"))["preview"] == [f"Question {number}?" for number in range(5)]
