/* The CUDA driver of a device that is not there: what PyTorch asks `libcuda.so.1` for.
 *
 * Virtual memory is real bookkeeping, so that `expandable_segments:True` works: addresses are reserved,
 * physical memory is counted against the card. Entry points that are missing here are named when they are
 * looked up (null_runtime.c).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2 };
#define ACCEPTS(name) int name(void) { return SUCCESS; }

extern int cudaGetDevice(int *), cudaGetDeviceCount(int *), cudaDeviceGetAttribute(int *, int, int);
extern int null_device_take(int, size_t);
extern void null_device_launch(void);
extern void null_device_give_back(int, size_t), null_device_enter(void *, size_t, int);

static void *const context = (void *)16;

ACCEPTS(cuInit)
int cuDriverGetVersion(int *version) { *version = CUDA_VERSION_OF_TORCH; return SUCCESS; }
int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGet(int *device, int number) { *device = number; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return cudaDeviceGetAttribute(value, attribute, device);
}
int cuDeviceGetUuid(void *uuid, int device) { memset(uuid, device, 16); return SUCCESS; }
int cuDeviceGetUuid_v2(void *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = context; return SUCCESS; }
int cuCtxGetCurrent(void **made) { *made = context; return SUCCESS; }
ACCEPTS(cuCtxSetCurrent)
ACCEPTS(cuCtxPushCurrent)
ACCEPTS(cuCtxPopCurrent)

struct physical { size_t bytes; int device; };

int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
    *bytes = 2 << 20;
    return SUCCESS;
}
int cuMemAddressReserve(void **address, size_t bytes, size_t alignment, void *wanted, unsigned long long flags) {
    int device;
    *address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return OUT_OF_MEMORY;
    cudaGetDevice(&device);
    null_device_enter(*address, bytes, device);
    return SUCCESS;
}
int cuMemAddressFree(void *address, size_t bytes) { munmap(address, bytes); return SUCCESS; }
int cuMemCreate(uint64_t *made, size_t bytes, const void *properties, unsigned long long flags) {
    int device;
    cudaGetDevice(&device);
    if (!null_device_take(device, bytes)) return OUT_OF_MEMORY;
    struct physical *memory = malloc(sizeof *memory);
    *memory = (struct physical){bytes, device};
    *made = (uint64_t)(uintptr_t)memory;
    return SUCCESS;
}
int cuMemRelease(uint64_t memory) {
    struct physical *released = (struct physical *)(uintptr_t)memory;
    null_device_give_back(released->device, released->bytes);
    free(released);
    return SUCCESS;
}
ACCEPTS(cuMemMap)
ACCEPTS(cuMemSetAccess)
int cuMemUnmap(void *address, size_t bytes) { madvise(address, bytes, MADV_DONTNEED); return SUCCESS; }

int cuGetErrorName(int error, const char **text) { *text = "CUDA_ERROR_NULL_DEVICE"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "not on the null device"; return SUCCESS; }

/* Kernels that are compiled when they are used. */
int cuStreamGetCtx(void *stream, void **made) { *made = context; return SUCCESS; }
ACCEPTS(cuDevicePrimaryCtxRelease)
int cuModuleLoadDataEx(void **module, const void *image, unsigned options, void *names, void **values) {
    *module = context;
    return SUCCESS;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = context; return SUCCESS; }
ACCEPTS(cuModuleUnload)
ACCEPTS(cuFuncSetAttribute)
ACCEPTS(cuFuncSetCacheConfig)
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int size, size_t shared) {
    *blocks = 2;
    return SUCCESS;
}
int cuLaunchKernel(void) { null_device_launch(); return SUCCESS; }
int cuLaunchCooperativeKernel(void) { null_device_launch(); return SUCCESS; }
