#include "model/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <optional>
#include <system_error>

#include "base/json.h"
#include "model/config_reader.h"

namespace elasticmoe::model {
namespace {

constexpr std::size_t kMaxRank = 16;  // real tensors have 1 to 3 dimensions

// Headers of large models hold tens of thousands of names. They are read event by event: Json's objects
// keep key order at a cost of O(keys) an insertion. Handlers see the events of the values that matter at
// their depth (1 = members of the outermost object) and can skip a value with all that is in it.
class EventReader : public nlohmann::json_sax<Json> {
 public:
  Status Read(std::string_view text) {
    const bool complete =
        Json::sax_parse(text.begin(), text.end(), static_cast<nlohmann::json_sax<Json>*>(this));
    if (error_) return tl::unexpected<Error>(*std::move(error_));
    if (!complete) return Fail(ErrorCode::kDataLoss, "the JSON text is incomplete");
    return {};
  }

 protected:
  virtual bool OnKey(int depth, std::string& name) = 0;
  virtual bool OnText(int depth, std::string& text) = 0;
  virtual bool OnInteger(int depth, std::uint64_t number) = 0;
  virtual bool OnObject(int depth) = 0;        // depth after entering
  virtual bool OnArray(int depth) = 0;         // depth after entering
  virtual bool OnClose(int depth) = 0;         // depth before leaving
  virtual bool OnOther(const char* what) = 0;  // any other kind of value

  // From OnKey: the value that follows is passed over.
  void SkipValue() { skip_below_ = depth_; }

  template <class... Args>
  bool Refuse(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
    error_ = Error{code, fmt::format(format, std::forward<Args>(args)...)};
    return false;
  }

 private:
  // True while inside of a skipped value; a skipped scalar ends the skipping.
  bool SkippingScalar() {
    if (skip_below_ < 0) return false;
    if (depth_ == skip_below_) skip_below_ = -1;
    return true;
  }
  bool Enter() {
    ++depth_;
    return skip_below_ >= 0;
  }
  bool Leave() {
    const int left = depth_--;
    if (skip_below_ < 0) return OnClose(left);
    if (depth_ == skip_below_) skip_below_ = -1;
    return true;
  }

  bool null() override { return SkippingScalar() || OnOther("null"); }
  bool boolean(bool) override { return SkippingScalar() || OnOther("a boolean"); }
  bool number_integer(number_integer_t) override { return SkippingScalar() || OnOther("a negative number"); }
  bool number_unsigned(number_unsigned_t n) override { return SkippingScalar() || OnInteger(depth_, n); }
  bool number_float(number_float_t, const string_t&) override {
    return SkippingScalar() || OnOther("a number that is no 64-bit integer");
  }
  bool string(string_t& text) override { return SkippingScalar() || OnText(depth_, text); }
  bool binary(binary_t&) override { return OnOther("binary"); }
  bool start_object(std::size_t) override { return Enter() || OnObject(depth_); }
  bool start_array(std::size_t) override { return Enter() || OnArray(depth_); }
  bool end_object() override { return Leave(); }
  bool end_array() override { return Leave(); }
  bool key(string_t& name) override { return skip_below_ >= 0 || OnKey(depth_, name); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return Refuse(ErrorCode::kDataLoss, "no JSON at byte {}", position);
  }

  int depth_ = 0;
  int skip_below_ = -1;  // depth of the object whose member is being skipped; -1 = none is
  std::optional<Error> error_;
};

class HeaderReader final : public EventReader {
 public:
  std::vector<SafetensorsTensor> tensors;

 private:
  enum Field { kNone = 0, kType = 1, kShape = 2, kOffsets = 4 };

  bool Bad(std::string_view what) {
    if (tensors.empty()) return Refuse(ErrorCode::kDataLoss, "header: found {} (expected an object)", what);
    return Refuse(ErrorCode::kDataLoss, "tensor {}: {} (expected dtype, shape and data_offsets)",
                  Shown(tensors.back().name), what);
  }

  bool OnKey(int depth, std::string& name) override {
    if (depth == 1) {
      if (name == "__metadata__") {
        SkipValue();
        return true;
      }
      tensors.emplace_back().name = std::move(name);
      seen_ = kNone;
      return true;
    }
    field_ = name == "dtype" ? kType : name == "shape" ? kShape : name == "data_offsets" ? kOffsets : kNone;
    if (field_ == kNone) {
      SkipValue();
      return true;
    }
    if (seen_ & field_) return Bad(fmt::format("{} comes twice", name));
    seen_ |= field_;
    offsets_ = 0;
    return true;
  }

  bool OnText(int depth, std::string& text) override {
    if (depth != 2 || field_ != kType) return Bad("found a string in the wrong place");
    tensors.back().dtype = std::move(text);
    return true;
  }

