// Opening GGUF files, apart from parsing them (gguf.cc).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <unordered_set>
#include <utility>

#include "model/config_reader.h"
#include "model/gguf/gguf.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kMaxParts = 10'000;

// A file's bytes, mapped and not copied: how long a header is, only its end tells, and a process that
// needs a file for a moment keeps no memory of it.
class Mapping {
 public:
  static Expected<Mapping> Open(const fs::path& path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
      return Fail(ErrorCode::kUnavailable, "{}; check its permissions", std::strerror(errno));
    struct stat status {};
    Mapping out;
    bool mapped = ::fstat(descriptor, &status) == 0;
    out.size_ = static_cast<std::size_t>(status.st_size);
    if (mapped && out.size_ > 0) {
      void* at = ::mmap(nullptr, out.size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
      mapped = at != MAP_FAILED;
      if (mapped) out.data_ = static_cast<const char*>(at);
    }
    const int error = errno;
    ::close(descriptor);
    if (!mapped) return Fail(ErrorCode::kUnavailable, "{}", std::strerror(error));
    return out;
  }
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() {
    if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
  }

  std::string_view Bytes() const { return {data_, data_ == nullptr ? 0 : size_}; }

 private:
  Mapping() = default;
  const char* data_ = nullptr;
  std::size_t size_ = 0;
};

Expected<Gguf> ReadHeader(const fs::path& path, std::uint64_t& file_bytes) {
  std::error_code code;
  const auto status = fs::status(path, code);
  if (status.type() == fs::file_type::not_found) return Fail(ErrorCode::kNotFound, "no such file");
  if (code) return Fail(ErrorCode::kUnavailable, "{}", code.message());
  if (!fs::is_regular_file(status)) return Fail(ErrorCode::kInvalidArgument, "not a regular file");
  EM_ASSIGN_OR_RETURN(const Mapping mapping, Mapping::Open(path));
  file_bytes = mapping.Bytes().size();
  return ParseGguf(mapping.Bytes(), file_bytes);
}

// The parts of a split model by the name of its first.
Expected<std::vector<fs::path>> PartsOf(const fs::path& path, std::int64_t count) {
  if (count > kMaxParts) return Fail(ErrorCode::kDataLoss, "split.count={} (limit={})", count, kMaxParts);
  const std::string name = path.filename().string();
  const std::string ending = fmt::format("-{:05}-of-{:05}.gguf", 1, count);
  if (!name.ends_with(ending))
    return Fail(ErrorCode::kInvalidArgument,
                "split.count={}, but the file's name does not end in {}; give the first part by its original "
                "name",
                count, ending);
  std::vector<fs::path> parts;
  for (std::int64_t i = 1; i <= count; ++i)
    parts.push_back(path.parent_path() / fmt::format("{}-{:05}-of-{:05}.gguf",
                                                     name.substr(0, name.size() - ending.size()), i, count));
  return parts;
}

}  // namespace

Expected<Gguf> OpenGguf(const fs::path& path) {
  const auto within = [](const fs::path& part, Error error) {
    return Within(fmt::format("reading {}", part.string()), std::move(error));
  };
  std::uint64_t file_bytes = 0;
  auto first = ReadHeader(path, file_bytes);
  if (!first) return within(path, std::move(first.error()));
  Gguf out = *std::move(first);
  const auto* count = out.Get<std::int64_t>("split.count");
  out.files = {path};
  out.file_bytes = {file_bytes};
  if (count == nullptr || *count <= 1) return out;
  auto parts = PartsOf(path, *count);
  if (!parts) return within(path, std::move(parts.error()));
  for (std::size_t i = 1; i < parts->size(); ++i) {
    auto part = ReadHeader((*parts)[i], file_bytes);
    if (!part) return within((*parts)[i], std::move(part.error()));
    for (GgufTensor& tensor : part->tensors) {
      tensor.file = static_cast<int>(i);
      out.tensors.push_back(std::move(tensor));
    }
    out.file_bytes.push_back(file_bytes);
  }
  out.files = *std::move(parts);
  std::unordered_set<std::string_view> names;
  for (const GgufTensor& tensor : out.tensors)
    if (!names.insert(tensor.name).second)
      return Fail(ErrorCode::kDataLoss, "reading {}: tensor {} is in two parts; fetch them again",
                  out.files[tensor.file].string(), Shown(tensor.name));
  if (const auto* total = out.Get<std::int64_t>("split.tensors.count");
      total != nullptr && *total != static_cast<std::int64_t>(out.tensors.size()))
    return Fail(ErrorCode::kDataLoss,
                "reading {}: split.tensors.count={}, but its {} parts hold {}; fetch them again",
                path.string(), *total, out.files.size(), out.tensors.size());
  return out;
}

bool IsGgufPath(const fs::path& path) {
  std::error_code code;
  return path.extension() == ".gguf" && !fs::is_directory(path, code);
}

}  // namespace elasticmoe::model
