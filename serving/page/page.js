// The search page. What is shown is a function of one state, which is also the entry in the browser's history:
//   {view: "start", seed}          a random gallery to begin with
//   {view: "item", id}             the nearest to a picture of the index
//   {view: "upload", upload}       the nearest to a picture from this person, kept in `uploads`

const $ = (id) => document.getElementById(id);
const STAGES = ["lookup", "decode", "encode", "search", "metadata", "queue"];
const GALLERY_SIZE = 24;
const FORM_OVERHEAD_BYTES = 4096;

const uploads = new Map(); // number -> {file, url}; lives as long as the tab
let state = null;
let limits = null;
let running = new AbortController();

class Problem extends Error {
  constructor({ title, detail, status = 0, fix = "", request_id = "" }) {
    super(detail);
    Object.assign(this, { title, status, fix, requestId: request_id });
  }
}

// ---- Talking to the server

async function ask(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { signal: running.signal, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "No answer",
      detail: "The server could not be reached.",
      fix: "Check that it is still running, then try again.",
    });
  }
  const answer = await response.json().catch(() => ({ title: "Unreadable answer", detail: `Status ${response.status}.`, status: response.status }));
  if (!response.ok) throw new Problem(answer);
  return answer;
}

const numberShown = () => Number($("count").value);

function searchById(id) {
  return ask("v1/search", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ id, k: numberShown() }),
  });
}

function searchByFile(file) {
  if (limits && file.size + FORM_OVERHEAD_BYTES > limits.max_body_bytes) {
    const megabytes = Math.floor(limits.max_body_bytes / 2 ** 20);
    const detail = `This server takes pictures of up to ${megabytes} MiB.`;
    throw new Problem({ title: "Too large", status: 413, detail, fix: "Choose a smaller one." });
  }
  const form = new FormData();
  form.append("image", file);
  form.append("k", numberShown());
  return ask("v1/search", { method: "POST", body: form });
}

// ---- Moving between states

function go(next) {
  history.pushState(next, "", next.view === "item" ? `?id=${next.id}` : location.pathname);
  return show(next, { moveFocus: true });
}

function searchWith(file) {
  const upload = uploads.size + 1;
  uploads.set(upload, { file, url: URL.createObjectURL(file) });
  return go({ view: "upload", upload });
}

async function surprise() {
  const { items } = await ask("v1/items?sample=1");
  if (items.length) await go({ view: "item", id: items[0].id });
}

const newStart = () => ({ view: "start", seed: Math.floor(Math.random() * 2 ** 31) });

async function show(next, { moveFocus = false } = {}) {
  state = next;
  running.abort();
  running = new AbortController();
  $("problem").hidden = true;
  $("grid").setAttribute("aria-busy", "true");
  try {
    await VIEWS[next.view](next);
    $("grid").removeAttribute("aria-busy");
    if (moveFocus) {
      window.scrollTo({ top: 0 });
      $("heading").focus({ preventScroll: true });
    }
  } catch (error) {
    if (error.name === "AbortError") return; // A newer search took over.
    showCards([], { heading: "", summary: "" });
    showTimings(null);
    showProblem(error);
  }
}

const VIEWS = {
  async start({ seed }) {
    const { items } = await ask(`v1/items?sample=${GALLERY_SIZE}&seed=${seed}`);
    showQuery({});
    showTimings(null);
    showCards(items, {
      heading: items.length ? "Or start from one of these" : "This index is empty",
      summary: items.length ? "" : "Build one with pictures, then start the server again.",
    });
    $("shuffle").hidden = !items.length;
  },

  async item({ id }) {
    const [item, answer] = await Promise.all([ask(`v1/items/${id}`), searchById(id)]);
    showQuery({ url: item.image_url, name: readable(item), note: `Picture ${item.id} of the index` });
    showAnswer(answer, item.class_name);
  },

  async upload({ upload }) {
    const { file, url } = uploads.get(upload) ?? {};
    if (!file) {
      const detail = "Pictures you search with are kept in this tab only, until it is reloaded.";
      throw new Problem({ title: "The picture is gone", status: 410, detail, fix: "Choose it again." });
    }
    showQuery({ url, name: "Your picture", note: file.name });
    showAnswer(await searchByFile(file), null);
  },
};

// ---- Drawing

const readable = (item) => (item.class_name ?? item.key).replaceAll(/[-_]+/g, " ");

