"""The page in a real browser: it shows exactly the rows, finds, compares and marks them, and runs nothing they say.

Skipped where there is no Chromium with its driver.
"""

import random
import time

import numpy as np
import pytest
from browsers import OVERFLOWS, colours, contrast, forget_logs, look, needs_browser, open_browser, requests_of
from rows_of_data import LABELLED, LISTS, load_data, write_config, write_rows
from runs import words
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from notus.data_browser.page import write_page
from notus.runtime.distributed import process_group

pytestmark = [needs_browser, pytest.mark.slow]

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
COUNT = 600
TEXTS = ("prompt-text", "side-0-text", "side-1-text")


def pair(prompt, chosen, rejected, **more):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def made_rows():
    generator = random.Random(0)
    rows = [
        pair(
            f"Question {number}: {words(generator, 3, 30)}", words(generator, 2, 60), words(generator, 2, 60),
            source=("web", "books", "code")[number % 3], score_chosen=4.0, score_rejected=1 + number % 4,
        )
        for number in range(COUNT)
    ]  # fmt: skip
    rows[1] = pair("Name an animal.", "The quick brown fox.", "The lazy brown dog.")
    rows[2] = pair(EVIL, f"It says {EVIL}", "Nothing 🙂 héllo 你好", source=EVIL)
    rows[3] = pair("Zanzibar?", "An island.", "A xylophone.", score_chosen=1.0, score_rejected=4.5)
    rows[4] = rows[5]
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """The folder of the pages, and the data that they show, by name."""
    folder = tmp_path_factory.mktemp("pages")
    with process_group():
        pairs = load_data(write_config(folder, model_folder, made_rows(), data__max_length=400))
        ranked = pairs.with_margins(np.sin(np.arange(COUNT)))
        write_page(folder / "pairs.html", pairs, range(COUNT))
        write_page(folder / "ranked.html", ranked, ranked.order)
        (folder / "sft").mkdir()
        rows = [{"prompt": "Sea:", "completion": " blue"}, {"prompt": "Sky:", "completion": " grey"}]
        single = load_data(write_config(folder / "sft", model_folder, rows))
        write_page(folder / "single.html", single, range(2))
        (folder / "lists").mkdir()
        lists = load_data(write_config(folder / "lists", model_folder, LISTS, dpo__loss_type="plackett_luce"))
        write_page(folder / "lists.html", lists, range(2))
        labelled = load_data(write_config(folder / "lists", model_folder, LABELLED, dpo__loss_type="kto"))
        write_page(folder / "labelled.html", labelled, range(2))
    return folder, {"pairs": pairs, "ranked": ranked, "single": single}


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


@pytest.fixture
def show(browser, made):
    """Open a page at a width and in a colour scheme; marks and logs of before are forgotten."""

    def at(name="pairs", *, width=1440, scheme="light"):
        look(browser, width=width, scheme=scheme)
        forget_logs(browser)
        browser.get((made[0] / f"{name}.html").as_uri())
        browser.execute_script("localStorage.clear()")
        browser.refresh()
        wait(browser)
        return browser

    return at


def wait(page):
    """Wait until the page has shown its first row."""
    WebDriverWait(page, 60).until(lambda driver: driver.execute_script("return document.documentElement.dataset.row"))


def choose(page, row):
    """Show the row of this index, by a search for its id."""
    at = "[...document.querySelectorAll('.row .number')].find(e => e.textContent === arguments[0])"
    page.execute_script(f"{at}.closest('.row').click()", f"{row:,}")
    shown = "return document.documentElement.dataset.row === arguments[0]"
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script(shown, str(row)))


def find(page, text):
    """Search, and return what the page says of the number of rows."""
    before = page.execute_script("return document.documentElement.dataset.searched ?? '0'")
    page.execute_script(
        "const q = document.getElementById('query'); q.value = arguments[0]; q.dispatchEvent(new Event('input'))", text
    )
    after = "return document.documentElement.dataset.searched ?? '0'"
    WebDriverWait(page, 60).until(lambda driver: driver.execute_script(after) != before)
    return count(page)


