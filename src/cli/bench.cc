// elasticmoe bench: the family of measuring commands.
#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace elasticmoe::cli {

void RegisterBench(CLI::App& app, Action& action) {
  CLI::App* bench = app.add_subcommand("bench", "Measure a server");
  bench->require_subcommand(1);
  RegisterBenchServe(*bench, action);
  RegisterBenchResize(*bench, action);
  RegisterBenchAutoscale(*bench, action);
}

}  // namespace elasticmoe::cli
