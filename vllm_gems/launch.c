// A compiled kernel as something to call from Python: launch(grid, *arguments), packed for cuLaunchKernel.
//
// Triton's own C launcher is given twice as many arguments, in a tuple, and looks at the context, the hooks and all of
// them at every call. Here what is settled when a kernel is loaded is read from a table; and so is what is settled
// later, by launch.settle(...). CUDA's headers are not needed: the address of the function that launches comes from
// Python.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

enum { MOST = 96, SETTLED = 255 };

// What Python objects a launch asks, in the order in which they are given; all are held with the tuple they come in.
enum { DEVICE, CURRENT_DEVICE, RAW_STREAM, ENTER, LEAVE, TAPES, GUARDED, KERNEL, ASKED };

typedef struct {
  PyObject_HEAD
  vectorcallfunc call;
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
  void *kernel;
  PyObject *held;
  long device, grid; // grid -1: the first thing that a call is given
  unsigned threads, shared, parameters;
  Py_ssize_t count;     // of what a call is given
  char kinds[MOST];     // of each parameter: p(ointer), i(nt32), l(ong), f(loat), d(ouble)
  uint8_t places[MOST]; // where each is in a call, or SETTLED
  uint64_t cells[MOST]; // those that are
} Launch;

static inline int packed(char kind, PyObject *arg, uint64_t *cell) {
  if (kind == 'p') {
    if (arg == Py_None) return *cell = 0, 1;
    *cell = PyLong_AsUnsignedLongLong(arg);
    return *cell != (uint64_t)-1 || !PyErr_Occurred();
  }
  if (kind == 'f' || kind == 'd') {
    double value = PyFloat_AsDouble(arg);
    if (value == -1.0 && PyErr_Occurred()) return 0;
    float narrow = (float)value;
    if (kind == 'f') memcpy(cell, &narrow, sizeof narrow);
    else memcpy(cell, &value, sizeof value);
    return 1;
  }
  long long value = PyLong_AsLongLong(arg);
  if (value == -1 && PyErr_Occurred()) return 0;
  if (kind == 'i' && value != (int32_t)value) return PyErr_SetString(PyExc_OverflowError, "no 32-bit integer"), 0;
  *cell = (uint64_t)value;
  return 1;
}

// 1 if the launch is for us, 0 if it is for what is asked in our place, -1 for an error.
static inline int is_ours(const Launch *self) {
  PyObject **asked = ((PyTupleObject *)self->held)->ob_item;
  if (PyDict_GET_SIZE(asked[TAPES]) || PyList_GET_SIZE(asked[ENTER]) || PyList_GET_SIZE(asked[LEAVE])) return 0;
  PyObject *current = PyObject_CallNoArgs(asked[CURRENT_DEVICE]);
  if (!current) return -1;
  long device = PyLong_AsLong(current);
  Py_DECREF(current);
  return device == self->device ? 1 : device == -1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *call(PyObject *callable, PyObject *const *args, size_t flags, PyObject *names) {
  Launch *self = (Launch *)callable;
  PyObject **asked = ((PyTupleObject *)self->held)->ob_item;
  Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (names || given != self->count)
    return PyErr_Format(PyExc_TypeError, "a launch of %zd arguments was given %zd, or names", self->count, given);
  int ours = is_ours(self);
  if (ours < 0) return NULL;
  if (!ours) return PyObject_Vectorcall(asked[GUARDED], args, given, NULL);

  long grid = self->grid;
  if (grid == -1) {
    grid = PyLong_AsLong(args[0]);
    if (grid == -1 && PyErr_Occurred()) return NULL;
  }
  uint64_t cells[MOST];
  void *parameters[MOST];
  for (unsigned i = 0; i < self->parameters; i++) {
    parameters[i] = &cells[i];
    if (self->places[i] == SETTLED) cells[i] = self->cells[i];
    else if (!packed(self->kinds[i], args[self->places[i]], &cells[i])) return NULL;
  }
  if (grid < 1) Py_RETURN_NONE;
  PyObject *current = PyObject_CallOneArg(asked[RAW_STREAM], asked[DEVICE]);
  if (!current) return NULL;
  uint64_t stream = PyLong_AsUnsignedLongLongMask(current);
  Py_DECREF(current);
  if (PyErr_Occurred()) return NULL;

  int status;
  // A full queue makes a launch wait, and what it waits for may need another thread of Python.
  Py_BEGIN_ALLOW_THREADS;
  status = self->launch(self->kernel, (unsigned)grid, 1, 1, self->threads, 1, 1, self->shared,
                        (void *)(uintptr_t)stream, parameters, NULL);
  Py_END_ALLOW_THREADS;
  // Nothing was launched. Triton makes the context of a thread that has none yet, or says what is wrong.
  if (status) return PyObject_Vectorcall(asked[GUARDED], args, given, NULL);
  Py_RETURN_NONE;
}

static int traverse(PyObject *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(((Launch *)self)->held);
  return 0;
}

// The tuple goes with the launch, which nobody can call any more, and not before: calls read it without asking.
static void release(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  Py_CLEAR(((Launch *)self)->held);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

static Launch *new(PyTypeObject *type, const Launch *like, PyObject *held) {
  Launch *made = PyObject_GC_New(Launch, type);
  if (!made) return NULL;
  memcpy((char *)made + sizeof(PyObject), (const char *)like + sizeof(PyObject), sizeof *made - sizeof(PyObject));
  Py_INCREF(held);
  made->held = held;
  PyObject_GC_Track((PyObject *)made);
  return made;
}

// launch.settle(grid, arguments, otherwise) -> a launch of those arguments that are `...`; otherwise(*those) does it
// where this one is not to.
static PyObject *settle(PyObject *launch, PyObject *args) {
  Launch *self = (Launch *)launch, like = *self;
  PyObject *values, *otherwise;
  if (!PyArg_ParseTuple(args, "lO!O", &like.grid, &PyTuple_Type, &values, &otherwise)) return NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(values);
  if (self->grid != -1 || like.grid < 0 || count != self->count - 1)
    return PyErr_SetString(PyExc_ValueError, "a launch is settled once, with a grid and all arguments"), NULL;
  uint8_t places[MOST] = {0};
  like.count = 0;
  for (Py_ssize_t i = 0; i < count; i++)
    if (PyTuple_GET_ITEM(values, i) == Py_Ellipsis) places[i] = like.count++;
  for (unsigned i = 0; i < self->parameters; i++) {
    if (self->places[i] == SETTLED) continue;
    unsigned at = self->places[i] - 1; // the grid came first
    PyObject *value = PyTuple_GET_ITEM(values, at);
    if (value == Py_Ellipsis) like.places[i] = places[at];
    else if (like.places[i] = SETTLED, !packed(self->kinds[i], value, &like.cells[i])) return NULL;
  }
  PyObject *held = PyTuple_New(ASKED);
  if (!held) return NULL;
  for (Py_ssize_t i = 0; i < ASKED; i++) {
    PyObject *each = i == GUARDED ? otherwise : PyTuple_GET_ITEM(self->held, i);
    Py_INCREF(each);
    PyTuple_SET_ITEM(held, i, each);
  }
  Launch *made = new(Py_TYPE(launch), &like, held);
  Py_DECREF(held);
  return (PyObject *)made;
}

static PyMethodDef own[] = {{"settle", settle, METH_VARARGS, "settle(grid, arguments, otherwise) -> launch"},
                            {NULL, NULL, 0, NULL}};
static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Launch, call), READONLY, NULL}, {NULL, 0, 0, 0, NULL}};
static PyType_Slot slots[] = {{Py_tp_call, PyVectorcall_Call}, {Py_tp_traverse, traverse}, {Py_tp_dealloc, release},
                              {Py_tp_members, members},        {Py_tp_methods, own},       {0, NULL}};
