/* What the kernel is told about its packets: verdicts, many of them in one sendmsg().
 *
 * A verdict that changes a packet carries all of it, and there is no message that changes several, so each
 * packet has a message of its own. They are gathered by the queue that the packets came from, which is
 * nearly always our own (peers.c).
 *
 * Small packets are copied behind their verdict's header, so that the kernel reads one run of bytes (two
 * vectors for each of 32 packets cost it more than copying them costs us), and their slots are free at
 * once. Of larger ones the bytes are sent from the slot, which is free when they are sent.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_queue.h>
#include <linux/netlink.h>
#include <stdlib.h>
#include <string.h>

#include "queue_internal.h"

#define FLUSH_BYTES  65536u /* of verdicts in one message: the kernel must find memory for it in one piece */
#define VECTORS_EACH 2u
#define COPY_BYTES   256u /* payloads up to this are copied */
#define ANSWER_BYTES (sizeof(struct queue_answer) + COPY_BYTES)

struct queue_answer { /* a message of NFQNL_MSG_VERDICT, up to the payload's bytes */
	struct nlmsghdr header;
	struct nfgenmsg info;
	struct nlattr verdict_header;
	struct nfqnl_msg_verdict_hdr verdict;
	struct nlattr payload_header;
};
_Static_assert(sizeof(struct queue_answer) == 16 + 4 + 4 + 8 + 4, "no padding between attributes");
#define BARE_BYTES ((uint32_t)offsetof(struct queue_answer, payload_header))

bool queue_answers_open(struct queue *q)
{
	for (uint32_t i = 0; i < q->params.n_peers; i++) {
		q->answers[i].text = calloc(QUEUE_BURST, ANSWER_BYTES);
		q->answers[i].vector = calloc(QUEUE_BURST * VECTORS_EACH, sizeof(struct iovec));
		if (!q->answers[i].text || !q->answers[i].vector)
			return false;
	}
	return true;
}

void queue_answers_close(struct queue *q)
{
	for (uint32_t i = 0; i < q->params.n_peers; i++) {
		free(q->answers[i].text);
		free(q->answers[i].vector);
	}
}

/* ---- what did not work ---- */

static void undo(struct queue *q, uint32_t sequence, enum nat_reason reason)
{
	struct nat_pkt pkt = {.verdict = sequence & SEQ_PASS ? NAT_PASS : NAT_FORWARD,
			      .reason = (uint8_t)(sequence & SEQ_PASS ? sequence : NAT_REASON_OK)};

	if ((sequence & 0xffffu) != SEQ_DROP)
		nat_engine_undo(q->params.thread->engine, &pkt, reason);
}

/* The packet's interface went down, and the kernel threw away what was queued for it. */
void queue_refused(struct queue *q, uint32_t sequence)
{
	const uint32_t counted_by = sequence >> 16;
	struct thread *t = q->params.thread;

	if (counted_by == t->index) {
		undo(q, sequence, NAT_REASON_LINK_DOWN);
		return;
	}
	if (counted_by >= q->params.n_peers || (sequence & 0xffffu) == SEQ_DROP)
		return;
	t = q->params.peers[counted_by].params.thread;
	if (sequence & SEQ_PASS)
		atomic_fetch_add(&t->lost[sequence & 0xffu], 1);
	else
		atomic_fetch_add(&t->lost_forwards, 1);
}

static ssize_t send_vectors(struct queue *q, uint32_t to)
{
	struct queue_answers *answers = &q->answers[to];
	struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
	struct msghdr message = {.msg_name = &kernel,
				 .msg_namelen = sizeof kernel,
				 .msg_iov = answers->vector,
				 .msg_iovlen = answers->n_vectors};
	ssize_t n;

	do
		n = sendmsg(q->params.peers[to].fd, &message, 0);
	while (n < 0 && errno == EINTR);
	return n;
}

