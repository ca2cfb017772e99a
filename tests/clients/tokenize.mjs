// The ids that the Rust library `tokenizers` gives: node tokenize.mjs TOKENIZER.json < a JSON list of texts > a list of lists
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
const { Tokenizer } = createRequire(import.meta.url)('@anush008/tokenizers');

const tokenizer = Tokenizer.fromFile(process.argv[2]);
const ids = [];
for (const text of JSON.parse(readFileSync(0, 'utf8'))) ids.push([...(await tokenizer.encode(text, null, { addSpecialTokens: true })).getIds()]);
process.stdout.write(JSON.stringify(ids));
