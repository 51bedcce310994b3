// What is shown is a function of one state, which is also the entry in the browser's history:
//   {view: "start", seed, conditions, after}     a random gallery to begin with; with conditions, those that fit, in
//                                                order, `after` being the last ids of the pages before
//   {view: "search", parts, conditions, page}    the nearest to the parts together, the first of which is the query:
//                                                {id, weight} or {upload, roi, weight}; uploads are kept in the tab
// and in both `versus`, the version that the one that serves is compared with, or null.

import { conditionsFrom } from "./filters.js";
import { isVersion } from "./versions.js";

export const UNWANTED = -0.5; // weight of what the pictures should not look like

export const newStart = ({ conditions = [], versus = null } = {}) =>
  ({ view: "start", seed: Math.floor(Math.random() * 2 ** 31), conditions, after: [], versus });

// What others can open, too; uploads they cannot, only that a version is compared with.
export function addressOf({ view, parts = [], conditions, page, versus }) {
  const isOpen = parts.every(({ id }) => id !== undefined);
  const fields = new URLSearchParams(isOpen ? parts.map(({ id, weight }) => [weight > 0 ? "id" : "unlike", id]) : []);
  if (isOpen && conditions.length) fields.set("filter", JSON.stringify(conditions));
  if (isOpen && view === "search" && page) fields.set("page", page + 1);
  if (versus) fields.set("with", versus);
  return fields.size ? `?${fields}` : location.pathname;
}

export function stateOfAddress() {
  const fields = new URLSearchParams(location.search);
  const conditions = conditionsFrom(fields.get("filter")) ?? [];
  const versus = isVersion(fields.get("with")) ? fields.get("with") : null;
  const parts = [["id", 1], ["unlike", UNWANTED]].flatMap(([name, weight]) =>
    fields.getAll(name).filter((id) => /^\d{1,19}$/.test(id)).map((id) => ({ id: exact(id), weight })));
  if (!parts.length || parts[0].weight < 0) {
    // An upload did not outlive the reload.
    return history.state?.view === "start" ? history.state : newStart({ conditions, versus });
  }
  const page = Number(fields.get("page"));
  return { view: "search", parts, conditions, page: Number.isInteger(page) && page > 0 ? page - 1 : 0, versus };
}

const exact = (id) => (Number.isSafeInteger(Number(id)) ? Number(id) : id);
