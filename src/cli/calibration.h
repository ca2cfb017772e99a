// Measures what the simulator needs to know of this machine and a model: step times, start-up, resizes.
// Starts servers of its own. Effects: processes, sockets, the clock.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cli/load_report.h"
#include "cli/load_run.h"
#include "cli/samples.h"
#include "cli/server_child.h"
#include "sim/profile.h"

namespace elasticmoe::cli {

struct CalibrationOptions {
  std::string model;  // directory
  int devices = 2;    // most
  int threads_per_device = 1;
  bool domain_per_device = false;
  int rounds = 3;  // of everything; medians are taken
  std::vector<std::string> serve_flags;
};

// A server at one device that may grow to `devices`, and a client of it.
class MeasuredServer {
 public:
  static Expected<std::unique_ptr<MeasuredServer>> Start(const CalibrationOptions& options);

  double start_s() const { return start_s_; }  // process start to the first answer, weights included
  // One closed loop: `concurrency` requests at a time, `requests` in all. kUnavailable where one failed.
  Expected<LoadReport> Closed(int input_tokens, int output_tokens, int concurrency, int requests);
  Expected<LoadReport> Open(int input_tokens, int output_tokens, Arrivals arrivals);
  // Seconds from the command to the new size, as the server says.
  Expected<double> Scale(int devices);

 private:
  MeasuredServer() = default;
  LoadOptions Load() const;
  std::unique_ptr<ServerChild> child_;
  EventLoop loop_;
  std::unique_ptr<HttpClient> client_;
  std::string model_;
  int vocab_ = 0;
  double start_s_ = 0;
};

struct CalibrationPoint {
  std::string what;
  bool prompt = false;  // measured as the time to the first token: a request's own part is taken off
  core::StepShape shape;
  Samples times_ms{};  // one a round
  double measured_s = 0;
  double fitted_s = 0;
};

struct Calibration {
  sim::ClusterProfile profile;
  std::vector<CalibrationPoint> points;
  std::vector<double> scaling_s;  // of each growth by a device

  double WorstDeviation() const;  // of the fitted from the measured times, as a share
};

// The model's shape, for the simulator.
Expected<sim::ModelShape> ModelShapeOf(const std::string& directory);

// At `devices`, in round `round`, after the steps at that size.
using BesideCalibration = std::function<Status(MeasuredServer&, int devices, int round)>;

// `beside` is called at each size in each round: a machine's speed changes, so what is to be compared with a
// calibration is measured in turns with it.
Expected<Calibration> Calibrate(const CalibrationOptions& options,
                                const std::function<void(const std::string&)>& say,
                                const BesideCalibration& beside = {});

}  // namespace elasticmoe::cli
