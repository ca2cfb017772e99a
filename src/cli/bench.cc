// elasticmoe bench: the family of measuring commands.
#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace elasticmoe::cli {

void RegisterBench(CLI::App& app, Action& action) {
  CLI::App* bench = app.add_subcommand("bench", "Measure this machine, an engine, a server or a resize");
  bench->require_subcommand(1);
  RegisterBenchKernels(*bench, action);
  RegisterBenchPrefill(*bench, action);
  RegisterBenchDecode(*bench, action);
  RegisterBenchLoad(*bench, action);
  RegisterBenchServe(*bench, action);
  RegisterBenchResize(*bench, action);
  RegisterBenchSimulator(*bench, action);
}

}  // namespace elasticmoe::cli
