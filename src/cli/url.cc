#include <algorithm>
#include <charconv>

#include "cli/http_client.h"

namespace elasticmoe::cli {

Expected<Url> ParseUrl(std::string_view text) {
  const auto refuse = [&](std::string_view why) {
    return Fail(ErrorCode::kInvalidArgument, "reading a URL: '{}' {}; give http://HOST:PORT", text, why);
  };
  std::string_view rest = text;
  if (const auto scheme = rest.find("://"); scheme != rest.npos) {
    if (rest.substr(0, scheme) == "https") return refuse("asks for TLS, which this client does not speak");
    if (rest.substr(0, scheme) != "http") return refuse("is of another scheme than http");
    rest.remove_prefix(scheme + 3);
  }
  for (const char c : rest)
    if (static_cast<unsigned char>(c) <= ' ' || c == 0x7F)
      return refuse("holds a blank or a control character");
  if (rest.find_first_of("?#@") != rest.npos) return refuse("holds one of '?', '#', '@'");
  Url url;
  const std::size_t slash = std::min(rest.find('/'), rest.size());
  url.path = rest.substr(slash);
  std::string_view authority = rest.substr(0, slash);
  if (authority.starts_with('[')) {
    const auto end = authority.find(']');
    if (end == authority.npos) return refuse("has a '[' without ']'");
    url.host = authority.substr(1, end - 1);
    authority.remove_prefix(end + 1);
    if (!authority.empty() && authority.front() != ':') return refuse("has text after ']'");
  } else {
    const std::size_t colon = std::min(authority.find(':'), authority.size());
    url.host = authority.substr(0, colon);
    authority.remove_prefix(colon);
  }
  if (url.host.empty()) return refuse("names no host");
  if (!authority.empty()) {
    authority.remove_prefix(1);
    const auto [end, error] =
        std::from_chars(authority.data(), authority.data() + authority.size(), url.port);
    if (error != std::errc() || end != authority.data() + authority.size() || url.port == 0)
      return refuse("has no port of 1 to 65535 after ':'");
  }
  while (url.path.ends_with('/')) url.path.pop_back();
  if (url.path.ends_with("/v1")) url.path.resize(url.path.size() - 3);
  while (url.path.ends_with('/')) url.path.pop_back();
  return url;
}

std::string ToString(const Url& url) {
  const bool ipv6 = url.host.find(':') != std::string::npos;
  return fmt::format("http://{}{}{}:{}{}", ipv6 ? "[" : "", url.host, ipv6 ? "]" : "", url.port, url.path);
}

}  // namespace elasticmoe::cli
