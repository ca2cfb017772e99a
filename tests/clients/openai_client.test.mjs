// The real openai client against a running server. Checks shapes, not words: any model will do.
//   ELASTICMOE_URL      base address, e.g. http://127.0.0.1:8000 (needed)
//   ELASTICMOE_MODEL    model name (default: the first that is served)
//   ELASTICMOE_API_KEY  where the server asks for one
import assert from 'node:assert/strict';
import test, {before} from 'node:test';
import OpenAI from 'openai';

const base = process.env.ELASTICMOE_URL;
assert.ok(base, 'set ELASTICMOE_URL');
const apiKey = process.env.ELASTICMOE_API_KEY ?? 'none';
const client = new OpenAI({baseURL: `${base}/v1`, apiKey, maxRetries: 0, timeout: 60_000});
const messages = [{role: 'system', content: 'Be brief.'}, {role: 'user', content: 'Tell me a story.'}];
let model = process.env.ELASTICMOE_MODEL;

before(async () => {
  model ??= (await client.models.list()).data[0].id;
});

function checkUsage(usage, completionTokens) {
  assert.ok(usage.prompt_tokens > 0);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  assert.equal(typeof usage.prompt_tokens_details.cached_tokens, 'number');
  if (completionTokens !== undefined) assert.equal(usage.completion_tokens, completionTokens);
}

test('lists models and finds one', async () => {
  const {data} = await client.models.list();
  assert.ok(data.some((m) => m.id === model && m.object === 'model'));
  assert.equal((await client.models.retrieve(model)).id, model);
});

test('answers a chat', async () => {
  const chat = await client.chat.completions.create({model, messages, max_completion_tokens: 8, temperature: 0});
  assert.match(chat.id, /^chatcmpl-/);
  assert.equal(chat.choices[0].message.role, 'assistant');
  assert.equal(typeof chat.choices[0].message.content, 'string');
  assert.ok(['stop', 'length'].includes(chat.choices[0].finish_reason));
  checkUsage(chat.usage);
});

test('says the same twice for one seed, streamed or not', async () => {
  const request = {model, messages, max_tokens: 12, temperature: 1, seed: 7};
  const first = await client.chat.completions.create(request);
  const second = await client.chat.completions.create(request);
  assert.equal(second.choices[0].message.content, first.choices[0].message.content);
  let text = '';
  for await (const chunk of await client.chat.completions.create({...request, stream: true}))
    text += chunk.choices[0]?.delta?.content ?? '';
  assert.equal(text, first.choices[0].message.content);
});

