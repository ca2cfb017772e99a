#include "base/json.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace elasticmoe {
namespace {

// Nesting is counted on the text, ahead of the parser: brackets outside of strings.
Status CheckDepth(std::string_view text, int max_depth) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > max_depth)
        return Fail(ErrorCode::kInvalidArgument, "parsing JSON: nested deeper than {} at byte {}", max_depth,
                    i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return {};
}

// Builds values from the parser's events. The library's own builder looks every new key up among the object's
// keys, one by one: quadratic, hours for a body of a few MiB. Here keys are appended and repeats are settled
// once, when the object ends: the last value counts, at the first place.
class Builder {
 public:
  bool null() { return Add(Json()); }
  bool boolean(bool value) { return Add(Json(value)); }
  bool number_integer(Json::number_integer_t value) { return Add(Json(value)); }
  bool number_unsigned(Json::number_unsigned_t value) { return Add(Json(value)); }
  bool number_float(Json::number_float_t value, const std::string&) { return Add(Json(value)); }
  bool string(std::string& value) { return Add(Json(std::move(value))); }
  bool binary(Json::binary_t&) { return false; }
  bool start_array(std::size_t) { return Open(Json::array()); }
  bool start_object(std::size_t) { return Open(Json::object()); }
  bool key(std::string& name) {
    Members(*open_.back()).emplace_back(std::move(name), Json());
    return true;
  }
  bool end_array() {
    open_.pop_back();
    return true;
  }
  bool end_object() {
    SettleRepeats(*open_.back());
    open_.pop_back();
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& e) {
    error = e.what();
    return false;
  }

  Json root;
  std::string error;

 private:
  using Container = Json::object_t::Container;
  static Container& Members(Json& object) { return object.get_ref<Json::object_t&>(); }

  // The value's final place. Parents do not grow while a child is open, so the pointers of `open_` hold.
  Json* Place(Json value) {
    if (open_.empty()) {
      root = std::move(value);
      return &root;
    }
    Json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    Json& place = Members(parent).back().second;
    place = std::move(value);
    return &place;
  }
  bool Add(Json value) {
    Place(std::move(value));
    return true;
  }
  bool Open(Json value) {
    open_.push_back(Place(std::move(value)));
    return true;
  }

  static void SettleRepeats(Json& object) {
    Container& members = Members(object);
    if (members.size() < 2) return;
    std::vector<std::size_t> order(members.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(
        order, [&](std::size_t a, std::size_t b) { return members[a].first < members[b].first; });
    std::vector<bool> repeat(members.size());
    bool any = false;
    for (std::size_t i = 0; i < order.size();) {
      std::size_t end = i + 1;
      while (end < order.size() && members[order[end]].first == members[order[i]].first)
        repeat[order[end++]] = any = true;
      if (end > i + 1) members[order[i]].second = std::move(members[order[end - 1]].second);
      i = end;
    }
    if (!any) return;
    Json::object_t settled;
    for (std::size_t i = 0; i < members.size(); ++i)
      if (!repeat[i]) settled.Container::emplace_back(members[i].first, std::move(members[i].second));
    object.get_ref<Json::object_t&>() = std::move(settled);
  }

  std::vector<Json*> open_;  // arrays and objects that have not ended
};

}  // namespace

Expected<Json> ParseJson(std::string_view text, int max_depth) {
  EM_RETURN_IF_ERROR(CheckDepth(text, max_depth));
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    std::string_view what = builder.error;
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without the library's tag.
    if (auto at = what.find("] "); at != what.npos) what.remove_prefix(at + 2);
    return Fail(ErrorCode::kInvalidArgument, "parsing JSON: {}", what);
  }
  return std::move(builder.root);
}

std::string DumpJson(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace elasticmoe
