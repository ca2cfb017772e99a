// The log sink: the one global of the program. Lines go to stderr, with the process's role.
// Thread-safe.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace elasticmoe {

// Sets role ("serve", "worker 3") and level ("debug", "info", "warn", "error") of this process's lines.
void InitLog(const std::string& role, const std::string& level);

template <class... Args>
void LogDebug(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::debug(format, std::forward<Args>(args)...);
}
template <class... Args>
void LogInfo(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::info(format, std::forward<Args>(args)...);
}
template <class... Args>
void LogWarn(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::warn(format, std::forward<Args>(args)...);
}
template <class... Args>
void LogError(fmt::format_string<Args...> format, Args&&... args) {
  spdlog::error(format, std::forward<Args>(args)...);
}

}  // namespace elasticmoe
