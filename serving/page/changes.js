// Adding to the gallery and deleting from it, for those who may.

import { addItem, deleteItem } from "./api.js";
import { readable } from "./cards.js";

const $ = (id) => document.getElementById(id);
const MEASURED = new Set(["width", "height"]); // the server sees these itself

let answer = () => {}; // settles what the open dialog asks

// Resolves to whether it was confirmed. The dialog's own "close" event comes too late: by then it may ask again.
function confirmed(dialog) {
  dialog.showModal();
  return new Promise((resolve) => (answer = resolve));
}

// Forms would send themselves away, which the page's policy forbids: they close their dialog.
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    const end = (isConfirmed) => {
      answer(isConfirmed);
      dialog.close();
    };
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      end(true);
    });
    dialog.querySelector(".cancel").addEventListener("click", () => end(false));
    dialog.addEventListener("cancel", () => answer(false)); // Escape, or a phone's way back
  }
}

// Whether it was deleted.
export async function askAndDelete(item) {
  $("delete-what").textContent = `${readable(item)} (picture ${item.id})`;
  if (!(await confirmed($("delete-dialog")))) return false;
  await deleteItem(item.id);
  return true;
}

// The new item, or null.
export async function askAndAdd(file, { columns, columnValues, limits }) {
  const fields = columns.filter((name) => !MEASURED.has(name)).map((name) => fieldOf(name, columnValues.valuesOf(name)));
  $("add-fields").replaceChildren(...fields);
  if (!(await confirmed($("add-dialog")))) return null;
  const inputs = [...$("add-fields").querySelectorAll("input")].filter(({ value }) => value.trim());
  const metadata = Object.fromEntries(inputs.map(({ name, value }) => [name, columnValues.read(name, value)]));
  return addItem(file, { metadata, limits });
}

function fieldOf(name, values) {
  const [label, input, list] = ["label", "input", "datalist"].map((tag) => document.createElement(tag));
  input.name = name;
  input.autocomplete = "off";
  list.id = `known-${name}`;
  list.append(...values.map((value) => new Option("", value)));
  input.setAttribute("list", list.id);
  label.append(name.replaceAll("_", " "), input, list);
  return label;
}
