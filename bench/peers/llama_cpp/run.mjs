// ElasticMoE and llama.cpp side by side: one random model, the same weights and the same tokens for both, taking
// turns in one run. Started by `make bench-peers`; `node run.mjs --help` for its options.
//
// What is done so that llama.cpp is not wronged:
//   - it decodes in batches of all sequences (its own continuous batching), never one by one;
//   - it is fed the tokens that our engine generated, and in the rows without HTTP it samples none: ours does;
//   - each row takes the better of 1 and 2 threads for it; both sides run on the same cores, ours as one device of
//     two threads unless --flags says otherwise (a device a core is better for nothing here but for being resized);
//   - its weights lie in memory of its own, in transparent huge pages, not in a mapped file;
//   - the sequences' prompts are in its cache before decoding is timed, as in ours.
// Ours is the whole engine: scheduler, worker processes, exchange between them, sampling.
import {spawn, spawnSync} from "node:child_process";
import {existsSync, mkdirSync, readFileSync, rmSync} from "node:fs";
import {once} from "node:events";
import {dirname, join} from "node:path";
import {createInterface} from "node:readline";
import {fileURLToPath} from "node:url";
import {parseArgs} from "node:util";

const here = dirname(fileURLToPath(import.meta.url));
const top = join(here, "../../..");
const {values: options} = parseArgs({options: {
  json: {type: "boolean", default: false},
  quick: {type: "boolean", default: false},
  rounds: {type: "string"},
  formats: {type: "string", default: "bf16,int8,int4"},
  "no-serve": {type: "boolean", default: false},
  elasticmoe: {type: "string", default: join(top, "build/release/elasticmoe")},
  directory: {type: "string", default: join(top, "build/peers")},
  flags: {type: "string", default: "--devices 1 --threads 2"},
  help: {type: "boolean", default: false}
}});
if (options.help) {
  console.log(`node run.mjs [--json] [--quick] [--rounds N] [--formats bf16,int8,int4] [--no-serve]
             [--elasticmoe PROGRAM] [--directory DIR] [--flags "--devices 2 --threads 1"]
  --quick      a minute and a half: the rows of 1 and 32 sequences alone, fewer rounds and steps, each row on one set of
               prompts, bf16 alone over HTTP and 24 tokens there instead of 64
  --directory  where the model and its exports are made, and found again
  --flags      passed on to our engine`);
  process.exit(0);
}
const rounds = Number(options.rounds ?? (options.quick ? 3 : 5));
const steps = options.quick ? 8 : 24;
const context = options.quick ? 16 : 64;  // tokens of each sequence before
const prefillTokens = 512;
const sequenceCounts = options.quick ? [1, 32] : [1, 4, 16, 32];
const served = {concurrency: 32, requests: options.quick ? 32 : 64, input: 128, output: options.quick ? 24 : 64};
const ggufType = {bf16: "bf16", int8: "q8_0", int4: "q4_0"};
const flags = options.flags.split(" ").filter((flag) => flag !== "");

const start = performance.now();
const say = (text) => process.stderr.write(`${((performance.now() - start) / 1e3).toFixed(0).padStart(4)} s  ${text}\n`);
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

async function must(program, args) {
  const child = spawn(program, args, {stdio: ["ignore", "ignore", "inherit"]});
  const [code] = await once(child, "exit");
  if (code !== 0) throw new Error(`${program} ${args.join(" ")}: exit code ${code}`);
}

const cpus = spawnSync("taskset", ["-cp", String(process.pid)], {encoding: "utf8"}).stdout.trim().split(": ")[1];

// A child that answers a line with a line of JSON.
class Child {
  constructor(program, args, env = {}) {
    this.name = program;
    this.child = spawn("taskset", ["-c", cpus, program, ...args],
                       {stdio: ["pipe", "pipe", "inherit"], env: {...process.env, ...env}});
    this.lines = createInterface({input: this.child.stdout})[Symbol.asyncIterator]();
    this.ended = new Promise((resolve) => this.child.on("exit", resolve));
    this.child.on("error", () => {});
    this.child.stdin.on("error", () => {});
    children.push(this);
  }
  async next() {
    const {value, done} = await this.lines.next();
    if (done) throw new Error(`${this.name} ended`);
    return JSON.parse(value);
  }
  ask(line) {
    this.child.stdin.write(`${line}\n`);
    return this.next();
  }
  async stop() {
    this.child.stdin.end();
    this.child.kill("SIGTERM");
    await this.ended;
    children.splice(children.indexOf(this), 1);
  }
}
const children = [];
process.on("exit", () => { for (const {child} of children) child.kill("SIGTERM"); });
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(130));

// The shape that the figures of docs/performance.md are of.
const modelArgs = readFileSync(join(top, "bench/model.args"), "utf8").trim();
async function makeModel() {
  mkdirSync(options.directory, {recursive: true});
  const model = join(options.directory, "model");
  if (!existsSync(join(model, "config.json"))) {
    say(`making a random model: ${modelArgs}`);
    rmSync(model, {recursive: true, force: true});
    await must(options.elasticmoe, ["make-model", ...modelArgs.split(" "), model]);
  }
  return model;
}

