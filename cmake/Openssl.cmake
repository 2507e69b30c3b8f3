# Finds OpenSSL 3's libcrypto, whose AES-256-XTS encrypts swap where that is asked for. Sets
# OFFLOAD_OPENSSL to the target to link, or to nothing where it is not installed: the build is
# whole without it and refuses encrypted swap. Shared on purpose: its fixes come with the system's.

set(OFFLOAD_OPENSSL "")
find_package(OpenSSL 3.0 QUIET COMPONENTS Crypto)
if(OpenSSL_FOUND)
  set(OFFLOAD_OPENSSL OpenSSL::Crypto)
  message(STATUS "encrypted swap: on, with OpenSSL ${OPENSSL_VERSION}")
else()
  message(STATUS "encrypted swap: off, OpenSSL 3 was not found (Debian: libssl-dev)")
endif()
