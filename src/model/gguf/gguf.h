// The GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): little-endian header with
// typed metadata, tensor descriptions, then the tensors' bytes. Versions 2 and 3. Parsing is apart from
// opening files and pure; OpenGguf reads headers only, no tensor bytes.
//
// Accepted files keep: no key and no tensor name comes twice; every tensor begins at a multiple of the
// alignment, has rows of whole blocks and, where its type is known, lies within the file and shares no byte
// with another. All errors are kDataLoss unless said otherwise.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"
#include "model/encoding.h"

namespace elasticmoe::model {

// A metadata value. Integers of all widths are int64 (a uint64 above its range is refused where it is read),
// lists hold one kind.
using GgufValue = std::variant<std::int64_t, double, bool, std::string, std::vector<std::int64_t>,
                               std::vector<double>, std::vector<bool>, std::vector<std::string>>;

struct GgufTensor {
  std::string name;
  std::vector<std::int64_t> shape;   // slowest dimension first (the file has it the other way round), 1 to 4
  std::uint32_t type = 0;            // as written
  std::optional<Encoding> encoding;  // nullopt: a type that is not read here
  std::uint64_t offset = 0;          // in the file
  std::uint64_t bytes = 0;           // 0 where the encoding is not known
  int file = 0;                      // index into Gguf::files
};

struct Gguf {
  std::vector<std::filesystem::path> files;  // all parts of a split model, in order
  std::vector<std::uint64_t> file_bytes;
  std::map<std::string, GgufValue, std::less<>> metadata;  // of the first part
  std::vector<GgufTensor> tensors;                         // of all parts

  const GgufTensor* Find(std::string_view name) const;  // linear

  // Typed metadata; kInvalidArgument names the key where it is missing or of another type.
  Expected<std::int64_t> Int(std::string_view key) const;
  Expected<double> Number(std::string_view key) const;
  Expected<std::string> Text(std::string_view key) const;
  Expected<std::span<const std::string>> Texts(std::string_view key) const;
  bool Has(std::string_view key) const { return metadata.contains(key); }
  // nullptr where the key is missing or of another type.
  template <class T>
  const T* Get(std::string_view key) const {
    const auto at = metadata.find(key);
    return at == metadata.end() ? nullptr : std::get_if<T>(&at->second);
  }
};

// A file's first `bytes` of `file_bytes`; tensors' offsets are those in the file. `files` stays empty.
// kDataLoss also where `bytes` ends inside of the header.
Expected<Gguf> ParseGguf(std::string_view bytes, std::uint64_t file_bytes);

// "q4_k" and so on of ggml's type numbers.
std::optional<Encoding> GgufEncoding(std::uint32_t type);
// REQUIRES: the encoding is one that GGUF has.
std::uint32_t GgufType(Encoding encoding);

// Reads the headers of `path` and of the other parts if it is part of a split model
// (NAME-00001-of-00003.gguf). Also kNotFound, kInvalidArgument (not a regular file, a part that is not the
// first), kUnavailable; each error names the file.
Expected<Gguf> OpenGguf(const std::filesystem::path& path);

// A regular file, rather than a checkpoint's directory. Looks at the name and the disk only.
bool IsGgufPath(const std::filesystem::path& path);

}  // namespace elasticmoe::model
