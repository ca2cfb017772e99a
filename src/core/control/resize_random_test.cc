// The resize machine against random worlds: answers in any order, doubled, late, lost and failed, deaths,
// cancels, deadlines, commands that come at the wrong time. Once the faults stop, everything ends.
#include <gtest/gtest.h>

#include <algorithm>

#include "base/hash.h"
#include "base/rng.h"
#include "core/control/resize.h"

namespace elasticmoe::core {
namespace {

constexpr int kDevices = 6;

class RandomWorld {
 public:
  explicit RandomWorld(std::uint64_t seed) : rng_(seed), machine_(Options(), First(rng_)) {
    facts_.layers = machine_.placement().layers();
    facts_.experts = machine_.placement().experts();
    facts_.expert_bytes = 1;
    facts_.stage_experts = 1 + static_cast<int>(rng_.Below(8));
    if (rng_.Below(2) == 0) facts_.at_once_bytes = rng_.Below(8) * facts_.expert_bytes;
    for (int i = 0; i < kDevices; ++i)
      facts_.devices.push_back(
          {DeviceId(i), DomainId(static_cast<int>(rng_.Below(3))), 0.5 + rng_.Uniform()});
    for (const DeviceId member : machine_.placement().members()) allocated_[member] = Ticket(0);
  }

  std::uint64_t Run() {
    for (int i = 0; i < 400; ++i) {
      Chaos();
      now_ += static_cast<TimeNs>(rng_.Below(20));
    }
    for (const DeviceId device : std::set(dead_)) Send(WorkerRecoveredEvent{device});
    dead_.clear();
    for (int i = 0; i < 3000 && machine_.Running(); ++i) {
      now_ += 100;
      Send(TickEvent{});
      while (!asked_.empty()) {
        const ResizeAction action = asked_.front();
        asked_.erase(asked_.begin());
        Carry(action, false);
      }
    }
    EXPECT_FALSE(machine_.Running()) << "it does not end";
    EXPECT_EQ(accepted_, reported_);
    std::set<DeviceId> allocated;
    for (const auto& [device, ticket] : allocated_) allocated.insert(device);
    const std::vector<DeviceId>& members = machine_.placement().members();
    EXPECT_EQ(allocated, std::set<DeviceId>(members.begin(), members.end()));
    return HashCombine(hash_, machine_.placement().Hash());
  }

  int done = 0, aborted = 0;

 private:
  static ResizeOptions Options() {
    ResizeOptions options;
    options.resend_ns = 100;
    options.recovery_wait_ns = 1000;
    return options;
  }
  static Placement First(Rng& rng) {
    std::vector<DeviceId> members;
    const int count = 1 + static_cast<int>(rng.Below(kDevices));
    for (int i = 0; i < count; ++i) members.emplace_back(i);
    const int layers = static_cast<int>(rng.Below(4));
    return EvenPlacement(Epoch(1), members, layers, 1 + static_cast<int>(rng.Below(12)));
  }

  void Send(const ResizeEvent& event) {
    std::vector<ResizeAction> actions;
    const Placement before = machine_.placement();
    machine_.Step(now_, event, actions);
    machine_.CheckIntegrity();
    if (machine_.placement() != before) {
      EXPECT_EQ(machine_.placement().epoch().value, before.epoch().value + 1);
      EXPECT_EQ(machine_.placement(), committed_) << "a placement serves that the engine has not committed";
    }
    for (ResizeAction& action : actions) {
      hash_ = HashCombine(hash_, action.index());
      if (const auto* report = std::get_if<ReportAction>(&action)) {
        ++reported_;
        EXPECT_EQ(report->report.operation, running_);
        if (report->report.state == ResizeState::kDone) {
          ++done;
          EXPECT_EQ(machine_.placement().members(), report->report.to);
        } else {
          ++aborted;
          EXPECT_EQ(report->report.state, ResizeState::kAborted);
          EXPECT_TRUE(report->report.error);
          if (report->report.stages_committed == 0) {
            std::vector<DeviceId> members = machine_.placement().members();
            EXPECT_EQ(members, report->report.from);
          }
        }
      } else if (const auto* reply = std::get_if<ReplyAction>(&action)) {
        if (!reply->error && starting_ && reply->report.operation == *starting_ && running_ != *starting_)
          ++accepted_, running_ = *starting_;
      } else {
        asked_.push_back(std::move(action));
      }
    }
  }

