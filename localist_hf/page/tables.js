// The tables of a reading at dial 0: the shares of a token's attention by layer, and the context fidelity of heads.

/**
 * Draws where a token's attention goes, layer by layer.
 *
 * @param {object} reading One of those that Python's `page_data` makes.
 * @param {Uint16Array} shares Its shares, unpacked.
 * @param {number} length Tokens of the text.
 * @param {function} choosePick Chooses a layer and a head.
 * @returns {object} `element`, and `update(position, pick)`.
 */
function drawShares(reading, shares, length, choosePick) {
  const parts = partsOf(reading);
  const rows = reading.lambdas.map((lambda, layer) => drawRow(lambda, layer));
  const element = make(
    "div",
    { class: "shares scroll" },
    make(
      "table",
      {},
      make("caption", {}, "At dial 0, mean over heads, in percent. Choose a layer to see its words above."),
      make("thead", {}, headings("layer", "λ", "", ...parts)),
      make("tbody", {}, ...rows.map(({ row }) => row)),
    ),
  );
  return { element, update };

  function drawRow(lambda, layer) {
    const button = make(
      "button",
      {
        type: "button", class: "pick", "aria-label": `Layer ${layer}, mean of all heads`,
        onclick: () => choosePick(layer, null),
      },
      String(layer),
    );
    const segments = parts.map((part) => make("div", { class: PART_CLASSES[part] }));
    const cells = parts.map(() => make("td"));
    const row = make(
      "tr",
      {},
      make("th", { scope: "row" }, button),
      make("td", {}, String(Number(lambda.toFixed(2)))),
      make("td", { class: "bar" }, make("div", { class: "stack", "aria-hidden": "true" }, ...segments)),
      ...cells,
    );
    return { row, button, segments, cells };
  }

  function update(position, pick) {
    rows.forEach(({ row, button, segments, cells }, layer) => {
      const start = (layer * length + position) * PARTS.length;
      parts.forEach((part, place) => {
        const share = shares[start + PARTS.indexOf(part)] / 65535;
        segments[place].style.width = `${100 * share}%`;
        cells[place].textContent = (100 * share).toFixed(1);
      });
      row.classList.toggle("picked", layer === pick.layer);
      button.setAttribute("aria-pressed", layer === pick.layer);
    });
  }
}

/**
 * Draws the context fidelity of all layers and heads.
 *
 * @param {object} reading One of those that Python's `page_data` makes.
 * @param {function} choosePick Chooses a layer and a head.
 * @returns {object} `element`, and `update(pick)`.
 */
function drawHeat(reading, choosePick) {
  // Of what is measured: tokens for which anything lies outside, and not only sinks.
  const hasOutside = reading.localStarts.some((start) => start > reading.numSinks);
  const rows = reading.headFidelity.map((heads, layer) =>
    [reading.layerFidelity[layer], ...heads].map((value, column) => drawCell(value, layer, column - 1)),
  );
  let picked = { layer: 0, head: null };
  const heads = Array.from({ length: reading.numHeads }, (_, head) => String(head));
  const element = make(
    "div",
    { class: "heat scroll" },
    make(
      "p",
      { class: "note" },
      "At dial 0, over the whole text, in percent. Choose a head to see its words above." +
        (hasOutside ? "" : " Nothing lies outside of a block in this text, so that there is nothing to measure."),
    ),
    make(
      "table",
      { role: "grid", "aria-label": "Context fidelity by layer and head", onkeydown: (event) => onKey(event) },
      make("thead", {}, headings("layer", "all", ...heads)),
      make(
        "tbody",
        {},
        ...rows.map((cells, layer) =>
          make("tr", {}, make("th", { scope: "row" }, String(layer)), ...cells.map((cell) => make("td", {}, cell))),
        ),
      ),
    ),
  );
  return { element, update };

  function drawCell(value, layer, column) {
    const head = column < 0 ? null : column;
    const name = `Layer ${layer}, ${head === null ? "mean of all heads" : `head ${head}`}`;
    const undefinedSince = hasOutside ? "no attention to other words" : "nothing lies outside of a block";
    const said = value === null ? undefinedSince : `context fidelity ${percent(value)}`;
    const button = make(
      "button",
      {
        type: "button", tabindex: -1, "aria-label": `${name}: ${said}`, title: `${name}: ${said}`,
        onclick: () => choosePick(layer, head),
      },
      value === null ? "–" : (100 * value).toFixed(0),
    );
    const [background, colour] = value === null ? ["#fff", "#000"] : heatColours(value);
    button.style.background = background;
    button.style.color = colour;
    return button;
  }

  function update(pick) {
    picked = pick;
    rows.forEach((cells, layer) =>
      cells.forEach((cell, column) => {
        const isPicked = layer === pick.layer && column - 1 === (pick.head ?? -1);
        cell.setAttribute("aria-pressed", isPicked);
        cell.tabIndex = isPicked ? 0 : -1;
      }),
    );
  }

  function onKey(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    const layer = Math.max(0, Math.min(rows.length - 1, picked.layer + down));
    const column = Math.max(0, Math.min(reading.numHeads, (picked.head ?? -1) + 1 + right));
    choosePick(layer, column === 0 ? null : column - 1);
    rows[layer][column].focus();
  }
}
