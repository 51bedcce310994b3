// Conditions on the pictures' metadata: as the page keeps them, as the API takes them, and the form that makes them.
//
// A condition is {column, test, values} with test "is" or "is not", or {column, test: "between", values: [low, high]}
// in which null leaves a side open. Where several values are given, any of them will do.

const TESTS = ["is", "is not", "between"];
const OWN_COLUMNS = ["key", "class_name", "width", "height"]; // beside `metadata` in the API's answers
const MOST_SUGGESTIONS = 60;

export function treeOf(conditions) {
  const trees = conditions.map(({ column, test, values }) => {
    if (test === "is") return { column, in: values };
    if (test === "is not") return { not: { column, in: values } };
    const [low, high] = values;
    return { column, ...(low !== null && { at_least: low }), ...(high !== null && { at_most: high }) };
  });
  return trees.length ? (trees.length === 1 ? trees[0] : { all: trees }) : null;
}

// Two conditions on one column with the same test become one.
export function withCondition(conditions, { column, test, values }) {
  const place = test === "between" ? -1 : conditions.findIndex((known) => known.column === column && known.test === test);
  if (place < 0) return [...conditions, { column, test, values }];
  const merged = [...new Set([...conditions[place].values, ...values])];
  return conditions.toSpliced(place, 1, { column, test, values: merged });
}

// What an address holds may have been written by anybody: null where it is not a list of conditions.
export function conditionsFrom(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    return null;
  }
  const isValue = (value) => value === null || ["string", "number", "boolean"].includes(typeof value);
  const isCondition = ({ column, test, values } = {}) =>
    typeof column === "string" && TESTS.includes(test) && Array.isArray(values) &&
    (test === "between" ? values.length === 2 : values.length > 0) && values.every(isValue);
  return Array.isArray(found) && found.every((entry) => entry && isCondition(entry)) ? found : null;
}

export function sentenceOf({ column, test, values }) {
  const named = (value) => (value === null || value === "" ? "empty" : String(value));
  const name = column.replaceAll("_", " ");
  if (test !== "between") return `${name} ${test} ${values.map(named).join(" or ")}`;
  const [low, high] = values;
  if (low === null) return `${name} at most ${high}`;
  return high === null ? `${name} at least ${low}` : `${name} from ${low} to ${high}`;
}

// What has been seen of each column: the API tells names only.
export class ColumnValues {
  #seen = new Map();

  learn(items) {
    for (const item of items) {
      const own = OWN_COLUMNS.map((name) => [name, item[name]]);
      for (const [name, value] of [...own, ...Object.entries(item.metadata ?? {})]) {
        if (value === null || value === undefined || typeof value === "object") continue;
        if (!this.#seen.has(name)) this.#seen.set(name, new Set());
        if (this.#seen.get(name).size < MOST_SUGGESTIONS) this.#seen.get(name).add(value);
      }
    }
  }

  valuesOf(column) {
    const values = [...(this.#seen.get(column) ?? [])];
    return values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  }

  // The value that a typed text stands for; a blank is an empty cell.
  read(column, text) {
    const trimmed = text.trim();
    if (!trimmed) return null;
    const example = this.valuesOf(column)[0];
    if (typeof example === "boolean" && /^(true|false)$/i.test(trimmed)) return trimmed.toLowerCase() === "true";
    const isNumber = typeof example !== "string" && Number.isFinite(Number(trimmed));
    return isNumber ? Number(trimmed) : trimmed;
  }
}

// The form, and the list of conditions above it, each with a button that takes it back.
export class FilterPanel {
  #form; #list; #columnValues; #conditions = []; #onChange;

  constructor(form, list, { columnValues, onChange }) {
    this.#form = form;
    this.#list = list;
    this.#columnValues = columnValues;
    this.#onChange = onChange;
    const { column, test } = form.elements;
    for (const field of [column, test]) field.addEventListener("change", () => this.#fit());
    form.addEventListener("focusin", () => this.#suggest());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#add();
    });
  }

  offer(columns) {
    this.#form.elements.column.replaceChildren(...columns.map((name) => new Option(name.replaceAll("_", " "), name)));
    if (columns.includes("class_name")) this.#form.elements.column.value = "class_name";
    this.#form.closest("details").hidden = !columns.length;
    this.#fit();
  }

  show(conditions) {
    this.#conditions = conditions;
    this.#list.replaceChildren(...conditions.map((condition, place) => this.#chip(condition, place)));
    this.#list.hidden = !conditions.length;
    if (conditions.length) this.#form.closest("details").open = true;
  }

  #chip(condition, place) {
    const entry = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove: ${sentenceOf(condition)}`);
    remove.addEventListener("click", () => this.#onChange(this.#conditions.toSpliced(place, 1)));
    entry.append(sentenceOf(condition), remove);
    return entry;
  }

  #fit() {
    const { test, upper, value } = this.#form.elements;
    const isRange = test.value === "between";
    upper.hidden = !isRange;
    value.placeholder = isRange ? "from" : "value; blank for none";
    value.setAttribute("aria-label", isRange ? "From" : "Value");
    value.setCustomValidity("");
    this.#suggest();
  }

  #suggest() {
    const values = this.#columnValues.valuesOf(this.#form.elements.column.value);
    this.#form.querySelector("datalist").replaceChildren(...values.map((value) => new Option("", value)));
  }

  #add() {
    const { column, test, value, upper } = this.#form.elements;
    const read = (field) => this.#columnValues.read(column.value, field.value);
    const isRange = test.value === "between";
    const values = isRange ? [read(value), read(upper)] : [read(value)];
    if (isRange && values.every((bound) => bound === null)) {
      value.setCustomValidity("Give at least one end of the range.");
      value.reportValidity();
      value.addEventListener("input", () => value.setCustomValidity(""), { once: true });
      return;
    }
    const next = withCondition(this.#conditions, { column: column.value, test: test.value, values });
    value.value = upper.value = "";
    this.#onChange(next);
  }
}
