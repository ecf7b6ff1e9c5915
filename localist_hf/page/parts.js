// What a page is made of: numbers unpacked, elements, words, colours, and the introduction.

/** Bytes that Python's `pack` has packed, as an array of this type. */
async function unpack(packed, ArrayType) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new ArrayType(await new Response(stream).arrayBuffer());
}

/** Number of the weights of all queries before this one. */
const triangle = (position) => (position * (position + 1)) / 2;

/** Answers from the numbers in a saved page: they know all weights, and nothing of the dial. */
function savedSource(data) {
  const unpacked = data.readings.map(async ({ rows }) => ({
    mean: await unpack(rows.mean, Uint16Array),
    heads: await unpack(rows.heads, Uint8Array),
    largest: await unpack(rows.largest, Uint16Array),
  }));
  const length = data.tokens.length;
  const weightOf = ({ mean, heads, largest }, reading, layer, head) => {
    const row = head === null ? layer : layer * data.readings[reading].numHeads + head;
    const packed = head === null ? mean : heads;
    return (query, key) => {
      const unit = head === null ? 1 / 65535 : largest[row * length + query] / 65535 / 255;
      return packed[row * triangle(length) + triangle(query) + key] * unit;
    };
  };
  return {
    /** The weights of one query; of the mean over heads where `head` is null. */
    async weights({ reading, layer, head, position }) {
      const weight = weightOf(await unpacked[reading], reading, layer, head);
      return Array.from({ length: position + 1 }, (_, key) => weight(position, key));
    },
    /** The weights that a token has for itself and for those after it. */
    async lookedAt({ reading, layer, head, position }) {
      const weight = weightOf(await unpacked[reading], reading, layer, head);
      return Array.from({ length: length - position }, (_, after) => weight(position + after, position));
    },
    /** The shares of attention that go from each block to each, row by row. */
    async blocks({ reading, layer, head }) {
      const { numHeads, blocks } = data.readings[reading];
      return unpack(blocks[layer * (numHeads + 1) + (head === null ? 0 : head + 1)], Uint16Array);
    },
  };
}

/** An element with attributes, and with children that are elements or text. Text stays text, whatever it holds. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** The row that names a table's columns. */
const headings = (...names) =>
  make("tr", {}, ...names.map((name) => (name ? make("th", { scope: "col" }, name) : make("td"))));

/** A token by itself, with signs for what would not be seen; whichever way it is written, what is around it stays. */
const quoted = (piece) =>
  piece === "" ? "(part of a character)" : `‘\u2068${piece.replaceAll("\n", "↵").replaceAll("\t", "⇥")}\u2069’`;

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** Of a weight as many digits as are sure. */
const weightText = (weight) => (weight > 0 && weight < 0.0001 ? "< 0.01 %" : percent(weight, 2));

const PARTS = ["self", "sink", "block", "outside"];
/** Those that a model has. */
const partsOf = (reading) => PARTS.filter((part) => part !== "sink" || reading.numSinks || reading.hasLearnedSink);
const PART_CLASSES = { self: "self", sink: "sink", block: "inside", outside: "outside" };

// Cividis, which is made for the colour-blind and grows lighter throughout.
const CIVIDIS = [[0, 34, 78], [67, 78, 108], [125, 124, 120], [188, 175, 111], [254, 232, 56]];

