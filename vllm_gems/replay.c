// Launches that were recorded once, made again in one call from Python.
//
// A program is a row of 64-bit cells, which hold the arguments of all launches one after the other, and says which of
// them are to be set anew at every run, and by what. CUDA's headers are not needed: the addresses of the functions that
// launch come from Python. A machine whose first bytes of a number are the least significant is taken for granted, as
// by everything that CUDA runs on: a kernel reads four or eight bytes of a cell.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { MOST_CELLS = 2048, MOST_SLOTS = 64, MOST_ARGUMENTS = 16 };

// kernel: the handle of a kernel; with threads = 0 the address of a function of 16 arguments of 64 bits, called as it is
typedef struct { uint64_t kernel; uint32_t grid, threads, shared, first, count, unused; } Launch;
// cell = slot's value + offset
typedef struct { uint32_t cell, slot; int64_t offset; } Patch;
typedef struct {
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
  uint32_t cells, launches, patches, slots;
  uint64_t *cell;
  Launch *launched;
  Patch *patch;
} Program;

typedef int (*Call)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);

static void release(PyObject *capsule) {
  Program *p = PyCapsule_GetPointer(capsule, "vllm_gems.program");
  PyMem_Free(p->cell), PyMem_Free(p->launched), PyMem_Free(p->patch), PyMem_Free(p);
}

static void *copied(const Py_buffer *buffer) {
  void *copy = PyMem_Malloc(buffer->len ? buffer->len : 1);
  if (copy) memcpy(copy, buffer->buf, buffer->len);
  return copy;
}

static int sound(const Program *p) {
  if (p->cells > MOST_CELLS || p->slots > MOST_SLOTS || p->slots < 1) return 0;
  for (uint32_t i = 0; i < p->launches; i++) {
    const Launch *l = &p->launched[i];
    if (l->first > p->cells || l->count > p->cells - l->first || (!l->threads && l->count != MOST_ARGUMENTS)) return 0;
  }
  for (uint32_t i = 0; i < p->patches; i++)
    if (p->patch[i].cell >= p->cells || p->patch[i].slot >= p->slots) return 0;
  return 1;
}

// make(cuLaunchKernel's address, number of slots, cells, launches, patches) -> program
static PyObject *make(PyObject *self, PyObject *args) {
  unsigned long long launch;
  unsigned slots;
  Py_buffer cells, launches, patches;
  if (!PyArg_ParseTuple(args, "KIy*y*y*", &launch, &slots, &cells, &launches, &patches)) return NULL;
  Program *p = PyMem_Calloc(1, sizeof *p);
  PyObject *capsule = NULL;
  if (p) {
    *(void **)&p->launch = (void *)(uintptr_t)launch;
    p->slots = slots;
    p->cells = cells.len / sizeof *p->cell, p->cell = copied(&cells);
    p->launches = launches.len / sizeof *p->launched, p->launched = copied(&launches);
    p->patches = patches.len / sizeof *p->patch, p->patch = copied(&patches);
    if (!p->cell || !p->launched || !p->patch) PyErr_NoMemory();
    else if (!sound(p)) PyErr_SetString(PyExc_ValueError, "a program whose parts do not fit together");
    else capsule = PyCapsule_New(p, "vllm_gems.program", release);
    if (!capsule) PyMem_Free(p->cell), PyMem_Free(p->launched), PyMem_Free(p->patch), PyMem_Free(p);
  } else
    PyErr_NoMemory();
  PyBuffer_Release(&cells), PyBuffer_Release(&launches), PyBuffer_Release(&patches);
  return capsule;
}

// run(program, stream, values of the other slots ...) -> whether it was launched; if not, none of it was
static PyObject *run(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  Program *p = count < 1 ? NULL : PyCapsule_GetPointer(args[0], "vllm_gems.program");
  if (!p) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "run(program, stream, ...)");
    return NULL;
  }
  if (count - 1 != p->slots)
    return PyErr_Format(PyExc_TypeError, "%zd values for a program of %u", count - 1, p->slots);
  uint64_t slot[MOST_SLOTS], cell[MOST_CELLS];
  void *argument[MOST_CELLS];
  for (Py_ssize_t i = 1; i < count; i++) {
    slot[i - 1] = PyLong_AsUnsignedLongLong(args[i]);
    if (slot[i - 1] == (uint64_t)-1 && PyErr_Occurred()) return NULL;
  }
  memcpy(cell, p->cell, p->cells * sizeof *cell);
  for (uint32_t i = 0; i < p->patches; i++) cell[p->patch[i].cell] = slot[p->patch[i].slot] + p->patch[i].offset;
  for (uint32_t i = 0; i < p->cells; i++) argument[i] = &cell[i];
  int status = 0;
  uint32_t at = 0, done = 0; // what a function did before it failed is not known
  // A full queue makes a launch wait, and what it waits for may need another thread of Python.
  Py_BEGIN_ALLOW_THREADS;
  for (; at < p->launches && !status; at++) {
    const Launch *l = &p->launched[at];
    const uint64_t *c = &cell[l->first];
    if (!l->threads) {
      done++;
      status = ((Call)(uintptr_t)l->kernel)(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11],
                                            c[12], c[13], c[14], c[15]);
    } else if (l->grid) {
      status = p->launch((void *)(uintptr_t)l->kernel, l->grid, 1, 1, l->threads, 1, 1, l->shared,
                         (void *)(uintptr_t)slot[0], &argument[l->first], NULL);
      done += !status;
    }
  }
  Py_END_ALLOW_THREADS;
  if (!status) Py_RETURN_TRUE;
  if (!done) Py_RETURN_FALSE;
  return PyErr_Format(PyExc_RuntimeError, "launch %u of %u returned status %d", at, p->launches, status);
}

static PyMethodDef methods[] = {
    {"make", make, METH_VARARGS, "make(launch, slots, cells, launches, patches) -> program"},
    {"run", (PyCFunction)(void (*)(void))run, METH_FASTCALL, "run(program, stream, ...) -> whether it was"},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "vllm_gems_replay", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_vllm_gems_replay(void) { return PyModule_Create(&module); }
