// elasticmoe inspect and make-model: a model directory read, or made.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "cli/command.h"
#include "model/inspect.h"
#include "model/make_model.h"

namespace elasticmoe::cli {
namespace {

int Report(const Error& error) {
  std::fprintf(stderr, "elasticmoe: %s\n", error.message.c_str());
  return 1;
}

int Inspect(const std::string& directory, bool json) {
  const auto checkpoint = model::Checkpoint::Open(directory);
  if (checkpoint) {
    const Json report = model::InspectModel(*checkpoint);
    std::printf("%s", json ? (report.dump(2) + "\n").c_str() : model::DescribeModel(report).c_str());
  }
  const Status servable = model::CheckServable(directory);
  return servable ? 0 : Report(servable.error());
}

int Make(model::MakeModelOptions options, const std::string& parameters) {
  const auto count = model::ParseParameterCount(parameters);
  if (!count) return Report(count.error());
  options.parameters = *count;
  if (isatty(STDERR_FILENO) != 0)
    options.progress = [](std::uint64_t done, std::uint64_t total) {
      std::fprintf(stderr, "\rwriting %3d %%",
                   static_cast<int>(done * 100 / std::max<std::uint64_t>(total, 1)));
    };
  const auto made = model::MakeModel(options);
  if (isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r\033[K");
  if (!made) return Report(made.error());
  std::printf("%s: %.3f B parameters, %.1f MiB in %zu file(s)\n", options.directory.c_str(),
              static_cast<double>(made->parameters) / 1e9, static_cast<double>(made->bytes) / (1 << 20),
              made->files.size());
  return 0;
}

}  // namespace

void RegisterInspect(CLI::App& app, Action& action) {
  auto directory = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false);
  CLI::App* sub = app.add_subcommand("inspect", "Show what a model directory or .gguf file holds");
  sub->footer("Example:\n  elasticmoe inspect models/demo --json");
  sub->add_option("model", *directory, "Hugging Face model directory or .gguf file")->required();
  sub->add_flag("--json", *json, "As JSON");
  sub->callback([&action, directory, json] { action = [=] { return Inspect(*directory, *json); }; });
}

void RegisterMakeModel(CLI::App& app, Action& action) {
  auto options = std::make_shared<model::MakeModelOptions>();
  auto parameters = std::make_shared<std::string>("300M");
  CLI::App* sub = app.add_subcommand("make-model", "Write a random model of a stated shape, for benchmarks");
  sub->footer("Example:\n  elasticmoe make-model --shape qwen3-moe --params 1.4B /tmp/made");
  sub->add_option("out", options->directory, "Directory to make")->required();
  sub->add_option("--shape", options->shape, "qwen3-moe or mixtral")->capture_default_str();
  sub->add_option("--params", *parameters, "Parameters, e.g. 300M or 1.4B")->capture_default_str();
  sub->add_option("--hidden", options->hidden, "Hidden size (default: chosen for --params)");
  sub->add_option("--layers", options->layers, "Layers");
  sub->add_option("--experts", options->experts, "Experts a layer");
  sub->add_option("--top-k", options->top_k, "Experts a token");
  sub->add_option("--vocab", options->vocab, "Vocabulary");
  sub->add_option("--heads", options->heads, "Attention heads");
  sub->add_option("--kv-heads", options->kv_heads, "Heads of keys and values");
  sub->add_option("--head-dim", options->head_dim, "Width of a head");
  sub->add_option("--tied-head", options->tied_head,
                  "Embedding and head share their weights (true or false)");
  sub->add_option("--seed", options->seed, "The same seed gives the same bytes")->capture_default_str();
  sub->add_option("--shard-bytes", options->shard_bytes, "Largest file")->transform(CLI::AsSizeValue(false));
  sub->callback([&action, options, parameters] { action = [=] { return Make(*options, *parameters); }; });
}

}  // namespace elasticmoe::cli
