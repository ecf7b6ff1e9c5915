// The text as it is shaded now, as a picture that needs nothing else: SVG, and PNG of it.

const PICTURE = {
  ink: "#1b1b1f", faint: "#54545f", band: "#eaf0f8", edge: "#7c8aa5", local: "#1f4e9c", shade: "#f59e0b", bar: "#9a3412",
  reach: "#1a7a4c", fonts: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif",
};
/** No browser draws larger canvases than this. */
const MOST_PIXELS = 16000;

/**
 * Makes a picture of a text.
 *
 * @param {HTMLElement} text The text on the page.
 * @param {string} title What it shows.
 * @param {string[]} notes Sentences that stand below it.
 * @param {string[]} scale What five shades stand for, from none to full.
 * @returns {string} SVG.
 */
function pictureOf(text, title, notes, scale) {
  const around = text.getBoundingClientRect();
  const [left, top] = [around.left + text.clientLeft, around.top + text.clientTop - text.scrollTop];
  const margin = 16;
  const width = text.clientWidth + 2 * margin;
  const pen = document.createElement("canvas").getContext("2d");
  const parts = [];
  const add = (tag, attributes, content = "") => {
    const named = Object.entries(attributes).map(([name, value]) => `${name}="${escaped(value)}"`);
    parts.push(`<${tag} ${named.join(" ")}>${escaped(content)}</${tag}>`);
  };
  const box = (x, y, w, h, attributes) =>
    add("rect", { x: tidy(x), y: tidy(y), width: tidy(w), height: tidy(h), ...attributes });
  const write = (x, y, size, content, attributes = {}) =>
    add("text", { x: tidy(x), y: tidy(y), "font-size": size, fill: PICTURE.ink, ...attributes }, content);

  let y = margin + 18;
  for (const line of wrapped(pen, title, 16, width - 2 * margin, "700")) {
    write(margin, y, 16, line, { "font-weight": 700 });
    y += 22;
  }
  const [dx, dy] = [margin - left, y - 6 - top];
  for (const block of text.querySelectorAll(".block")) drawBlock(block);
  for (const token of text.querySelectorAll(".token")) drawToken(token);
  y += text.scrollHeight + 6;
  scale.forEach((label, place) => {
    const [x, share] = [margin + place * 92, place / 4];
    drawShade({ left: x - dx, top: y - dy, width: 20, height: 20 }, share);
    box(x, y, 20, 20, { fill: "none", stroke: PICTURE.edge });
    write(x + 25, y + 15, 12, label);
  });
  y += 42;
  for (const line of notes.flatMap((note) => wrapped(pen, note, 12.5, width - 2 * margin))) {
    write(margin, y, 12.5, line, { fill: PICTURE.faint });
    y += 18;
  }
  const height = Math.ceil(y + margin / 2);
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(width)}" height="${height}" `,
    `viewBox="0 0 ${Math.ceil(width)} ${height}" font-family="${escaped(PICTURE.fonts)}" role="img">`,
    `<title>${escaped(title)}</title><desc>${escaped(notes.join(" "))}</desc>`,
    `<rect width="100%" height="100%" fill="#fff"/>${parts.join("")}</svg>`,
  ].join("");

  function drawBlock(block) {
    const style = getComputedStyle(block);
    const isOdd = style.backgroundColor !== "rgba(0, 0, 0, 0)";
    const rects = [...block.getClientRects()].filter((rect) => rect.width > 0);
    rects.forEach((rect, place) => {
      const [x, at] = [rect.left + dx, rect.top + dy];
      if (isOdd) box(x, at, rect.width, rect.height, { fill: PICTURE.band });
      if (block.classList.contains("local")) {
        for (const line of [at - 2, at + rect.height]) box(x, line, rect.width, 2, { fill: PICTURE.local });
      }
      if (block.classList.contains("target")) {
        box(x, at, rect.width, rect.height, { fill: "none", stroke: PICTURE.bar, "stroke-width": 2, "stroke-dasharray": "5 3" });
      }
      if (place > 0) return;
      const isRight = style.direction === "rtl";
      box(isRight ? x + rect.width - 2 : x, at, 2, rect.height, { fill: PICTURE.edge });
      const anchor = isRight ? { "text-anchor": "end" } : {};
      write(isRight ? x + rect.width - 4 : x + 4, at + 13, 10, block.dataset.badge, {
        ...anchor, fill: block.matches(".target") ? PICTURE.bar : block.matches(".local") ? PICTURE.local : PICTURE.faint,
      });
    });
  }

  function drawShade(rect, share) {
    const [x, at] = [rect.left + dx, rect.top + dy];
    box(x, at, rect.width, rect.height, { fill: PICTURE.shade, "fill-opacity": share });
    box(x, at + rect.height - share * 8, rect.width, share * 8, { fill: PICTURE.bar });
  }

  function drawToken(token) {
    const share = Number(token.style.getPropertyValue("--w"));
    const style = getComputedStyle(token);
    for (const rect of [...token.getClientRects()].filter((each) => each.width > 0)) {
      const [x, at] = [rect.left + dx, rect.top + dy];
      if (share > 0) drawShade(rect, share);
      if (token.classList.contains("reach")) {
        for (const line of [at, at + rect.height - 2]) box(x, line, rect.width, 2, { fill: PICTURE.reach });
        for (const [end, edge] of [["first", x], ["last", x + rect.width - 3]]) {
          if (token.classList.contains(end)) box(edge, at, 3, rect.height, { fill: PICTURE.reach });
        }
      }
      if (token.getAttribute("aria-selected") === "true") {
        box(x, at, rect.width, rect.height, { fill: "none", stroke: PICTURE.ink, "stroke-width": 2 });
      }
    }
    const font = { "font-weight": style.fontWeight, "font-style": style.fontStyle };
    pen.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const { fontBoundingBoxAscent: ascent } = pen.measureText("x");
    const fill = token.classList.contains("apart") ? PICTURE.faint : PICTURE.ink;
    for (const { letters, rect } of lettersOf(token)) {
      const rightToLeft = style.direction === "rtl" ? { direction: "rtl", "text-anchor": "end" } : {};
      write(rect.left + dx, rect.top + dy + ascent, parseFloat(style.fontSize), letters, {
        ...font, ...rightToLeft, fill, textLength: tidy(rect.width), lengthAdjust: "spacingAndGlyphs", "xml:space": "preserve",
      });
    }
  }
}

