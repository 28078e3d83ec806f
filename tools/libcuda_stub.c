/* A stand-in for the NVIDIA driver library, with which the extension libraries of vLLM's CUDA build load, and register
 * their ops, on a machine that has no GPU. It has what they need at link time; every call answers CUDA_ERROR_NO_DEVICE.
 */
#define NO_DEVICE 100
#define ANSWER(name) int name(void) { return NO_DEVICE; }

ANSWER(cuGetProcAddress_v2)
ANSWER(cuPointerGetAttribute)
ANSWER(cuTensorMapEncodeTiled)
