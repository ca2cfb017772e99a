#include "cli/resize_rows.h"

#include <algorithm>

namespace elasticmoe::cli {
namespace {

using State = RequestResult::State;

constexpr double kTtftRoom = 5, kTpotRoom = 2;

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// When tokens came, over all requests, in order.
std::vector<TimeNs> TokenTimes(const LoadResult& load) {
  std::vector<TimeNs> times;
  for (const RequestResult& request : load.requests) {
    if (request.first_token_ns == 0) continue;
    double at = static_cast<double>(request.first_token_ns);
    times.push_back(static_cast<TimeNs>(at));
    for (const float gap : request.gaps_ms) times.push_back(static_cast<TimeNs>(at += 1e6 * gap));
  }
  std::sort(times.begin(), times.end());
  return times;
}

double PerSecond(const std::vector<TimeNs>& times, TimeNs from, TimeNs to) {
  if (to <= from) return 0;
  const auto count =
      std::lower_bound(times.begin(), times.end(), to) - std::lower_bound(times.begin(), times.end(), from);
  return 1e9 * static_cast<double>(count) / static_cast<double>(to - from);
}

// Starts of the times in which somebody waited for a token, in order. Whoever was refused or cut off waits
// until anybody gets one again.
std::vector<TimeNs> BusyStarts(const LoadResult& load, const std::vector<TimeNs>& times) {
  std::vector<std::pair<TimeNs, TimeNs>> busy;
  for (const RequestResult& request : load.requests) {
    const auto next = std::upper_bound(times.begin(), times.end(), request.done_ns);
    const bool waits = request.state != State::kCompleted && next != times.end();
    busy.emplace_back(request.due_ns, waits ? *next : request.done_ns);
  }
  std::sort(busy.begin(), busy.end());
  std::vector<TimeNs> starts;
  TimeNs end = -1;
  for (const auto& [due, done] : busy) {
    if (due > end) starts.push_back(due);
    end = std::max(end, done);
  }
  return starts;
}

// Longest time without a token that begins in [from, to), while some request was on its way.
double LongestGap(const std::vector<TimeNs>& times, const std::vector<TimeNs>& busy_starts, TimeNs from,
                  TimeNs to) {
  TimeNs previous = from, longest = 0;
  for (auto at = std::lower_bound(times.begin(), times.end(), from); at != times.end() && previous < to;
       ++at) {
    const auto busy = std::upper_bound(busy_starts.begin(), busy_starts.end(), *at);
    const TimeNs since = busy == busy_starts.begin() ? previous : std::max(previous, *std::prev(busy));
    longest = std::max(longest, *at - since);
    previous = *at;
  }
  return static_cast<double>(longest) * 1e-6;
}

bool Refused(const RequestResult& request) {
  return request.error_kind == "http 503" || request.error_kind == "http 429" ||
         request.error_kind == "connect";
}

double Tpot(const RequestResult& request) {
  return static_cast<double>(request.last_token_ns - request.first_token_ns) * 1e-6 /
         std::max(request.output_tokens - 1, 1);
}

double Ratio(double value, double base) {
  return base > 0 ? value / base : 0;
}

std::string Rounded(double value, int digits) {
  return fmt::format("{:.{}f}", value, digits);
}

}  // namespace

SloLimits DefaultLimits(const ResizeRun& run) {
  std::vector<double> ttft, tpot;
  for (const RequestResult& request : run.load.requests) {
    if (request.state != State::kCompleted || request.done_ns > run.asked_ns) continue;
    ttft.push_back(static_cast<double>(request.first_token_ns - request.due_ns) * 1e-6);
    tpot.push_back(Tpot(request));
  }
  SloLimits limits;
  if (ttft.empty()) return limits;
  limits.ttft_ms = kTtftRoom * Median(std::move(ttft));
  limits.tpot_ms = kTpotRoom * Median(std::move(tpot));
  return limits;
}

ResizeRow MakeRow(const ResizeRun& run, const LoadResult& undisturbed, const SloLimits& slo, TimeNs window_ns,
                  double copy_bytes_per_s) {
  ResizeRow row;
  row.strategy = run.strategy;
  row.error = run.error;
  row.scaling_latency_ms = run.scaling_latency_ms;
  row.first_capacity_ms = run.first_capacity_ms;
  row.total_ms = run.total_ms;
  row.engine_pause_ms = run.engine_pause_ms;
  row.bytes_copied = run.bytes_copied;
  row.copy_ms = run.copy_ms;
  row.copy_bytes_per_s = 1e3 * Ratio(static_cast<double>(run.bytes_copied), run.copy_ms);
  row.copy_ratio = Ratio(copy_bytes_per_s, row.copy_bytes_per_s);
  const std::vector<TimeNs> times = TokenTimes(run.load);
  TimeNs last_due = 0;
  std::vector<double> gaps;
  std::size_t met = 0;
  for (std::size_t i = 0; i < run.load.requests.size(); ++i) {
    const RequestResult& request = run.load.requests[i];
    last_due = std::max(last_due, request.due_ns);
    if (request.state != State::kCompleted) {
      ++(Refused(request) ? row.refused : row.failed);
      continue;
    }
    if (i < undisturbed.requests.size() && undisturbed.requests[i].state == State::kCompleted)
      row.tokens_identical = row.tokens_identical && request.token_ids == undisturbed.requests[i].token_ids;
    const double ttft = static_cast<double>(request.first_token_ns - request.due_ns) * 1e-6;
    met += (!slo.ttft_ms || ttft <= *slo.ttft_ms) && (!slo.tpot_ms || Tpot(request) <= *slo.tpot_ms);
    if (request.done_ns <= run.asked_ns)
      gaps.insert(gaps.end(), request.gaps_ms.begin(), request.gaps_ms.end());
  }
  row.slo_attainment = Ratio(static_cast<double>(met), static_cast<double>(run.load.requests.size()));
  row.step_ms = Median(std::move(gaps));

  const std::vector<TimeNs> usual = TokenTimes(undisturbed);
  const auto to_usual = [&](TimeNs from, TimeNs to) {
    return Ratio(PerSecond(times, from, to), PerSecond(usual, from, to));
  };
  row.during_throughput_ratio = to_usual(run.asked_ns, run.asked_ns + window_ns);
  row.after_throughput_ratio = to_usual(run.done_ns, last_due);
  const std::vector<TimeNs> busy_starts = BusyStarts(run.load, times);
  row.usual_pause_ms = LongestGap(times, busy_starts, run.asked_ns / 2, run.asked_ns);
  row.pause_ms = LongestGap(times, busy_starts, run.asked_ns, run.asked_ns + window_ns);

  std::uint64_t memory_before = 0, memory_after = 0, peak = 0;
  for (const MemorySample& sample : run.memory) {
    if (sample.at <= run.asked_ns) memory_before = std::max(memory_before, sample.bytes);
    peak = std::max(peak, sample.bytes);
    memory_after = sample.bytes;
  }
  row.peak_memory_ratio =
      Ratio(static_cast<double>(peak), static_cast<double>(std::max(memory_before, memory_after)));
  return row;
}

Json ToJson(const ResizeRow& row) {
  return {{"strategy", row.strategy},
          {"error", row.error.empty() ? Json() : Json(row.error)},
          {"scaling_latency_ms", row.scaling_latency_ms},
          {"first_capacity_ms", row.first_capacity_ms},
          {"total_ms", row.total_ms},
          {"pause_ms", row.pause_ms},
          {"usual_pause_ms", row.usual_pause_ms},
          {"step_ms", row.step_ms},
          {"engine_pause_ms", row.engine_pause_ms},
          {"refused", row.refused},
          {"failed", row.failed},
          {"during_throughput_ratio", row.during_throughput_ratio},
          {"after_throughput_ratio", row.after_throughput_ratio},
          {"peak_memory_ratio", row.peak_memory_ratio},
          {"bytes_copied", row.bytes_copied},
          {"copy_ms", row.copy_ms},
          {"copy_bytes_per_s", row.copy_bytes_per_s},
          {"copy_ratio", row.copy_ratio},
          {"slo_attainment", row.slo_attainment},
          {"tokens_identical", row.tokens_identical}};
}

std::string ToTable(const std::vector<ResizeRow>& rows) {
  const auto cold = std::ranges::find(rows, "cold-restart", &ResizeRow::strategy);
  std::string out = fmt::format("  {:<14}{:>10}{:>9}{:>10}{:>9}{:>9}{:>9}{:>8}{:>8}{:>8}{:>8}{:>7}{:>10}\n",
                                "strategy", "latency", "vs cold", "capacity", "pause", "refused", "failed",
                                "during", "after", "peak", "copied", "SLO", "tokens");
  out += fmt::format("  {:<14}{:>10}{:>9}{:>10}{:>9}{:>9}{:>9}{:>8}{:>8}{:>8}{:>8}{:>7}{:>10}\n", "", "ms",
                     "", "ms", "ms", "", "", "ratio", "ratio", "ratio", "MiB", "%", "");
  for (const ResizeRow& row : rows) {
    if (!row.error.empty()) {
      out += fmt::format("  {:<14}  {}\n", row.strategy, row.error);
      continue;
    }
    const bool compared = cold != rows.end() && cold->error.empty() && row.scaling_latency_ms > 0;
    out += fmt::format(
        "  {:<14}{:>10.1f}{:>9}{:>10}{:>9.1f}{:>9}{:>9}{:>8.2f}{:>8.2f}{:>8.2f}{:>8}{:>7.1f}{:>10}\n",
        row.strategy, row.scaling_latency_ms,
        compared ? Rounded(cold->scaling_latency_ms / row.scaling_latency_ms, 1) + "x" : "-",
        row.first_capacity_ms > 0 ? Rounded(row.first_capacity_ms, 1) : "-", row.pause_ms, row.refused,
        row.failed, row.during_throughput_ratio, row.after_throughput_ratio, row.peak_memory_ratio,
        row.bytes_copied >> 20, 100 * row.slo_attainment, row.tokens_identical ? "identical" : "DIFFER");
  }
  return out;
}

}  // namespace elasticmoe::cli
