// The search page: draws the states (states.js), and leads from one to another.

import * as api from "./api.js";
import { cardOf, letterOf, moveWithArrows, readable, setPicture, thumbnailOf } from "./cards.js";
import { askAndAdd, askAndDelete, prepareDialogs } from "./changes.js";
import { CropBox } from "./crop.js";
import { ColumnValues, FilterPanel, treeOf } from "./filters.js";
import { fillProblem } from "./problems.js";
import { UNWANTED, addressOf, newStart, stateOfAddress } from "./states.js";
import { SideBySide, VersionChoice } from "./versions.js";

const $ = (id) => document.getElementById(id);
const STAGES = ["lookup", "decode", "encode", "search", "rerank", "metadata", "queue"];
const GALLERY_SIZE = 24;

const uploads = new Map(); // number -> {file, url, name}; lives as long as the tab
const columnValues = new ColumnValues();
let state = null;
let info = null;
let running = new AbortController(); // of what is shown, or about to be
let asking = new AbortController(); // of the facts
const lastAnswers = new Map(); // version -> {query, k, answer}: pages of one search need not ask again
let pages = { previous: null, next: null }; // states

const mayWrite = () => info?.scopes.includes("write") ?? false;
const takesPictures = () => info?.takes_pictures ?? true; // as long as nothing is known, the server may say no

// ---- Moving between states

const anotherStart = () => newStart({ versus: state.versus });
const searchOf = (part, conditions = state.conditions) =>
  ({ view: "search", parts: [{ weight: 1, ...part }], conditions, page: 0, versus: state.versus });

function go(next, { moveFocus = true } = {}) {
  history.pushState(next, "", addressOf(next));
  return show(next, { moveFocus });
}

function searchWith(file, name = "Your picture") {
  const upload = uploads.size + 1;
  uploads.set(upload, { file, url: URL.createObjectURL(file), name });
  return go(searchOf({ upload }));
}

function together(item, weight) {
  if (state.view === "start") return go(searchOf({ id: item.id }));
  const others = state.parts.filter(({ id }, place) => place === 0 || id !== item.id);
  return go({ ...state, parts: [...others, { id: item.id, weight }], page: 0 });
}

async function show(next, { moveFocus = false } = {}) {
  state = next;
  running.abort();
  const mine = (running = new AbortController());
  $("problem").hidden = true;
  setBusy(true);
  filterPanel.show(next.conditions);
  versionChoice.show(next.versus);
  try {
    await VIEWS[next.view](next, mine.signal);
    if (mine.signal.aborted) return;
    setBusy(false);
    if (moveFocus) {
      window.scrollTo({ top: 0 });
      $("heading").focus({ preventScroll: true });
    }
  } catch (error) {
    if (mine.signal.aborted) return; // A newer search took over.
    showCards([], { heading: "", summary: "" });
    showPages({});
    showTimings(null);
    showProblem(error);
  }
}

// What is done to a query goes by the state, and so waits until that is what is shown.
function setBusy(isBusy) {
  if (isBusy) $("columns").setAttribute("aria-busy", "true");
  else $("columns").removeAttribute("aria-busy");
  for (const id of ["stage", "query-actions", "examples"]) $(id).inert = isBusy;
}

const VIEWS = {
  async start({ seed, conditions, after }, signal) {
    const filter = treeOf(conditions);
    const afterId = after.at(-1) ?? null;
    const found = filter
      ? api.listItems({ filter, limit: GALLERY_SIZE, afterId, signal })
      : api.randomItems(GALLERY_SIZE, { seed, signal });
    const [{ items, next_after_id: nextId }] = await Promise.all([found, facts]);
    signal.throwIfAborted();
    showQuery(null);
    showTimings(null);
    const [heading, summary] = items.length
      ? [filter ? "Pictures that fit" : "Or start from one of these", ""]
      : filter
        ? ["No picture fits", "Take a condition back, or choose another value."]
        : ["This index is empty", "Build one with pictures, or add some."];
    showCards(items, { heading, summary });
    showPages({
      page: after.length,
      previous: after.length ? { ...state, after: after.slice(0, -1) } : null,
      next: nextId === null ? null : { ...state, after: [...after, nextId] },
    });
    $("shuffle").hidden = !items.length || Boolean(filter);
  },

  async search({ parts, conditions, page, versus }, signal) {
    if (parts.some(({ upload }) => upload !== undefined && !uploads.has(upload))) {
      const detail = "Pictures you search with are kept in this tab only, until it is reloaded.";
      throw new api.Problem({ title: "The picture is gone", status: 410, detail, fix: "Choose it again." });
    }
    const ask = (version) => answerTo({ parts, conditions, page, version }, signal);
    const other = versus && ask(versus).then((answer) => ({ answer }), (error) => ({ error }));
    const [described, answer] = await Promise.all([Promise.all(parts.map((part) => describe(part, signal))), ask(null)]);
    signal.throwIfAborted();
    showQuery(described);
    const className = described[0].item?.class_name ?? null;
    showAnswer(answer, { page, className });
    if (versus) compare(answer, other, { page, className, versus, signal }).catch(showProblem);
  },
};

