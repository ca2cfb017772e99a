#include "runtime/coordinator/kv_mover.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "runtime/channel.h"

namespace elasticmoe::runtime {
namespace {

// An HMM that says yes to everything, in this process.
class YesHmm {
 public:
  YesHmm()
      : name_("kv-mover-test-" + std::to_string(::getpid())),
        listener_(*Listener::Bind(name_)),
        thread_([this] {
          while (auto channel = listener_.Accept())
            while (auto message = channel->Receive()) {
              if (message->body.at("op") == "end") return;
              blocks_ += message->body.value("blocks", Json::array()).size();
              (void)channel->Send(Json::object());
            }
        }) {}
  ~YesHmm() { (void)Channel::Connect(name_)->Send({{"op", "end"}}); }

  const std::string& name() const { return name_; }
  std::size_t blocks() const { return blocks_; }

 private:
  std::string name_;
  Listener listener_;
  std::atomic<std::size_t> blocks_ = 0;
  std::jthread thread_;
};

std::vector<core::KvCopy> Copies(int count) {
  std::vector<core::KvCopy> copies;
  for (int i = 0; i < count; ++i) copies.push_back({DomainId(0), BlockId(i), DomainId(1), BlockId(i)});
  return copies;
}

bool MoveOne(KvMover& mover, std::uint64_t request) {
  mover.Start(RequestId(request), Copies(70));
  for (;;) {
    const std::vector<KvMover::Done> done = mover.TakeDone();
    if (!done.empty()) {
      EXPECT_EQ(RequestId(request), done.front().request);
      return done.front().copied;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(KvMover, CopiesInTheMemoryOfTheHmmThatItFollowsAlone) {
  YesHmm hmm;
  // The one that the workers have mapped ended, and the next already answers by its name.
  KvMover mover(hmm.name(), ::getpid() + 1, [] {});
  EXPECT_FALSE(MoveOne(mover, 1));
  EXPECT_EQ(0, hmm.blocks());

  mover.Follow(::getpid());
  EXPECT_TRUE(MoveOne(mover, 2));
  EXPECT_EQ(70, hmm.blocks());
}

TEST(KvMover, GivesUpWhatWasStartedForTheHmmBefore) {
  YesHmm hmm;
  KvMover mover(hmm.name(), ::getpid(), [] {});
  EXPECT_TRUE(MoveOne(mover, 1));
  mover.Follow(::getpid() + 1);
  EXPECT_FALSE(MoveOne(mover, 2));
  EXPECT_EQ(70, hmm.blocks());
}

}  // namespace
}  // namespace elasticmoe::runtime
