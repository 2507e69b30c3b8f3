// Enumerators by name, and the formats of arrays.
#pragma once

#include <cstddef>
#include <string>

#include "bind/errors.h"
#include "optim/update_rule.h"

namespace offload::bind {

template <typename T>
struct Named {
  const char* name;
  T value;
};

inline constexpr Named<ElementType> kElementTypes[] = {{"float32", ElementType::kFloat32},
                                                       {"bfloat16", ElementType::kBfloat16},
                                                       {"float16", ElementType::kFloat16}};
inline constexpr Named<StateFormat> kStateFormats[] = {{"float32", StateFormat::kFloat32},
                                                       {"bfloat16", StateFormat::kBfloat16},
                                                       {"int8", StateFormat::kInt8}};

// Raises OffloadError where there is none of that name.
template <typename T, std::size_t kCount>
T by_name(const char* what, const Named<T> (&all)[kCount], const std::string& name) {
  for (const Named<T>& candidate : all) {
    if (name == candidate.name) return candidate.value;
  }
  raise(Status::error(Code::kInvalid, std::string("there is no ") + what + " '" + name + "'"));
}

template <typename T, std::size_t kCount>
std::string name_of(const Named<T> (&all)[kCount], T value) {
  for (const Named<T>& candidate : all) {
    if (value == candidate.value) return candidate.name;
  }
  return "unknown";
}

}  // namespace offload::bind
