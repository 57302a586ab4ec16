// The executor's own cases: runs those that are named, or all.
#include <algorithm>
#include <cstdio>

#include "cases.h"

namespace executor_cases {
// Only in the build with AddressSanitizer, and only by name.
__attribute__((weak)) std::vector<Case> outside_cases();
}  // namespace executor_cases

int main(int count, char** names) {
  std::vector<executor_cases::Case> cases = executor_cases::primitive_cases();
  for (const auto& each : executor_cases::error_cases()) cases.push_back(each);
  for (const auto& each : executor_cases::launch_state_cases()) cases.push_back(each);
  if (count > 1 && executor_cases::outside_cases != nullptr) {
    for (const auto& each : executor_cases::outside_cases()) cases.push_back(each);
  }
  int failures = 0, runs = 0;
  for (const auto& each : cases) {
    if (count > 1 && std::find(names + 1, names + count, std::string(each.name)) == names + count) {
      continue;
    }
    ++runs;
    try {
      each.run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", each.name, error.what());
      ++failures;
    }
  }
  std::printf("%d run, %d failed\n", runs, failures);
  return failures != 0 || runs == 0;
}