def count(page):
    return page.execute_script("return document.getElementById('count').textContent")


def set_field(page, name, value):
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true}))",
        name, value,
    )  # fmt: skip
    return count(page)


def check(page, flag):
    label = "[...document.querySelectorAll('#flags label')].find(e => e.children[1].textContent === arguments[0])"
    page.execute_script(f"{label}.click()", flag)
    return count(page)


def texts(page):
    return page.execute_script(
        "return arguments[0].map(id => document.getElementById(id)?.textContent ?? null)", list(TEXTS)
    )


def press(page, *keys):
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def shown_row(page):
    """The index of the row that is shown, once it is the selected one."""
    time.sleep(0.1)
    return int(page.execute_script("return document.documentElement.dataset.row"))


def test_it_shows_the_rows_without_errors_and_without_network(show):
    page = show()
    assert count(page) == f"{COUNT} rows"
    assert page.execute_script("return failures") == []
    assert page.get_log("browser") == []
    assert {url[:7] for url in requests_of(page)} == {"file://"}
    assert page.execute_script("return document.getElementById('notice').hidden")


def test_texts_are_those_of_the_tokens(show, made):
    page, data = show(), made[1]["pairs"]
    for index in (0, 1, 2, 3, 5):
        choose(page, index)
        row = data.row(index)
        assert texts(page) == [data.pieces.text(part) for part in (row.trunk, *(ids for ids, _ in row.branches))]
    facts = page.execute_script("return [...document.querySelectorAll('#facts dd')].map(e => e.textContent)")
    assert facts[:2] == [row.id, row.place]


def test_tokens_and_mask_on_demand(show, made):
    page, data = show(), made[1]["pairs"]
    choose(page, 2)
    press(page, "t")
    read = """return arguments[0].map(id => [...document.querySelectorAll(`#${id} .token`)].map(e =>
              [Number(e.querySelector('small').textContent), e.classList.contains('learned')]))"""
    row = data.row(2)
    expected = [[[token, False] for token in row.trunk.tolist()]]
    expected += [[list(each) for each in zip(ids.tolist(), mask.tolist(), strict=True)] for ids, mask in row.branches]
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script(read, list(TEXTS)) == expected)
    press(page, "t")
    assert texts(page)[2] == data.pieces.text(row.branches[1].ids)


def test_learned_and_special_tokens_are_told_apart(show):
    page = show()
    choose(page, 1)
    read = """return [...document.querySelectorAll(`#${arguments[0]} > *`)].map(e =>
              [e.textContent, e.classList.contains('learned'), e.classList.contains('special')])"""
    assert page.execute_script(read, "prompt-text") == [
        ["<s>", False, True],
        ["<|user|>\nName an animal.", False, False],
        ["</s>", False, True],
        ["\n<|assistant|>\n", False, False],
    ]
    assert page.execute_script(read, "side-0-text") == [["The quick brown fox.", True, False], ["</s>", True, True]]


def test_differences_by_words(show):
    page = show()
    choose(page, 1)
    marks = (
        "return [0, 1].map(side => [...document.querySelectorAll(`#side-${side}-text mark`)].map(e => e.textContent))"
    )
    assert page.execute_script(marks) == [[], []]
    press(page, "d")
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script(marks) == [["quick", "fox"], ["lazy", "dog"]])
    # what is not marked is the same on both sides, but for space between two marked words
    rest = """return [0, 1].map(side => [...document.querySelectorAll(`#side-${side}-text > :not(mark)`)].map(e =>
              e.textContent).join('').replace(/\\s/g, ''))"""
    for index in (0, 2, 3, 5, 6):
        choose(page, index)
        one, other = page.execute_script(rest)
        assert one == other


