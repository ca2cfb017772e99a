// A small HTTP server around llama.cpp: /v1/models and streamed /v1/completions of token ids, as far as a load
// generator needs them, with continuous batching: a step takes the next token of every running sequence and
// fills the batch up with prompts that wait. (node-llama-cpp ships no llama-server.) Greedy.
// Arguments: MODEL.gguf SEQUENCES TOKENS_EACH THREADS VOCAB. Prints {"url"} when it serves.
import {createServer} from "node:http";
import {open} from "./llama.mjs";

const [path, sequences, tokensEach, threads, vocab] = process.argv.slice(2);
const peer = await open(path, {sequences: Number(sequences), tokensEach: Number(tokensEach)});
peer.setThreads(Number(threads));

const free = Array.from({length: Number(sequences)}, (_, i) => i);
const waiting = [], running = [];
let wake = () => {};

// Of a request: {prompt, taken (tokens of the prompt), position, next (token), left (tokens), emit, done}.
function plan() {
  const rows = [];
  let room = peer.batchSize;
  for (const request of running.filter(({taken, prompt}) => taken === prompt.length)) {
    rows.push({request, sequence: request.sequence, position: request.position, tokens: [request.next]});
    --room;
  }
  while (waiting.length > 0 && free.length > 0) running.push({...waiting.shift(), sequence: free.pop()});
  for (const request of running) {
    const count = Math.min(room, request.prompt.length - request.taken);
    if (count <= 0) continue;
    const tokens = request.prompt.slice(request.taken, request.taken + count);
    const logits = request.taken + count === request.prompt.length;
    rows.push({request, sequence: request.sequence, position: request.position, tokens, logits});
    request.taken += count;
    room -= count;
  }
  return rows;
}

async function run() {
  for (;;) {
    const rows = plan();
    if (rows.length === 0) {
      await new Promise((resolve) => { wake = resolve; });
      continue;
    }
    const indexes = await peer.step(rows);
    await Promise.all(rows.map(async ({request, tokens, logits = true}, i) => {
      request.position += tokens.length;
      if (!logits) return;
      request.next = await peer.sample(indexes[i]);
      request.emit(request.next);
      if (--request.left > 0) return;
      request.done();
      peer.forget(request.sequence);
      free.push(request.sequence);
      running.splice(running.indexOf(request), 1);
    }));
    await new Promise(setImmediate);  // sockets
  }
}

function complete(body, response) {
  const {prompt, max_tokens: left} = body;
  if (!Array.isArray(prompt) || !(left > 0) || prompt.length + left > Number(tokensEach)) {
    response.writeHead(400).end(JSON.stringify({error: {message: "prompt: token ids, within the context"}}));
    return;
  }
  const stream = body.stream === true;
  const usage = {prompt_tokens: prompt.length, completion_tokens: left, total_tokens: prompt.length + left};
  const choice = (text, finish) => ({index: 0, text, finish_reason: finish});
  if (stream) response.writeHead(200, {"content-type": "text/event-stream"});
  let text = "";
  waiting.push({
    prompt, left, taken: 0, position: 0, next: 0,
    emit(token) {
      if (stream) response.write(`data: ${JSON.stringify({choices: [choice(` ${token}`, null)]})}\n\n`);
      else text += ` ${token}`;
    },
    done() {
      if (!stream) return response.end(JSON.stringify({choices: [choice(text, "length")], usage}));
      response.write(`data: ${JSON.stringify({choices: [choice("", "length")], usage})}\n\n`);
      response.end("data: [DONE]\n\n");
    }
  });
  wake();
}

const server = createServer((request, response) => {
  if (request.url === "/v1/models") {
    response.setHeader("content-type", "application/json");
    response.end(JSON.stringify({object: "list", data: [
      {id: "llama.cpp", object: "model", max_model_len: Number(tokensEach), vocab_size: Number(vocab)}]}));
    return;
  }
  let text = "";
  request.on("data", (part) => { text += part; });
  request.on("end", () => complete(JSON.parse(text), response));
});
server.listen(0, "127.0.0.1", () => {
  process.stdout.write(JSON.stringify({url: `http://127.0.0.1:${server.address().port}`}) + "\n");
});
run();
