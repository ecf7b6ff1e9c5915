// Which block looks at which: the structure that a layer or a head finds in the text, as a matrix.

/**
 * Draws the matrix of one reading.
 *
 * @param {object} data What Python's `page_data` makes.
 * @param {number} index Which of its readings.
 * @param {object} source As for `drawPage`.
 * @param {number[]} starts Where each block starts.
 * @param {function} choose Chooses a token of the text.
 * @param {HTMLElement} error Where a problem is told.
 * @returns {object} `element`; `pick(layer, head)`, which draws theirs, once it has come; and `mark(block)`, the block of
 *   the chosen token.
 */
function drawBlocks(data, index, source, starts, choose, error) {
  const number = starts.length;
  const cell = Math.max(3, Math.min(28, Math.floor(400 / number)));
  const ratio = Math.ceil(globalThis.devicePixelRatio ?? 1);
  const size = number * cell;
  const canvas = make("canvas", {
    role: "img", width: size * ratio, height: size * ratio, style: `width: ${size}px; height: ${size}px`,
    onmousemove: (event) => say(...placeOf(event)), onmouseleave: () => say(chosen, null),
    onclick: (event) => choose(lastOf(placeOf(event)[0])),
  });
  const said = make("p", { class: "said", "aria-live": "polite" });
  const figures = make("p", { class: "note figures" });
  const element = make(
    "div",
    { class: "blocks" },
    make(
      "p",
      { class: "note" },
      "A row for each block, from the first down: of what its tokens give to other words, the part that each block has, " +
        "dark 0 %, light 100 %. On the diagonal a block looks at itself. Click on a row to choose its last token.",
    ),
    make("div", { class: "scroll" }, canvas),
    said,
    figures,
  );
  let shares = null;
  let chosen = 0;
  let of = "";
  let asked = 0;
  let drawn = null;
  return { element, pick, mark };

  async function pick(layer, head) {
    if (drawn?.layer === layer && drawn.head === head) return;
    drawn = { layer, head };
    const request = ++asked;
    try {
      const answer = await source.blocks({ reading: index, layer, head });
      if (request !== asked) return; // something else has been chosen meanwhile
      shares = answer;
      of = `layer ${layer}, ${head === null ? "mean of all heads" : `head ${head}`}`;
      const [looked, top] = ["blocksLookedAt", "topBlockShare"].map(
        (name) => data.readings[index][name][layer][head === null ? 0 : head + 1],
      );
      figures.textContent = looked === null
        ? `In ${of}, nothing that sees other blocks gives anything to other words.`
        : `In ${of}, a token that sees other blocks looks at ${looked.toFixed(1)} blocks on average; the one that it ` +
          `looks at most has ${percent(top)} of what it gives to other words.`;
      draw();
    } catch (problem) {
      if (request !== asked) return;
      drawn = null; // so that it can be asked for again
      error.textContent = problem.message;
    }
  }

  function mark(block) {
    chosen = block;
    draw();
  }

  /** Of what a block's tokens give to other words, the parts that the blocks have; nothing where they give none. */
  function partsOfRow(row) {
    const given = Array.from(shares.subarray(row * number, row * number + row + 1));
    const total = given.reduce((sum, share) => sum + share, 0);
    return total ? given.map((share) => share / total) : null;
  }

  function draw() {
    if (shares === null) return;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size, size);
    for (let row = 0; row < number; row++) {
      partsOfRow(row)?.forEach((part, column) => {
        context.fillStyle = heatColours(part)[0];
        context.fillRect(column * cell, row * cell, cell, cell);
      });
    }
    context.strokeStyle = "#c2410c";
    context.lineWidth = 2;
    context.strokeRect(1, chosen * cell - 1, (chosen + 1) * cell, cell + 2);
    canvas.setAttribute("aria-label", `Which block looks at which, in ${of}. ${sentence(chosen, null)}`);
    say(chosen, null);
  }

  function sentence(row, column) {
    const parts = partsOfRow(row);
    if (parts === null) return `Block ${row} gives nothing to other words.`;
    if (column !== null && column <= row) {
      const at = column === row ? "itself" : `block ${column}, ${begins(column)}`;
      return `Block ${row}, ${begins(row)}, looks at ${at}: ${percent(parts[column])}.`;
    }
    const best = [...parts.keys()].sort((a, b) => parts[b] - parts[a]).slice(0, 3);
    const named = best.map((at) => `${at === row ? "itself" : `block ${at}, ${begins(at)}`}: ${percent(parts[at])}`);
    return `Block ${row}, ${begins(row)}, looks most at ${named.join("; ")}.`;
  }

  function say(row, column) {
    if (shares !== null) said.textContent = sentence(row, column);
  }

  /** How a block begins. */
  function begins(block) {
    const end = lastOf(block) + 1;
    const words = data.tokens.slice(starts[block], end).join("").trim();
    return quoted(words.length > 24 ? `${words.slice(0, 24)}…` : words);
  }

  function lastOf(block) {
    return (starts[block + 1] ?? data.tokens.length) - 1;
  }

  /** The row and the column under the mouse. */
  function placeOf(event) {
    const frame = canvas.getBoundingClientRect();
    const at = (distance) => Math.max(0, Math.min(number - 1, Math.floor(distance / cell)));
    return [at(event.clientY - frame.top), at(event.clientX - frame.left)];
  }
}