function showQuery({ url = null, name = "", note = "" }) {
  const picture = $("query-picture");
  picture.hidden = !url;
  if (url) picture.src = url;
  else picture.removeAttribute("src");
  picture.alt = name;
  $("drop").classList.toggle("filled", Boolean(url));
  const small = document.createElement("small");
  small.textContent = note;
  $("query-name").replaceChildren(name, small);
  $("query-name").hidden = !name;
  document.title = name ? `${name} · Lookalike` : "Lookalike";
}

function showAnswer({ hits, timings_ms }, className) {
  const numSame = hits.filter((hit) => className !== null && hit.class_name === className).length;
  const summary = className !== null && hits.length ? `${numSame} of ${hits.length} share its class` : "";
  showCards(hits, { heading: hits.length ? "Nearest pictures" : "Nothing found", summary, className });
  $("shuffle").hidden = true;
  showTimings(timings_ms);
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
  $("heading").textContent = heading;
  $("summary").textContent = summary;
  $("grid").replaceChildren(...items.map((item) => cardOf(item, className)));
  $("announcement").textContent = heading && `${heading}: ${items.length} pictures. ${summary}`;
}

function cardOf(item, className) {
  const entry = $("card").content.cloneNode(true);
  const [card, image, score] = [".card", "img", ".score"].map((selector) => entry.querySelector(selector));
  const isSame = className !== null && item.class_name === className;
  const isHit = item.score !== undefined;
  card.dataset.id = item.id;
  card.title = readable(item);
  card.classList.toggle("same", isSame);
  card.setAttribute(
    "aria-label",
    `${readable(item)}${isHit ? `, similarity ${item.score.toFixed(2)}` : ""}${isSame ? ", same class" : ""}. Search by this picture`,
  );
  card.addEventListener("click", () => go({ view: "item", id: item.id }));
  entry.querySelector(".label").textContent = readable(item);
  image.addEventListener("error", () => image.replaceWith(letterOf(item)));
  if (item.image_url) image.src = item.image_url;
  else image.replaceWith(letterOf(item));
  score.hidden = !isHit;
  if (isHit) {
    entry.querySelector(".fill").style.setProperty("--score", Math.min(1, Math.max(0, item.score)));
    entry.querySelector(".value").textContent = item.score.toFixed(2);
  }
  return entry;
}

function letterOf(item) {
  const letter = document.createElement("span");
  letter.className = "letter";
  letter.textContent = readable(item).slice(0, 1).toUpperCase();
  return letter;
}

function showProblem(error) {
  if (error.name === "AbortError") return;
  $("grid").removeAttribute("aria-busy");
  const isExpected = error instanceof Problem;
  $("problem-title").textContent = isExpected ? error.title : "The page failed";
  $("problem-detail").textContent = error.message;
  $("problem-fix").textContent = isExpected ? error.fix : "Reload it.";
  $("problem-id").textContent = isExpected && error.requestId ? `Request ${error.requestId}` : "";
  $("retry").hidden = error.status >= 400 && error.status < 500; // The same request would be refused again.
  $("problem").hidden = false;
  if (!isExpected) console.error(error);
}

async function showFacts() {
  const info = await ask("v1/info", { signal: null });
  limits = info.limits;
  for (const option of [...$("count").options].slice(1)) option.disabled = Number(option.value) > limits.max_k;
  $("num-pictures").textContent = `${info.num_vectors.toLocaleString("en")} pictures`;
  $("version").textContent = ` · index ${info.index_version}`;
}

// ---- What people do

const firstPicture = (files) => [...(files ?? [])][0];

$("picker").addEventListener("change", ({ target }) => {
  const file = firstPicture(target.files);
  target.value = ""; // So that choosing the same file again is a change.
  if (file) searchWith(file);
});
$("query-picture").addEventListener("error", () => {
  $("query-picture").hidden = true; // Not a picture that browsers show; the server may still know it.
  $("drop").classList.remove("filled");
});
$("choose").addEventListener("click", () => $("picker").click());
$("random").addEventListener("click", () => surprise().catch(showProblem));
$("retry").addEventListener("click", () => show(state));
$("count").addEventListener("change", () => state.view !== "start" && show(state));
$("shuffle").addEventListener("click", () => go(newStart()));
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
  const isTyping = event.target.closest?.("input:not([type=file]), select, textarea");
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

// ---- Beginning

function firstState() {
  const id = new URLSearchParams(location.search).get("id") ?? "";
  if (/^\d+$/.test(id)) return { view: "item", id: Number(id) };
  return history.state?.view === "start" ? history.state : newStart(); // An upload did not outlive the reload.
}

history.replaceState(firstState(), "");
await show(history.state);
showFacts().catch(showProblem);
