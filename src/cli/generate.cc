// elasticmoe generate: one prompt, no server; the same engine and devices.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>

#include "base/log.h"
#include "cli/command.h"
#include "cli/engine_flags.h"
#include "model/tokenizer.h"

namespace elasticmoe::cli {
namespace {

struct Options {
  EngineFlags engine;
  std::string prompt;
  std::vector<TokenId> prompt_ids;
  core::SamplingParams sampling;
  int max_tokens = 128;
  bool ignore_eos = false;
};

int Run(const Options& options) {
  InitLog("generate", "warn");
  auto engine = StartEngine(options.engine, fmt::format("generate-{}", ::getpid()));
  if (!engine) {
    std::fprintf(stderr, "elasticmoe: %s\n", engine.error().message.c_str());
    return 1;
  }
  auto tokenizer = model::Tokenizer::Open(options.engine.options.model);
  if (!tokenizer) {
    std::fprintf(stderr, "elasticmoe: %s\n", tokenizer.error().message.c_str());
    return 1;
  }
  core::GenerationRequest request;
  request.id = RequestId(1);
  request.prompt = options.prompt_ids;
  if (request.prompt.empty()) {
    if (!*tokenizer) {
      std::fprintf(stderr,
                   "elasticmoe: the model has no tokenizer.json; give --prompt-ids instead of --prompt\n");
      return 1;
    }
    request.prompt = (*tokenizer)->Encode(options.prompt, true);
  }
  request.sampling = options.sampling;
  request.max_tokens = options.max_tokens;
  request.ignore_eos = options.ignore_eos;

  std::mutex mutex;
  std::condition_variable changed;
  bool finished = false;
  int exit_code = 0;
  std::unique_ptr<model::StreamDecoder> decoder;
  if (*tokenizer) decoder = std::make_unique<model::StreamDecoder>(**tokenizer, true);
  const Status submitted = (*engine)->Submit(std::move(request), [&](const core::TokenEvent& event) {
    for (const TokenId token : event.tokens) {
      const std::string text = decoder ? decoder->Add(token) : fmt::format("{} ", token);
      std::fwrite(text.data(), 1, text.size(), stdout);
    }
    std::fflush(stdout);
    if (!event.finish) return;
    if (decoder) std::fputs(decoder->Finish().c_str(), stdout);
    std::fputc('\n', stdout);
    if (*event.finish == core::FinishReason::kError) {
      std::fprintf(stderr, "elasticmoe: %s\n", event.error.c_str());
      exit_code = 1;
    }
    const std::scoped_lock lock(mutex);
    finished = true;
    changed.notify_one();
  });
  if (!submitted) {
    std::fprintf(stderr, "elasticmoe: %s\n", submitted.error().message.c_str());
    return 1;
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return finished; });
  return exit_code;
}

}  // namespace

void RegisterGenerate(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("generate", "Continue one prompt, without a server");
  sub->footer(
      "Example:\n  elasticmoe generate models/demo --prompt 'It is a truth universally acknowledged' "
      "--max-tokens 60");
  AddEngineFlags(*sub, options->engine);
  auto* prompt = sub->add_option("--prompt", options->prompt, "Text to continue");
  sub->add_option("--prompt-ids", options->prompt_ids, "Token ids instead, separated by commas")
      ->delimiter(',')
      ->excludes(prompt);
  sub->add_option("--max-tokens", options->max_tokens, "Tokens to generate")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  options->sampling.temperature = 0;
  sub->add_option("--temperature", options->sampling.temperature, "0 = greedy")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--top-k", options->sampling.top_k, "0 = off")->check(CLI::NonNegativeNumber);
  sub->add_option("--top-p", options->sampling.top_p)->check(CLI::Range(0.0, 1.0));
  sub->add_option("--min-p", options->sampling.min_p)->check(CLI::Range(0.0, 1.0));
  sub->add_option("--seed", options->sampling.seed);
  sub->add_flag("--ignore-eos", options->ignore_eos, "Go on after the end-of-sequence token");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
