// A box over a picture: which region of it is meant. For mouse, pen, touch and keyboard.
//
// Regions are [left, top, right, bottom] in pixels of the upright picture, as the API takes them.

const EDGES = ["left", "top", "right", "bottom"];
const SMALLEST_SHARE = 0.03; // of the picture's width and height: below, nobody can hold the box any more
const STEP = 0.01, LONG_STEP = 0.1;
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export class CropBox {
  #area; #image; #box; #region = null; #drag = null;

  // `area` covers the image element and holds the box, whose elements with `data-edges` change those edges.
  constructor(area, image, { onApply, onCancel }) {
    this.#area = area;
    this.#image = image;
    this.#box = area.querySelector(".crop-box");
    area.addEventListener("pointerdown", (event) => this.#begin(event));
    area.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) area.addEventListener(end, () => (this.#drag = null));
    area.addEventListener("keydown", (event) => {
      if (!this.isOpen) return;
      if (event.key === "Enter") onApply();
      else if (event.key === "Escape") onCancel();
      else if (!this.#press(event)) return;
      event.preventDefault();
    });
    new ResizeObserver(() => this.#draw()).observe(area);
    image.addEventListener("load", () => this.#draw());
  }

  get isOpen() {
    return !this.#area.hidden && !this.#area.classList.contains("fixed");
  }

  get region() {
    return this.#region?.map(Math.round);
  }

  // To be changed; begins with the whole picture but for a margin, so that all handles can be seen.
  open(region) {
    const [width, height] = this.#size();
    this.#show(region ?? [0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height], { isFixed: false });
    this.#box.focus();
  }

  // To be seen only.
  showFixed(region) {
    this.#show(region, { isFixed: true });
  }

  close() {
    this.#region = null;
    this.#area.hidden = true;
  }

  #show(region, { isFixed }) {
    this.#region = [...region];
    this.#area.hidden = false;
    this.#area.classList.toggle("fixed", isFixed);
    this.#area.inert = isFixed;
    this.#draw();
  }

  #size() {
    return [this.#image.naturalWidth || 1, this.#image.naturalHeight || 1];
  }

  // Where the picture lies in the area, which it fills in one direction only.
  #placement() {
    const [width, height] = this.#size();
    const { clientWidth, clientHeight } = this.#area;
    const scale = Math.min(clientWidth / width, clientHeight / height) || 1;
    return { scale, x: (clientWidth - width * scale) / 2, y: (clientHeight - height * scale) / 2 };
  }

  #draw() {
    if (!this.#region) return;
    const { scale, x, y } = this.#placement();
    const [left, top, right, bottom] = this.#region;
    const pixels = { left: x + left * scale, top: y + top * scale, width: (right - left) * scale, height: (bottom - top) * scale };
    for (const [name, value] of Object.entries(pixels)) this.#box.style.setProperty(name, `${value}px`);
    for (const handle of this.#box.querySelectorAll("[role=slider]")) {
      const place = EDGES.indexOf(handle.dataset.edges);
      const most = this.#size()[place % 2];
      handle.setAttribute("aria-valuemax", most);
      handle.setAttribute("aria-valuenow", Math.round(this.#region[place]));
      handle.setAttribute("aria-valuetext", `${Math.round(this.#region[place])} of ${most} pixels`);
    }
  }

  #pointAt(event) {
    const { scale, x, y } = this.#placement();
    const { left, top } = this.#area.getBoundingClientRect();
    const [width, height] = this.#size();
    return [clamp((event.clientX - left - x) / scale, 0, width), clamp((event.clientY - top - y) / scale, 0, height)];
  }

  #begin(event) {
    if (!this.isOpen || event.button !== 0) return;
    this.#area.setPointerCapture(event.pointerId);
    (event.target.closest("[tabindex]") ?? this.#box).focus({ preventScroll: true });
    const start = this.#pointAt(event);
    const edges = event.target.dataset.edges?.split(" ");
    if (edges) this.#drag = { kind: "edges", edges };
    else if (event.target.closest(".crop-box")) this.#drag = { kind: "box", start, region: [...this.#region] };
    else this.#drag = { kind: "new", start };
    event.preventDefault();
  }

  #move(event) {
    if (!this.#drag) return;
    const point = this.#pointAt(event);
    const { kind, edges, start, region } = this.#drag;
    if (kind === "edges") for (const edge of edges) this.#setEdge(EDGES.indexOf(edge), point[EDGES.indexOf(edge) % 2]);
    else if (kind === "box") this.#moveTo(region, [point[0] - start[0], point[1] - start[1]]);
    else this.#stretch(start, point);
    this.#draw();
  }

  #setEdge(place, value) {
    const axis = place % 2, most = this.#size()[axis], least = most * SMALLEST_SHARE;
    const isFar = place >= 2, other = this.#region[isFar ? axis : axis + 2];
    this.#region[place] = isFar ? clamp(value, other + least, most) : clamp(value, 0, other - least);
  }

  #moveTo(region, shift) {
    this.#size().forEach((most, axis) => {
      const extent = region[axis + 2] - region[axis];
      this.#region[axis] = clamp(region[axis] + shift[axis], 0, most - extent);
      this.#region[axis + 2] = this.#region[axis] + extent;
    });
  }

  #stretch(start, point) {
    this.#size().forEach((most, axis) => {
      const least = most * SMALLEST_SHARE;
      const low = clamp(Math.min(start[axis], point[axis]), 0, most - least);
      this.#region[axis] = low;
      this.#region[axis + 2] = Math.max(low + least, Math.max(start[axis], point[axis]));
    });
  }

  #press({ key, shiftKey, target }) {
    const step = shiftKey ? LONG_STEP : STEP;
    const [dx, dy] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[key] ?? [0, 0];
    if (!dx && !dy) return false;
    const [width, height] = this.#size();
    const shift = [dx * width, dy * height];
    const place = EDGES.indexOf(target.dataset.edges);
    if (place >= 0) this.#setEdge(place, this.#region[place] + shift[place % 2]);
    else this.#moveTo([...this.#region], shift);
    this.#draw();
    return true;
  }
}
