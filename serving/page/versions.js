// Two versions of the index, one beside the other: which one is compared with, and what became of each hit.

import { Problem, indexes } from "./api.js";
import { showPlace } from "./cards.js";
import { fillProblem } from "./problems.js";

const $ = (id) => document.getElementById(id);
const numberOf = (name) => Number(name.slice(1));

export const isVersion = (text) => /^v\d{4,18}$/.test(text ?? "");

// The versions beside the one that serves, to choose from. Not to be seen where there are none.
export class VersionChoice {
  #select; #others = []; #chosen = null;

  constructor(select, { onChange }) {
    this.#select = select;
    select.addEventListener("change", () => onChange(select.value || null));
  }

  // Never fails: nobody needs to compare.
  async load(signal) {
    let others = [];
    try {
      const { served, versions } = await indexes(signal);
      others = versions.map(({ version }) => version).filter((version) => version !== served);
    } catch (error) {
      if (!(error instanceof Problem) && !signal.aborted) console.error(error);
    }
    if (signal.aborted) return;
    this.#others = others;
    this.show(this.#chosen);
  }

  show(chosen = null) {
    this.#chosen = chosen;
    // An address may name one that is not there any more, or serves by now: it has to be seen to be left.
    const offered = this.#others.concat(chosen === null || this.#others.includes(chosen) ? [] : chosen);
    const options = offered.toReversed().map((version) => new Option(version, version));
    this.#select.replaceChildren(new Option("none", ""), ...options);
    this.#select.value = chosen ?? "";
    this.#select.closest("label").hidden = !offered.length;
  }
}

// For each hit, best first, where `others`, what the other version found, have it.
function changesOf(hits, others) {
  const places = new Map(others.map(({ id }, place) => [id, place]));
  return hits.map(({ id }, place) => {
    if (!places.has(id)) return "only here";
    const shift = places.get(id) - place;
    return shift ? `${shift > 0 ? "up" : "down"} ${Math.abs(shift)}` : "";
  });
}

// New and gone are what the later version has brought, whichever of the two serves.
function summaryOf(served, other, page) {
  const [from, to] = numberOf(other.version) <= numberOf(served.version) ? [other, served] : [served, other];
  const changes = changesOf(to.hits, from.hits);
  const numNew = changes.filter((change) => change === "only here").length;
  const numMoved = changes.filter(Boolean).length - numNew;
  const numSame = to.hits.length - numNew;
  const same = `${numSame} of ${page ? "the first " : ""}${to.hits.length} the same`;
  const moved = numMoved ? `, ${numMoved} of them moved` : "";
  return `From ${from.version} to ${to.version}: ${same}${moved}; ${numNew} new, ${from.hits.length - numSame} gone.`;
}

function showPlaces(grid, start, changes = []) {
  for (const [place, card] of [...grid.querySelectorAll(".card")].entries()) {
    showPlace(card, start + place + 1, changes[start + place] ?? "");
  }
}

export class SideBySide {
  constructor({ onRetry }) {
    $("other-problem").querySelector(".retry").addEventListener("click", onRetry);
  }

  close() {
    $("columns").classList.remove("compared");
    for (const id of ["comparison", "other", "served-name", "other-problem"]) $(id).hidden = true;
    for (const id of ["comparison", "served-name", "other-name", "other-note"]) $(id).textContent = "";
    $("other-grid").replaceChildren();
    $("other-grid").removeAttribute("aria-busy");
  }

  #open(served, other) {
    this.close();
    $("columns").classList.add("compared");
    $("served-name").textContent = `${served}, serving`;
    $("other-name").textContent = other;
    $("other-note").textContent = "Searching …";
    $("other-grid").setAttribute("aria-busy", "true");
    for (const id of ["other", "served-name"]) $(id).hidden = false;
  }

  // `answer` of the version that serves is shown; `other`: what will be known of the other one, {answer} or {error}.
  // Resolves to the summary; or to null where there is nothing to compare, or a newer search took over.
  async compare(answer, versus, other, { page, size, cardsOf, signal }) {
    const start = page * size;
    this.#open(answer.index_version, versus);
    showPlaces($("grid"), start);
    const { answer: others, error } = await other;
    if (signal.aborted) return null;
    if (error) return this.#fail(error);
    // Places are among all hits up to this page, whatever more is known.
    const [served, compared] = [answer, others].map(({ index_version: version, hits }) =>
      ({ version, hits: hits.slice(0, start + size) }));
    const cards = cardsOf(compared.hits.slice(start));
    $("other-grid").replaceChildren(...cards);
    this.#end(cards.length ? "" : page ? "No more pictures." : "Nothing found.");
    showPlaces($("grid"), start, changesOf(served.hits, compared.hits));
    showPlaces($("other-grid"), start, changesOf(compared.hits, served.hits));
    $("comparison").textContent = summaryOf(served, compared, page);
    $("comparison").hidden = false;
    return $("comparison").textContent;
  }

  #fail(error) {
    this.#end("");
    fillProblem($("other-problem"), error);
    return null;
  }

  #end(note) {
    $("other-note").textContent = note;
    $("other-grid").removeAttribute("aria-busy");
  }
}
