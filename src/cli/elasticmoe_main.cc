// The one program: every process of ElasticMoE is it, with another subcommand.
#include <CLI/CLI.hpp>

#include "base/log.h"
#include "cli/command.h"
#include "runtime/process.h"

int main(int argc, char** argv) {
  using namespace elasticmoe;
  runtime::TuneProcess();
  CLI::App app("ElasticMoE: serve Mixture-of-Experts models that change their size while they serve");
  app.set_version_flag("--version", ELASTICMOE_VERSION);
  app.require_subcommand(1);
  app.footer(
      "Examples:\n"
      "  elasticmoe serve models/demo --devices 2          an OpenAI server at http://127.0.0.1:8000\n"
      "  elasticmoe chat                                   talk to it\n"
      "  elasticmoe bench serve --url http://127.0.0.1:8000 --concurrency 32 --requests 256\n"
      "\n'elasticmoe SUBCOMMAND --help' says more.");
  cli::Action action;
  cli::RegisterServe(app, action);
  cli::RegisterScale(app, action);
  cli::RegisterStatus(app, action);
  cli::RegisterChat(app, action);
  cli::RegisterGenerate(app, action);
  cli::RegisterInspect(app, action);
  cli::RegisterMakeModel(app, action);
  cli::RegisterExportGguf(app, action);
  cli::RegisterBench(app, action);
  cli::RegisterSimulate(app, action);
  cli::RegisterCalibrate(app, action);
  cli::RegisterProcesses(app, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    constexpr int kWrongCommandLine = 2;
    return app.exit(error) == 0 ? 0 : kWrongCommandLine;  // 0: --help
  }
  return action();
}
