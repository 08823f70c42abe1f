// Browses the rows that the page holds. What a row says is only ever set as text, never as HTML.
(() => {
  "use strict";
  const ROW_HEIGHT = 84; // pixels of an entry of the list, as in the style sheet
  const MOST_HEIGHT = 8e6; // browsers limit how tall an element may be; beyond it, the list scrolls faster
  const KEPT_BLOCKS = 24;
  const MOST_CHANGES = 2500; // words; texts that differ in more are only trimmed to their common beginning and end
  const $ = (id) => document.getElementById(id);
  const decoder = new TextDecoder();
  const collator = new Intl.NumberFormat("en");
  const head = JSON.parse($("head").textContent);
  const sides = head.branches.length;

  let columns, pieces, starts; // see page.py; starts: where each row's tokens begin in its block
  let visible = []; // rows that pass the filters, in their order, as numbers of the page
  let selected = -1; // a row's number of the page
  let matches = null; // rows that hold the searched text; null: none is searched
  let searched = 0; // counts searches, so that an earlier one stops
  let tokensShown = false, differenceShown = false;
  let timer = 0;

  // ---- what the page holds ----

  async function unpack(id) {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  const unpackJson = async (id) => JSON.parse(decoder.decode(await unpack(id)));

  // The bytes of every token end to end; those of token t are at [start[t], start[t + 1]).
  function readPieces({ ids, special, bytes }) {
    const parts = bytes.map(atob), largest = ids.at(-1) ?? 0;
    const start = new Uint32Array(largest + 2), isSpecial = new Uint8Array(largest + 1);
    ids.forEach((id, at) => { start[id + 1] = parts[at].length; isSpecial[id] = special[at]; });
    for (let id = 0; id <= largest; id++) start[id + 1] += start[id];
    const all = new Uint8Array(start[largest + 1]);
    ids.forEach((id, at) => { for (let i = 0; i < parts[at].length; i++) all[start[id] + i] = parts[at].charCodeAt(i); });
    return { all, start, isSpecial };
  }

  const blocks = new Map(); // by number, the latest used last: a promise of the block
  function block(number) {
    let found = blocks.get(number);
    blocks.delete(number);
    found ??= readBlock(number);
    blocks.set(number, found);
    if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
    return found;
  }

  async function readBlock(number) {
    const buffer = await unpack(`block-${number}`);
    const first = number * head.blockRows, last = Math.min(first + head.blockRows, columns.id.length);
    let tokens = 0, trunks = 0;
    for (let row = first; row < last; row++) { tokens += size(row); trunks += columns.lengths[row][0]; }
    const ids = head.idBytes === 2 ? new Uint16Array(buffer, 0, tokens) : new Uint32Array(buffer, 0, tokens);
    const masks = new Uint8Array(buffer, tokens * head.idBytes, tokens - trunks);
    return { ids, masks };
  }

  const size = (row) => columns.lengths[row].reduce((sum, length) => sum + length, 0);

  // For each row, where its tokens and its branches' masks begin in its block.
  function readStarts() {
    const count = columns.id.length, ids = new Uint32Array(count), masks = new Uint32Array(count);
    for (let row = 0; row < count; row++) {
      if (row % head.blockRows === 0) continue;
      const before = size(row - 1);
      ids[row] = ids[row - 1] + before;
      masks[row] = masks[row - 1] + before - columns.lengths[row - 1][0];
    }
    return { ids, masks };
  }

  // A row's prompt and completions: [{ids, mask}], the prompt's mask null.
  async function tokensOf(row) {
    const { ids, masks } = await block(Math.floor(row / head.blockRows));
    let at = starts.ids[row], mask = starts.masks[row];
    return columns.lengths[row].map((length, number) => {
      const part = { ids: ids.subarray(at, at + length), mask: number ? masks.subarray(mask, mask + length) : null };
      at += length;
      if (number) mask += length;
      return part;
    });
  }

  let scratch = new Uint8Array(1 << 16);
  function textOf(ids, from = 0, to = ids.length) {
    const { all, start } = pieces;
    let length = 0;
    for (let at = from; at < to; at++) length += start[ids[at] + 1] - start[ids[at]];
    if (length > scratch.length) scratch = new Uint8Array(2 * length);
    let end = 0;
    for (let at = from; at < to; at++) {
      for (let i = start[ids[at]], last = start[ids[at] + 1]; i < last; i++) scratch[end++] = all[i];
    }
    return decoder.decode(scratch.subarray(0, end));
  }

  // ---- marks ----

  const STORE = `notus-data:${head.digest}`;
  let marked = new Set();
  function readMarks() {
    try {
      marked = new Set(JSON.parse(localStorage.getItem(STORE) ?? "[]"));
    } catch {
      say("This browser keeps no marks between visits: export them before you close the page.");
    }
  }

  function toggleMark(row) {
    if (row < 0) return;
    const id = columns.id[row];
    if (!marked.delete(id)) marked.add(id);
    try {
      localStorage.setItem(STORE, JSON.stringify([...marked]));
    } catch { /* said when the marks were read */ }
    showMarks();
    if ($("flag-marked").checked) filter(); else drawList();
  }

  function showMarks() {
    $("marked-count").textContent = collator.format(marked.size);
    $("export").disabled = marked.size === 0;
    $("flag-marked-count").textContent = collator.format(columns.id.filter((id) => marked.has(id)).length);
    const isMarked = selected >= 0 && marked.has(columns.id[selected]);
    $("mark").setAttribute("aria-pressed", isMarked);
    $("mark").textContent = isMarked ? "Marked" : "Mark";
  }

  const exported = () => [...marked].map((id) => `${id}\n`).join("");

  function exportMarks() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([exported()], { type: "text/plain" }));
    link.download = `exclude-${head.name}.txt`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- filters ----

  // How far the first completion is rated above the last.
  const gap = (row) => {
    const rated = columns.ratings[row];
    return rated && rated.length > 1 && rated[0] !== null && rated.at(-1) !== null ? rated[0] - rated.at(-1) : null;
  };

  function number(id) {
    const value = $(id).value.trim();
    return value === "" ? null : Number(value);
  }

  function chosen() {
    const checked = [...document.querySelectorAll("#flags input:checked")].map((input) => input.value);
    return {
      source: $("source").value, low: number("length-low"), high: number("length-high"), gapLow: number("gap-low"),
      gapHigh: number("gap-high"), marked: checked.includes("marked"),
      flags: checked.filter((value) => value !== "marked").reduce((bits, value) => bits | (1 << Number(value)), 0),
    };
  }

  function passes(row, wanted) {
    if (matches && !matches.has(row)) return false;
    if (wanted.source !== "" && columns.source[row] !== Number(wanted.source)) return false;
    if ((columns.flags[row] & wanted.flags) !== wanted.flags) return false;
    if (wanted.marked && !marked.has(columns.id[row])) return false;
    if (wanted.low !== null || wanted.high !== null) {
      const length = size(row);
      if (length < (wanted.low ?? 0) || length > (wanted.high ?? Infinity)) return false;
    }
    if (wanted.gapLow !== null || wanted.gapHigh !== null) {
      const value = gap(row);
      if (value === null || value < (wanted.gapLow ?? -Infinity) || value > (wanted.gapHigh ?? Infinity)) return false;
    }
    return true;
  }

  const ORDERS = {
    page: { name: "as in the data", key: null },
    margin: { name: "most wrongly ordered", key: (row) => columns.margin[row] },
    gap: { name: "smallest rating gap", key: (row) => gap(row) ?? Infinity },
    long: { name: "longest", key: (row) => -size(row) },
    short: { name: "shortest", key: size },
  };

  function filter() {
    const wanted = chosen(), key = ORDERS[$("order").value].key ?? ((row) => columns.index[row]);
    const found = [];
    for (let row = 0; row < columns.id.length; row++) if (passes(row, wanted)) found.push(row);
    const keys = new Map(found.map((row) => [row, key(row)]));
    found.sort((a, b) => keys.get(a) - keys.get(b) || columns.index[a] - columns.index[b]);
    visible = found;
    const active = [wanted.source !== "", wanted.low !== null || wanted.high !== null,
      wanted.gapLow !== null || wanted.gapHigh !== null].filter(Boolean).length
      + document.querySelectorAll("#flags input:checked").length;
    $("filter-count").hidden = active === 0;
    $("filter-count").textContent = active;
    showCount();
    $("list").scrollTop = 0;
    drawList();
    if (!visible.includes(selected)) select(visible[0] ?? -1, { reveal: false });
    else reveal(visible.indexOf(selected));
  }

  function showCount(progress = "") {
    const all = columns.id.length;
    const part = visible.length === all ? "" : `${collator.format(visible.length)} of `;
    $("count").textContent = `${part}${collator.format(all)} ${all === 1 ? "row" : "rows"}${progress}`;
  }

  // Look for a text in every row, block by block, and show what is found on the way.
  async function search() {
    const mine = ++searched, wanted = $("query").value.toLowerCase();
    if (wanted.trim() === "") {
      matches = null;
      filter();
      document.documentElement.dataset.searched = mine;
      return;
    }
    const found = new Set(), count = columns.id.length;
    let shown = performance.now();
    for (let first = 0; first < count; first += head.blockRows) {
      const { ids } = await readBlock(first / head.blockRows);
      if (mine !== searched) return;
      for (let row = first; row < Math.min(first + head.blockRows, count); row++) {
        const known = columns.id[row] === wanted.trim() || columns.place[row].toLowerCase().includes(wanted);
        if (known || holds(row, ids, wanted)) found.add(row);
      }
      if (performance.now() - shown > 400) {
        matches = found;
        filter();
        showCount(`, searching: ${Math.round((100 * first) / count)}%`);
        await new Promise((resume) => setTimeout(resume));
        if (mine !== searched) return;
        shown = performance.now();
      }
    }
    matches = found;
    filter();
    document.documentElement.dataset.searched = mine;
  }

  function holds(row, ids, wanted) {
    const [trunk, ...branches] = columns.lengths[row];
    const middle = starts.ids[row] + trunk;
    const prompt = textOf(ids, starts.ids[row], middle);
    let at = middle;
    if (prompt.toLowerCase().includes(wanted)) return true;
    const ending = prompt.slice(-wanted.length); // a text may begin in the prompt
    for (const length of branches) {
      if ((ending + textOf(ids, at, at + length)).toLowerCase().includes(wanted)) return true;
      at += length;
    }
    return false;
  }

  // ---- the list ----

  const list = $("list");
  const height = () => Math.min(visible.length * ROW_HEIGHT, MOST_HEIGHT);
  // Entries before the first one that is seen, with a fraction.
  function firstSeen() {
    const room = height() - list.clientHeight, beyond = visible.length - list.clientHeight / ROW_HEIGHT;
    return room > 0 ? (list.scrollTop / room) * beyond : 0;
  }

  function drawList() {
    $("spacer").style.height = `${height()}px`;
    const first = Math.max(0, firstSeen()), start = Math.max(0, Math.floor(first) - 3);
    const end = Math.min(visible.length, Math.ceil(first + list.clientHeight / ROW_HEIGHT) + 3);
    const entries = visible.slice(start, end).map((row, at) => entry(row, start + at));
    $("window").style.transform = `translateY(${list.scrollTop - (first - start) * ROW_HEIGHT}px)`;
    if (!visible.length) entries.push(element("p", "empty", "No row passes these filters."));
    $("window").replaceChildren(...entries);
    if (selected >= 0 && $(`row-${selected}`)) list.setAttribute("aria-activedescendant", `row-${selected}`);
    else list.removeAttribute("aria-activedescendant");
  }

  // Characters that would turn the text around them, or show nothing, are written as escapes.
  const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  const shown = (text) =>
    text.replace(CONTROLS, (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0"));

  function element(name, kind = "", text = "") {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== "") made.textContent = shown(String(text));
    return made;
  }

  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const plain = (value) => (value === null ? "unknown" : String(Number(value.toPrecision(6))).replace("-", "−"));

  function entry(row, at) {
    const made = element("div", "row"), top = element("div", "top");
    made.id = `row-${row}`;
    made.dataset.row = row;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", row === selected);
    made.setAttribute("aria-setsize", visible.length);
    made.setAttribute("aria-posinset", at + 1);
    top.append(element("span", "number", collator.format(columns.index[row])));
    const flags = head.flags.filter((_, bit) => columns.flags[row] & (1 << bit));
    const source = columns.source[row] < 0 ? [] : [head.sources[columns.source[row]]];
    top.append(element("span", "where", [...source, ...flags].join(" · ")));
    if (marked.has(columns.id[row])) top.append(element("span", "marked", "marked"));
    const value = head.ranked ? columns.margin[row] : gap(row);
    if (value !== null) {
      const figure = element("span", "figure", signed(value, head.ranked ? 3 : 2));
      figure.title = head.ranked ? "reward margin" : "rating gap";
      figure.classList.toggle("wrong", value < 0);
      top.append(figure);
    }
    made.append(top, element("div", "preview", columns.preview[row]));
    return made;
  }

  function reveal(at) {
    if (at < 0) return;
    const first = firstSeen(), seen = list.clientHeight / ROW_HEIGHT;
    const wanted = at < first ? at : at > first + seen - 1 ? at - seen + 1 : null;
    if (wanted === null) return;
    const room = height() - list.clientHeight, beyond = visible.length - seen;
    list.scrollTop = beyond > 0 ? (wanted / beyond) * room : 0;
    drawList();
  }

  function step(by) {
    const at = visible.indexOf(selected);
    const next = Math.min(Math.max(at + by, 0), visible.length - 1);
    if (visible.length) select(visible[next]);
  }

  function select(row, { reveal: show = true, focus = false } = {}) {
    selected = row;
    if (show) reveal(visible.indexOf(row));
    drawList();
    showMarks();
    showRow(focus);
  }

  // ---- one row ----

  async function showRow(focus) {
    const row = selected;
    $("detail").hidden = row < 0;
    if (row < 0) return;
    const parts = await tokensOf(row);
    if (row !== selected) return;
    const at = visible.indexOf(row);
    $("row-title").textContent = `Row ${collator.format(columns.index[row])}`;
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === visible.length - 1;
    showFacts(row);
    const flags = head.flags.filter((_, bit) => columns.flags[row] & (1 << bit));
    $("row-flags").replaceChildren(...flags.map((flag) => element("span", "badge", flag)));
    $("detail").scrollTop = 0;
    $("prompt-text").scrollTop = 0;
    showText(row, parts);
    document.documentElement.dataset.row = columns.index[row];
    if (focus && innerWidth < 860) $("detail").scrollIntoView({ behavior: "smooth" });
  }

  function showFacts(row) {
    const facts = [["Id", columns.id[row], "mono"], ["Place", columns.place[row]]];
    if (columns.source[row] >= 0) facts.push(["Source", head.sources[columns.source[row]]]);
    const rated = columns.ratings[row];
    if (rated) {
      facts.push(["Ratings", rated.map((rating, side) => `${plain(rating)} ${head.branches[side]}`).join(", ")]);
      if (gap(row) !== null) facts.push(["Rating gap", signed(gap(row), 2)]);
    }
    if (columns.label[row] !== null) facts.push(["Label", columns.label[row] ? "true: a good completion" : "false: a bad completion"]);
    if (columns.margin[row] !== null) facts.push(["Reward margin", signed(columns.margin[row], 4)]);
    facts.push(["Tokens", collator.format(size(row))]);
    if (columns.cut[row]) {
      const names = ["prompt", ...head.branches];
      const cut = columns.cut[row].map((count, part) => count && `${collator.format(count)} of the ${names[part]}`);
      facts.push(["Tokens cut", cut.filter(Boolean).join(", ")]);
    }
    $("facts").replaceChildren(...facts.map(([name, value, kind]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", kind ?? "", value));
      return pair;
    }));
  }

  function showText(row, parts) {
    $("show-text").setAttribute("aria-pressed", !tokensShown);
    $("show-tokens").setAttribute("aria-pressed", tokensShown);
    for (let side = 0; side < sides; side++) $(`side-${side}`).hidden = side >= parts.length - 1;
    const compared = sides === 2 && differenceShown && !tokensShown && parts.length === 3;
    if (sides === 2) {
      $("show-difference").setAttribute("aria-pressed", compared);
      $("show-difference").disabled = tokensShown || parts.length !== 3;
      $("legend-difference").hidden = !compared;
    }
    const runs = parts.map(tokensShown ? () => [] : spans);
    let only = parts.map(() => []), note = "";
    if (compared) {
      const texts = runs.slice(1).map((spans) => spans.map((span) => span.text).join(""));
      const found = difference(...texts);
      only = [[], found.only[0], found.only[1]];
      note = found.whole ? "The completions differ in too many words to compare: only their common beginning and end are found." : "";
    }
    $("row-note").textContent = note;
    parts.forEach((part, number) => {
      const name = number ? `side-${number - 1}` : "prompt", learned = part.mask ? part.mask.reduce((a, b) => a + b, 0) : 0;
      const tokens = `${collator.format(part.ids.length)} ${part.ids.length === 1 ? "token" : "tokens"}`;
      $(`${name}-size`).textContent = part.mask ? `${tokens}, ${collator.format(learned)} learned` : tokens;
      const text = $(`${name}-text`);
      text.classList.toggle("tokens", tokensShown);
      text.replaceChildren(...(tokensShown ? boxes(part) : marks(runs[number], only[number])));
    });
    showFound();
  }

  // Highlight the searched text where it stands, and bring it into view.
  function showFound() {
    if (!("highlights" in CSS)) return;
    const wanted = matches ? $("query").value.toLowerCase() : "", found = [];
    CSS.highlights.delete("found");
    if (!wanted || tokensShown) return;
    const texts = document.createTreeWalker($("detail"), NodeFilter.SHOW_TEXT);
    for (let node = texts.nextNode(); node; node = texts.nextNode()) {
      if (!node.parentElement.closest(".text")) continue;
      const text = node.data.toLowerCase();
      if (text.length !== node.data.length) continue; // a letter whose lower case is longer moves all others
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + wanted.length);
        found.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...found));
    if (found.length && innerWidth >= 860) found[0].startContainer.parentElement.scrollIntoView({ block: "nearest" });
  }

  // Runs of tokens that are alike: [{text, learned, special}].
  function spans({ ids, mask }) {
    const found = [];
    for (let at = 0, end; at < ids.length; at = end) {
      const learned = mask ? mask[at] : 0, special = pieces.isSpecial[ids[at]];
      end = at + 1;
      while (end < ids.length && (mask ? mask[end] : 0) === learned && pieces.isSpecial[ids[end]] === special) {
        if (special) break; // each special token is a chip of its own
        end++;
      }
      found.push({ text: textOf(ids, at, end), learned, special });
    }
    return found;
  }

  // Spans as elements, divided where a range of characters, which only this text has, begins or ends.
  function marks(spans, only) {
    const made = [];
    let at = 0, next = 0;
    for (const { text, learned, special } of spans) {
      for (let from = 0; from < text.length;) {
        while (next < only.length && only[next][1] <= at + from) next++;
        const range = only[next], inside = range && range[0] <= at + from;
        const limit = !range ? Infinity : inside ? range[1] : range[0];
        const to = Math.min(text.length, limit - at);
        const kinds = [learned && "learned", special && "special", inside && "only"].filter(Boolean);
        made.push(element(inside ? "mark" : "span", kinds.join(" "), text.slice(from, to)));
        from = to;
      }
      at += text.length;
    }
    return made;
  }

  const VISIBLE = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  function boxes({ ids, mask }) {
    const made = [];
    for (let at = 0; at < ids.length; at++) {
      const id = ids[at], bytes = pieces.all.subarray(pieces.start[id], pieces.start[id + 1]);
      let text = decoder.decode(bytes);
      if (text.includes("\ufffd")) text = [...bytes].map((byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join(" ");
      const kinds = ["token", mask?.[at] && "learned", pieces.isSpecial[id] && "special"].filter(Boolean);
      const box = element("span", kinds.join(" "));
      box.append(element("span", "", text.replace(/[ \n\t\r]/g, (each) => VISIBLE[each]) || "∅"), element("small", "", id));
      made.push(box);
      if (text.includes("\n")) made.push(element("span", "breaks"));
    }
    return made;
  }

  // ---- differences ----

  const words = (text) => text.match(/\s+|[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]/gu) ?? [];

  // The ranges of characters that only one of two texts has, by words.
  function difference(one, other) {
    const a = words(one), b = words(other);
    let before = 0, after = 0;
    while (before < a.length && before < b.length && a[before] === b[before]) before++;
    while (after < a.length - before && after < b.length - before && a.at(-1 - after) === b.at(-1 - after)) after++;
    const kept = common(a.slice(before, a.length - after), b.slice(before, b.length - after));
    const shared = [new Set(), new Set()];
    for (let at = 0; at < before; at++) { shared[0].add(at); shared[1].add(at); }
    for (let at = 1; at <= after; at++) { shared[0].add(a.length - at); shared[1].add(b.length - at); }
    for (const [x, y] of kept ?? []) { shared[0].add(before + x); shared[1].add(before + y); }
    return { only: [a, b].map((list, side) => ranges(list, shared[side])), whole: kept === null };
  }

  // The words that are not shared, as ranges of characters; space between two of them belongs to both.
  function ranges(list, shared) {
    const found = [];
    let at = 0, bridged = false; // whether nothing but space stands between the last range and here
    list.forEach((word, number) => {
      if (!shared.has(number)) {
        if (bridged) found.at(-1)[1] = at + word.length;
        else found.push([at, at + word.length]);
        bridged = true;
      } else {
        bridged &&= /^\s+$/.test(word);
      }
      at += word.length;
    });
    return found;
  }

  // A longest common subsequence of two lists, as pairs of places (Myers 1986, An O(ND) Difference Algorithm); null if
  // they differ in more than MOST_CHANGES.
  function common(a, b) {
    const limit = Math.min(a.length + b.length, MOST_CHANGES);
    const furthest = new Int32Array(2 * limit + 3), trace = [], middle = limit + 1;
    for (let changes = 0; changes <= limit; changes++) {
      trace.push(furthest.slice(middle - changes - 1, middle + changes + 2));
      for (let k = -changes; k <= changes; k += 2) {
        const down = k === -changes || (k !== changes && furthest[middle + k - 1] < furthest[middle + k + 1]);
        let x = down ? furthest[middle + k + 1] : furthest[middle + k - 1] + 1;
        while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
        furthest[middle + k] = x;
        if (x >= a.length && x - k >= b.length) return path(trace, a.length, b.length);
      }
    }
    return null;
  }

  function path(trace, x, y) {
    const found = [];
    for (let changes = trace.length - 1; changes >= 0; changes--) {
      const furthest = trace[changes], middle = changes + 1, k = x - y;
      const down = k === -changes || (k !== changes && furthest[middle + k - 1] < furthest[middle + k + 1]);
      const from = down ? k + 1 : k - 1, fromX = furthest[middle + from], fromY = fromX - from;
      while (x > fromX && y > fromY) found.push([--x, --y]);
      [x, y] = [fromX, fromY];
    }
    return found;
  }

  // ---- the report ----

  function drawHistograms() {
    for (const [name, { edges, counts }] of Object.entries(head.histograms)) {
      const made = element("div", "histogram"), bars = element("div", "bars"), scale = element("p");
      const most = Math.max(...counts), top = counts.indexOf(most);
      bars.setAttribute("role", "img");
      bars.setAttribute("aria-label", `${name}: most rows, ${collator.format(most)}, have ${edges[top]} to ${edges[top + 1] - 1} tokens`);
      counts.forEach((count, at) => {
        const bar = element("span");
        bar.style.height = `${count ? Math.max(2, (100 * count) / most) : 0}%`;
        bar.title = `${edges[at]} to ${edges[at + 1] - 1} tokens: ${collator.format(count)}`;
        bars.append(bar);
      });
      scale.append(element("span", "", collator.format(edges[0])), element("span", "", collator.format(edges.at(-1) - 1)));
      made.append(element("h3", "", `${name[0].toUpperCase()}${name.slice(1)}, tokens`), bars, scale);
      $("histograms").append(made);
    }
  }

  // ---- controls ----

  function say(text) {
    $("notice").textContent = text;
    $("notice").hidden = false;
  }

  function addOption(select, value, text) {
    const option = element("option", "", text);
    option.value = value;
    select.append(option);
  }

  function addCheck(value, name, count, id = "") {
    const label = element("label"), input = element("input"), number = element("span", "count", collator.format(count));
    input.type = "checkbox";
    input.value = value;
    if (id) { input.id = id; number.id = `${id}-count`; }
    label.append(input, element("span", "", name), number);
    $("flags").append(label);
  }

  function fillControls() {
    const counts = head.sources.map(() => 0), flags = head.flags.map(() => 0);
    let unknown = 0;
    columns.source.forEach((source) => { if (source < 0) unknown++; else counts[source]++; });
    columns.flags.forEach((bits) => flags.forEach((_, bit) => { if (bits & (1 << bit)) flags[bit]++; }));
    const order = head.sources.map((_, source) => source).sort((a, b) => counts[b] - counts[a]);
    for (const source of order) addOption($("source"), source, `${head.sources[source]} (${collator.format(counts[source])})`);
    if (unknown) addOption($("source"), -1, `unknown (${collator.format(unknown)})`);
    $("source-field").hidden = head.sources.length === 0;
    head.flags.forEach((flag, bit) => addCheck(bit, flag, flags[bit]));
    addCheck("marked", "marked", 0, "flag-marked");
    const rated = columns.ratings.some(Boolean);
    $("gap-field").hidden = !rated;
    for (const [name, { name: text }] of Object.entries(ORDERS)) {
      if ((name !== "margin" || head.ranked) && (name !== "gap" || rated)) addOption($("order"), name, text);
    }
    $("order").value = head.ranked ? "margin" : "page";
  }

  const soon = (work, wait) => () => { clearTimeout(timer); timer = setTimeout(work, wait); };

  function toggle(button, panel) {
    const open = panel.hidden;
    panel.hidden = !open;
    button.setAttribute("aria-expanded", open);
    drawList();
  }

  const showAgain = async () => {
    const row = selected;
    if (row < 0) return;
    const parts = await tokensOf(row);
    if (row === selected) showText(row, parts);
  };
  const setTokens = (shown) => { tokensShown = shown; showAgain(); };
  const toggleDifference = () => { if (sides === 2 && !tokensShown) { differenceShown = !differenceShown; showAgain(); } };

  function listen() {
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("filters").addEventListener("reset", () => setTimeout(() => { $("order").value = head.ranked ? "margin" : "page"; search(); }));
    $("query").addEventListener("input", soon(search, 200));
    $("filter-panel").addEventListener("input", filter);
    $("order").addEventListener("change", () => { selected = -1; filter(); });
    $("filter-button").addEventListener("click", () => toggle($("filter-button"), $("filter-panel")));
    $("about-button").addEventListener("click", () => toggle($("about-button"), $("about")));
    $("export").addEventListener("click", exportMarks);
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("mark").addEventListener("click", () => toggleMark(selected));
    $("show-text").addEventListener("click", () => setTokens(false));
    $("show-tokens").addEventListener("click", () => setTokens(true));
    if (sides === 2) $("show-difference").addEventListener("click", toggleDifference);
    let drawing = 0;
    list.addEventListener("scroll", () => { drawing ||= requestAnimationFrame(() => { drawing = 0; drawList(); }); });
    list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) select(Number(row.dataset.row), { focus: true });
    });
    addEventListener("resize", drawList);
    addEventListener("keydown", press);
  }

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input:not([type=checkbox]), select");
    if (event.key === "Escape" && typing) { event.target.blur(); list.focus(); return; }
    if (typing) return;
    const inList = event.target === list;
    const actions = {
      j: () => step(1), k: () => step(-1), x: () => toggleMark(selected), t: () => setTokens(!tokensShown), d: toggleDifference,
      "/": () => $("query").focus(),
      ...(inList && {
        ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(8), PageUp: () => step(-8),
        Home: () => step(-Infinity), End: () => step(visible.length), Enter: () => $("detail").focus(),
      }),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  async function start() {
    if (!("DecompressionStream" in globalThis)) {
      say("This browser cannot read compressed data (DecompressionStream): open the page in a newer one.");
      return;
    }
    columns = await unpackJson("columns");
    pieces = readPieces(await unpackJson("pieces"));
    starts = readStarts();
    readMarks();
    fillControls();
    drawHistograms();
    listen();
    filter();
    document.documentElement.dataset.ready = columns.id.length;
  }

  start().catch((error) => say(`The rows cannot be read: ${error.message}`));
})();
