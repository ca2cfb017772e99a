#include "model/make_model.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>
#include <utility>

#include "base/json.h"
#include "model/family.h"
#include "model/random_weights.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kChunkValues = 1 << 19;  // 1 MiB of bf16 a write

std::uint64_t BytesOfTensor(const TensorName& tensor) {
  std::uint64_t bytes = sizeof(std::uint16_t);
  for (const std::int64_t n : tensor.shape) bytes *= static_cast<std::uint64_t>(n);
  return bytes;
}

// A run of tensors that share a file.
struct Shard {
  std::size_t begin = 0, end = 0;  // of the tensors
  std::uint64_t bytes = 0;
  std::string name;
};

std::vector<Shard> SplitIntoShards(const std::vector<TensorName>& tensors, std::uint64_t shard_bytes) {
  std::vector<Shard> shards(1);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t bytes = BytesOfTensor(tensors[i]);
    if (shards.back().end > shards.back().begin && shards.back().bytes + bytes > shard_bytes)
      shards.push_back({.begin = i, .end = i});
    shards.back().end = i + 1;
    shards.back().bytes += bytes;
  }
  for (std::size_t i = 0; i < shards.size(); ++i)
    shards[i].name = shards.size() == 1
                         ? "model.safetensors"
                         : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
  return shards;
}

// Length prefix and header. Tensor names here are ours: no character of them needs an escape.
std::string HeaderOf(const std::vector<TensorName>& tensors, const Shard& shard) {
  std::string json = R"({"__metadata__":{"format":"pt"})";
  std::uint64_t offset = 0;
  for (std::size_t i = shard.begin; i < shard.end; ++i) {
    const std::uint64_t end = offset + BytesOfTensor(tensors[i]);
    json += fmt::format(R"(,"{}":{{"dtype":"BF16","shape":[{}],"data_offsets":[{},{}]}})", tensors[i].name,
                        fmt::join(tensors[i].shape, ","), offset, end);
    offset = end;
  }
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');  // so that the data are aligned, as the format advises
  std::string header;
  for (int byte = 0; byte < 8; ++byte) header += static_cast<char>(json.size() >> (8 * byte) & 0xff);
  return header + json;
}

// Creates files and removes them again unless the model is complete.
class Output {
 public:
  explicit Output(fs::path directory) : directory_(std::move(directory)) {}
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    std::error_code ignored;
    if (!complete_)
      for (const fs::path& file : files_) fs::remove(file, ignored);
  }

  void Complete() { complete_ = true; }

  Expected<std::ofstream> Create(const std::string& name) {
    const fs::path path = directory_ / name;
    errno = 0;
    std::ofstream stream(path, std::ios::binary | std::ios::trunc);
    if (!stream) return Fail(ErrorCode::kUnavailable, "writing {}: {}", path.string(), std::strerror(errno));
    files_.push_back(path);
    return stream;
  }

  // Of the file created last.
  Status Close(std::ofstream& stream) {
    errno = 0;
    stream.close();
    if (stream) return {};
    return Fail(errno == ENOSPC ? ErrorCode::kResourceExhausted : ErrorCode::kUnavailable,
                "writing {}: {}; is there room on the disk?", files_.back().string(),
                errno ? std::strerror(errno) : "some bytes could not be written");
  }

  Status WriteText(const std::string& name, const std::string& text) {
    EM_ASSIGN_OR_RETURN(std::ofstream stream, Create(name));
    stream << text;
    return Close(stream);
  }

 private:
  fs::path directory_;
  std::vector<fs::path> files_;
  bool complete_ = false;
};

Status CheckDirectory(const fs::path& directory, std::uint64_t bytes) {
  std::error_code code;
  fs::create_directories(directory, code);
  if (code || !fs::is_directory(directory, code))
    return Fail(ErrorCode::kUnavailable, "making a model in {}: {}", directory.string(),
                code ? code.message() : "not a directory");
  for (fs::directory_iterator it(directory, code), end; !code && it != end; it.increment(code)) {
    const fs::path& file = it->path();
    if (file.filename() == "config.json" || file.extension() == ".safetensors")
      return Fail(ErrorCode::kAlreadyExists,
                  "making a model in {}: it holds {} already; give another directory", directory.string(),
                  file.filename().string());
  }
  const fs::space_info space = fs::space(directory, code);
  if (!code && space.available < bytes)
    return Fail(ErrorCode::kResourceExhausted,
                "making a model in {}: needs {} bytes, {} are free; free some or lower --params",
                directory.string(), bytes, space.available);
  return {};
}

