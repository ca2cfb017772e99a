#include "runtime/hmm/loader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "runtime/fd.h"

namespace elasticmoe::runtime {
namespace {

// Values read at a time: large enough for sequential disk speed, small enough to stay in the L2 cache between
// read, decoding and packing.
constexpr std::uint64_t kSliceValues = 1 << 18;

Status ReadAt(int fd, const std::filesystem::path& path, std::uint64_t offset, std::byte* out,
              std::uint64_t bytes) {
  while (bytes > 0) {
    const ssize_t got = ::pread(fd, out, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Fail(ErrorCode::kUnavailable, "reading {}: {}", path.string(), std::strerror(errno));
    if (got == 0)
      return Fail(ErrorCode::kDataLoss,
                  "reading {}: it ends at byte {}, {} bytes of a tensor are missing; fetch it again",
                  path.string(), offset, bytes);
    out += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
  return {};
}

}  // namespace

std::vector<int> MoeIndex(const core::ModelSpec& spec) {
  std::vector<int> index;
  int next = 0;
  for (const core::LayerSpec& layer : spec.layers) index.push_back(layer.moe ? next++ : -1);
  return index;
}

int MoeLayerCount(const core::ModelSpec& spec) {
  return static_cast<int>(
      std::count_if(spec.layers.begin(), spec.layers.end(), [](const auto& layer) { return layer.moe; }));
}

Status LoadWeights(const model::Checkpoint& checkpoint, const compute::WeightLayout& layout,
                   const LoadTarget& target, int threads, std::atomic<std::uint64_t>& loaded_bytes) {
  std::vector<Fd> files;
  for (const auto& path : checkpoint.files) {
    files.emplace_back(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!files.back())
      return Fail(ErrorCode::kUnavailable, "opening {}: {}", path.string(), std::strerror(errno));
  }
  const std::vector<int> moe_index = MoeIndex(checkpoint.spec);
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  Status failure;

  const auto read = [&](int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) {
    return ReadAt(files[file].get(), checkpoint.files[file], offset, out, bytes);
  };
  const auto load_tensor = [&](const model::TensorSource& source, model::RowReader& reader) -> Status {
    const compute::TensorPlace& place = layout.Place(source.tensor.role, source.tensor.layer);
    std::byte* blob = model::OfExpert(source.tensor.role)
                          ? target.expert(moe_index[source.tensor.layer], source.tensor.expert)
                          : target.shared;
    const std::uint64_t row_bytes = model::EncodedBytes(source.encoding, place.k);
    EM_CHECK(row_bytes * place.n == source.bytes, "tensor={} bytes={}", source.tensor.name, source.bytes);
    const std::uint64_t slice_rows = std::clamp<std::uint64_t>(kSliceValues / place.k, 1, place.n);
    for (std::uint64_t row = 0; row < std::uint64_t(place.n); row += slice_rows) {
      const std::uint64_t rows = std::min<std::uint64_t>(slice_rows, place.n - row);
      EM_ASSIGN_OR_RETURN(const model::PlainRows values, reader.Read(source, place.k, row, rows));
      compute::TensorPlace part = place;
      part.row_begin += static_cast<int>(row);
      part.n = static_cast<int>(rows);
      compute::PackTensor(part, values.data, values.type, blob);
      loaded_bytes.fetch_add(rows * row_bytes, std::memory_order_relaxed);
    }
    return {};
  };
  const auto run = [&] {
    model::RowReader reader(read);
    for (;;) {
      const std::size_t index = next.fetch_add(1);
      if (index >= checkpoint.tensors.size()) return;
      if (Status status = load_tensor(checkpoint.tensors[index], reader); !status) {
        const std::scoped_lock lock(mutex);
        if (failure) failure = std::move(status);
        next.store(checkpoint.tensors.size());
        return;
      }
    }
  };
  std::vector<std::jthread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(run);
  run();
  helpers.clear();  // joins
  return failure;
}

}  // namespace elasticmoe::runtime