// What is shown of a part of a query.
async function describe({ id, upload, roi, weight }, signal) {
  if (upload !== undefined) {
    const { file, url, name } = uploads.get(upload);
    return { name, note: file.name, url, roi, weight };
  }
  const item = await api.item(id, signal);
  return { name: readable(item), note: `Picture ${id} of the index`, url: thumbnailOf(item), item, weight };
}

const numberShown = () => Number($("count").value);

// Asks for one hit more than is shown, which tells whether there is another page.
async function answerTo({ parts, conditions, page, version }, signal) {
  await facts;
  const k = Math.min((page + 1) * numberShown() + 1, info?.limits.max_k ?? Infinity);
  const query = JSON.stringify([parts, conditions]);
  const last = lastAnswers.get(version);
  if (last?.query === query && (last.k >= k || last.answer.hits.length < last.k)) return last.answer;
  const complete = parts.map((part) => ({ ...part, file: uploads.get(part.upload)?.file }));
  const answer = await api.search(complete, { k, filter: treeOf(conditions), version, limits: info?.limits, signal });
  lastAnswers.set(version, { query, k, answer });
  return answer;
}

// ---- Drawing

function showQuery(described) {
  const [main = null, ...examples] = described ?? [];
  const picture = $("query-picture");
  crop.close();
  $("drop").hidden = Boolean(main?.url) || !takesPictures();
  $("stage").hidden = !main?.url;
  if (main?.url) setPicture(picture, main.url);
  else picture.removeAttribute("src");
  picture.alt = main?.name ?? "";
  if (main?.roi) crop.showFixed(main.roi);
  const small = document.createElement("small");
  small.textContent = main ? `${main.note}${main.roi ? ", a region of it" : ""}` : "";
  $("query-name").replaceChildren(main?.name ?? "", small);
  $("query-name").hidden = !main;
  $("examples").replaceChildren(...examples.map((example, place) => exampleOf(example, place + 1)));
  $("examples").hidden = !examples.length;
  document.title = main ? `${main.name} · Lookalike` : "Lookalike";
  showActions(main);
}

function showActions(main) {
  $("query-actions").hidden = !main;
  $("crop-start").hidden = crop.isOpen || !main?.url || !takesPictures();
  $("crop-apply").hidden = !crop.isOpen;
  $("crop-clear").hidden = !crop.isOpen && !main?.roi;
  $("crop-clear").textContent = crop.isOpen ? "Cancel" : "Whole picture";
  $("add").hidden = crop.isOpen || !mayWrite() || !main || Boolean(main.item);
  $("delete-query").hidden = crop.isOpen || !mayWrite() || !main?.item;
  $("delete-query").onclick = () => remove(main.item).catch(showProblem);
  $("crop-start").onclick = () => startCropping(main).catch(showProblem);
  $("crop-clear").onclick = () => {
    if (!crop.isOpen) return go({ ...state, parts: state.parts.toSpliced(0, 1, { ...state.parts[0], roi: undefined }), page: 0 });
    crop.close();
    if (main.roi) crop.showFixed(main.roi);
    showActions(main);
    $("crop-start").focus();
  };
}

function exampleOf({ name, url, item, weight }, place) {
  const [entry, text, button] = ["li", "span", "button"].map((tag) => document.createElement(tag));
  const picture = new Image(28, 28);
  picture.alt = "";
  picture.addEventListener("error", () => picture.remove());
  if (url) setPicture(picture, url);
  text.textContent = `${weight > 0 ? "and like" : "but unlike"} ${name}`;
  button.type = "button";
  button.textContent = "×";
  button.setAttribute("aria-label", `Remove: ${text.textContent}`);
  button.addEventListener("click", () => go({ ...state, parts: state.parts.toSpliced(place, 1), page: 0 }));
  entry.append(url ? picture : letterOf(item), text, button);
  return entry;
}

