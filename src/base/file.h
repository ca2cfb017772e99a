// Whole small files into memory. Blocking I/O.
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

}  // namespace elasticmoe
