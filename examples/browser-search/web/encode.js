// From a sentence to what the model takes. The tokenizer is that of @huggingface/tokenizers; two
// things that Python's does are added here: it cuts long texts, and takes ideographs beyond the
// first 65,536 code points one by one, as it takes the others.

export const MAX_TOKENS = 128;

const RARE_IDEOGRAPHS = /[\u{20000}-\u{2A6DF}\u{2A700}-\u{2B81F}\u{2B920}-\u{2CEAF}\u{2F800}-\u{2FA1F}]/gu;

/**
 * @param {Function} Tokenizer the class of @huggingface/tokenizers
 * @param {object} json tokenizer.json of the model
 * @param {object} config tokenizer_config.json of the model
 * @returns {(text: string) => number[]} ids with [CLS] in front and [SEP] behind, 128 at most
 */
export function makeEncoder(Tokenizer, json, config) {
  const tokenizer = new Tokenizer(json, config);
  return (text) => {
    const { ids } = tokenizer.encode(text.replace(RARE_IDEOGRAPHS, " $& "));
    return ids.length <= MAX_TOKENS ? ids : [...ids.slice(0, MAX_TOKENS - 1), ids.at(-1)];
  };
}
