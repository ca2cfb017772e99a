// 64-bit hashes of bytes and integers, stable over processes and releases. Not for security. Pure.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/rng.h"

namespace elasticmoe {

constexpr std::uint64_t HashCombine(std::uint64_t hash, std::uint64_t value) {
  return Mix64(hash ^ Mix64(value + 0x2545f4914f6cdd1dULL));
}

constexpr std::uint64_t HashBytes(std::string_view bytes, std::uint64_t hash = 0xcbf29ce484222325ULL) {
  for (unsigned char c : bytes) hash = (hash ^ c) * 0x100000001b3ULL;  // FNV-1a
  return Mix64(hash);
}

}  // namespace elasticmoe
