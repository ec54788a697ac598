// Embeddings of the sentences, stored as bytes, and the nearest of them to a query.

/**
 * @param {Uint8Array} bytes a float32 scale to each sentence, then int8 (sentences, dimensions)
 * @param {number} sentences how many there are
 */
export function indexOf(bytes, sentences) {
  const dimensions = bytes.length / sentences - 4;
  if (!Number.isInteger(dimensions) || dimensions < 1) {
    throw new Error(`The index has ${bytes.length} bytes, which is not right for ${sentences} sentences.`);
  }
  return {
    sentences,
    dimensions,
    scales: new Float32Array(bytes.buffer, bytes.byteOffset, sentences),
    codes: new Int8Array(bytes.buffer, bytes.byteOffset + 4 * sentences),
  };
}

/**
 * @param {Float32Array} query an embedding of unit length
 * @returns {{ sentence: number, similarity: number }[]} the nearest, by cosine, best first
 */
export function nearestOf(query, { sentences, dimensions, scales, codes }, count) {
  const scored = new Array(sentences);
  for (let sentence = 0, at = 0; sentence < sentences; sentence += 1) {
    let sum = 0;
    for (let d = 0; d < dimensions; d += 1, at += 1) sum += query[d] * codes[at];
    scored[sentence] = { sentence, similarity: sum * scales[sentence] };
  }
  scored.sort((a, b) => b.similarity - a.similarity || a.sentence - b.sentence);
  return scored.slice(0, count);
}
