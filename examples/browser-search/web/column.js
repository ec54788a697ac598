// The column of one model: its figures, its state in words, and its answers.

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(2)} s`);
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

function answerItem({ sentence, similarity }, text, shared) {
  const item = document.createElement("li");
  const line = document.createElement("p");
  line.textContent = text;
  const score = document.createElement("span");
  score.className = "score";
  score.textContent = similarity.toFixed(2);
  score.setAttribute("aria-label", `similarity ${similarity.toFixed(2)}`);
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  const fill = document.createElement("span");
  fill.style.width = `${Math.max(0, Math.min(1, similarity)) * 100}%`;
  bar.append(fill);
  item.append(line, score, bar);
  item.dataset.sentence = sentence;
  if (shared === false) {
    item.className = "other";
    const note = document.createElement("span");
    note.className = "note";
    note.textContent = "not in Dense's top 10";
    line.append(" ", note);
  }
  return item;
}

/**
 * @param {object} model its entry in manifest.json
 * @param {object} dense the entry that it is compared with
 * @param {number} nearest how many answers there are
 * @param {(column: object) => void} again what "Try again" does
 */
export function makeColumn(model, dense, nearest, again) {
  const element = document.getElementById("column").content.firstElementChild.cloneNode(true);
  const part = (selector) => element.querySelector(selector);
  const figure = (name) => part(`[data-figure="${name}"]`);
  const title = part("h2");
  title.id = `title-${model.id}`;
  title.textContent = model.name;
  element.id = model.id;
  element.setAttribute("aria-labelledby", title.id);
  part(".what").textContent = model.what;
  part(".megabytes").textContent = megabytes(model.bytes);
  part(".ratio").textContent =
    model === dense ? "the original" : `${(dense.bytes / model.bytes).toFixed(1)}× smaller`;
  part(".meter span").style.width = `${(100 * model.bytes) / dense.bytes}%`;
  figure("cosine").textContent = model === dense ? "reference" : model.cosine.toFixed(3);
  figure("agreement").textContent =
    model === dense ? "reference" : `${(nearest * model.agreement).toFixed(1)} of ${nearest}`;

  let worker;
  const column = { element, model, ready: false, failed: false };

  function state(text) {
    part(".state").textContent = text;
  }

  function fail(message) {
    worker?.terminate();
    Object.assign(column, { ready: false, failed: true });
    element.dataset.state = "failed";
    state(message);
    part(".again").hidden = false;
    part(".answers").hidden = true;
  }

  // Resolves with the worker's message of this type, or with null where it failed instead.
  function reply(type, message, onProgress) {
    return new Promise((resolve) => {
      const end = (text) => { fail(text); resolve(null); };
      worker.onmessage = ({ data }) => {
        if (data.type === "progress") onProgress(data);
        else if (data.type === type) resolve(data);
        else end(data.message);
      };
      worker.onerror = (event) => {
        event.preventDefault();
        end(`The model's thread stopped: ${event.message || "worker.js could not be loaded"}.`);
      };
      worker.postMessage(message);
    });
  }

  column.start = async (options) => {
    Object.assign(column, { ready: false, failed: false });
    part(".again").hidden = true;
    element.dataset.state = "loading";
    state("Starting …");
    worker = new Worker("worker.js", { type: "module" });
    const found = await reply("ready", { type: "start", model, ...options }, ({ received }) => {
      state(`Downloading: ${megabytes(received)} of ${megabytes(model.bytes)}`);
    });
    if (!found) return;
    column.ready = true;
    element.dataset.state = "ready";
    part(".megabytes").textContent = megabytes(found.bytes);
    figure("load").textContent = seconds(found.loadSeconds);
    state("Ready");
  };

  column.ask = async (query) => {
    const found = await reply("answer", { type: "query", ...query });
    if (found) figure("query").textContent = milliseconds(found.milliseconds);
    return found;
  };

  column.show = (found, sentences, reference) => {
    if (!found) return;
    const shared = found.nearest.filter(({ sentence }) => reference?.includes(sentence)).length;
    part(".shared").textContent = reference ? `${shared} of ${nearest} as Dense` : "";
    part("ol").replaceChildren(
      ...found.nearest.map((answer) =>
        answerItem(answer, sentences[answer.sentence], reference?.includes(answer.sentence)),
      ),
    );
    part(".answers").hidden = false;
  };

  part(".again").addEventListener("click", () => again(column));
  return column;
}
