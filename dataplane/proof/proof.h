/* What the proofs share. They are read by CBMC, never linked: `make prove` (tests/prove.py).
 *
 * A function proof_NAME() stands for every execution: what nondet_*() returns is any value at all,
 * assume() leaves out the cases that a claim does not speak of, assert() is the claim. The comment above
 * it says what is claimed and for which sizes; its line "cbmc:" gives the options. Besides the assertions
 * CBMC shows that there is no access outside an object, no overflow of a signed number and no shift too
 * far, and that no loop runs longer than it was unwound.
 *
 * A file under proof is included whole, so that its static functions can be called. What it calls in other
 * files is replaced by a model, or it is left open and may return anything.
 */
#ifndef PROOF_H
#define PROOF_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define assume(condition) __CPROVER_assume(condition)

uint8_t nondet_u8(void);
uint16_t nondet_u16(void);
uint32_t nondet_u32(void);
uint64_t nondet_u64(void);
bool nondet_bool(void);

#endif
