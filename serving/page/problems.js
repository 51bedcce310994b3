// What went wrong, in a box made for it.

import { Problem } from "./api.js";

export function fillProblem(box, error) {
  const isExpected = error instanceof Problem;
  const texts = {
    title: isExpected ? error.title : "The page failed",
    detail: error.message,
    fix: isExpected ? error.fix : "Reload it.",
    id: isExpected && error.requestId ? `Request ${error.requestId}` : "",
  };
  for (const [part, text] of Object.entries(texts)) box.querySelector(`.problem-${part}`).textContent = text;
  box.querySelector(".retry").hidden = isExpected && error.isFinal;
  box.hidden = false;
  if (!isExpected) console.error(error);
}
