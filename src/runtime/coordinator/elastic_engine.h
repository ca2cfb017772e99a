// The engine: one thread that asks the scheduler for a step, lets the devices run it over the exchange, and
// hands the tokens out. Between steps it takes what came in meanwhile: requests, cancels, deaths of workers,
// and (control) tasks that change the placement.
//
// A worker's death in a step: the step is given up, a standby takes the device over on the same pages, the
// step runs again. The HMM's death: a new one loads the weights while the workers go on with the pages they
// have mapped; then they attach to the new ones and all sequences are run again from their tokens.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "compute/kv.h"
#include "compute/layout.h"
#include "core/control/resize_values.h"
#include "core/placement/placement.h"
#include "core/policy/step_cost.h"
#include "core/schedule/scheduler.h"
#include "model/checkpoint.h"
#include "runtime/channel.h"
#include "runtime/coordinator/hmm_client.h"
#include "runtime/coordinator/instance_manager.h"
#include "runtime/coordinator/kv_mover.h"
#include "runtime/coordinator/peer_copies.h"
#include "runtime/coordinator/resize_trace.h"
#include "runtime/engine.h"
#include "runtime/exchange.h"

namespace elasticmoe::runtime {

inline constexpr std::chrono::milliseconds kHmmPoll{
    20};  // between questions whether a new HMM has the weights
inline constexpr std::chrono::milliseconds kHmmRetry{2000};  // before the next one, where one could not load

struct EngineOptions {
  std::filesystem::path model;
  // Abstract name of the HMM's socket: the same name finds the same HMM after a crash. One engine at a time.
  std::string hmm_socket;
  int devices = 1;  // of the first placement; an adopted HMM's size wins
  int max_devices = 1;
  int threads_per_device = 1;
  bool domain_per_device = false;
  std::string kernels = "auto";
  core::WeightFormat weights = core::WeightFormat::kBf16;
  int first_cpu = 0;                    // of the allowed ones, device 0's first thread is pinned to
  std::size_t kv_memory_bytes = 0;      // a device
  std::size_t kv_room_bytes = 0;        // what that may grow to; 0 = no more
  std::size_t device_memory_bytes = 0;  // 0 = no limit but the machine's
  PageKind pages = PageKind::kTransparentHuge;
  ExpertTableKind expert_table = ExpertTableKind::kPointer;
  int max_model_len = 0;  // 0 = the model's
  int max_running = 128;
  int max_waiting = 4096;
  int max_step_rows = 512;
  int max_chunk_rows = 512;  // of one sequence a step
  bool prefix_cache = true;
  int standby = 1;
  int standby_limit = 2;
  std::vector<double> device_weights;       // relative speeds by device number; missing ones are 1
  int redundant_experts = 0;                // further copies a layer, for the hottest experts
  std::uint64_t copy_bytes_per_second = 0;  // of weights between domains; 0 = as fast as it goes
  int linger_seconds = 30;
  int step_timeout_seconds = 60;    // a worker that takes longer for a step is taken for dead
  int answer_timeout_seconds = 20;  // likewise outside of steps
  int step_attempts = 10;   // many kills change nothing, but a request that kills workers must end; >= 1
  int worker_attempts = 3;  // a machine that cannot start a worker or an HMM is not tried for ever; >= 1
  std::string log_level = "info";
};

class ElasticEngine : public Engine {
 public:
  // Starts or adopts the HMM, waits for the weights, attaches the workers. `progress` is called with loaded
  // and total bytes. Refuses what cannot fit before anything is started.
  static Expected<std::unique_ptr<ElasticEngine>> Start(
      const EngineOptions& options, const std::function<void(std::uint64_t, std::uint64_t)>& progress);
  ~ElasticEngine() override;  // ends the workers and the HMM; requests end with kAbort

  Status Submit(core::GenerationRequest request, Sink sink) override;
  void Cancel(RequestId request) override;
  EngineStats Stats() const override;
  const core::ModelSpec& Spec() const override { return checkpoint_.spec; }
  int MaxModelLen() const override { return options_.max_model_len; }

