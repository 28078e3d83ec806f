// A libcuda.so.1 for machines without a GPU: it loads nothing, runs nothing, and remembers every launch.
//
// It has what Triton's NVIDIA backend calls, and is as strict as the real one where a launcher can go wrong: a function
// of an unloaded module, or of another device than the current one, is an error.
#include <cuda.h>
#include <stdio.h>
#include <string.h>

#define MOST 4096

typedef struct {
  int device; // -1 once it is unloaded
  int parameters;
  int sizes[64]; // of each parameter, in bytes
} Module;

typedef struct {
  unsigned grid[3], block[3], shared, attributes;
  unsigned long long stream, function;
  int device;
  int size; // of the parameters
  unsigned char parameters[512];
} Launch;

// Handles are places in these; a module has one function, of the same handle.
static Module modules[MOST];
static Launch launches[MOST];
static int loaded = 1, launched, unloaded, current, failures;

// For the tests.
int standin_loaded(void) { return loaded - 1; }
int standin_unloaded(void) { return unloaded; }
int standin_launched(void) { return launched; }
const Launch *standin_launch(int index) { return &launches[index]; }
void standin_fail(int launches) { failures = launches; }
void standin_set_device(int device) { current = device; }
void standin_set_parameters(unsigned long long function, int count, const int *sizes) {
  modules[function].parameters = count;
  memcpy(modules[function].sizes, sizes, count * sizeof *sizes);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  Module *module = &modules[(size_t)function];
  Launch *launch = &launches[launched];
  if (failures > 0)
    return --failures, CUDA_ERROR_INVALID_CONTEXT;
  if (!function || (size_t)function >= (size_t)loaded || module->device != current)
    return CUDA_ERROR_INVALID_HANDLE;
  if (launched == MOST - 1 || !module->parameters)
    return CUDA_ERROR_NOT_SUPPORTED;
  *launch = (Launch){
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared = config->sharedMemBytes,
      .attributes = config->numAttrs,
      .stream = (size_t)config->hStream,
      .function = (size_t)function,
      .device = current,
  };
  for (int i = 0; i < module->parameters; ++i) {
    memcpy(launch->parameters + launch->size, parameters[i], module->sizes[i]);
    launch->size += module->sizes[i];
  }
  ++launched;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
  CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
  Module *module = &modules[(size_t)function];
  if (index >= (size_t)module->parameters)
    return CUDA_ERROR_INVALID_VALUE;
  return *offset = 0, *size = module->sizes[index], CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (loaded == MOST)
    return CUDA_ERROR_OUT_OF_MEMORY;
  modules[loaded].device = current;
  *module = (CUmodule)(size_t)loaded++;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  modules[(size_t)module].device = -1;
  ++unloaded;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// An H100 as far as anybody asks.
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  static _Thread_local char buffer[64];
  snprintf(buffer, sizeof buffer, "stand-in driver: error %d", error);
  *text = buffer;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) { return *count = 2, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = current, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)modules, CUDA_SUCCESS; }

// Linked to by the backend's module, and of no consequence to a launch.
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache preference) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
