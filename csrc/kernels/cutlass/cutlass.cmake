# TWOTOWER_CUTLASS=ON: moe_experts with implementation="cutlass". Finds the headers, which nothing here downloads, and
# compiles for sm_90a alone. No kernel there may be one of other files too: the two copies would share a name on the
# host, and other GPUs could be given the one without code for them.
set(cutlass_folders "${CUTLASS_ROOT}")
if(NOT CUTLASS_ROOT)
  if(NOT Python_EXECUTABLE)
    find_program(Python_EXECUTABLE NAMES python3 python REQUIRED)
  endif()
  execute_process(  # without importing: pip's isolated builds hide site-packages from `import`, not from sysconfig
    COMMAND "${Python_EXECUTABLE}" -c
      "import sys, sysconfig; print(*map(sysconfig.get_path, ('purelib', 'platlib')), *sys.path, sep=';')"
    OUTPUT_VARIABLE site_folders OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(REMOVE_ITEM site_folders "")
  list(TRANSFORM site_folders APPEND "/cutlass_library" OUTPUT_VARIABLE cutlass_folders)
endif()
unset(cutlass_include CACHE)
find_path(cutlass_include cutlass/version.h PATHS ${cutlass_folders} PATH_SUFFIXES include source/include NO_CACHE
  NO_DEFAULT_PATH)
if(NOT cutlass_include)
  message(FATAL_ERROR "TWOTOWER_CUTLASS=ON, but the headers of CUTLASS were not found: install the Python package "
    "nvidia-cutlass (pip install --no-deps nvidia-cutlass), or set CUTLASS_ROOT to a folder that has "
    "include/cutlass/version.h, got CUTLASS_ROOT='${CUTLASS_ROOT}'")
endif()
if(NOT "sm_90a" IN_LIST architecture_names)
  message(FATAL_ERROR "TWOTOWER_CUTLASS=ON needs an nvcc that knows sm_90a, got ${CMAKE_CUDA_COMPILER_VERSION}")
endif()

file(STRINGS "${cutlass_include}/cutlass/version.h" numbers REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) [0-9]+")
list(TRANSFORM numbers REPLACE "^#define CUTLASS_[A-Z]+ ([0-9]+).*" "\\1")
list(JOIN numbers "." cutlass_version)

add_library(twotower_cutlass OBJECT csrc/kernels/cutlass/grouped_experts.cu csrc/kernels/cutlass/grouped_gemm.cu)
set_target_properties(twotower_cutlass PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_ARCHITECTURES 90a-real)
target_compile_options(twotower_cutlass PRIVATE -std=c++20 --expt-relaxed-constexpr -Xcompiler=-Wall)
target_include_directories(twotower_cutlass SYSTEM PRIVATE "${cutlass_include}")
target_sources(twotower PRIVATE $<TARGET_OBJECTS:twotower_cutlass>)
set_property(SOURCE csrc/build_info.cpp csrc/ops/moe.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  TWOTOWER_CUTLASS_VERSION="${cutlass_version}")
message(STATUS "CUTLASS ${cutlass_version}: ${cutlass_include}")
