// Pictures of the gallery as cards in a grid, with what one can do with each.

import { hasKey, pictureFile } from "./api.js";

const $ = (id) => document.getElementById(id);
const AHEAD = "300px"; // how far below the window a picture is fetched before it is scrolled to

export const readable = (item) => (item.class_name ?? item.key ?? `Picture ${item.id}`).replaceAll(/[-_]+/g, " ");
export const thumbnailOf = (item) => item.image_url && `${item.image_url}&size=thumbnail`;

const nearby = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      nearby.unobserve(target);
      showWithKey(target);
    }
  },
  { rootMargin: AHEAD },
);

async function showWithKey(image) {
  const address = image.dataset.picture;
  try {
    const url = URL.createObjectURL(await pictureFile(address));
    for (const end of ["load", "error"]) image.addEventListener(end, () => URL.revokeObjectURL(url), { once: true });
    if (image.dataset.picture === address) image.src = url; // else another one was wanted meanwhile
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// A browser sends no key with what <img> asks for, so with a key pictures are fetched by us.
export function setPicture(image, url) {
  delete image.dataset.picture;
  if (!hasKey() || url.startsWith("blob:")) {
    image.src = url;
    return;
  }
  image.dataset.picture = url;
  nearby.observe(image);
}

export function letterOf(item) {
  const letter = document.createElement("span");
  letter.className = "letter";
  letter.textContent = readable(item).slice(0, 1).toUpperCase();
  return letter;
}

// `on`: what happens with an item that is searched by, wanted, unwanted, deleted; without the last, it cannot be.
export function cardOf(item, { className, on }) {
  const entry = $("card").content.cloneNode(true);
  const [card, image, score] = [".card", "img", ".score"].map((selector) => entry.querySelector(selector));
  const isSame = className !== null && item.class_name === className;
  const isHit = item.score !== undefined;
  const name = readable(item);
  card.dataset.id = item.id;
  card.title = name;
  card.classList.toggle("same", isSame);
  const similarity = isHit ? `, similarity ${item.score.toFixed(2)}` : "";
  card.dataset.label = `${name}${similarity}${isSame ? ", same class" : ""}. Search by this picture`;
  card.setAttribute("aria-label", card.dataset.label);
  card.addEventListener("click", () => on.search(item));
  entry.querySelector(".label").textContent = name;
  image.addEventListener("error", () => image.replaceWith(letterOf(item)));
  if (item.image_url) setPicture(image, thumbnailOf(item));
  else image.replaceWith(letterOf(item));
  score.hidden = !isHit;
  if (isHit) {
    entry.querySelector(".fill").style.setProperty("--score", Math.min(1, Math.max(0, item.score)));
    entry.querySelector(".value").textContent = item.score.toFixed(2);
  }
  const actions = { ".more": ["More like", on.more], ".less": ["Less like", on.less], ".delete": ["Delete", on.delete] };
  for (const [selector, [verb, action]] of Object.entries(actions)) {
    const button = entry.querySelector(selector);
    button.hidden = !action;
    button.setAttribute("aria-label", `${verb} ${name}`);
    button.addEventListener("click", () => action(item));
  }
  return entry;
}

// Where a card stands among the hits, from 1, and what became of it in the other version, if anything.
export function showPlace(card, rank, change) {
  const place = card.querySelector(".place");
  place.hidden = false;
  place.querySelector(".rank").textContent = rank;
  place.querySelector(".change").textContent = change;
  card.setAttribute("aria-label", `Rank ${rank}${change && `, ${change}`}: ${card.dataset.label}`);
}

// Arrow keys lead from card to card, as they are seen; `grids` of one column each lie side by side.
export function moveWithArrows(grids) {
  const cardsIn = (grid) => [...(grid?.querySelectorAll(".card") ?? [])];
  const nextCard = (grid, card, key) => {
    const cards = cardsIn(grid);
    if (key === "Home") return cards[0];
    if (key === "End") return cards.at(-1);
    const numColumns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -numColumns, ArrowDown: numColumns }[key];
    if (!step) return null;
    const place = cards.indexOf(card);
    const beside = key === "ArrowLeft" || key === "ArrowRight" ? cardsIn(grids[grids.indexOf(grid) + step]) : [];
    return numColumns === 1 && beside.length ? (beside[place] ?? beside.at(-1)) : cards[place + step];
  };
  for (const grid of grids) {
    grid.addEventListener("keydown", (event) => {
      if (!event.target.matches(".card") || event.ctrlKey || event.metaKey || event.altKey) return;
      const next = nextCard(grid, event.target, event.key);
      if (!next) return;
      event.preventDefault();
      next.focus();
    });
  }
}
