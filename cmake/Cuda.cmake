# Finds the CUDA toolkit. OFFLOAD_CUDA=AUTO uses it where it is installed, ON insists on it, OFF
# leaves it out. The runtime is linked statically: the extension imports where there is no driver.
# Kernels are compiled where there is an nvcc that works with the C++ compiler.

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

set(OFFLOAD_CUDA_KERNELS OFF)
if(OFFLOAD_CUDA AND TARGET CUDA::cudart_static)
  message(STATUS "CUDA: on, ${CUDAToolkit_VERSION} in ${CUDAToolkit_INCLUDE_DIRS}")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    # Real code for the generations in use that this nvcc knows, and PTX of the last for later ones.
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
    set(CMAKE_CUDA_ARCHITECTURES)
    foreach(arch IN ITEMS 80 90 120)
      if(known MATCHES "compute_${arch}\n")
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${arch}-real)
        set(last ${arch})
      endif()
    endforeach()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${last}-virtual)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    enable_language(CUDA)
    set(OFFLOAD_CUDA_KERNELS ON)
    message(STATUS "CUDA kernels: on, for ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(OFFLOAD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "OFFLOAD_CUDA=ON: no nvcc that works with this C++ compiler.")
  else()
    message(STATUS "CUDA kernels: off (no nvcc that works with this C++ compiler)")
  endif()
else()
  message(STATUS "CUDA: off (OFFLOAD_CUDA=${OFFLOAD_CUDA}; needs the toolkit and its static runtime)")
endif()

# Gives `target` the CUDA runtime and OFFLOAD_HAVE_CUDA, where CUDA is on, and the kernels.
function(offload_link_cuda target)
  if(OFFLOAD_CUDA AND TARGET CUDA::cudart_static)
    target_compile_definitions(${target} PRIVATE OFFLOAD_HAVE_CUDA=1)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  endif()
  if(OFFLOAD_CUDA_KERNELS)
    target_compile_definitions(${target} PRIVATE OFFLOAD_HAVE_CUDA_KERNELS=1)
    target_sources(${target} PRIVATE csrc/kernels/kernels.cu)
    # As -ffp-contract=off for C++: a product and a sum are rounded one after the other. Warning
    # 2810 is nvcc's mistake: it takes an assignment of a [[nodiscard]] class for a dropped value.
    target_compile_options(${target} PRIVATE
      "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;--expt-relaxed-constexpr;-Werror=all-warnings;-diag-suppress=2810>")
  endif()
endfunction()
