#include "base/file.h"

#include <fstream>
#include <system_error>

namespace elasticmoe {

Expected<std::string> ReadFile(const std::filesystem::path& path, std::size_t limit_bytes) {
  std::error_code code;
  const auto status = std::filesystem::status(path, code);
  if (status.type() == std::filesystem::file_type::not_found)
    return Fail(ErrorCode::kNotFound, "reading {}: no such file", path.string());
  if (code) return Fail(ErrorCode::kUnavailable, "reading {}: {}", path.string(), code.message());
  if (!std::filesystem::is_regular_file(status))
    return Fail(ErrorCode::kInvalidArgument, "reading {}: not a regular file", path.string());
  const auto size = std::filesystem::file_size(path, code);
  if (code) return Fail(ErrorCode::kUnavailable, "reading {}: {}", path.string(), code.message());
  if (size > limit_bytes)
    return Fail(ErrorCode::kResourceExhausted, "reading {}: {} bytes (limit={})", path.string(), size,
                limit_bytes);
  std::ifstream file(path, std::ios::binary);
  if (!file)
    return Fail(ErrorCode::kUnavailable, "reading {}: cannot be opened; check its permissions",
                path.string());
  std::string text(size, '\0');
  file.read(text.data(), static_cast<std::streamsize>(size));
  if (file.gcount() != static_cast<std::streamsize>(size))
    return Fail(ErrorCode::kDataLoss, "reading {}: {} of {} bytes", path.string(), file.gcount(), size);
  return text;
}

Status WriteFile(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (!file) return Fail(ErrorCode::kInvalidArgument, "writing {}: it cannot be written", path.string());
  return {};
}

}  // namespace elasticmoe