/** Background and text colour of a share: of black and white the one that stands out more. */
function heatColours(share) {
  const place = Math.min(Math.floor(share * 4), 3);
  const colour = CIVIDIS[place].map((low, i) => Math.round(low + (share * 4 - place) * (CIVIDIS[place + 1][i] - low)));
  const [red, green, blue] = colour.map((value) => {
    const channel = value / 255;
    return channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return [`rgb(${colour.join(" ")})`, (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) ? "#000" : "#fff"];
}

/** How large the weights in a saved page are. */
const megabytes = (data) =>
  (data.readings.flatMap(({ rows }) => Object.values(rows)).reduce((sum, row) => sum + row.length, 0) / 1e6).toFixed(1);

/** What a reader needs to know who has not read the paper. */
function introduction(data, isLive, hasDial) {
  const { numSinks, numPreviousBlocks, partition, hasLearnedSink } = data.readings[0];
  const before = ["", " or the block before it"][numPreviousBlocks] ?? ` or the ${numPreviousBlocks} blocks before it`;
  const cut = {
    semantic:
      "The model itself says where: it marks some tokens, mostly ends of sentences and lines, as the end of a thought.",
    delimiter: "They end at given signs, such as the ends of sentences.",
    window: "They all have the same length.",
  }[partition];
  const firstTokens = numSinks > 1 ? `${numSinks} tokens` : "token";
  const sinks = [
    ...(numSinks ? [`the first ${firstTokens} of the text, where not in the same block`] : []),
    ...(hasLearnedSink ? ["a sink of the model's own, which is no token"] : []),
  ];
  const paragraph = (title, ...sentences) => make("p", {}, make("strong", {}, title), ` ${sentences.join(" ")}`);
  const share = (part, text) => [
    make("dt", {}, make("span", { class: `swatch ${PART_CLASSES[part]}`, "aria-hidden": "true" }), part),
    make("dd", {}, text),
  ];
  return make(
    "details",
    { class: "intro", open: true },
    make("summary", {}, "How to read this page, in a minute"),
    make(
      "div",
      { class: "columns" },
      make(
        "div",
        {},
        paragraph(
          "Attention.",
          "A language model reads text in tokens: words, or pieces of words. To say what comes next it looks back.",
          "In every layer each token has 100 % of attention to spend, on itself and on the tokens before it;",
          "several heads of a layer do so side by side. Choose a token to see where it looks, or which look at it.",
        ),
        paragraph(
          "Blocks.",
          `The text is cut into stretches, numbered and shaded in turn. ${cut}`,
          `A token's own block${before && ", with what counts beside it,"} is marked “local”.`,
        ),
        paragraph(
          "Context fidelity.",
          "Of the attention that goes to other words, block and outside together, the part that stays in the block.",
          "Where it is near 100 %, the few words of the block tell you all that a head was looking at; near 0 %, you",
          "would have to read everything before.",
        ),
        paragraph(
          "Which block looks at which.",
          "The matrix shows it for all blocks at once. Where a row is light in one place, its words have made up their",
          "mind; where blocks look at themselves alone, only the diagonal is light.",
        ),
      ),
      make(
        "div",
        {},
        paragraph("Shares.", "Where a token's attention goes, in parts of 100 %:"),
        make(
          "dl",
          {},
          ...share("self", "the token itself"),
          ...(sinks.length ? share("sink", `${sinks.join(", or ")}: where models leave attention without a use`) : []),
          ...share("block", `earlier words in the same block${before}`),
          ...share("outside", "all other earlier words"),
        ),
        ...(isLive
          ? [paragraph(
              "What it rests on",
              "is not what attention shows. The page puts other words in the place of each block and each word, and says",
              "by how many bits the prediction changes. It takes many readings, and so begins when you ask for it.",
            )]
          : []),
        ...(hasDial
          ? [paragraph(
              "The dial.",
              "At 0 the model is as it is. Turned up, words outside the block count less, in each layer as far as its",
              "λ says: at dial 1, a layer with λ = 1 sees its block only. Where the prediction stays the same, within",
              "hundredths of a bit, it needed no more than the blocks of those layers. Shades follow the dial; tables",
              "and matrix are at 0. Where every layer sees its blocks only, a frame holds all that can count.",
            ),
            paragraph(
              "Rules.",
              "Mark an earlier block, with Shift and a click or the key t, to tell the chosen token, and what is written",
              "after it, to look there: words elsewhere count less then, as far as the dial and λ say. It bounds where",
              "that token looks, not what it knows: tokens in between may have read the rest.",
            )]
          : [paragraph("λ", "says how firmly training and the dial hold a layer to its blocks: 0 not at all, 1 entirely.")]),
        ...(isLive
          ? []
          : [paragraph(
                "This file",
                `holds every attention weight, in ${megabytes(data)} MB; they grow with the square of the text's length.`,
            )]),
      ),
    ),
  );
}
