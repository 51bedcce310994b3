// The search page. What is shown is a function of one state, which is also the entry in the browser's history:
//   {view: "start", seed, conditions, after}     a random gallery to begin with; with conditions, those that fit, in
//                                                order, `after` being the last ids of the pages before
//   {view: "search", parts, conditions, page}    the nearest to the parts together, the first of which is the query:
//                                                {id, weight} or {upload, roi, weight}; uploads are kept in `uploads`

import * as api from "./api.js";
import { cardOf, letterOf, moveWithArrows, readable, setPicture, thumbnailOf } from "./cards.js";
import { askAndAdd, askAndDelete, prepareDialogs } from "./changes.js";
import { CropBox } from "./crop.js";
import { ColumnValues, FilterPanel, conditionsFrom, treeOf } from "./filters.js";

const $ = (id) => document.getElementById(id);
const STAGES = ["lookup", "decode", "encode", "search", "rerank", "metadata", "queue"];
const GALLERY_SIZE = 24;
const UNWANTED = -0.5; // weight of what the pictures should not look like

const uploads = new Map(); // number -> {file, url, name}; lives as long as the tab
const columnValues = new ColumnValues();
let state = null;
let info = null;
let running = new AbortController();
let lastAnswer = null; // {query, k, answer}: pages of one search need not ask again
let pages = { previous: null, next: null }; // states

const mayWrite = () => info?.scopes.includes("write") ?? false;
const takesPictures = () => info?.takes_pictures ?? true; // as long as nothing is known, the server may say no

// ---- Moving between states

const newStart = (conditions = []) => ({ view: "start", seed: Math.floor(Math.random() * 2 ** 31), conditions, after: [] });
const searchOf = (part, conditions = state.conditions) => ({ view: "search", parts: [{ weight: 1, ...part }], conditions, page: 0 });

// What others can open, too; uploads they cannot.
function addressOf({ view, parts = [], conditions, page }) {
  if (parts.some(({ id }) => id === undefined)) return location.pathname;
  const fields = new URLSearchParams(parts.map(({ id, weight }) => [weight > 0 ? "id" : "unlike", id]));
  if (conditions.length) fields.set("filter", JSON.stringify(conditions));
  if (view === "search" && page) fields.set("page", page + 1);
  return fields.size ? `?${fields}` : location.pathname;
}

function stateOfAddress() {
  const fields = new URLSearchParams(location.search);
  const conditions = conditionsFrom(fields.get("filter")) ?? [];
  const parts = [["id", 1], ["unlike", UNWANTED]].flatMap(([name, weight]) =>
    fields.getAll(name).filter((id) => /^\d{1,19}$/.test(id)).map((id) => ({ id: exact(id), weight })));
  if (!parts.length || parts[0].weight < 0) {
    // An upload did not outlive the reload.
    return history.state?.view === "start" ? history.state : newStart(conditions);
  }
  const page = Number(fields.get("page"));
  return { view: "search", parts, conditions, page: Number.isInteger(page) && page > 0 ? page - 1 : 0 };
}

const exact = (id) => (Number.isSafeInteger(Number(id)) ? Number(id) : id);

