// Token ids as the page has them, for the test: JSON [text, ...] on stdin, [[id, ...], ...] out.
// node tokenize.mjs FOLDER, where FOLDER holds tokenizer.json and tokenizer_config.json.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { makeEncoder } from "./web/encode.js";

const read = (name) => JSON.parse(readFileSync(join(process.argv[2], name), "utf8"));
const encode = makeEncoder(Tokenizer, read("tokenizer.json"), read("tokenizer_config.json"));
const texts = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(texts.map(encode)));
