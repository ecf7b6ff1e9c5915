// Draws readings: a text, its blocks, and where each of its tokens looks. The same for a saved page, whose numbers are
// all in it, and for a live one, which asks a server.

/** What of the chosen token the text is shaded by. */
const VIEWS = { to: "looks at", from: "is looked at by", rests: "rests on" };

/**
 * Draws a page into an element.
 *
 * @param {HTMLElement} host Gets a shadow tree, so that its styles and those around it leave each other alone.
 * @param {string} css The styles.
 * @param {object} data What Python's `page_data` makes.
 * @param {object} source `weights({reading, layer, head, position, dial, target})`, `lookedAt` of the same but the target,
 *   `blocks({reading, layer, head})`; and where there is a model, `predict({reading, position, dial, target})`, `goOn` of
 *   the same, `reach({reading, dial})` and `influence({reading, position, dial, target, unit, end})`. All give a promise,
 *   which fails with a sentence for the reader.
 */
async function drawPage(host, css, data, source) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const { tokens, blockStarts } = data;
  const shares = await Promise.all(data.readings.map((reading) => unpack(reading.shares, Uint16Array)));
  const starts = [...new Set(blockStarts)];
  const blockOf = blockStarts.map((start) => starts.indexOf(start));
  const isLive = Boolean(source.predict);
  const hasDial = isLive && data.readings.some(isDialled);
  const state = { position: tokens.length - 1, dial: 0, target: null, view: "to" };

  const shown = make("output", { "aria-live": "polite" });
  const chosen = make("div", { class: "chosen", role: "group", "aria-label": "Chosen token" });
  const step = (label, name, by) =>
    make("button", { type: "button", "aria-label": name, onclick: () => choose(state.position + by) }, label);
  const steps = [step("◀", "Previous token", -1), step("▶", "Next token", 1)];
  chosen.append(shown, make("div", { class: "steps" }, ...steps), viewControl());
  if (hasDial) chosen.append(dialControl());

  const panels = data.readings.map((reading, index) => drawPanel(reading, index));
  root.replaceChildren(
    make("style", {}, css),
    make(
      "div",
      { class: "page", lang: "en" },
      introduction(data, isLive, hasDial),
      chosen,
      make("div", { class: `panels ${panels.length > 1 ? "two" : "one"}` }, ...panels.map(({ section }) => section)),
    ),
  );
  choose(state.position);

  function viewControl() {
    const views = Object.entries(VIEWS).filter(([view]) => isLive || view !== "rests");
    const choices = views.map(([view, name]) => {
      const radio = make("input", {
        type: "radio", name: "view", value: view, checked: view === state.view,
        onchange: () => {
          state.view = view;
          panels.forEach((panel) => panel.update());
        },
      });
      return make("label", {}, radio, name);
    });
    return make("fieldset", { class: "views" }, make("legend", {}, "Shade what it"), ...choices);
  }

  function dialControl() {
    const value = make("output", {}, state.dial.toFixed(1));
    let timer = null;
    const slider = make("input", {
      type: "range", min: 0, max: 1, step: 0.1, value: state.dial, id: "dial",
      oninput: () => {
        state.dial = Number(slider.value);
        value.textContent = state.dial.toFixed(1);
        panels.forEach((panel) => panel.wait());
        clearTimeout(timer);
        timer = setTimeout(() => panels.forEach((panel) => panel.update()), 150); // each dial takes a pass
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
    if (!hasDial) return;
    state.target = state.target === block ? null : block;
    panels.forEach((panel) => panel.update());
  }

  function drawPanel(reading, index) {
    const numLayers = reading.lambdas.length;
    const pick = { layer: numLayers - 1, head: null };
    let weights = []; // of the chosen token on those before it; in the other direction, of those after it on the token
    let seen = { ...aboutNow(), view: state.view, ...pick }; // what they are of
    let asked = 0;

    const error = make("p", { class: "error", role: "alert" });
    const measured = make("p", { class: "measured", "aria-live": "polite" });
    const scale = make("p", { class: "note scale" });
    const reached = make("p", { class: "note reached" });
    const tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    const most = drawMost(tokens);
    const predictions = isLive ? drawPredictions(data, index, source, () => aboutNow(), error) : null;
    const matrix = drawBlocks(data, index, source, starts, choose, error);
    const rests = isLive ? influences(index, source, () => shade(), () => section.isConnected) : null;
    const reachOf = isLive ? reaches(index, source) : null;

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
    const { text, tokenOptions, blocks } = drawText(data, starts, reading.name, {
      onmousedown: (event) => event.shiftKey && event.preventDefault(), // which would select text
      onclick: (event) => chooseAt(event), onkeydown: (event) => onKey(event),
      onmouseover: (event) => showTip(event.target.closest(".token")), onmouseleave: () => (tip.hidden = true),
      onfocusin: (event) => showTip(event.target.closest(".token")), onfocusout: () => (tip.hidden = true),
    });
    const shareTable = drawShares(reading, shares[index], tokens.length, choosePick);
    const heat = drawHeat(reading, choosePick);
    const save = (kind) => make("button", { type: "button", onclick: () => savePicture(kind) }, kind);

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
        make("div", { role: "group", "aria-label": "Save a picture of the text" }, "Picture ", save("SVG"), " ", save("PNG")),
      ),
      text,
      tip,
      measured,
      scale,
      reached,
      make(
        "p",
        { class: "note" },
        "Click on a token, or move with the arrow keys: left and right by a token, up and down by a block. " +
          (hasDial ? "Shift-click on a block, or press t in it, to tell tokens after it to look at it. " : "") +
          "Tokens, blocks, layers and heads are counted from 0." +
          (isLive ? "" : " What a prediction rests on, and can depend on, is said by the live page: `localist-hf view`."),
      ),
      ...(predictions ? [predictions.element] : []),
      make(
        "div",
        { class: "parts" },
        make(
          "div",
          {},
          make("h3", {}, "Where its attention goes, layer by layer"),
          shareTable.element,
          make("h3", {}, "Which block looks at which"),
          matrix.element,
        ),
        make("div", {}, most.element, make("h3", {}, "Context fidelity of each layer and head"), heat.element),
      ),
    );
    return { section, update, wait };

    // --- choosing

    /** What is asked of the model: a dial and a rule only as far as they change something in it. */
    function aboutNow() {
      const { position } = state;
      const dial = isDialled(reading) ? state.dial : 0;
      const isSeen = dial > 0 && state.target !== null && state.target <= blockOf[position];
      return { position, dial, target: isSeen ? state.target : null };
    }

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

    // --- asking

    /** Says that what is shaded is of before. */
    function wait() {
      asked += 1;
      rests?.stop();
      scale.textContent = `Reading at dial ${state.dial.toFixed(1)} …`;
      predictions?.predictSoon();
    }

    async function update() {
      const request = ++asked;
      const { layer, head } = pick;
      const { view } = state;
      const about = aboutNow();
      const { position, dial, target } = about;
      layerSelect.value = layer;
      headSelect.value = head ?? "";
      shareTable.update(position, pick);
      heat.update(pick);
      matrix.mark(blockOf[position]);
      matrix.pick(layer, head);
      predictions?.predictSoon();
      if (view === "rests") rests.measureSoon(about, blockOf[position] + 1);
      else rests?.stop();
      try {
        const what = { reading: index, layer, head, position, dial };
        const answer = view === "from" ? source.lookedAt(what) : source.weights({ ...what, target });
        const found = await answer;
        if (request !== asked) return; // something else has been chosen meanwhile
        error.textContent = "";
        weights = found;
        seen = { ...about, view, layer, head };
        shade();
        scrollTo(tokenOptions[position]);
        if (reachOf) showReach(request, about, await reachOf(dial));
      } catch (problem) {
        if (request === asked) error.textContent = problem.message;
      }
    }

    // --- the words

    /** What is known of a token: whether it is in view, its attention, where that counts, and its influence in bits. */
    function knownOf(key) {
      const { position, target } = seen;
      const isFrom = seen.view === "from";
      const inView = isFrom ? key >= position : key <= position;
      if (!inView) return { inView };
      const [weight, part] = isFrom
        ? [weights[key - position], partOf(reading, blockStarts, blockOf, position, key, null)]
        : [weights[key], partOf(reading, blockStarts, blockOf, key, position, target)];
      return { inView, weight, part, bits: isFrom ? undefined : rests?.of(seen)?.words[key] };
    }

    /** A token's numbers, in words. */
    function said(key, { inView, weight, part, bits }) {
      if (!inView) return seen.view === "from" ? "before the chosen token" : "after the chosen token";
      const change = bits === undefined ? "" : `; ${bitsText(bits)} without it`;
      return `${weightText(weight)}, ${part}${change}`;
    }

    function shade() {
      const { position, dial, target, view } = seen;
      const known = tokens.map((_, key) => knownOf(key));
      const values = known.map(({ inView, weight, bits }) => (inView ? (view === "rests" ? bits ?? 0 : weight) : 0));
      // What a token gives to itself, or changes, is often far more than all others.
      const full = view === "to" ? 1 : Math.max(0, ...values.filter((_, key) => key !== position));
      const found = view === "rests" ? rests.of(seen) : null;
      tokenOptions.forEach((option, key) => {
        option.classList.toggle("apart", !known[key].inView);
        option.style.setProperty("--w", Math.sqrt(Math.min(1, values[key] / (full || 1))).toFixed(3));
        option.setAttribute("aria-selected", key === position);
        option.tabIndex = key === position ? 0 : -1;
        option.setAttribute("aria-label", `${quoted(tokens[key])}, token ${key}, ${said(key, known[key])}`);
      });
      blocks.forEach((block, number) => {
        const isLocal = isLocalTo(number, position, target);
        const isTarget = number === state.target;
        const bits = found?.blocks[number];
        block.classList.toggle("local", isLocal);
        block.classList.toggle("target", isTarget);
        const change = bits === undefined ? "" : ` · ${bitsText(bits, 2)}`;
        block.dataset.badge = `${number}${isTarget ? " ◂ told" : isLocal ? " ◂ local" : ""}${change}`;
      });
      tip.hidden = true;
      const of = `layer ${seen.layer}, ${seen.head === null ? "mean of all heads" : `head ${seen.head}`}`;
      measured.textContent = view === "rests" ? progressOf(found) : "";
      scale.dataset.full = full;
      scale.textContent = scaleText(view, { of, dial, position, full, reading });
      most.show(view, known, values, `${position}, ${quoted(tokens[position])}`, of, dial);
    }

    /** Whether a block is local to the chosen token; in the other direction, whether the token is local to the block. */
    function isLocalTo(number, position, target) {
      const start = starts[number];
      if (seen.view === "from") return blockOf[position] <= number && reading.localStarts[start] <= position;
      if (target !== null) return number === target || number === blockOf[position];
      return start <= position && start >= reading.localStarts[position];
    }

    function showReach(request, { position, dial, target }, { first, statement }) {
      if (request !== asked) return;
      const isFrom = seen.view === "from";
      const from = first === null || target !== null || isFrom ? null : first[position];
      const isWithin = (key) => from !== null && key >= 0 && key <= position && (key >= from || key < reading.numSinks);
      tokenOptions.forEach((option, key) => {
        option.classList.toggle("reach", isWithin(key));
        option.classList.toggle("first", isWithin(key) && !isWithin(key - 1));
        option.classList.toggle("last", isWithin(key) && !isWithin(key + 1));
      });
      const sinks = reading.numSinks && from > 0 ? " and on the sinks" : "";
      const framed = `Framed in green: what comes after token ${position} can depend on tokens ${from} to ${position}${sinks}.`;
      const told = "The token is told where to look, but those that it looks at are not: they have read all before them.";
      if (isFrom) reached.textContent = "";
      else if (target !== null) reached.textContent = `Reach: no bound. ${told}`;
      else {
        const all = [`Reach at dial ${dial.toFixed(1)}, on the blocks shown: ${statement}`, ...(from === null ? [] : [framed])];
        reached.textContent = all.join(" ");
      }
    }

    function scrollTo(token) {
      if (token.offsetTop < text.scrollTop || token.offsetTop > text.scrollTop + text.clientHeight - 40) {
        text.scrollTop = token.offsetTop - text.clientHeight / 2;
      }
    }

    function showTip(token) {
      tip.hidden = token === null;
      if (!token) return;
      const key = Number(token.dataset.position);
      const known = knownOf(key);
      const { inView, weight, part, bits } = known;
      const whose = seen.view === "from" ? "its" : "the";
      const given = inView ? `${weightText(weight ?? 0)} of ${whose} attention, ${part}` : said(key, known);
      const block = seen.view === "rests" ? rests.of(seen)?.blocks[blockOf[key]] : undefined;
      const change = inView && bits !== undefined ? ` · without it the prediction changes by ${bitsText(bits)}` : "";
      const ofBlock = inView && block !== undefined ? `, without its block by ${bitsText(block)}` : "";
      tip.textContent = `${quoted(tokens[key])} · token ${key} · block ${blockOf[key]} · ${given}${change}${ofBlock}`;
      const place = token.getClientRects()[0];
      const frame = section.getBoundingClientRect();
      tip.style.top = `${place.bottom - frame.top + 6}px`;
      tip.style.left = `${Math.max(0, Math.min(place.left - frame.left, frame.width - 264))}px`;
    }

    // --- the picture

    async function savePicture(kind) {
      const { position, dial, view, layer, head } = seen;
      const of = view === "rests" ? [] : [`layer-${layer}`, `head-${head ?? "mean"}`];
      const what = { to: "attention", from: "looked-at", rests: "rests-on" }[view];
      const model = reading.name.replace(/[^\p{L}\p{N}.-]+/gu, "-").slice(-60);
      const name = [what, model, ...of, `dial-${dial.toFixed(1)}`, `token-${position}`].join("_");
      const title = `${reading.name}: what token ${position}, ${quoted(tokens[position])}, ${VIEWS[view]}`;
      const notes = [scale.textContent, measured.textContent, reached.textContent].filter(Boolean);
      const full = Number(scale.dataset.full);
      const label = (value) => (view === "rests" ? bitsText(value) : weightText(value));
      const labels = full > 0 ? [0, 1, 2, 3, 4].map((place) => label(full * (place / 4) ** 2)) : [];
      const svg = pictureOf(text, title, notes, labels);
      const picture = kind === "PNG" ? await pngOf(svg) : new Blob([svg], { type: "image/svg+xml" });
      saveAs(picture, `${name}.${kind.toLowerCase()}`);
    }
  }
}

/** Says why there is nothing to draw. */
function drawProblem(host, css, problem) {
  const root = host.shadowRoot ?? host.attachShadow({ mode: "open" });
  const sentence = make("p", { class: "error", role: "alert" }, problem);
  root.replaceChildren(make("style", {}, css), make("div", { class: "page", lang: "en" }, sentence));
}
