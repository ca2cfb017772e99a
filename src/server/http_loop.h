// Inside of the HTTP server, not for others: an event loop with its inbox, and what connections share.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <ctime>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/http_server.h"

namespace elasticmoe::server {

namespace asio = boost::asio;
class HttpSession;

// One thread, its connections and its inbox of tasks from other threads.
struct HttpLoop {
  std::set<HttpSession*> sessions;  // before `context`: frames that it destroys leave the set
  std::mutex mutex;
  std::vector<std::function<void()>> inbox;
  bool posted = false;
  bool closed = false;
  asio::io_context context{1};
  asio::steady_timer sweep{context};
  std::thread thread;
  std::time_t date_s = 0;
  std::string date;

  void Post(std::function<void()> task) {
    {
      std::lock_guard lock(mutex);
      if (closed) return;
      inbox.push_back(std::move(task));
      if (std::exchange(posted, true)) return;
    }
    asio::post(context, [this] { Drain(); });
  }

  void Drain() {
    std::vector<std::function<void()>> tasks;
    {
      std::lock_guard lock(mutex);
      tasks.swap(inbox);
      posted = false;
    }
    for (auto& task : tasks) task();
  }

  // Tasks keep exchanges and those keep this: cut the ring.
  void CloseInbox() {
    std::vector<std::function<void()>> tasks;
    std::lock_guard lock(mutex);
    closed = true;
    tasks.swap(inbox);
  }

  const std::string& Date() {
    const std::time_t now = std::time(nullptr);
    if (now != date_s) {
      date_s = now;
      std::tm tm{};
      gmtime_r(&now, &tm);
      char text[64];
      date.assign(text, std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &tm));
    }
    return date;
  }
};

// What connections share.
struct HttpShared {
  HttpOptions options;
  const Router& router;
  std::atomic<int> connections{0};
  std::atomic<int> lingering{0};
  std::atomic<bool> stopping{false};
  std::atomic<std::uint64_t> request_count{0};
  std::uint64_t id_seed = 0;
  asio::thread_pool helpers;

  HttpShared(HttpOptions o, const Router& r)
      : options(std::move(o)), router(r), helpers(static_cast<std::size_t>(options.helper_threads)) {}
};

}  // namespace elasticmoe::server
