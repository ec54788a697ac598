// The page: starts one worker to each model, one after the other, and puts a query to all that run.
import { makeEncoder } from "./encode.js";
import { makeColumn } from "./column.js";

const REPEATS = 7;
const START_ORDER = ["compressed", "int8", "dense"]; // the smallest answers first
const byId = (id) => document.getElementById(id);
const form = byId("form");
const input = byId("query");
const say = (text) => { byId("status").textContent = text; };

let columns = [];
let encode, sentences, manifest;
let starting = Promise.resolve();
let searching = false;

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = false;
  say("");
}

async function read(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error(`${path} could not be downloaded: the server does not answer.`);
  }
  if (!response.ok) {
    throw new Error(`${path} could not be downloaded: the server says ${response.status}.`);
  }
  return response.json();
}

const threads = () => {
  const asked = Number(new URLSearchParams(location.search).get("threads"));
  if (!self.crossOriginIsolated) return 1; // threads need the headers that serve.py sends
  return Number.isInteger(asked) && asked > 0 ? asked : Math.min(4, navigator.hardwareConcurrency || 1);
};

const running = () => columns.filter((column) => column.ready);

function describe() {
  const alive = running();
  const unfinished = columns.filter((column) => !column.ready && !column.failed);
  byId("go").disabled = alive.length === 0;
  if (alive.length === 0 && unfinished.length === 0) say("No model runs, so there is nothing to search with.");
  else if (unfinished.length) {
    const now = alive.length ? "You can search already. " : "";
    say(`${now}Loading ${unfinished.map((column) => column.model.name).join(", ")} …`);
  } else say(`${sentences.length.toLocaleString("en")} sentences are ready to be searched.`);
}

function start(column) {
  starting = starting.then(async () => {
    await column.start({ sentences: sentences.length, threads: threads() });
    describe();
    if (column.ready && shown) await search(shown);
  });
}

let shown = ""; // the query whose answers are on the page
let outdated = false; // another query, or another model, has come since

async function search(text) {
  shown = text;
  outdated = true;
  if (searching) return;
  searching = true;
  while (outdated) {
    outdated = false;
    await answer(shown);
  }
  searching = false;
}

async function answer(text) {
  say(`Searching for “${text}” …`);
  const ids = encode(text);
  const answers = new Map();
  // One after the other: models that ran together would share the processor and the blame.
  for (const column of running()) {
    const found = await column.ask({ ids, nearest: manifest.nearest, repeats: REPEATS });
    if (found) answers.set(column, found);
  }
  const dense = columns.find(({ model }) => model.id === "dense");
  const reference = answers.get(dense)?.nearest.map(({ sentence }) => sentence);
  for (const [column, found] of answers) {
    column.show(found, sentences, column === dense ? undefined : reference);
  }
  if (outdated) return;
  document.body.dataset.answered = text;
  const unfinished = columns.some((column) => !column.ready && !column.failed);
  say(`Nearest to “${text}”${unfinished ? "; other models are still loading" : ""}.`);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text) {
    say("Type a sentence first.");
    input.focus();
  } else if (running().length) search(text);
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    input.value = example.textContent;
    form.requestSubmit();
  });
}

async function main() {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly; a newer one has.");
  const [{ Tokenizer }, vocabulary, config, texts, found] = await Promise.all([
    import("./vendor/tokenizers.min.mjs").catch(() => {
      throw new Error("vendor/tokenizers.min.mjs could not be downloaded.");
    }),
    ...["tokenizer.json", "tokenizer_config.json", "sentences.json", "manifest.json"].map(read),
  ]);
  encode = makeEncoder(Tokenizer, vocabulary, config);
  [sentences, manifest] = [texts, found];

  const dense = found.models.find(({ id }) => id === "dense");
  const smallest = found.models.find(({ id }) => id === "compressed");
  byId("times").textContent = `${(dense.bytes / smallest.bytes).toFixed(1)} times`;
  const { calibration, fast, held_out: heldOut } = found.settings;
  byId("method").textContent =
    `Sizes are those of the ONNX files. Load time is from the downloaded file to a session, on a second start: ` +
    `during the first one the browser still compiles the runtime, which takes the first model a second or more. ` +
    `Query time is the median of ${REPEATS} runs: the encoder, and the comparison with all sentences. ` +
    `Each model searches in embeddings of its own. Quality is the mean cosine to the dense embeddings of ${heldOut} ` +
    `sentences that nothing was fitted on, and how many of the dense model's ten nearest are found on average. ` +
    (fast ? "This build is a quick one for tests: nothing was fitted, and quality is far lower. "
      : `The compressed layers were fitted on ${calibration.toLocaleString("en")} other sentences. `) +
    `The sentences are examples of usage from WordNet 3.1.`;
  byId("machine").textContent =
    `ONNX Runtime Web on WebAssembly, ${threads() === 1 ? "one thread" : `${threads()} threads`}.`;

  columns = found.models.map((model) => makeColumn(model, dense, found.nearest, start));
  byId("columns").append(...columns.map(({ element }) => element));
  describe();
  for (const id of START_ORDER) start(columns.find(({ model }) => model.id === id));
  await starting;
  document.body.dataset.started = "yes";
}

main().catch((error) => trouble(`The page could not start. ${error.message} Build it again with run.sh.`));
