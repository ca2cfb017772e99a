#include "model/gguf/gguf.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/json.h"
#include "model/config_reader.h"

namespace elasticmoe::model {
namespace {

constexpr std::int64_t kDefaultAlignment = 32;
constexpr std::uint64_t kLeastTensorBytes = 8 + 4 + 8 + 4 + 8;  // name length, rank, one size, type, offset
constexpr std::uint64_t kLeastPairBytes = 8 + 4 + 1;            // key length, type, the smallest value
constexpr std::uint64_t kMaxEntries = 1 << 20;      // tensors or keys; the largest models have some 2,000
constexpr std::uint64_t kMaxListEntries = 1 << 24;  // merges of the largest vocabularies: 450,000

// Numbers of metadata value types.
enum class ValueType : std::uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

struct TypeRow {
  std::uint32_t type;
  Encoding encoding;
};
constexpr std::array<TypeRow, 16> kTypes = {{{0, Encoding::kF32},
                                             {1, Encoding::kF16},
                                             {2, Encoding::kQ4_0},
                                             {3, Encoding::kQ4_1},
                                             {6, Encoding::kQ5_0},
                                             {7, Encoding::kQ5_1},
                                             {8, Encoding::kQ8_0},
                                             {10, Encoding::kQ2K},
                                             {11, Encoding::kQ3K},
                                             {12, Encoding::kQ4K},
                                             {13, Encoding::kQ5K},
                                             {14, Encoding::kQ6K},
                                             {20, Encoding::kIq4Nl},
                                             {23, Encoding::kIq4Xs},
                                             {30, Encoding::kBf16},
                                             {39, Encoding::kMxfp4}}};

// Walks over the header. After a failure everything reads as zero, and `failure` says what was wrong first.
class Cursor {
 public:
  Cursor(std::string_view bytes, std::uint64_t file_bytes) : bytes_(bytes), file_bytes_(file_bytes) {}