function go(next) {
  history.pushState(next, "", addressOf(next));
  return show(next, { moveFocus: true });
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
  $("grid").setAttribute("aria-busy", "true");
  filterPanel.show(next.conditions);
  try {
    await VIEWS[next.view](next, mine.signal);
    if (mine.signal.aborted) return;
    $("grid").removeAttribute("aria-busy");
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

  async search({ parts, conditions, page }, signal) {
    if (parts.some(({ upload }) => upload !== undefined && !uploads.has(upload))) {
      const detail = "Pictures you search with are kept in this tab only, until it is reloaded.";
      throw new api.Problem({ title: "The picture is gone", status: 410, detail, fix: "Choose it again." });
    }
    const [described, answer] = await Promise.all([
      Promise.all(parts.map((part) => describe(part, signal))),
      answerTo({ parts, conditions, page }, signal),
    ]);
    signal.throwIfAborted();
    showQuery(described);
    showAnswer(answer, { page, className: described[0].item?.class_name ?? null });
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
async function answerTo({ parts, conditions, page }, signal) {
  await facts;
  const k = Math.min((page + 1) * numberShown() + 1, info?.limits.max_k ?? Infinity);
  const query = JSON.stringify([parts, conditions]);
  const isKnown = lastAnswer?.query === query && (lastAnswer.k >= k || lastAnswer.answer.hits.length < lastAnswer.k);
  if (isKnown) return lastAnswer.answer;
  const complete = parts.map((part) => ({ ...part, file: uploads.get(part.upload)?.file }));
  const answer = await api.search(complete, { k, filter: treeOf(conditions), limits: info?.limits, signal });
  lastAnswer = { query, k, answer };
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

function showCards(items, { heading, summary, className = null }) {
  columnValues.learn(items);
  const on = {
    search: (item) => go(searchOf({ id: item.id })),
    more: (item) => together(item, 1),
    less: state.view === "search" ? (item) => together(item, UNWANTED) : null,
    delete: mayWrite() ? (item) => remove(item).catch(showProblem) : null,
  };
  $("heading").textContent = heading;
  $("summary").textContent = summary;
  $("grid").replaceChildren(...items.map((item) => cardOf(item, { className, on })));
  $("announcement").textContent = heading && `${heading}: ${items.length} pictures. ${summary}`;
}

function showProblem(error) {
  if (error.name === "AbortError") return;
  $("grid").removeAttribute("aria-busy");
  const isExpected = error instanceof api.Problem;
  $("problem-title").textContent = isExpected ? error.title : "The page failed";
  $("problem-detail").textContent = error.message;
  $("problem-fix").textContent = isExpected ? error.fix : "Reload it.";
  $("problem-id").textContent = isExpected && error.requestId ? `Request ${error.requestId}` : "";
  $("key-form").hidden = !(isExpected && error.wantsKey);
  $("retry").hidden = isExpected && error.isFinal;
  $("problem").hidden = false;
  if (!isExpected) console.error(error);
}

// Never fails: whatever is wrong with the server, the search that waits for this will say.
async function loadFacts() {
  $("forget-key").hidden = !api.hasKey();
  try {
    info = await api.info();
  } catch (error) {
    info = null;
    if (!(error instanceof api.Problem)) console.error(error);
    return;
  }
  for (const option of [...$("count").options].slice(1)) option.disabled = Number(option.value) > info.limits.max_k;
  $("num-pictures").textContent = `${info.num_vectors.toLocaleString("en")} pictures`;
  $("version").textContent = ` · index ${info.index_version}`;
  for (const id of ["choose", "photograph"]) $(id).hidden = !takesPictures();
  filterPanel.offer(info.metadata_columns);
}

// ---- What people do

async function surprise() {
  const { items } = await api.randomItems(1);
  if (items.length) await go(searchOf({ id: items[0].id }, []));
}

async function startCropping(main) {
  if (main.item) {
    // Regions are of pictures that are sent: the original takes the place of its id once a region is searched by.
    main.original ??= await api.pictureFile(main.item.image_url);
    main.originalUrl ??= URL.createObjectURL(main.original);
    $("query-picture").src = main.originalUrl;
    await $("query-picture").decode();
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
  if (isQuery) await go(newStart());
  else {
    const next = state.view === "search" ? { ...state, parts: state.parts.filter(({ id }) => id !== item.id) } : state;
    history.replaceState(next, "", addressOf(next));
    await show(next, { moveFocus: true });
  }
  $("announcement").textContent = `Deleted: ${readable(item)}. ${$("announcement").textContent}`;
}

async function add() {
  const { file } = uploads.get(state.parts[0].upload);
  const item = await askAndAdd(file, { columns: info.metadata_columns, columnValues, limits: info.limits });
  if (!item) return;
  await afterChange();
  await go(searchOf({ id: item.id }));
  $("announcement").textContent = `Added as picture ${item.id}. ${$("announcement").textContent}`;
}

function afterChange() {
  lastAnswer = null;
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
$("count").addEventListener("change", () => state.view !== "start" && go({ ...state, page: 0 }));
$("shuffle").addEventListener("click", () => go(newStart()));
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
  go(newStart());
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
moveWithArrows($("grid"));
prepareDialogs();

// ---- Beginning

let facts = loadFacts();
history.replaceState(stateOfAddress(), "");
await show(history.state);
