// scripted_server [--port P] [--interval-us N] [--tokens-text TEXT] [--max-connections N] [--api-key KEY]
// The API over a scripted engine, for client tests and load tests. Prints the port; ends with its stdin.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "base/log.h"
#include "server/testing/scripted_api.h"

int main(int argc, char** argv) {
  using namespace elasticmoe;
  InitLog("scripted", "info");
  std::map<std::string, std::string> flags{
      {"--port", "0"},   {"--interval-us", "0"}, {"--tokens-text", ""}, {"--max-connections", "4096"},
      {"--api-key", ""}, {"--threads", "1"},     {"--context", "4096"}};
  for (int i = 1; i + 1 < argc; i += 2) flags[argv[i]] = argv[i + 1];
  const auto number = [&](const char* name) { return std::atoi(flags[name].c_str()); };

  runtime::ScriptedEngineOptions engine = server::ByteEngine(flags["--tokens-text"]);
  engine.max_model_len = number("--context");
  engine.max_running = 4096;
  engine.step_interval = std::chrono::microseconds(number("--interval-us"));
  if (flags["--tokens-text"].empty())
    engine.next_token = [](const core::GenerationRequest&, int index) -> TokenId { return 'a' + index % 26; };
  server::ServerOptions options;
  options.http.port = number("--port");
  options.http.max_connections = number("--max-connections");
  options.http.threads = number("--threads");
  options.max_streams = 4096;
  if (!flags["--api-key"].empty()) options.api_keys.push_back(flags["--api-key"]);
  server::ScriptedApi api(std::move(engine), std::move(options));
  std::printf("%d\n", api.server->Port());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  api.server->Stop();
  return 0;
}
