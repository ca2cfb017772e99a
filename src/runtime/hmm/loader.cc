#include "runtime/hmm/loader.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "runtime/hmm/weight_files.h"

namespace elasticmoe::runtime {
namespace {

// Values read at a time: large enough for sequential disk speed, small enough to stay in the L2 cache between
// read, decoding and packing.
constexpr std::uint64_t kSliceValues = 1 << 18;

// The same of a matrix that is stored transposed, of which a few rows lie in pieces all over it: the experts
// of most models in one read.
constexpr std::uint64_t kTransposedValues = 1 << 22;

// Rows of a tensor: the unit of reading and packing.
struct Slice {
  std::size_t tensor = 0;
  std::uint64_t row = 0;
  std::uint64_t rows = 0;
};

// About where in its blob rows of a tensor land: from one tensor's offset to the next, in proportion. Only
// where memory is backed first depends on it.
class Extents {
 public:
  Extents(const model::Checkpoint& checkpoint, const compute::WeightLayout& layout) {
    ends_[0] = {layout.SharedBytes()};
    ends_[1] = {layout.ExpertBytes()};
    for (const model::TensorSource& source : checkpoint.tensors)
      ends_[model::OfExpert(source.tensor.role)].push_back(
          layout.Place(source.tensor.role, source.tensor.layer).offset);
    for (auto& ends : ends_) std::ranges::sort(ends);
  }

  // Of the first row, and bytes.
  std::pair<std::size_t, std::size_t> Of(const model::TensorSource& source, const compute::TensorPlace& place,
                                         const Slice& slice) const {
    const std::vector<std::size_t>& ends = ends_[model::OfExpert(source.tensor.role)];
    const auto end = std::ranges::upper_bound(ends, place.offset);
    if (end == ends.end()) return {place.offset, 0};
    const std::size_t bytes = *end - place.offset;
    const auto rows = static_cast<std::uint64_t>(place.n_fused);
    const std::uint64_t first = place.row_begin + slice.row;
    const std::size_t from = bytes * first / rows, to = bytes * (first + slice.rows) / rows;
    return {place.offset + from, to - from};
  }

 private:
  std::array<std::vector<std::size_t>, 2> ends_;  // of the shared blob, of an expert's; sorted
};

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

Status ForEach(std::size_t count, int threads, const std::function<Status(std::size_t)>& work) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  Status failure;
  const auto run = [&] {
    for (std::size_t i; (i = next.fetch_add(1)) < count;) {
      Status status = work(i);
      if (status) continue;
      next.store(count);
      const std::scoped_lock lock(mutex);
      if (failure) failure = std::move(status);
    }
  };
  std::vector<std::jthread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(run);
  run();
  helpers.clear();  // joins
  return failure;
}

Expected<LoadReport> LoadWeights(const model::Checkpoint& checkpoint, const compute::WeightLayout& layout,
                                 const LoadTarget& target, int threads,
                                 std::atomic<std::uint64_t>& loaded_bytes) {
  EM_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(checkpoint.files));
  const std::vector<int> moe_index = MoeIndex(checkpoint.spec);
  const Extents extents(checkpoint, layout);

  std::vector<Slice> slices;
  std::vector<FilePiece> pieces;
  for (std::size_t i = 0; i < checkpoint.tensors.size(); ++i) {
    const model::TensorSource& source = checkpoint.tensors[i];
    const compute::TensorPlace& place = layout.Place(source.tensor.role, source.tensor.layer);
    const auto k = static_cast<std::uint64_t>(place.k), n = static_cast<std::uint64_t>(place.n);
    EM_CHECK(model::EncodedBytes(source.encoding, k) * n == source.bytes, "tensor={} bytes={}",
             source.tensor.name, source.bytes);
    // Whole panels, where a panel is not too much.
    const std::uint64_t values = source.order.columns > 0 ? kTransposedValues : kSliceValues;
    std::uint64_t most = std::max<std::uint64_t>(values / k, 1);
    if (most > compute::kPanel) most -= most % compute::kPanel;
    for (std::uint64_t row = 0; row < n; row += most) {
      slices.push_back({i, row, std::min(most, n - row)});
      const auto range = model::RowReader::RangeOf(source, k, row, slices.back().rows);
      pieces.push_back({source.file, range.offset, range.bytes});
    }
  }
  files->SetPieces(std::move(pieces));

  const auto pack = [&](model::RowReader& reader, const Slice& slice, const std::byte* stored) -> Status {
    const model::TensorSource& source = checkpoint.tensors[slice.tensor];
    compute::TensorPlace place = layout.Place(source.tensor.role, source.tensor.layer);
    std::byte* blob = model::OfExpert(source.tensor.role)
                          ? target.expert(moe_index[source.tensor.layer], source.tensor.expert)
                          : target.shared;
    const auto [from, bytes] = extents.Of(source, place, slice);
    EM_RETURN_IF_ERROR(target.back(blob + from, bytes));
    EM_ASSIGN_OR_RETURN(const model::PlainRows values,
                        reader.From(stored, source, place.k, slice.row, slice.rows));
    place.row_begin += static_cast<int>(slice.row);
    place.n = static_cast<int>(slice.rows);
    compute::PackTensor(place, values.data, values.type, blob);
    loaded_bytes.fetch_add(slice.rows * model::EncodedBytes(source.encoding, place.k),
                           std::memory_order_relaxed);
    return {};
  };
  std::atomic<bool> failed{false};
  EM_RETURN_IF_ERROR(ForEach(static_cast<std::size_t>(threads), threads, [&](std::size_t) -> Status {
    model::RowReader reader([&](int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) {
      return files->ReadAt(file, offset, out, bytes);
    });
    WeightFiles::Piece piece;
    const auto run = [&]() -> Status {
      while (!failed.load(std::memory_order_relaxed)) {
        EM_ASSIGN_OR_RETURN(const bool more, files->Next(piece));
        if (!more) break;
        EM_RETURN_IF_ERROR(pack(reader, slices[piece.index()], piece.data()));
      }
      return {};
    };
    Status status = run();
    if (!status) failed.store(true, std::memory_order_relaxed);
    return status;
  }));
  return LoadReport{files->totals().cached_bytes, files->totals().disk_bytes};
}

}  // namespace elasticmoe::runtime
