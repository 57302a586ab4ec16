// The functions of the runtime API that need no more than the settings.
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <utility>

#include "settings.h"

using simt::settings;

namespace {

cudaError_t set(int* value, std::size_t to) {
  *value = int(to);
  return cudaSuccess;
}

}  // namespace

// Used by one host thread at a time. Not thread_local: the executor takes a module's TLS segment
// for shared memory.
struct Streams {
  std::map<std::uintptr_t, unsigned long long> numbers;  // by handle
  std::map<std::thread::id, unsigned long long> per_thread;
  std::map<std::thread::id, cudaStreamCaptureMode> capture_modes;  // global unless exchanged
  unsigned long long next = 2;                                     // 1: the default stream
};

static Streams& streams() {
  static Streams all;
  return all;
}

#define SIMT_ERROR(name, text) \
  case name:                   \
    return {#name, text};

static std::pair<const char*, const char*> describe(cudaError_t error) {
  switch (error) {
    SIMT_ERROR(cudaSuccess, "no error")
    SIMT_ERROR(cudaErrorInvalidValue, "invalid argument")
    SIMT_ERROR(cudaErrorMemoryAllocation, "out of memory")
    SIMT_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument")
    SIMT_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function")
    SIMT_ERROR(cudaErrorInvalidDevice, "invalid device ordinal")
    SIMT_ERROR(cudaErrorNotSupported, "operation not supported")
    SIMT_ERROR(cudaErrorLaunchFailure, "unspecified launch failure")
    SIMT_ERROR(
        cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")
    SIMT_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch")
    default:
      return {"cudaErrorUnknown", "unknown error"};
  }
}
#undef SIMT_ERROR

const char* cudaGetErrorName(cudaError_t error) {
  return describe(error).first;
}
const char* cudaGetErrorString(cudaError_t error) {
  return describe(error).second;
}
cudaError_t cudaGetLastError() {
  return std::exchange(settings.last_error, cudaSuccess);
}
cudaError_t cudaPeekAtLastError() {
  return settings.last_error;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = settings.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(streams().capture_modes[std::this_thread::get_id()], *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  Streams& s = streams();
  std::uintptr_t handle = 16;
  while (s.numbers.count(handle) != 0) handle += 16;
  s.numbers[handle] = s.next++;
  *stream = reinterpret_cast<cudaStream_t>(handle);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  streams().numbers.erase(reinterpret_cast<std::uintptr_t>(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* number) {
  Streams& s = streams();
  const auto handle = reinterpret_cast<std::uintptr_t>(stream);
  if (stream == cudaStreamPerThread) {
    auto& own = s.per_thread[std::this_thread::get_id()];
    *number = own == 0 ? own = s.next++ : own;
    return cudaSuccess;
  }
  if (handle != 0 && s.numbers.count(handle) == 0) return cudaErrorInvalidValue;
  *number = handle == 0 ? 1 : s.numbers[handle];
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  return set(count, 1);
}
cudaError_t cudaGetDevice(int* device) {
  return set(device, 0);
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  const simt::Device& d = settings.device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return set(value, std::size_t(d.max_threads_per_block));
    case cudaDevAttrMaxGridDimX:
      return set(value, d.max_grid_x);
    case cudaDevAttrMaxGridDimY:
      return set(value, d.max_grid_y);
    case cudaDevAttrMaxGridDimZ:
      return set(value, d.max_grid_z);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return set(value, d.shared_per_block);
    case cudaDevAttrWarpSize:
      return set(value, std::size_t(warpSize));
    case cudaDevAttrMultiProcessorCount:
      return set(value, std::size_t(d.sm_count));
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return set(value, std::size_t(d.max_threads_per_sm));
    case cudaDevAttrComputeCapabilityMajor:
      return set(value, std::size_t(d.major));
    case cudaDevAttrComputeCapabilityMinor:
      return set(value, std::size_t(d.minor));
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return set(value, d.shared_per_sm);
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return set(value, std::size_t(d.registers_per_sm));
    case cudaDevAttrCooperativeLaunch:
      return set(value, 1);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return set(value, d.shared_per_block_optin);
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return set(value, std::size_t(d.max_blocks_per_sm));
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return set(value, d.shared_reserved_per_block);
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  const simt::Device& d = settings.device;
  cudaDeviceProp& p = *properties;
  p = {};
  std::strcpy(p.name, "simt executor");
  p.sharedMemPerBlock = d.shared_per_block;
  p.sharedMemPerBlockOptin = d.shared_per_block_optin;
  p.sharedMemPerMultiprocessor = d.shared_per_sm;
  p.reservedSharedMemPerBlock = d.shared_reserved_per_block;
  p.regsPerBlock = p.regsPerMultiprocessor = d.registers_per_sm;
  p.warpSize = warpSize;
  p.maxThreadsPerBlock = d.max_threads_per_block;
  p.maxThreadsPerMultiProcessor = d.max_threads_per_sm;
  p.maxBlocksPerMultiProcessor = d.max_blocks_per_sm;
  p.maxGridSize[0] = int(d.max_grid_x);
  p.maxGridSize[1] = int(d.max_grid_y);
  p.maxGridSize[2] = int(d.max_grid_z);
  p.major = d.major;
  p.minor = d.minor;
  p.multiProcessorCount = d.sm_count;
  p.cooperativeLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  const bool relaxed =
      streams().capture_modes[std::this_thread::get_id()] == cudaStreamCaptureModeRelaxed;
  if (settings.capturing && !relaxed) return cudaErrorStreamCaptureUnsupported;
  *address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, std::size_t bytes) {
  if (address == nullptr) return cudaErrorInvalidValue;
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