function showAnswer({ hits, timings_ms: timings }, { page, className }) {
  const size = numberShown();
  const shown = hits.slice(page * size, (page + 1) * size);
  const numSame = shown.filter((hit) => className !== null && hit.class_name === className).length;
  const heading = shown.length ? "Nearest pictures" : page ? "No more pictures" : "Nothing found";
  const isNarrow = state.conditions.length > 0;
  const summary = shown.length
    ? className === null ? "" : `${numSame} of ${shown.length} share its class`
    : isNarrow ? "No other picture fits the conditions." : "";
  showCards(shown, { heading, summary, className });
  const hasNext = hits.length > (page + 1) * size;
  showPages({ page, previous: page ? { ...state, page: page - 1 } : null, next: hasNext ? { ...state, page: page + 1 } : null });
  $("shuffle").hidden = true;
  showTimings(timings);
}

// `other`: what will be known of the other version, {answer} or {error}; the one that serves does not wait for it.
async function compare(answer, other, { page, className, versus, signal }) {
  const size = numberShown();
  const drawn = { page, size, cardsOf: (hits) => cardsOf(hits, className), signal };
  const summary = await sideBySide.compare(answer, versus, other, drawn);
  if (!summary) return;
  const hasNext = (await other).answer.hits.length > (page + 1) * size;
  if (hasNext && !pages.next) showPages({ page, previous: pages.previous, next: { ...state, page: page + 1 } });
  $("announcement").textContent += ` ${summary}`;
}

function showPages({ page = 0, previous = null, next = null }) {
  pages = { previous, next };
  $("pages").hidden = !previous && !next;
  $("previous").disabled = !previous;
  $("next").disabled = !next;
  $("page-number").textContent = `Page ${page + 1}`;
  if (!$("pages").hidden) $("announcement").textContent += ` Page ${page + 1}.`;
}

function showTimings(timings) {
  $("timings").hidden = !timings;
  if (!timings) return;
  const rows = [...STAGES.filter((stage) => stage in timings), "total"].map((stage) => {
    const [row, term, value] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    row.classList.toggle("total", stage === "total");
    term.textContent = stage;
    value.textContent = `${timings[stage].toFixed(1)} ms`;
    row.append(term, value);
    return row;
  });
  $("timings").replaceChildren(...rows);
}

function cardsOf(items, className) {
  columnValues.learn(items);
  const on = {
    search: (item) => go(searchOf({ id: item.id })),
    more: (item) => together(item, 1),
    less: state.view === "search" ? (item) => together(item, UNWANTED) : null,
    delete: mayWrite() ? (item) => remove(item).catch(showProblem) : null,
  };
  return items.map((item) => cardOf(item, { className, on }));
}

function showCards(items, { heading, summary, className = null }) {
  sideBySide.close();
  $("heading").textContent = heading;
  $("summary").textContent = summary;
  $("grid").replaceChildren(...cardsOf(items, className));
  $("announcement").textContent = heading && `${heading}: ${items.length} pictures. ${summary}`;
}

function showProblem(error) {
  if (error.name === "AbortError") return;
  setBusy(false);
  $("key-form").hidden = !error.wantsKey;
  fillProblem($("problem"), error);
}

// Never fails: whatever is wrong with the server, the search that waits for this will say.
async function loadFacts() {
  asking.abort();
  const { signal } = (asking = new AbortController());
  $("forget-key").hidden = !api.hasKey();
  try {
    info = await api.info(signal);
  } catch (error) {
    if (signal.aborted) return facts; // Another key, or after a change: what is known then counts.
    info = null;
    if (!(error instanceof api.Problem)) console.error(error);
    return;
  }
  if (info.limits.max_compared_versions) versionChoice.load(signal);
  for (const option of [...$("count").options].slice(1)) option.disabled = Number(option.value) > info.limits.max_k;
  $("num-pictures").textContent = `${info.num_vectors.toLocaleString("en")} pictures`;
  $("version").textContent = ` · index ${info.index_version}`;
  for (const id of ["choose", "photograph"]) $(id).hidden = !takesPictures();
  filterPanel.offer(info.metadata_columns);
}

// ---- What people do

async function surprise() {
  const { signal } = running;
  const { items } = await api.randomItems(1, { signal });
  signal.throwIfAborted();
  if (items.length) await go(searchOf({ id: items[0].id }, []));
}

async function startCropping(main) {
  const { signal } = running;
  if (main.item) {
    // Regions are of pictures that are sent: the original takes the place of its id once a region is searched by.
    main.original ??= await api.pictureFile(main.item.image_url, signal);
    signal.throwIfAborted();
    main.originalUrl ??= URL.createObjectURL(main.original);
    $("query-picture").src = main.originalUrl;
    await $("query-picture").decode().catch((error) => {
      signal.throwIfAborted(); // Another picture has taken its place.
      throw error;
    });
  }
  crop.open(main.roi);
  showActions(main);
  applyCrop = () => {
    const { upload = uploads.size + 1, weight } = state.parts[0];
    if (main.item) {
      const file = new File([main.original], main.note, { type: main.original.type });
      uploads.set(upload, { file, url: main.originalUrl, name: main.name });
    }
    return go({ ...state, parts: state.parts.toSpliced(0, 1, { upload, weight, roi: crop.region }), page: 0 });
  };
}
let applyCrop = () => {};

