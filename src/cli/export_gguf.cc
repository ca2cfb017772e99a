// elasticmoe export-gguf: a model directory written as one GGUF file.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "cli/command.h"
#include "model/gguf/export.h"

namespace elasticmoe::cli {
namespace {

int Export(model::ExportGgufOptions options) {
  const bool draws = isatty(STDERR_FILENO) != 0;
  if (draws)
    options.progress = [](std::uint64_t done, std::uint64_t total) {
      std::fprintf(stderr, "\rwriting %3d %%",
                   static_cast<int>(done * 100 / std::max<std::uint64_t>(total, 1)));
    };
  const auto written = model::ExportGguf(options);
  if (draws) std::fprintf(stderr, "\r\033[K");
  if (!written) {
    std::fprintf(stderr, "elasticmoe: %s\n", written.error().message.c_str());
    return 1;
  }
  std::printf("%s: %zu tensors, %.1f MiB\n", options.out.c_str(), written->tensors,
              static_cast<double>(written->bytes) / (1 << 20));
  return 0;
}

}  // namespace

void RegisterExportGguf(CLI::App& app, Action& action) {
  auto options = std::make_shared<model::ExportGgufOptions>();
  CLI::App* sub = app.add_subcommand("export-gguf", "Write a model directory as one GGUF file");
  sub->footer("Example:\n  elasticmoe export-gguf models/demo /tmp/demo.gguf --type q8_0");
  sub->add_option("model", options->directory, "Hugging Face model directory")->required();
  sub->add_option("out", options->out, "File to write")->required();
  sub->add_option("--type", options->encoding, "Of matrices: bf16, f16, f32, q8_0 or q4_0")
      ->transform(
          CLI::CheckedTransformer(std::map<std::string, model::Encoding>{{"bf16", model::Encoding::kBf16},
                                                                         {"f16", model::Encoding::kF16},
                                                                         {"f32", model::Encoding::kF32},
                                                                         {"q8_0", model::Encoding::kQ8_0},
                                                                         {"q4_0", model::Encoding::kQ4_0}},
                                  CLI::ignore_case))
      ->default_str("bf16");
  sub->callback([&action, options] { action = [options] { return Export(*options); }; });
}

}  // namespace elasticmoe::cli
