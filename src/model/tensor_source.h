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
// in bf16, GPTQ, AWQ).
struct RowOrder {
  // What shares a word of 32 bits in a transposed matrix of kU4 or kU8, the first in the lowest bits: numbers
  // of the same column in lines below each other (GPTQ), or eight of the same line, the even ones first
  // (AWQ).
  enum class Words { kNone, kDown, kAwq };

  std::uint32_t first = 0;
  std::uint32_t step = 1;
  std::uint32_t pairs_head_dim = 0;
  std::uint32_t columns = 0;
  Words words = Words::kNone;

  bool InOrder() const { return first == 0 && step == 1 && pairs_head_dim == 0 && columns == 0; }
  std::uint64_t StoredRow(std::uint64_t row) const;
};

// What stands for 0 in each block of numbers that are whole: one beside each factor.
struct ZeroPoints {
  enum class Layout {
    kBytes,   // I8 [rows, blocks]
    kDown,    // words of 32 bits [rows / numbers a word, blocks]: rows below each other share one
    kAcross,  // words [blocks, rows / numbers a word]: rows beside each other share one
    kAwq,     // the same, in the order of RowOrder::Words::kAwq
  };
  Layout layout = Layout::kBytes;
  int bits = 8;  // of a number in a word: 4 or 8
  int add = 0;   // to what is stored
  int file = 0;
  std::uint64_t offset = 0;
};

// Factors that lie apart from the values: a matrix with one for each block of `block_rows` stored rows and
// `block_columns` columns. value = (number - zero) * factor.
struct BlockScales {
  Encoding encoding = Encoding::kF32;
  int file = 0;
  std::uint64_t offset = 0;
  std::uint32_t block_rows = 1;
  std::uint32_t block_columns = 1;
  // Of a block for each row alone (block_rows = 1):
  std::uint32_t transposed_rows = 0;     // stored as [blocks, that many rows]; 0 = not
  float zero = 0;                        // of all, where there are no zeros
  std::optional<ZeroPoints> zeros = {};  // of each
  std::uint32_t blocks = 0;              // a row, where columns name theirs: I32 [k] in `file` at ...
  std::uint64_t block_of_column = 0;
};

// A matrix of plain numbers, [rows, as many columns as a vector has values]: each value is divided by the
// length of its column, and a little (1e-7) for columns of zeros.
struct ColumnLengths {
  Encoding encoding = Encoding::kBf16;
  int file = 0;
  std::uint64_t offset = 0;
  std::uint64_t rows = 0;
  std::uint64_t columns = 0;
};

struct TensorData {
  Encoding encoding = Encoding::kBf16;
  int file = 0;              // index into Checkpoint::files
  std::uint64_t offset = 0;  // of the first stored row in that file
  std::uint64_t bytes = 0;   // of its values, without scales
  RowOrder order = {};
  std::optional<BlockScales> scales = {};
  std::optional<ColumnLengths> divisor = {};  // of a vector
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
  // float32. kDataLoss where columns name a block that there is not. REQUIRES: the rows lie within the
  // tensor, and k is a multiple of the encoding's block. A divisor is read whole, each time.
  Expected<PlainRows> Read(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                           std::uint64_t count);

  // The same in two steps, for who reads ahead: the bytes of the tensor's file among which those rows lie,
  // and the rows from these bytes (any alignment), which stay as long as the rows are used. Scales that lie
  // apart are still read, and so are a few rows of a matrix that is stored transposed, of which the range is
  // empty.
  struct Range {
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
  };
  static Range RangeOf(const TensorData& tensor, std::uint64_t k, std::uint64_t begin, std::uint64_t count);
  Expected<PlainRows> From(const std::byte* stored, const TensorData& tensor, std::uint64_t k,
                           std::uint64_t begin, std::uint64_t count);

 private:
  // Of a matrix that is stored transposed: from `stored`, its range, or where that is empty one read for each
  // of its lines, of as much as the rows need.
  Expected<PlainRows> ReadColumns(const std::byte* stored, const TensorData& tensor, std::uint64_t k,
                                  std::uint64_t begin, std::uint64_t count);

  // The stored rows among which those are.
  struct StoredRows {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
  };
  static StoredRows StoredRowsOf(const TensorData& tensor, std::uint64_t begin, std::uint64_t count);

  Status ReadFactors(const BlockScales& scales, std::uint64_t blocks, std::uint64_t low, std::uint64_t high);
  Status ReadZeros(const BlockScales& scales, std::uint64_t blocks, StoredRows rows);
  Status ReadBlocks(const BlockScales& scales, std::uint64_t k);
  Status Scale(const TensorData& tensor, std::uint64_t k, std::uint64_t begin, std::uint64_t count,
               StoredRows rows);

  Status Divide(const ColumnLengths& divisor, std::uint64_t begin, std::uint64_t count);

  ReadBytes read_;
  std::vector<std::byte> stored_, plain_;
  std::vector<float> factors_, zeros_;
  std::vector<std::uint32_t> blocks_;
};

}  // namespace elasticmoe::model