/** The letters of an element, line by line, with where they stand. */
function lettersOf(element) {
  const found = [];
  const range = document.createRange();
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    for (const { segment, index } of new Intl.Segmenter().segment(node.data)) {
      range.setStart(node, index);
      range.setEnd(node, index + segment.length);
      const rect = range.getBoundingClientRect();
      const before = found.at(-1);
      if (rect.width === 0 || segment === "\n" || segment === "\t") continue;
      if (before && before.node === node && Math.abs(before.rect.top - rect.top) < 2) {
        before.letters += segment;
        const left = Math.min(before.rect.left, rect.left);
        const right = Math.max(before.rect.left + before.rect.width, rect.right);
        before.rect = { top: before.rect.top, left, width: right - left };
      } else {
        found.push({ node, letters: segment, rect: { top: rect.top, left: rect.left, width: rect.width } });
      }
    }
  }
  return found.filter(({ letters }) => letters.trim());
}

/** A sentence in lines of this width. */
function wrapped(pen, sentence, size, width, weight = "400") {
  pen.font = `${weight} ${size}px ${PICTURE.fonts}`;
  const lines = [""];
  for (const word of sentence.split(" ")) {
    const longer = lines.at(-1) === "" ? word : `${lines.at(-1)} ${word}`;
    if (pen.measureText(longer).width <= width || lines.at(-1) === "") lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

const tidy = (number) => Number(number.toFixed(2));
// Of what XML does not allow in a text nothing is seen either.
const escaped = (text) =>
  String(text)
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "")
    .replace(/[<>&"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

/** Makes a PNG of an SVG, with two pixels for one where a canvas has so many. */
async function pngOf(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const scale = Math.min(2, MOST_PIXELS / Math.max(image.width, image.height));
  const canvas = make("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** Hands a file to the reader. */
function saveAs(blob, name) {
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
