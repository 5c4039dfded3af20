// Code maps: a coloured cell for each visual token, one colour a codeword.

const FAINT = 0.18;
const SIDE = 16; // pixels of a cell

// Draws grids into `place`; `say` is told of the cell under the pointer or the arrow keys.
export function drawGrids(place, grids, say) {
  const maps = grids.map((grid, number) => new CodeMap(grid, grids.length > 1 ? number : null));
  const show = (code, text, at) => {
    for (const map of maps) map.draw(code, map === at ? map.at : null);
    say(text);
  };
  const count = (code) => grids.reduce((sum, g) => sum + g.codes.filter((c) => c === code).length, 0);
  for (const map of maps) map.listen(show, count);
  place.replaceChildren(...maps.map((map) => map.canvas));
  place.classList.toggle("empty", maps.length === 0);
  place.classList.toggle("several", maps.length > 1 && maps.length <= 4);
  place.classList.toggle("many", maps.length > 4);
}

// Steps of the golden ratio spread any set of codes over the colour circle.
function colour(code, alpha) {
  const hue = ((code * 0.618034) % 1) * 360;
  return `hsl(${hue} ${50 + ((code * 7) % 10) * 4}% ${48 + ((code * 3) % 5) * 6}% / ${alpha})`;
}

class CodeMap {
  constructor(grid, number) {
    this.grid = grid;
    this.number = number;
    this.at = 0;
    this.canvas = document.createElement("canvas");
    this.canvas.width = grid.columns * SIDE;
    this.canvas.height = grid.rows * SIDE;
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "group");
    const which = number === null ? "Code map" : `Code map of part ${number + 1}`;
    this.canvas.setAttribute(
      "aria-label",
      `${which}, ${grid.rows} rows and ${grid.columns} columns. Arrow keys go from cell to cell.`,
    );
    this.draw(null, null);
  }

  // With a chosen code all others are faint; `at` is a cell with a frame.
  draw(chosen, at) {
    const context = this.canvas.getContext("2d");
    const left = (place) => (place % this.grid.columns) * SIDE;
    const top = (place) => Math.floor(place / this.grid.columns) * SIDE;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.grid.codes.forEach((code, place) => {
      context.fillStyle = colour(code, chosen === null || chosen === code ? 1 : FAINT);
      context.fillRect(left(place), top(place), SIDE, SIDE);
    });
    if (at === null) return;
    context.strokeStyle = "#000";
    context.strokeRect(left(at) + 0.5, top(at) + 0.5, SIDE - 1, SIDE - 1);
    context.strokeStyle = "#fff";
    context.strokeRect(left(at) + 1.5, top(at) + 1.5, SIDE - 3, SIDE - 3);
  }

  listen(show, count) {
    const { rows, columns, codes } = this.grid;
    const tell = (place) => {
      if (!(place >= 0 && place < codes.length)) return;
      this.at = place;
      const others = count(codes[place]) - 1;
      const where = `Row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`;
      const more = others === 0 ? "nowhere else" : `and in ${others} other${others > 1 ? "s" : ""}`;
      show(codes[place], `${where}: code ${codes[place]}, ${more}.`, this);
    };
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      if (row >= 0 && row < rows && column >= 0 && column < columns) tell(row * columns + column);
    });
    this.canvas.addEventListener("keydown", (event) => {
      const step = moves[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const sideways = Math.abs(step) === 1;
      const edge = (this.at % columns) + step;
      if (!sideways || (edge >= 0 && edge < columns)) tell(this.at + step);
    });
    this.canvas.addEventListener("focus", () => tell(this.at));
    for (const end of ["pointerleave", "blur"]) {
      this.canvas.addEventListener(end, () => show(null, "", null));
    }
  }
}
