# Per-file instruction sets. A source whose name ends in one of these suffixes is compiled only on
# its architecture, with its own flags, and is reached only after a run-time check of the CPU.
# Everything else is compiled for the architecture's baseline: never -march=native.

set(OFFLOAD_ISA_x86_64 sse42 vpclmul avx2 avx512)
set(OFFLOAD_ISA_aarch64 armcrc neon)

set(OFFLOAD_ISA_FLAGS_sse42 -msse4.2 -mpclmul)
set(OFFLOAD_ISA_FLAGS_vpclmul -msse4.2 -mpclmul -mavx512f -mavx512vl -mvpclmulqdq)
set(OFFLOAD_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(OFFLOAD_ISA_FLAGS_avx512 -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mf16c)
set(OFFLOAD_ISA_FLAGS_armcrc -march=armv8-a+crc)
set(OFFLOAD_ISA_FLAGS_neon "")  # part of the aarch64 baseline

# Removes from the list named `sources` the files of other architectures, and gives those of this
# one their flags.
function(offload_select_isa_sources sources)
  set(kept ${${sources}})
  foreach(arch IN ITEMS x86_64 aarch64)
    foreach(isa IN LISTS OFFLOAD_ISA_${arch})
      if(NOT arch STREQUAL OFFLOAD_ARCH)
        list(FILTER kept EXCLUDE REGEX "_${isa}\\.cc$")
        continue()
      endif()
      set(matching ${kept})
      list(FILTER matching INCLUDE REGEX "_${isa}\\.cc$")
      if(matching AND OFFLOAD_ISA_FLAGS_${isa})
        set_source_files_properties(
          ${matching} PROPERTIES COMPILE_OPTIONS "${OFFLOAD_ISA_FLAGS_${isa}}")
      endif()
    endforeach()
  endforeach()
  set(${sources} ${kept} PARENT_SCOPE)
endfunction()
