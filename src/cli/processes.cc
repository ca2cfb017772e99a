// The two process kinds that `serve` starts by itself: elasticmoe hmm, elasticmoe worker.
#include <CLI/CLI.hpp>
#include <memory>

#include "base/log.h"
#include "cli/command.h"
#include "cli/engine_flags.h"
#include "runtime/hmm/hmm.h"
#include "runtime/process.h"
#include "runtime/worker/worker.h"

namespace elasticmoe::cli {

void RegisterProcesses(CLI::App& app, Action& action) {
  auto hmm = std::make_shared<runtime::HmmOptions>();
  auto pages = std::make_shared<std::string>("thp");
  auto level = std::make_shared<std::string>("info");
  CLI::App* hmm_app = app.add_subcommand("hmm", "The memory daemon of a server (started by serve)");
  hmm_app->add_option("--socket", hmm->socket)->required();
  hmm_app->add_option("--model", hmm->model)->required();
  hmm_app->add_option("--max-devices", hmm->max_devices);
  hmm_app->add_flag("--domain-per-device", hmm->domain_per_device);
  AddWeightsFlag(*hmm_app, hmm->weights);
  hmm_app->add_option("--kv-element-bytes", hmm->kv_element_bytes);
  hmm_app->add_option("--kv-memory", hmm->kv_memory_bytes);
  hmm_app->add_option("--kv-room", hmm->kv_room_bytes);
  hmm_app->add_option("--device-memory", hmm->device_memory_bytes);
  hmm_app->add_option("--pages", *pages)->check(CLI::IsMember({"small", "thp", "hugetlb"}));
  hmm_app->add_flag("--standby-memory", hmm->standby_memory);
  hmm_app->add_option("--linger", hmm->linger_seconds);
  hmm_app->add_option("--load-threads", hmm->load_threads);
  hmm_app->add_option("--log-level", *level);
  hmm_app->callback([&action, hmm, pages, level] {
    action = [hmm, pages, level] {
      InitLog("hmm", *level);
      hmm->pages = *pages == "small"     ? runtime::PageKind::kSmall
                   : *pages == "hugetlb" ? runtime::PageKind::kHugetlb
                                         : runtime::PageKind::kTransparentHuge;
      return runtime::RunHmm(*hmm);
    };
  });

  auto worker = std::make_shared<runtime::WorkerOptions>();
  CLI::App* worker_app = app.add_subcommand("worker", "One device of a server (started by serve)");
  worker_app->add_option("--kernels", worker->kernels)->required();
  AddWeightsFlag(*worker_app, worker->weights);
  auto remap = std::make_shared<bool>(false);
  worker_app->add_flag("--remap-experts", *remap);
  worker_app->add_option("--control-fd", worker->control_fd)->required();
  worker_app->add_option("--exchange-fd", worker->exchange_fd)->required();
  worker_app->add_option("--log-level", *level);
  worker_app->callback([&action, worker, remap, level] {
    action = [worker, remap, level] {
      if (*remap) worker->expert_table = runtime::ExpertTableKind::kRemap;
      InitLog("worker", *level);
      return runtime::RunWorker(*worker);
    };
  });
}

}  // namespace elasticmoe::cli
