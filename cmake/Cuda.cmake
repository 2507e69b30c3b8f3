# Finds the CUDA toolkit. OFFLOAD_CUDA=AUTO uses it where it is installed, ON insists on it, OFF
# leaves it out. The runtime is linked statically: the extension imports where there is no driver.

set(OFFLOAD_CUDA AUTO CACHE STRING "CUDA: AUTO (where the toolkit is found), ON or OFF")
set_property(CACHE OFFLOAD_CUDA PROPERTY STRINGS AUTO ON OFF)

if(OFFLOAD_CUDA STREQUAL "AUTO")
  find_package(CUDAToolkit QUIET)
elseif(OFFLOAD_CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(NOT TARGET CUDA::cudart_static)
    message(FATAL_ERROR "OFFLOAD_CUDA=ON: ${CUDAToolkit_LIBRARY_ROOT} has no static CUDA runtime.")
  endif()
endif()

if(OFFLOAD_CUDA AND TARGET CUDA::cudart_static)
  message(STATUS "CUDA: on, ${CUDAToolkit_VERSION} in ${CUDAToolkit_INCLUDE_DIRS}")
else()
  message(STATUS "CUDA: off (OFFLOAD_CUDA=${OFFLOAD_CUDA}; needs the toolkit and its static runtime)")
endif()

# Gives `target` the CUDA runtime and OFFLOAD_HAVE_CUDA, where CUDA is on.
function(offload_link_cuda target)
  if(OFFLOAD_CUDA AND TARGET CUDA::cudart_static)
    target_compile_definitions(${target} PRIVATE OFFLOAD_HAVE_CUDA=1)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  endif()
endfunction()
