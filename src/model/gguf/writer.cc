#include "model/gguf/writer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <system_error>

#include "base/check.h"
#include "model/gguf/gguf.h"
#include "model/numbers.h"

namespace elasticmoe::model {
namespace {

constexpr std::uint64_t kAlignment = 32;  // general.alignment where nothing is said

std::uint64_t Aligned(std::uint64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

template <class T>
void Put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void PutText(std::string& out, std::string_view text) {
  Put<std::uint64_t>(out, text.size());
  out += text;
}

// The type number and the value.
struct PutValue {
  std::string& out;

  void operator()(std::uint32_t value) const { Put<std::uint32_t>(out, 4), Put(out, value); }
  void operator()(float value) const { Put<std::uint32_t>(out, 6), Put(out, value); }
  void operator()(bool value) const { Put<std::uint32_t>(out, 7), Put<std::uint8_t>(out, value ? 1 : 0); }
  void operator()(const std::string& value) const { Put<std::uint32_t>(out, 8), PutText(out, value); }
  void operator()(const std::vector<std::string>& list) const {
    List(8, list.size());
    for (const std::string& text : list) PutText(out, text);
  }
  void operator()(const std::vector<std::int32_t>& list) const {
    List(5, list.size());
    for (const std::int32_t value : list) Put(out, value);
  }
  void operator()(const std::vector<float>& list) const {
    List(6, list.size());
    for (const float value : list) Put(out, value);
  }

 private:
  void List(std::uint32_t type, std::size_t count) const {
    Put<std::uint32_t>(out, 9), Put(out, type), Put<std::uint64_t>(out, count);
  }
};

constexpr int kBlock = 32;  // values that share a scale

// Loops of fixed length over arrays below: compilers make vectors of them.

// By size; the first one of two.
float Largest(const float* values) {
  float most = values[0], least = values[0];
  for (int i = 0; i < kBlock; ++i) {
    most = values[i] > most ? values[i] : most;
    least = values[i] < least ? values[i] : least;
  }
  if (-least != most) return -least > most ? least : most;
  return *std::find_if(values, values + kBlock, [&](float value) { return std::fabs(value) == most; });
}

void EncodeQ80(const float* values, std::string& out) {
  const float d = std::fabs(Largest(values)) / 127.0F;
  std::array<std::int8_t, kBlock> levels{};
  for (int i = 0; d != 0 && i < kBlock; ++i) {
    const float exact = values[i] / d;  // beyond 127 where d has few bits left; a NaN becomes an end
    const float below = exact < 127.0F ? exact : 127.0F, level = below > -127.0F ? below : -127.0F;
    const auto whole = static_cast<std::int32_t>(level);
    const float rest = level - static_cast<float>(whole);
    levels[i] = static_cast<std::int8_t>(whole + (rest >= 0.5F ? 1 : 0) - (rest <= -0.5F ? 1 : 0));
  }
  Put(out, FloatToHalf(d));
  Put(out, levels);
}

// The value of largest size becomes -8, the end of the levels that reaches furthest.
void EncodeQ40(const float* values, std::string& out) {
  const float d = Largest(values) / -8.0F;
  std::array<std::int32_t, kBlock> levels;
  levels.fill(8);
  for (int i = 0; d != 0 && i < kBlock; ++i) {
    const float exact = values[i] / d + 8.5F;
    const float above = exact > 0.0F ? exact : 0.0F, level = above < 15.0F ? above : 15.0F;
    levels[i] = static_cast<std::int32_t>(level);  // rounded down
  }
  std::array<std::uint8_t, kBlock / 2> pairs;
  for (int i = 0; i < kBlock / 2; ++i)
    pairs[i] = static_cast<std::uint8_t>(levels[i] | levels[i + kBlock / 2] << 4);
  Put(out, FloatToHalf(d));
  Put(out, pairs);
}

template <std::uint16_t Round(float)>
void EncodeEach(const float* values, std::size_t count, std::string& out) {
  const std::size_t before = out.size();
  out.resize(before + count * sizeof(std::uint16_t));
  char* at = out.data() + before;
  for (std::size_t i = 0; i < count; ++i, at += sizeof(std::uint16_t)) {
    const std::uint16_t bits = Round(values[i]);
    std::memcpy(at, &bits, sizeof(bits));
  }
}

}  // namespace

void GgufWriter::AddTensor(std::string name, std::vector<std::int64_t> shape, Encoding encoding) {
  EM_CHECK(!shape.empty() && shape.back() % BlockValues(encoding) == 0, "tensor={}", name);
  std::uint64_t values = 1;
  for (const std::int64_t size : shape) values *= static_cast<std::uint64_t>(size);
  tensors_.push_back({std::move(name), std::move(shape), encoding, EncodedBytes(encoding, values)});
}

std::uint64_t GgufWriter::DataBytes() const {
  std::uint64_t bytes = 0;
  for (const Tensor& tensor : tensors_) bytes += Aligned(tensor.bytes);
  return bytes;
}

std::string GgufWriter::Header() const {
  std::string out = "GGUF";
  Put<std::uint32_t>(out, 3);
  Put<std::uint64_t>(out, tensors_.size());
  Put<std::uint64_t>(out, metadata_.size());
  for (const auto& [key, value] : metadata_) {
    PutText(out, key);
    std::visit(PutValue{out}, value);
  }
  std::uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    PutText(out, tensor.name);
    Put<std::uint32_t>(out, static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size)
      Put<std::uint64_t>(out, static_cast<std::uint64_t>(*size));
    Put<std::uint32_t>(out, GgufType(tensor.encoding));
    Put<std::uint64_t>(out, offset);
    offset += Aligned(tensor.bytes);
  }
  out.resize(Aligned(out.size()), '\0');
  return out;
}

Status GgufWriter::Write(const std::filesystem::path& path,
                         const std::function<Status(std::size_t, const Append&)>& fill) const {
  std::filesystem::path partial = path;
  partial += ".partial";
  std::error_code code;
  const auto write = [&]() -> Status {
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    file << Header();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      std::uint64_t written = 0;
      EM_RETURN_IF_ERROR(fill(i, [&](std::string_view bytes) {
        file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        written += bytes.size();
      }));
      EM_CHECK(written == tensors_[i].bytes, "tensor={} written={}", tensors_[i].name, written);
      file << std::string(Aligned(written) - written, '\0');
      if (!file) break;
    }
    file.close();
    if (!file)
      return Fail(ErrorCode::kUnavailable, "writing {}: it cannot be written; is there space for {} bytes?",
                  partial.string(), DataBytes());
    std::filesystem::rename(partial, path, code);
    if (code) return Fail(ErrorCode::kUnavailable, "writing {}: {}", path.string(), code.message());
    return {};
  };
  Status status = write();
  if (!status) std::filesystem::remove(partial, code);
  return status;
}

void Encode(Encoding encoding, const float* values, std::size_t count, std::string& out) {
  switch (encoding) {
    case Encoding::kF32:
      out.append(reinterpret_cast<const char*>(values), count * sizeof(float));
      return;
    case Encoding::kF16:
      return EncodeEach<FloatToHalf>(values, count, out);
    case Encoding::kBf16:
      return EncodeEach<FloatToBf16>(values, count, out);
    case Encoding::kQ8_0:
      for (std::size_t i = 0; i < count; i += kBlock) EncodeQ80(values + i, out);
      return;
    case Encoding::kQ4_0:
      for (std::size_t i = 0; i < count; i += kBlock) EncodeQ40(values + i, out);
      return;
    default:
      EM_CHECK(false, "encoding={}", NameOf(encoding));
  }
}

}  // namespace elasticmoe::model
