// The ai SDK with its OpenAI-compatible provider against a running server (settings: see openai_client.test.mjs).
import assert from 'node:assert/strict';
import test, {before} from 'node:test';
import {createOpenAICompatible} from '@ai-sdk/openai-compatible';
import {generateText, jsonSchema, streamText, tool} from 'ai';

const base = process.env.ELASTICMOE_URL;
assert.ok(base, 'set ELASTICMOE_URL');
const apiKey = process.env.ELASTICMOE_API_KEY ?? 'none';
const provider = createOpenAICompatible({name: 'elasticmoe', baseURL: `${base}/v1`, apiKey, includeUsage: true});
const prompt = 'Tell me a story.';
let name = process.env.ELASTICMOE_MODEL;

before(async () => {
  const models = await (await fetch(`${base}/v1/models`, {headers: {authorization: `Bearer ${apiKey}`}})).json();
  name ??= models.data[0].id;
});

test('generateText', async () => {
  const result = await generateText({model: provider(name), prompt, maxOutputTokens: 6, temperature: 0, maxRetries: 0});
  assert.equal(typeof result.text, 'string');
  assert.ok(['stop', 'length'].includes(result.finishReason));
  assert.ok(result.usage.inputTokens > 0);
});

test('streamText gives the same text in pieces', async () => {
  const settings = {model: provider(name), prompt, maxOutputTokens: 10, temperature: 0, maxRetries: 0};
  const whole = await generateText(settings);
  const stream = streamText(settings);
  let text = '';
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test('tools are passed on', async () => {
  const tools = {weather: tool({description: 'Weather of a city', inputSchema: jsonSchema({type: 'object', properties: {city: {type: 'string'}}})})};
  const result = await generateText({model: provider(name), prompt, tools, maxOutputTokens: 6, maxRetries: 0});
  assert.ok(['stop', 'length', 'tool-calls'].includes(result.finishReason));
});

test('errors carry status and message', async () => {
  await assert.rejects(generateText({model: provider('no-such-model'), prompt, maxRetries: 0}),
                       (e) => e.statusCode === 404 && /no-such-model/.test(e.message));
});