test('streams a chat with usage', async () => {
  const stream = await client.chat.completions.create(
      {model, messages, max_tokens: 8, ignore_eos: true, stream: true, stream_options: {include_usage: true}});
  let role, usage, finish;
  for await (const chunk of stream) {
    assert.equal(chunk.object, 'chat.completion.chunk');
    role ??= chunk.choices[0]?.delta?.role;
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  assert.equal(role, 'assistant');
  assert.equal(finish, 'length');
  checkUsage(usage, 8);
});

test('the stream helper gathers the whole message', async () => {
  const final = await client.chat.completions.stream({model, messages, max_tokens: 6}).finalChatCompletion();
  assert.equal(final.choices[0].message.role, 'assistant');
});

test('gives several choices and logprobs', async () => {
  const chat = await client.chat.completions.create(
      {model, messages, n: 3, max_tokens: 4, ignore_eos: true, logprobs: true, top_logprobs: 2});
  assert.deepEqual(chat.choices.map((c) => c.index), [0, 1, 2]);
  for (const choice of chat.choices) {
    assert.equal(choice.logprobs.content.length, 4);
    for (const token of choice.logprobs.content) {
      assert.ok(token.logprob <= 0);
      assert.equal(token.top_logprobs.length, 2);
      assert.ok(Array.isArray(token.bytes));
    }
  }
});

test('completes text, several prompts, token ids', async () => {
  const one = await client.completions.create({model, prompt: 'In the beginning', max_tokens: 5, ignore_eos: true});
  assert.equal(one.object, 'text_completion');
  checkUsage(one.usage, 5);
  const two = await client.completions.create({model, prompt: ['a', 'b'], max_tokens: 2, n: 2});
  assert.equal(two.choices.length, 4);
  const ids = await client.completions.create(
      {model, prompt: [10, 11, 12], max_tokens: 3, ignore_eos: true, temperature: 0, logprobs: 5, return_token_ids: true});
  assert.equal(ids.usage.prompt_tokens, 3);
  assert.equal(ids.choices[0].token_ids.length, 3);
  assert.equal(ids.choices[0].logprobs.tokens.length, 3);
  assert.ok(Object.keys(ids.choices[0].logprobs.top_logprobs[0]).length >= 5);
});

test('scores a prompt', async () => {
  const scored = await client.completions.create({model, prompt: 'In the beginning', echo: true, logprobs: 1, max_tokens: 0});
  assert.equal(scored.choices[0].text, 'In the beginning');
  assert.equal(scored.choices[0].logprobs.token_logprobs[0], null);
  assert.ok(scored.choices[0].logprobs.token_logprobs.slice(1).every((p) => p <= 0));
});

test('stops at a stop string', async () => {
  const request = {model, prompt: 'x', max_tokens: 40, temperature: 0, ignore_eos: true};
  const whole = (await client.completions.create(request)).choices[0].text;
  const stop = whole.slice(2, 4);
  const cut = (await client.completions.create({...request, stop: [stop]})).choices[0];
  assert.equal(cut.finish_reason, 'stop');
  assert.equal(cut.text, whole.slice(0, whole.indexOf(stop)));
});

test('streams a completion', async () => {
  let text = '', finish;
  for await (const chunk of await client.completions.create({model, prompt: 'a', max_tokens: 4, stream: true})) {
    text += chunk.choices[0]?.text ?? '';
    finish = chunk.choices[0]?.finish_reason ?? finish;
  }
  assert.equal(typeof text, 'string');
  assert.ok(['stop', 'length'].includes(finish));
});

test('errors have the class and the field that the client expects', async () => {
  const create = (fields) => client.chat.completions.create({model, messages, max_tokens: 2, ...fields});
  await assert.rejects(create({temperature: -1}), (e) => e instanceof OpenAI.BadRequestError && e.param === 'temperature');
  await assert.rejects(create({messages: []}), (e) => e instanceof OpenAI.BadRequestError && e.param === 'messages');
  await assert.rejects(create({response_format: {type: 'json_object'}}), (e) => e.status === 400 && e.param === 'response_format');
  await assert.rejects(create({model: 'no-such-model'}), (e) => e instanceof OpenAI.NotFoundError && e.code === 'model_not_found');
  await assert.rejects(client.models.retrieve('no/such/model'), OpenAI.NotFoundError);
  await assert.rejects(client.completions.create({model, prompt: 'word '.repeat(200_000), max_tokens: 1}),
                       (e) => e instanceof OpenAI.BadRequestError && e.param === 'prompt' && /context/.test(e.message));
});

test('a wrong key is a 401 where keys are asked for', {skip: !process.env.ELASTICMOE_API_KEY}, async () => {
  const stranger = new OpenAI({baseURL: `${base}/v1`, apiKey: 'wrong', maxRetries: 0});
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test('an aborted stream frees its place', async () => {
  const stream = await client.chat.completions.create({model, messages, max_tokens: 500, ignore_eos: true, stream: true});
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) break;  // leaves the loop: the client hangs up
  }
  const controller = new AbortController();
  const pending = client.chat.completions.create({model, messages, max_tokens: 500, ignore_eos: true}, {signal: controller.signal});
  controller.abort();
  await assert.rejects(pending, OpenAI.APIUserAbortError);
  for (let load = 1; load > 0;) load = (await (await fetch(`${base}/load`)).json()).server_load;
});

test('shows a request id', async () => {
  const {response} = await client.chat.completions.create({model, messages, max_tokens: 1}).withResponse();
  assert.ok(response.headers.get('x-request-id'));
});