/* The kernel has no memory for a batch: what is in it is dropped, by messages that need next to none. */
static void give_up(struct queue *q, uint32_t to)
{
	struct queue_answers *answers = &q->answers[to];

	for (uint32_t i = 0; i < answers->n; i++) {
		struct queue_answer *a = (struct queue_answer *)(void *)(answers->text + answers->at[i]);

		undo(q, a->header.nlmsg_seq, NAT_REASON_NO_BUFFER);
		a->header.nlmsg_seq = SEQ_DROP;
		a->header.nlmsg_len = BARE_BYTES;
		a->verdict.verdict = htonl(NF_DROP);
		answers->vector[0] = (struct iovec){.iov_base = a, .iov_len = BARE_BYTES};
		answers->n_vectors = 1;
		(void)send_vectors(q, to);
	}
}

/* ---- verdicts ---- */

static void flush_to(struct queue *q, uint32_t to)
{
	struct queue_answers *answers = &q->answers[to];

	if (send_vectors(q, to) < 0)
		give_up(q, to);
	answers->n = answers->n_vectors = answers->used = 0;
	answers->bytes = 0;
	/* slots whose bytes were still being sent */
	while (answers->slots) {
		struct queue_slot *slot = answers->slots;

		answers->slots = slot->next;
		queue_slot_free(q, slot);
	}
}

void queue_flush(struct queue *q)
{
	queue_hand_over_flush(q);
	for (uint32_t i = 0; i < q->params.n_peers; i++)
		if (q->answers[i].n)
			flush_to(q, i);
}

/* What follows on what is there already is one run with it. */
static void vector_add(struct queue_answers *answers, uint8_t *base, size_t bytes)
{
	struct iovec *last = answers->n_vectors ? &answers->vector[answers->n_vectors - 1] : NULL;

	if (last && (uint8_t *)last->iov_base + last->iov_len == base)
		last->iov_len += bytes;
	else
		answers->vector[answers->n_vectors++] = (struct iovec){.iov_base = base, .iov_len = bytes};
}

static uint32_t padded(uint32_t bytes) /* as netlink attributes are */
{
	return (bytes + 3) & ~3u;
}

void queue_answer(struct queue *q, struct queue_slot *slot, uint32_t verdict, uint32_t sequence,
		  const struct nat_pkt *pkt)
{
	struct queue_answers *answers = &q->answers[slot->queue];
	uint32_t payload_bytes = pkt ? pkt->len_bytes : 0;
	uint32_t bytes = pkt ? (uint32_t)sizeof(struct queue_answer) + padded(payload_bytes) : BARE_BYTES;

	if (answers->n == QUEUE_BURST || (answers->n && answers->bytes + bytes > FLUSH_BYTES))
		flush_to(q, slot->queue);
	uint8_t *text = answers->text + answers->used;
	struct queue_answer *a = (struct queue_answer *)(void *)text;

	answers->at[answers->n++] = answers->used;

	*a = (struct queue_answer){
		.header = {.nlmsg_len = bytes,
			   .nlmsg_type = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT,
			   .nlmsg_flags = NLM_F_REQUEST,
			   .nlmsg_seq = q->params.thread->index << 16 | sequence},
		.info = {.nfgen_family = AF_UNSPEC,
			 .version = NFNETLINK_V0,
			 .res_id = htons((uint16_t)(QUEUE_FIRST + slot->queue))},
		.verdict_header = {.nla_len = sizeof a->verdict_header + sizeof a->verdict,
				   .nla_type = NFQA_VERDICT_HDR},
		.verdict = {.verdict = htonl(verdict), .id = slot->id_be},
		.payload_header = {.nla_len = (uint16_t)(sizeof a->payload_header + payload_bytes),
				   .nla_type = NFQA_PAYLOAD},
	};
	answers->bytes += bytes;
	/* up to three bytes behind the packet are sent too; the slot has them, the kernel skips them */
	if (pkt && payload_bytes <= COPY_BYTES)
		memcpy(text + sizeof *a, pkt->l3, padded(payload_bytes));
	if (!pkt || payload_bytes <= COPY_BYTES) {
		vector_add(answers, text, bytes);
		answers->used += bytes;
		queue_slot_free(q, slot);
		return;
	}
	vector_add(answers, text, sizeof *a);
	vector_add(answers, pkt->l3, padded(payload_bytes));
	answers->used += (uint32_t)sizeof *a;
	slot->next = answers->slots;
	answers->slots = slot;
}
