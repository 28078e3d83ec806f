// A libcublasLt for machines without a GPU: float32 products on host memory, by the rules of cublasLtMatmul.
//
// Written from NVIDIA's documentation, columns first as there, and as strict: what is not set, not aligned or not asked
// for is an error. A product leaves its mark in the workspace, so that one that is too small is seen.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID = 7, UNSUPPORTED = 15 };

typedef struct { int compute, scale, transpose_a, epilogue; const float *bias; } Description;
typedef struct { int type; uint64_t rows, cols; int64_t ld; } Layout;
typedef struct { uint64_t workspace; uint32_t alignment[4]; } Preference;
typedef struct { uint64_t algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; } Result;

static int searched;
int standin_searched(void) { return searched; }

int cublasLtCreate(void **handle) { *handle = malloc(1); return 0; }

int cublasLtMatmulDescCreate(void **found, int compute, int scale) {
  Description *d = calloc(1, sizeof *d);
  d->compute = compute, d->scale = scale, d->epilogue = 1;
  *found = d;
  return 0;
}

int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t size) {
  Description *d = desc;
  switch (attribute) {
    case 3: if (size != 4) return INVALID; memcpy(&d->transpose_a, value, 4); return 0;
    case 7: if (size != 4) return INVALID; memcpy(&d->epilogue, value, 4); return 0;
    case 8: if (size != 8) return INVALID; memcpy(&d->bias, value, 8); return 0;
  }
  return INVALID;
}

int cublasLtMatrixLayoutCreate(void **found, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (ld < (int64_t)rows) return INVALID;
  Layout *l = malloc(sizeof *l);
  *l = (Layout){type, rows, cols, ld};
  *found = l;
  return 0;
}

int cublasLtMatmulPreferenceCreate(void **found) { *found = calloc(1, sizeof(Preference)); return 0; }

int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t size) {
  Preference *p = preference;
  if (attribute == 1 && size == 8) { memcpy(&p->workspace, value, 8); return 0; }
  if (attribute >= 5 && attribute <= 8 && size == 4) { memcpy(&p->alignment[attribute - 5], value, 4); return 0; }
  return INVALID;
}

static int fits(const Description *d, const Layout *a, const Layout *b, const Layout *c) {
  return d->compute == 68 && d->scale == 0 && d->transpose_a == 1 && (d->epilogue == 1 || d->epilogue == 4) &&
         a->type == 0 && b->type == 0 && c->type == 0 && a->rows == b->rows && a->cols == c->rows && b->cols == c->cols;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                                   int most, void *results, int *count) {
  Result *result = results;
  Preference *p = preference;
  searched++;
  *count = 0;
  if (!handle || most < 1 || c != d || !fits(desc, a, b, d)) return INVALID;
  for (int i = 0; i < 4; i++)
    if (p->alignment[i] != 16) return UNSUPPORTED;
  memset(result, 0, sizeof *result);
  result->workspace = p->workspace, result->algorithm[0] = ((Layout *)b)->cols;
  *count = 1;
  return 0;
}

int cublasLtMatmul(void *handle, void *desc, const float *alpha, const float *a, void *a_layout, const float *b,
                   void *b_layout, const float *beta, const float *c, void *c_layout, float *out, void *out_layout,
                   const uint64_t *algorithm, char *workspace, size_t size, void *stream) {
  const Description *d = desc;
  const Layout *la = a_layout, *lb = b_layout, *lo = out_layout;
  if (!handle || !fits(d, la, lb, lo) || c_layout != out_layout || *beta != (c == out ? 0 : 1)) return INVALID;
  if (algorithm[0] != lb->cols || stream != (void *)77) return INVALID;
  if (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)out) % 16) return INVALID;
  workspace[0] = workspace[size - 1] = 1;
  for (uint64_t col = 0; col < lo->cols; col++)
    for (uint64_t row = 0; row < lo->rows; row++) {
      float sum = (d->epilogue == 4 ? d->bias[row] : 0) + (*beta != 0 ? *beta * c[col * lo->ld + row] : 0);
      for (uint64_t k = 0; k < la->rows; k++) sum += *alpha * a[row * la->ld + k] * b[col * lb->ld + k];
      out[col * lo->ld + row] = sum;
    }
  return 0;
}