static PyType_Spec spec = {
    "vllm_gems_launch.Launch", sizeof(Launch), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
static PyObject *type;

// make(cuLaunchKernel's address, kernel, threads, shared bytes, parameters, what arguments are, what it asks) -> launch
// What an argument is: the kind of a parameter, or a blank where it is not passed. Parameters after those are 0.
static PyObject *make(PyObject *module, PyObject *args) {
  unsigned long long launch, kernel;
  const char *kinds;
  Py_ssize_t count;
  PyObject *held;
  Launch like = {.call = call, .grid = -1};
  if (!PyArg_ParseTuple(args, "KKIIIs#O!", &launch, &kernel, &like.threads, &like.shared, &like.parameters, &kinds,
                        &count, &PyTuple_Type, &held))
    return NULL;
  *(void **)&like.launch = (void *)(uintptr_t)launch;
  like.kernel = (void *)(uintptr_t)kernel;
  like.count = count + 1;
  unsigned passed = 0;
  int fits = count < MOST && like.parameters <= MOST && PyTuple_GET_SIZE(held) == ASKED &&
             PyList_Check(PyTuple_GET_ITEM(held, ENTER)) && PyList_Check(PyTuple_GET_ITEM(held, LEAVE)) &&
             PyDict_Check(PyTuple_GET_ITEM(held, TAPES));
  for (Py_ssize_t i = 0; fits && i < count; i++) {
    if (kinds[i] == ' ') continue;
    if (!strchr("pilfd", kinds[i]) || passed == like.parameters) fits = 0;
    else like.kinds[passed] = kinds[i], like.places[passed++] = i + 1;
  }
  if (!fits) return PyErr_SetString(PyExc_ValueError, "a launch whose parts do not fit together"), NULL;
  memset(&like.places[passed], SETTLED, MOST - passed);
  like.device = PyLong_AsLong(PyTuple_GET_ITEM(held, DEVICE));
  if (like.device == -1 && PyErr_Occurred()) return NULL;
  return (PyObject *)new((PyTypeObject *)type, &like, held);
}

static PyMethodDef methods[] = {
    {"make", make, METH_VARARGS, "make(launch, kernel, threads, shared, parameters, kinds, asked) -> launch"},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "vllm_gems_launch", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_vllm_gems_launch(void) {
  type = PyType_FromSpec(&spec);
  PyObject *made = type ? PyModule_Create(&module) : NULL;
  if (made && PyModule_AddIntMacro(made, MOST)) Py_CLEAR(made);
  return made;
}