  bool OnInteger(int depth, std::uint64_t number) override {
    if (depth != 3) return Bad("found a number in the wrong place");
    SafetensorsTensor& tensor = tensors.back();
    if (field_ == kShape) {
      if (number > static_cast<std::uint64_t>(INT64_MAX)) return Bad(fmt::format("shape holds {}", number));
      if (tensor.shape.size() == kMaxRank)
        return Bad(fmt::format("shape has more than {} dimensions", kMaxRank));
      tensor.shape.push_back(static_cast<std::int64_t>(number));
      return true;
    }
    if (offsets_ == 2) return Bad("data_offsets has more than 2 numbers");
    (offsets_++ == 0 ? tensor.begin : tensor.end) = number;
    return true;
  }

  bool OnObject(int depth) override { return depth <= 2 || Bad("found an object in the wrong place"); }
  bool OnArray(int depth) override {
    return (depth == 3 && field_ != kType) || Bad("found a list in the wrong place");
  }

  bool OnClose(int depth) override {
    if (depth == 3 && field_ == kOffsets && offsets_ != 2) return Bad("data_offsets has less than 2 numbers");
    if (depth == 2 && seen_ != (kType | kShape | kOffsets)) return Bad("a field is missing");
    return true;
  }

  bool OnOther(const char* what) override { return Bad(fmt::format("found {}", what)); }

  int seen_ = kNone;
  int field_ = kNone;
  int offsets_ = 0;
};

class WeightMapReader final : public EventReader {
 public:
  std::vector<std::pair<std::string, std::string>> entries;
  bool found = false;

 private:
  bool Bad(std::string_view what) {
    return Refuse(ErrorCode::kInvalidArgument, "weight_map: found {} (expected tensor names with file names)",
                  what);
  }

  bool OnKey(int depth, std::string& name) override {
    if (depth == 2) {
      entries.emplace_back(std::move(name), "");
    } else if (name != "weight_map") {
      SkipValue();
    } else if (std::exchange(found, true)) {
      return Refuse(ErrorCode::kInvalidArgument, "weight_map comes twice");
    }
    return true;
  }

  bool OnText(int depth, std::string& text) override {
    if (depth != 2) return Bad("a string");
    static constexpr std::string_view kSuffix = ".safetensors";
    const bool plain = text.find_first_of(std::string_view("/\\\0", 3)) == text.npos && text[0] != '.' &&
                       text.size() > kSuffix.size() && std::string_view(text).ends_with(kSuffix);
    if (!plain)
      return Refuse(
          ErrorCode::kInvalidArgument,
          "weight_map: tensor {} is in {} (expected the plain name of a .safetensors file beside the index)",
          Shown(entries.back().first), Shown(text));
    entries.back().second = std::move(text);
    return true;
  }

  bool OnInteger(int, std::uint64_t) override { return Bad("a number"); }
  bool OnObject(int depth) override { return depth <= 2 || Bad("an object"); }
  bool OnArray(int) override { return Bad("a list"); }
  bool OnClose(int) override { return true; }
  bool OnOther(const char* what) override { return Bad(what); }
};

// Bits of one element; 0 for a dtype that is newer than this table.
std::uint64_t BitsOf(std::string_view dtype) {
  struct Row {
    std::string_view name;
    std::uint64_t bits;
  };
  static constexpr std::array<Row, 18> kRows = {{{"BF16", 16},
                                                 {"F16", 16},
                                                 {"F32", 32},
                                                 {"BOOL", 8},
                                                 {"U8", 8},
                                                 {"I8", 8},
                                                 {"F8_E5M2", 8},
                                                 {"F8_E4M3", 8},
                                                 {"F8_E8M0", 8},
                                                 {"I16", 16},
                                                 {"U16", 16},
                                                 {"I32", 32},
                                                 {"U32", 32},
                                                 {"F64", 64},
                                                 {"I64", 64},
                                                 {"U64", 64},
                                                 {"F4", 4},
                                                 {"C64", 64}}};
  for (const Row& row : kRows)
    if (row.name == dtype) return row.bits;
  return 0;
}

Status CheckSize(const SafetensorsTensor& tensor) {
  if (tensor.begin > tensor.end)
    return Fail(ErrorCode::kDataLoss, "tensor {}: data_offsets=[{}, {}] end before they begin",
                Shown(tensor.name), tensor.begin, tensor.end);
  const std::uint64_t unit = BitsOf(tensor.dtype);
  if (unit == 0) return {};
  std::uint64_t bits = unit;
  bool overflow = false;
  for (const std::int64_t size : tensor.shape)
    overflow = overflow || __builtin_mul_overflow(bits, static_cast<std::uint64_t>(size), &bits);
  if (overflow || bits % 8 != 0 || bits / 8 != tensor.end - tensor.begin)
    return Fail(ErrorCode::kDataLoss,
                "tensor {}: data_offsets=[{}, {}] hold {} bytes, dtype {} and shape [{}] say {}",
                Shown(tensor.name), tensor.begin, tensor.end, tensor.end - tensor.begin, tensor.dtype,
                fmt::join(tensor.shape, ", "), overflow ? "more than 2^61" : fmt::format("{}", bits / 8));
  return {};
}

Status CheckNames(const std::vector<SafetensorsTensor>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const SafetensorsTensor& tensor : tensors) names.push_back(tensor.name);
  std::ranges::sort(names);
  const auto twice = std::ranges::adjacent_find(names);
  if (twice == names.end()) return {};
  return Fail(ErrorCode::kDataLoss, "tensor {} is listed twice", Shown(std::string(*twice)));
}

Status CheckRanges(const std::vector<SafetensorsTensor>& tensors, std::uint64_t data_bytes) {
  std::vector<const SafetensorsTensor*> order;
  for (const SafetensorsTensor& tensor : tensors)
    if (tensor.end > tensor.begin) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](const auto* tensor) { return std::pair(tensor->begin, tensor->end); });
  for (std::size_t i = 1; i < order.size(); ++i)
    if (order[i]->begin < order[i - 1]->end)
      return Fail(ErrorCode::kDataLoss, "tensors {} and {} overlap: data_offsets=[{}, {}] and [{}, {}]",
                  Shown(order[i - 1]->name), Shown(order[i]->name), order[i - 1]->begin, order[i - 1]->end,
                  order[i]->begin, order[i]->end);
  if (!order.empty() && order.back()->end > data_bytes)
    return Fail(
        ErrorCode::kDataLoss,
        "tensor {} ends at byte {} of {} bytes of data: {} bytes are missing; the file is cut off or its "
        "header is wrong, fetch it again",
        Shown(order.back()->name), order.back()->end, data_bytes, order.back()->end - data_bytes);
  return {};
}

}  // namespace

