// What a model says comes next, at dial 0 and at the dial.

/**
 * Draws the predictions of one reading.
 *
 * @param {object} data What Python's `page_data` makes.
 * @param {number} index Which of its readings.
 * @param {object} source As for `drawPage`.
 * @param {function} aboutNow Gives the `position`, the `dial` and the `target` block that are chosen, as far as they
 *   change something in this model, as they stand when a prediction is asked for.
 * @param {HTMLElement} error Where a problem is told.
 * @returns {object} `element`, and `predictSoon`, to be called when something else is chosen.
 */
function drawPredictions(data, index, source, aboutNow, error) {
  const { tokens } = data;
  const reading = data.readings[index];
  const predictions = make("div", { class: "predictions", "aria-live": "polite" });
  let timer = null;
  let predicted = 0;
  let of = "";
  let last = Promise.resolve();
  const title = `What comes next${isDialled(reading) ? ", at dial 0 and at the dial" : ""}`;
  const element = make("div", {}, make("h3", {}, title), predictions);
  return { element, predictSoon };

  /** Asks once the reader rests: a prediction takes longer than a step from token to token. */
  function predictSoon() {
    const about = JSON.stringify(aboutNow());
    if (about === of) return; // another layer or head has been chosen
    of = about;
    clearTimeout(timer);
    predicted += 1; // an answer that is still to come is of what was chosen before
    predictions.setAttribute("aria-busy", "true");
    timer = setTimeout(predict, 250);
  }

  /** What is asked: at dial 0, at the dial, and there told to look at a block, where one is marked that can be seen. */
  function settings({ dial, target }) {
    return [
      { name: "dial 0", dial: 0, target: null },
      ...(dial > 0 ? [{ name: `dial ${dial.toFixed(1)}`, dial, target: null }] : []),
      ...(target !== null ? [{ name: `dial ${dial.toFixed(1)}, told to look at block ${target} and its own`, dial, target }] : []),
    ];
  }

  async function predict() {
    const request = ++predicted;
    const about = aboutNow();
    const { position } = about;
    const asked = settings(about);
    await last; // one question at a time, whatever is chosen meanwhile: others are waiting too
    if (request !== predicted) return;
    const ask = (what, { dial, target }) => {
      const answer = what({ reading: index, position, dial, target });
      last = answer.catch(() => {});
      return answer;
    };
    try {
      const answers = [];
      for (const each of asked) {
        answers.push(await ask(source.predict, each));
        if (request !== predicted) return; // something else has been chosen meanwhile
      }
      error.textContent = "";
      showPredictions(position, asked, answers);
      // The text that follows takes longer.
      const places = predictions.querySelectorAll(".goes-on");
      for (const [column, each] of asked.entries()) {
        const continuation = await ask(source.goOn, each);
        if (request !== predicted) return;
        places[column].textContent = continuation;
      }
    } catch (problem) {
      if (request !== predicted) return;
      error.textContent = problem.message;
      of = ""; // so that it can be asked for again
    }
    predictions.removeAttribute("aria-busy");
  }

  function showPredictions(position, asked, answers) {
    const [free, dialled, told] = answers;
    const unit = "Kullback-Leibler divergence";
    const sentences = [
      ...(dialled ? [`Between the two: ${bitsText(dialled.divergence)} (${unit}; 0 bits, the same prediction).`] : []),
      ...(told ? [`Told to look at block ${asked[2].target}: ${bitsText(told.divergence)} from dial 0.`] : []),
    ];
    if (free.actual !== null) {
      sentences.push(
        `The text goes on with ${quoted(tokens[position + 1])}: ` +
          `${asked.map(({ name }, place) => `${percent(answers[place].actual)} at ${name}`).join(", ")}.`,
      );
    }
    if (!isDialled(reading)) sentences.push("In this model λ is 0 in every layer, so that no dial changes anything.");
    else if (!dialled) sentences.push("Turn the dial up to see what comes next when words outside the blocks count less.");
    const column = (name, { tokens: words, probabilities }) => {
      const rows = words.map((word, place) =>
        make("tr", {}, make("td", { class: "word" }, quoted(word)), make("td", {}, percent(probabilities[place]))),
      );
      return make(
        "div",
        {},
        make("h4", {}, name),
        make("table", {}, make("thead", {}, headings("next", "probability")), make("tbody", {}, ...rows)),
        make("p", { class: "note" }, "and so it goes on, the likeliest token each time:"),
        make("p", { class: "goes-on" }, "…"),
      );
    };
    predictions.style.setProperty("--columns", Math.max(2, asked.length));
    predictions.replaceChildren(
      ...asked.map(({ name }, place) => column(name, answers[place])),
      make("p", { class: "between", style: "grid-column: 1 / -1" }, sentences.join(" ")),
    );
  }
}
