#include "core/request.h"

namespace elasticmoe::core {

Status CheckRequest(const GenerationRequest& request, const RequestLimits& limits) {
  if (request.prompt.empty()) return Fail(ErrorCode::kInvalidArgument, "prompt: it is empty");
  for (const TokenId token : request.prompt)
    if (token < 0 || token >= limits.vocab)
      return Fail(ErrorCode::kInvalidArgument, "prompt: token id {} is not in the vocabulary (limit={})",
                  token, limits.vocab);
  if (request.max_tokens < 0)
    return Fail(ErrorCode::kInvalidArgument, "max_tokens: {} is negative", request.max_tokens);
  const std::size_t least = request.prompt.size() + (request.max_tokens > 0 ? 1 : 0);
  if (least > static_cast<std::size_t>(limits.max_model_len))
    return Fail(ErrorCode::kInvalidArgument, "prompt: {} tokens leave no room in the context (limit={})",
                request.prompt.size(), limits.max_model_len);
  return {};
}

}  // namespace elasticmoe::core
