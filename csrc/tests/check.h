// Counting what is right and naming what is wrong.
#pragma once

#include <stdio.h>

#include <string>

#include "../api.h"

namespace check {

inline int failures = 0, checks = 0;
inline std::string isa, place;  // what is being tested

// Names the first of each place, and no more than 60.
inline bool named() {
  static std::string last;
  static int count = 0;
  std::string now = isa + ": " + place;
  if (now == last || count == 60) return false;
  last = now;
  count++;
  fprintf(stderr, "%s: ", now.c_str());
  return true;
}

inline bool expect(bool truth, const char *what, double got = 0, double wanted = 0) {
  checks++;
  if (!truth && (failures++, named())) fprintf(stderr, "%s: got %.9g, not %.9g\n", what, got, wanted);
  return truth;
}

inline bool expect_ok(int32_t status, const char *what) {
  checks++;
  if (status != FEWBITS_OK && (failures++, named()))
    fprintf(stderr, "%s: status %d: %s\n", what, status, fewbits_error());
  return status == FEWBITS_OK;
}

}  // namespace check