  // Called on the engine's thread after each step, with its seconds (from the end of the one before where
  // that went straight on); must not block.
  using StepObserver = std::function<void(const core::StepShape&, double)>;
  void SetStepObserver(StepObserver observer);
  double KvTokenBytes() const { return kv_token_bytes_; }  // of all layers

  // Refuses new requests from now on; those running go on.
  void StopAccepting();
  bool Idle() const;
  void FailAll(const std::string& error);  // every request ends with it, after the step that runs
  // The workers give their memory up; weights and KV stay with the HMM. Requests wait until Wake, which
  // attaches the same devices again. kFailedPrecondition while there are requests.
  Status Sleep();
  Status Wake();
  bool Asleep() const { return asleep_; }
  void FailWaiting(const std::string& error);  // those that are there end with it

  // KV memory a device from now on, at most the room; the resize controller makes it so.
  void SetKvMemory(std::size_t bytes) { kv_memory_bytes_ = bytes; }

  // What a plan to `devices` members has to know: budgets, and the experts' load since the last resize.
  core::PlanFacts Facts(int devices) const;

  // Whether the machine has the memory for so many. kResourceExhausted with the numbers.
  Status CheckGrowth(int devices) const;

  // ---- for the resize controller; its thread calls them. Blocking; `stop` ends a wait.
  void SetObserver(
      std::function<void(const core::ResizeEvent&)> observer);  // deaths, recoveries, first tokens
  // What the calls below do is recorded there, if anything. Before the controller's first call.
  void SetTrace(ResizeTrace* trace) { trace_ = trace; }
  core::Placement PlacementNow() const;
  TimeNs TakeLongestGap();  // between two steps while requests were there, since the last call
  TimeNs TakeCopyTime();    // between domains, since the last call
  Status EnsureStandby();
  // Copies what is to be copied, attaches new members, has all members find their experts.
  Status PrepareStage(const core::PlanStage& stage, const std::stop_token& stop);
  Status Commit(const core::Placement& placement);  // at a step boundary
  // They are dropped once no step reads them any more: by FitKv, or before it matters.
  Status ReleaseStage(const std::vector<core::ExpertDrop>& drops);
  Status Forget(const std::stop_token& stop);  // what was copied for stages that were not committed
  // Until `leaving` have no sequence and nobody's KV is on its way.
  Status MoveSequences(const std::vector<DeviceId>& leaving, const std::stop_token& stop);
  // One piece of work towards each member's share of KV memory, and none for devices that have gone. A new
  // member starts with a part, so that it need not wait for memory to be cleared; what shrinks is emptied by
  // copies first. False: all have what they should.
  Expected<bool> FitKv();
  // New requests wait (true), or are taken again (false). Blocks until those that run have ended, or `stop`.
  Status HoldIntake(bool hold, const std::stop_token& stop);
  Status Retire(DeviceId device);
  const EngineOptions& options() const { return options_; }

  const model::Checkpoint& checkpoint() const { return checkpoint_; }
  const std::string& kernels() const { return options_.kernels; }
  bool adopted() const { return adopted_; }
  double huge_share() const { return memory_.map.huge_share; }

 private:
  explicit ElasticEngine(EngineOptions options, model::Checkpoint checkpoint);
  Status TakeName();
  Status Begin(const std::function<void(std::uint64_t, std::uint64_t)>& progress);

