// Where a tensor's numbers lie in the weight files, and a reader that gives its rows as plain numbers,
// whatever the container and the encoding. This is all that loading knows of safetensors and GGUF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "base/error.h"
#include "model/encoding.h"
#include "model/family.h"

namespace elasticmoe::model {

// Which stored row is row r of the tensor: first + step * r, or, where `pairs_head_dim` is set, the row at
// which r's partner in rotary embedding is its neighbour (GGUF's "llama" stores q and k so: of each head of
// that many rows, j and j + head_dim / 2 side by side). Where `columns` is set the matrix is stored
// transposed, `columns` numbers a line, and "stored row" means a column of what is stored (gpt-oss's experts
// in bf16).
struct RowOrder {
  std::uint32_t first = 0;
  std::uint32_t step = 1;
  std::uint32_t pairs_head_dim = 0;
  std::uint32_t columns = 0;

  bool InOrder() const { return first == 0 && step == 1 && pairs_head_dim == 0 && columns == 0; }
  std::uint64_t StoredRow(std::uint64_t row) const;
};

// Factors that lie apart from the values: a matrix with one for each block of `block_rows` stored rows and
// `block_columns` columns.
struct BlockScales {
  Encoding encoding = Encoding::kF32;
  int file = 0;
  std::uint64_t offset = 0;
  std::uint32_t block_rows = 1;
  std::uint32_t block_columns = 1;
};

struct TensorData {
  Encoding encoding = Encoding::kBf16;
  int file = 0;              // index into Checkpoint::files
  std::uint64_t offset = 0;  // of the first stored row in that file
  std::uint64_t bytes = 0;   // of its values, without scales
  RowOrder order = {};
  std::optional<BlockScales> scales = {};
};

struct TensorSource : TensorData {
  TensorName tensor;
};

// Rows of a tensor, row-major, until the reader's next Read.
struct PlainRows {
  DType type = DType::kF32;
  const std::byte* data = nullptr;
};

// Not thread-safe: it owns the buffers. Memory: the rows read, as written and decoded.
class RowReader {
 public:
  // Fills `out` from a file, or fails with an error that names the file.
  using ReadBytes =
      std::function<Status(int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes)>;

  explicit RowReader(ReadBytes read) : read_(std::move(read)) {}

  // Rows [begin, begin + count) of k values. What is written as plain numbers comes as it is, the rest as
  // float32. REQUIRES: the rows lie within the tensor, and k is a multiple of the encoding's block; what is
  // stored transposed is plain numbers.
  Expected<PlainRows> Read(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                           std::uint64_t count);

 private:
  // Of a matrix that is stored transposed: one read for each of its k lines, of as much as the rows need.
  Expected<PlainRows> ReadColumns(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                                  std::uint64_t count);

  // `low`, `high`: the stored rows among which those are.
  Status Scale(const TensorData& tensor, std::uint64_t k, std::uint64_t begin, std::uint64_t count,
               std::uint64_t low, std::uint64_t high);

  ReadBytes read_;
  std::vector<std::byte> stored_, plain_;
  std::vector<float> factors_;
};

}  // namespace elasticmoe::model
