// For tests only: a scratch directory, a tiny valid model in it, and ways to spoil it.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "base/json.h"
#include "model/make_model.h"

namespace elasticmoe::model {

// Removed with everything in it at the end of the test.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::path(testing::TempDir()) /
            fmt::format("elasticmoe-{}-{}-{}", test->test_suite_name(), test->name(), getpid());
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ScratchDirectory() { std::filesystem::remove_all(path_); }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::filesystem::path& Path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  std::string Read(const std::string& name) const {
    std::ifstream stream(path_ / name, std::ios::binary);
    return (std::ostringstream() << stream.rdbuf()).str();
  }
  void Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }

 private:
  std::filesystem::path path_;
};

// 2 layers, 4 experts, 20,960 parameters, one file unless `shard_bytes` says otherwise.
inline MakeModelOptions TinyModel(const std::filesystem::path& directory) {
  MakeModelOptions options;
  options.parameters = 21'000;
  options.hidden = 32;
  options.layers = 2;
  options.experts = 4;
  options.top_k = 2;
  options.vocab = 64;
  options.directory = directory;
  return options;
}

// A safetensors file of that header text and data.
inline std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int byte = 0; byte < 8; ++byte) bytes += static_cast<char>(header.size() >> (8 * byte) & 0xff);
  return bytes + header + data;
}

// Changes the header of a safetensors file in the scratch directory.
inline void EditHeader(const ScratchDirectory& directory, const std::string& name,
                       const std::function<void(Json&)>& edit) {
  const std::string bytes = directory.Read(name);
  std::uint64_t size = 0;
  for (int byte = 7; byte >= 0; --byte) size = size << 8 | static_cast<unsigned char>(bytes[byte]);
  Json header = *ParseJson(std::string_view(bytes).substr(8, size));
  edit(header);
  directory.Write(name, SafetensorsBytes(header.dump(), bytes.substr(8 + size)));
}

// Changes a JSON file in the scratch directory.
inline void EditJson(const ScratchDirectory& directory, const std::string& name,
                     const std::function<void(Json&)>& edit) {
  Json json = *ParseJson(directory.Read(name));
  edit(json);
  directory.Write(name, json.dump());
}

}  // namespace elasticmoe::model