Expected<std::vector<SafetensorsTensor>> ParseSafetensorsHeader(std::string_view header_json,
                                                                std::uint64_t data_bytes) {
  HeaderReader reader;
  EM_RETURN_IF_ERROR(reader.Read(header_json));
  for (const SafetensorsTensor& tensor : reader.tensors) EM_RETURN_IF_ERROR(CheckSize(tensor));
  EM_RETURN_IF_ERROR(CheckNames(reader.tensors));
  EM_RETURN_IF_ERROR(CheckRanges(reader.tensors, data_bytes));
  return std::move(reader.tensors);
}

Expected<std::vector<std::pair<std::string, std::string>>> ParseWeightMap(std::string_view index_json) {
  WeightMapReader reader;
  if (auto status = reader.Read(index_json); !status) {
    status.error().code = ErrorCode::kInvalidArgument;
    return tl::unexpected<Error>(std::move(status.error()));
  }
  if (reader.entries.empty())
    return Fail(ErrorCode::kInvalidArgument, "weight_map is {} (expected tensor names with file names)",
                reader.found ? "empty" : "missing");
  return std::move(reader.entries);
}

Expected<SafetensorsFile> ReadSafetensors(const std::filesystem::path& path) {
  const std::string doing = fmt::format("reading {}", path.string());
  std::error_code code;
  const auto status = std::filesystem::status(path, code);
  if (status.type() == std::filesystem::file_type::not_found)
    return Fail(ErrorCode::kNotFound, "{}: no such file; fetch the checkpoint again", doing);
  if (!code && !std::filesystem::is_regular_file(status))
    return Fail(ErrorCode::kInvalidArgument, "{}: not a regular file", doing);
  SafetensorsFile file;
  if (!code) file.file_bytes = std::filesystem::file_size(path, code);
  if (code) return Fail(ErrorCode::kUnavailable, "{}: {}", doing, code.message());
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return Fail(ErrorCode::kUnavailable, "{}: cannot be opened; check its permissions", doing);

  std::array<unsigned char, 8> prefix{};
  if (file.file_bytes < prefix.size())
    return Fail(ErrorCode::kDataLoss, "{}: {} bytes are no safetensors file (at least 8); fetch it again",
                doing, file.file_bytes);
  stream.read(reinterpret_cast<char*>(prefix.data()), prefix.size());
  if (std::memcmp(prefix.data(), "version ", prefix.size()) == 0)
    return Fail(ErrorCode::kDataLoss, "{}: a git-lfs pointer instead of the weights; run `git lfs pull`",
                doing);
  std::uint64_t header_bytes = 0;
  for (std::size_t i = prefix.size(); i-- > 0;) header_bytes = header_bytes << 8 | prefix[i];
  if (header_bytes > kMaxSafetensorsHeaderBytes)
    return Fail(ErrorCode::kDataLoss, "{}: header length={} (limit={}); this is no safetensors file", doing,
                header_bytes, kMaxSafetensorsHeaderBytes);
  const std::uint64_t rest = file.file_bytes - prefix.size();
  if (header_bytes > rest)
    return Fail(
        ErrorCode::kDataLoss,
        "{}: header length={} but {} bytes follow: {} bytes are missing; the file is cut off, fetch it again",
        doing, header_bytes, rest, header_bytes - rest);
  std::string header(header_bytes, '\0');
  stream.read(header.data(), static_cast<std::streamsize>(header_bytes));
  if (!stream || stream.gcount() != static_cast<std::streamsize>(header_bytes))
    return Fail(ErrorCode::kUnavailable, "{}: the header cannot be read", doing);

  file.data_offset = prefix.size() + header_bytes;
  auto tensors = ParseSafetensorsHeader(header, rest - header_bytes);
  if (!tensors) return Within(doing, std::move(tensors.error()));
  file.tensors = *std::move(tensors);
  return file;
}

}  // namespace elasticmoe::model
