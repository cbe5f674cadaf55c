/* Setting up what workers share, and keeping its marks. See workers.h. */
#include "workers.h"

#include <string.h>

#define MARKS_MIN     4096u
#define FREE_LIST_MAX 512u
#define SOFT_CLASSES  512u
#define KEY_BYTES_MIN (NAT_HASHED_BYTES + 4u)

/* Microsoft's, which every NIC's data sheet prints: for ports whose own key is not to be had. */
static const uint8_t soft_key[] = {0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67,
				   0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b, 0xcb};

static uint32_t marks_for(uint32_t n, uint64_t max_sessions)
{
	uint32_t marks = MARKS_MIN;

	while (marks < max_sessions / n && marks < UINT32_C(1) << 30)
		marks *= 2;
	return marks;
}

size_t nat_workers_size(uint32_t n, uint64_t max_sessions)
{
	return sizeof(struct nat_workers) + (size_t)n * marks_for(n, max_sessions);
}

/* The 32 bits of the key that stand from `bit` on. */
static uint32_t key_window(const uint8_t *key, uint32_t bit)
{
	uint64_t bytes = 0;

	for (uint32_t i = 0; i < 5; i++)
		bytes = bytes << 8 | key[bit / 8 + i];
	return (uint32_t)(bytes >> (8 - bit % 8));
}

static void set_key(struct nat_spread *spread, const uint8_t *key)
{
	for (uint32_t at = 0; at < NAT_HASHED_BYTES; at++)
		for (uint32_t value = 0; value < 256; value++)
			for (uint32_t bit = 0; bit < 8; bit++)
				if (value >> (7 - bit) & 1)
					spread->part[at][value] ^= key_window(key, at * 8 + bit);
}

static void set_spread(struct nat_spread *spread, uint32_t n, const struct nat_rss *rss)
{
	set_key(spread, rss ? rss->key : soft_key);
	spread->class_mask = (rss ? rss->n_classes : SOFT_CLASSES) - 1;
	for (uint32_t i = 0; i <= spread->class_mask; i++)
		spread->worker[i] = (uint8_t)(rss ? rss->worker[i] : i % n);
}

bool nat_rss_is_usable(const struct nat_rss *rss, uint32_t n_workers)
{
	struct nat_spread spread = {0};
	bool class_reached[NAT_RSS_CLASSES_MAX] = {0}, worker_reached[NAT_WORKERS_MAX] = {0};
	uint32_t classes = 0, workers = 0;

	if (rss->n_classes == 0 || rss->n_classes > NAT_RSS_CLASSES_MAX ||
	    (rss->n_classes & (rss->n_classes - 1)) != 0)
		return false;
	for (uint32_t i = 0; i < rss->n_classes; i++)
		if (rss->worker[i] >= n_workers)
			return false;
	set_spread(&spread, n_workers, rss);
	for (uint32_t port = 1024; port < 65536; port++) {
		const uint32_t class = nat_spread_port(&spread, 1, port) & spread.class_mask;
		classes += !class_reached[class];
		workers += !worker_reached[spread.worker[class]];
		class_reached[class] = worker_reached[spread.worker[class]] = true;
	}
	return classes == rss->n_classes && workers == n_workers;
}

struct nat_workers *nat_workers_init(void *mem, uint32_t n, uint64_t max_sessions, uint64_t seed,
				     const struct nat_rss *inside, const struct nat_rss *outside)
{
	struct nat_workers *workers = mem;
	const uint64_t share = max_sessions / (n * UINT64_C(8));

	memset(mem, 0, nat_workers_size(n, max_sessions));
	workers->n = n;
	workers->mark_mask = marks_for(n, max_sessions) - 1;
	workers->key = nat_key_from_seed(seed, 'w');
	workers->free_list_records = share > FREE_LIST_MAX ? FREE_LIST_MAX : share < 8 ? 8 : (uint32_t)share;
	set_spread(&workers->spread[0], n, inside);
	set_spread(&workers->spread[1], n, outside);
	return workers;
}

_Static_assert(sizeof(soft_key) >= KEY_BYTES_MIN, "the last window ends behind the last hashed bit");

/* ---- what a NIC would do ---- */

uint32_t nat_workers_queue(const struct nat_workers *workers, bool outside, const uint8_t *ip, uint32_t bytes)
{
	const struct nat_spread *spread = &workers->spread[outside];
	uint32_t hash = 0;

	if (bytes < 20)
		return 0;
	for (uint32_t i = 0; i < 8; i++)
		hash ^= spread->part[i][ip[12 + i]];
	const uint32_t header = (ip[0] & 15) * 4u;
	const bool whole = ((ip[6] & 0x3f) | ip[7]) == 0, ports = ip[9] == 6 || ip[9] == 17;
	for (uint32_t i = 0; i < 4 && whole && ports && header + 4 <= bytes; i++)
		hash ^= spread->part[8 + i][ip[header + i]];
	return nat_spread_worker(spread, hash);
}

/* ---- marks ---- */

void nat_away_begin(struct nat_workers *workers, uint32_t place, const struct nat_tuple *tuple, uint32_t at,
		    bool borrowed)
{
	const uint8_t now = (uint8_t)((at + 1) | (borrowed ? NAT_MARK_BORROWED : 0));
	struct nat_workers_line *line = &workers->line[place];
	_Atomic uint8_t *mark = nat_mark_of(workers, place, tuple);
	uint8_t before = 0;

	/* Either the owner sees that somebody is away and does not wipe, or we see that it wipes and wait. */
	atomic_fetch_add(&line->away, 1);
	while (atomic_load(&line->wiping))
		;
	atomic_store(&line->marked, true);
	if (atomic_compare_exchange_strong(mark, &before, now) || before == now)
		return;
	/* two kinds of one worker are told as the older one */
	if (((before ^ now) & ~NAT_MARK_BORROWED) != 0)
		atomic_store(mark, NAT_MARK_MANY);
}

void nat_away_end(struct nat_workers *workers, uint32_t place)
{
	atomic_fetch_sub(&workers->line[place].away, 1);
}

void nat_marks_tidy(struct nat_workers *workers, uint32_t worker, struct nat_tidying *t)
{
	struct nat_workers_line *line = &workers->line[worker];
	const size_t first = (size_t)worker * ((size_t)workers->mark_mask + 1);

	if (t->left == 0 && !atomic_load_explicit(&line->marked, memory_order_relaxed))
		return;
	atomic_store(&line->wiping, true);
	if (atomic_load(&line->away) !=
	    0) { /* what is not wiped yet waits for the next time that nobody is */
		if (t->left != 0)
			atomic_store(&line->marked, true);
		t->left = 0;
	} else {
		if (atomic_exchange(&line->marked, false))
			t->left = workers->mark_mask + 1;
		for (uint32_t n = 0; n < NAT_TIDIED_AT_ONCE && t->left != 0; n++, t->left--) {
			atomic_store_explicit(&workers->mark[first + t->at], 0, memory_order_relaxed);
			t->at = (t->at + 1) & workers->mark_mask;
		}
	}
	atomic_store(&line->wiping, false);
}