class Writer {
 public:
  Writer(const MakeModelOptions& options, const core::ModelSpec& spec, const std::vector<TensorName>& tensors,
         std::uint64_t total_bytes)
      : options_(options), spec_(spec), tensors_(tensors), total_bytes_(total_bytes), chunk_(kChunkValues) {}

  Status WriteShard(const Shard& shard, Output& output) {
    EM_ASSIGN_OR_RETURN(std::ofstream stream, output.Create(shard.name));
    const std::string header = HeaderOf(tensors_, shard);
    stream.write(header.data(), static_cast<std::streamsize>(header.size()));
    for (std::size_t i = shard.begin; i < shard.end && stream; ++i) WriteTensor(i, stream);
    return output.Close(stream);
  }

 private:
  void WriteTensor(std::size_t index, std::ofstream& stream) {
    weights_.Begin(options_.seed, index, LawOf(tensors_[index], spec_));
    std::uint64_t left = BytesOfTensor(tensors_[index]) / sizeof(std::uint16_t);
    while (left > 0 && stream) {
      const std::size_t count = static_cast<std::size_t>(std::min<std::uint64_t>(left, kChunkValues));
      weights_.Fill(std::span(chunk_).first(count));
      const std::size_t bytes = count * sizeof(std::uint16_t);
      stream.write(reinterpret_cast<const char*>(chunk_.data()), static_cast<std::streamsize>(bytes));
      left -= count;
      done_bytes_ += bytes;
      if (options_.progress) options_.progress(done_bytes_, total_bytes_);
    }
  }

  const MakeModelOptions& options_;
  const core::ModelSpec& spec_;
  const std::vector<TensorName>& tensors_;
  std::uint64_t total_bytes_;
  std::uint64_t done_bytes_ = 0;
  std::vector<std::uint16_t> chunk_;
  RandomWeights weights_;
};

std::string IndexOf(const std::vector<TensorName>& tensors, const std::vector<Shard>& shards,
                    std::uint64_t total_bytes) {
  std::string json = fmt::format("{{\"metadata\": {{\"total_size\": {}}},\n\"weight_map\": {{", total_bytes);
  const char* separator = "\n";
  for (const Shard& shard : shards)
    for (std::size_t i = shard.begin; i < shard.end; ++i)
      json += fmt::format("{}\"{}\": \"{}\"", std::exchange(separator, ",\n"), tensors[i].name, shard.name);
  return json + "\n}}\n";
}

}  // namespace

Expected<MadeModel> MakeModel(const MakeModelOptions& options) {
  EM_ASSIGN_OR_RETURN(const core::ModelSpec spec, PickShape(options));
  return WriteModel(spec, options);
}

Expected<MadeModel> WriteModel(const core::ModelSpec& spec, const MakeModelOptions& options) {
  EM_ASSIGN_OR_RETURN(const Family* family, FindFamily(spec.family));
  const std::vector<TensorName> tensors = family->Tensors(spec);
  const std::vector<Shard> shards = SplitIntoShards(tensors, options.shard_bytes);
  MadeModel made;
  made.spec = spec;
  for (const Shard& shard : shards) made.bytes += shard.bytes;
  made.parameters = made.bytes / sizeof(std::uint16_t);
  EM_RETURN_IF_ERROR(CheckDirectory(options.directory, made.bytes));

  Output output(options.directory);
  Writer writer(options, spec, tensors, made.bytes);
  for (const Shard& shard : shards) {
    EM_RETURN_IF_ERROR(writer.WriteShard(shard, output));
    made.files.push_back(options.directory / shard.name);
  }
  if (shards.size() > 1)
    EM_RETURN_IF_ERROR(
        output.WriteText("model.safetensors.index.json", IndexOf(tensors, shards, made.bytes)));
  // Random weights have nothing to say, so no token ends a text.
  const Json generation = {{"do_sample", true}, {"temperature", 1.0}, {"eos_token_id", nullptr}};
  EM_RETURN_IF_ERROR(output.WriteText("generation_config.json", generation.dump(2) + "\n"));
  EM_RETURN_IF_ERROR(output.WriteText("config.json", family->Config(spec).dump(2) + "\n"));
  output.Complete();
  return made;
}

}  // namespace elasticmoe::model