def test_search_finds_text_of_all_parts(show, made):
    page, data = show(), made[1]["pairs"]
    assert find(page, "zanzibar") == f"1 of {COUNT} rows"  # a prompt, whatever the case
    assert shown_row(page) == 3
    marked = "return [...CSS.highlights.get('found')].map(range => range.toString())"
    assert page.execute_script(marked) == ["Zanzibar"]
    assert find(page, "QUICK brown FOX.") == f"1 of {COUNT} rows"  # a chosen
    assert find(page, "xylophone") == f"1 of {COUNT} rows"  # a rejected
    assert find(page, "你好") == f"1 of {COUNT} rows"
    assert find(page, data.row(77).id) == f"1 of {COUNT} rows"
    assert shown_row(page) == 77
    assert find(page, "no such text") == f"0 of {COUNT} rows"
    assert page.execute_script("return document.getElementById('detail').hidden")
    assert find(page, "") == f"{COUNT} rows"


def test_filters_count_what_they_should(show, made):
    page, data = show(), made[1]["pairs"]
    rows = [data.row(index) for index in range(COUNT)]
    options = "return [...document.querySelectorAll('#source option')].find(o => o.text.startsWith('books')).value"
    number = page.execute_script(options)
    books = sum(row.source == "books" for row in rows)
    assert set_field(page, "source", number) == f"{books} of {COUNT} rows"
    assert set_field(page, "source", "") == f"{COUNT} rows"
    gaps = [None if row.ratings is None else row.ratings[0] - row.ratings[1] for row in rows]
    assert set_field(page, "gap-high", "-1") == f"{sum(g is not None and g <= -1 for g in gaps)} of {COUNT} rows"
    assert set_field(page, "gap-high", "") == f"{COUNT} rows"
    middle = int(np.median(data.rows.lengths))
    long = sum(len(row.trunk) + sum(len(ids) for ids, _ in row.branches) >= middle for row in rows)
    assert 0 < long < COUNT
    assert set_field(page, "length-low", str(middle)) == f"{long} of {COUNT} rows"
    assert set_field(page, "length-low", "") == f"{COUNT} rows"
    for flag, found in data.flag_counts.items():
        assert check(page, flag).removesuffix(" rows").removesuffix(f" of {COUNT}") == str(found)
        assert check(page, flag) == f"{COUNT} rows"
    assert data.flag_counts["reversed ratings"] == 1
    assert data.flag_counts["duplicate"] == 1


def test_the_list_holds_only_what_is_seen(show):
    page = show()
    read = "return [...document.querySelectorAll('.row .number')].map(e => Number(e.textContent))"
    for share in (0, 0.3, 0.71, 1):
        page.execute_script(
            "const l = document.getElementById('list'); l.scrollTop = arguments[0] * l.scrollHeight", share
        )
        time.sleep(0.2)
        numbers = page.execute_script(read)
        assert len(numbers) < 30
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        seen = """const list = document.getElementById('list').getBoundingClientRect();
                  return [0.02, 0.5, 0.97].every(s =>
                  document.elementFromPoint(list.left + 20, list.top + s * list.height).closest('.row'))"""
        assert page.execute_script(seen)
    assert numbers[-1] == COUNT - 1


def test_marks_are_kept_and_exported(show, made):
    page, data = show(), made[1]["pairs"]
    press(page, "x", "j", "j", "x", "j", "x", "x")  # rows 0 and 2; the last is unmarked again
    export = page.find_element("id", "export")
    assert export.text.split() == ["Export", "marked", "ids", "2"]
    page.refresh()
    wait(page)
    caught = """window.caught = []; const make = URL.createObjectURL;
                URL.createObjectURL = blob => { blob.text().then(text => caught.push(text)); return make(blob) }"""
    page.execute_script(caught)
    page.find_element("id", "export").click()
    WebDriverWait(page, 20).until(lambda driver: driver.execute_script("return caught.length"))
    (text,) = page.execute_script("return caught")
    assert text == f"{data.row(0).id}\n{data.row(2).id}\n"
    assert check(page, "marked") == f"2 of {COUNT} rows"


