// Asks the server, and says in one way what went wrong. Knows nothing of what is on the page.

const KEY = "lookalike_key"; // of this tab's storage alone: closed with it, and sent to nobody but this server
const FORM_OVERHEAD_BYTES = 4096;

export class Problem extends Error {
  constructor({ title, detail, status = 0, code = "", fix = "", request_id = "" }) {
    super(detail);
    Object.assign(this, { title, status, code, fix, requestId: request_id });
  }

  get wantsKey() {
    return this.code.startsWith("key.");
  }

  // The same request would be refused again; but not after a while, where it came too early.
  get isFinal() {
    return this.status >= 400 && this.status < 500 && this.status !== 408 && this.status !== 429;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

async function send(url, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  // A key of other characters cannot be sent at all, and so is none of this server's.
  const isSendable = key !== null && /^[\x21-\x7e]+$/.test(key);
  const complete = isSendable ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(url, { ...options, headers: complete });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "No answer",
      detail: "The server could not be reached.",
      fix: "Check that it is still running, then try again.",
    });
  }
  if (response.ok) return response;
  const unreadable = { title: "Unreadable answer", detail: `Status ${response.status}.`, status: response.status };
  throw new Problem(await response.json().catch(() => unreadable));
}

// Ids have 64 bits, of which a script's numbers hold 53: the others stay the digits that they came as.
const exactNumber = (name, value, context) =>
  typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) ? (context?.source ?? value) : value;
export const numberOf = (id) => (typeof id === "string" && JSON.rawJSON ? JSON.rawJSON(id) : Number(id));

async function ask(url, options) {
  const response = await send(url, options);
  return response.status === 204 ? null : JSON.parse(await response.text(), exactNumber);
}

export const info = (signal) => ask("v1/info", { signal });
export const indexes = (signal) => ask("v1/indexes", { signal });
export const item = (id, signal) => ask(`v1/items/${id}`, { signal });
export const deleteItem = (id) => ask(`v1/items/${id}`, { method: "DELETE" });

// A picture's bytes. An <img> sends no key, so where there is one, pictures come this way.
export const pictureFile = async (url, signal = null) => (await send(url, { signal })).blob();

export function randomItems(count, { seed = null, signal = null } = {}) {
  const fields = new URLSearchParams({ sample: count });
  if (seed !== null) fields.set("seed", seed);
  return ask(`v1/items?${fields}`, { signal });
}

export function listItems({ filter, limit, afterId = null, signal }) {
  const fields = new URLSearchParams({ limit, filter: JSON.stringify(filter) });
  if (afterId !== null) fields.set("after_id", afterId);
  return ask(`v1/items?${fields}`, { signal });
}

// `parts`: {id, weight} or {file, roi, weight}; `filter`: null for all pictures; `version`: null for the one that serves.
export function search(parts, { k, filter, version, limits, signal }) {
  const files = parts.flatMap(({ file }) => (file ? [file] : []));
  const form = new FormData();
  const described = parts.map(({ id, file, roi, weight }, place) => {
    if (!file) return { id: numberOf(id), weight };
    form.append(`picture${place}`, file);
    return { image: `picture${place}`, weight, ...(roi && { roi }) };
  });
  if (!files.length) {
    const body = JSON.stringify({ parts: described, k, ...(filter && { filter }), ...(version && { version }) });
    return ask("v1/search", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  }
  requireRoom(files, limits);
  form.append("parts", JSON.stringify(described));
  form.append("k", k);
  if (filter) form.append("filter", JSON.stringify(filter));
  if (version) form.append("version", version);
  return ask("v1/search", { method: "POST", body: form, signal });
}

export function addItem(file, { metadata, limits }) {
  requireRoom([file], limits);
  const form = new FormData();
  form.append("image", file);
  form.append("metadata", JSON.stringify(metadata));
  return ask("v1/items", { method: "POST", body: form });
}

// Some servers close the connection on a body that is too long, which browsers report as no answer at all.
function requireRoom(files, limits) {
  const numBytes = files.reduce((sum, file) => sum + file.size + FORM_OVERHEAD_BYTES, 0);
  if (!limits || numBytes <= limits.max_body_bytes) return;
  const megabytes = Math.floor(limits.max_body_bytes / 2 ** 20);
  throw new Problem({
    title: "Too large",
    status: 413,
    detail: `This server takes pictures of up to ${megabytes} MiB.`,
    fix: "Choose a smaller one.",
  });
}
