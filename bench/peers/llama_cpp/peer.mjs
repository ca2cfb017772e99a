// llama.cpp as one process that is asked over stdin, a JSON line a question, and answers with a JSON line:
//   {"op": "prefill", "prompt": [ids]}                          one batch, the last token's logits
//   {"op": "decode", "prompts": [[ids]], "tokens": [[ids]]}     a step takes the next token of every sequence
//   {"op": "threads", "count": 2}
// Arguments: MODEL.gguf SEQUENCES TOKENS_EACH.
import {createInterface} from "node:readline";
import {open} from "./llama.mjs";

const [path, sequences, tokensEach] = process.argv.slice(2);
const own = performance.now() / 1e3;  // that node took to come here
const peer = await open(path, {sequences: Number(sequences), tokensEach: Number(tokensEach)});

async function prefill(prompt) {
  if (sequencesKept > 0) throw new Error("prefill is asked for before decode: its sequence is taken");
  const begin = performance.now();
  await peer.step([{sequence: 0, position: 0, tokens: prompt}]);
  const seconds = (performance.now() - begin) / 1e3;
  peer.forget(0);
  return {seconds};
}

// The prompts stay in the cache: asked for with the same ones, decoding begins behind them again.
let kept = "";
let sequencesKept = 0;
async function decode(prompts, tokens) {
  if (JSON.stringify(prompts) !== kept) {
    for (let i = 0; i < sequencesKept; ++i) peer.forget(i);
    const begins = prompts.map((prompt, sequence) => ({sequence, position: 0, tokens: prompt}));
    const together = Math.max(1, Math.floor(peer.batchSize / prompts[0].length));
    for (let i = 0; i < begins.length; i += together) await peer.step(begins.slice(i, i + together));
    kept = JSON.stringify(prompts);
    sequencesKept = prompts.length;
  }
  const rows = prompts.map((prompt, sequence) => ({sequence, position: prompt.length, tokens: [0]}));
  const begin = performance.now();
  for (let i = 0; i < tokens[0].length; ++i) {
    for (const row of rows) row.tokens = [tokens[row.sequence][i]];
    await peer.step(rows);
    for (const row of rows) ++row.position;
  }
  const seconds = (performance.now() - begin) / 1e3;
  for (const row of rows) peer.truncate(row.sequence, prompts[row.sequence].length, row.position);
  return {seconds};
}

const answer = (value) => process.stdout.write(JSON.stringify(value) + "\n");
answer({ready: true, own, release: peer.release, system: peer.system});
for await (const line of createInterface({input: process.stdin})) {
  const question = JSON.parse(line);
  if (question.op === "prefill") answer(await prefill(question.prompt));
  else if (question.op === "decode") answer(await decode(question.prompts, question.tokens));
  else if (question.op === "threads") answer({threads: peer.setThreads(question.count)});
  else answer({error: `unknown op ${question.op}`});
}
process.exit(0);
