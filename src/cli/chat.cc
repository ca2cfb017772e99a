// elasticmoe chat: a conversation with a server, streamed to the terminal.
#include <poll.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>

#include "cli/client.h"
#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/openai_answer.h"
#include "cli/sse.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "chat";
constexpr TimeNs kAnswerTimeoutNs = 3600'000'000'000;  // an answer may be long; Ctrl-C is there

struct Options {
  ServerFlags server;
  std::string model, system, once;
  std::optional<double> temperature, top_p;
  std::optional<int> max_tokens;
  std::optional<std::uint64_t> seed;
};

// Lines of stdin, and Ctrl-C while waiting for them.
class LineReader {
 public:
  explicit LineReader(Interrupts& interrupts) : interrupts_(interrupts) {}

  enum class Got { kLine, kInterrupt, kEnd };
  Got Read(std::string& line) {
    for (;;) {
      if (const auto end = buffer_.find('\n'); end != buffer_.npos) {
        line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return Got::kLine;
      }
      pollfd waits[2] = {{STDIN_FILENO, POLLIN, 0}, {interrupts_.fd(), POLLIN, 0}};
      if (::poll(waits, 2, -1) < 0 && errno != EINTR) return Got::kEnd;
      if (interrupts_.Take()) {
        buffer_.clear();
        return Got::kInterrupt;
      }
      if (waits[0].revents == 0) continue;
      char bytes[4096];
      const ssize_t n = ::read(STDIN_FILENO, bytes, sizeof bytes);
      if (n > 0) {
        buffer_.append(bytes, static_cast<std::size_t>(n));
      } else if (n == 0 || errno != EINTR) {
        line = std::move(buffer_);  // the last line may have no end
        buffer_.clear();
        return line.empty() ? Got::kEnd : Got::kLine;
      }
    }
  }

 private:
  Interrupts& interrupts_;
  std::string buffer_;
};

class Conversation {
 public:
  Conversation(EventLoop& loop, HttpClient& client, Interrupts& interrupts, const Options& options)
      : loop_(loop), client_(client), options_(options), styled_(IsTerminal(STDOUT_FILENO)) {
    loop_.OnReadable(interrupts.fd(), [this, &interrupts] {
      if (interrupts.Take() && call_) call_->Cancel();
    });
    SetSystem(options.system);
  }

  void SetSystem(const std::string& text) {
    system_ = text;
    Reset();
  }
  void Reset() {
    messages_ = Json::array();
    if (!system_.empty()) messages_.push_back({{"role", "system"}, {"content", system_}});
  }

  // One turn: `text` is said, the answer is printed as it comes. An answer that was stopped by Ctrl-C stays
  // in the history as far as it came; one that failed takes its question with it.
  Status Say(const std::string& text) {
    messages_.push_back({{"role", "user"}, {"content", text}});
    std::string answer, error_body, refusal;
    int status = 0;
    bool events = false;
    SseParser parser;
    std::optional<Status> ended;
    HttpHandlers handlers;
    handlers.head = [&](const HttpHead& head) {
      status = head.status;
      events = head.content_type.starts_with("text/event-stream");
    };
    handlers.data = [&](std::string_view bytes, TimeNs) {
      if (status != 200 || !events) {
        error_body += bytes.substr(
            0, std::min(bytes.size(), std::size_t{65536} - std::min(std::size_t{65536}, error_body.size())));
        return;
      }
      Status fed = parser.Feed(bytes, [&](const SseEvent& event) { Show(event, answer, refusal); });
      if (!fed) refusal = fed.error().message;
      if (!refusal.empty()) call_->Cancel();
    };
    handlers.done = [&](Status done) {
      ended = std::move(done);
      loop_.Stop();
    };
    call_ = client_.Send(
        {.method = "POST", .target = "/v1/chat/completions", .body = Body(), .timeout_ns = kAnswerTimeoutNs},
        std::move(handlers));
    while (!ended) loop_.Run();
    call_.reset();
    EndStyle();
    const bool stopped = !*ended && ended->error().code == ErrorCode::kCancelled && refusal.empty();
    if (*ended && status == 200 && !events) refusal = "the server does not stream its answer";
    if (*ended && status != 200) refusal = ServerMessage(status, error_body);
    if (refusal.empty() && !*ended && !stopped) refusal = ended->error().message;
    if (!answer.empty() || stopped) std::fputs(stopped ? " [stopped]\n" : "\n", stdout);
    std::fflush(stdout);
    if (!refusal.empty()) {
      messages_.erase(messages_.size() - 1);
      return Fail(ErrorCode::kUnavailable, "{}", refusal);
    }
    messages_.push_back({{"role", "assistant"}, {"content", answer}});
    return {};
  }

 private:
  std::string Body() const {
    Json body = {{"model", options_.model}, {"messages", messages_}, {"stream", true}};
    if (options_.temperature) body["temperature"] = *options_.temperature;
    if (options_.top_p) body["top_p"] = *options_.top_p;
    if (options_.max_tokens) body["max_tokens"] = *options_.max_tokens;
    if (options_.seed) body["seed"] = *options_.seed;
    return DumpJson(body);
  }