def test_another_page_of_the_same_rows_has_the_same_marks(show, browser, made):
    page = show()
    press(page, "x")
    page.get((made[0] / "ranked.html").as_uri())
    wait(page)
    assert page.execute_script("return document.getElementById('marked-count').textContent") == "1"
    page.get((made[0] / "single.html").as_uri())
    wait(page)
    assert page.execute_script("return document.getElementById('marked-count').textContent") == "0"


def test_the_keyboard_is_enough(show):
    page = show()
    press(page, "j", "j", "k")
    assert shown_row(page) == 1
    press(page, "/")
    assert page.switch_to.active_element.get_attribute("id") == "query"
    press(page, "jxk")  # typed, not obeyed
    assert page.find_element("id", "query").get_attribute("value") == "jxk"
    assert page.execute_script("return document.getElementById('marked-count').textContent") == "0"
    press(page, Keys.BACKSPACE * 3, Keys.ESCAPE)
    assert page.switch_to.active_element.get_attribute("id") == "list"
    press(page, Keys.END)
    assert shown_row(page) == COUNT - 1
    press(page, Keys.HOME, Keys.ARROW_DOWN)
    assert shown_row(page) == 1
    assert (
        page.execute_script("return document.getElementById('list').getAttribute('aria-activedescendant')") == "row-1"
    )


def test_the_most_wrongly_ordered_comes_first(show, made):
    page, data = show("ranked"), made[1]["ranked"]
    first = list(data.order)[:5]
    read = "return [...document.querySelectorAll('.row .number')].slice(0, 5).map(e => Number(e.textContent))"
    assert page.execute_script(read) == first
    assert shown_row(page) == first[0]
    figures = "return [...document.querySelectorAll('.row .figure')].slice(0, 5).map(e => e.textContent)"
    assert page.execute_script(figures) == [f"{data.row(index).margin:+.3f}".replace("-", "−") for index in first]
    set_field(page, "order", "page")
    assert shown_row(page) == 0
    assert page.execute_script(read) == [0, 1, 2, 3, 4]
    set_field(page, "order", "gap")
    assert page.execute_script(read)[0] == 3


def test_what_rows_say_runs_nothing(show):
    page = show()
    choose(page, 2)
    press(page, "d")
    assert EVIL in texts(page)[0]
    assert EVIL in page.execute_script("return document.getElementById('facts').textContent")
    press(page, "t")
    assert page.execute_script("return document.querySelectorAll('img').length") == 0
    assert page.execute_script("return window.hacked ?? null") is None
    assert page.get_log("browser") == []


def test_demonstrations_have_one_side(show):
    page = show("single")
    assert texts(page) == ["<s>Sea:", " blue</s>", None]
    press(page, "d", "j")
    assert shown_row(page) == 1
    assert find(page, "sea: BL") == "1 of 2 rows"  # from the prompt into the completion
    assert page.execute_script("return failures") == []


def test_lists_show_as_many_sides_as_they_have_completions(show):
    page = show("lists")
    display = "getComputedStyle(document.getElementById(`side-${side}`)).display"
    visible = f"return [0, 1, 2].filter((side) => {display} !== 'none')"
    side = "return [0, 1, 2].map((side) => document.getElementById(`side-${side}-text`).textContent)"
    assert page.execute_script(visible) == [0, 1, 2]
    assert page.execute_script(side) == [" blue.</s>", " grey.</s>", " red.</s>"]
    facts = "return document.getElementById('facts').textContent"
    assert "4.2 completion 1, 3 completion 2, 1 completion 3" in page.execute_script(facts)
    assert "+3.20" in page.execute_script(facts)  # the gap between the best and the worst
    press(page, "d", "j")
    assert shown_row(page) == 1
    assert page.execute_script(visible) == [0, 1]
    assert find(page, "is RED") == "1 of 2 rows"  # from the prompt into the last completion
    assert page.execute_script("return failures") == []


