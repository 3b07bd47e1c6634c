// How every C function of these crates fails: with a text that the caller frees by rectiflow_free_text, or null. No C++
// exception leaves one.

#pragma once

#include <cstring>
#include <exception>

template <typename Act>
char* guarded(Act act) {
  try {
    act();
    return nullptr;
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception of an unknown kind");
  }
}
