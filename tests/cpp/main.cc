// The one place that compiles doctest's runner; every other *_test.cc only includes its header.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "doctest/doctest.h"
