// Whole small files, into memory and out of it. Blocking I/O.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

#include "base/error.h"

namespace elasticmoe {

// kNotFound, kInvalidArgument (not a regular file) or kResourceExhausted (larger than `limit_bytes`), each
// naming `path`.
Expected<std::string> ReadFile(const std::filesystem::path& path,
                               std::size_t limit_bytes = std::size_t{256} << 20);

// Replaces the file. kInvalidArgument where it cannot be written.
Status WriteFile(const std::filesystem::path& path, const std::string& text);

}  // namespace elasticmoe