  template <class T>
  T Read(std::string_view what) {
    T value{};
    if (!Need(sizeof(T), what)) return value;
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  std::string Text(std::string_view what) {
    const auto size = Read<std::uint64_t>(what);
    if (!Need(size, what)) return {};
    std::string text(bytes_.substr(at_, size));
    at_ += size;
    return text;
  }

  // A number of things, each of at least `least_bytes`: checked against the bytes that are there, so that
  // what is reserved for them is in proportion, and against `limit`.
  std::uint64_t Count(std::uint64_t least_bytes, std::uint64_t limit, std::string_view what) {
    const auto count = Read<std::uint64_t>(what);
    const std::uint64_t room = std::min((bytes_.size() - at_) / least_bytes, limit);
    if (count > room)
      Refuse(fmt::format("{}={} (limit={}, what the rest of these {} bytes can hold)", what, count, room,
                         file_bytes_));
    return failed() ? 0 : count;
  }

  void Refuse(std::string message) {
    if (!failed()) failure_ = std::move(message);
  }
  bool failed() const { return !failure_.empty(); }
  const std::string& failure() const { return failure_; }
  std::uint64_t at() const { return at_; }

 private:
  bool Need(std::uint64_t size, std::string_view what) {
    if (failed()) return false;
    if (size <= bytes_.size() - at_) return true;
    Refuse(
        fmt::format("{}: {} bytes at byte {} of {}; the file is cut off or its header is wrong, fetch it "
                    "again",
                    what, size, at_, file_bytes_));
    return false;
  }

  std::string_view bytes_;
  std::uint64_t file_bytes_;
  std::uint64_t at_ = 0;
  std::string failure_;
};

std::int64_t ReadInteger(Cursor& cursor, ValueType type, std::string_view key) {
  switch (type) {
    case ValueType::kUint8:
      return cursor.Read<std::uint8_t>(key);
    case ValueType::kInt8:
      return cursor.Read<std::int8_t>(key);
    case ValueType::kUint16:
      return cursor.Read<std::uint16_t>(key);
    case ValueType::kInt16:
      return cursor.Read<std::int16_t>(key);
    case ValueType::kUint32:
      return cursor.Read<std::uint32_t>(key);
    case ValueType::kInt32:
      return cursor.Read<std::int32_t>(key);
    case ValueType::kInt64:
      return cursor.Read<std::int64_t>(key);
    default: {
      const auto value = cursor.Read<std::uint64_t>(key);
      if (value > static_cast<std::uint64_t>(INT64_MAX)) cursor.Refuse(fmt::format("{}={}", key, value));
      return static_cast<std::int64_t>(value);
    }
  }
}

bool ReadBool(Cursor& cursor, std::string_view key) {
  const auto value = cursor.Read<std::uint8_t>(key);
  if (value > 1) cursor.Refuse(fmt::format("{}={} (expected 0 or 1)", key, value));
  return value != 0;
}

template <class T, class ReadOne>
std::vector<T> ReadList(Cursor& cursor, std::uint64_t count, ReadOne read) {
  std::vector<T> list;
  list.reserve(count);
  for (std::uint64_t i = 0; i < count && !cursor.failed(); ++i) list.push_back(read());
  return list;
}

std::uint64_t LeastBytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    default:
      return 8;
  }
}

GgufValue ReadArray(Cursor& cursor, const std::string& key) {
  const auto type = static_cast<ValueType>(cursor.Read<std::uint32_t>(key));
  if (type == ValueType::kArray || type > ValueType::kFloat64)
    cursor.Refuse(fmt::format("{}: a list of values of type {} (supported: numbers, booleans, strings)", key,
                              static_cast<std::uint32_t>(type)));
  const std::uint64_t count = cursor.Count(LeastBytes(type), kMaxListEntries, key);
  switch (type) {
    case ValueType::kString:
      return ReadList<std::string>(cursor, count, [&] { return cursor.Text(key); });
    case ValueType::kBool:
      return ReadList<bool>(cursor, count, [&] { return ReadBool(cursor, key); });
    case ValueType::kFloat32:
      return ReadList<double>(cursor, count, [&] { return double{cursor.Read<float>(key)}; });
    case ValueType::kFloat64:
      return ReadList<double>(cursor, count, [&] { return cursor.Read<double>(key); });
    default:
      return ReadList<std::int64_t>(cursor, count, [&] { return ReadInteger(cursor, type, key); });
  }
}

GgufValue ReadValue(Cursor& cursor, const std::string& key) {
  const auto type = static_cast<ValueType>(cursor.Read<std::uint32_t>(key));
  if (type > ValueType::kFloat64)
    cursor.Refuse(fmt::format("{}: a value of the unknown type {}", key, static_cast<std::uint32_t>(type)));
  switch (type) {
    case ValueType::kString:
      return cursor.Text(key);
    case ValueType::kBool:
      return ReadBool(cursor, key);
    case ValueType::kFloat32:
      return double{cursor.Read<float>(key)};
    case ValueType::kFloat64:
      return cursor.Read<double>(key);
    case ValueType::kArray:
      return ReadArray(cursor, key);
    default:
      return ReadInteger(cursor, type, key);
  }
}

// Bytes of a tensor; nullopt where they do not fit 63 bits or its rows are no whole blocks.
std::optional<std::uint64_t> SizeOf(const GgufTensor& tensor) {
  const std::int64_t row = tensor.shape.back();
  if (row % BlockValues(*tensor.encoding) != 0) return std::nullopt;
  std::int64_t bytes = row / BlockValues(*tensor.encoding);
  bool overflow = __builtin_mul_overflow(bytes, std::int64_t{BlockBytes(*tensor.encoding)}, &bytes);
  for (std::size_t i = 0; i + 1 < tensor.shape.size(); ++i)
    overflow = overflow || __builtin_mul_overflow(bytes, tensor.shape[i], &bytes);
  return overflow ? std::nullopt : std::optional(static_cast<std::uint64_t>(bytes));
}

GgufTensor ReadTensor(Cursor& cursor) {
  GgufTensor tensor;
  tensor.name = cursor.Text("tensor name");
  const std::string what = fmt::format("tensor {}", Shown(tensor.name));
  const auto rank = cursor.Read<std::uint32_t>(what);
  if (rank < 1 || rank > 4) cursor.Refuse(fmt::format("{}: {} dimensions (expected 1 to 4)", what, rank));
  for (std::uint32_t i = 0; i < rank && !cursor.failed(); ++i) {
    const auto size = cursor.Read<std::uint64_t>(what);
    if (size < 1 || size > static_cast<std::uint64_t>(INT64_MAX))
      cursor.Refuse(fmt::format("{}: a dimension of {}", what, size));
    tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
  }
  tensor.type = cursor.Read<std::uint32_t>(what);
  tensor.offset = cursor.Read<std::uint64_t>(what);
  tensor.encoding = GgufEncoding(tensor.type);
  if (cursor.failed() || !tensor.encoding) return tensor;
  if (const auto bytes = SizeOf(tensor))
    tensor.bytes = *bytes;
  else
    cursor.Refuse(fmt::format("{}: shape=[{}] is impossible for {} in blocks of {}", what,
                              fmt::join(tensor.shape, ", "), NameOf(*tensor.encoding),
                              BlockValues(*tensor.encoding)));
  return tensor;
}

Status CheckNames(const std::vector<GgufTensor>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const GgufTensor& tensor : tensors) names.push_back(tensor.name);
  std::ranges::sort(names);
  const auto twice = std::ranges::adjacent_find(names);
  if (twice == names.end()) return {};
  return Fail(ErrorCode::kDataLoss, "tensor {} is listed twice", Shown(std::string(*twice)));
}

