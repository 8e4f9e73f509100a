/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one kernel of the package: chunks between the blocks of a KV cache and a staging buffer, both
 * on the device. It is PTX, which each driver compiles for its device when the module is loaded, so
 * neither a compiler of CUDA nor its run-time compiler is needed anywhere. It does what this does:
 *
 *     for (item = CTA; item < rows * regions; item += CTAs) {
 *         region = item / rows, row = item % rows;
 *         block = base[region] + row.block * stride;
 *         staged = staging + (row.first + region * row.pitch) * chunk_bytes;
 *         copy chunk_bytes, 16 at a time, four in flight a thread: to_staging ? block -> staged
 *                                                                             : staged -> block;
 *     }
 *
 * All parameters are given by value (below 4,096 bytes, what kernels of all devices take), so that
 * nothing on the device has to be written before a launch.
 */
#ifndef KVBM_CUDA_STAGING_H
#define KVBM_CUDA_STAGING_H

#include <stddef.h>
#include <stdint.h>

enum { KV_MOVE_REGIONS_MAX = 256, KV_MOVE_ROWS_MAX = 128, KV_MOVE_THREADS = 256 };

typedef struct kv_move_row {
    uint32_t block;
    uint32_t first; /* chunks in the staging buffer before this row's chunk of region 0 */
    uint32_t pitch; /* chunks from one region to the next */
} kv_move_row;

typedef struct kv_move {
    uint64_t staging, stride;
    uint32_t rows, regions, vectors, to_staging; /* vectors: 16 bytes each, in a chunk */
    uint64_t base[KV_MOVE_REGIONS_MAX];          /* device block 0 */
    kv_move_row row[KV_MOVE_ROWS_MAX];
} kv_move;

_Static_assert(offsetof(kv_move, base) == 32, "the kernel has this number");
_Static_assert(offsetof(kv_move, row) == 2080, "the kernel has this number");
_Static_assert(sizeof(kv_move) == 3616, "the kernel has this number");

static const char KV_MOVE_NAME[] = "kvbm_move";
static const char KV_MOVE_PTX[] =
    ".version 6.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry kvbm_move(.param .align 8 .b8 move[3616])\n"
    ".maxntid 256, 1, 1\n"
    "{\n"
    "  .reg .pred past, out;\n"
    "  .reg .b32 rows, regions, vectors, outward, items, item, ctas, threads, thread;\n"
    "  .reg .b32 region, row, block, first, pitch, chunk, i, t;\n"
    "  .reg .b32 a<4>, b<4>, c<4>, d<4>;\n"
    "  .reg .b64 move_at, staging, stride, hop, device, staged, from, to, f, g, w;\n"
    "  mov.b64 move_at, move;\n"
    "  ld.param.u64 staging, [move];\n"
    "  ld.param.u64 stride, [move+8];\n"
    "  ld.param.u32 rows, [move+16];\n"
    "  ld.param.u32 regions, [move+20];\n"
    "  ld.param.u32 vectors, [move+24];\n"
    "  ld.param.u32 outward, [move+28];\n"
    "  setp.ne.u32 out, outward, 0;\n"
    "  cvta.to.global.u64 staging, staging;\n"
    "  mul.lo.u32 items, rows, regions;\n"
    "  shl.b32 chunk, vectors, 4;\n"
    "  mov.u32 item, %ctaid.x;\n"
    "  mov.u32 ctas, %nctaid.x;\n"
    "  mov.u32 thread, %tid.x;\n"
    "  mov.u32 threads, %ntid.x;\n"
    "  mul.wide.u32 hop, threads, 16;\n"
    "NEXT:\n"
    "  setp.ge.u32 past, item, items;\n"
    "  @past bra DONE;\n"
    "  div.u32 region, item, rows;\n"
    "  mul.lo.u32 t, region, rows;\n"
    "  sub.u32 row, item, t;\n"
    "  mul.wide.u32 w, region, 8;\n"
    "  add.u64 w, w, move_at;\n"
    "  ld.param.u64 device, [w+32];\n"
    "  mul.wide.u32 w, row, 12;\n"
    "  add.u64 w, w, move_at;\n"
    "  ld.param.u32 block, [w+2080];\n"
    "  ld.param.u32 first, [w+2084];\n"
    "  ld.param.u32 pitch, [w+2088];\n"
    "  cvt.u64.u32 w, block;\n"
    "  mad.lo.u64 device, w, stride, device;\n"
    "  cvta.to.global.u64 device, device;\n"
    "  mad.lo.u32 t, region, pitch, first;\n"
    "  mul.wide.u32 w, t, chunk;\n"
    "  add.u64 staged, staging, w;\n"
    "  selp.b64 from, device, staged, out;\n"
    "  selp.b64 to, staged, device, out;\n"
    "  mov.u32 i, thread;\n"
    "FOUR:\n"
    "  mad.lo.u32 t, threads, 3, i;\n"
    "  setp.ge.u32 past, t, vectors;\n"
    "  @past bra ONE;\n"
    "  mul.wide.u32 w, i, 16;\n"
    "  add.u64 f, from, w;\n"
    "  add.u64 g, to, w;\n"
    "  ld.global.v4.u32 {a0, a1, a2, a3}, [f];\n"
    "  add.u64 f, f, hop;\n"
    "  ld.global.v4.u32 {b0, b1, b2, b3}, [f];\n"
    "  add.u64 f, f, hop;\n"
    "  ld.global.v4.u32 {c0, c1, c2, c3}, [f];\n"
    "  add.u64 f, f, hop;\n"
    "  ld.global.v4.u32 {d0, d1, d2, d3}, [f];\n"
    "  st.global.v4.u32 [g], {a0, a1, a2, a3};\n"
    "  add.u64 g, g, hop;\n"
    "  st.global.v4.u32 [g], {b0, b1, b2, b3};\n"
    "  add.u64 g, g, hop;\n"
    "  st.global.v4.u32 [g], {c0, c1, c2, c3};\n"
    "  add.u64 g, g, hop;\n"
    "  st.global.v4.u32 [g], {d0, d1, d2, d3};\n"
    "  mad.lo.u32 i, threads, 4, i;\n"
    "  bra FOUR;\n"
    "ONE:\n"
    "  setp.ge.u32 past, i, vectors;\n"
    "  @past bra AFTER;\n"
    "  mul.wide.u32 w, i, 16;\n"
    "  add.u64 f, from, w;\n"
    "  add.u64 g, to, w;\n"
    "  ld.global.v4.u32 {a0, a1, a2, a3}, [f];\n"
    "  st.global.v4.u32 [g], {a0, a1, a2, a3};\n"
    "  add.u32 i, i, threads;\n"
    "  bra ONE;\n"
    "AFTER:\n"
    "  add.u32 item, item, ctas;\n"
    "  bra NEXT;\n"
    "DONE:\n"
    "  ret;\n"
    "}\n";

#endif
