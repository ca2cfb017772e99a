// Makes tests/data/tokenizers/made.json: small tokenizers, each for one path through the loader and encoder that the
// bundled tokenizer does not take, with what the Rust library (npm @anush008/tokenizers) makes of tricky texts.
//
//   npm install --ignore-scripts --no-save @anush008/tokenizers@0.6.0
//   node tools/make_tokenizer_fixtures.mjs tests/data/tokenizers/made.json
import fs from 'fs';
import os from 'os';
import path from 'path';
import { createRequire } from 'module';
const { Tokenizer } = createRequire(process.cwd() + '/')('@anush008/tokenizers');

// The byte alphabet of byte-level BPE.
const alphabet = [];
for (let b = 0, next = 256; b < 256; b++)
  alphabet.push(String.fromCodePoint((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174 ? b : next++));
const toBytes = (text) => [...Buffer.from(text)].map((b) => alphabet[b]).join('');

// A vocabulary of `base` and of the merges that build each of `words` from the left.
function bpe(base, words, extra = {}) {
  const vocab = {}, merges = [];
  const add = (token) => { if (!(token in vocab)) vocab[token] = Object.keys(vocab).length; };
  base.forEach(add);
  for (const word of words) {
    const chars = [...word];
    for (let i = 1; i < chars.length; i++) {
      const left = chars.slice(0, i).join('');
      if (merges.some((m) => m[0] === left && m[1] === chars[i])) continue;
      add(chars[i]), add(left), add(left + chars[i]);
      merges.push([left, chars[i]]);
    }
  }
  return { type: 'BPE', vocab, merges, ...extra };
}
const words = ['hello', ' hello', ' world', 'the', ' the', '123', '  ', '    ', 'ing', 'é', '中', '文', '\n\n', "'s"];
const byteLevel = (extra) => bpe(alphabet, words.map(toBytes), extra);
const added = (model, tokens) =>
  tokens.map((t, i) => ({ id: Object.keys(model.vocab).length + i, single_word: false, lstrip: false, rstrip: false,
                          normalized: false, special: false, ...t }));
const split = (pattern, behavior = 'Isolated', invert = false) =>
  ({ type: 'Split', pattern: typeof pattern === 'string' ? { Regex: pattern } : pattern, behavior, invert });
const byteLevelStep = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false };
const sequence = (...pretokenizers) => ({ type: 'Sequence', pretokenizers });
const file = (model, rest) => ({
  version: '1.0', truncation: null, padding: null, added_tokens: [], normalizer: null, pre_tokenizer: null,
  post_processor: null, decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
  ...rest, model,
});

