#include "runtime/hmm/weight_files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::uint64_t kBlock = 4096;  // what O_DIRECT wants everything to be a multiple of
constexpr std::size_t kRingBytes = std::size_t{32} << 20;
constexpr int kMostReads = 64;

std::uint64_t Down(std::uint64_t value, std::uint64_t unit) {
  return value / unit * unit;
}
std::uint64_t Up(std::uint64_t value, std::uint64_t unit) {
  return Down(value + unit - 1, unit);
}

}  // namespace

Expected<std::unique_ptr<WeightFiles>> WeightFiles::Open(const std::vector<std::filesystem::path>& paths) {
  std::unique_ptr<WeightFiles> files(new WeightFiles());
  for (const auto& path : paths) {
    File& file = files->files_.emplace_back();
    file.path = path;
    file.cached = Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat info = {};
    if (!file.cached || ::fstat(file.cached.get(), &info) != 0)
      return Fail(ErrorCode::kUnavailable, "opening {}: {}", path.string(), std::strerror(errno));
    file.bytes = static_cast<std::uint64_t>(info.st_size);
    // Through the descriptor: the name may be gone by now.
    const std::string again = fmt::format("/proc/self/fd/{}", file.cached.get());
    file.direct = Fd(::open(again.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
    if (!file.direct)
      LogInfo("{}: O_DIRECT is refused ({}): what is not in the page cache is read through it", path.string(),
              std::strerror(errno));
    if (file.bytes == 0) continue;
    void* map = ::mmap(nullptr, file.bytes, PROT_NONE, MAP_SHARED, file.cached.get(), 0);
    if (map != MAP_FAILED) file.map = static_cast<std::byte*>(map);
  }
  return files;
}

WeightFiles::~WeightFiles() {
  for (const File& file : files_)
    if (file.map != nullptr) ::munmap(file.map, file.bytes);
}

void WeightFiles::SetPieces(std::vector<FilePiece> pieces) {
  pieces_ = std::move(pieces);
}

bool WeightFiles::InPageCache(const FilePiece& piece) const {
  if (piece.bytes == 0) return true;
  const File& file = files_[piece.file];
  if (file.map == nullptr || piece.offset + piece.bytes > file.bytes) return false;
  const std::uint64_t begin = Down(piece.offset, kBlock);
  unsigned char pages[512];
  for (std::uint64_t at = begin; at < piece.offset + piece.bytes; at += sizeof(pages) * kBlock) {
    const std::uint64_t bytes = std::min(piece.offset + piece.bytes - at, sizeof(pages) * kBlock);
    if (::mincore(file.map + at, bytes, pages) != 0) return false;
    const std::size_t count = Up(bytes, kBlock) / kBlock;
    if (!std::all_of(pages, pages + count, [](unsigned char page) { return (page & 1) != 0; })) return false;
  }
  return true;
}

void WeightFiles::MakeRing() {
  std::uint64_t largest = 0;
  for (const FilePiece& piece : pieces_) largest = std::max(largest, piece.bytes);
  const std::size_t stride = Up(largest, kBlock) + 2 * kBlock;
  const auto count = std::clamp<std::size_t>(kRingBytes / stride, 2, kMostReads);
  ring_ = {static_cast<std::byte*>(std::aligned_alloc(kBlock, count * stride)), std::free};
  EM_CHECK(ring_ != nullptr, "bytes={}", count * stride);
  for (std::size_t i = 0; i < count; ++i) {
    buffers_.push_back({ring_.get() + i * stride, 0});
    free_.push_back(static_cast<int>(i));
  }
  reads_ = AsyncReads::Make(static_cast<int>(count));
}

std::uint64_t WeightFiles::ReadFrom(const FilePiece& piece) const {
  return Down(piece.offset, kBlock);
}

void WeightFiles::Start(int buffer, std::size_t index) {
  const FilePiece& piece = pieces_[index];
  const File& file = files_[piece.file];
  buffers_[buffer].piece = index;
  const std::uint64_t from = ReadFrom(piece);
  reads_->Submit(static_cast<std::size_t>(buffer), file.direct ? file.direct.get() : file.cached.get(), from,
                 buffers_[buffer].data, Up(piece.offset + piece.bytes, kBlock) - from);
}

std::optional<std::size_t> WeightFiles::Fill() {
  while (next_ < pieces_.size()) {
    const FilePiece& piece = pieces_[next_];
    if (InPageCache(piece)) {
      totals_.cached_bytes += piece.bytes;
      return next_++;
    }
    if (reads_ == nullptr) MakeRing();
    if (free_.empty()) break;
    Start(free_.back(), next_);
    free_.pop_back();
    totals_.disk_bytes += piece.bytes;
    ++next_;
  }
  return std::nullopt;
}

Expected<bool> WeightFiles::Next(Piece& piece) {
  std::optional<std::size_t> cached;
  std::uint64_t got = 0;
  {
    // Held while waiting for the disk, too: whoever else comes would wait for the same.
    const std::scoped_lock lock(mutex_);
    if (piece.buffer_ >= 0) free_.push_back(std::exchange(piece.buffer_, -1));
    cached = Fill();
    if (cached) {
      piece.index_ = *cached;
    } else {
      auto done = reads_ == nullptr ? std::nullopt : reads_->Take(true);
      if (!done) return false;
      piece.buffer_ = static_cast<int>(done->tag);
      piece.index_ = buffers_[piece.buffer_].piece;
      got = static_cast<std::uint64_t>(std::max<std::int64_t>(done->bytes, 0));
    }
  }
  const FilePiece& wanted = pieces_[piece.index_];
  if (cached) {
    piece.own_.resize(wanted.bytes);
    piece.data_ = piece.own_.data();
    EM_RETURN_IF_ERROR(ReadAt(wanted.file, wanted.offset, piece.own_.data(), wanted.bytes));
    return true;
  }
  // What came short (the file's end, a device that wants larger blocks, an error) is read the ordinary way,
  // which works or says what is wrong.
  const std::uint64_t lead = wanted.offset - ReadFrom(wanted);
  std::byte* data = buffers_[piece.buffer_].data + lead;
  got = got > lead ? std::min(got - lead, wanted.bytes) : 0;
  piece.data_ = data;
  EM_RETURN_IF_ERROR(ReadAt(wanted.file, wanted.offset + got, data + got, wanted.bytes - got));
  return true;
}

Status WeightFiles::ReadAt(int index, std::uint64_t offset, std::byte* out, std::uint64_t bytes) const {
  const File& file = files_[index];
  while (bytes > 0) {
    const ssize_t got = ::pread(file.cached.get(), out, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      return Fail(ErrorCode::kUnavailable, "reading {}: {}", file.path.string(), std::strerror(errno));
    if (got == 0)
      return Fail(ErrorCode::kDataLoss,
                  "reading {}: it ends at byte {}, {} bytes of a tensor are missing; fetch it again",
                  file.path.string(), offset, bytes);
    out += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
  return {};
}

}  // namespace elasticmoe::runtime
