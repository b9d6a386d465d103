/* The predictor's inside: what its files share. predictor.c learns and estimates,
 * predictor_shadow.c holds the shadows and decides the mode, predictor_history.c turns the history
 * into bytes. */
#ifndef HEARTH_MODEL_PREDICTOR_INTERNAL_H
#define HEARTH_MODEL_PREDICTOR_INTERNAL_H

#include "daemon/model/predictor.h"
#include "lib/hash.h"
#include "lib/wire.h"

#define MAX_MODELS PREDICTOR_MAX_MODELS

/* No model. */
#define NOBODY UINT32_MAX

struct predicted_model {
    char name[WIRE_MAX_MODEL_NAME + 1];
    uint64_t bytes;
    uint64_t last_request_us; /* 0: never */
    bool predictable;
    double soon; /* how often what followed it came within the window */
    UT_hash_handle hh;
};

/* Ways of foretelling the next request, each a distribution over the models. */
enum view {
    VIEW_FREQUENT, /* by how often, over hundreds of requests */
    VIEW_RECENT,   /* by how often, over tens */
    VIEW_FOLLOWS,  /* by what followed the last model, over tens of times */
    VIEW_FOLLOWED, /* by what followed it the last few times */
    VIEW_PAIR,     /* by what followed the last two, in this order */
    _VIEW_MAX,
};

/* What followed two models in a row. */
#define PAIR_PLACES     2048u
#define PAIR_SUCCESSORS 4u

struct pair {
    uint16_t before, last; /* numbers plus one; 0: empty */
    uint16_t successor[PAIR_SUCCESSORS];
    float count[PAIR_SUCCESSORS], sum;
};

/* A matrix of counts that fade: row a, column b: how often b followed a. */
struct follow {
    float count[MAX_MODELS][MAX_MODELS];
    float sum[MAX_MODELS];
};

/* ---- shadows ---- */

enum shadow_kind { SHADOW_LRU, SHADOW_ORDER, SHADOW_PREDICT, SHADOW_FILL, _SHADOW_MAX };

struct shadow {
    bool there[MAX_MODELS];
    uint64_t ready_us[MAX_MODELS]; /* when a predicted load is over */
    uint64_t used_us[MAX_MODELS];
    bool target[MAX_MODELS]; /* SHADOW_FILL's */
    uint64_t io_free_us;
    double cost;   /* waiting, in bytes of loads waited for; fading */
    double misses; /* requests that waited, fading */
    double wait;   /* in the last request, likewise */
};

/* Its own ways on trial: what they cost and what LRU would have, fading. */
struct trial {
    double real, lru; /* bytes */
    double real_misses, lru_misses;
    double mean;       /* of a load */
    uint32_t requests; /* so far */
    uint32_t misses;   /* in a row */
    uint32_t failures; /* in a row */
    uint32_t pause;    /* requests until the next one */
};

struct predictor {
    struct predicted_model models[MAX_MODELS];
    struct predicted_model *by_name; /* uthash */
    uint32_t n, n_asked;             /* that are known; that were ever asked for */
    uint32_t before, last;           /* the last two requests' models, or NOBODY */
    uint64_t last_us;
    uint64_t budget_bytes;
    double bytes_per_s;
    const float *truth;
    uint32_t n_truth;

    float frequent[MAX_MODELS], recent[MAX_MODELS];
    float frequent_sum, recent_sum;
    struct follow follows, followed;
    struct pair pairs[PAIR_PLACES];
    double weight[_VIEW_MAX];
    double skill; /* of the estimates: how much more than 1/n_asked they gave, in log; fading */
    double next[MAX_MODELS];   /* how likely the next request is for it */
    double wanted[MAX_MODELS]; /* the same, and a little of those after it */
    double chance[MAX_MODELS]; /* of being asked for within the window */

    bool proposed[MAX_MODELS]; /* since the last request */
    bool target[MAX_MODELS];   /* what would best be there; chosen once after a request */
    bool target_chosen;

    struct shadow shadow[_SHADOW_MAX];
    enum predictor_mode mode;
    struct trial trial;
    bool dry_run;
    uint64_t n_requests;
};

/* A model is predicted from this chance on, and belongs to a set to fill memory with from this one.
 */
#define CHANCE_WORTH_LOADING 0.35
#define CHANCE_WORTH_FILLING 0.02
/* What a newcomer counts against what it would displace, and a set against another. */
#define WORTH_OF_NEWCOMERS 0.8
#define WORTH_OF_TARGET    0.95

/* The best set is looked for around so many of the most wanted per byte. */
#define TARGET_TRIES 16u
/* More than any model is wanted: members of the target stay, whatever the others are wanted. */
#define TARGET_BONUS 16.0

/* The set of models that would best be in memory, where it is clearly better than those there. */
void target_choose(const struct predictor *p, const bool *there, bool *ret_target);
/* The likeliest of those that are worth loading (`target`: members of it, too); NOBODY: none. */
uint32_t candidate(const struct predictor *p, const bool *target, const bool *there,
                   const bool *proposed);

/* How wanted a model is, as a resident and as a newcomer that nobody asked for. What is in the
 * target displaces what is not, and is displaced by nothing but requests. */
static inline double wanted_with(const struct predictor *p, const bool *target, uint32_t m)
{
    return p->wanted[m] + (target && target[m] ? TARGET_BONUS : 0);
}

static inline double worth_with(const struct predictor *p, const bool *target, uint32_t m)
{
    return target && target[m] ? TARGET_BONUS : p->wanted[m] * WORTH_OF_NEWCOMERS;
}

/* predictor_shadow.c: lets the shadows live through a request that has been learned. */
void shadows_request(struct predictor *p, uint32_t model, uint64_t now_us);
/* Chooses the mode, from them and from what really happened. */
void mode_choose(struct predictor *p, uint32_t model, bool ready);
/* Nothing is there any more. */
void shadows_empty(struct predictor *p);
/* The model is not there any more. */
void shadows_forget(struct predictor *p, uint32_t model);

#endif
