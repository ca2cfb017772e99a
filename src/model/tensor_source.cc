#include "model/tensor_source.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/check.h"

namespace elasticmoe::model {

std::uint64_t RowOrder::StoredRow(std::uint64_t row) const {
  if (pairs_head_dim == 0) return first + row * step;
  const std::uint64_t half = pairs_head_dim / 2;
  const std::uint64_t in_head = row % pairs_head_dim;
  return row - in_head + in_head % half * 2 + in_head / half;
}

Expected<PlainRows> RowReader::Read(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                                    std::uint64_t count) {
  EM_CHECK(k % BlockValues(tensor.encoding) == 0, "k={} encoding={}", k, NameOf(tensor.encoding));
  if (tensor.order.columns > 0) return ReadColumns(tensor, k, begin, count);
  const std::uint64_t row_bytes = EncodedBytes(tensor.encoding, k);
  // All that lies between the first and the last of the rows: in every order that is a few rows more at most,
  // or every other row.
  std::uint64_t low = std::numeric_limits<std::uint64_t>::max(), high = 0;
  for (std::uint64_t row = begin; row < begin + count; ++row) {
    const std::uint64_t at = tensor.order.StoredRow(row);
    low = std::min(low, at);
    high = std::max(high, at + 1);
  }
  stored_.resize((high - low) * row_bytes);
  EM_RETURN_IF_ERROR(read_(tensor.file, tensor.offset + low * row_bytes, stored_.data(), stored_.size()));

  const auto type = PlainType(tensor.encoding);
  if (type && tensor.order.InOrder() && !tensor.scales) return PlainRows{*type, stored_.data()};
  const bool decode = !type || tensor.scales;
  const std::uint64_t plain_row = decode ? k * sizeof(float) : row_bytes;
  plain_.resize(count * plain_row);
  for (std::uint64_t row = 0; row < count; ++row) {
    const std::byte* from = stored_.data() + (tensor.order.StoredRow(begin + row) - low) * row_bytes;
    std::byte* to = plain_.data() + row * plain_row;
    if (decode)
      Decode(tensor.encoding, from, k, reinterpret_cast<float*>(to));
    else
      std::memcpy(to, from, row_bytes);
  }
  if (tensor.scales) EM_RETURN_IF_ERROR(Scale(tensor, k, begin, count, low, high));
  return PlainRows{decode ? DType::kF32 : *type, plain_.data()};
}

Expected<PlainRows> RowReader::ReadColumns(const TensorData& tensor, std::uint64_t k, std::uint64_t begin,
                                           std::uint64_t count) {
  const auto type = PlainType(tensor.encoding);
  EM_CHECK(type && !tensor.scales && count > 0, "encoding={}", NameOf(tensor.encoding));
  const RowOrder& order = tensor.order;
  const std::uint64_t size = BlockBytes(tensor.encoding);
  const std::uint64_t low = order.StoredRow(begin), high = order.StoredRow(begin + count - 1) + 1;
  stored_.resize((high - low) * size);
  plain_.resize(count * k * size);
  for (std::uint64_t i = 0; i < k; ++i) {
    EM_RETURN_IF_ERROR(
        read_(tensor.file, tensor.offset + (i * order.columns + low) * size, stored_.data(), stored_.size()));
    for (std::uint64_t row = 0; row < count; ++row)
      std::memcpy(plain_.data() + (row * k + i) * size,
                  stored_.data() + (order.StoredRow(begin + row) - low) * size, size);
  }
  return PlainRows{*type, plain_.data()};
}

Status RowReader::Scale(const TensorData& tensor, std::uint64_t k, std::uint64_t begin, std::uint64_t count,
                        std::uint64_t low, std::uint64_t high) {
  const BlockScales& scales = *tensor.scales;
  const std::uint64_t columns = (k + scales.block_columns - 1) / scales.block_columns;
  const std::uint64_t first = low / scales.block_rows;
  const std::uint64_t rows = (high - 1) / scales.block_rows - first + 1;
  const std::uint64_t row_bytes = EncodedBytes(scales.encoding, columns);
  stored_.resize(rows * row_bytes);  // the values are decoded: its memory is free
  EM_RETURN_IF_ERROR(read_(scales.file, scales.offset + first * row_bytes, stored_.data(), stored_.size()));
  factors_.resize(rows * columns);
  Decode(scales.encoding, stored_.data(), factors_.size(), factors_.data());
  for (std::uint64_t row = 0; row < count; ++row) {
    const std::uint64_t block = tensor.order.StoredRow(begin + row) / scales.block_rows - first;
    const float* factors = &factors_[block * columns];
    float* values = reinterpret_cast<float*>(plain_.data()) + row * k;
    for (std::uint64_t column = 0; column < columns; ++column) {
      const std::uint64_t end = std::min<std::uint64_t>(k, (column + 1) * scales.block_columns);
      for (std::uint64_t i = column * scales.block_columns; i < end; ++i) values[i] *= factors[column];
    }
  }
  return {};
}

}  // namespace elasticmoe::model