  void Loop();
  void TakeInbox();
  void RunStep(const core::StepPlan& plan);
  void WriteView(const core::Placement& placement, StepView& view) const;
  void BeginDevice(DeviceId id, std::uint32_t step) const;
  void WriteStep(const core::StepPlan& plan, std::uint32_t step);
  bool AwaitStep(std::uint32_t step);         // false: given up
  void ReadStep(const core::StepPlan& plan);  // to result_
  void Deliver();                             // events_ to their sinks
  void RecoverFromDeaths();
  Status RecoverWorkers();  // REQUIRES: instances_mutex_
  void NoticeHmmDeath();
  void StartNextHmm();
  void FollowNextHmm();  // until it has taken over
  void PostponeNextHmm(const Error& error);
  void MoveWorkersToMemory();  // REQUIRES: instances_mutex_
  bool HmmDown() const;
  bool LostHmm() const;                                                // also before the watcher has seen it
  Status FitMemory(HmmClient& hmm, const core::Placement& placement);  // domains and KV for its members
  Status AttachAll();
  core::PlanFacts BaseFacts() const;  // without load and budgets
  Expected<core::Placement> FirstPlacement() const;
  Status AwaitHmm(const std::stop_token& stop);  // while one that died is being replaced
  std::vector<int> IdleCpus(const std::vector<DeviceId>& joining) const;
  Status PrepareStageOnce(const core::PlanStage& stage, const std::stop_token& stop);
  Expected<bool> DropReleased(bool wait);  // false: a step may read them still
  // KV of a device that holds so many experts. REQUIRES: instances_mutex_, or the controller's thread.
  std::uint64_t KvChunksWanted(std::uint64_t experts) const;
  Expected<bool> VacateKv(DomainId domain, std::uint32_t blocks);  // false: not yet
  Expected<bool> ShrinkKv(DeviceId device, std::uint64_t chunks);  // likewise
  // One device's KV, in the HMM and then in the workers. REQUIRES: instances_mutex_.
  Status SetKv(DeviceId device, std::uint64_t chunks);
  void PublishKvBlocks();  // for the scheduler, at the next boundary. REQUIRES: instances_mutex_
  void UpdateKvBlocks();   // there
  void UpdatePids();
  void Rebalance();
  void StartMoves(std::vector<core::Scheduler::Move> moves);
  void TakeMoved();
  void PublishSettled();
  std::uint64_t StandbyBytes() const;          // that the HMM holds ready for a new device
  bool CopyTails(const core::StepPlan& plan);  // false: the step cannot run
  void UpdateSpin();
  void Observe(const core::ResizeEvent& event);
  // Runs `task` and records it.
  Status Traced(std::string name, std::string lane, Json args, const std::function<Status()>& task);
  // Runs it on the engine's thread. `early` may do the same while a step runs: false = not now.
  Status BetweenSteps(const std::function<Status()>& task, const std::function<bool()>& early = {});
  void RunTasks(bool run);  // false: they are refused
  void RunEarlyTask();
  Status CheckCommit(const core::Placement& placement) const;  // REQUIRES: instances_mutex_
  void TakePlacement(const core::Placement& placement);        // likewise
  bool CommitWithinStep(const core::Placement& placement);
  void GiveUp(const Error& error);          // every request ends with this error
  void Watch(const std::stop_token& stop);  // thread: deaths of processes
  void Rewatch();                           // the processes to watch have changed
  void CountStepTime();
  void NoteStep(const core::StepPlan& plan, double seconds);
  void PublishStats();
  double WeightOf(DeviceId device) const;
  std::vector<core::SchedulerDevice> SchedulerDevices() const;
  HmmOptions HmmOptionsFor() const;

  EngineOptions options_;
  std::atomic<std::size_t> kv_memory_bytes_;  // a device
  model::Checkpoint checkpoint_;
  bool adopted_ = false;
  int moe_layers_ = 0;
  const int cpus_ = UsableCores();
  double kv_token_bytes_ = 0;

  mutable std::mutex instances_mutex_;  // guards what follows: two threads use it
  std::optional<Listener> owner_;       // a name that tells another engine that hmm_socket is taken
  std::unique_ptr<HmmClient> hmm_;
  AttachedMemory memory_;
  std::unique_ptr<InstanceManager> instances_;
  std::optional<core::Placement> prepared_;         // an epoch that may be committed
  std::map<DeviceId, std::uint64_t> kv_chunks_of_;  // KV that each device has brought along

  std::mutex observer_mutex_;
  std::function<void(const core::ResizeEvent&)> observer_;
  std::atomic<TimeNs> longest_gap_{0};
  std::atomic<int> standby_count_{0};
  // The controller's thread uses these.
  ResizeTrace* trace_ = nullptr;
  TimeNs copy_ns_reported_ = 0;
  std::optional<PeerCopies> peers_;
  std::vector<core::ExpertDrop> released_;                      // to be dropped
  std::uint32_t released_in_step_ = 0;                          // after this step's end
  std::uint32_t committed_in_step_ = 0;                         // or after it; written in the tasks of Commit
  std::optional<std::pair<DomainId, std::uint32_t>> vacating_;  // and since when
  std::chrono::steady_clock::time_point vacating_since_;
  mutable std::mutex rows_mutex_;  // not the instances': who shows metrics must not wait for a resize
  std::vector<std::uint64_t> rows_at_resize_;  // by (layer, expert), at the last commit; guarded by it

