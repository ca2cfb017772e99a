#include "model/tensor_source.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"

namespace elasticmoe::model {
namespace {

constexpr std::uint64_t kWordBytes = 4;
constexpr std::uint64_t kLineRows = 16;  // of a transposed matrix at a time: words on one cache line
constexpr std::array<int, 8> kAwqPlace = {0, 4, 1, 5, 2, 6, 3, 7};  // of number i in its word

std::uint32_t WordAt(const std::byte* at) {
  std::uint32_t word = 0;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

std::uint32_t NumberOf(std::uint32_t word, int place, int bits) {
  return word >> (place * bits) & ((1U << bits) - 1);
}

// How a transposed matrix lies: `count` lines `stride` bytes apart, of which columns [low, high) are `bytes`
// from byte `first` on.
struct Lines {
  std::uint64_t count, stride, first, bytes;

  Lines(const TensorData& tensor, std::uint64_t k, std::uint64_t low, std::uint64_t high) {
    const RowOrder& order = tensor.order;
    const auto per = static_cast<std::uint64_t>(tensor.encoding == Encoding::kU4 ? 8 : 4);
    switch (order.words) {
      case RowOrder::Words::kNone: {
        const auto size = static_cast<std::uint64_t>(BlockBytes(tensor.encoding));
        *this = {k, order.columns * size, low * size, (high - low) * size};
        break;
      }
      case RowOrder::Words::kDown:
        *this = {k / per, order.columns * kWordBytes, low * kWordBytes, (high - low) * kWordBytes};
        break;
      case RowOrder::Words::kAwq:
        *this = {k, order.columns / per * kWordBytes, low / per * kWordBytes,
                 ((high + per - 1) / per - low / per) * kWordBytes};
        break;
    }
  }

  // From the first byte that is wanted to the last; empty where most of what lies between is not.
  RowReader::Range Span(std::uint64_t offset) const {
    if (bytes * 4 < stride) return {offset, 0};
    return {offset + first, (count - 1) * stride + bytes};
  }

 private:
  Lines(std::uint64_t count, std::uint64_t stride, std::uint64_t first, std::uint64_t bytes)
      : count(count), stride(stride), first(first), bytes(bytes) {}
};

struct StoredLines {
  const std::byte* data;
  std::uint64_t stride, count;
};

// Rows [begin, begin + count) of k whole numbers each. The lines begin with the word of stored row `low`.
void DecodeWords(const RowOrder& order, int bits, const StoredLines& lines, std::uint64_t low,
                 std::uint64_t begin, std::uint64_t count, std::uint64_t k, float* out) {
  const auto per = static_cast<std::uint64_t>(32 / bits);
  for (std::uint64_t line = 0; line < lines.count; ++line) {
    const std::byte* words = lines.data + line * lines.stride;
    for (std::uint64_t row = 0; row < count; ++row) {
      const std::uint64_t stored = order.StoredRow(begin + row);
      float* to = out + row * k;
      if (order.words == RowOrder::Words::kAwq) {
        const std::uint32_t word = WordAt(words + (stored / per - low / per) * kWordBytes);
        to[line] = static_cast<float>(NumberOf(word, kAwqPlace[stored % per], bits));
        continue;
      }
      const std::uint32_t word = WordAt(words + (stored - low) * kWordBytes);
      for (std::uint64_t i = 0; i < per; ++i)
        to[line * per + i] = static_cast<float>(NumberOf(word, static_cast<int>(i), bits));
    }
  }
}

}  // namespace

std::uint64_t RowOrder::StoredRow(std::uint64_t row) const {
  if (pairs_head_dim == 0) return first + row * step;
  const std::uint64_t half = pairs_head_dim / 2;
  const std::uint64_t in_head = row % pairs_head_dim;
  return row - in_head + in_head % half * 2 + in_head / half;
}

// All that lies between the first and the last of the rows: in every order that is a few rows more at most,
// or every other row.
RowReader::StoredRows RowReader::StoredRowsOf(const TensorData& tensor, std::uint64_t begin,
                                              std::uint64_t count) {
  StoredRows rows{std::numeric_limits<std::uint64_t>::max(), 0};
  for (std::uint64_t row = begin; row < begin + count; ++row) {
    const std::uint64_t at = tensor.order.StoredRow(row);
    rows.low = std::min(rows.low, at);
    rows.high = std::max(rows.high, at + 1);
  }
  return rows;
}

RowReader::Range RowReader::RangeOf(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                                    std::uint64_t count) {
  const StoredRows rows = StoredRowsOf(tensor, begin, count);
  if (tensor.order.columns > 0) return Lines(tensor, k, rows.low, rows.high).Span(tensor.offset);
  const std::uint64_t row_bytes = EncodedBytes(tensor.encoding, k);
  return {tensor.offset + rows.low * row_bytes, (rows.high - rows.low) * row_bytes};
}

Expected<PlainRows> RowReader::Read(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                                    std::uint64_t count) {
  const Range range = RangeOf(tensor, k, begin, count);
  stored_.resize(range.bytes);
  EM_RETURN_IF_ERROR(read_(tensor.file, range.offset, stored_.data(), stored_.size()));
  return From(stored_.data(), tensor, k, begin, count);
}

Expected<PlainRows> RowReader::From(const std::byte* stored, const TensorData& tensor, std::uint64_t k,
                                    std::uint64_t begin, std::uint64_t count) {
  EM_CHECK(k % BlockValues(tensor.encoding) == 0, "k={} encoding={}", k, NameOf(tensor.encoding));
  if (tensor.order.columns > 0) return ReadColumns(stored, tensor, k, begin, count);
  const std::uint64_t row_bytes = EncodedBytes(tensor.encoding, k);
  const StoredRows rows = StoredRowsOf(tensor, begin, count);
  const auto type = PlainType(tensor.encoding);
  const bool decode = !type || tensor.scales || tensor.divisor;
  if (!decode && tensor.order.InOrder()) return PlainRows{*type, stored};
  const std::uint64_t plain_row = decode ? k * sizeof(float) : row_bytes;
  plain_.resize(count * plain_row);
  for (std::uint64_t row = 0; row < count; ++row) {
    const std::byte* from = stored + (tensor.order.StoredRow(begin + row) - rows.low) * row_bytes;
    std::byte* to = plain_.data() + row * plain_row;
    if (decode)
      Decode(tensor.encoding, from, k, reinterpret_cast<float*>(to));
    else
      std::memcpy(to, from, row_bytes);
  }
  if (tensor.scales) EM_RETURN_IF_ERROR(Scale(tensor, k, begin, count, rows));
  if (tensor.divisor) {
    EM_CHECK(k == 1, "k={}", k);
    EM_RETURN_IF_ERROR(Divide(*tensor.divisor, begin, count));
  }
  return PlainRows{decode ? DType::kF32 : *type, plain_.data()};
}

Expected<PlainRows> RowReader::ReadColumns(const std::byte* stored, const TensorData& tensor, std::uint64_t k,
                                           std::uint64_t begin, std::uint64_t count) {
  const RowOrder& order = tensor.order;
  const StoredRows rows = StoredRowsOf(tensor, begin, count);
  const Lines lines(tensor, k, rows.low, rows.high);
  std::uint64_t stride = lines.stride;
  if (lines.Span(0).bytes == 0) {
    stored_.resize(lines.count * lines.bytes);
    for (std::uint64_t i = 0; i < lines.count; ++i)
      EM_RETURN_IF_ERROR(read_(tensor.file, tensor.offset + i * lines.stride + lines.first,
                               stored_.data() + i * lines.bytes, lines.bytes));
    stored = stored_.data();
    stride = lines.bytes;
  }
  if (order.words == RowOrder::Words::kNone) {
    const auto type = PlainType(tensor.encoding);
    EM_CHECK(type && !tensor.scales, "encoding={}", NameOf(tensor.encoding));
    const std::uint64_t size = BlockBytes(tensor.encoding);
    plain_.resize(count * k * size);
    for (std::uint64_t i = 0; i < k; ++i)
      for (std::uint64_t row = 0; row < count; ++row)
        std::memcpy(plain_.data() + (row * k + i) * size,
                    stored + i * stride + (order.StoredRow(begin + row) - rows.low) * size, size);
    return PlainRows{*type, plain_.data()};
  }
  plain_.resize(count * k * sizeof(float));
  const int bits = tensor.encoding == Encoding::kU4 ? 4 : 8;
  for (std::uint64_t row = 0; row < count; row += kLineRows)
    DecodeWords(order, bits, {stored, stride, lines.count}, rows.low, begin + row,
                std::min(count - row, kLineRows), k, reinterpret_cast<float*>(plain_.data()) + row * k);
  EM_RETURN_IF_ERROR(Scale(tensor, k, begin, count, rows));
  return PlainRows{DType::kF32, plain_.data()};
}

Status RowReader::Divide(const ColumnLengths& divisor, std::uint64_t begin, std::uint64_t count) {
  constexpr std::uint64_t kRows = 32;  // at a time
  const std::uint64_t row_bytes = EncodedBytes(divisor.encoding, divisor.columns);
  std::vector<double> squares(divisor.columns);
  factors_.resize(divisor.columns);
  for (std::uint64_t row = 0; row < divisor.rows; row += kRows) {
    const std::uint64_t some = std::min(kRows, divisor.rows - row);
    stored_.resize(some * row_bytes);
    EM_RETURN_IF_ERROR(read_(divisor.file, divisor.offset + row * row_bytes, stored_.data(), stored_.size()));
    for (std::uint64_t i = 0; i < some; ++i) {
      Decode(divisor.encoding, stored_.data() + i * row_bytes, divisor.columns, factors_.data());
      for (std::uint64_t column = 0; column < divisor.columns; ++column)
        squares[column] += static_cast<double>(factors_[column]) * factors_[column];
    }
  }
  auto* values = reinterpret_cast<float*>(plain_.data());
  for (std::uint64_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(values[i] / (std::sqrt(squares[begin + i]) + 1e-7));
  return {};
}

Status RowReader::ReadZeros(const BlockScales& scales, std::uint64_t blocks, StoredRows rows) {
  const ZeroPoints& zeros = *scales.zeros;
  const std::uint64_t count = rows.high - rows.low;
  zeros_.resize(count * blocks);
  if (zeros.layout == ZeroPoints::Layout::kBytes) {
    stored_.resize(count * blocks);
    EM_RETURN_IF_ERROR(read_(zeros.file, zeros.offset + rows.low * blocks, stored_.data(), stored_.size()));
    Decode(Encoding::kI8, stored_.data(), zeros_.size(), zeros_.data());
  } else {
    const auto per = static_cast<std::uint64_t>(32 / zeros.bits);
    const std::uint64_t low = rows.low / per, high = (rows.high + per - 1) / per;
    const std::uint64_t words = (high - low) * blocks;
    stored_.resize(words * kWordBytes);
    const bool down = zeros.layout == ZeroPoints::Layout::kDown;
    if (down) {
      EM_RETURN_IF_ERROR(
          read_(zeros.file, zeros.offset + low * blocks * kWordBytes, stored_.data(), stored_.size()));
    } else {
      const std::uint64_t stride = (scales.transposed_rows + per - 1) / per * kWordBytes;
      for (std::uint64_t block = 0; block < blocks; ++block)
        EM_RETURN_IF_ERROR(read_(zeros.file, zeros.offset + block * stride + low * kWordBytes,
                                 stored_.data() + block * (high - low) * kWordBytes,
                                 (high - low) * kWordBytes));
    }
    for (std::uint64_t row = rows.low; row < rows.high; ++row) {
      const int at =
          zeros.layout == ZeroPoints::Layout::kAwq ? kAwqPlace[row % per] : static_cast<int>(row % per);
      for (std::uint64_t block = 0; block < blocks; ++block) {
        const std::uint64_t word =
            down ? (row / per - low) * blocks + block : block * (high - low) + row / per - low;
        zeros_[(row - rows.low) * blocks + block] =
            static_cast<float>(NumberOf(WordAt(stored_.data() + word * kWordBytes), at, zeros.bits));
      }
    }
  }
  if (zeros.add != 0)
    for (float& zero : zeros_) zero += static_cast<float>(zeros.add);
  return {};
}

Status RowReader::ReadFactors(const BlockScales& scales, std::uint64_t blocks, std::uint64_t low,
                              std::uint64_t high) {
  const auto size = static_cast<std::uint64_t>(BlockBytes(scales.encoding));
  stored_.resize((high - low) * blocks * size);
  factors_.resize((high - low) * blocks);
  if (scales.transposed_rows == 0) {
    EM_RETURN_IF_ERROR(
        read_(scales.file, scales.offset + low * blocks * size, stored_.data(), stored_.size()));
    Decode(scales.encoding, stored_.data(), factors_.size(), factors_.data());
    return {};
  }
  const std::uint64_t count = high - low;
  for (std::uint64_t block = 0; block < blocks; ++block)
    EM_RETURN_IF_ERROR(read_(scales.file, scales.offset + (block * scales.transposed_rows + low) * size,
                             stored_.data() + block * count * size, count * size));
  for (std::uint64_t i = 0; i < factors_.size(); ++i)
    Decode(scales.encoding, stored_.data() + (i % blocks * count + i / blocks) * size, 1, &factors_[i]);
  return {};
}

// blocks_[i] = the block of column i.
Status RowReader::ReadBlocks(const BlockScales& scales, std::uint64_t k) {
  blocks_.resize(k);
  EM_RETURN_IF_ERROR(read_(scales.file, scales.block_of_column, reinterpret_cast<std::byte*>(blocks_.data()),
                           k * sizeof(blocks_[0])));
  for (const std::uint32_t block : blocks_)
    if (block >= scales.blocks)
      return Fail(ErrorCode::kDataLoss,
                  "a tensor's g_idx holds {} (expected from 0 to {}); fetch the checkpoint again",
                  static_cast<std::int32_t>(block), scales.blocks - 1);
  return {};
}

Status RowReader::Scale(const TensorData& tensor, std::uint64_t k, std::uint64_t begin, std::uint64_t count,
                        StoredRows stored) {
  const BlockScales& scales = *tensor.scales;
  const std::uint64_t columns =
      scales.blocks > 0 ? scales.blocks : (k + scales.block_columns - 1) / scales.block_columns;
  const std::uint64_t first = stored.low / scales.block_rows;
  // The values are decoded: what is stored is no longer needed.
  EM_RETURN_IF_ERROR(ReadFactors(scales, columns, first, (stored.high - 1) / scales.block_rows + 1));
  if (scales.zeros) {
    EM_CHECK(scales.block_rows == 1);
    EM_RETURN_IF_ERROR(ReadZeros(scales, columns, stored));
  }
  if (scales.blocks > 0) EM_RETURN_IF_ERROR(ReadBlocks(scales, k));
  for (std::uint64_t row = 0; row < count; ++row) {
    const std::uint64_t block = tensor.order.StoredRow(begin + row) / scales.block_rows - first;
    const float* factors = &factors_[block * columns];
    const float* zeros = scales.zeros ? &zeros_[block * columns] : nullptr;
    float* values = reinterpret_cast<float*>(plain_.data()) + row * k;
    if (scales.blocks > 0) {
      for (std::uint64_t i = 0; i < k; ++i)
        values[i] = (values[i] - (zeros != nullptr ? zeros[blocks_[i]] : scales.zero)) * factors[blocks_[i]];
      continue;
    }
    for (std::uint64_t column = 0; column < columns; ++column) {
      const float zero = zeros != nullptr ? zeros[column] : scales.zero;
      const std::uint64_t end = std::min<std::uint64_t>(k, (column + 1) * scales.block_columns);
      for (std::uint64_t i = column * scales.block_columns; i < end; ++i)
        values[i] = (values[i] - zero) * factors[column];
    }
  }
  return {};
}

}  // namespace elasticmoe::model
