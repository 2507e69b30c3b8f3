# Refuses what offload does not support, and maps the processor to OFFLOAD_ARCH (x86_64, aarch64).

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR
    "offload needs Linux (O_DIRECT, O_TMPFILE, fallocate); this is ${CMAKE_SYSTEM_NAME}.")
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(OFFLOAD_ARCH x86_64)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(OFFLOAD_ARCH aarch64)
else()
  message(FATAL_ERROR
    "offload supports x86_64 and aarch64; this processor is ${CMAKE_SYSTEM_PROCESSOR}.")
endif()

if(NOT CMAKE_SIZEOF_VOID_P EQUAL 8)
  message(FATAL_ERROR "offload needs a 64-bit compiler; this one makes 32-bit code.")
endif()
