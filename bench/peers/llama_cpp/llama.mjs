// llama.cpp through node-llama-cpp's native binding, one layer below the library's own batching queue: a step
// is one llama_decode of a batch that we make, so that what is timed is llama.cpp and no JavaScript but a few
// calls. (The library's LlamaModel refuses a model without a tokenizer, too.) The classes used are internal to
// node-llama-cpp: package.json pins its version.
import {getLlama} from "node-llama-cpp";

// Weights are read into memory of llama.cpp's own (no mmap), where GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives
// it transparent huge pages. Flash attention is llama.cpp's default; it was faster here or the same.
export async function open(path, {sequences, tokensEach, batchSize = 512}) {
  const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
  const {AddonModel, AddonContext, AddonSampler} = llama._bindings;
  const model = new AddonModel(path, {addonExports: llama._bindings, gpuLayers: 0, useMmap: false});
  if (!await model.init()) throw new Error(`${path}: llama.cpp cannot load it`);
  const context = new AddonContext(model, {
    contextSize: Math.ceil(sequences * tokensEach / 256) * 256, sequences, batchSize, threads: 2,
    flashAttention: true
  });
  if (!await context.init()) throw new Error(`${path}: llama.cpp makes no context`);
  const sampler = new AddonSampler(model);
  sampler.applyConfig({temperature: 0});

  return {
    batchSize,
    release: llama.llamaCppRelease.release,
    system: llama.systemInfo,
    setThreads(count) {
      context.setThreads(count);
      return context.getThreads();
    },
    // rows: [{sequence, position, tokens, logits}], the next tokens of a sequence each; `logits: false` where
    // the last token's are not wanted. Returns what sample() takes, a row each.
    async step(rows) {
      context.initBatch(rows.reduce((sum, row) => sum + row.tokens.length, 0));
      const indexes = rows.map(({sequence, position, tokens, logits = true}) => context.addToBatch(
          sequence, position, Uint32Array.from(tokens), Uint32Array.from(logits ? [tokens.length - 1] : []))[0]);
      await context.decodeBatch();
      return indexes;
    },
    sample: (index) => context.sampleToken(index, sampler),  // greedy
    // Its tokens from position `begin` on, up to `end`.
    truncate(sequence, begin, end) {
      if (!context.removeTokenCellsFromSequence(sequence, begin, end))
        throw new Error(`llama.cpp cannot shorten sequence ${sequence} to ${begin} tokens`);
    },
    forget: (sequence) => context.disposeSequence(sequence)
  };
}
