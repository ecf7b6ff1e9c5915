// Draws readings: a text, its blocks, and where each of its tokens looks. The same for a saved page, whose numbers are
// all in it, and for a live one, which asks a server.

/**
 * Draws a page into an element.
 *
 * @param {HTMLElement} host Gets a shadow tree, so that its styles and those around it leave each other alone.
 * @param {string} css The styles.
 * @param {object} data What Python's `page_data` makes.
 * @param {object} source `weights({reading, layer, head, position})`, `blocks({reading, layer, head})` and, where there
 *   is a dial, `predict({reading, position, dial})` and `goOn` of the same; all give a promise, which fails with a
 *   sentence for the reader.
 */
async function drawPage(host, css, data, source) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const { tokens, blockStarts } = data;
  const shares = await Promise.all(data.readings.map((reading) => unpack(reading.shares, Uint16Array)));
  const starts = [...new Set(blockStarts)];
  const blockOf = blockStarts.map((start) => starts.indexOf(start));
  const state = { position: tokens.length - 1, dial: 1, target: null };

  const shown = make("output", { "aria-live": "polite" });
  const chosen = make("div", { class: "chosen", role: "group", "aria-label": "Chosen token" });
  const step = (label, name, by) =>
    make("button", { type: "button", "aria-label": name, onclick: () => choose(state.position + by) }, label);
  chosen.append(shown, step("◀", "Previous token", -1), step("▶", "Next token", 1));
  if (source.predict) chosen.append(dialControl());

  const panels = data.readings.map((reading, index) => drawPanel(reading, index));
  root.replaceChildren(
    make("style", {}, css),
    make(
      "div",
      { class: "page", lang: "en" },
      introduction(data, Boolean(source.predict)),
      chosen,
      make("div", { class: `panels ${panels.length > 1 ? "two" : "one"}` }, ...panels.map(({ section }) => section)),
    ),
  );
  choose(state.position);

  function dialControl() {
    const value = make("output", {}, state.dial.toFixed(1));
    const slider = make("input", {
      type: "range", min: 0, max: 1, step: 0.1, value: state.dial, id: "dial",
      oninput: () => {
        state.dial = Number(slider.value);
        value.textContent = state.dial.toFixed(1);
        panels.forEach((panel) => panel.predictSoon());
      },
    });
    return make("div", { class: "dial" }, make("label", { for: "dial" }, "Dial"), slider, value);
  }

  function choose(position) {
    state.position = Math.max(0, Math.min(tokens.length - 1, position));
    shown.textContent = `Token ${state.position}, ${quoted(tokens[state.position])}, of ${tokens.length} tokens`;
    panels.forEach((panel) => panel.update());
  }

  /** Tells the chosen token to look at a block, or no longer. */
  function tell(block) {
    if (!source.predict) return;
    state.target = state.target === block ? null : block;
    panels.forEach((panel) => panel.showTarget());
  }

  function drawPanel(reading, index) {
    const numLayers = reading.lambdas.length;
    const parts = partsOf(reading);
    const pick = { layer: numLayers - 1, head: null };
    let weights = [];
    let asked = 0;

    const error = make("p", { class: "error", role: "alert" });
    const scale = make("p", { class: "note" });
    const tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    const most = make("tbody");
    const mostCaption = make("caption");
    const predictions = source.predict ? drawPredictions(data, index, source, state, error) : null;
    const matrix = drawBlocks(data, index, source, starts, choose, error);

    const options = (names) => names.map(([value, name]) => make("option", { value }, name));
    const numbers = (count) => Array.from({ length: count }, (_, number) => [number, String(number)]);
    const layerSelect = make(
      "select", { onchange: () => choosePick(Number(layerSelect.value), pick.head) }, ...options(numbers(numLayers)),
    );
    const headSelect = make(
      "select",
      { onchange: () => choosePick(pick.layer, headSelect.value === "" ? null : Number(headSelect.value)) },
      ...options([["", "mean of all"], ...numbers(reading.numHeads)]),
    );

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
          class: "block", role: "group", "data-number": number,
          "aria-label": `Block ${number}: tokens ${start} to ${end - 1}`,
        },
        ...tokenOptions.slice(start, end),
      );
    });
    const text = make(
      "div",
      {
        class: "text", dir: "auto", role: "listbox", "aria-label": `Tokens of the text, as ${reading.name} looks at them`,
        onclick: (event) => chooseAt(event), onkeydown: (event) => onKey(event),
        onmouseover: (event) => showTip(event.target.closest(".token")), onmouseleave: () => (tip.hidden = true),
        onfocusin: (event) => showTip(event.target.closest(".token")), onfocusout: () => (tip.hidden = true),
      },
      ...blocks,
    );

    // Of what is measured: tokens for which anything lies outside, and not only sinks.
    const hasOutside = reading.localStarts.some((start) => start > reading.numSinks);
    const shareRows = reading.lambdas.map((lambda, layer) => drawShareRow(lambda, layer));
    const heatCells = reading.headFidelity.map((heads, layer) =>
      [reading.layerFidelity[layer], ...heads].map((value, column) => drawHeatCell(value, layer, column - 1)),
    );
    const heat = drawHeat();

    const section = make(
      "section",
      { class: "panel", "aria-label": reading.name },
      make("h2", {}, reading.name),
      error,
      make(
        "div",
        { class: "controls" },
        make("label", {}, "Layer", layerSelect),
        make("label", {}, "Head", headSelect),
      ),
      text,
      tip,
      scale,
      make(
        "p",
        { class: "note" },
        "Click on a token, or move with the arrow keys: left and right by a token, up and down by a block. " +
          (source.predict ? "Shift-click on a block, or press t in it, to tell tokens after it to look at it. " : "") +
          "Tokens, blocks, layers and heads are counted from 0.",
      ),
      ...(predictions ? [predictions.element] : []),
      make(
        "div",
        { class: "parts" },
        make(
          "div",
          {},
          make("h3", {}, "Where its attention goes, layer by layer"),
          make(
            "div",
            { class: "shares scroll" },
            make(
              "table",
              {},
              make("caption", {}, "Mean over heads, in percent. Choose a layer to see its words above."),
              make("thead", {}, headings("layer", "λ", "", ...parts)),
              make("tbody", {}, ...shareRows.map(({ row }) => row)),
            ),
          ),
          make("h3", {}, "Which block looks at which"),
          matrix.element,
        ),
        make(
          "div",
          {},
          make("h3", {}, "The words it looks at most"),
          make(
            "table",
            { class: "most" },
            mostCaption,
            make("thead", {}, headings("word", "token", "where", "weight")),
            most,
          ),
          make("h3", {}, "Context fidelity of each layer and head"),
          heat,
        ),
      ),
    );
    return { section, update, showTarget, predictSoon: predictions?.predictSoon };

    // --- choosing

    function choosePick(layer, head) {
      pick.layer = layer;
      pick.head = head;
      update();
    }

    function chooseAt(event) {
      const token = event.target.closest(".token");
      if (token && event.shiftKey) {
        tell(blockOf[token.dataset.position]);
      } else if (token) {
        token.focus({ preventScroll: true });
        choose(Number(token.dataset.position));
      }
    }

    function onKey(event) {
      const block = blockOf[state.position];
      const toTheRight = getComputedStyle(text).direction === "rtl" ? -1 : 1;
      const places = {
        ArrowLeft: state.position - toTheRight,
        ArrowRight: state.position + toTheRight,
        ArrowUp: starts[block] < state.position ? starts[block] : starts[Math.max(block - 1, 0)],
        ArrowDown: starts[block + 1] ?? tokens.length - 1,
        Home: 0,
        End: tokens.length - 1,
      };
      if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) tell(block);
      if (event.key in places && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        choose(places[event.key]);
        tokenOptions[state.position].focus({ preventScroll: true });
      }
    }

    function showTarget() {
      blocks.forEach((block, number) => block.classList.toggle("target", number === state.target));
      predictions?.predictSoon();
    }

    // --- the words

    async function update() {
      const request = ++asked;
      const { position } = state;
      const { layer, head } = pick;
      layerSelect.value = layer;
      headSelect.value = head ?? "";
      updateShares(position);
      updateHeat();
      matrix.mark(blockOf[position]);
      matrix.pick(layer, head);
      predictions?.predictSoon();
      try {
        const answer = await source.weights({ reading: index, layer, head, position });
        if (request !== asked) return; // something else has been chosen meanwhile
        error.textContent = "";
        weights = answer;
        updateWords(position);
      } catch (problem) {
        if (request === asked) error.textContent = problem.message;
      }
    }

    /** Which of the four parts a token's attention on another one counts to. */
    function partOf(key, position) {
      if (key === position) return "self";
      if (key < reading.numSinks && key < blockStarts[position]) return "sink";
      return key >= reading.localStarts[position] ? "block" : "outside";
    }

    function updateWords(position) {
      tokenOptions.forEach((option, key) => {
        const isLater = key > position;
        option.classList.toggle("later", isLater);
        option.style.setProperty("--w", isLater ? 0 : Math.sqrt(weights[key]).toFixed(3));
        option.setAttribute("aria-selected", key === position);
        option.tabIndex = key === position ? 0 : -1;
        const where = isLater ? "after the chosen token" : `${weightText(weights[key])}, ${partOf(key, position)}`;
        option.setAttribute("aria-label", `${quoted(tokens[key])}, token ${key}, ${where}`);
      });
      blocks.forEach((block, number) => {
        const start = starts[number];
        block.classList.toggle("local", start <= position && start >= reading.localStarts[position]);
      });
      tip.hidden = true;
      const token = tokenOptions[position].offsetTop;
      if (token < text.scrollTop || token > text.scrollTop + text.clientHeight - 40) {
        text.scrollTop = token - text.clientHeight / 2;
      }
      const of = `layer ${pick.layer}, ${pick.head === null ? "mean of all heads" : `head ${pick.head}`}`;
      scale.textContent =
        `Shade and underline: the square root of the attention at dial 0, in ${of}; full at 100 %.` +
        (reading.hasLearnedSink ? " What is missing of 100 % is on the model's own sink." : "");
      mostCaption.textContent = `From token ${position}, ${quoted(tokens[position])}, in ${of}.`;
      const best = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 6);
      most.replaceChildren(
        ...best.map((key) =>
          make(
            "tr",
            {},
            make("td", { class: "word" }, quoted(tokens[key])),
            make("td", {}, String(key)),
            make("td", {}, partOf(key, position)),
            make("td", {}, weightText(weights[key])),
          ),
        ),
      );
    }

    function showTip(token) {
      tip.hidden = token === null;
      if (!token) return;
      const key = Number(token.dataset.position);
      const where = key > state.position
        ? "after the chosen token"
        : `${weightText(weights[key] ?? 0)} of the attention, ${partOf(key, state.position)}`;
      tip.textContent = `${quoted(tokens[key])} · token ${key} · block ${blockOf[key]} · ${where}`;
      const place = token.getClientRects()[0];
      const frame = section.getBoundingClientRect();
      tip.style.top = `${place.bottom - frame.top + 6}px`;
      tip.style.left = `${Math.max(0, Math.min(place.left - frame.left, frame.width - 264))}px`;
    }

    // --- shares by layer

    function drawShareRow(lambda, layer) {
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

    function updateShares(position) {
      shareRows.forEach(({ row, button, segments, cells }, layer) => {
        const start = (layer * tokens.length + position) * PARTS.length;
        parts.forEach((part, place) => {
          const share = shares[index][start + PARTS.indexOf(part)] / 65535;
          segments[place].style.width = `${100 * share}%`;
          cells[place].textContent = (100 * share).toFixed(1);
        });
        row.classList.toggle("picked", layer === pick.layer);
        button.setAttribute("aria-pressed", layer === pick.layer);
      });
    }

    // --- layers and heads

    function drawHeatCell(value, layer, column) {
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

    function drawHeat() {
      const heads = Array.from({ length: reading.numHeads }, (_, head) => String(head));
      return make(
        "div",
        { class: "heat scroll" },
        make(
          "p",
          { class: "note" },
          "Over the whole text, in percent. Choose a head to see its words above." +
            (hasOutside ? "" : " Nothing lies outside of a block in this text, so that there is nothing to measure."),
        ),
        make(
          "table",
          { role: "grid", "aria-label": "Context fidelity by layer and head", onkeydown: (event) => onHeatKey(event) },
          make("thead", {}, headings("layer", "all", ...heads)),
          make(
            "tbody",
            {},
            ...heatCells.map((cells, layer) =>
              make("tr", {}, make("th", { scope: "row" }, String(layer)), ...cells.map((cell) => make("td", {}, cell))),
            ),
          ),
        ),
      );
    }

    function updateHeat() {
      heatCells.forEach((cells, layer) =>
        cells.forEach((cell, column) => {
          const isPicked = layer === pick.layer && column - 1 === (pick.head ?? -1);
          cell.setAttribute("aria-pressed", isPicked);
          cell.tabIndex = isPicked ? 0 : -1;
        }),
      );
    }

    function onHeatKey(event) {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [down, right] = moves[event.key];
      const layer = Math.max(0, Math.min(numLayers - 1, pick.layer + down));
      const column = Math.max(0, Math.min(reading.numHeads, (pick.head ?? -1) + 1 + right));
      choosePick(layer, column === 0 ? null : column - 1);
      heatCells[layer][column].focus();
    }
  }
}

/** Says why there is nothing to draw. */
function drawProblem(host, css, problem) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const sentence = make("p", { class: "error", role: "alert" }, problem);
  root.replaceChildren(make("style", {}, css), make("div", { class: "page", lang: "en" }, sentence));
}