const ggufOf = (format) => join(options.directory, `model-${ggufType[format]}.gguf`);
async function makeGguf(model, format) {
  if (existsSync(ggufOf(format))) return;
  say(`writing ${ggufOf(format)}`);
  await must(options.elasticmoe, ["export-gguf", model, ggufOf(format), "--type", ggufType[format]]);
}

const weightsFlags = (format) => (format === "bf16" ? [] : ["--weights", format]);
const huge = {GLIBC_TUNABLES: "glibc.malloc.hugetlb=1"};

// The rows without HTTP of one format.
async function measureEngines(model, format, rows) {
  say(`${format}: loading both`);
  const tokensEach = Math.max(prefillTokens, context + steps) + 1;
  const sequences = Math.max(...sequenceCounts);
  const peer = new Child(process.execPath, [join(here, "peer.mjs"), ggufOf(format), String(sequences),
                                            String(tokensEach)], huge);
  const ours = new Child(options.elasticmoe, [
    "bench", "decode", model, "--paced", "--sequences", String(sequences), "--paced-prefill",
    String(prefillTokens), "--steps", String(steps), "--context", String(context), ...weightsFlags(format),
    ...flags]);
  const [ready] = await Promise.all([peer.next(), ours.next()]);

  const askPeer = (kind, {prompts, generated}, most = Infinity, mostPrompt = Infinity) => peer.ask(JSON.stringify(
      kind === "prefill"
      ? {op: "prefill", prompt: prompts[0].slice(0, mostPrompt)}
      // Fed what ours was fed: what came after the prompt, but the last token.
      : {op: "decode", prompts, tokens: generated.map((tokens) => tokens.slice(0, Math.min(most, steps)))}));
  for (const [kind, count] of [["prefill", prefillTokens], ...sequenceCounts.map((n) => ["decode", n])]) {
    const name = `${kind}_${count}_${format}`;
    const question = `${kind} ${count}${options.quick ? " 1" : ""}`;  // the same prompts in all rounds, or others
    const warm = await ours.ask(question);
    const trial = [];
    // Where products compute, two threads are better than one; reading memory one may do as well.
    for (const threads of options.quick && (kind === "prefill" || count > 1) ? [2] : [2, 1]) {
      await peer.ask(JSON.stringify({op: "threads", count: threads}));
      trial.push({threads, seconds: (await askPeer(kind, warm, 3, 128)).seconds});
    }
    const threads = trial.sort((a, b) => a.seconds - b.seconds)[0].threads;
    await peer.ask(JSON.stringify({op: "threads", count: threads}));
    const times = {ours: [], peer: [], alone: []};
    let work = {};
    // Eight steps of one sequence are over so soon that more rounds cost little and are needed; prefills of 512
    // differ less than others.
    const turns = !options.quick ? rounds : kind === "prefill" ? rounds - 1 : count === 1 ? 3 * rounds : rounds;
    for (let round = 0; round < turns; ++round) {
      const mine = await ours.ask(question);
      times.ours.push(mine.seconds);
      times.alone.push(mine.forward_alone_seconds);
      work = {operations: mine.operations, bytes: mine.bytes};
      times.peer.push((await askPeer(kind, mine)).seconds);
    }
    const tokens = kind === "prefill" ? count : count * steps;
    const [mine, theirs] = [median(times.ours), median(times.peer)];
    const {machine} = await ours.ask("limits");
    const bandwidth = machine.read_gb_per_s * 1e9, peak = (machine.dot_gflop_per_s ?? Infinity) * 1e9;
    add(rows, {name, ours: tokens / mine, peer: tokens / theirs, ratio: theirs / mine,
               limit_fraction: Math.max(work.bytes / bandwidth, work.operations / peak) / mine,
               peer_threads: threads, forward_alone: tokens / median(times.alone)});
  }
  const {machine} = await ours.ask("limits");
  await Promise.all([ours.stop(), peer.stop()]);
  return {machine, release: ready.release};
}

// From nothing to the first token of a prompt of 16, the files in the page cache; node's own start is taken off.
async function measureStart(model, format, rows) {
  say(`${format}: starting`);
  const times = {ours: [], peer: []};
  for (let round = 0; round < Math.min(rounds, 3); ++round) {
    const ours = spawn(options.elasticmoe, ["bench", "load", model, "--no-cold", "--rounds", "1", "--json",
                                            ...weightsFlags(format), ...flags], {stdio: ["ignore", "pipe", "inherit"]});
    let text = "";
    ours.stdout.on("data", (part) => { text += part; });
    await once(ours, "close");
    times.ours.push(JSON.parse(text).rows[0].first_token_s);
    const begin = performance.now();
    const peer = new Child(process.execPath, [join(here, "peer.mjs"), ggufOf(format), "1", "256"], huge);
    const {own} = await peer.next();
    await peer.ask(JSON.stringify({op: "prefill", prompt: Array(16).fill(1)}));
    times.peer.push((performance.now() - begin) / 1e3 - own);
    await peer.stop();
  }
  const [mine, theirs] = [1e3 * median(times.ours), 1e3 * median(times.peer)];
  // Milliseconds: smaller is better, the ratio is still how many times better ours is.
  add(rows, {name: `start_ms_${format}`, ours: mine, peer: theirs, ratio: theirs / mine, limit_fraction: null,
             peer_threads: 2});
}

