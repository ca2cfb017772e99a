// How subcommands plug into the program: each registers its options on a CLI::App and leaves an action, which
// runs after parsing and gives the process's exit code.
#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace elasticmoe::cli {

using Action = std::function<int()>;

// Each adds one subcommand to `app`; `action` is set if it is chosen.
void RegisterServe(CLI::App& app, Action& action);
void RegisterGenerate(CLI::App& app, Action& action);
void RegisterChat(CLI::App& app, Action& action);
void RegisterStatus(CLI::App& app, Action& action);
void RegisterScale(CLI::App& app, Action& action);
void RegisterInspect(CLI::App& app, Action& action);
void RegisterMakeModel(CLI::App& app, Action& action);
void RegisterExportGguf(CLI::App& app, Action& action);
void RegisterBench(CLI::App& app, Action& action);
void RegisterBenchServe(CLI::App& bench, Action& action);  // below bench
void RegisterBenchResize(CLI::App& bench, Action& action);
void RegisterBenchLoad(CLI::App& bench, Action& action);
void RegisterBenchKernels(CLI::App& bench, Action& action);
void RegisterBenchPrefill(CLI::App& bench, Action& action);
void RegisterBenchDecode(CLI::App& bench, Action& action);
void RegisterBenchSimulator(CLI::App& bench, Action& action);
void RegisterSimulate(CLI::App& app, Action& action);
void RegisterCalibrate(CLI::App& app, Action& action);
void RegisterProcesses(CLI::App& app, Action& action);  // hmm and worker, started by serve

}  // namespace elasticmoe::cli