  void Show(const SseEvent& event, std::string& answer, std::string& refusal) {
    if (event.data == "[DONE]" || !refusal.empty()) return;
    const auto part = ParseAnswerPart(event.data);
    if (!part) {
      refusal = part.error().message;
      return;
    }
    if (part->text.empty()) return;
    if (part->is_reasoning) {
      if (styled_ && !dim_) std::fputs("\x1b[2m", stdout);
      dim_ = styled_;
      reasoned_ = true;
      if (!styled_) return;  // a program that reads our output wants the answer
    } else {
      if (reasoned_ && styled_) std::fputs("\x1b[0m\n\n", stdout);
      dim_ = reasoned_ = false;
      answer += part->text;
    }
    std::fwrite(part->text.data(), 1, part->text.size(), stdout);
    std::fflush(stdout);
  }

  void EndStyle() {
    if (dim_) std::fputs("\x1b[0m\n", stdout);
    dim_ = reasoned_ = false;
  }

  EventLoop& loop_;
  HttpClient& client_;
  const Options& options_;
  const bool styled_;
  std::string system_;
  Json messages_;
  std::shared_ptr<HttpCall> call_;
  bool dim_ = false, reasoned_ = false;
};

constexpr char kHelp[] =
    "  /reset          forget the conversation\n"
    "  /system TEXT    begin anew with this system message (no TEXT: without one)\n"
    "  /exit           leave (also Ctrl-D, or Ctrl-C twice)\n";

// False when the conversation is over.
bool Command(Conversation& conversation, const std::string& line) {
  const std::size_t blank = std::min(line.find(' '), line.size());
  const std::string name = line.substr(0, blank);
  if (name == "/exit" || name == "/quit") return false;
  if (name == "/reset") {
    conversation.Reset();
  } else if (name == "/system") {
    conversation.SetSystem(line.substr(std::min(blank + 1, line.size())));
  } else {
    if (name != "/help") std::fprintf(stderr, "no such command: %s\n", name.c_str());
    std::fputs(kHelp, stderr);
  }
  return true;
}

int Talk(Conversation& conversation, Interrupts& interrupts, const Options& options) {
  const bool terminal = IsTerminal(STDIN_FILENO);
  if (terminal)
    std::fprintf(stderr, "Talking to %s at %s. /help for commands.\n", options.model.c_str(),
                 options.server.url.c_str());
  LineReader reader(interrupts);
  std::string line;
  int exit_code = 0;
  for (bool warned = false;;) {
    if (terminal) std::fputs("\n> ", stderr);
    const LineReader::Got got = reader.Read(line);
    if (got == LineReader::Got::kInterrupt) {
      if (!terminal) return 130;
      if (std::exchange(warned, true)) break;
      std::fputs("\n(Ctrl-C again or /exit leaves)", stderr);
      continue;
    }
    if (got == LineReader::Got::kEnd) break;
    warned = false;
    if (line.ends_with('\r')) line.pop_back();
    if (line.find_first_not_of(" \t") == line.npos) continue;
    if (line.front() == '/') {
      if (!Command(conversation, line)) break;
    } else if (Status said = conversation.Say(line); !said) {
      exit_code = Complain(kCommand, said.error());
    }
  }
  if (terminal) std::fputs("\n", stderr);
  return exit_code;
}

int Run(Options options) {
  auto url = ParseUrl(options.server.url);
  if (!url) return Complain(kCommand, url.error());
  EventLoop loop;
  HttpClient client(loop, *std::move(url), {.api_key = options.server.api_key});
  if (options.model.empty()) {
    auto models = ListModels(client);
    if (!models) return Complain(kCommand, models.error());
    options.model = models->front().id;
  }
  Interrupts interrupts;
  Conversation conversation(loop, client, interrupts, options);
  if (options.once.empty()) return Talk(conversation, interrupts, options);
  if (Status said = conversation.Say(options.once); !said) return Complain(kCommand, said.error());
  return 0;
}

}  // namespace

void RegisterChat(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("chat", "Talk to a running server");
  sub->footer(
      "Examples:\n"
      "  elasticmoe chat --system 'You answer in one sentence.'\n"
      "  elasticmoe chat --once 'Who was Mr. Darcy?' --max-tokens 60\n"
      "  elasticmoe chat < questions.txt          one turn a line");
  AddServerFlags(*sub, options->server);
  sub->add_option("--model", options->model, "Default: the first that the server names");
  sub->add_option("--system", options->system, "System message");
  sub->add_option("--temperature", options->temperature)->check(CLI::Range(0.0, 100.0));
  sub->add_option("--top-p", options->top_p)->check(CLI::Range(0.0, 1.0));
  sub->add_option("--max-tokens", options->max_tokens)->check(CLI::Range(1, 10'000'000));
  sub->add_option("--seed", options->seed);
  sub->add_option("--once", options->once, "Ask this, print the answer, leave");
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