// 32 streams over HTTP by one load generator, each server idle while the other serves.
async function measureServed(model, format, rows) {
  say(`${format}: over HTTP`);
  const tokensEach = served.input + served.output;
  const peer = new Child(process.execPath, [
    join(here, "server.mjs"), ggufOf(format), String(served.concurrency), String(tokensEach), "2", "32768"
  ], huge);
  const {url: peerUrl} = await peer.next();
  const ours = spawn(options.elasticmoe, ["serve", model, "--port", "0", "--standby", "0", "--log-level", "info",
                                          ...weightsFlags(format), ...flags],
                     {stdio: ["ignore", "pipe", "pipe"]});
  children.push({child: ours});
  const url = await new Promise((resolve, reject) => {
    const look = (line) => { const found = /http:\/\/[\d.]+:\d+/.exec(line); if (found) resolve(found[0]); };
    createInterface({input: ours.stdout}).on("line", look);
    createInterface({input: ours.stderr}).on("line", look);
    ours.on("exit", () => reject(new Error("elasticmoe serve ended")));
  });
  const load = (target, seed) => new Promise((resolve, reject) => {
    const run = spawn(options.elasticmoe, [
      "bench", "serve", "--url", target, "--json", "--concurrency", String(served.concurrency), "--requests",
      String(served.requests), "--input-tokens", String(served.input), "--output-tokens", String(served.output),
      "--seed", String(seed)], {stdio: ["ignore", "pipe", "ignore"]});
    let text = "";
    run.stdout.on("data", (part) => { text += part; });
    run.on("close", () => {
      const report = text === "" ? {completed: 0} : JSON.parse(text);
      if (report.completed !== served.requests) reject(new Error(`${target}: ${report.completed} completed`));
      else resolve({rate: report.output_tokens_per_s, ttft: report.ttft_ms.p50});
    });
  });
  const loads = {ours: [], peer: []};
  const servedRounds = options.quick ? 1 : 2;
  for (let round = 0; round < servedRounds; ++round) {
    loads.ours.push(await load(url, round + 1));
    loads.peer.push(await load(peerUrl, round + 1));
  }
  const of = (name) => ["ours", "peer"].map((side) => median(loads[side].map((one) => one[name])));
  const [rate, peerRate] = of("rate"), [ttft, peerTtft] = of("ttft");
  add(rows, {name: `serve_${served.concurrency}_${format}`, ours: rate, peer: peerRate, ratio: rate / peerRate,
             limit_fraction: null, peer_threads: 2});
  // Median milliseconds to the first token: smaller is better, the ratio is still how many times better ours is.
  add(rows, {name: `serve_${served.concurrency}_ttft_ms_${format}`, ours: ttft, peer: peerTtft,
             ratio: peerTtft / ttft, limit_fraction: null, peer_threads: 2});
  const ended = new Promise((resolve) => ours.on("exit", resolve));
  ours.kill("SIGTERM");
  await Promise.all([ended, peer.stop()]);
  children.splice(0);
}

function line({name, ours, peer, ratio, limit_fraction: limit, peer_threads: threads}) {
  const percent = limit === null ? "-" : `${Math.round(limit * 100)} %`;
  return `  ${name.padEnd(24)}${ours.toFixed(1).padStart(10)}${peer.toFixed(1).padStart(10)}` +
         `${ratio.toFixed(2).padStart(8)}${percent.padStart(10)}${String(threads).padStart(9)}`;
}
function add(rows, row) {
  rows.push(row);
  say(line(row));
}

const model = await makeModel();
const rows = [];
let about = {};
const formats = options.formats.split(",");
for (const format of formats)
  if (!(format in ggufType)) throw new Error(`--formats: ${format} is none of ${Object.keys(ggufType).join(", ")}`);
await Promise.all(formats.map((format) => makeGguf(model, format)));
for (const format of formats) {
  if (!options.quick) await measureStart(model, format, rows);
  about = await measureEngines(model, format, rows);
  if (!options["no-serve"] && (!options.quick || format === "bf16")) await measureServed(model, format, rows);
}
const result = {bench: "peers", peer: `llama.cpp ${about.release} (node-llama-cpp 3.22.1, server: server.mjs)`,
                model: `random: ${modelArgs}`, rounds, steps, context, served,
                machine: about.machine, rows};
if (options.json) {
  console.log(JSON.stringify(result, null, 2));
} else {
  console.log(`\n${result.model}\n${result.peer}, the better of 1 and 2 threads; medians of ${rounds} rounds\n`);
  console.log("  tokens/s                    ElasticMoE  llama.cpp  ratio  of limit  its threads");
  for (const row of rows) console.log(line(row));
}
process.exit(0);