async function remove(item) {
  if (!(await askAndDelete(item))) return;
  await afterChange();
  const isQuery = state.view === "search" && state.parts[0].id === item.id;
  if (isQuery) await go(anotherStart());
  else {
    const next = state.view === "search" ? { ...state, parts: state.parts.filter(({ id }) => id !== item.id) } : state;
    history.replaceState(next, "", addressOf(next));
    await show(next, { moveFocus: true });
  }
  $("announcement").textContent = `Deleted: ${readable(item)}. ${$("announcement").textContent}`;
}

async function add() {
  const asked = state;
  const { file } = uploads.get(state.parts[0].upload);
  const item = await askAndAdd(file, { columns: info.metadata_columns, columnValues, limits: info.limits });
  if (!item) return;
  await afterChange();
  await (state === asked ? go(searchOf({ id: item.id })) : show(state)); // Where one has gone on meanwhile, one stays.
  $("announcement").textContent = `Added as picture ${item.id}. ${$("announcement").textContent}`;
}

function afterChange() {
  running.abort(); // Whoever asked before the change must not be believed after it: whoever calls this shows again.
  lastAnswers.clear();
  return (facts = loadFacts());
}

function useKey(key) {
  api.setKey(key);
  afterChange();
  return facts.then(() => show(state, { moveFocus: true }));
}

const crop = new CropBox($("crop"), $("query-picture"), {
  onApply: () => applyCrop(),
  onCancel: () => $("crop-clear").click(),
});
const filterPanel = new FilterPanel($("filter-form"), $("conditions"), {
  columnValues,
  onChange: (conditions) => go({ ...state, conditions, ...(state.view === "start" ? { after: [] } : { page: 0 }) }),
});
const versionChoice = new VersionChoice($("versus"), {
  onChange: (versus) => go({ ...state, versus }, { moveFocus: false }),
});
const sideBySide = new SideBySide({ onRetry: () => show(state, { moveFocus: true }) });
const firstPicture = (files) => [...(files ?? [])][0];

for (const id of ["picker", "camera"]) {
  $(id).addEventListener("change", ({ target }) => {
    const file = firstPicture(target.files);
    target.value = ""; // So that choosing the same file again is a change.
    if (file) searchWith(file);
  });
}
$("query-picture").addEventListener("error", () => {
  $("stage").hidden = true; // Not a picture that browsers show; the server may still know it.
  $("drop").hidden = !takesPictures();
});
$("choose").addEventListener("click", () => $("picker").click());
$("photograph").addEventListener("click", () => $("camera").click());
$("random").addEventListener("click", () => surprise().catch(showProblem));
$("crop-apply").addEventListener("click", () => applyCrop());
$("add").addEventListener("click", () => add().catch(showProblem));
$("retry").addEventListener("click", () => afterChange().then(() => show(state, { moveFocus: true })));
$("count").addEventListener("change", () => state.view !== "start" && go({ ...state, page: 0 }, { moveFocus: false }));
$("shuffle").addEventListener("click", () => go(anotherStart()));
for (const side of ["previous", "next"]) $(side).addEventListener("click", () => pages[side] && go(pages[side]));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  $("key").value = "";
  useKey(key);
});
$("forget-key").addEventListener("click", () => useKey(null));
$("home").addEventListener("click", (event) => {
  event.preventDefault();
  go(anotherStart());
});

document.addEventListener("paste", ({ clipboardData }) => {
  const file = firstPicture(clipboardData?.files);
  if (file) searchWith(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.toggle("dragging", event.dataTransfer.types.includes("Files"));
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const file = firstPicture(event.dataTransfer.files);
  if (file) searchWith(file);
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input:not([type=file]), select, textarea, dialog");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  $("picker").focus();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // A fragment in the address would be a step in the history.
  $("heading").focus();
});
window.addEventListener("popstate", ({ state: next }) => {
  if (next) show(next, { moveFocus: true }); // Only a fragment typed into the address comes without a state.
});
moveWithArrows([$("grid"), $("other-grid")]);
prepareDialogs();

// ---- Beginning

let facts = loadFacts();
history.replaceState(stateOfAddress(), "");
await show(history.state);