  // Does what is asked, as a world that obeys the order of tickets, and answers.
  void Carry(const ResizeAction& action, bool faults) {
    std::optional<Error> error;
    if (faults && rng_.Below(6) == 0) error = Error{ErrorCode::kUnavailable, "broken"};
    const bool lost = faults && rng_.Below(8) == 0;
    Ticket ticket;
    std::visit(
        [&](const auto& a) {
          using A = std::decay_t<decltype(a)>;
          if constexpr (requires { a.ticket; }) ticket = a.ticket;
          if constexpr (std::is_same_v<A, ProvisionDevice> || std::is_same_v<A, RetireDevice>) {
            Ticket& seen = seen_[a.device];
            if (a.ticket < seen) return;
            seen = a.ticket;
            if (error && std::is_same_v<A, RetireDevice>) return;
            if (std::is_same_v<A, RetireDevice>)
              allocated_.erase(a.device);
            else if (!error)
              allocated_[a.device] = a.ticket;
          }
          if constexpr (std::is_same_v<A, CommitStage>) {
            if (a.ticket < commit_seen_) return;
            const bool again = a.ticket == commit_seen_;
            if (again) error = commit_error_;  // whatever was said before is said again
            commit_seen_ = a.ticket;
            commit_error_ = error;
            if (!error) committed_ = a.placement;
          }
        },
        action);
    const AnswerEvent answer{ticket, error};
    if (faults && rng_.Below(5) == 0) late_.push_back(answer);
    if (!lost) Send(answer);
  }

  void Chaos() {
    switch (rng_.Below(12)) {
      case 0: {
        ResizeCommand command;
        command.operation = fmt::format("op{}", rng_.Below(3) == 0 ? operations_ : ++operations_);
        starting_ = command.operation;
        command.count = static_cast<int>(rng_.Below(kDevices + 2));
        if (rng_.Below(3) == 0) command.victims.push_back(DeviceId(static_cast<int>(rng_.Below(kDevices))));
        if (rng_.Below(3) == 0) command.deadline = now_ + static_cast<TimeNs>(rng_.Below(400));
        Send(CommandEvent{command, facts_});
        starting_.reset();
        break;
      }
      case 1:
        if (rng_.Below(3) == 0) Send(CancelEvent{running_});
        break;
      case 2: {
        const DeviceId device(static_cast<int>(rng_.Below(kDevices)));
        if (allocated_.count(device) == 0) break;
        dead_.insert(device);
        Send(WorkerDiedEvent{device});
        break;
      }
      case 3:
        if (!dead_.empty()) {
          const DeviceId device = *dead_.begin();
          dead_.erase(dead_.begin());
          if (rng_.Below(5) != 0) Send(WorkerRecoveredEvent{device});
        }
        break;
      case 4:
        if (!late_.empty()) {
          Send(late_.front());
          if (rng_.Below(2) == 0) late_.erase(late_.begin());
        }
        break;
      case 5:
        Send(TickEvent{});
        break;
      default:
        if (!asked_.empty()) {
          const auto at = asked_.begin() + static_cast<std::ptrdiff_t>(rng_.Below(asked_.size()));
          const ResizeAction action = *at;
          if (rng_.Below(6) != 0) asked_.erase(at);
          Carry(action, true);
        }
    }
  }

  Rng rng_;
  ResizeMachine machine_;
  PlanFacts facts_;
  TimeNs now_ = 1;
  std::vector<ResizeAction> asked_;
  std::vector<AnswerEvent> late_;
  std::map<DeviceId, Ticket> allocated_, seen_;
  std::set<DeviceId> dead_;
  Ticket commit_seen_;
  std::optional<Error> commit_error_;
  Placement committed_;
  std::optional<std::string> starting_;
  std::string running_ = "none";
  int operations_ = 0, accepted_ = 0, reported_ = 0;
  std::uint64_t hash_ = 0;
};

TEST(ResizeProperty, EveryRandomWorldEndsWithItsDevicesAccountedFor) {
  int done = 0, aborted = 0;
  for (std::uint64_t seed = 0; seed < 1500; ++seed) {
    SCOPED_TRACE(seed);
    RandomWorld world(seed);
    const std::uint64_t hash = world.Run();
    done += world.done;
    aborted += world.aborted;
    if (seed % 50 == 0) {
      EXPECT_EQ(RandomWorld(seed).Run(), hash);
    }
    if (HasFailure()) break;
  }
  EXPECT_GT(done, 1000);
  EXPECT_GT(aborted, 1000);
}

}  // namespace
}  // namespace elasticmoe::core