def test_labels_are_shown(show):
    page = show("labelled")
    facts = "return document.getElementById('facts').textContent"
    assert "true: a good completion" in page.execute_script(facts)
    press(page, "j")
    assert shown_row(page) == 1
    assert "false: a bad completion" in page.execute_script(facts)
    assert page.execute_script("return failures") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_reads_well(show, width, scheme):
    page = show(width=width, scheme=scheme)
    for button in ("filter-button", "about-button", "show-difference"):
        page.execute_script("document.getElementById(arguments[0]).click()", button)
    for index in (0, 2):
        choose(page, index)
        assert not page.execute_script(OVERFLOWS)
        beyond = """const ours = e => !e.closest('.report, .hidden, .skip, script');
                    return [...document.querySelectorAll('body *')].filter(e => ours(e)
                    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
        assert page.execute_script(beyond) == []
        small = """return [...document.querySelectorAll('body *')].filter(e => !e.matches('script')
                   && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
                   && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 90))"""
        assert page.execute_script(small) == []
    for selector in (
        "body", ".eyebrow", "h1 .split", "#about-button", "#filter-button", "#next", "dt", "dd", ".report", "#count",
        ".row .number", ".row .where", ".row .preview", ".row[aria-selected=true] .where", ".field legend",
        ".checks label",
        ".card h3", "#prompt-text span", "#prompt-text .special", "#side-0-text .learned", "#side-0-text mark",
        "#side-1-text mark", "#side-1-text .special", "button.quiet", ".legend .special",
    ):  # fmt: skip
        assert contrast(*colours(page, selector)) >= 4.5, selector
    corners = "const b = e.getBoundingClientRect(); return [b.left, b.top]"
    boxes = page.execute_script(f"return [...document.querySelectorAll('.side')].map(e => {{{corners}}})")
    (left, top), (other_left, other_top) = boxes
    if width == 390:
        assert left == other_left
        assert top < other_top
    else:
        assert left < other_left
        assert top == other_top


def test_every_control_has_a_name(show):
    page = show()
    page.execute_script("document.getElementById('filter-button').click()")
    nameless = """return [...document.querySelectorAll('button, input, select, [role=listbox], [role=img]')].filter(e =>
                  !e.ariaLabel && !e.textContent.trim() && !(e.labels && e.labels.length)).map(e => e.outerHTML)"""
    assert page.execute_script(nameless) == []
    assert page.execute_script("return document.documentElement.lang") == "en"


def test_a_browser_that_cannot_read_it_says_so(browser, made):
    script = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        browser.get((made[0] / "single.html").as_uri())
        assert "DecompressionStream" in browser.find_element("id", "notice").text
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_a_hundred_thousand_rows_are_usable(browser, tmp_path, model_folder):
    # 369 rows, each 271 times, and one more: what is shown is 100,000 rows, and few have to be tokenised
    rows = [
        {"prompt": f"Sea {number}", "chosen": " blue", "rejected": " red", "source": str(number % 5)}
        for number in range(369)
    ]
    needle = {"prompt": "A needle", "chosen": " blue", "rejected": " red", "source": "haystack"}
    sources = [
        {"path": str(tmp_path / "rows.jsonl"), "weight": 271.0},
        {"path": str(write_rows(tmp_path / "needle.jsonl", [needle]))},
    ]
    with process_group():
        data = load_data(write_config(tmp_path, model_folder, rows, data__train=sources))
        assert len(data) == 100_000
        write_page(tmp_path / "many.html", data, range(len(data)))
    place = list(data.rows.sources).index("haystack")
    look(browser)
    start = time.monotonic()
    browser.get((tmp_path / "many.html").as_uri())
    wait(browser)
    assert time.monotonic() - start < 30  # 1 s where nothing else runs
    assert count(browser) == "100,000 rows"
    read = "return [...document.querySelectorAll('.row .number')].map(e => e.textContent)"
    browser.execute_script("const l = document.getElementById('list'); l.scrollTop = l.scrollHeight")
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(read)[-1] == "99,999")
    assert len(browser.execute_script(read)) < 30
    assert find(browser, "needle") == "1 of 100,000 rows"
    assert shown_row(browser) == place
