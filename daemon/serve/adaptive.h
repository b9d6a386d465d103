/* Adaptive width: how many columns a step may have so that it takes about as long as one wishes.
 *
 * A column is a token of a prompt or a sequence that generates, so one number bounds both the chunk
 * of prompts and the size of the batch. After a step of `us` the width goes half the way that its
 * measured time asks for: width x (1 + target / us) / 2, at most to 1/2 or 5/4 of what it was.
 *
 * Why that is stable: a step of c columns takes about a + b c (a: weights are read whatever c is).
 * Then c -> c (1 + target / (a + b c)) / 2 grows with c and has one fixed point, the width whose
 * step takes `target`; so from either side the width comes nearer and never passes it, each time by
 * a factor of (1 + a / target) / 2 < 1 close to it. Where a > target no width will do, and it ends
 * at `least`: below that a step's fixed part dominates, and a narrower one would only serve fewer.
 *
 * Against noise: within a tenth of the target nothing changes, and it takes two steps in a row on
 * the same side to change anything, so that one that the system interrupted does not. Steps that
 * were narrower than they might have been say nothing about a larger width.
 *
 * A function of what it is told; hides the rule. Thread: the engine thread. */
#ifndef HEARTH_SERVE_ADAPTIVE_H
#define HEARTH_SERVE_ADAPTIVE_H

#include <stdint.h>

struct adaptive {
    uint64_t target_us; /* 0: off, the width stays `most` */
    uint32_t least, most;
    uint32_t width;
    uint32_t n_over, n_under;       /* steps in a row that were too long or too short */
    uint64_t n_narrowed, n_widened; /* changes so far */
};

void adaptive_init(struct adaptive *adaptive, uint64_t target_us, uint32_t least, uint32_t most);
/* A step of so many columns took `us`. */
void adaptive_note(struct adaptive *adaptive, uint32_t columns, uint64_t us);

#endif