const llama3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const o200k = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const deepseek = [
  split('\\p{N}{1,3}'), split('[一-龥぀-ゟ゠-ヿ]+'),
  split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
];
const bytes = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`);
const sentencePiece = (base, extra) =>
  bpe(base, ['▁hello', '▁world', '▁the', 'ing', '▁▁', '▁▁▁▁', '中文', 'né'], { unk_token: '<unk>', fuse_unk: true, ...extra });
const llamaDecoder = { type: 'Sequence', decoders: [
  { type: 'Replace', pattern: { String: '▁' }, content: ' ' }, { type: 'ByteFallback' }, { type: 'Fuse' },
  { type: 'Strip', content: ' ', start: 1, stop: 0 }] };
const template = (token, id) => ({
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: token, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { [token]: { id: token, ids: [id], tokens: [token] } },
});
const llamaSpecials = (model) => ['<unk>', '<s>', '</s>'].map((content, id) => (
  { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }));

const made = {};
{
  const model = sentencePiece(['<unk>', '<s>', '</s>', ...bytes, ...'abcdefghiklmnoprstuwé ▁'], { byte_fallback: true });
  const rest = { added_tokens: llamaSpecials(model), post_processor: template('<s>', 1), decoder: llamaDecoder };
  made.llama2 = file(model, { ...rest, normalizer: { type: 'Sequence', normalizers: [
    { type: 'Prepend', prepend: '▁' }, { type: 'Replace', pattern: { String: ' ' }, content: '▁' }] } });
  for (const scheme of ['first', 'always', 'never'])
    made[`metaspace_${scheme}`] = file(model, { ...rest,
      pre_tokenizer: { type: 'Metaspace', replacement: '▁', prepend_scheme: scheme, split: scheme === 'always' },
      decoder: scheme === 'first' ? llamaDecoder
        : { type: 'Metaspace', replacement: '▁', prepend_scheme: scheme, split: scheme === 'always' } });
  const holes = bytes.filter((b) => !b.startsWith('<0xE') && !b.startsWith('<0xF'));
  for (const fuse of [true, false]) {
    const some = sentencePiece(['<unk>', '<s>', '</s>', ...holes, ...'abcdehlnortw▁'], { byte_fallback: true, fuse_unk: fuse });
    made[`unknown_${fuse ? 'fused' : 'single'}`] = file(some, { ...rest, decoder: null,
      normalizer: { type: 'Replace', pattern: { Regex: '\\s+' }, content: '▁' } });
  }
}
{
  const model = byteLevel({ ignore_merges: true });
  model.vocab[toBytes('unreachable')] = Object.keys(model.vocab).length;
  model.vocab[toBytes(' thé')] = Object.keys(model.vocab).length;
  made.ignore_merges = file(model, { pre_tokenizer: sequence(split(llama3), byteLevelStep),
    added_tokens: added(model, [{ content: '<|begin|>', special: true }]), post_processor: template('<|begin|>', Object.keys(model.vocab).length) });
}
{
  const model = byteLevel();
  made.o200k_removed_inverted = file(model, { pre_tokenizer: sequence(split(o200k, 'Removed', true), byteLevelStep) });
  made.gpt2 = file(model, { pre_tokenizer: { ...byteLevelStep, add_prefix_space: true, use_regex: true } });
  made.repeated_merge = file({ ...model, merges: [[toBytes(' '), 't'], ['h', 'e'], ...model.merges, ['h', 'e']] },
    { pre_tokenizer: byteLevelStep });
  made.old_merges = file({ ...model, merges: model.merges.map((m) => m.join(' ')) }, { pre_tokenizer: byteLevelStep });
  made.normalized_added = file(model, {
    normalizer: { type: 'Sequence', normalizers: [{ type: 'NFC' }, { type: 'Replace', pattern: { String: 'X' }, content: 'é' }] },
    pre_tokenizer: sequence(...deepseek, byteLevelStep),
    added_tokens: added(model, [
      { content: '<|end|>', special: true }, { content: '<caf\u00e9>', normalized: true },
      { content: '<e\u0301nd>', normalized: true, special: true }, { content: '<raw\u00e9>' },
      { content: '<a>' }, { content: '<a><a>' }, { content: '<a><a><b>' }]) });
  made.stripping_added = file(model, { pre_tokenizer: sequence(split(llama3), byteLevelStep),
    added_tokens: added(model, [{ content: '<mask>', lstrip: true, special: true }, { content: '<r>', rstrip: true },
                                { content: '<both>', lstrip: true, rstrip: true }, { content: 'the', single_word: true }]) });
  for (const behavior of ['Isolated', 'Removed', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous'])
    for (const invert of [false, true])
      made[`split_${behavior}${invert ? '_inverted' : ''}`] = file(model, { pre_tokenizer: sequence(
        split('[ e\\d]', behavior, invert), split({ String: 'l' }, behavior, invert), byteLevelStep) });
  made.empty_matches = file(model, { pre_tokenizer: sequence(split('(?=[A-Z])|x*', 'Isolated'), byteLevelStep) });
  for (const individual_digits of [false, true])
    made[`digits_${individual_digits}`] = file(model, { pre_tokenizer: sequence({ type: 'Digits', individual_digits }, byteLevelStep) });
  for (const form of ['NFC', 'NFD', 'NFKC', 'NFKD'])
    made[form.toLowerCase()] = file(model, { normalizer: { type: form }, pre_tokenizer: byteLevelStep });
  made.word_classes = file(model, { pre_tokenizer: sequence(split('\\w+|[^\\w\\s]+', 'Removed', true), split('[^\\S\\n]|\\d'), byteLevelStep),
    normalizer: { type: 'Strip', strip_left: true, strip_right: true } });
}

const texts = [
  '', ' ', 'hello', 'hello world', ' hello  world ', "  the    hello's THE'S the", 'unreachable unreachables thé the\u0301',
  'caf\u00e9 cafe\u0301 <caf\u00e9><cafe\u0301> <e\u0301nd><\u00e9nd> <cafX> <rawX> <rawe\u0301><raw\u00e9>X', '<a><a><a><b><a><a><b>', '<|end|>hello<|end|> <|begin|>',
  'hello <mask> world \n<mask>the <r>  the<r>\n<both>  <both>  the', 'the thes other the_the the.the thé', '<s>hello</s> <unk> hello<s> world',
  '12 123 1234 12345678 ٣٤٥ Ⅷ ½²', 'HelloWorld XMLHttpRequest helloWORLD xxhexx', '中文 中文字 日本語カタカナ한국어', 'né né caf\u00e9 ñandú 😀👩‍👧 \u{1F1E9}\u{1F1EA}',
  '\n\n\n \r\n\t\u00a0\u2003\u3000\u180e\u2028 x', '\u0000\u0001\u007f\u0085\u200b\ufeff', '▁hello ▁▁ world▁', '<0x0A> <0xE4> \u0120hello', 'Ⓐ_ⓩ ٣ ‿ e\u0301\u0328 ﬁ Å \u1112\u1161\u11ab',
  'lelle l el 1e2 3 e4', '"quoted" (paren) [x]=>{y};// http://a.b/c?d=e&f', 'ing  ing    ing     ing',
];
const out = [];
const scratch = path.join(os.tmpdir(), `tokenizer_fixture_${process.pid}.json`);
for (const [name, tokenizer] of Object.entries(made)) {
  fs.writeFileSync(scratch, JSON.stringify(tokenizer));
  const rust = Tokenizer.fromFile(scratch);
  const cases = [];
  for (const text of texts) {
    const ids = Array.from((await rust.encode(text, null, { addSpecialTokens: false })).getIds());
    const ids_special = Array.from((await rust.encode(text, null, { addSpecialTokens: true })).getIds());
    const one = { text, ids };
    if (ids_special.length !== ids.length) one.ids_special = ids_special;
    one.decoded = await rust.decode(ids, false);
    const skipped = await rust.decode(ids, true);
    if (skipped !== one.decoded) one.decoded_skip_special = skipped;
    cases.push(one);
  }
  out.push({ name, tokenizer, cases });
}
fs.rmSync(scratch);
const line = (value) => JSON.stringify(value);
fs.writeFileSync(process.argv[2], '[' + out.map((f) =>
  `{"name": ${line(f.name)}, "tokenizer": ${line(f.tokenizer)}, "cases": [\n${f.cases.map(line).join(',\n')}\n]}`).join(',\n') + ']\n');
