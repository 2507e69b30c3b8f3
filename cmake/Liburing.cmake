# Finds liburing. Sets OFFLOAD_LIBURING (the library to link, static when it can go into a shared
# object, so that a wheel carries it) and OFFLOAD_LIBURING_INCLUDE_DIR, or leaves OFFLOAD_LIBURING
# empty where it is not installed: the thread-pool engine then serves alone.

set(OFFLOAD_LIBURING "")
find_path(OFFLOAD_LIBURING_INCLUDE_DIR liburing.h)
find_library(OFFLOAD_LIBURING_STATIC NAMES liburing.a)
find_library(OFFLOAD_LIBURING_SHARED NAMES uring)
mark_as_advanced(OFFLOAD_LIBURING_INCLUDE_DIR OFFLOAD_LIBURING_STATIC OFFLOAD_LIBURING_SHARED)

if(OFFLOAD_LIBURING_INCLUDE_DIR AND OFFLOAD_LIBURING_STATIC)
  # Distributions may build the archive without -fPIC.
  if(NOT DEFINED OFFLOAD_LIBURING_STATIC_IS_PIC)
    try_compile(OFFLOAD_LIBURING_STATIC_IS_PIC
      SOURCE_FROM_CONTENT uring_pic.cc
        "#include <liburing.h>\nint ring_flags(io_uring* ring) { return io_uring_submit(ring); }\n"
      CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${OFFLOAD_LIBURING_INCLUDE_DIR}"
      COMPILE_DEFINITIONS -fPIC
      LINK_OPTIONS -shared -Wl,--whole-archive ${OFFLOAD_LIBURING_STATIC} -Wl,--no-whole-archive)
  endif()
  if(OFFLOAD_LIBURING_STATIC_IS_PIC)
    set(OFFLOAD_LIBURING ${OFFLOAD_LIBURING_STATIC})
  endif()
endif()
if(OFFLOAD_LIBURING_INCLUDE_DIR AND NOT OFFLOAD_LIBURING AND OFFLOAD_LIBURING_SHARED)
  set(OFFLOAD_LIBURING ${OFFLOAD_LIBURING_SHARED})
endif()

if(OFFLOAD_LIBURING)
  message(STATUS "io_uring engine: on, with ${OFFLOAD_LIBURING}")
else()
  message(STATUS "io_uring engine: off, liburing was not found (Debian: liburing-dev)")
endif()