  // Owned by the engine's thread once it runs.
  std::optional<Exchange> exchange_;
  std::set<DeviceId> leaving_;  // members that take no new sequences
  bool rebalance_ = false;      // at the next boundary
  std::set<DeviceId> fresh_;    // members that have not computed a token yet
  std::map<DeviceId, int> pids_;
  TimeNs last_step_end_ = 0;  // 0 = nothing was to be done since
  core::Placement placement_;
  std::unique_ptr<core::Scheduler> scheduler_;
  struct SlotState {
    RequestId request;
    int written = 0;  // tokens in the history
  };
  std::vector<SlotState> slots_;
  std::map<RequestId, Sink> sinks_;
  // Of the last boundary; kept for their memory.
  std::vector<std::pair<core::GenerationRequest, Sink>> taken_submitted_;
  std::vector<RequestId> taken_cancelled_;
  core::StepResult result_;
  std::vector<core::TokenEvent> events_;  // in order; told once the next step has been started
  std::unique_ptr<KvMover> mover_;
  std::unique_ptr<HmmClient> step_hmm_;  // of the engine's thread, made when it is needed
  int failed_attempts_ = 0;              // of the step that is tried now
  bool step_given_up_ = false;           // members may still be in it
  bool workers_missing_ = false;         // replacing them failed
  std::unique_ptr<HmmClient> next_hmm_;  // being loaded after the HMM's death; null: tried again at that time
  std::chrono::steady_clock::time_point next_hmm_poll_;
  std::uint64_t steps_ = 0, recoveries_ = 0;
  TimeNs devices_ended_ = 0;  // when they ended the step before; 0 = nothing was to be done since
  TimeNs step_ns_ = 0, between_steps_ns_ = 0;
  StepObserver step_observer_;
  std::array<std::uint64_t, kStepRowBounds.size() + 1> steps_by_rows_{};
  std::uint64_t step_rows_ = 0;

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable work_;
  std::vector<std::pair<core::GenerationRequest, Sink>> submitted_;
  std::vector<RequestId> cancelled_;
  EngineStats stats_;
  core::Placement published_placement_;
  std::vector<DomainStats> domains_;
  std::map<DomainId, std::uint32_t> kv_blocks_;  // as the workers have them
  std::optional<std::set<DeviceId>> settled_;    // none moves, and none is left on these
  struct Task {
    const std::function<Status()>* body;
    const std::function<bool()>* early;
    Status status;
    bool done = false;
  };
  std::deque<Task*> tasks_;
  std::condition_variable task_done_;
  bool accepting_ = true;
  bool stopping_ = false;
  bool busy_ = false;  // anything waiting, running or submitted
  bool kv_changed_ = false;
  bool hmm_down_ = false;             // it died, and the next one has not taken over
  std::optional<Error> hmm_failure_;  // why the last one that was to replace it did not
  std::size_t queued_ = 0;            // waiting in the scheduler, for the limit

  std::atomic<bool> asleep_{false};       // set by the engine's thread, under mutex_
  std::atomic<bool> death_{false};        // a process that steps need ended: looked at within steps, too
  std::atomic<bool> other_death_{false};  // another one
  std::atomic<bool> watch_again_{false};
  std::atomic<std::uint32_t> steps_ended_{0};  // the last one that has; also given up
  std::atomic<bool> early_task_{false};        // one that need not wait for the step's end
  struct Watched {
    Fd fd;  // duplicate of a pidfd
    bool in_steps = false;
  };
  std::vector<Watched> watched_;  // guarded by mutex_
  std::jthread watcher_;
  std::jthread thread_;
};

}  // namespace elasticmoe::runtime
