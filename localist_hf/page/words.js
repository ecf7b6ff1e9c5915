// The words of a text: how they stand on the page, which part of the attention each counts to, and which have most.

/** Whether the dial changes anything in a model. */
const isDialled = (reading) => reading.lambdas.some((lambda) => lambda > 0);

/** Of a change as many digits as say something. */
const bitsText = (bits, digits = 3) =>
  bits > 0 && bits < 10 ** -digits ? `< ${10 ** -digits} bits` : `${bits.toFixed(digits)} bits`;

/** Which of the four parts the attention of a query on a key counts to; told to look at a block, or not. */
function partOf(reading, blockStarts, blockOf, key, query, target) {
  if (key === query) return "self";
  const isLocal = target === null
    ? key >= reading.localStarts[query]
    : blockOf[key] === target || key >= blockStarts[query];
  if (key < reading.numSinks && key < blockStarts[query] && !(target !== null && isLocal)) return "sink";
  return isLocal ? "block" : "outside";
}

/**
 * Draws the tokens of a text in its blocks.
 *
 * @param {object} data What Python's `page_data` makes.
 * @param {number[]} starts Where each block starts.
 * @param {string} name The model's.
 * @param {object} events What is listened to.
 * @returns {object} `text`, `tokenOptions` and `blocks`: the elements.
 */
function drawText({ tokens }, starts, name, events) {
  const tokenOptions = tokens.map((piece, position) => {
    const option = make("span", { class: "token", role: "option", "data-position": position, tabindex: -1 });
    if (piece === "") option.append(make("span", { class: "mark" }, "·"));
    for (const part of piece.split(/(\n|\t)/)) {
      if (part === "\n") option.append(make("span", { class: "mark" }, "↵"), "\n");
      else if (part === "\t") option.append(make("span", { class: "mark" }, "⇥"), "\t");
      else option.append(part);
    }
    return option;
  });
  const blocks = starts.map((start, number) => {
    const end = starts[number + 1] ?? tokens.length;
    return make(
      "span",
      {
        class: "block", role: "group", "data-number": number, "data-badge": number,
        "aria-label": `Block ${number}: tokens ${start} to ${end - 1}`,
      },
      ...tokenOptions.slice(start, end),
    );
  });
  const label = `Tokens of the text, as ${name} looks at them`;
  return {
    text: make("div", { class: "text", dir: "auto", role: "listbox", "aria-label": label, ...events }, ...blocks),
    tokenOptions,
    blocks,
  };
}

/** What shades say, in sentences. */
function scaleText(view, { of, dial, position, full, reading }) {
  const at = `at dial ${dial.toFixed(1)}`;
  const sink = reading.hasLearnedSink ? " What is missing of 100 % is on the model's own sink." : "";
  const most = full === 0 ? "" : `; full at ${view === "rests" ? bitsText(full) : weightText(full)}, the most of another one`;
  const isStill = isDialled(reading) ? "" : " The dial changes nothing here: λ is 0 in every layer.";
  return {
    to: `Shade and underline: the square root of the attention ${at}, in ${of}; full at 100 %.${sink}${isStill}`,
    from:
      `Shade and underline: the square root of the attention that each token gives to token ${position}, ${at}, in ${of}` +
      `${most}.${isStill}`,
    rests:
      `Shade and underline: the square root of the change in what comes after token ${position}, ${at}, when others stand ` +
      `in a word's place (Kullback-Leibler divergence, mean of 4 draws from the text)${most}.${isStill}`,
  }[view];
}

/**
 * Draws the words that have most.
 *
 * @param {string[]} tokens The text's.
 * @returns {object} `element`, and `show(view, known, values, from, of, dial)`.
 */
function drawMost(tokens) {
  const title = make("h3", {}, "");
  const caption = make("caption");
  const head = make("thead");
  const body = make("tbody");
  const element = make("div", {}, title, make("table", { class: "most" }, caption, head, body));
  const titles = {
    to: "The words it looks at most", from: "The words that look at it most", rests: "The words it rests on most",
  };
  return { element, show };

  function show(view, known, values, from, of, dial) {
    const isRests = view === "rests";
    title.textContent = titles[view];
    caption.textContent = `${view === "from" ? "On" : "From"} token ${from}, in ${of}, at dial ${dial.toFixed(1)}.`;
    head.replaceChildren(headings("word", "token", "where", "weight", ...(isRests ? ["change"] : [])));
    const inView = [...known.keys()].filter((key) => known[key].inView && !(isRests && known[key].bits === undefined));
    const best = inView.sort((a, b) => values[b] - values[a]).slice(0, 6);
    body.replaceChildren(
      ...best.map((key) =>
        make(
          "tr",
          {},
          make("td", { class: "word" }, quoted(tokens[key])),
          make("td", {}, String(key)),
          make("td", {}, known[key].part),
          make("td", {}, weightText(known[key].weight)),
          ...(isRests ? [make("td", {}, bitsText(known[key].bits))] : []),
        ),
      ),
    );
  }
}
