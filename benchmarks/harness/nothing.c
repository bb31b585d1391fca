/* What a CUDA runtime and a CUDA driver answer that have an H200 and do nothing with it. All of their other functions are
 * made by nothing.py, and return success. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int nothing(void) { return 0; }
static char object[64]; /* what every handle points to */
static int handle(void **out) { return *out = object, 0; }
static void **registered(void) { static void *handle; return &handle; }
static int zero(int *out) { return *out = 0, 0; }
static int one(int *out) { return *out = 1, 0; }
static int one_float(float *out) { return *out = 1, 0; }
static int version(int *out) { return *out = 13000, 0; }
static const char *text(void) { return "nothing"; }
static int write_text(int error, const char **out) { return *out = "nothing", 0; }
static int entry_point(const char *name, void **out) { return *out = (void *)nothing, 0; }
static int priorities(int *least, int *greatest) { return *least = *greatest = 0, 0; }
static int capturing(void *stream, int *out) { return *out = 0, 0; }
static int pop(void *grid, void *block, void *shared, void **stream) { return *stream = 0, 0; }
static int pointer(size_t *out, int what, size_t of) { return *out = of, 0; }
static int of_kernel(int *out, int what) { return *out = what == 0 ? 1024 : 0, 0; } /* threads; registers spilled */

static int allocate(size_t *out, size_t size) { /* addresses that nobody reads */
  static size_t next = 0x700000000000;
  *out = next;
  next += (size + 0xfffff) & ~(size_t)0xfffff;
  return 0;
}
static int allocate_host(void **out, size_t size) { return *out = malloc(size), 0; }
static int memory(size_t *unused, size_t *all) { return *unused = *all = (size_t)140 << 30, 0; }

static int attribute(int *out, int what) { /* the runtime and the driver have the same numbers */
  switch (what) {
    case 75: *out = 9; break; /* compute capability 9.0 */
    case 16: *out = 132; break; /* multiprocessors */
    case 97: *out = 227 << 10; break; /* shared memory of a block that asks for it, of a multiprocessor, of a block */
    case 81: *out = 228 << 10; break;
    case 8: *out = 48 << 10; break;
    case 1: *out = 1024; break; /* threads of a block, of a warp; registers */
    case 10: *out = 32; break;
    case 12: *out = 65536; break;
    default: *out = 0;
  }
  return 0;
}

static int properties(char *out) { /* cudaDeviceProp, of which the first fields are in the same place in CUDA 12 and 13 */
  memset(out, 0, 392);
  for (int i = 392; i < 680; i += 4) *(int *)(out + i) = 2048; /* threads of a multiprocessor, wherever it has them */
  strcpy(out, "H200 of which nothing is there");
  *(size_t *)(out + 288) = (size_t)140 << 30;
  *(int *)(out + 308) = 32; /* threads of a warp, of a block */
  *(int *)(out + 320) = 1024;
  *(int *)(out + 360) = 9; /* compute capability */
  *(int *)(out + 384) = *(int *)(out + 388) = 132; /* multiprocessors, in CUDA 13 and 12 */
  return 0;
}
