// RunExperts: plan pieces, gather rows, gate and up, down.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "compute/forward.h"
#include "compute/quantized_row.h"
#include "compute/work.h"

namespace elasticmoe::compute {
namespace {

// Some panels of one expert with all of its rows, so that its weights are read once.
struct Piece {
  int batch, first_panel, last_panel;
};

// Takes aligned arrays out of a buffer, or out of none to learn how large it must be.
class Carver {
 public:
  explicit Carver(std::uintptr_t base) : base_(base) {}
  template <class T>
  T* Take(std::size_t count) {
    T* taken = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return taken;
  }
  std::size_t Used() const { return used_; }

 private:
  std::uintptr_t base_;
  std::size_t used_ = 0;
};

// Numbers [0, count), each taken once: by some threads from the front, by the others from the back.
class BothEnds {
 public:
  explicit BothEnds(int count) : left_(static_cast<std::uint32_t>(count)) {}
  // -1: none is left.
  int Take(bool front) {
    std::uint64_t now = left_.load(std::memory_order_relaxed);
    for (;;) {
      const std::uint64_t first = now >> 32, end = now & 0xffffffff;
      if (first == end) return -1;
      const std::uint64_t then = front ? (first + 1) << 32 | end : first << 32 | (end - 1);
      if (left_.compare_exchange_weak(now, then, std::memory_order_relaxed))
        return static_cast<int>(front ? first : end - 1);
    }
  }

 private:
  std::atomic<std::uint64_t> left_;  // first << 32 | end
};

// Distance of rows in memory: whole cache lines, and never such that all rows fall on the same few sets of a
// cache.
std::size_t RowBytes(std::size_t bytes) {
  const std::size_t lines = (bytes + kAlign - 1) / kAlign;
  return (lines % 8 == 0 ? lines + 1 : lines) * kAlign;
}

class ExpertRun {
 public:
  ExpertRun(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads,
            std::span<const ExpertBatch> batches)
      : spec_(spec),
        kernels_(kernels),
        threads_(threads),
        batches_(batches),
        quantized_(batches[0].weights.gate.format != WeightFormat::kBf16) {
    std::size_t gate_cost = 0, down_cost = 0, width = 0;
    for (const ExpertBatch& batch : batches) {
      rows_ += batch.rows.size();
      most_rows_ = std::max(most_rows_, batch.rows.size());
      width = std::max(width, static_cast<std::size_t>(batch.weights.gate.n));
      gate_cost += GateCost(batch);
      down_cost += DownCost(batch);
    }
    // Four pieces a thread keep the load even; an expert of its own is a piece at least.
    const std::size_t all = std::max<std::size_t>(1, gate_cost);
    piece_cost_ = threads.Size() == 1 ? all : std::max(kPieceBytes, all / (threads.Size() * 4));
    most_pieces_ = std::max(gate_cost, down_cost) / piece_cost_ + 1 + batches.size();
    in_bytes_ = RowBytes(InputBytes(spec.hidden));
    hidden_bytes_ = RowBytes(InputBytes(static_cast<int>(width)));
  }

  void Run(std::vector<std::byte>& scratch) {
    if (rows_ == 0) return;
    const std::size_t needed = Carve(0) + kAlign;
    if (scratch.size() < needed) scratch.resize(needed);
    Carve((reinterpret_cast<std::uintptr_t>(scratch.data()) + kAlign - 1) / kAlign * kAlign);
    Plan();
    if (gather_) Gather();
    // Where every expert is one piece, a thread runs it from front to back: its weights are one stream, and
    // nobody waits in between. Experts of many rows compute, those of few read memory: half of the threads
    // begin with these, so that neither the arithmetic nor the memory waits for the other.
    const auto visited =
        std::ranges::count_if(batches_, [](const auto& batch) { return !batch.rows.empty(); });
    if (gate_count_ == visited && down_count_ == visited) {
      BothEnds pieces(gate_count_);
      threads_.Run(std::min(threads_.Size(), gate_count_), [&](int thread) {
        for (int i; (i = pieces.Take(thread % 2 == 0)) >= 0;) {
          RunGateUp(gate_pieces_[i]);
          RunDown(down_pieces_[i]);
        }
      });
      return;
    }
    threads_.Run(gate_count_, [&](int i) { RunGateUp(gate_pieces_[i]); });
    threads_.Run(down_count_, [&](int i) { RunDown(down_pieces_[i]); });
  }

 private:
  void RunGateUp(const Piece& piece) const {
    const ExpertBatch& batch = batches_[piece.batch];
    const std::size_t first = first_row_[piece.batch];
    const Activation activation{spec_.activation, batch.weights.gate_bias, batch.weights.up_bias};
    const auto gate_up = quantized_ ? kernels_.quantized.gate_up : kernels_.gate_up;
    gate_up(batch.weights.gate, batch.weights.up, activation, in_ + first,
            static_cast<int>(batch.rows.size()), piece.first_panel, piece.last_panel, hidden_ + first);
  }
  void RunDown(const Piece& piece) const {
    const ExpertBatch& batch = batches_[piece.batch];
    const std::size_t first = first_row_[piece.batch];
    const auto matmul = quantized_ ? kernels_.quantized.matmul : kernels_.matmul;
    matmul(batch.weights.down, hidden_ + first, static_cast<int>(batch.rows.size()), piece.first_panel,
           piece.last_panel, out_ + first);
    if (batch.weights.down_bias != nullptr) AddDownBias(piece);
  }
  std::size_t GateCost(const ExpertBatch& batch) const {
    return batch.rows.empty()
               ? 0
               : 2 * CostOf(batch.weights.gate, PanelsOf(batch.weights.gate.n), batch.rows.size());
  }
  std::size_t DownCost(const ExpertBatch& batch) const {
    return batch.rows.empty() ? 0 : CostOf(batch.weights.down, PanelsOf(spec_.hidden), batch.rows.size());
  }
  // Of a row of k values as the matrices want it.
  std::size_t InputBytes(int k) const {
    return quantized_ ? QuantizedRow::Bytes(k) : std::size_t(k) * kernels_.activation_bytes;
  }

