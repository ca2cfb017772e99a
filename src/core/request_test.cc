#include "core/request.h"

#include <gtest/gtest.h>

namespace elasticmoe::core {
namespace {

GenerationRequest Of(std::vector<TokenId> prompt, int max_tokens) {
  GenerationRequest request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  return request;
}

// "" where the request may run, in a context of four tokens out of ten.
std::string Refusal(const GenerationRequest& request) {
  const Status status = CheckRequest(request, {.vocab = 10, .max_model_len = 4});
  if (status) return "";
  EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
  return status.error().message;
}

TEST(CheckRequest, TakesWhatTheContextHolds) {
  EXPECT_EQ(Refusal(Of({0, 9, 1}, 1)), "");
  EXPECT_EQ(Refusal(Of({0, 9, 1}, 1000)), "");  // cut to what is left, by the scheduler
  EXPECT_EQ(Refusal(Of({0, 9, 1, 2}, 0)), "");  // only scored
}

TEST(CheckRequest, NamesTheFieldTheValueAndTheLimit) {
  EXPECT_EQ(Refusal(Of({}, 1)), "prompt: it is empty");
  EXPECT_EQ(Refusal(Of({1, 10}, 1)), "prompt: token id 10 is not in the vocabulary (limit=10)");
  EXPECT_EQ(Refusal(Of({-1}, 1)), "prompt: token id -1 is not in the vocabulary (limit=10)");
  EXPECT_EQ(Refusal(Of({1, 2, 3, 4}, 1)), "prompt: 4 tokens leave no room in the context (limit=4)");
  EXPECT_EQ(Refusal(Of({1, 2, 3, 4, 5}, 0)), "prompt: 5 tokens leave no room in the context (limit=4)");
  EXPECT_EQ(Refusal(Of({1}, -1)), "max_tokens: -1 is negative");
}

}  // namespace
}  // namespace elasticmoe::core
