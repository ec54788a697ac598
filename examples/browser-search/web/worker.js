// One model in a thread of its own: downloads it, starts a session, answers queries.
//
// in:  { type: "start", model, sentences, threads }       out: { type: "progress", received }
//                                                               { type: "ready", bytes, loadSeconds }
//      { type: "query", ids, nearest, repeats }                 { type: "answer", nearest, milliseconds }
//                                                               { type: "failed", message }
import { indexOf, nearestOf } from "./search.js";

const here = new URL("./", self.location).href;
let ort, session, index;

async function download(path, onProgress) {
  let response;
  try {
    response = await fetch(here + path, { cache: "no-store" });
  } catch {
    throw new Error(`${path} could not be downloaded: the server does not answer.`);
  }
  if (!response.ok) {
    throw new Error(`${path} could not be downloaded: the server says ${response.status}.`);
  }
  const parts = [];
  let received = 0;
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      received += value.length;
      onProgress?.(received);
    }
  } catch {
    throw new Error(`The download of ${path} broke off after ${received.toLocaleString()} bytes.`);
  }
  const bytes = new Uint8Array(received);
  let offset = 0;
  for (const part of parts) {
    bytes.set(part, offset);
    offset += part.length;
  }
  return bytes;
}

async function startRuntime(threads) {
  try {
    ort = await import("./vendor/ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = `${here}vendor/`;
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    // Starts WebAssembly, so that the time a model takes is the model's.
    const first = await download("models/first.onnx");
    await (await ort.InferenceSession.create(first)).release();
  } catch (error) {
    throw new Error(`The WebAssembly runtime did not start. ${error.message}`);
  }
}

async function start({ model, sentences, threads }) {
  await startRuntime(threads);
  let last = 0;
  const bytes = await download(`models/${model.id}.onnx`, (received) => {
    if (received - last < 500_000) return;
    last = received;
    postMessage({ type: "progress", received });
  });
  index = indexOf(await download(`models/${model.id}.index.bin`), sentences);
  // Twice: during the first start the browser still compiles the runtime, at the expense of
  // whichever model comes first.
  await open(bytes);
  await embed([101, 102]);
  await session.release();
  const started = performance.now();
  await open(bytes);
  const loadSeconds = (performance.now() - started) / 1000;
  await embed([101, 102]); // the first run sets up buffers
  postMessage({ type: "ready", bytes: bytes.length, loadSeconds });
}

async function open(bytes) {
  try {
    session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new Error(`The model was downloaded, but does not start: ${error.message}`);
  }
}

async function embed(ids) {
  const size = [1, ids.length];
  const { embedding } = await session.run({
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), size),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), size),
  });
  return embedding.data;
}

async function answer({ ids, nearest, repeats }) {
  const times = [];
  let found;
  for (let run = 0; run < repeats; run += 1) {
    const started = performance.now();
    found = nearestOf(await embed(ids), index, nearest);
    times.push(performance.now() - started);
  }
  times.sort((a, b) => a - b);
  postMessage({ type: "answer", nearest: found, milliseconds: times[times.length >> 1] });
}

self.onmessage = async ({ data }) => {
  try {
    await (data.type === "start" ? start(data) : answer(data));
  } catch (error) {
    postMessage({ type: "failed", message: error.message });
  }
};