// Moves offsets from the data section into the file and checks them.
Status PlaceTensors(std::uint64_t data_offset, std::uint64_t alignment, std::uint64_t file_bytes,
                    std::vector<GgufTensor>& tensors) {
  std::vector<const GgufTensor*> order;
  for (GgufTensor& tensor : tensors) {
    if (tensor.offset % alignment != 0)
      return Fail(ErrorCode::kDataLoss, "tensor {}: offset={} is no multiple of general.alignment={}",
                  Shown(tensor.name), tensor.offset, alignment);
    std::uint64_t end = 0;
    const bool overflow = __builtin_add_overflow(tensor.offset, data_offset, &tensor.offset) ||
                          __builtin_add_overflow(tensor.offset, tensor.bytes, &end);
    if (overflow || end > file_bytes)
      return Fail(ErrorCode::kDataLoss,
                  "tensor {}: {} bytes at byte {} of {}; the file is cut off, fetch it again",
                  Shown(tensor.name), tensor.bytes, tensor.offset, file_bytes);
    if (tensor.bytes > 0) order.push_back(&tensor);
  }
  std::ranges::sort(order, {}, &GgufTensor::offset);
  for (std::size_t i = 1; i < order.size(); ++i)
    if (order[i]->offset < order[i - 1]->offset + order[i - 1]->bytes)
      return Fail(ErrorCode::kDataLoss, "tensors {} and {} overlap: {} bytes at {}, and one at {}",
                  Shown(order[i - 1]->name), Shown(order[i]->name), order[i - 1]->bytes, order[i - 1]->offset,
                  order[i]->offset);
  return {};
}

}  // namespace

std::optional<Encoding> GgufEncoding(std::uint32_t type) {
  const auto row = std::ranges::find(kTypes, type, &TypeRow::type);
  return row == kTypes.end() ? std::nullopt : std::optional(row->encoding);
}

std::uint32_t GgufType(Encoding encoding) {
  const auto row = std::ranges::find(kTypes, encoding, &TypeRow::encoding);
  EM_CHECK(row != kTypes.end(), "encoding={}", NameOf(encoding));
  return row->type;
}

