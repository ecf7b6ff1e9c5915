// What a prediction rests on, measured by the server in portions, and what it can depend on at all.

/** Found again without asking: so many predictions. */
const MOST_KNOWN = 64;

/**
 * Measures what predictions of one reading rest on, one portion after the other; blocks come first.
 *
 * @param {number} index Which of the readings.
 * @param {object} source As for `drawPage`.
 * @param {function} changed Called when more is known.
 * @param {function} isShown Whether anybody still looks at it.
 * @returns {object} `of(about)`, what is known of a prediction: its `blocks` and `words` in bits, as far as they are
 *   there, what is `done`, and a `problem`; `measureSoon(about, numBlocks)`; and `stop()`. A prediction is `about` a
 *   `position`, a `dial` and a `target`.
 */
function influences(index, source, changed, isShown) {
  const known = new Map();
  let timer = null;
  let asked = 0;
  let last = Promise.resolve();
  return { of, measureSoon, stop };

  function of({ position, dial, target }) {
    return known.get(`${position} ${dial} ${target}`) ?? null;
  }

  function stop() {
    clearTimeout(timer);
    asked += 1; // the portion that is still to come is kept, and no other is asked for
  }

  function measureSoon(about, numBlocks) {
    stop();
    const { position, dial, target } = about;
    const key = `${position} ${dial} ${target}`;
    const found = known.get(key) ?? {
      blocks: Array(numBlocks), words: Array(position + 1), left: { block: numBlocks, token: position + 1 }, problem: null,
    };
    found.problem = null;
    known.delete(key);
    known.set(key, found);
    if (known.size > MOST_KNOWN) known.delete(known.keys().next().value);
    const request = asked;
    timer = setTimeout(() => measure(request, about, found), 300); // once the reader rests
  }

  async function measure(request, about, found) {
    await last; // one question at a time, whatever is chosen meanwhile: others are waiting too
    for (const [unit, bits] of [["block", found.blocks], ["token", found.words]]) {
      while (found.left[unit] > 0) {
        if (request !== asked || !isShown()) return;
        const end = found.left[unit];
        const answer = source.influence({ reading: index, ...about, unit, end });
        last = answer.catch(() => {});
        try {
          const portion = await answer;
          portion.bits.forEach((value, place) => (bits[end - portion.bits.length + place] = value));
          found.left[unit] = portion.left;
        } catch (problem) {
          found.problem = problem.message;
        }
        if (request === asked) changed();
        if (found.problem !== null) return;
      }
    }
  }
}

/** How far a measurement has come, in a sentence. */
function progressOf(found) {
  if (found === null) return "Measuring …";
  if (found.problem !== null) return found.problem;
  const { block, token } = found.left;
  if (block > 0) return `Measuring the blocks: ${block} are left. Then come the words …`;
  if (token > 0) return `Measuring the words, from the chosen one back: ${found.words.filter(() => true).length} are done …`;
  const missing = found.words.findIndex((value) => value !== undefined);
  return missing > 0 ? `Words before token ${missing} are not measured, only their blocks.` : "";
}

/**
 * Asks what predictions of one reading can depend on.
 *
 * @param {number} index Which of the readings.
 * @param {object} source As for `drawPage`.
 * @returns {function} `reachOf(dial)`, a promise of `first`, the first token in reach of each position or `null` where
 *   there is no bound, and the `statement`.
 */
function reaches(index, source) {
  const known = new Map();
  return (dial) => {
    if (!known.has(dial)) {
      const answer = source.reach({ reading: index, dial });
      known.set(dial, answer);
      answer.catch(() => known.delete(dial)); // so that it can be asked for again
    }
    return known.get(dial);
  };
}