  // Returns the bytes used.
  std::size_t Carve(std::uintptr_t base) {
    Carver carver(base);
    gather_ = quantized_ || (kernels_.wants_even_rows && most_rows_ > 1);
    gathered_ = carver.Take<std::byte>(gather_ ? rows_ * in_bytes_ : 0);
    hidden_values_ = carver.Take<std::byte>(rows_ * hidden_bytes_);
    gate_pieces_ = carver.Take<Piece>(most_pieces_);
    down_pieces_ = carver.Take<Piece>(most_pieces_);
    first_row_ = carver.Take<std::size_t>(batches_.size());
    order_ = carver.Take<int>(batches_.size());
    in_ = carver.Take<const void*>(rows_);
    hidden_ = carver.Take<void*>(rows_);
    out_ = carver.Take<float*>(rows_);
    return carver.Used();
  }

  void Plan() {
    std::iota(order_, order_ + batches_.size(), 0);
    std::sort(order_, order_ + batches_.size(), [&](int a, int b) {
      return std::pair(batches_[b].rows.size(), a) < std::pair(batches_[a].rows.size(), b);
    });
    std::size_t row = 0;
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      const int b = order_[i];
      const ExpertBatch& batch = batches_[b];
      first_row_[b] = row;
      for (const ExpertRow& visit : batch.rows) {
        in_[row] = visit.in;
        out_[row] = visit.out;
        hidden_[row] = hidden_values_ + row * hidden_bytes_;
        ++row;
      }
      if (batch.rows.empty()) continue;
      Cut(b, PanelsOf(batch.weights.gate.n), GateCost(batch), quantized_ ? 2 : 1, gate_pieces_, gate_count_);
      Cut(b, PanelsOf(spec_.hidden), DownCost(batch), 1, down_pieces_, down_count_);
    }
  }

  void AddDownBias(const Piece& piece) const {
    const ExpertBatch& batch = batches_[piece.batch];
    const int begin = piece.first_panel * kPanel, end = std::min(piece.last_panel * kPanel, spec_.hidden);
    for (std::size_t row = 0; row < batch.rows.size(); ++row)
      for (int i = begin; i < end; ++i) out_[first_row_[piece.batch] + row][i] += batch.weights.down_bias[i];
  }

  // Pieces begin at multiples of `unit` panels.
  void Cut(int batch, int panels, std::size_t cost, int unit, Piece* pieces, int& count) const {
    const int units = (panels + unit - 1) / unit;
    const int parts =
        static_cast<int>(std::clamp<std::size_t>((cost + piece_cost_ - 1) / piece_cost_, 1, units));
    for (int i = 0; i < parts; ++i)
      pieces[count++] = {batch, units * i / parts * unit, std::min(panels, units * (i + 1) / parts * unit)};
  }

  // Rows come from wherever they were dispatched to; the copy (or the quantizing) costs about a row's bytes,
  // its products a thousand times that.
  void Gather() {
    constexpr std::size_t kLeast = 16;  // rows a piece
    const std::size_t pieces = std::clamp<std::size_t>(rows_ / kLeast, 1, threads_.Size());
    threads_.Run(static_cast<int>(pieces), [&](int piece) {
      for (std::size_t row = rows_ * piece / pieces; row < rows_ * (piece + 1) / pieces; ++row) {
        std::byte* to = gathered_ + row * in_bytes_;
        if (quantized_) {
          kernels_.quantized.quantize(in_[row], spec_.hidden, to);
        } else {
          std::memcpy(to, in_[row], std::size_t(spec_.hidden) * kernels_.activation_bytes);
        }
        in_[row] = to;
      }
    });
  }

  const core::ModelSpec& spec_;
  const Kernels& kernels_;
  ThreadPool& threads_;
  std::span<const ExpertBatch> batches_;
  const bool quantized_;  // all batches' weights are
  std::size_t rows_ = 0, most_rows_ = 0, piece_cost_ = 1, most_pieces_ = 0, in_bytes_ = 0, hidden_bytes_ = 0;
  bool gather_ = false;
  int gate_count_ = 0, down_count_ = 0;
  // In the scratch buffer.
  std::byte* gathered_ = nullptr;       // [rows, in_bytes_], where rows must lie evenly or be quantized
  std::byte* hidden_values_ = nullptr;  // [rows, hidden_bytes_]: gate and up's result
  Piece* gate_pieces_ = nullptr;
  Piece* down_pieces_ = nullptr;
  std::size_t* first_row_ = nullptr;  // [batches]
  int* order_ = nullptr;              // [batches], those of most rows first
  const void** in_ = nullptr;         // [rows]
  void** hidden_ = nullptr;
  float** out_ = nullptr;
};

}  // namespace

void RunExperts(const core::ModelSpec& spec, const Kernels& kernels, ThreadPool& threads,
                std::span<const ExpertBatch> batches, std::vector<std::byte>& scratch) {
  if (!batches.empty()) ExpertRun(spec, kernels, threads, batches).Run(scratch);
}

}  // namespace elasticmoe::compute