const GgufTensor* Gguf::Find(std::string_view name) const {
  const auto at = std::ranges::find(tensors, name, &GgufTensor::name);
  return at == tensors.end() ? nullptr : &*at;
}

Expected<std::int64_t> Gguf::Int(std::string_view key) const {
  if (const auto* value = Get<std::int64_t>(key)) return *value;
  return Fail(ErrorCode::kInvalidArgument, "{}: {} (expected an integer)", key,
              Has(key) ? "of another type" : "missing");
}

Expected<double> Gguf::Number(std::string_view key) const {
  if (const auto* value = Get<double>(key)) return *value;
  if (const auto* value = Get<std::int64_t>(key)) return static_cast<double>(*value);
  return Fail(ErrorCode::kInvalidArgument, "{}: {} (expected a number)", key,
              Has(key) ? "of another type" : "missing");
}

Expected<std::string> Gguf::Text(std::string_view key) const {
  if (const auto* value = Get<std::string>(key)) return *value;
  return Fail(ErrorCode::kInvalidArgument, "{}: {} (expected a string)", key,
              Has(key) ? "of another type" : "missing");
}

Expected<std::span<const std::string>> Gguf::Texts(std::string_view key) const {
  if (const auto* value = Get<std::vector<std::string>>(key)) return std::span<const std::string>(*value);
  return Fail(ErrorCode::kInvalidArgument, "{}: {} (expected a list of strings)", key,
              Has(key) ? "of another type" : "missing");
}

Expected<Gguf> ParseGguf(std::string_view bytes, std::uint64_t file_bytes) {
  Cursor cursor(bytes, file_bytes);
  if (bytes.starts_with("version "))
    return Fail(ErrorCode::kDataLoss, "a git-lfs pointer instead of the model; run `git lfs pull`");
  if (!bytes.starts_with("GGUF"))
    return Fail(ErrorCode::kDataLoss, "no GGUF file: it begins with {} (expected \"GGUF\")",
                Shown(std::string(bytes.substr(0, 4))));
  cursor.Read<std::uint32_t>("magic");
  const auto version = cursor.Read<std::uint32_t>("version");
  if (!cursor.failed() && version != 2 && version != 3)
    return Fail(ErrorCode::kUnimplemented,
                "version={} (supported: 2 and 3, little-endian); convert the model again", version);
  const std::uint64_t tensors = cursor.Count(kLeastTensorBytes, kMaxEntries, "number of tensors");
  const std::uint64_t pairs = cursor.Count(kLeastPairBytes, kMaxEntries, "number of metadata keys");
  Gguf out;
  for (std::uint64_t i = 0; i < pairs && !cursor.failed(); ++i) {
    std::string key = cursor.Text("metadata key");
    GgufValue value = ReadValue(cursor, key);
    if (!cursor.failed() && !out.metadata.try_emplace(key, std::move(value)).second)
      cursor.Refuse(fmt::format("metadata key {} comes twice", Shown(key)));
  }
  for (std::uint64_t i = 0; i < tensors && !cursor.failed(); ++i) out.tensors.push_back(ReadTensor(cursor));
  if (cursor.failed()) return Fail(ErrorCode::kDataLoss, "{}", cursor.failure());

  std::int64_t alignment = kDefaultAlignment;
  if (const auto* value = out.Get<std::int64_t>("general.alignment")) alignment = *value;
  if (alignment < 1 || alignment > (1 << 20))
    return Fail(ErrorCode::kDataLoss, "general.alignment={} (expected 1 to {})", alignment, 1 << 20);
  const auto step = static_cast<std::uint64_t>(alignment);
  const std::uint64_t data_offset = (cursor.at() + step - 1) / step * step;
  EM_RETURN_IF_ERROR(CheckNames(out.tensors));
  EM_RETURN_IF_ERROR(PlaceTensors(data_offset, step, file_bytes, out.tensors));
  return out;
}

}  // namespace elasticmoe::model
